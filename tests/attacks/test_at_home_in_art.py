"""What ART's attacks can be used with, and for, ours can; ART's answer to the same call is the oracle."""

import art.attacks.evasion as art
import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import (
    EnsembleClassifier,
    PyTorchClassifier,
    QueryEfficientGradientEstimationClassifier,
    SklearnClassifier,
)
from art.summary_writer import SummaryWriter, SummaryWriterDefault
from models_for_tests import CLASSES, SHAPE, art_classifier, small_net, snapshot, some_images
from sklearn.linear_model import LogisticRegression
from torch import nn

from guardians.attacks import FGSM, PGD, CarliniL2Method, CarliniLInfMethod
from guardians.toolkits import TorchattacksAttack

N = 6
PAIRS = {
    "FGSM": (FGSM, art.FastGradientMethod, {"eps": 0.1}),
    "FGSM, norm 2": (FGSM, art.FastGradientMethod, {"eps": 0.5, "norm": 2}),
    "PGD": (
        PGD,
        art.ProjectedGradientDescent,
        {"eps": 0.1, "eps_step": 0.03, "max_iter": 4, "verbose": False},
    ),
    "PGD, norm 2": (
        PGD,
        art.ProjectedGradientDescent,
        {"norm": 2, "eps": 0.5, "eps_step": 0.2, "max_iter": 4, "verbose": False},
    ),
}
pairs = pytest.mark.parametrize(("native", "reference", "options"), PAIRS.values(), ids=PAIRS)


@pytest.fixture
def images() -> np.ndarray:
    return some_images(N).numpy()


@pytest.fixture
def labels(images) -> np.ndarray:
    return small_net()(torch.from_numpy(images)).argmax(1).numpy()


# A single output for two classes

BINARY = np.array([0, 1, 0, 1, 1, 0])


def binary_model(*last: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        model[-1].weight *= 3
        model[-1].bias -= model(some_images(N)).median() - 0.01
    return nn.Sequential(*model, *last)


LOSSES = {
    "BCELoss": (nn.BCELoss, (nn.Sigmoid(),), 0.5),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, (), 0.0),
}
losses = pytest.mark.parametrize(("loss", "last", "threshold"), LOSSES.values(), ids=LOSSES)


def binary_classifier(loss, *last: nn.Module) -> PyTorchClassifier:
    return art_classifier(binary_model(*last), loss=loss(), nb_classes=2)


@losses
@pairs
def test_single_outputs(native, reference, options, loss, last, threshold, images):
    # ART's loss_gradient takes labels for outputs (N,) alone; those of (N, 1) are the same numbers.
    oracle = reference(binary_classifier(loss, *last, nn.Flatten(0)), **options)
    for estimator in (binary_classifier(loss, *last), binary_classifier(loss, *last, nn.Flatten(0))):
        attack = native(estimator, **options)
        for y in (BINARY, BINARY[:, None], np.eye(2)[BINARY]):
            np.testing.assert_allclose(attack.generate(images, y), oracle.generate(images, y), atol=1e-6)


@losses
@pairs
def test_single_outputs_without_labels(native, reference, options, loss, last, threshold, images):
    estimator = binary_classifier(loss, *last)
    predicted = (estimator.predict(images)[:, 0] > threshold).astype(int)
    assert 0 < predicted.sum() < N
    x_adv = native(estimator, **options).generate(images)
    np.testing.assert_array_equal(x_adv, native(estimator, **options).generate(images, predicted))
    # ART takes all images for predicted as 1; where they are it is the same attack.
    theirs = reference(estimator, **options).generate(images)
    np.testing.assert_allclose(x_adv[predicted == 1], theirs[predicted == 1], atol=1e-6)


@losses
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_single_outputs_are_judged_by_their_threshold(loss, last, threshold, targeted, precision, images):
    estimator = binary_classifier(loss, *last)
    predicted = (estimator.predict(images)[:, 0] > threshold).astype(int)
    options = {"eps": 0.02, "eps_step": 0.01, "max_iter": 3, "targeted": targeted, "early_stop": True}
    attack = PGD(estimator, **options, precision=precision, verbose=False)
    x_adv = attack.generate(images, predicted ^ targeted)
    now = (estimator.predict(x_adv)[:, 0] > threshold).astype(int)
    assert attack.report.fooled.sum() > 0
    np.testing.assert_array_equal(attack.report.fooled, now != predicted)


@losses
@pytest.mark.parametrize("attack", [CarliniL2Method, CarliniLInfMethod])
def test_carlini_wagner_needs_two_outputs(attack, loss, last, threshold, images):
    with pytest.raises(ValueError, match="single output"):
        attack(binary_classifier(loss, *last), verbose=False).generate(images, BINARY)


# Estimators with gradients of their own


class Float32(nn.Module):
    """ART's estimate of gradients asks in float64."""

    def forward(self, x):
        return x.float()


SETTINGS = {
    "loss": nn.CrossEntropyLoss(),
    "input_shape": SHAPE,
    "nb_classes": CLASSES,
    "clip_values": (0.0, 1.0),
    "device_type": "cpu",
}
OWN_GRADIENTS = {
    "randomised smoothing": lambda: PyTorchRandomizedSmoothing(small_net(), **SETTINGS, sample_size=16, scale=0.05),
    "ensemble": lambda: EnsembleClassifier(
        [art_classifier(small_net(seed)) for seed in (0, 1)], clip_values=(0.0, 1.0), channels_first=True
    ),
    "estimated gradients": lambda: QueryEfficientGradientEstimationClassifier(
        PyTorchClassifier(nn.Sequential(Float32(), small_net(), nn.Softmax(1)), **SETTINGS), 20, 1 / 64, 1 / 255
    ),
}
own_gradients = pytest.mark.parametrize("make", OWN_GRADIENTS.values(), ids=OWN_GRADIENTS)


@own_gradients
@pairs
def test_estimators_with_gradients_of_their_own(native, reference, options, make, images, labels, caplog):
    estimator = make()
    attack = native(estimator, **options, seed=0)  # else its seed is drawn from numpy too
    assert type(estimator).__name__ in caplog.text
    np.random.seed(3)  # noqa: NPY002  # ART's estimate of gradients draws from it
    expected = reference(estimator, **options).generate(images, labels)
    np.random.seed(3)  # noqa: NPY002
    x_adv = attack.generate(images, labels)
    np.testing.assert_allclose(x_adv, expected, atol=1e-6)
    assert not np.allclose(x_adv, images)


def test_gradients_averaged_over_draws_are_of_the_images_asked_about(images, labels):
    estimator = OWN_GRADIENTS["ensemble"]()
    once, thrice = (PGD(estimator, **PAIRS["PGD"][2], eot_samples=samples) for samples in (1, 3))
    np.testing.assert_allclose(thrice.generate(images, labels), once.generate(images, labels), atol=1e-6)


def test_verdicts_are_those_of_predict(images, labels):
    estimator = OWN_GRADIENTS["estimated gradients"]()
    attack = PGD(estimator, eps=0.03, eps_step=0.01, max_iter=5, early_stop=True, verbose=False)
    x_adv = attack.generate(images, labels)
    np.testing.assert_array_equal(attack.report.fooled, estimator.predict(x_adv).argmax(1) != labels)


def test_carlini_wagner_of_an_ensemble_goes_by_its_class_gradient(images):
    estimator = OWN_GRADIENTS["ensemble"]()

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList(small_net(seed) for seed in (0, 1))

        def forward(self, x):
            return sum(net(x) for net in self.nets) / 2

    y = estimator.predict(images).argmax(1)
    options = {"max_iter": 5, "binary_search_steps": 2, "verbose": False}
    attack = CarliniL2Method(estimator, **options)
    x_adv = attack.generate(images, y)
    np.testing.assert_allclose(x_adv, CarliniL2Method(Mean(), **options).generate(images, y), atol=1e-3)
    assert attack.report.fooled.any()
    np.testing.assert_array_equal(attack.report.fooled, estimator.predict(x_adv).argmax(1) != y)


def test_other_toolkits_attack_an_ensemble(images):
    torchattacks = pytest.importorskip("torchattacks")
    estimator = OWN_GRADIENTS["ensemble"]()
    y = estimator.predict(images).argmax(1)
    attack = TorchattacksAttack(estimator, torchattacks.PGD, eps=0.1, alpha=0.03, steps=5)
    assert (estimator.predict(attack.generate(images, y)).argmax(1) != y).any()


@pytest.mark.parametrize("kind", ["randomised smoothing", "estimated gradients"])
def test_carlini_wagner_needs_a_class_gradient(kind, images, labels):
    estimator = OWN_GRADIENTS[kind]()
    with pytest.raises(ValueError, match=rf"{type(estimator).__name__}.*class_gradient"):
        CarliniL2Method(estimator, verbose=False).generate(images, labels)


def test_the_models_of_such_an_estimator_come_back_as_they_were(images, labels):
    estimator = OWN_GRADIENTS["ensemble"]()
    nets = [member.model for member in estimator.classifiers]
    for net in nets:
        net.train()
        net.head.weight.grad = torch.ones_like(net.head.weight)
    before, gradients = [snapshot(net) for net in nets], [net.head.weight.grad for net in nets]
    PGD(estimator, **PAIRS["PGD"][2]).generate(images, labels)
    assert [snapshot(net) for net in nets] == before
    assert all(net.head.weight.grad is gradient for net, gradient in zip(nets, gradients, strict=True))
    assert all((gradient == 1).all() for gradient in gradients)


def test_a_classifier_of_scikit_learn_with_a_loss_gradient():
    x = np.random.default_rng(0).random((50, 4), dtype=np.float32)
    y = (x.sum(1) > 2).astype(int)
    estimator = SklearnClassifier(LogisticRegression().fit(x, y), clip_values=(0, 1))
    expected = art.FastGradientMethod(estimator, eps=0.1).generate(x, y)
    np.testing.assert_allclose(FGSM(estimator, eps=0.1).generate(x, y), expected, atol=1e-6)


# Whatever asks for ART's classes


@pytest.mark.parametrize(
    ("native", "reference"),
    [
        (FGSM, art.FastGradientMethod),
        (PGD, art.ProjectedGradientDescent),
        (CarliniL2Method, art.CarliniL2Method),
        (CarliniLInfMethod, art.CarliniLInfMethod),
    ],
    ids=["FGSM", "PGD", "C&W L2", "C&W Linf"],
)
def test_the_attacks_are_recognised_as_arts(native, reference):
    attack = native(art_classifier(small_net()))
    assert isinstance(attack, reference)
    others = {art.FastGradientMethod, art.ProjectedGradientDescent, art.CarliniL2Method, art.CarliniLInfMethod}
    assert not isinstance(attack, tuple(others - {reference}))
    assert not isinstance(reference(art_classifier(small_net())), native)


@pairs
@pytest.mark.parametrize("method", ["iterative_saliency", "iterative_saliency_refresh", "one_shot"])
def test_arts_frame_saliency_attack_runs_them(native, reference, options, method, images, labels):
    estimator = art_classifier(small_net())
    ours, theirs = (
        art.FrameSaliencyAttack(estimator, attack(estimator, **options), method, frame_index=2, verbose=False)
        for attack in (native, reference)
    )
    np.testing.assert_allclose(ours.generate(images, labels), theirs.generate(images, labels), atol=1e-5)


# TensorBoard


class Recorder:
    """What is told to a writer of tensorboardX."""

    def __init__(self):
        self.told = []

    def add_scalars(self, tag, values, global_step):
        self.told.append((tag, global_step, {row: float(value) for row, value in values.items()}))

    def add_scalar(self, tag, value, global_step):
        self.told.append((tag, global_step, {"": float(value)}))

    def flush(self):
        self.told.append(("flush", 0, {}))


class Recording(SummaryWriterDefault):
    """ART's summary writer, with no file behind it."""

    def __init__(self, **indicators):
        super().__init__(False, **indicators)

    def _init_summary_writer(self, summary_writer, init_counter):
        if init_counter == 0:
            self._summary_writer = Recorder()


def assert_told_alike(ours: Recording, theirs: Recording):
    mine, expected = (writer.summary_writer.told for writer in (ours, theirs))
    assert [entry[:2] for entry in mine] == [entry[:2] for entry in expected]
    for (_, _, values), (_, _, reference) in zip(mine, expected, strict=True):
        assert values == pytest.approx(reference, rel=1e-3, abs=1e-5)


@pairs
@pytest.mark.parametrize("batch_size", [N, 4])
@pytest.mark.parametrize("targeted", [False, True])
def test_summaries_are_those_of_art(native, reference, options, batch_size, targeted, images, labels):
    ours, theirs = Recording(ind_1=True, ind_3=True), Recording(ind_1=True, ind_3=True)
    for attack, writer in ((native, ours), (reference, theirs)):
        made = attack(
            art_classifier(small_net()), **options, batch_size=batch_size, targeted=targeted, summary_writer=writer
        )
        made.generate(images, labels)
    assert_told_alike(ours, theirs)


def test_summaries_of_the_smallest_size_of_fgsm(images, labels):
    ours, theirs = Recording(), Recording()
    for attack, writer in ((FGSM, ours), (art.FastGradientMethod, theirs)):
        estimator = art_classifier(small_net())
        attack(estimator, minimal=True, eps_step=0.02, summary_writer=writer).generate(images, labels)
    assert_told_alike(ours, theirs)


@pytest.mark.parametrize("early_stop", [False, True])
def test_a_summary_does_not_change_the_attack(early_stop, images, labels):
    options = {**PAIRS["PGD"][2], "early_stop": early_stop}
    writer = Recording()
    watched = PGD(art_classifier(small_net()), **options, summary_writer=writer).generate(images, labels)
    np.testing.assert_array_equal(watched, PGD(art_classifier(small_net()), **options).generate(images, labels))
    assert writer.summary_writer.told[-1][0] == "flush"


def test_summaries_of_a_bare_module_are_of_its_gradients(images, labels):
    writer = Recording()
    PGD(small_net(), **PAIRS["PGD"][2], summary_writer=writer).generate(images, labels)
    assert {tag.split("/")[0] for tag, _, _ in writer.summary_writer.told} == {"gradients", "flush"}


@pytest.mark.parametrize("as_path", [False, True])
def test_summaries_are_written_to_a_folder(as_path, images, labels, tmp_path):
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "runs"
    attack = PGD(art_classifier(small_net()), **PAIRS["PGD"][2], summary_writer=folder if as_path else str(folder))
    assert isinstance(attack.summary_writer, SummaryWriter)
    attack.generate(images, labels)
    assert any(file.stat().st_size for file in folder.rglob("*tfevents*"))


def test_summaries_of_the_current_folder(images, labels, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    FGSM(art_classifier(small_net()), summary_writer=True).generate(images, labels)
    assert any((tmp_path / "runs").rglob("*tfevents*"))


def test_summaries_of_several_random_starts_are_refused_as_by_art():
    for attack in (PGD, art.ProjectedGradientDescent):
        with pytest.raises(ValueError, match="num_random_init"):
            attack(art_classifier(small_net()), num_random_init=2, summary_writer=Recording())
