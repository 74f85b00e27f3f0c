"""Square: what its paper and the toolkits do, and what every attack owes a user."""

import inspect
import math
from contextlib import contextmanager

import art.attacks.evasion
import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CLASSES,
    Constant,
    art_classifier,
    is_fooled,
    nudged,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from square_for_tests import EPS, INF, Asked, a_net, a_search, images_of, right, square
from torch import nn

from guardians.attacks import Spec, Square, SquareAttack
from guardians.engine.rng import SampleRng
from guardians.toolkits.build import build_attack, is_available

norms = pytest.mark.parametrize("p", EPS)


@contextmanager
def recorded_draws():
    """The numbers that native draws for the first row, at the start and at each step."""
    drawn, original = [], SampleRng.numbers

    def recorded(rng, count):
        numbers = original(rng, count)
        drawn.append(numbers[0])
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleRng, "numbers", recorded)
        yield drawn


OVER_ALL_CHANNELS = "self.lp_norm(delta_curr * mask_image)"


def repaired():
    """torchattacks' class without the 1e-12 that it adds to norms, and with the window's norm of each channel.

    The first matters where a window nearly cancels out.
    """
    source = inspect.getsource(inspect.getmodule(torchattacks.Square))
    assert source.count("1e-12") == 4
    assert source.count(OVER_ALL_CHANNELS) == 1
    source = source.replace("1e-12", "1e-100")
    source = source.replace(OVER_ALL_CHANNELS, "(delta_curr * mask_image).norm(dim=(-2, -1), keepdim=True)")
    module = {"__name__": "torchattacks.attacks.square", "__package__": "torchattacks.attacks"}
    exec(source, module)
    return module["Square"]


class SameDraws(repaired()):
    """torchattacks with given draws, its windows at all places."""

    queue = iter(())

    def perturb(self, x, y=None):
        self.init_hyperparam(x)
        return self.attack_single_run(x, y)[1]

    def random_int(self, low=0, high=1, shape=(1,)):
        return torch.tensor([low + int(next(self.queue) * (high - low + 1))])

    def random_choice(self, shape):
        count = math.prod(shape)
        numbers = np.array([next(self.queue) for _ in range(count)])
        return torch.from_numpy(np.where(numbers < 0.5, -1.0, 1.0)).reshape(tuple(shape))

    def eta(self, s):
        number = next(self.queue)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_: torch.tensor([number]))
            return super().eta(s)


def theirs_with_our_draws(net, x, y, p, draws, targeted, **options):
    asked = Asked(net)
    attack = SameDraws(asked, norm=f"L{p:g}", eps=EPS[p], **options)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    attack.queue = iter(map(float, draws))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return asked.points, attack(x, y)
    finally:
        torch.set_default_dtype(default)


def in_their_order(drawn, shape, p):
    """torchattacks draws of each tile the turn and then its signs; native all turns, and then all signs."""
    if p == INF:
        return [number for numbers in drawn for number in numbers]
    channels = shape[0]
    tiles = drawn[0].reshape(1 + channels, -1).T
    return [number for numbers in (tiles.ravel(), *drawn[1:]) for number in numbers]


def how_long_steady(found, search, x):
    """How many of the points that a search finds stay where they are when it begins a few roundings away from x.

    In norm 2 a window that cancels out, or an empty one when the radius is spent, is rounding, normalised: from there
    on no two implementations ask the same, nor does one on two processors.
    """
    steady = len(found)
    for near in nudged(x, 1e-14):
        apart = [(own - other).abs().max() > 1e-11 for own, other in zip(found, search(near), strict=True)]
        steady = min([steady, *(step for step, is_apart in enumerate(apart) if is_apart)])
    return steady


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
@pytest.mark.parametrize(
    ("shape", "p"), [((3, 10, 10), INF), ((1, 11, 11), INF), ((3, 10, 10), 2), ((1, 17, 17), 2), ((2, 10, 10), 2)]
)
def test_every_query_is_torchattacks_s(shape, p, loss, targeted):
    lengths = []
    for seed in range(3):
        net, x, y = a_search(shape, seed, targeted)

        def search(x, net=net, y=y):
            asked = Asked(net)
            x_adv = square(asked, p, max_iter=80, loss=loss, targeted=targeted, batch_size=1, p_init=0.5)(x, y)
            return [*asked.points[1:], x_adv]  # the first point tells how many classes there are

        with recorded_draws() as drawn:
            mine = search(x)
        options = {"p_init": 0.5, "n_queries": 80, "loss": "margin" if loss == "margin" else "ce"}
        queries, other = theirs_with_our_draws(net, x, y, p, in_their_order(drawn, shape, p), targeted, **options)
        assert len(mine) == len(queries) + 1
        steady = how_long_steady(mine, search, x)
        for own, its in zip(mine[:steady], [*queries, other][:steady], strict=True):
            torch.testing.assert_close(own, its, rtol=0, atol=1e-10)
        lengths.append(steady)
    assert min(lengths) > 35


# Against algorithms 1 and 3, pixel by pixel


def eta_of(side, p):
    """Equation 2: two bumps, each the sum of squares around its middle that shrink to a pixel."""
    eta = np.zeros((side, side))
    for first, height, sign in ((0, side // 2, 1), (side // 2, side - side // 2, -1)):
        bump = np.zeros((height, side))
        for k in range(side // 2 + 1):
            for i in range(height):
                for j in range(side):
                    if abs(i - height // 2) <= k and abs(j - side // 2) <= k:
                        bump[i, j] += 1 / (k + 1) ** 2
        size = (np.abs(bump) ** p).sum() ** (1 / p)
        eta[first : first + height] = sign * bump / (size if size else 1)
    return eta / (np.abs(eta) ** p).sum() ** (1 / p)


def literal(margin_of, x, p, eps, max_iter, p_init, drawn):
    """Algorithm 1 with algorithm 3 as it is printed, in norm p; the queries and the best image."""
    channels, height, width = x.shape
    shorter = min(height, width)

    def norm(values):
        return (np.abs(values) ** p).sum() ** (1 / p)

    def sign(number):
        return -1 if number < 0.5 else 1

    tile = max(shorter // 5, 1)
    down, across = height // tile, width // tile
    turns, *signs = drawn[0].reshape(1 + channels, down, across)
    delta = np.zeros_like(x)
    for r in range(down):
        for s in range(across):
            top, left = (height - down * tile) // 2 + r * tile, (width - across * tile) // 2 + s * tile
            eta = eta_of(tile, p)
            for c in range(channels):
                turned = eta.T if turns[r, s] > 0.5 else eta
                delta[c, top : top + tile, left : left + tile] = sign(signs[c][r, s]) * turned
    queries = [np.clip(x + eps * delta / norm(delta), 0, 1)]
    best, value = queries[0], margin_of(queries[0])
    for i in range(max_iter):
        if value > 0:
            break
        halvings = sum(int(i / max_iter * 10000) > last for last in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        side = max(round(math.sqrt(p_init / 2**halvings * height * width)), 3)
        side += side % 2 == 0
        side = min(side, shorter if shorter % 2 else shorter - 1)
        numbers = drawn[1 + i]
        r1, s1, r2, s2 = (int(u * (size - side + 1)) for u, size in zip(numbers, 2 * (height, width), strict=False))
        first, second = (slice(r1, r1 + side), slice(s1, s1 + side)), (slice(r2, r2 + side), slice(s2, s2 + side))
        eta = eta_of(side, p).T if numbers[4] > 0.5 else eta_of(side, p)
        nu = best - x
        unused = max(eps**p - norm(nu) ** p, 0)
        both = np.zeros((height, width), dtype=bool)
        both[first] = both[second] = True
        new = nu.copy()
        for c in range(channels):
            old = nu[c][first] / norm(nu[c][first]) if norm(nu[c][first]) else 0
            shape = sign(numbers[5 + c]) * eta + old
            available = (norm(nu[c][both]) ** p + unused / channels) ** (1 / p)
            new[c][second] = 0
            new[c][first] = shape / (norm(shape) or 1) * available
        queries.append(np.clip(x + new, 0, 1))
        if margin_of(queries[-1]) > value:
            best, value = queries[-1], margin_of(queries[-1])
    return queries, best


@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 7, 12), (2, 9, 5), (1, 3, 3), (2, 4, 4)])
@pytest.mark.parametrize("p", [1, 2])
def test_every_query_is_the_paper_s(shape, p):
    lengths = []
    for seed in range(2):
        net, x, y = a_search(shape, seed)

        def margin_of(image, net=net, y=y):
            logits = net(torch.from_numpy(image)[None])[0].detach()
            own = logits[y].item()
            logits[y] = -INF
            return logits.max().item() - own

        ours, eps = Asked(net), 0.2
        with recorded_draws() as drawn:
            x_adv = square(ours, p, eps=eps, max_iter=40, batch_size=1)(x, y)
        queries, best = literal(margin_of, x[0].numpy(), p, eps, 40, 0.8, drawn)
        assert len(ours.points) == len(queries) + 1
        for own, its in zip(ours.points[1:], queries, strict=True):
            np.testing.assert_allclose(own[0].numpy(), its, rtol=0, atol=1e-10)
        np.testing.assert_allclose(x_adv[0].numpy(), best, rtol=0, atol=1e-10)
        lengths.append(len(queries))
    assert max(lengths) > 10


# What every attack owes


SHAPES = [(3, 8, 8), (1, 5, 5), (1, 3, 3), (1, 1, 1), (2, 2, 7), (3, 9, 4), (4, 1, 6)]
NETS = {shape: a_net(shape, dtype=torch.float32) for shape in SHAPES}
BEFORE = {shape: snapshot(net) for shape, net in NETS.items()}


@norms
@given(
    shape=st.sampled_from(SHAPES),
    n=st.integers(1, 5),
    seed=st.integers(0, 50),
    eps=st.sampled_from([0.0, 0.01, 0.3, 5.0]),
    bounds=st.sampled_from([None, (0.0, 1.0), (-1.0, 2.5), (0.2, 0.8)]),
    masked=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([None, 1, 3]),
            "max_iter": st.integers(1, 25),
            "p_init": st.sampled_from([0.05, 0.8, 0.99]),
            "loss": st.sampled_from(["margin", "cross_entropy", None]),
            "nb_restarts": st.integers(1, 2),
            "early_stop": st.booleans(),
            "targeted": st.booleans(),
            "resc_schedule": st.booleans(),
            "eot_samples": st.integers(1, 2),
        }
    ),
)
@settings(max_examples=40)
def test_images_are_in_the_ball_and_the_box_to_the_last_bit(p, shape, n, seed, eps, bounds, masked, options):
    model, x, y = NETS[shape], images_of(shape, n, seed, torch.float32), some_labels(n, seed) % 4
    x = x.clamp(*bounds) if bounds else x
    mask = images_of(shape, n, seed + 1, torch.float32) > 0.5 if masked else None
    estimator = art_classifier(model, input_shape=shape, nb_classes=4, clip_values=bounds)
    attack = square(estimator, p, eps=eps, **options)
    x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy(), **({"mask": mask.numpy()} if masked else {})))
    assert snapshot(model) == BEFORE[shape]
    assert torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), p, dim=1).max() <= eps
    assert x_adv.isfinite().all()
    if bounds:
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in bounds)
        assert ((x_adv >= low) & (x_adv <= high)).all()
    if masked:
        assert torch.equal(x_adv[~mask], x[~mask])
    if attack.report.fooled is not None:
        assert np.array_equal(attack.report.fooled, is_fooled(model, x_adv, y, options["targeted"]))


@norms
@pytest.mark.parametrize("early_stop", [False, True])
def test_neither_the_batch_size_nor_the_order_matters(p, early_stop):
    net = small_net(dtype=torch.float64)
    x = some_images(13, dtype=torch.float64)
    y, options = right(net, x), {"early_stop": early_stop, "nb_restarts": 2, "max_iter": 30}
    whole = square(net, p, batch_size=13, **options)(x, y)
    for size in (1, 4):
        torch.testing.assert_close(square(net, p, batch_size=size, **options)(x, y), whole, rtol=0, atol=1e-8)
    parts = [square(net, p, **options)(x[a:b], y[a:b], first_index=a) for a, b in ((0, 5), (5, 13))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-8)


@norms
def test_windows_and_signs_of_images_differ(p):
    x = 0.5 + torch.zeros(8, 1, 10, 10, dtype=torch.float64)
    asked = Asked(a_net((1, 10, 10)))
    square(asked, p, max_iter=3, batch_size=8)(x, right(asked, x))
    assert all(len(points.unique(dim=0)) == len(points) for points in asked.points[-3:])


class Rounding(nn.Module):
    """Without a gradient that means anything, or with none at all."""

    def __init__(self, net, has_graph):
        super().__init__()
        self.net, self.has_graph = net, has_graph

    def forward(self, x):
        with torch.set_grad_enabled(self.has_graph and torch.is_grad_enabled()):
            return self.net((x * 50).round() / 50).round(decimals=2)


@norms
@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("has_graph", [False, True])
@pytest.mark.parametrize("kind", [small_net, traceable_net])
def test_models_without_gradients_are_fooled(p, early_stop, has_graph, kind):
    model, x = Rounding(kind(), has_graph).eval(), some_images(12)
    y = right(model, x)
    attack = square(model, p, eps=3 * EPS[p], max_iter=100, early_stop=early_stop)
    assert is_fooled(model, attack(x, y), y, False).sum() >= 9
    assert attack.report.search_forward <= 12 * 101 + 8 * 4


@norms
def test_no_gradient_is_asked_for_and_no_image_is_given_up(p):
    x, y = some_images(5), torch.zeros(5, dtype=torch.int64)
    attack = square(Constant().eval(), p, max_iter=20)
    attack(x, y)
    assert attack.report.search_backward == 0
    assert attack.report.search_forward == 5 * 21
    attack = square(a_sure_net(), p, max_iter=20, early_stop=True)
    attack(x, y)
    assert not attack.report.fooled.any()
    assert attack.report.search_forward >= 5 * 21


def a_sure_net():
    net = small_net()
    with torch.no_grad():
        net.head.bias[0] += 1e4
    return net


@norms
def test_early_stop_and_restarts(p):
    net, x = small_net(), some_images(24)
    y = right(net, x)
    once, thrice = (square(net, p, nb_restarts=restarts, early_stop=True, max_iter=15) for restarts in (1, 3))
    once(x, y), thrice(x, y)
    assert 0 < once.report.fooled.sum() < thrice.report.fooled.sum()
    wrong = square(net, p, early_stop=True, max_iter=15)
    wrong(x, (y + 1) % CLASSES)
    assert wrong.report.search_forward < 24 * 16


@norms
def test_the_best_image_is_returned(p):
    net, x, y = a_search((1, 10, 10), 0)
    net[3].bias.data[y] += 1  # too sure to be fooled
    asked = Asked(net)
    x_adv = square(asked, p, max_iter=60)(x, y)
    logits = net(torch.cat([*asked.points[1:], x_adv]))
    other = logits.index_fill(1, y, -INF).amax(1) - logits[:, y[0]]
    torch.testing.assert_close(other[-1], other[:-1].max(), rtol=0, atol=1e-12)


def test_the_schedule_halves_p_at_the_paper_s_steps():
    attack = square(a_net((1, 64, 64)), max_iter=10_000)
    last = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
    for first, offset in ((np.append(0, last + 1), 0), (np.append(last, 9999), 0)):
        expected = [round(math.sqrt(0.8 / 2**k * 64 * 64)) for k in range(10)]
        assert attack.sides(first + offset, 64, 64).tolist() == expected
    attack.set_params(max_iter=1000)
    assert attack.sides(np.array([1, 2, 800, 801]), 64, 64).tolist() == [57, 40, 4, 3]
    attack.set_params(resc_schedule=False)
    assert attack.sides(np.array([10, 11, 999]), 64, 64).tolist() == [57, 40, 14]
    assert attack.sides(np.array([0]), 3, 90).tolist() == [3]
    attack.set_params(norm=2)
    assert [attack.sides(np.array([0]), size, 90).item() for size in (1, 2, 3, 4, 50)] == [1, 1, 3, 3, 49]


def test_numbers_are_functions_of_sample_restart_and_step():
    index, restart, step = np.arange(4000), np.zeros(4000, dtype=np.int64), np.full(4000, 3)
    numbers = SampleRng(7, index, restart, step).numbers(5)
    assert numbers.shape == (4000, 5)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers.T) - np.eye(5)).max() < 0.08
    rows = np.array([17, 5])
    assert np.array_equal(SampleRng(7, index[rows], restart[rows], step[rows]).numbers(5), numbers[rows])
    for other in (
        SampleRng(8, index, restart, step),
        SampleRng(7, index, restart + 1, step),
        SampleRng(7, index, 0, 4),
    ):
        assert not np.isin(other.numbers(5), numbers).any()


@pytest.mark.parametrize(
    ("implementation", "p", "targeted"),
    [("native", INF, True), ("native", 1, False), ("ART", INF, False), ("ART", 2, False), ("torchattacks", INF, True)],
)
def test_all_implementations_are_built_from_one_spec(implementation, p, targeted, net):
    spec = Spec("Square", p, 2 * EPS[p], targeted, {"steps": 30, "p_init": 0.5})
    attack = build_attack(implementation, spec, net, nb_classes=CLASSES, input_shape=(3, 8, 8), batch_size=8, seed=0)
    x = some_images(6)
    y = right(net, x)
    x_adv = attack(x, (y + 1) % CLASSES if targeted else y)
    assert x_adv.shape == x.shape
    assert torch.linalg.vector_norm((x_adv - x).flatten(1), p, dim=1).max() <= 2 * EPS[p] * (1 + 1e-5)


def test_what_toolkits_lack():
    available = {
        (name, p, targeted): is_available(name, Spec("Square", p, 0.1, targeted, {"steps": 5}))
        for name in ("ART", "torchattacks", "foolbox")
        for p in EPS
        for targeted in (False, True)
    }
    assert {key for key, there in available.items() if there} == {
        *(("ART", p, False) for p in (INF, 2)),
        *(("torchattacks", p, targeted) for p in (INF, 2) for targeted in (False, True)),
    }


BAD = {
    "norm 3": ({"norm": 3}, "norm=3.*must be one of 1.0, 2.0, inf"),
    "criterion": ({"adv_criterion": max}, "adv_criterion=.*must be None"),
    "loss function": ({"loss": max}, 'loss=.*must be "margin", "cross_entropy" or None, not a function'),
    "loss name": ({"loss": "ce"}, "loss='ce': must be one of margin, cross_entropy, None"),
    "max_iter zero": ({"max_iter": 0}, "max_iter=0: must be at least 1"),
    "eps negative": ({"eps": -1}, "eps=-1: must be at least 0"),
    "eps array": ({"eps": np.ones((2, 1, 1, 1))}, "eps has shape"),
    "p_init one": ({"p_init": 1.0}, "p_init=1.0: must be above 0 and below 1"),
    "nb_restarts zero": ({"nb_restarts": 0}, "nb_restarts=0: must be at least 1"),
    "targeted number": ({"targeted": 1}, "targeted=1: must be True or False"),
    "resc_schedule number": ({"resc_schedule": 1}, "resc_schedule=1: must be True or False"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_by_name(options, message, net):
    with pytest.raises((TypeError, ValueError), match=message):
        Square(net, **options)
    attack = Square(net)
    with pytest.raises((TypeError, ValueError), match=message):
        attack.set_params(**options)
    assert repr(attack) == repr(Square(net))


def test_images_that_are_not_images_are_refused():
    estimator = art_classifier(nn.Linear(12, CLASSES), input_shape=(12,))
    with pytest.raises(ValueError, match=r"x has shape \(2, 12\): must be images \(N, C, H, W\)"):
        square(estimator).generate(np.full((2, 12), 0.5, dtype=np.float32), np.array([0, 1]))


def test_the_signature_is_art_s():
    theirs = list(inspect.signature(art.attacks.evasion.SquareAttack).parameters)
    assert Square.parameters()[: len(theirs)] == theirs
    assert issubclass(Square, art.attacks.evasion.SquareAttack)
    assert SquareAttack is Square
