"""The attacks where ART's attacks are used."""

import inspect
import multiprocessing
import sys

import art.attacks.evasion as art
import numpy as np
import pytest
import torch
from art.attacks import EvasionAttack
from art.defences.trainer import AdversarialTrainer
from models_for_tests import CLASSES, art_classifier, small_net, some_images, some_labels

from guardians import attacks
from guardians.attacks import FGSM, PGD

PAIRS = [(FGSM, art.FastGradientMethod), (PGD, art.ProjectedGradientDescent)]
pairs = pytest.mark.parametrize(("native", "reference"), PAIRS, ids=["FGSM", "PGD"])


@pairs
def test_arguments_have_arts_names_order_and_defaults(native, reference):
    expected = list(inspect.signature(reference).parameters.values())
    parameters = list(inspect.signature(native).parameters.values())
    own = parameters[len(expected) :]
    for mine, theirs in zip(parameters, expected, strict=False):
        default = None if mine.name == "batch_size" else theirs.default  # chosen by the model and the device
        assert (mine.name, mine.default, mine.kind) == (theirs.name, default, theirs.kind)
    assert all(parameter.kind == inspect.Parameter.KEYWORD_ONLY for parameter in own)
    assert "seed" in {parameter.name for parameter in own}


@pairs
def test_arts_parameters_can_be_read_and_set(native, reference, net, x, y):
    assert set(reference.attack_params) <= set(native.attack_params)
    attack = native(net, eps=0.3)
    for name in native.attack_params:
        assert hasattr(attack, name), name
    attack.set_params(eps=0.05, norm=2, targeted=True, batch_size=3)
    assert (attack.eps, attack.norm, attack.targeted, attack.batch_size) == (0.05, 2, True, 3)
    assert torch.equal(attack(x, y), native(net, 2, 0.05, targeted=True, batch_size=3)(x, y))


@pairs
def test_the_attacks_are_evasion_attacks(native, reference, estimator):
    attack = native(estimator, eps=0.125)
    assert isinstance(attack, EvasionAttack)
    assert attack.estimator is estimator
    assert repr(attack).startswith(native.__name__ + "(")
    assert "eps=0.125" in repr(attack)
    assert native.__name__ == reference.__name__


def test_the_names_of_the_papers_are_the_same_classes():
    assert attacks.FGSM is attacks.FastGradientMethod
    assert attacks.PGD is attacks.ProjectedGradientDescent
    assert all(hasattr(attacks, name) for name in attacks.__all__)


@pairs
def test_arrays_and_tensors_give_the_same_images(native, reference, estimator, net, x, y):
    of_estimator, of_module = native(estimator, eps=0.1), native(net, eps=0.1)
    x_adv = of_module(x, y)
    assert torch.equal(of_estimator(x, y), x_adv)
    for attack in (of_estimator, of_module):
        for labels in (y.numpy(), np.eye(CLASSES)[y], y.numpy()[:, None], y.tolist(), y.numpy().astype(np.float32)):
            assert np.array_equal(attack.generate(x.numpy(), labels), x_adv.numpy())
        assert np.array_equal(attack.generate(x=x.double().numpy(), y=y.numpy(), mask=None), x_adv.numpy())


@pairs
def test_models_predictions_stand_in_for_labels(native, reference, net, x):
    attack = native(net, eps=0.1)
    assert torch.equal(attack(x), attack(x, net(x).argmax(1)))


def test_a_target_is_reached(net, x):
    target = (net(x).argmax(1) + 1) % CLASSES
    x_adv = PGD(net, eps=0.2, eps_step=0.02, max_iter=30, targeted=True, verbose=False)(x, target)
    assert (net(x_adv).argmax(1) == target).all()


@pairs
def test_arts_adversarial_trainer_trains_on_them(native, reference):
    net = small_net()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
    estimator = art_classifier(net, optimizer=optimiser)
    x, y = some_images(24).numpy(), np.eye(CLASSES, dtype=np.float32)[some_labels(24)]
    options = {"max_iter": 2, "verbose": False} if native is PGD else {}
    attack = native(estimator, eps=0.03, eps_step=0.02, **options)
    before = estimator.compute_loss(attack.generate(x, y), y).mean()
    AdversarialTrainer(estimator, attacks=attack, ratio=1.0).fit(x, y, batch_size=8, nb_epochs=5)
    assert estimator.compute_loss(attack.generate(x, y), y).mean() < before


def test_arts_auto_attack_runs_them(estimator, net, x, y, monkeypatch):
    monkeypatch.setitem(sys.modules, "multiprocess", multiprocessing)  # ART imports it even where it stays unused
    native = PGD(estimator, eps=0.1, eps_step=0.02, max_iter=10, verbose=False)
    auto = art.AutoAttack(estimator, eps=0.1, eps_step=0.02, attacks=[native])
    x_adv = auto.generate(x.numpy(), y.numpy())
    correct = net(x).argmax(1) == y
    alone = native(x, y)
    np.testing.assert_allclose(x_adv[correct], alone[correct].numpy(), atol=1e-6)


@pytest.mark.parametrize("verbose", [True, False])
def test_progress_is_shown_on_request_only(verbose, net, x, y, capsys):
    PGD(net, max_iter=2, verbose=verbose)(x, y)
    shown = capsys.readouterr()
    assert ("ProjectedGradientDescent" in shown.err) == verbose
    assert shown.out == ""
