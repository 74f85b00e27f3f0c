"""FAB: what its paper and torchattacks do, and what every attack owes a user."""

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CLASSES,
    Constant,
    NanGradient,
    art_classifier,
    is_fooled,
    linear_model,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from scipy.optimize import linprog
from torch import nn

from guardians.attacks import FAB
from guardians.attacks.hyperplanes import to_hyperplane
from guardians.attacks.norms import lp_norm
from guardians.parity.comparison import Recorder

INF = float("inf")
norms = pytest.mark.parametrize("p", [1, 2, INF])


def fab(model, p, **options):
    return FAB(model, p, **{"max_iter": 10, "verbose": False, "seed": 0, **options})


def right(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def inner_images(n, dtype=torch.float32):
    """Images of which no pixel is near a bound."""
    return 0.3 + 0.4 * some_images(n, dtype=dtype)


# The projection


def smallest_norm(w, gap, low, high, p):
    """Of a d with <w, d> = gap within the bounds, by linear programming, or for 2 by bisection of the multiplier."""
    n = len(w)
    if p == 1:  # d = up - down
        bounds = [(0, b) for b in high] + [(0, -b) for b in low]
        return linprog(np.ones(2 * n), A_eq=[[*w, *-w]], b_eq=[gap], bounds=bounds).fun
    if p == INF:  # |d_i| <= t
        below = np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]])
        bounds = [*zip(low, high, strict=True), (0, None)]
        cost = [0] * n + [1]
        return linprog(cost, A_ub=below, b_ub=np.zeros(2 * n), A_eq=[[*w, 0]], b_eq=[gap], bounds=bounds).fun
    least, most = 0.0, 1e6
    for _ in range(200):
        middle = (least + most) / 2
        reached = abs(w @ np.clip(middle * np.sign(gap) * w, low, high)) >= abs(gap)
        least, most = (least, middle) if reached else (middle, most)
    return np.linalg.norm(np.clip(most * np.sign(gap) * w, low, high))


@norms
@given(seed=st.integers(0, 9999), size=st.sampled_from([0.0, 0.1, 1.0, 3.0]), scale=st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=40)
def test_the_way_to_the_hyperplane_is_the_shortest(p, seed, size, scale):
    generator = np.random.default_rng(seed)
    w = generator.standard_normal((3, 7)) * (generator.random((3, 7)) < 0.8)
    low, high = -generator.random((3, 7)) * 2, generator.random((3, 7)) * (generator.random((3, 7)) < 0.9)
    gap = generator.standard_normal(3) * size
    found = to_hyperplane(*map(torch.from_numpy, (w * scale, gap * scale, low, high)), p).numpy()
    for one, a, b, down, up in zip(found, w, gap, low, high, strict=True):
        assert ((one >= down) & (one <= up)).all()
        corner = np.where(a * b > 0, up, down) * (a != 0)
        if abs(a @ corner) < abs(b):
            np.testing.assert_allclose(one, corner * (b != 0), rtol=1e-14)
        else:
            assert abs(a @ one - b) <= 1e-12
            assert abs(np.linalg.norm(one, p) - smallest_norm(a, b, down, up, p)) <= 1e-8


@norms
def test_without_bounds_it_is_the_gap_over_the_dual_norm(p):
    w = some_images(4, dtype=torch.float64) - 0.5
    gap = torch.tensor([1.0, -2.0, 0.0, 1e-20], dtype=torch.float64)
    free = torch.full_like(w, INF)
    found = to_hyperplane(w, gap, -free, free, p)
    torch.testing.assert_close((w * found).flatten(1).sum(1), gap, rtol=1e-12, atol=0)
    dual = lp_norm(w, {1: INF, 2: 2, INF: 1}[p]).flatten()
    torch.testing.assert_close(lp_norm(found, p).flatten(), gap.abs() / dual, rtol=1e-12, atol=0)
    assert not to_hyperplane(0 * w, gap, -free, free, p).any()


# Against torchattacks


@pytest.fixture
def in_float64(monkeypatch):
    """torchattacks, which casts to float32, made to compute in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@norms
@pytest.mark.parametrize("options", [{}, {"alpha_max": 0.5, "eta": 1.3, "beta": 0.6}])
def test_every_query_is_torchattacks_s(p, options, net64, in_float64):
    x = some_images(10, dtype=torch.float64)
    y = right(net64, x)
    ours, theirs = Recorder(net64), Recorder(net64)
    attack = fab(ours, p, max_iter=25, batch_size=10, final_search=0, **options)
    x_adv = attack(x, y)
    name = {1: "L1", 2: "L2", INF: "Linf"}[p]
    other = torchattacks.FAB(theirs, norm=name, steps=25, multi_targeted=True, **options)
    near = torch.full((10,), INF)
    for other.target_class in range(2, CLASSES + 1):
        found = other.attack_single_run_targeted(x, y)
        near = near.minimum(attack.distance(found, x).masked_fill(right(net64, found) == y, INF))
    assert len(ours.iterates) == len(theirs.iterates) == 25 * (CLASSES - 1)
    for mine, its in zip(ours.iterates, theirs.iterates, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)
    assert attack.report.fooled.all()
    torch.testing.assert_close(attack.distance(x_adv, x), near, rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", [2, INF])
@pytest.mark.parametrize("options", [{}, {"alpha_max": 0.5, "eta": 1.3, "beta": 0.6}])
def test_every_query_without_targets_is_torchattacks_s(p, options, net64, in_float64):
    x = some_images(10, dtype=torch.float64)
    y = right(net64, x)
    ours, theirs = Recorder(net64), Recorder(net64)
    attack = fab(ours, p, max_iter=25, batch_size=10, final_search=0, n_targets=0, **options)
    x_adv = attack(x, y)
    other = torchattacks.FAB(theirs, norm={2: "L2", INF: "Linf"}[p], steps=25, **options)
    found = other.attack_single_run(x, y)
    near = attack.distance(found, x).masked_fill(right(net64, found) == y, INF)
    mine = ours.iterates[:: CLASSES - 1]  # which asks for one gradient after the other
    assert len(mine) == len(theirs.iterates) == 25
    for one, two in zip(mine, theirs.iterates, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    assert attack.report.fooled.all()
    torch.testing.assert_close(attack.distance(x_adv, x), near, rtol=0, atol=1e-10)


# What the paper says


@norms
def test_the_distance_to_planes_within_the_box_is_found(p):
    model, x = linear_model(), some_images(5, dtype=torch.float64)
    y = right(model, x)
    weight, logits = model[1].weight.detach(), model(x).detach()
    expected = [
        min(
            smallest_norm((weight[k] - weight[c]).numpy(), float(z[c] - z[k]), -image, 1 - image, p)
            for k in range(CLASSES)
            if k != c
        )
        for image, c, z in zip(x.flatten(1).numpy(), y, logits, strict=True)
    ]
    attack = fab(model, p, max_iter=20)
    found = attack.distance(attack(x, y), x).numpy()
    assert (found >= np.array(expected) - 1e-9).all()
    assert (found <= 1.01 * np.array(expected)).all()


@norms
def test_the_distance_to_planes_without_a_box_is_found_exactly(p):
    model, x = linear_model(dtype=torch.float32), some_images(8)
    y = right(model, x)
    with torch.no_grad():
        margins = model(x).gather(1, y[:, None]) - model(x)
    weight = model[1].weight.detach()
    lengths = torch.linalg.vector_norm(weight[y][:, None] - weight, {1: INF, 2: 2, INF: 1}[p], dim=-1)
    expected = (margins / lengths).nan_to_num(nan=INF).amin(1)
    attack = fab(art_classifier(model, clip_values=None), p, max_iter=3)
    torch.testing.assert_close(attack.distance(attack(x, y), x), expected, rtol=2e-3, atol=0)


def test_the_final_search_is_never_farther(net64):
    x = some_images(20, dtype=torch.float64)
    y = right(net64, x)
    attack, without = fab(net64, 2), fab(net64, 2, final_search=0)
    near, far = attack.distance(attack(x, y), x), attack.distance(without(x, y), x)
    assert (near <= far).all()
    assert near.mean() < 0.999 * far.mean()
    assert attack.report.search_forward - without.report.search_forward == 20 * 4


@norms
def test_without_targets_a_step_goes_to_the_nearest_hyperplane(p):
    """Of a linear model the first step is there: at the smallest |f| / ||g||_q of all other classes."""
    net, x = linear_model(), inner_images(60, torch.float64)
    y = right(net, x)
    weight, logits = net[-1].weight.detach().flatten(1), net(x).detach()
    slope = torch.linalg.vector_norm(weight[y][:, None] - weight[None], {1: INF, 2: 2, INF: 1}[p], dim=2)
    distance = (logits.gather(1, y[:, None]) - logits).div(slope).scatter(1, y[:, None], INF).amin(1)
    near = distance < {1: 0.25, 2: 0.5, INF: 0.1}[p]  # no clipping on the way
    attack = fab(net, p, n_targets=0, max_iter=1, eta=1.0001, beta=0.999, final_search=0)
    found = attack.distance(attack(x, y), x)
    assert near.sum() > 5
    torch.testing.assert_close(found[near], distance[near], rtol=2e-3, atol=0)
    assert attack.report.search_backward == 60 * (len(weight) - 1)


@norms
@pytest.mark.parametrize("n_targets", [0, 1])
def test_no_image_is_left_on_the_boundary(p, n_targets):
    """Where float32 cannot tell on which side it is, and the hyperplane is where it stands."""
    net, x = small_net(2), some_images(60, 2)
    attack = fab(net, p, n_targets=n_targets, max_iter=30)
    attack(x, right(net, x))
    assert attack.report.fooled.all()


def test_a_step_asks_twice_and_for_one_gradient(net64):
    x = inner_images(6, torch.float64)
    attack = fab(net64, INF, n_targets=3, final_search=0)
    attack(x, right(net64, x))
    assert attack.report.search_backward == 6 * 3 * 10
    assert attack.report.search_forward == 6 * 3 * (1 + 2 * 10)


def test_targets_come_in_the_order_of_their_logits_and_then_again(net64):
    x = inner_images(5, torch.float64)
    y = right(net64, x)
    attack = fab(net64, INF, n_targets=99, max_iter=1, num_random_init=1)
    targets = []
    choose = attack._choose

    def noted(state, *arguments):
        choose(state, *arguments)
        targets.append(state.target.clone())

    attack._choose = noted
    attack(x, y)
    ranked = net64(x).argsort(1, descending=True)[:, 1:]
    assert torch.equal(torch.stack(targets, 1), ranked.repeat(1, 2))


@norms
def test_random_starts_are_at_half_of_the_nearest_or_of_eps(p, net64):
    x = inner_images(6, torch.float64)
    y = right(net64, x)
    first = fab(net64, p, n_targets=1, final_search=0)
    near = first.distance(first(x, y), x)
    asked = Recorder(net64)
    again = fab(asked, p, n_targets=1, final_search=0, num_random_init=1, batch_size=6)
    again(x, y)
    start = asked.iterates[10]
    torch.testing.assert_close(again.distance(start, x), near / 2, rtol=1e-9, atol=0)
    asked.iterates.clear()
    fab(asked, p, n_targets=1, eps=float(near.min()) / 2, num_random_init=1, batch_size=6)(x, y)
    expected = torch.full_like(near, float(near.min()) / 4)
    torch.testing.assert_close(again.distance(asked.iterates[10], x), expected, rtol=1e-9, atol=0)


def test_an_image_within_eps_is_done_at_once(net64):
    x = inner_images(8, torch.float64)
    y = right(net64, x)
    nearest = fab(net64, INF, num_random_init=1)
    near = nearest.distance(nearest(x, y), x)
    eps = float(near.median()) * 1.2
    enough = fab(net64, INF, num_random_init=1, eps=eps)
    within = enough.distance(enough(x, y), x) <= eps
    assert torch.equal(within, near <= eps)
    assert 0 < within.sum() < 8
    spent = (~within).sum() * 2 * (CLASSES - 1) * 10
    assert spent <= enough.report.search_backward <= spent + within.sum() * 10


# What every attack owes

MODELS = {
    "traceable": traceable_net(),
    "untraceable": small_net(),
    "zero gradient": Constant().eval(),
    "NaN gradient": NanGradient().eval(),
}
BEFORE = {name: snapshot(model) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@norms
@given(
    n=st.integers(1, 5),
    data_seed=st.integers(0, 50),
    targeted=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([None, 1, 3]),
            "max_iter": st.integers(1, 5),
            "n_targets": st.integers(0, 3),
            "num_random_init": st.integers(0, 1),
            "eps": st.sampled_from([None, 0.05]),
            "early_stop": st.booleans(),
            "precision": st.sampled_from(["auto", "bfloat16"]),
            "eot_samples": st.integers(1, 2),
        }
    ),
)
@settings(max_examples=6)
def test_images_are_valid_verdicts_true_and_the_model_untouched(p, name, n, data_seed, targeted, options):
    model, x, y = MODELS[name], some_images(n, data_seed), some_labels(n, data_seed)
    attack = fab(model, p, targeted=targeted, **options)
    x_adv = attack(x, y)
    assert snapshot(model) == BEFORE[name]
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    fooled = attack.report.fooled
    assert torch.equal(x_adv[~fooled], x[~fooled])
    assert np.array_equal(fooled, is_fooled(model, x_adv, y, targeted))


@norms
@pytest.mark.parametrize("n_targets", [0, 2])
def test_neither_the_batch_size_nor_the_order_matters(p, n_targets, net64):
    x = some_images(9, dtype=torch.float64)
    y = right(net64, x)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    options = {"n_targets": n_targets, "num_random_init": 1, "eps": 0.02}
    whole = fab(net64, p, batch_size=9, **options)(x, y)
    torch.testing.assert_close(fab(net64, p, batch_size=4, **options)(x, y), whole, rtol=0, atol=1e-9)
    streamed = torch.empty_like(x)
    pairs = zip(x.split(2), y.split(2), strict=True)
    for finished in fab(net64, p, batch_size=4, **options).stream(pairs):
        streamed[torch.from_numpy(finished.index)] = finished.x_adv
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-9)
    plain = {**options, "num_random_init": 0}  # draws go with the position
    shuffled = fab(net64, p, batch_size=5, **plain)(x[order], y[order])
    torch.testing.assert_close(shuffled, fab(net64, p, **plain)(x, y)[order], rtol=0, atol=1e-9)


@norms
def test_targets_are_reached(p, net):
    x = inner_images(8)
    y = (right(net, x) + 1) % CLASSES
    attack = fab(net, p, targeted=True, max_iter=30)
    x_adv = attack(x, y)
    assert attack.report.fooled.all()
    assert torch.equal(right(net, x_adv), y)


@norms
def test_masked_pixels_keep_their_bits_and_the_others_fool(p, net):
    x, mask = inner_images(10), some_images(10, seed=9) > 0.4
    attack = fab(net, p, max_iter=30, num_random_init=1)
    x_adv = attack(x, right(net, x), mask=mask)
    assert torch.equal(x_adv[~mask], x[~mask])
    assert attack.report.fooled.all()


@norms
def test_an_image_that_is_wrong_already_comes_back_and_costs_little(p, net):
    x = inner_images(8)
    attack = fab(net, p)
    assert torch.equal(attack(x, (right(net, x) + 1) % CLASSES), x)
    assert attack.report.fooled.all()
    assert attack.report.search_backward <= 8


class _Scaled(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x + 100) / 255)


@norms
@pytest.mark.parametrize("clip_values", [(-100.0, 155.0), None])
def test_an_estimator_in_another_range_or_without_one_is_attacked_alike(p, clip_values):
    net, x = small_net(), inner_images(6)
    y = right(net, x)
    estimator = art_classifier(_Scaled(net).eval(), clip_values=clip_values)
    plain, other = fab(net, p), fab(estimator, p)
    distance = plain.distance(plain(x, y), x).mean()
    found = torch.from_numpy(other.generate(255 * x.numpy() - 100, y.numpy()))
    assert other.report.fooled.all()
    assert plain.distance((found + 100) / 255, x).mean() < 1.02 * distance


@norms
def test_two_classes_are_enough(p):
    model, x = linear_model(classes=2), inner_images(6, torch.float64)
    attack = fab(model, p, n_targets=9)
    attack(x, right(model, x))
    assert attack.report.fooled.all()
    assert attack.restarts == 1


BAD = {
    "norm 3": ({"norm": 3}, "norm=3.*must be one of 1.0, 2.0, inf"),
    "max_iter zero": ({"max_iter": 0}, "max_iter=0: must be at least 1"),
    "eps zero": ({"eps": 0}, "eps=0: must be above 0"),
    "alpha_max": ({"alpha_max": 1.5}, "alpha_max=1.5: must be at most 1"),
    "eta": ({"eta": 0.9}, "eta=0.9: must be at least 1"),
    "beta one": ({"beta": 1.0}, "beta=1.0: must be above 0 and below 1"),
    "n_targets below zero": ({"n_targets": -1}, "n_targets=-1: must be at least 0"),
    "num_random_init": ({"num_random_init": -1}, "num_random_init=-1: must be at least 0"),
    "final_search": ({"final_search": 0.5}, "final_search=0.5: must be an integer"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_by_name(options, message, net):
    with pytest.raises((TypeError, ValueError), match=message):
        FAB(net, **options)
    attack = FAB(net)
    with pytest.raises((TypeError, ValueError), match=message):
        attack.set_params(**options)
