"""APGD: what its papers and torchattacks do, and what every attack owes a user."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CLASSES,
    Constant,
    NanGradient,
    Noted,
    art_classifier,
    is_fooled,
    linear_model,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from torch import nn
from torch.nn.functional import cross_entropy

from guardians.attacks import APGD
from guardians.attacks.apgd import checkpoints
from guardians.attacks.norms import nearest_in_ball_and_box
from guardians.attacks.registry import Spec
from guardians.engine.rng import given_keys
from guardians.parity.comparison import Recorder
from guardians.parity.rules import native_class

torchattacks = pytest.importorskip("torchattacks")
from art.attacks import evasion as art  # noqa: E402

INF = float("inf")
EPS = {INF: 0.02, 2: 0.3, 1: 2.0}
NAMES = {INF: "Linf", 2: "L2"}
CE, DLR = "cross_entropy", "difference_logits_ratio"
norms = pytest.mark.parametrize("p", EPS)


def apgd(model, p=INF, eps=None, **options):
    given = {"max_iter": 12, "nb_random_init": 1, "verbose": False, "seed": 0, **options}
    return APGD(model, p, EPS[p] if eps is None else eps, **given)


def as_torchattacks(p, base=APGD):
    rule = native_class(Spec("APGD", p, 0.1), "torchattacks")
    return type("AsTorchattacks", (rule,) if base is APGD else (base, rule), {})


def right(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def goal(net, x, targeted):
    y = right(net, x)
    return (y + 1) % CLASSES if targeted else y


def distance(x_adv, x, p):
    return torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), p, dim=1)


# Against torchattacks and ART


@pytest.mark.parametrize("loss", [CE, DLR])
@pytest.mark.parametrize("steps", [1, 2, 5, 23, 100])
@pytest.mark.parametrize("p", NAMES)
def test_every_query_is_that_of_torchattacks(p, steps, loss, net64):
    x, eps = some_images(10, dtype=torch.float64), {INF: 8 / 255, 2: 0.3}[p]
    y = right(net64, x)
    ours, theirs = Recorder(net64), Recorder(net64)
    short = {CE: "ce", DLR: "dlr"}[loss]
    reference = torchattacks.APGD(theirs, norm=NAMES[p], eps=eps, steps=steps, loss=short)(x, y)
    options = {"max_iter": steps, "nb_random_init": 0, "loss_type": loss, "batch_size": 10}
    native = as_torchattacks(p)(ours, p, eps, **options, verbose=False)
    x_adv = native(x, y, x_adv_init=theirs.iterates[0])
    assert len(ours.iterates) == len(theirs.iterates) == steps + 1
    for mine, its in zip(ours.iterates, theirs.iterates, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)
    torch.testing.assert_close(x_adv, reference, rtol=0, atol=1e-9)  # which may be outside the ball in float32


@pytest.mark.parametrize("p", NAMES)
def test_every_query_with_targets_is_that_of_torchattacks(p, net64):
    steps = 20

    class Started(APGD):
        """At the starts of the reference."""

        starts = ()

        def start(self, state):
            start = self.starts[int(state.restart[0])]
            state.known["x_adv_init"] = start
            restart, state.known["restart"] = state.restart, 0 * state.restart
            super().start(state)
            state.known["restart"] = restart
            if self.n_targets:
                rank = torch.from_numpy(restart % self._targets)
                state.target = self._ranked(state).gather(1, rank[:, None])[:, 0]

    runs = []
    for x in some_images(6, dtype=torch.float64).split(1):
        y, eps = right(net64, x), {INF: 0.0078125, 2: 0.125}[p]
        ours, theirs = Recorder(net64), Recorder(net64)
        torchattacks.APGDT(theirs, norm=NAMES[p], eps=eps, steps=steps, n_classes=CLASSES)(x, y)
        options = {"loss_type": DLR, "n_targets": CLASSES - 1, "nb_random_init": 1, "batch_size": 1}
        native = as_torchattacks(p, Started)(ours, p, eps, max_iter=steps, verbose=False, **options)
        native.starts = theirs.iterates[:: steps + 1]
        native(x, y)
        assert len(ours.iterates) == len(theirs.iterates)
        for mine, its in zip(ours.iterates, theirs.iterates, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)
        runs.append(len(theirs.iterates) // (steps + 1))
    assert max(runs) > 1


@pytest.mark.parametrize("p", NAMES)
@pytest.mark.parametrize("targeted", [False, True])
def test_until_the_first_checkpoint_every_query_is_that_of_art(p, targeted, net):
    x = 0.3 + 0.4 * some_images(10)
    y = goal(net, x, targeted)
    ours, theirs = Noted(net), Recorder(net)
    options = {"eps": EPS[p], "eps_step": 2 * EPS[p], "max_iter": 40, "targeted": targeted, "verbose": False}
    np.random.seed(0)  # noqa: NPY002 - what ART draws from
    reference = art.AutoProjectedGradientDescent(art_classifier(theirs), p, nb_random_init=1, loss_type=CE, **options)
    reference.generate(x.numpy(), y.numpy())
    wanted = theirs.iterates[: checkpoints(40)[1] + 1]
    native = APGD(ours, p, nb_random_init=0, loss_type=CE, batch_size=10, precision="float32", **options)
    native(x, y, x_adv_init=wanted[0])
    asked = [points for points in ours.asked if len(points) == 10][: len(wanted)]
    for mine, its in zip(asked, wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)


# Against the papers


def literal(net, x, y, p, eps, steps, loss, start):
    """One image by the papers, line by line: the points asked about, and the best of them."""

    def f(point):
        point = point.clone().requires_grad_()
        value = loss(net(point[None]), y[None])[0]
        return value.item(), torch.autograd.grad(value, point)[0]

    def ball_then_box(point):
        if p == INF:
            return (x + (point - x).clamp(-eps, eps)).clamp(0, 1)
        if p == 2:
            delta = point.clamp(0, 1) - x
            return x + delta * min(1, eps / max(delta.norm().item(), 1e-300))
        return x + simplex(point - x, x, eps)

    asked, values, gradients = [start], [], []
    eta, k, changed, checked = (eps if p == 1 else 2 * eps), math.ceil(x.numel() / 5), x.numel(), None
    points = {0: start}
    point, previous = start, start
    halved, last = False, 0
    for i in range(steps + 1):
        value, gradient = f(point)
        values.append(value)
        gradients.append(gradient)
        best = int(np.argmax(values))
        if i == steps:
            return asked, points[best]
        if p == 1:
            if i and i % max(int(0.04 * steps), 1) == 0:
                sparsity = int((points[best] != x).sum())
                if sparsity < 0.95 * changed:
                    eta, point, gradient = eps, points[best], gradients[best]
                else:
                    eta = max(eta / 1.5, eps / 10)
                k, changed = math.ceil(sparsity / 1.5), sparsity
            size = gradient.abs().flatten()
            direction = gradient.sign() * (gradient.abs() >= size.sort(descending=True).values[k - 1])
            following = ball_then_box(point + eta * direction / direction.abs().sum())
        else:
            if i in checkpoints(steps) and i:
                rises = sum(values[j + 1] > values[j] for j in range(last, i))
                first = rises < 0.75 * (i - last)
                second = not halved and max(values) == checked
                halved = first or second
                if halved:
                    eta, point, gradient = eta / 2, points[best], gradients[best]
                last = i
            if i in checkpoints(steps):
                checked = max(values)
            unit = gradient.sign() if p == INF else gradient / gradient.norm()
            z = ball_then_box(point + eta * unit)
            alpha = 0.75 if i else 1
            following = ball_then_box(point + alpha * (z - point) + (1 - alpha) * (point - previous))
        previous, point = point, following
        points[i + 1] = point
        asked.append(point)


def simplex(delta, x, eps):
    """The nearest within the ball of norm 1 and the box, by bisection."""
    room = torch.where(delta > 0, 1 - x, x)

    def shrunk(threshold):
        return (delta.abs() - threshold).clamp_min(0).minimum(room)

    low, high = 0.0, float(delta.abs().max())
    if shrunk(0).sum() <= eps:
        return delta.sign() * shrunk(0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if shrunk(middle).sum() > eps else (low, middle)
    return delta.sign() * shrunk(high)


def dlr(logits, y):
    z = logits[0].sort(descending=True).values
    return -(logits[0, y] - max(v for c, v in enumerate(logits[0]) if c != y)) / (z[0] - z[2])


@pytest.mark.parametrize("loss", [CE, "margin"])
@pytest.mark.parametrize("steps", [1, 7, 40, 100])
@norms
def test_every_query_is_that_of_the_papers(p, steps, loss, net64):
    x = some_images(5, seed=3, dtype=torch.float64)
    y = right(net64, x)
    asked = Recorder(net64)
    attack = apgd(asked, p, max_iter=steps, loss_type=loss, batch_size=5)

    def margin(logits, label):
        others = logits.scatter(1, label[:, None], -torch.inf).amax(1)
        return others - logits.gather(1, label[:, None])[:, 0]

    function = margin if loss == "margin" else lambda logits, label: cross_entropy(logits, label, reduction="none")
    attack(x, y)
    assert len(asked.iterates) == steps
    for i in range(5):
        start = asked.iterates[0][i]
        expected, _ = literal(net64, x[i], y[i], p, EPS[p], steps, function, start)
        for mine, its in zip(asked.iterates, expected[:-1], strict=True):
            torch.testing.assert_close(mine[i], its, rtol=0, atol=1e-9)


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == (0, 22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(20) == (0, 5, 9, 12, 14, 16, 18, 19, 20)
    assert checkpoints(1) == (0, 1)
    assert checkpoints(0) == (0,)


@given(seed=st.integers(0, 999), radius=st.floats(0, 40), scale=st.floats(0.01, 3))
@settings(max_examples=60)
def test_the_projection_onto_ball_and_box_is_the_nearest_point(seed, radius, scale):
    x = some_images(3, seed, torch.float64)
    delta = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eps = torch.full((3, 1, 1, 1), radius, dtype=torch.float64)
    found = nearest_in_ball_and_box(delta, x, torch.zeros_like(x), torch.ones_like(x), eps)
    for image, its, projected in zip(x, delta, found, strict=True):
        torch.testing.assert_close(projected, simplex(its, image, radius), rtol=0, atol=1e-9)


@pytest.mark.parametrize("targets", ["none", "given", "ranked"])
def test_the_difference_of_logits_ratio_is_that_of_the_paper(targets, net64):
    x = some_images(6, dtype=torch.float64)
    y, logits = right(net64, x), net64(x).detach()
    options = {"none": {}, "given": {"targeted": True}, "ranked": {"n_targets": 2}}[targets]
    seen = []

    class Looking(APGD):
        def update(self, state, answer):
            seen.append(answer.value)
            return super().update(state, answer)

    label = (y + 1) % CLASSES if targets == "given" else y
    Looking(net64, loss_type=DLR, max_iter=0, nb_random_init=0, batch_size=6, verbose=False, **options)(x, label)
    z = logits.sort(1, descending=True).values
    others = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    own = logits.gather(1, label[:, None])[:, 0]
    spread = (z[:, 0] - z[:, 2]) if targets == "none" else z[:, 0] - (z[:, 2] + z[:, 3]) / 2
    expected = (own - others if targets == "given" else others - own) / spread
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("wanted", "used"), [(1, 1), (3, 3), (CLASSES - 1, CLASSES - 1), (40, CLASSES - 1)])
def test_each_start_goes_to_the_next_class_as_ranked_at_the_image(wanted, used, net64):
    x, y, seen = some_images(4, dtype=torch.float64), torch.zeros(4, dtype=torch.int64), {}

    class Looking(APGD):
        def start(self, state):
            super().start(state)
            for index, restart, target in zip(state.index, state.restart, state.target, strict=True):
                seen[int(index), int(restart)] = int(target)

        def reached(self, logits, y):
            return torch.zeros_like(y, dtype=torch.bool)

    class Alone(nn.Module):
        """Always right, in the same order of the other classes."""

        def forward(self, x):
            return torch.cat([net64(x)[:, :1] + 1e6, net64(x)[:, 1:]], 1)

    Looking(Alone(), max_iter=1, n_targets=wanted, nb_random_init=2, seed=0, verbose=False)(x, y)
    order = net64(x)[:, 1:].argsort(1, descending=True) + 1
    assert len(seen) == 4 * 2 * used
    for (index, restart), target in seen.items():
        assert target == order[index, restart % used]


class KeyedNoise(nn.Module):
    """Always right about class 0, with large noise on the other logits that belongs to a row's key."""

    def forward(self, x):
        keys = given_keys(len(x))
        noise = [np.random.default_rng(key).normal(size=CLASSES) for key in (range(len(x)) if keys is None else keys)]
        logits = x.flatten(1)[:, :CLASSES] + 9 * torch.from_numpy(np.stack(noise)).to(x)
        return logits + 1e6 * torch.eye(CLASSES, dtype=x.dtype)[0]


@pytest.mark.parametrize("batch_size", [3, 5])
def test_classes_of_a_random_model_are_ranked_by_the_same_draws_at_each_start(batch_size):
    x, y, seen = some_images(5), torch.zeros(5, dtype=torch.int64), {}

    class Looking(APGD):
        def start(self, state):
            super().start(state)
            for index, target in zip(state.index, state.target, strict=True):
                seen.setdefault(int(index), []).append(int(target))

    options = {"n_targets": CLASSES - 1, "nb_random_init": 1, "seed": 0, "eot_samples": 2, "early_stop": True}
    Looking(KeyedNoise().eval(), max_iter=1, batch_size=batch_size, verbose=False, **options)(x, y)
    assert {tuple(sorted(targets)) for targets in seen.values()} == {tuple(range(1, CLASSES))}
    assert len({tuple(targets) for targets in seen.values()}) > 1


# What is returned


@pytest.mark.parametrize("loss", [CE, DLR, "margin"])
@norms
def test_the_best_point_that_fools_is_returned_or_the_best_of_all(p, loss, net64):
    x = some_images(12, dtype=torch.float64)
    y = right(net64, x)
    asked = Noted(net64)
    x_adv = apgd(asked, p, 0.4 * EPS[p], loss_type=loss, batch_size=12)(x, y)
    points = torch.stack([points for points in asked.asked if len(points) == 12])
    logits = torch.stack([net64(point).detach() for point in points])
    fools = logits.argmax(2) != y
    assert torch.equal(net64(x_adv).argmax(1) != y, fools.any(0))
    assert fools.any(0).any()
    assert not fools.any(0).all()
    if loss == CE:
        values = torch.stack([cross_entropy(step, y, reduction="none") for step in logits])
        best = values.masked_fill(fools.any(0) & ~fools, -torch.inf).amax(0)
        found = cross_entropy(net64(x_adv).detach(), y, reduction="none")
        torch.testing.assert_close(found, best, rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"n_targets": 2}, {"loss_type": DLR}, {"targeted": True}], ids=str)
@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float32"])
@norms
def test_with_early_stop_no_image_fewer_is_fooled(p, precision, options):
    net, x = traceable_net(), some_images(24)
    y = goal(net, x, options.get("targeted", False))
    classical = apgd(net, p, 0.5 * EPS[p], max_iter=20, **options)
    stopped = apgd(net, p, 0.5 * EPS[p], max_iter=20, early_stop=True, precision=precision, **options)
    targeted = options.get("targeted", False)
    fooled = [is_fooled(net, attack(x, y), y, targeted) for attack in (classical, stopped)]
    assert not (fooled[0] & ~fooled[1]).any()
    assert np.array_equal(stopped.report.fooled, fooled[1])


@norms
def test_with_early_stop_an_image_that_fools_costs_no_more_steps(p):
    net, x = traceable_net(), some_images(24)
    y = right(net, x)
    classical, stopped = (apgd(net, p, 3 * EPS[p], max_iter=20, early_stop=stop) for stop in (False, True))
    assert is_fooled(net, classical(x, y), y).all()
    assert is_fooled(net, stopped(x, y), y).all()
    assert stopped.report.search_backward < classical.report.search_backward / 2


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
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([None, 1, 3]),
            "max_iter": st.integers(0, 12),
            "early_stop": st.booleans(),
            "precision": st.sampled_from(["auto", "bfloat16"]),
            "eot_samples": st.integers(1, 2),
            "nb_random_init": st.integers(0, 2),
            "loss_type": st.sampled_from([None, CE, DLR, "margin"]),
        }
    ),
    goals=st.sampled_from([{}, {"targeted": True}, {"n_targets": 1}, {"n_targets": 9}]),
)
@settings(max_examples=12)
def test_images_are_valid_and_the_model_untouched(p, name, n, data_seed, options, goals):
    model, x, y = MODELS[name], some_images(n, data_seed), some_labels(n, data_seed)
    attack = apgd(model, p, **options, **goals)
    x_adv = attack(x, y)
    assert snapshot(model) == BEFORE[name]
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (distance(x_adv, x, p) <= EPS[p] * (1 + 1e-15)).all()
    if attack.report.fooled is not None:
        assert np.array_equal(attack.report.fooled, is_fooled(model, x_adv, y, attack.targeted))


@pytest.mark.parametrize("options", [{}, {"early_stop": True}, {"n_targets": 3}], ids=str)
@norms
def test_neither_the_batch_size_nor_the_order_matters(p, options, net64):
    x = some_images(17, dtype=torch.float64)
    y = right(net64, x)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    given = {"loss_type": "margin", "nb_random_init": 2, **options}
    whole = apgd(net64, p, 0.3 * EPS[p], batch_size=17, **given)(x, y)
    other = apgd(net64, p, 0.3 * EPS[p], batch_size=4, **given)(x, y)
    torch.testing.assert_close(other, whole, rtol=0, atol=1e-9)
    start = apgd(net64, p, 0.3 * EPS[p], batch_size=5, **{**given, "nb_random_init": 0})
    torch.testing.assert_close(start(x[order], y[order]), start(x, y)[order], rtol=0, atol=1e-9)


@norms
def test_masked_pixels_keep_their_bits(p, net):
    x, mask = some_images(10), some_images(10, seed=9) > 0.4
    x_adv = apgd(net, p)(x, right(net, x), mask=mask)
    assert torch.equal(x_adv[~mask], x[~mask])
    assert (x_adv != x).flatten(1).any(1).all()


@pytest.mark.parametrize("p", NAMES)
def test_random_starts_are_on_the_surface_of_the_ball(p, net64):
    x = 0.3 + 0.4 * some_images(6, dtype=torch.float64)
    asked = Recorder(net64)
    apgd(asked, p, 0.1, batch_size=6)(x, right(net64, x))
    start = asked.iterates[0]
    torch.testing.assert_close(distance(start, x, p), torch.full((6,), 0.1, dtype=torch.float64), rtol=0, atol=1e-12)
    from_image = Recorder(net64)
    apgd(from_image, p, 0.1, batch_size=6, nb_random_init=0)(x, right(net64, x))
    assert torch.equal(from_image.iterates[0], x)


@norms
def test_an_estimator_in_another_range_is_attacked_alike(p):
    net, x = small_net(), 0.2 + 0.6 * some_images(8)
    y = right(net, x)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x / 255)

    estimator = art_classifier(Scaled().eval(), clip_values=(0.0, 255.0))
    plain = apgd(net, p, nb_random_init=0)(x, y)
    other = APGD(estimator, p, 255 * EPS[p], max_iter=12, nb_random_init=0, verbose=False)
    found = torch.from_numpy(other.generate(255 * x.numpy(), y.numpy())) / 255
    losses = [cross_entropy(net(images).detach(), y) for images in (plain, found)]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)


class Noisy(nn.Module):
    def __init__(self, net, sigma):
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x):
        logits = self.net(x)
        return logits + self.sigma * torch.randn_like(logits)


@pytest.mark.parametrize("options", [{}, {"n_targets": 2}, {"early_stop": True}, {"loss_type": DLR}], ids=str)
@norms
def test_a_random_model_is_fooled_by_fresh_draws_too(p, options, net):
    x = some_images(10)
    y, noisy = right(net, x), Noisy(net, 0.01)
    x_adv = apgd(noisy, p, 3 * EPS[p], eot_samples=2, judge_samples=5, **options)(x, y)
    with torch.no_grad():
        wrong = torch.stack([noisy(x_adv).argmax(1) != y for _ in range(21)]).float().mean(0)
    assert (wrong > 0.5).sum() >= 9


def test_it_is_an_attack_of_art(net):
    attack = APGD(art_classifier(net))
    assert isinstance(attack, art.AutoProjectedGradientDescent)
    reference = art.AutoProjectedGradientDescent.attack_params
    assert [name for name in attack.attack_params if name in reference] == list(reference)


def test_losses_that_need_more_classes_are_refused(net):
    x = some_images(2)
    for classes, options in ((2, {}), (3, {"targeted": True}), (3, {"n_targets": 1})):
        model = linear_model(classes=classes, dtype=torch.float32)
        with pytest.raises(ValueError, match=f"loss_type='difference_logits_ratio'.*has {classes}"):
            APGD(model, loss_type=DLR, verbose=False, **options)(x, torch.zeros(2, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"loss_type='difference_logits_ratio'.*has {classes}"):
            APGD(art_classifier(model, nb_classes=classes), loss_type=DLR, **options)
        for loss in (CE, "margin"):
            APGD(model, loss_type=loss, max_iter=2, verbose=False, **options)(x, torch.zeros(2, dtype=torch.int64))


BAD = {
    "norm": ({"norm": 3}, "norm=3.*must be one of 1.0, 2.0, inf"),
    "eps": ({"eps": -1}, "eps=-1: must be at least 0"),
    "eps_step": ({"eps_step": 0}, "eps_step=0: must be above 0"),
    "max_iter": ({"max_iter": -1}, "max_iter=-1: must be at least 0"),
    "nb_random_init": ({"nb_random_init": 1.5}, "nb_random_init=1.5: must be an integer"),
    "loss_type": ({"loss_type": "ce"}, "loss_type='ce': must be one of None, cross_entropy"),
    "n_targets": ({"n_targets": -1}, "n_targets=-1: must be at least 0"),
    "rho": ({"rho": 1.0}, "rho=1.0: must be above 0 and below 1"),
    "both": ({"targeted": True, "n_targets": 2}, "n_targets=2: must be 0 with targeted=True"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_by_name(options, message, net):
    with pytest.raises((TypeError, ValueError), match=message):
        APGD(net, **options)
    attack = APGD(net)
    with pytest.raises((TypeError, ValueError), match=message):
        attack.set_params(**options)
    assert repr(attack) == repr(APGD(net))
