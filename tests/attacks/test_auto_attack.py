"""AutoAttack and its parts: torchattacks query by query, the papers, what every attack owes a user."""

import math
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
import torchattacks
from art.attacks import evasion
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import CLASSES, art_classifier, is_fooled, small_net, snapshot, some_images, some_labels
from scipy.optimize import linprog
from torch import nn
from torchattacks.attacks import square as their_square

from guardians.attacks import APGD, FAB, AutoAttack, Square
from guardians.attacks.norms import nearest_in_ball_and_box, project_onto_hyperplane
from guardians.engine.rng import SampleRng

INF = float("inf")
NORMS = {INF: "Linf", 2: "L2", 1: "L1"}
RADII = {INF: 0.02, 2: 0.2, 1: 1.5}


def predicted(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


class Asked(nn.Module):
    """A model that keeps what it was asked, but for the same `again`."""

    def __init__(self, net, again=False):
        super().__init__()
        self.net, self.again, self.points = net, again, []

    def forward(self, x):
        if self.again or not self.points or not torch.equal(self.points[-1], x):
            self.points.append(x.detach().clone())
        return self.net(x)


@contextmanager
def double():
    """What torchattacks computes in is the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def ends_with(ours, theirs):
    """Whether queries are the last of `ours`, but for what comes after the search: the largest difference."""
    for first in range(len(ours) - len(theirs) + 1):
        pairs = zip(ours[first:], theirs, strict=False)
        if all(a.shape == b.shape and (a - b).abs().max() <= 1e-10 for a, b in pairs):
            return True
    return False


# APGD


class RisesFromZero(APGD):
    """The rule of torchattacks: the loss at the start, with which the first step is compared, is taken to be 0."""

    def update(self, state, answer):
        began = torch.from_numpy(state.steps == 0)
        progress = super().update(state, answer)
        state.loss_last = state.loss_last.masked_fill(began, 0)
        return progress


@pytest.mark.parametrize(("norm", "eps"), [(INF, 8e-4), (2, 0.01)])
@pytest.mark.parametrize(("loss", "theirs"), [("cross_entropy", "ce"), ("difference_logits_ratio", "dlr")])
@pytest.mark.parametrize("steps", [10, 40])
def test_apgd_asks_what_torchattacks_asks(norm, eps, loss, theirs, steps):
    net, x = small_net(1).double(), some_images(8, dtype=torch.float64)
    y = predicted(net, x)
    reference = Asked(net, again=True)
    with double():
        torchattacks.APGD(reference, norm=NORMS[norm], eps=eps, steps=steps, loss=theirs)(x, y)
    queries = reference.points[1 : steps + 2]
    native = Asked(net, again=True)
    RisesFromZero(native, norm, eps, max_iter=steps, nb_random_init=0, loss_type=loss, verbose=False, seed=0)(
        x, y, x_adv_init=queries[0]
    )
    assert len(queries) == steps + 1
    assert ends_with(native.points, queries)


def targeted_queries(norm, eps, net, x, y, steps, rule=RisesFromZero):
    """What torchattacks asks, and what native asks from the same start."""
    reference = Asked(net, again=True)
    attack = torchattacks.APGDT(reference, norm=NORMS[norm], eps=eps, steps=steps, n_classes=2)  # the second alone
    with double():
        attack(x, y)
    start = next(number for number, point in enumerate(reference.points) if not torch.equal(point, x))
    queries = reference.points[start : start + steps + 1]
    native = Asked(net, again=True)
    options = {"max_iter": steps, "nb_random_init": 0, "loss_type": "difference_logits_ratio", "n_targets": 1}
    rule(native, norm, eps, **options, verbose=False, seed=0)(x, y, x_adv_init=queries[0])
    return native.points, queries


@pytest.mark.parametrize(("norm", "eps"), [(INF, 8e-4), (2, 0.01)])
def test_targeted_apgd_asks_what_torchattacks_asks(norm, eps):
    net, x = small_net(1).double(), some_images(5, dtype=torch.float64)
    for image, label in zip(x.split(1), predicted(net, x).split(1), strict=True):
        assert ends_with(*targeted_queries(norm, eps, net, image, label, 20))


def test_torchattacks_gives_all_images_the_step_of_the_first():
    """In targeted APGD in norm 2: a batch is right as long as no step is halved, and then for the first image alone."""
    net, x = small_net(1).double(), some_images(8, dtype=torch.float64)
    ours, theirs = targeted_queries(2, 0.01, net, x, predicted(net, x), 20)
    assert not ends_with(ours, theirs)
    assert ends_with([points[:1] for points in ours], [points[:1] for points in theirs])


def test_torchattacks_compares_the_first_step_with_zero():
    """Which counts as a rise of a cross-entropy whatever the loss was, and never of a DLR loss below zero."""
    net, x = small_net(1).double(), some_images(8, dtype=torch.float64)
    y, steps = predicted(net, x), 10
    reference = Asked(net, again=True)
    with double():
        torchattacks.APGD(reference, norm="L2", eps=0.01, steps=steps, loss="dlr")(x, y)
    queries = reference.points[1 : steps + 2]
    agree = []
    for kind in (APGD, RisesFromZero):
        native = Asked(net, again=True)
        attack = kind(
            native,
            2,
            0.01,
            max_iter=steps,
            nb_random_init=0,
            loss_type="difference_logits_ratio",
            verbose=False,
            seed=0,
        )
        attack(x, y, x_adv_init=queries[0])
        agree.append(ends_with(native.points, queries))
    assert agree == [False, True]


def l1_apgd(net, x, y, eps, steps):
    """Algorithm 1 of Croce and Hein 2021 for one image, literally, from the image: what it asks."""

    def projected(u):
        low, high = 0.0, float((u - x).abs().max())
        for _ in range(200):  # bisection on the multiplier
            middle = (low + high) / 2
            d = ((u - x).abs() - middle).clamp_min(0) * (u - x).sign()
            d[d.abs() < 1e-9] = 0  # which the bisection does not reach
            z = (x + d).clamp(0, 1)
            low, high = (middle, high) if (z - x).abs().sum() > eps else (low, middle)
        inside = u.clamp(0, 1)
        return inside if (inside - x).abs().sum() <= eps else z

    def loss_and_gradient(point):
        leaf = point.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(net(leaf), y)
        return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]

    n, period = x.numel(), max(int(0.04 * steps), 1)
    point, k, eta, support = x.clone(), 0.2 * n, eps, n
    asked, best, count = [point], None, 0
    loss, gradient = loss_and_gradient(point)
    best = (loss, point, gradient)
    for _ in range(steps):
        size = gradient.abs().flatten()
        threshold = size.sort().values[min(max(int(n - k), 0), n - 1)]
        signs = torch.where(gradient.abs() >= threshold, gradient.sign(), 0)
        point = projected(point + eta * signs / signs.abs().sum())
        asked.append(point)
        loss, gradient = loss_and_gradient(point)
        if loss > best[0]:
            best = (loss, point, gradient)
        count += 1
        if count == period:
            count, now = 0, int((best[1] != x).sum())
            if now < 0.95 * support:
                eta, point, gradient = eps, best[1], best[2]
            else:
                eta = max(eta / 1.5, eps / 10)
            k, support = now / 1.5, now
    return asked


def test_apgd_in_norm_1_is_the_papers():
    net, x = small_net(1).double(), 0.1 + 0.8 * some_images(3, dtype=torch.float64)
    y = predicted(net, x)
    for image, label in zip(x.split(1), y.split(1), strict=True):
        native = Asked(net, again=True)
        APGD(native, 1, 0.05, max_iter=30, nb_random_init=0, loss_type="cross_entropy", verbose=False, seed=0)(
            image, label
        )
        expected = l1_apgd(net, image, label, 0.05, 30)
        pairs = list(zip(native.points[-31:], expected, strict=True))
        assert max(float((a - b).abs().max()) for a, b in pairs) <= 1e-9


def test_losses_are_the_papers(net64, x64):
    """Equations 6 and 8, and the difference of logits, written out."""
    y = predicted(net64, x64)
    with torch.no_grad():
        logits = net64(x64)
    for row, label in zip(logits, y, strict=True):
        z, own = row.tolist(), int(label)
        ordered = sorted(z, reverse=True)
        other = max(value for number, value in enumerate(z) if number != own)
        dlr = -(z[own] - other) / (ordered[0] - ordered[2])
        attack = APGD(net64, loss_type="difference_logits_ratio")
        assert float(attack.objective(row[None], label[None], None)[0]) == pytest.approx(dlr, rel=1e-9)
        target = (own + 2) % CLASSES
        rest = max(value for number, value in enumerate(z) if number != target)
        scale = ordered[0] - (ordered[2] + ordered[3]) / 2
        attack = APGD(net64, loss_type="difference_logits_ratio", targeted=True)
        assert float(attack.objective(row[None], torch.tensor([target]), None)[0]) == pytest.approx(
            (z[target] - rest) / scale, rel=1e-9
        )
        attack = APGD(net64, loss_type="margin")
        assert float(attack.objective(row[None], label[None], None)[0]) == pytest.approx(other - z[own], rel=1e-9)


# FAB


@pytest.mark.parametrize("norm", NORMS)
def test_fab_asks_what_torchattacks_asks(monkeypatch, norm):
    monkeypatch.setattr(torch.Tensor, "float", lambda values: values.double())
    net, x = small_net(1).double(), some_images(3, dtype=torch.float64)
    y = predicted(net, x)
    for image, label in zip(x.split(1), y.split(1), strict=True):
        reference, native = Asked(net), Asked(net)
        theirs = torchattacks.FAB(
            reference, norm=NORMS[norm], eps=None, steps=12, multi_targeted=True, n_classes=CLASSES
        )
        theirs.target_class = 2
        with double():
            found = theirs.attack_single_run_targeted(image, label)
        ours = FAB(native, norm, 12, n_targets=1, verbose=False, seed=0)(image, label)
        assert ends_with(native.points, reference.points[1:])
        near = [float(torch.linalg.vector_norm((images - image).flatten(), norm)) for images in (ours, found)]
        assert near[0] <= near[1] + 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_within_eps_takes_no_more_steps(net64, x64, norm):
    y = predicted(net64, x64)
    every = FAB(net64, norm, 10, verbose=False, seed=0)
    nearest = every(x64, y)
    eps = 2 * float(torch.linalg.vector_norm((nearest - x64).flatten(1), norm, dim=1).max())
    near = FAB(net64, norm, 10, eps=eps, verbose=False, seed=0)
    x_adv = near(x64, y)
    assert near.report.fooled.all()
    assert (torch.linalg.vector_norm((x_adv - x64).flatten(1), norm, dim=1) <= eps).all()
    assert near.report.search_backward < every.report.search_backward / 4


def test_random_starts_of_fab_need_a_radius(net):
    with pytest.raises(ValueError, match="num_random_init=2"):
        FAB(net, num_random_init=2)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), norm=st.sampled_from([1, 2, INF]), reach=st.floats(0.05, 1.5))
def test_the_projection_onto_a_hyperplane_is_the_nearest_point(seed, norm, reach):
    """Against linear programs in norms 1 and inf, and against bisection in norm 2."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    w[0, 0] = 0
    low, high = torch.zeros_like(x), torch.ones_like(x)
    farthest = torch.where(w > 0, high - x, low - x)
    c = reach * (w * farthest).sum(1)
    d = project_onto_hyperplane(x, w, c, low, high, norm)
    assert ((x + d >= -1e-12) & (x + d <= 1 + 1e-12)).all()
    if reach >= 1:
        assert float((w * d).sum()) == pytest.approx(float((w * farthest).sum()))
        return
    assert float((w * d).sum()) == pytest.approx(float(c), abs=1e-10)
    weight, start = w[0].numpy(), x[0].numpy()
    if norm == 2:
        lower, upper = 0.0, 1e6
        for _ in range(300):
            middle = (lower + upper) / 2
            tried = np.clip(middle * weight, -start, 1 - start)
            lower, upper = (middle, upper) if weight @ tried < float(c) else (lower, middle)
        expected = float(np.linalg.norm(tried))
    elif norm == INF:  # minimise t with |d| <= t
        eye = np.eye(6)
        bounds = [(-a, 1 - a) for a in start] + [(0, None)]
        upper = np.block([[eye, -np.ones((6, 1))], [-eye, -np.ones((6, 1))]])
        cost = np.append(np.zeros(6), 1)
        expected = linprog(cost, upper, np.zeros(12), np.append(weight, 0)[None], [float(c)], bounds).fun
    else:  # d = a - b
        bounds = [(0, 1 - a) for a in start] + [(0, a) for a in start]
        expected = linprog(np.ones(12), None, None, np.append(weight, -weight)[None], [float(c)], bounds).fun
    assert float(torch.linalg.vector_norm(d, norm)) == pytest.approx(expected, abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), eps=st.floats(0.01, 6))
def test_the_projection_onto_ball_and_box_is_the_nearest_point(seed, eps):
    """Against bisection on the multiplier of the norm."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 7, generator=generator, dtype=torch.float64)
    u = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    found = nearest_in_ball_and_box(u, -x, 1 - x, torch.full((2, 1), eps, dtype=torch.float64))
    for delta, image, ours in zip(u, x, found, strict=True):
        inside = torch.maximum(torch.minimum(delta, 1 - image), -image)
        expected = inside
        if inside.abs().sum() > eps:
            lower, upper = 0.0, float(delta.abs().max())
            for _ in range(200):
                middle = (lower + upper) / 2
                shrunk = (delta.abs() - middle).clamp_min(0) * delta.sign()
                expected = torch.maximum(torch.minimum(shrunk, 1 - image), -image)
                lower, upper = (middle, upper) if expected.abs().sum() > eps else (lower, middle)
        assert (ours - expected).abs().max() <= 1e-9


# Square


class Draws:
    """Those of native for one image, one after the other; what torchattacks asks torch for."""

    def __init__(self, first, each, steps):
        counts = [first, *[each] * steps]
        self.left = [
            u for step, n in enumerate(counts) for u in SampleRng(0, np.zeros(1, int), 0, step).few(n)[0].tolist()
        ]

    def take(self, n):
        taken, self.left = self.left[:n], self.left[n:]
        return torch.tensor(taken, dtype=torch.float64)

    def rand(self, shape):
        return self.take(math.prod(shape))

    def __getattr__(self, name):
        return getattr(torch, name)


class SquareOfDraws(torchattacks.Square):
    """With windows at all positions; its own never reach the last row and column."""

    def random_int(self, low=0, high=1, shape=(1,)):
        return (self.draws.take(1) * (high + 1)).long()

    def random_choice(self, shape):
        return torch.sign(2 * self.draws.take(math.prod(shape)) - 1).reshape(shape)


@pytest.mark.parametrize(("norm", "eps", "first", "each"), [(INF, 4e-4, 24, 5), (2, 3e-3, 8 * 8 * 4, 8)])
def test_square_asks_what_torchattacks_asks(monkeypatch, norm, eps, first, each):
    steps, net = 60, small_net(1).double()
    x = 0.05 + 0.9 * some_images(4, dtype=torch.float64)[3:]
    y = predicted(net, x)
    reference, native = Asked(net), Asked(net)
    theirs = SquareOfDraws(reference, norm=NORMS[norm], eps=eps, n_queries=steps)
    theirs.draws = Draws(first, each, steps)
    monkeypatch.setattr(their_square, "torch", theirs.draws)
    with double():
        theirs(x, y)
    Square(native, norm, max_iter=steps, eps=eps, verbose=False, seed=0)(x, y)
    queries = reference.points[1 : steps + 2]
    assert len(queries) > steps / 2
    assert ends_with(native.points, queries)


def test_windows_of_torchattacks_never_reach_the_last_row():
    """Its draw of a position leaves out the last one (Andriushchenko et al. 2020, algorithm 2, line 1, has it)."""
    attack = torchattacks.Square(small_net(), n_queries=1)
    assert {int(attack.random_int(0, 2)) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize("shape", [(3, 8, 5), (1, 4, 4), (2, 1, 1), (1, 3, 7)])
@pytest.mark.parametrize("norm", NORMS)
def test_square_takes_images_of_any_shape(norm, shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3))
    x = torch.rand(4, *shape)
    attack = Square(net, norm, max_iter=15, eps=0.4, early_stop=True, verbose=False, seed=0)
    x_adv = attack(x, predicted(net, x))
    assert (torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), norm, dim=1) <= 0.4).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()


def test_square_needs_no_gradient(x):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net(2)

        def forward(self, x):
            with torch.no_grad():
                return self.net(x).round(decimals=3)

    net = Rounded()
    y = predicted(net, x)
    attack = Square(net, INF, max_iter=100, eps=0.3, early_stop=True, verbose=False, seed=0)
    x_adv = attack(x, y)
    assert attack.report.fooled.any()
    assert attack.report.search_backward <= 3 * 8  # of the look at cheaper copies
    assert np.array_equal(attack.report.fooled, is_fooled(net, x_adv, y))


# All

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


def test_they_are_arts():
    assert issubclass(APGD, evasion.AutoProjectedGradientDescent)
    assert issubclass(Square, evasion.SquareAttack)


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (APGD, {"norm": 3}, "norm"),
        (APGD, {"loss_type": "hinge"}, "loss_type"),
        (APGD, {"targeted": True, "n_targets": 2}, "n_targets=2"),
        (APGD, {"rho": 1.5}, "rho"),
        (Square, {"p_init": 0}, "p_init"),
        (Square, {"loss": "dlr"}, "loss"),
        (Square, {"adv_criterion": len}, "adv_criterion"),
        (FAB, {"norm": 1.5}, "norm"),
        (FAB, {"eps": 0}, "eps"),
        (AutoAttack, {"version": "fast"}, "version"),
        (AutoAttack, {"eps": 0}, "eps"),
        (AutoAttack, {"norm": 0}, "norm"),
    ],
)
def test_bad_arguments_are_named(net, attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(net, **options)


def test_dlr_needs_three_classes():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(2, 3, 2, 2)
    with pytest.raises(ValueError, match="difference_logits_ratio"):
        APGD(net, loss_type="difference_logits_ratio", verbose=False)(x, predicted(net, x))
