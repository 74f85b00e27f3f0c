import numpy as np
import pytest
import torch
import torchattacks
from art.attacks import EvasionAttack
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import BlackBoxClassifierNeuralNetwork
from art.exceptions import EstimatorError
from art.utils import compute_success
from models_for_tests import CLASSES, SHAPE, art_classifier
from torch import nn
from torch.nn.functional import one_hot

from guardians.toolkits.torchattacks import TorchattacksAttack

PGD = {"eps": 0.05, "alpha": 0.02, "steps": 3, "random_start": False}


def by_hand(model, x, y, attack=torchattacks.PGD, batch_size=32, targeted=False, **arguments):
    attack = attack(model, **arguments)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    return torch.cat([attack(*batch) for batch in zip(x.split(batch_size), y.split(batch_size), strict=True)])


@pytest.mark.parametrize(
    ("attack", "arguments"),
    [
        (torchattacks.FGSM, {"eps": 0.03}),
        (torchattacks.PGD, PGD),
        (torchattacks.PGDL2, {"eps": 0.5, "alpha": 0.2, "steps": 3, "random_start": False}),
        (torchattacks.MIFGSM, {"eps": 0.03, "steps": 3}),
        (torchattacks.CW, {"c": 1, "steps": 5}),
        (torchattacks.DeepFool, {"steps": 3}),
        (torchattacks.APGD, {"eps": 0.3, "steps": 5}),
    ],
)
def test_is_the_toolkit_bit_for_bit(net, x, attack, arguments):
    y = net(x).argmax(1)
    expected = by_hand(net, x, y, attack, batch_size=5, **arguments)
    assert not torch.equal(expected, x)
    assert torch.equal(TorchattacksAttack(net, attack, batch_size=5, **arguments)(x, y), expected)


def test_random_starts_come_from_the_global_generator(net, x, y):
    torch.manual_seed(3)
    expected = by_hand(net, x, y, eps=0.05, steps=2)
    torch.manual_seed(3)
    attack = TorchattacksAttack(net, torchattacks.PGD, eps=0.05, steps=2)
    assert torch.equal(attack(x, y), expected)
    assert not torch.equal(attack(x, y), expected)


def test_preprocessing_of_the_estimator_is_honoured(net, normalised, x, y):
    estimator = art_classifier(net, preprocessing=((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    x_adv = TorchattacksAttack(estimator, torchattacks.PGD, **PGD)(x, y)
    assert torch.equal(x_adv, by_hand(normalised, x, y, **PGD))
    assert not torch.equal(x_adv, by_hand(net, x, y, **PGD))


def test_works_inside_art(net, estimator, x, y):
    attack = TorchattacksAttack(estimator, torchattacks.PGD, **PGD)
    assert isinstance(attack, EvasionAttack)
    assert attack.estimator is estimator
    x_adv = attack.generate(x.numpy(), y.numpy())
    assert x_adv.dtype == np.float32
    assert np.array_equal(x_adv, by_hand(net, x, y, **PGD).numpy())


def test_art_measures_its_success(net, estimator, x):
    y = net(x).argmax(1)
    x_adv = TorchattacksAttack(estimator, torchattacks.PGD, **{**PGD, "eps": 0.3, "alpha": 0.1}).generate(
        x.numpy(), y.numpy()
    )
    rate = compute_success(estimator, x.numpy(), one_hot(y, CLASSES).numpy(), x_adv)
    assert rate > 0
    assert rate == pytest.approx((net(torch.from_numpy(x_adv)).argmax(1) != y).float().mean().item())


def test_art_trains_adversarially_with_it(net, x, y):
    estimator = art_classifier(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    before = net.head.weight.clone()
    attack = TorchattacksAttack(estimator, torchattacks.FGSM, eps=0.03)
    AdversarialTrainer(estimator, attack, ratio=1.0).fit(
        x.numpy(), one_hot(y, CLASSES).numpy(), batch_size=6, nb_epochs=1
    )
    assert not torch.equal(net.head.weight, before)
    assert net.head.weight.isfinite().all()


def test_labels_as_indices_as_one_hot_rows_or_none(net, x, y):
    attack = TorchattacksAttack(net, torchattacks.PGD, **PGD)
    assert torch.equal(attack(x, one_hot(y, CLASSES)), attack(x, y))
    assert np.array_equal(attack.generate(x.numpy(), np.eye(CLASSES)[y]), attack(x, y).numpy())
    assert torch.equal(attack(x), by_hand(net, x, net(x).argmax(1), **PGD))
    assert np.array_equal(attack.generate(x.numpy(), None), attack(x).numpy())


def test_targets_are_approached(net, x, y):
    attack = TorchattacksAttack(net, torchattacks.PGD, targeted=True, **PGD)
    x_adv = attack(x, y)
    assert attack.targeted
    assert torch.equal(x_adv, by_hand(net, x, y, targeted=True, **PGD))
    assert nn.functional.cross_entropy(net(x_adv), y) < nn.functional.cross_entropy(net(x), y)


def test_the_batch_size_does_not_matter(net64, x64, y):
    one, five, all_ = (
        TorchattacksAttack(net64, torchattacks.PGD, batch_size=size, **PGD)(x64, y) for size in (1, 5, 32)
    )
    assert torch.allclose(one, all_, atol=1e-12, rtol=0)
    assert torch.allclose(five, all_, atol=1e-12, rtol=0)
    assert all_.dtype == torch.float64


@pytest.mark.parametrize("attack", [torchattacks.PGD, torchattacks.DeepFool, torchattacks.CW])
def test_the_model_comes_back_untouched(used_net, x, y, attack, state_of, assert_untouched):
    before, images = state_of(used_net), x.clone()
    TorchattacksAttack(used_net, attack, steps=2)(x, y)
    assert_untouched(used_net, before)
    assert torch.equal(x, images)


def test_a_model_in_training_mode_is_attacked_in_evaluation_mode(net, x, y):
    expected = by_hand(net, x, y, **PGD)
    assert torch.equal(TorchattacksAttack(net.train(), torchattacks.PGD, **PGD)(x, y), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(net, x, y, context):
    attack = TorchattacksAttack(net, torchattacks.PGD, batch_size=5, **PGD)
    expected = attack(x, y)
    with context():
        assert torch.equal(attack(x.clone(), y.clone()), expected)


def test_a_model_without_parameters_is_attacked_in_silence(x, y, capsys):
    class Sums(nn.Module):
        def forward(self, x):
            return x.square().sum((2, 3))

    x_adv = TorchattacksAttack(Sums(), torchattacks.FGSM, eps=0.1)(x, y % 3)
    assert (x_adv - x).abs().max() > 0.09
    assert capsys.readouterr().out == ""


def test_set_params_reaches_the_adapter_and_the_attack(net, x, y):
    attack = TorchattacksAttack(net, torchattacks.PGD, **PGD)
    attack.set_params(eps=0.1, batch_size=5, targeted=True)
    assert attack.batch_size == 5
    expected = by_hand(net, x, y, batch_size=5, targeted=True, **{**PGD, "eps": 0.1})
    assert torch.equal(attack(x, y), expected)
    with pytest.raises(TypeError, match="radius=3"):
        attack.set_params(radius=3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attack": torchattacks.TPGD, "targeted": True}, ValueError, "targeted=True: torchattacks.TPGD"),
        ({"attack": nn.ReLU}, TypeError, "attack=.*must be a class of torchattacks"),
        ({"attack": torchattacks.MultiAttack}, TypeError, "attack=.*first argument"),
        ({"radius": 3}, TypeError, "radius=3: PGD takes .*'eps'"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"batch_size": 2.0}, TypeError, "batch_size=2.0"),
        ({"targeted": 1}, TypeError, "targeted=1"),
        ({"verbose": None}, TypeError, "verbose=None"),
    ],
)
def test_bad_arguments(net, arguments, error, message):
    with pytest.raises(error, match=message):
        TorchattacksAttack(net, **{"attack": torchattacks.PGD, **arguments})


@pytest.mark.parametrize("clip_values", [(-1, 1), (0, 255), None])
def test_other_ranges_than_0_to_1_are_refused(net, clip_values):
    with pytest.raises(ValueError, match=r"clip_values.*must be \(0, 1\)"):
        TorchattacksAttack(art_classifier(net, clip_values=clip_values), torchattacks.PGD)


def test_other_estimators_are_refused():
    with pytest.raises(EstimatorError):
        TorchattacksAttack(BlackBoxClassifierNeuralNetwork(lambda x: x, SHAPE, CLASSES), torchattacks.PGD)


def test_bad_input(net, x, y):
    attack = TorchattacksAttack(net, torchattacks.PGD, **PGD)
    for images, labels, error, message in (
        (x.numpy(), y, TypeError, "x of type ndarray"),
        (x.mul(255).byte(), y, TypeError, "x has dtype torch.uint8"),
        (x.double(), y, TypeError, "x has dtype torch.float64"),
        (2 * x, y, ValueError, "x has entries .* clip_values"),
        (x[:0], y[:0], ValueError, "x has shape .* empty"),
        (x[0], y[:1], ValueError, "x has shape"),
        (x / 0, y, ValueError, "x has NaN or infinite"),
        (x, y[:3], ValueError, "y has shape"),
        (x, y + CLASSES, ValueError, "y has labels"),
        (x, one_hot(y, CLASSES + 1), ValueError, "y has shape .* 5 classes"),
        (x, "labels", TypeError, "y of type str"),
    ):
        with pytest.raises(error, match=message):
            attack(images, labels)
    with pytest.raises(ValueError, match="x has entries from 0 to 255"):
        attack.generate(x.mul(255).byte().numpy(), y.numpy())
    with pytest.raises(TypeError, match=r"unknown arguments.*mask"):
        attack(x, y, mask=1)
    with pytest.raises(ValueError, match="y=None"):
        TorchattacksAttack(net, torchattacks.PGD, targeted=True)(x)
