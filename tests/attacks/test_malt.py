"""MALT: its order of targets, its steps, and what every attack owes a user."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import CLASSES, is_fooled, linear_model, small_net, snapshot, some_images, some_labels
from torch import nn

from guardians.attacks import MALT, PGD

INF = float("inf")
EPS = {INF: 0.1, 2: 0.5, 1: 4.0}


def malt(model, norm=INF, **options):
    return MALT(model, norm, EPS[norm], **{"early_stop": True, "verbose": False, "seed": 0, **options})


def predicted(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


class Seen(nn.Module):
    """A model that keeps what it was asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.points = net, []

    def forward(self, x):
        self.points.append(x.detach().clone())
        return self.net(x)


def test_targets_are_searched_in_the_order_of_their_first_order_distance(net64, x64):
    """Against the ranking written out, where nothing is fooled: the k-th search ascends z_t - z_y of the k-th."""
    x = x64[:1]
    label = predicted(net64, x)
    leaf = x.clone().requires_grad_(True)
    logits = net64(leaf)[0]
    own = int(label)
    distances = {}
    for other in range(CLASSES):
        if other != own:
            gap = logits[own] - logits[other]
            (slope,) = torch.autograd.grad(gap, leaf, retain_graph=True)
            distances[other] = float(gap.detach() / slope.abs().sum())
    order = sorted(distances, key=distances.get)

    seen = Seen(net64)
    attack = MALT(
        seen, INF, 1e-9, 1, n_targets=CLASSES - 1, untargeted_steps=0, early_stop=False, verbose=False, seed=0
    )
    attack(x, label)
    searched = [point for point in seen.points if len(point) == 1 and 0 < (point - x).abs().max() < 1e-8]
    assert len(searched) == CLASSES - 1
    for other, point in zip(order, searched, strict=True):
        leaf = x.clone().requires_grad_(True)
        logits = net64(leaf)[0]
        (slope,) = torch.autograd.grad(logits[other] - logits[own], leaf)
        moved = (x + 1e-9 * slope.sign()).clamp(0, 1)
        assert (point - moved).abs().max() <= 1e-15


def test_a_linear_model_falls_where_the_nearest_boundary_is_within_reach():
    """Of which the first-order distance is the distance."""
    net, x = linear_model(), some_images(12, dtype=torch.float64)
    y = predicted(net, x)
    leaf = x.clone().requires_grad_(True)
    logits = net(leaf)
    own = logits.gather(1, y[:, None])[:, 0]
    distances = []
    for other in range(logits.shape[1]):
        (slope,) = torch.autograd.grad((logits[:, other] - own).sum(), leaf, retain_graph=True)
        length = slope.flatten(1).abs().sum(1)
        distances.append(torch.where(y == other, torch.inf, (own - logits[:, other]).detach() / length))
    nearest = torch.stack(distances).amin(0)
    eps = float(nearest.median())
    attack = MALT(net, INF, eps, untargeted_steps=0, n_targets=1, early_stop=True, verbose=False, seed=0)
    attack(x, y)
    inner = ((x > eps) & (x < 1 - eps)).flatten(1).all(1).numpy()  # clip_values cut nothing off
    reach = (nearest < eps * (1 - 1e-3)).numpy()
    far = (nearest > eps * (1 + 1e-3)).numpy()
    assert attack.report.fooled[inner & reach].all()
    assert not attack.report.fooled[far].any()


@pytest.mark.parametrize("norm", EPS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(1, 6), batch_size=st.integers(1, 7), restarts=st.integers(0, 2))
def test_images_are_in_the_ball_and_the_result_is_that_of_any_batch(norm, seed, n, batch_size, restarts):
    net, x = small_net().double(), some_images(n).double()
    y = some_labels(n)
    before = snapshot(net)
    options = {"num_random_init": restarts, "hope": 100.0, "max_iter": 4, "seed": seed}
    x_adv = malt(net, norm, batch_size=batch_size, **options)(x, y)
    assert snapshot(net) == before
    assert (x_adv >= 0).all()
    assert (x_adv <= 1).all()
    assert (torch.linalg.vector_norm((x_adv - x).flatten(1), norm, dim=1) <= EPS[norm]).all()
    together = malt(net, norm, batch_size=64, **options)(x, y)
    assert torch.allclose(x_adv, together, rtol=0, atol=1e-9)


def test_what_it_says_is_fooled_is_fooled(net, x, y):
    for norm in EPS:
        attack = malt(net, norm)
        x_adv = attack(x, y)
        assert np.array_equal(attack.report.fooled, is_fooled(net, x_adv, y))


def test_it_fools_no_fewer_than_pgd_of_as_many_steps(net, x):
    y = predicted(net, x)
    for eps in (0.01, 0.02, 0.05):
        ours = MALT(net, INF, eps, early_stop=True, verbose=False, seed=0)
        ours(x, y)
        pgd = PGD(net, INF, eps, eps / 4, max_iter=20, early_stop=True, verbose=False, seed=0)
        pgd(x, y)
        assert ours.report.fooled.sum() >= pgd.report.fooled.sum()


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))
    x = torch.rand(5, 3, 8, 8)
    attack = MALT(net, INF, 0.5, early_stop=True, verbose=False, seed=0)
    attack(x, predicted(net, x))
    assert attack.report.fooled.all()


def test_pixels_outside_of_the_mask_stay(net, x, y):
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[..., : x.shape[-1] // 2] = True
    x_adv = malt(net, num_random_init=2, hope=100.0)(x, y, mask=mask)
    assert torch.equal(x_adv[~mask], x[~mask])


def test_random_starts_are_for_images_whose_margin_is_nearly_gone(net64, x64):
    """With no hope asked for, starts are given up; with any, all are made."""
    net, x, y, counts = net64, x64, predicted(net64, x64), []
    for hope in (0.0, 1e9):
        attack = MALT(net, INF, 1e-4, num_random_init=3, hope=hope, early_stop=True, verbose=False, seed=0)
        attack(x, y)
        assert not attack.report.fooled.any()
        counts.append(attack.report.search_backward)
    assert counts[1] - counts[0] == 3 * 20 * len(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": 0.5}, "norm"),
        ({"eps": -1}, "eps"),
        ({"max_iter": 0}, "max_iter"),
        ({"n_targets": 0}, "n_targets"),
        ({"hope": -1.0}, "hope"),
    ],
)
def test_bad_arguments_are_named(net, options, message):
    with pytest.raises(ValueError, match=message):
        MALT(net, **options)
