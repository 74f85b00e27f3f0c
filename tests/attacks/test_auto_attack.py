"""AutoAttack and its parts: what every attack owes a user."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import art_classifier, is_fooled, small_net, snapshot, some_images, some_labels
from torch import nn

from guardians.attacks import APGD, FAB, AutoAttack, Square

INF = float("inf")
NORMS = {INF: "Linf", 2: "L2", 1: "L1"}
RADII = {INF: 0.02, 2: 0.2, 1: 1.5}


def predicted(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


MAKERS = {
    f"{name}, {norm:g}": (make, norm)
    for (name, make), norm in product(
        {
            "APGD": lambda net, p, **o: APGD(net, p, RADII[p], max_iter=10, nb_random_init=1, **o),
            "APGD-T": lambda net, p, **o: APGD(
                net, p, RADII[p], max_iter=6, nb_random_init=1, n_targets=3, loss_type="margin", **o
            ),
            "FAB": lambda net, p, **o: FAB(net, p, 5, n_targets=2, **o),
            "Square": lambda net, p, **o: Square(net, p, max_iter=20, eps=RADII[p], **o),
            "AutoAttack": lambda net, p, **o: AutoAttack(net, p, RADII[p], max_iter=5, n_queries=20, n_targets=2, **o),
        }.items(),
        NORMS,
    )
}
everyone = pytest.mark.parametrize(("make", "norm"), MAKERS.values(), ids=MAKERS)


def early(make):
    return {} if make in (MAKERS["FAB, 2"][0], MAKERS["AutoAttack, 2"][0]) else {"early_stop": True}


@everyone
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(1, 6), batch_size=st.integers(1, 7), stops=st.booleans())
def test_images_are_in_the_ball_and_the_result_is_that_of_any_batch(make, norm, seed, n, batch_size, stops):
    net, x, y = small_net().double(), some_images(n, dtype=torch.float64), some_labels(n)
    before = snapshot(net)
    options = {"verbose": False, "seed": seed, **(early(make) if stops else {})}
    x_adv = make(net, norm, batch_size=batch_size, **options)(x, y)
    assert snapshot(net) == before
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    if make is not MAKERS["FAB, 2"][0]:
        assert (torch.linalg.vector_norm((x_adv - x).flatten(1), norm, dim=1) <= RADII[norm]).all()
    together = make(net, norm, batch_size=64, **options)(x, y)
    assert torch.allclose(x_adv, together, rtol=0, atol=1e-9)


@everyone
def test_float32_images_are_in_the_ball_to_the_last_bit(net, x, y, make, norm):
    x_adv = make(net, norm, verbose=False, seed=0, **early(make))(x, y)
    assert x_adv.dtype == torch.float32
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    if make is not MAKERS["FAB, 2"][0]:
        assert (torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), norm, dim=1) <= RADII[norm]).all()


@everyone
def test_what_is_said_to_be_fooled_is_fooled(net, x, y, make, norm):
    attack = make(net, norm, verbose=False, seed=0, **early(make))
    x_adv = attack(x, y)
    assert np.array_equal(attack.report.fooled, is_fooled(net, x_adv, y))


@everyone
def test_both_interfaces(net, x, y, make, norm):
    options = {"verbose": False, "seed": 0, **early(make)}
    images = make(art_classifier(net), norm, **options).generate(x.numpy(), y.numpy())
    assert np.array_equal(images, make(net, norm, **options)(x, y).numpy())


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_auto_attack_with_few_classes(classes, version):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    x = torch.rand(4, 3, 4, 4)
    attack = AutoAttack(net, INF, 0.5, version, max_iter=5, n_queries=20, verbose=False, seed=0)
    attack(x, predicted(net, x))
    assert attack.report.fooled.all()


def test_auto_attack_fools_what_any_of_its_parts_fools(net, x):
    y = predicted(net, x)
    eps = 0.006
    common = {"early_stop": True, "verbose": False, "seed": 0}
    parts = [
        APGD(net, INF, eps, max_iter=20, nb_random_init=1, loss_type="cross_entropy", **common),
        Square(net, INF, max_iter=100, eps=eps, **common),
    ]
    for part in parts:
        part(x, y)
    attack = AutoAttack(net, INF, eps, max_iter=20, n_queries=100, verbose=False, seed=0)
    attack(x, y)
    assert (parts[0].report.fooled <= attack.report.fooled).all()
    assert attack.ledger.stands.sum() == (~attack.report.fooled).sum()
    assert attack.stages == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (AutoAttack, {"version": "fast"}, "version"),
        (AutoAttack, {"eps": 0}, "eps"),
        (AutoAttack, {"norm": 0}, "norm"),
    ],
)
def test_bad_arguments_are_named(net, attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(net, **options)
