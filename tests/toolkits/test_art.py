import numpy as np
import pytest
import torch
from art.attacks.evasion import DeepFool, FastGradientMethod, ProjectedGradientDescent, SquareAttack
from art.estimators.classification import BlackBoxClassifierNeuralNetwork
from models_for_tests import CLASSES, SHAPE, art_classifier
from torch.nn.functional import one_hot

from guardians.attacks import PGD
from guardians.toolkits.art import ArtAttack


def pgd(estimator, **options):
    return ProjectedGradientDescent(estimator, eps=0.05, eps_step=0.02, max_iter=3, verbose=False, **options)


@pytest.mark.parametrize("make", [pgd, lambda estimator: DeepFool(estimator, max_iter=3, verbose=False)])
def test_is_generate_on_tensors(estimator, x, y, make):
    expected = make(estimator).generate(x.numpy(), one_hot(y, CLASSES).numpy())
    x_adv = ArtAttack(make(estimator))(x, y)
    assert torch.equal(x_adv, torch.from_numpy(expected))
    assert not torch.equal(x_adv, x)


def test_dtype_and_memory_of_the_images(estimator, x, y):
    attack, images = ArtAttack(pgd(estimator)), x.clone().requires_grad_()
    x_adv = attack(images.double(), y)
    assert x_adv.dtype == torch.float64
    assert torch.equal(x_adv.float(), attack(images, y))
    assert torch.equal(images, x)
    assert not x_adv.requires_grad


def test_labels_as_indices_as_one_hot_rows_or_none(net, estimator, x, y):
    attack = ArtAttack(pgd(estimator))
    assert torch.equal(attack(x, one_hot(y, CLASSES)), attack(x, y))
    assert torch.equal(attack(x), attack(x, net(x).argmax(1)))


def test_pixels_outside_the_mask_are_not_perturbed(estimator, x, y):
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    x_adv = ArtAttack(pgd(estimator))(x, y, mask)
    assert torch.equal(x_adv[~mask], x[~mask])
    assert (x_adv != x)[mask].any()
    expected = pgd(estimator).generate(x.numpy(), one_hot(y, CLASSES).numpy(), mask=mask.numpy())
    np.testing.assert_array_equal(x_adv.numpy(), expected)


def test_two_classes_with_index_labels(net, x, y):
    estimator = art_classifier(torch.nn.Sequential(net, torch.nn.Linear(CLASSES, 2)).eval(), nb_classes=2)
    expected = pgd(estimator).generate(x.numpy(), np.eye(2, dtype=np.float32)[y % 2])
    assert torch.equal(ArtAttack(pgd(estimator))(x, y % 2), torch.from_numpy(expected))


def test_targets_are_approached(net, estimator, x, y):
    x_adv = ArtAttack(pgd(estimator, targeted=True))(x, y)
    assert torch.nn.functional.cross_entropy(net(x_adv), y) < torch.nn.functional.cross_entropy(net(x), y)


@pytest.mark.parametrize("make", [pgd, FastGradientMethod, lambda e: DeepFool(e, max_iter=2, verbose=False)])
def test_the_model_comes_back_untouched(used_net, x, y, make, state_of, assert_untouched):
    estimator = art_classifier(used_net)
    estimator._model.train()
    used_net.features[1].eval()
    before = state_of(used_net)
    ArtAttack(make(estimator))(x, y)
    assert_untouched(used_net, before)
    assert estimator._model.training


def test_the_model_comes_back_untouched_from_an_error(used_net, x, y, state_of, assert_untouched):
    attack = pgd(art_classifier(used_net))
    before = state_of(used_net)
    attack.generate = lambda x, y: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ArtAttack(attack)(x, y)
    assert_untouched(used_net, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(estimator, x, y, context):
    attack = ArtAttack(pgd(estimator))
    expected = attack(x, y)
    with context():
        assert torch.equal(attack(x.clone(), y.clone()), expected)


def test_estimators_that_are_not_pytorch(net, x, y):
    def predict(images):
        with torch.no_grad():
            return net(torch.from_numpy(images)).numpy()

    estimator = BlackBoxClassifierNeuralNetwork(predict, SHAPE, CLASSES, clip_values=(0, 1))
    x_adv = ArtAttack(SquareAttack(estimator, max_iter=5, eps=0.1, verbose=False))(x, y)
    assert x_adv.shape == x.shape


def test_our_attacks_on_a_bare_module(net, x, y):
    attack = PGD(net, eps=0.05, eps_step=0.02, max_iter=3, verbose=False)
    assert torch.equal(ArtAttack(attack)(x, y), attack(x, y))


def test_bad_arguments(net, estimator, x, y):
    for bad, got in ((net, "SmallNet"), (ProjectedGradientDescent, "ProjectedGradientDescent"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"art_attack={got}"):
            ArtAttack(bad)
    attack = ArtAttack(pgd(estimator))
    with pytest.raises(TypeError, match="images of type ndarray"):
        attack(x.numpy(), y)
    with pytest.raises(TypeError, match=r"images of type torch.uint8"):
        attack(x.mul(255).byte(), y)
    with pytest.raises(ValueError, match="y has shape"):
        attack(x, y[:3])
    with pytest.raises(ValueError, match="y has labels"):
        attack(x, y + CLASSES)
