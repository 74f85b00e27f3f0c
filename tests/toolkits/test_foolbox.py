import foolbox
import numpy as np
import pytest
import torch
from art.attacks import EvasionAttack
from art.utils import compute_success
from foolbox import attacks
from models_for_tests import CLASSES, art_classifier, small_net
from torch import nn
from torch.nn.functional import one_hot

from guardians.toolkits.foolbox import FoolboxAttack


def pgd():
    return attacks.LinfPGD(abs_stepsize=0.02, steps=3, random_start=False)


def by_hand(model, x, y, attack=None, eps=0.05, batch_size=32, targeted=False, bounds=(0, 1)):
    model = foolbox.PyTorchModel(model, bounds=bounds, device="cpu")
    found = []
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        criterion = foolbox.TargetedMisclassification(labels) if targeted else foolbox.Misclassification(labels)
        found.append((attack or pgd())(model, images, criterion, epsilons=eps)[1])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("attack", "eps"),
    [
        (attacks.LinfFastGradientAttack(), 0.03),
        (pgd(), 0.05),
        (attacks.L2PGD(steps=3, random_start=False), 0.5),
        (attacks.L1PGD(steps=3, random_start=False).repeat(2), 5.0),
        (attacks.L2DeepFoolAttack(steps=3), None),
        (attacks.L2DeepFoolAttack(steps=3), 0.1),
        (attacks.L2CarliniWagnerAttack(binary_search_steps=2, steps=5), None),
    ],
    ids=str,
)
def test_is_the_toolkit_bit_for_bit(net, x, attack, eps):
    y = net(x).argmax(1)
    expected = by_hand(net, x, y, attack, eps, batch_size=5)
    assert not torch.equal(expected, x)
    assert torch.equal(FoolboxAttack(net, attack, eps=eps, batch_size=5)(x, y), expected)


def test_a_minimisation_attack_is_clipped_to_the_ball(net, x):
    y = net(x).argmax(1)
    free, clipped = (FoolboxAttack(net, attacks.L2DeepFoolAttack(), eps=eps)(x, y) for eps in (None, 0.1))
    distances = [(found - x).flatten(1).norm(dim=1) for found in (free, clipped)]
    assert (net(free).argmax(1) != y).all()
    assert torch.allclose(distances[1], distances[0].clamp(max=0.1), atol=1e-6)
    assert (distances[0] > 0.11).any()


def test_random_starts_come_from_the_global_generator(net, x, y):
    attack = attacks.LinfPGD(steps=2)
    torch.manual_seed(3)
    expected = by_hand(net, x, y, attack)
    torch.manual_seed(3)
    adapter = FoolboxAttack(net, attack, eps=0.05)
    assert torch.equal(adapter(x, y), expected)
    assert not torch.equal(adapter(x, y), expected)


def test_preprocessing_of_the_estimator_is_honoured(net, normalised, x, y):
    estimator = art_classifier(net, preprocessing=((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    x_adv = FoolboxAttack(estimator, pgd(), eps=0.05)(x, y)
    assert torch.equal(x_adv, by_hand(normalised, x, y))
    assert not torch.equal(x_adv, by_hand(net, x, y))


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.1, 0.7)])
def test_clip_values_are_the_bounds(net, x, y, bounds):
    low, high = bounds
    x = (low + (high - low) * x).clamp(low, high)
    x_adv = FoolboxAttack(art_classifier(net, clip_values=bounds), pgd(), eps=0.05)(x, y)
    assert torch.equal(x_adv, by_hand(net, x, y, bounds=(x.min().item(), x.max().item())))
    assert x_adv.min() == x.min()
    assert x_adv.max() == x.max()


def test_works_inside_art(net, estimator, x, y):
    attack = FoolboxAttack(estimator, pgd(), eps=0.05)
    assert isinstance(attack, EvasionAttack)
    x_adv = attack.generate(x.numpy(), y.numpy())
    assert x_adv.dtype == np.float32
    assert np.array_equal(x_adv, by_hand(net, x, y).numpy())


def test_art_measures_its_success(net, estimator, x):
    y = net(x).argmax(1)
    x_adv = FoolboxAttack(estimator, attacks.LinfPGD(abs_stepsize=0.1, steps=3, random_start=False), eps=0.3).generate(
        x.numpy(), y.numpy()
    )
    rate = compute_success(estimator, x.numpy(), one_hot(y, CLASSES).numpy(), x_adv)
    assert rate > 0
    assert rate == pytest.approx((net(torch.from_numpy(x_adv)).argmax(1) != y).float().mean().item())


def test_labels_as_indices_as_one_hot_rows_or_none(net, x, y):
    attack = FoolboxAttack(net, pgd(), eps=0.05)
    assert torch.equal(attack(x, one_hot(y, CLASSES)), attack(x, y))
    assert np.array_equal(attack.generate(x.numpy(), np.eye(CLASSES)[y]), attack(x, y).numpy())
    assert torch.equal(attack(x), by_hand(net, x, net(x).argmax(1)))


def test_targets_are_approached(net, x, y):
    x_adv = FoolboxAttack(net, pgd(), eps=0.05, targeted=True)(x, y)
    assert torch.equal(x_adv, by_hand(net, x, y, targeted=True))
    assert nn.functional.cross_entropy(net(x_adv), y) < nn.functional.cross_entropy(net(x), y)


def test_the_batch_size_does_not_matter(net64, x64, y):
    one, five, all_ = (FoolboxAttack(net64, pgd(), eps=0.05, batch_size=size)(x64, y) for size in (1, 5, 32))
    assert torch.allclose(one, all_, atol=1e-12, rtol=0)
    assert torch.allclose(five, all_, atol=1e-12, rtol=0)
    assert all_.dtype == torch.float64


@pytest.mark.parametrize("attack", [pgd(), attacks.L2DeepFoolAttack(steps=2)], ids=str)
@pytest.mark.filterwarnings("error")
def test_the_model_comes_back_untouched(used_net, x, y, attack, state_of, assert_untouched):
    before, images = state_of(used_net), x.clone()
    x_adv = FoolboxAttack(used_net, attack, eps=0.05)(x, y)
    assert_untouched(used_net, before)
    assert torch.equal(x, images)
    assert torch.equal(x_adv, by_hand(small_net(), x, y, attack))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(net, x, y, context):
    attack = FoolboxAttack(net, pgd(), eps=0.05, batch_size=5)
    expected = attack(x, y)
    with context():
        assert torch.equal(attack(x.clone(), y.clone()), expected)


def test_set_params(net, x, y):
    attack = FoolboxAttack(net, pgd(), eps=0.05)
    attack.set_params(eps=0.1, targeted=True)
    assert torch.equal(attack(x, y), by_hand(net, x, y, eps=0.1, targeted=True))
    with pytest.raises(ValueError, match="radius"):
        attack.set_params(radius=3)
    with pytest.raises(TypeError, match="eps has shape"):
        attack.set_params(eps=[0.1, 0.2])


@pytest.mark.parametrize("number", [torch.tensor, np.array, np.float32])
def test_eps_may_be_any_single_number(net, x, y, number):
    assert torch.equal(FoolboxAttack(net, pgd(), eps=number(0.0625))(x, y), by_hand(net, x, y, eps=0.0625))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attack": attacks.LinfPGD}, TypeError, "attack=.*must be an attack of foolbox"),
        ({"eps": None}, ValueError, "eps=None: LinfProjectedGradientDescentAttack needs"),
        ({"eps": None, "attack": pgd().repeat(2)}, ValueError, "eps=None: LinfProjectedGradientDescentAttack needs"),
        ({"eps": -0.1}, ValueError, "eps=-0.1"),
        ({"eps": "0.1"}, TypeError, "eps='0.1'"),
        ({"eps": [0.1, 0.2]}, TypeError, r"eps=\[0.1, 0.2\]|eps has shape"),
        ({"eps": (0.1,)}, TypeError, r"eps=\(0.1,\)|eps has shape"),
        ({"eps": torch.tensor([0.1, 0.2])}, TypeError, r"eps=tensor.*|eps has shape"),
        ({"eps": [None, 0.2]}, TypeError, r"eps=\[None, 0.2\]|eps has shape"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"targeted": 1}, TypeError, "targeted=1"),
        ({"verbose": None}, TypeError, "verbose=None"),
    ],
)
def test_bad_arguments(net, arguments, error, message):
    with pytest.raises(error, match=message):
        FoolboxAttack(net, **{"attack": pgd(), "eps": 0.05, **arguments})


def test_an_attack_that_takes_no_targets_is_named(net, x, y):
    attack = FoolboxAttack(net, attacks.L2FastGradientAttack(), eps=0.05, targeted=True)
    with pytest.raises(ValueError, match="targeted=True: foolbox's L2FastGradientAttack"):
        attack(x, y)


@pytest.mark.parametrize("clip_values", [None, (np.zeros(192), np.ones(192))])
def test_bounds_must_be_two_numbers(net, clip_values):
    with pytest.raises(ValueError, match="clip_values must be two numbers"):
        FoolboxAttack(art_classifier(net, clip_values=clip_values), pgd(), eps=0.05)


def test_bad_input(net, x, y):
    attack = FoolboxAttack(net, pgd(), eps=0.05)
    for images, labels, error, message in (
        (x.numpy(), y, TypeError, "x of type ndarray"),
        (x.double(), y, TypeError, "x has dtype torch.float64"),
        (2 * x, y, ValueError, "x has entries .* clip_values"),
        (x, y[:3], ValueError, "y has shape"),
        (x, y + CLASSES, ValueError, "y has labels"),
    ):
        with pytest.raises(error, match=message):
            attack(images, labels)
    with pytest.raises(ValueError, match="y=None"):
        FoolboxAttack(net, pgd(), eps=0.05, targeted=True)(x)
