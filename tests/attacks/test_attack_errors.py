"""What is not allowed is refused by name, before any work."""

import sys

import numpy as np
import pytest
import torch
from art.estimators.classification import BlackBoxClassifier, SklearnClassifier
from art.exceptions import EstimatorError
from models_for_tests import CLASSES, SHAPE, art_classifier, linear_model, small_net, some_images, some_labels
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from guardians.attacks import FGSM, PGD
from guardians.engine.checks import ArgumentTypeError

N = 4
NAN, INF = float("nan"), float("inf")


def with_entry(value, tensor=None):
    tensor = some_images(N) if tensor is None else tensor.clone()
    tensor.view(-1)[17] = value
    return tensor


# id: (constructor arguments, error, what the message says)
CONSTRUCTOR = {
    "unknown norm": ({"norm": "l2"}, ValueError, "norm='l2'"),
    "norm below 1": ({"norm": 0.5}, ValueError, "norm=0.5"),
    "eps negative": ({"eps": -0.1}, ValueError, "eps=-0.1"),
    "eps NaN": ({"eps": NAN}, ValueError, "eps=nan"),
    "eps infinite, random start": ({"eps": INF, "num_random_init": 1}, ValueError, "eps=inf"),
    "eps a number, eps_step an array": ({"eps_step": np.full((1, 1, 1), 0.1)}, TypeError, "eps has shape .* eps_step"),
    "eps string": ({"eps": "8/255"}, TypeError, "eps='8/255'"),
    "eps none": ({"eps": None}, TypeError, "eps=None"),
    "eps true": ({"eps": True}, TypeError, "eps=True"),
    "eps of another type": ({"eps": {"value": 0.1}}, TypeError, "eps="),
    "eps of strings": ({"eps": ["a", "b"]}, (TypeError, ValueError), "eps="),
    "eps array with a negative": ({"eps": np.array([[[0.1]], [[-0.2]], [[0.1]]])}, ValueError, "eps=.*-0.2"),
    "eps tensor with NaN": ({"eps": torch.tensor([0.1, NAN])}, ValueError, "eps=.*nan"),
    "eps_step zero": ({"eps_step": 0}, ValueError, "eps_step=0"),
    "eps_step negative": ({"eps_step": -0.1}, ValueError, "eps_step=-0.1"),
    "eps_step NaN": ({"eps_step": NAN}, ValueError, "eps_step=nan"),
    "eps_step string": ({"eps_step": "a"}, TypeError, "eps_step='a'"),
    "targeted not bool": ({"targeted": 1}, TypeError, "targeted=1"),
    "verbose not bool": ({"verbose": "yes"}, TypeError, "verbose='yes'"),
    "num_random_init negative": ({"num_random_init": -1}, ValueError, "num_random_init=-1"),
    "num_random_init fraction": ({"num_random_init": 1.5}, TypeError, "num_random_init=1.5"),
    "batch_size zero": ({"batch_size": 0}, ValueError, "batch_size=0"),
    "batch_size fraction": ({"batch_size": 3.5}, TypeError, "batch_size=3.5"),
    "seed negative": ({"seed": -1}, ValueError, "seed=-1"),
    "seed fraction": ({"seed": 0.5}, TypeError, "seed=0.5"),
    "summary_writer": ({"summary_writer": 3}, ValueError, "summary_writer"),
}
PGD_ONLY = {
    "max_iter negative": ({"max_iter": -1}, ValueError, "max_iter=-1"),
    "max_iter fraction": ({"max_iter": 2.5}, TypeError, "max_iter=2.5"),
    "max_iter true": ({"max_iter": True}, TypeError, "max_iter=True"),
    "decay negative": ({"decay": -0.5}, ValueError, "decay=-0.5"),
    "decay NaN": ({"decay": NAN}, ValueError, "decay=nan"),
    "random_eps not bool": ({"random_eps": 1}, TypeError, "random_eps=1"),
}
FGSM_ONLY = {"minimal not bool": ({"minimal": "no"}, TypeError, "minimal='no'")}
CONSTRUCTORS = [
    pytest.param(attack, *case, id=f"{attack.__name__}, {name}")
    for attack, more in ((PGD, PGD_ONLY), (FGSM, FGSM_ONLY))
    for name, case in {**CONSTRUCTOR, **more}.items()
]


@pytest.mark.parametrize(("attack", "options", "error", "message"), CONSTRUCTORS)
def test_constructor_arguments(attack, options, error, message, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        attack(net, **options)
    assert net.images_seen == 0
    assert not any(tmp_path.iterdir())  # a summary writer makes a folder


def test_a_summary_writer_without_tensorboard(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="tensorboardX"):
        PGD(net, summary_writer=True)
    assert net.images_seen == 0


# ART has no setter of summary_writer either.
SETTERS = [case for case in CONSTRUCTORS if "summary_writer" not in case.id]


@pytest.mark.parametrize(("attack", "options", "error", "message"), SETTERS)
def test_set_params(attack, options, error, message, net):
    with pytest.raises(error, match=message):
        attack(net).set_params(**options)


@pytest.mark.parametrize(("attack", "options", "error", "message"), SETTERS)
def test_a_refused_change_leaves_the_attack_as_it_was(attack, options, error, message, net):
    made, x, y = attack(net, eps=0.1, eps_step=0.02), some_images(N), some_labels(N)
    before = made(x, y)
    with pytest.raises(error):
        made.set_params(**{"batch_size": 3, **options})
    assert repr(made) == repr(attack(net, eps=0.1, eps_step=0.02))
    assert torch.equal(made(x, y), before)


def test_set_params_of_an_unknown_name(net):
    with pytest.raises(ValueError, match="epsilon"):
        PGD(net).set_params(epsilon=0.1)


STEP = {"eps_step": np.ones(1)}
# id: (constructor arguments, arguments of the call, error, what the message says)
CALL = {
    "x NaN": ({}, {"x": with_entry(NAN)}, ValueError, "x has NaN"),
    "x infinite": ({}, {"x": with_entry(INF)}, ValueError, "x has NaN or infinite"),
    "x far above clip_values": ({}, {"x": with_entry(2.0)}, ValueError, "x has entries.*clip_values"),
    "x far below clip_values": ({}, {"x": with_entry(-1.5)}, ValueError, "x has entries.*clip_values"),
    "x in bytes": ({}, {"x": 255 * some_images(N)}, ValueError, "x has entries.*clip_values"),
    "x of three dimensions": ({}, {"x": some_images(N)[0], "y": some_labels(3)}, ValueError, "x has shape"),
    "x of booleans": ({}, {"x": torch.ones(N, *SHAPE, dtype=torch.bool)}, TypeError, "x has dtype.*bool"),
    "x empty": ({}, {"x": some_images(N)[:0], "y": some_labels(0)}, ValueError, "x has shape.*empty"),
    "y too large": ({}, {"y": torch.tensor([0, 1, 2, CLASSES])}, ValueError, "y has labels.*5"),
    "y negative": ({}, {"y": torch.tensor([0, 1, 2, -1])}, ValueError, "y has labels.*-1"),
    "y too short": ({}, {"y": some_labels(N - 1)}, ValueError, "y has shape"),
    "y a scalar": ({}, {"y": torch.tensor(1)}, ValueError, "y has shape"),
    "y of fractions": ({}, {"y": torch.tensor([0, 1, 2, 1.5])}, ValueError, "y has entries that are not integers"),
    "y with NaN": ({}, {"y": torch.tensor([0, 1, 2, NAN])}, ValueError, "y has entries that are not integers"),
    "y no probabilities": ({}, {"y": torch.full((N, CLASSES), 0.3)}, ValueError, "y has rows that are not one-hot"),
    "y partly negative": ({}, {"y": torch.eye(CLASSES)[:N] * 3 - 0.4}, ValueError, "y has rows that are not one-hot"),
    "y with two ones": ({}, {"y": torch.ones(N, CLASSES)}, ValueError, "y has rows that are not one-hot"),
    "y of strings": ({}, {"y": ["a", "b", "c", "d"]}, TypeError, "y of type"),
    "y missing": ({"targeted": True}, {"y": None}, ValueError, "y=None"),
    "eps too short": ({"eps": np.full((3, 1, 1, 1), 0.1), **STEP}, {}, ValueError, "eps has shape"),
    "eps of other images": ({"eps": np.full((3, 7, 7), 0.1), **STEP}, {}, ValueError, "eps has shape"),
    "eps of too many dimensions": (
        {"eps": np.full((1, N, *SHAPE), 0.1), "eps_step": np.ones(1)},
        {},
        ValueError,
        "eps has shape",
    ),
    "eps_step too short": (
        {"eps_step": np.full((3, 1, 1, 1), 0.1), "eps": np.ones(1)},
        {},
        ValueError,
        "eps_step has shape",
    ),
    "eps varies in a sample": (
        {"norm": 2, "eps": np.linspace(0, 1, 8), "eps_step": np.ones(1)},
        {},
        ValueError,
        "eps varies.*norm=2",
    ),
    "mask of another shape": ({}, {"mask": torch.ones(3, 7, 7)}, ValueError, "mask has shape"),
    "mask of integers": ({}, {"mask": torch.ones(SHAPE, dtype=torch.int64)}, ArgumentTypeError, "mask has dtype"),
    "mask negative": ({}, {"mask": -torch.ones(SHAPE)}, ValueError, "mask has entries"),
    "mask NaN": ({}, {"mask": torch.full(SHAPE, NAN)}, ValueError, "mask has entries"),
    "start of another shape": ({}, {"x_adv_init": some_images(N - 1)}, ValueError, "x_adv_init has shape"),
    "start NaN": ({}, {"x_adv_init": with_entry(NAN)}, ValueError, "x_adv_init has NaN"),
    "start outside clip_values": ({}, {"x_adv_init": with_entry(2.0)}, ValueError, "x_adv_init has entries"),
    "start of booleans": (
        {},
        {"x_adv_init": torch.ones(N, *SHAPE, dtype=torch.bool)},
        TypeError,
        "x_adv_init has dtype.*bool",
    ),
}
VIA = {
    "tensors": lambda attack, x, y, **more: attack(x, y, **more),
    "arrays": lambda attack, x, y, **more: attack.generate(
        *(a.numpy() if isinstance(a, torch.Tensor) else a for a in (x, y)), **{k: v.numpy() for k, v in more.items()}
    ),
}


@pytest.mark.parametrize("via", VIA.values(), ids=VIA)
@pytest.mark.parametrize("wrap", [lambda net: net, art_classifier], ids=["module", "estimator"])
@pytest.mark.parametrize(("options", "call", "error", "message"), CALL.values(), ids=CALL)
@pytest.mark.parametrize("attack", [PGD, FGSM])
def test_arguments_of_a_call(attack, options, call, error, message, wrap, via, net):
    attacker = attack(wrap(net), **options)
    with pytest.raises(error, match=message):
        via(attacker, **{"x": some_images(N), "y": some_labels(N), **call})
    # A bare module may be asked about one image, to learn its number of classes.
    assert net.images_seen <= (0 if attacker.estimator is not net else 1)


@pytest.mark.parametrize("wrap", [lambda net: net, art_classifier], ids=["module", "estimator"])
def test_images_of_another_dtype_than_the_model(wrap, net):
    with pytest.raises(TypeError, match=r"x has dtype torch.float64, the model torch.float32"):
        PGD(wrap(net))(some_images(N).double(), some_labels(N))
    with pytest.raises(TypeError, match=r"x has dtype torch.float32, the model torch.float64"):
        PGD(wrap(net.double()))(some_images(N), some_labels(N))
    with pytest.raises(TypeError, match=r"x_adv_init has dtype torch.float64"):
        PGD(wrap(net.float()))(some_images(N), some_labels(N), x_adv_init=some_images(N).double())
    assert net.images_seen <= 1


def test_one_hot_rows_of_another_width(net):
    for model in (net, art_classifier(net)):
        with pytest.raises(ValueError, match=r"y has shape.*classes"):
            PGD(model)(some_images(N), torch.eye(CLASSES + 1)[:N])
    assert net.images_seen <= 1


def test_images_of_other_dimensions_than_the_estimators(net):
    with pytest.raises(ValueError, match=r"x has shape.*input_shape"):
        PGD(art_classifier(net)).generate(np.zeros((N, 3 * 8 * 8), np.float32))
    assert net.images_seen == 0


def test_images_of_another_size_than_the_estimator_says_are_the_models_business():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES))
    x = np.random.default_rng(0).random((N, 3, 9, 11), dtype=np.float32)
    assert PGD(art_classifier(model), max_iter=2, verbose=False).generate(x).shape == x.shape


@pytest.mark.parametrize("wrap", [lambda net: net, art_classifier], ids=["module", "estimator"])
def test_images_on_another_device_than_the_model(wrap, net):
    with pytest.raises(ValueError, match="x is on meta, the model on cpu"):
        PGD(wrap(net))(some_images(N).to("meta"), some_labels(N))
    with pytest.raises(ValueError, match="x_adv_init is on meta"):
        PGD(wrap(net))(some_images(N), some_labels(N), x_adv_init=some_images(N).to("meta"))
    with pytest.raises(ValueError, match="x is on cpu, the model on meta"):
        PGD(small_net().to("meta"))(some_images(N), some_labels(N))
    assert net.images_seen <= 1


def test_arrays_go_to_generate(net):
    with pytest.raises(TypeError, match=r"x of type ndarray.*generate"):
        PGD(net)(some_images(N).numpy())
    with pytest.raises(TypeError, match=r"x_adv_init of type ndarray"):
        PGD(net)(some_images(N), x_adv_init=some_images(N).numpy())
    with pytest.raises(TypeError, match="x of type NoneType"):
        PGD(net)(None)
    assert net.images_seen == 0


def test_generate_ignores_what_it_does_not_know_with_a_warning(net, caplog):
    attack, x = PGD(net, max_iter=2, verbose=False), some_images(N).numpy()
    assert np.array_equal(attack.generate(x, x_init=x, masks=None), attack.generate(x))
    assert "masks, x_init" in caplog.text


def test_a_call_refuses_what_it_does_not_know(net):
    with pytest.raises(TypeError, match="masks"):
        PGD(net)(some_images(N), masks=None)
    assert net.images_seen == 0


@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize(
    "estimator",
    [
        SklearnClassifier(
            DecisionTreeClassifier().fit(np.random.default_rng(0).normal(size=(20, 4)), np.arange(20) % 2)
        ),
        BlackBoxClassifier(lambda x: np.zeros((len(x), CLASSES)), SHAPE, CLASSES),
        object(),
        None,
        lambda x: x,
        nn.Module,
    ],
    ids=["scikit-learn", "black box", "object", "none", "function", "class"],
)
def test_only_classifiers_with_a_loss_gradient_are_attacked(attack, estimator):
    with pytest.raises(EstimatorError, match=type(estimator).__name__):
        attack(estimator)


class Returns(nn.Module):
    """A model that does with its logits what it is told."""

    def __init__(self, transform):
        super().__init__()
        self.net, self.transform = linear_model(dtype=torch.float32), transform

    def forward(self, x):
        return self.transform(x, self.net(x))


MALFORMED = {
    "images": lambda x, logits: x,
    "one number an image": lambda x, logits: logits[:, 0],
    "one row": lambda x, logits: logits[:1].mean(0, keepdim=True).expand(2, -1),
    "a tuple of images": lambda x, logits: (x, logits),
    "an empty tuple": lambda x, logits: (),
    "a string": lambda x, logits: "logits",
    "a dict without logits": lambda x, logits: {"scores": logits},
}
NOT_DIFFERENTIABLE = {
    "labels": lambda x, logits: nn.functional.one_hot(logits.argmax(1), CLASSES).float(),
    "detached": lambda x, logits: logits.detach(),
    "independent of the image": lambda x, logits: torch.ones(len(x), CLASSES, requires_grad=True) * 2,
}


@pytest.mark.parametrize("wrap", [lambda net: net, art_classifier], ids=["module", "estimator"])
@pytest.mark.parametrize("transform", MALFORMED.values(), ids=MALFORMED)
def test_models_that_return_no_logits(transform, wrap):
    with pytest.raises(ValueError, match="the model returned"):
        PGD(wrap(Returns(transform)))(some_images(N), some_labels(N))


@pytest.mark.parametrize("wrap", [lambda net: net, art_classifier], ids=["module", "estimator"])
@pytest.mark.parametrize("transform", NOT_DIFFERENTIABLE.values(), ids=NOT_DIFFERENTIABLE)
def test_models_without_a_gradient(transform, wrap):
    with pytest.raises(ValueError, match="no gradient"):
        PGD(wrap(Returns(transform)))(some_images(N), some_labels(N))
