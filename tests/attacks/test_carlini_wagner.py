"""Carlini and Wagner's attacks: nearest images against closed forms and the paper's loop, and what users rely on."""

import itertools

import art.attacks
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CLASSES,
    SHAPE,
    Constant,
    NanGradient,
    Recorder,
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

from guardians import attacks
from guardians.attacks import CarliniL2Method, CarliniLInfMethod, CarliniWagnerL2, CarliniWagnerLinf
from guardians.attacks.objectives import OBJECTIVE_FUNCTIONS, margin

NAN, INF = float("nan"), float("inf")
PIXELS = int(np.prod(SHAPE))
PROBE = 8
BOXES = ["tanh", "projected", "clipped"]
boxes = pytest.mark.parametrize("box", BOXES)
both_goals = pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])


def l2(model, **options):
    return CarliniWagnerL2(model, **{"verbose": False, "seed": 0, **options})


def linf(model, **options):
    return CarliniWagnerLinf(model, **{"verbose": False, "seed": 0, **options})


# Small searches of both norms, the one of the paper included.
SEARCHES = {
    "adaptive": (l2, {"binary_search_steps": 3, "max_iter": 20}),
    "paper": (l2, {"binary_search_steps": 3, "max_iter": 20, "adaptive": False, "initial_const": 1.0}),
    "inf": (linf, {"max_iter": 10, "initial_const": 0.1, "largest_const": 5.0, "const_factor": 4.0}),
}
searches = pytest.mark.parametrize(("make", "search"), SEARCHES.values(), ids=SEARCHES)


def size(x_adv, x, p=2):
    return torch.linalg.vector_norm((x_adv - x).flatten(1), p, dim=1)


def predictions(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def other_labels(model, x, seed=0):
    """Labels that the model does not give, to be targets."""
    return (predictions(model, x) + 1 + some_labels(len(x), seed) % (CLASSES - 1)) % CLASSES


def is_same(one, other):
    return (one == other).flatten(1).all(1).numpy()


# Linear models: the nearest image in closed form


def grey_images(n, seed=0):
    """Far enough from the bounds that none of them binds."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 0.4 * torch.rand((n, *SHAPE), generator=generator, dtype=torch.float64)


def half_spaces(model, x, label, targeted, kappa):
    """What fools a linear model: for a target all of these half-spaces, without one any: rows a and b of a delta >= b.

    They are logits[wins] - logits[loses] >= kappa.
    """
    weight, logits = model[1].weight.detach(), model(x[None]).detach()[0]
    others = [k for k in range(len(logits)) if k != label]
    wins, loses = ([label] * len(others), others) if targeted else (others, [label] * len(others))
    return (weight[wins] - weight[loses]).numpy(), (kappa - logits[wins] + logits[loses]).numpy()


def nearest_of_all_l2(a, b):
    """The projection of 0 onto an intersection of half-spaces: of all sets of active ones the feasible, the nearest."""
    sizes = []
    for n in range(1, len(b) + 1):
        for active in itertools.combinations(range(len(b)), n):
            delta = np.linalg.pinv(a[list(active)]) @ b[list(active)]
            if (a @ delta >= b - 1e-9).all():
                sizes.append(np.linalg.norm(delta))
    return min(sizes)


def nearest_of_all_linf(a, b):
    """The same in norm inf, a linear programme in (delta, tau)."""
    pixels = np.eye(a.shape[1])
    within = np.block([[pixels, -np.ones((len(pixels), 1))], [-pixels, -np.ones((len(pixels), 1))]])
    beyond = np.column_stack([-a, np.zeros(len(b))])
    bounds = np.concatenate([-b, np.zeros(2 * len(pixels))])
    solved = linprog([0] * len(pixels) + [1], np.concatenate([beyond, within]), bounds, bounds=(None, None))
    assert solved.success
    return solved.fun


def smallest(model, x, y, *, targeted=False, p=2, kappa=0.0):
    """The smallest distances (N,) at which a linear model is fooled, where the range of the pixels does not bind."""
    sizes = []
    for image, label in zip(x, y.tolist(), strict=True):
        a, b = half_spaces(model, image, label, targeted, kappa)
        if targeted:
            sizes.append((nearest_of_all_l2 if p == 2 else nearest_of_all_linf)(a, b))
        else:
            sizes.append((b / np.linalg.norm(a, 2 if p == 2 else 1, axis=1)).min())
    return torch.tensor(sizes, dtype=torch.float64)


def assert_nearly_smallest(x_adv, x, best, p, share):
    found = size(x_adv, x, p)
    assert (found >= best * (1 - 1e-9)).all()
    assert (found <= best * (1 + share)).all(), (found / best).tolist()


EXACT = {"binary_search_steps": 5, "max_iter": 100}


@boxes
@pytest.mark.parametrize(("seed", "targeted", "kappa"), [(0, False, 0.0), (1, False, 0.3), (2, True, 0.3)])
def test_l2_of_a_linear_model_is_the_smallest_within_a_percent(box, seed, targeted, kappa):
    model, x = linear_model(seed), grey_images(3, seed)
    y = other_labels(model, x) if targeted else predictions(model, x)
    attack = l2(model, box=box, targeted=targeted, confidence=kappa, **EXACT)
    x_adv = attack(x, y)
    assert ((x_adv > 0) & (x_adv < 1)).all()  # or the closed form would not hold
    assert_nearly_smallest(x_adv, x, smallest(model, x, y, targeted=targeted, kappa=kappa), 2, 0.01)
    assert attack.report.fooled.all()
    assert (margin(model(x_adv), y, targeted=targeted) >= kappa).all()


@pytest.mark.parametrize("function", ["f2", "f3", "f6", "f7"])
def test_l2_is_the_smallest_within_two_percent_whatever_compares_the_classes(function):
    model, x = linear_model(3), grey_images(4, 3)
    y = predictions(model, x)
    x_adv = l2(model, objective_function=function, **EXACT)(x, y)
    assert_nearly_smallest(x_adv, x, smallest(model, x, y), 2, 0.02)


@boxes
@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0)])
def test_l2_is_the_smallest_in_the_unit_of_clip_values(box, low, high):
    model, x, width = linear_model(1), grey_images(4, 1), high - low
    y = predictions(model, x)
    scaled = art_classifier(model, clip_values=(low, high), preprocessing=(low, width))
    attack = l2(scaled, box=box, **EXACT)
    x_adv = torch.from_numpy(attack.generate((low + width * x).numpy(), y.numpy()))
    assert x_adv.dtype == torch.float64
    assert_nearly_smallest(x_adv, low + width * x, width * smallest(model, x, y), 2, 0.01)
    assert attack.report.fooled.all()


def test_l2_of_images_without_bounds_is_the_smallest():
    model = linear_model(2)
    x = 3 * grey_images(4, 2) - 5
    y = predictions(model, x)
    attack = l2(art_classifier(model, clip_values=None), **EXACT)
    assert_nearly_smallest(attack(x, y), x, smallest(model, x, y), 2, 0.01)


def test_the_smallest_is_found_though_its_class_has_not_the_largest_logit():
    weight = torch.zeros(3, PIXELS, dtype=torch.float64)
    weight[1, 0], weight[2, 1:5] = 1.0, 5.0
    model = linear_model(classes=3)
    x = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.copy_(weight)
        # The gaps are 0.3 and 0.6, the distances 0.3 and 0.6 / 10.
        model[1].bias.copy_(torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64) - weight @ x.flatten())
    y = torch.tensor([0])
    torch.testing.assert_close(size(l2(model, **EXACT)(x, y), x), torch.tensor([0.06]).double(), rtol=0.01, atol=0)


@boxes
@pytest.mark.parametrize(("targeted", "kappa"), [(False, 0.0), (True, 0.5)])
def test_linf_of_a_linear_model_is_the_smallest_within_a_tenth(box, targeted, kappa):
    # Two classes, because the attack goes to the class with the largest logit, which is not always the nearest.
    model, x = linear_model(0, classes=5 if targeted else 2), grey_images(12)
    y = other_labels(model, x) if targeted else predictions(model, x)
    best = smallest(model, x, y, targeted=targeted, p=INF, kappa=kappa)
    keep = (best > 0.01).nonzero()[:2, 0]  # the search ends at 1/256
    attack = linf(model, box=box, targeted=targeted, confidence=kappa, max_iter=50, initial_const=0.01)
    x_adv = attack(x[keep], y[keep])
    assert ((x_adv > 0) & (x_adv < 1)).all()
    # Where several half-spaces meet, the smallest tau that is asked for may be one decrease too small.
    assert_nearly_smallest(x_adv, x[keep], best[keep], INF, 1 / 0.9 - 1 + 0.02 if targeted else 0.1)
    assert attack.report.fooled.all()
    assert (margin(model(x_adv), y[keep], targeted=targeted) >= kappa).all()


# The paper's loop, an image at a time


def papers_descent(model, x, y, targeted, const, kappa, rate, max_iter, abort_early):
    """Adam on ||delta||^2 + c f6 over w, from the image: the images on the way that fool the model."""
    stretch = 1.05
    w = torch.atanh((2 * x - 1) / stretch)
    rim = float(np.arctanh(1 / stretch))
    first, second, last = torch.zeros_like(x), torch.zeros_like(x), INF
    found = []
    for t in range(max_iter):
        w.requires_grad_(True)
        image = (stretch * torch.tanh(w) + 1) / 2
        logits = model(image[None])[0]
        rival = max((k for k in range(len(logits)) if k != y), key=logits.tolist().__getitem__)
        gap = logits[rival] - logits[y] if targeted else logits[y] - logits[rival]
        distance = ((image - x) ** 2).sum()
        loss = distance + const * torch.clamp(gap, min=-kappa)
        (g,) = torch.autograd.grad(loss, w)
        w = w.detach()
        if gap.item() < -kappa:
            found.append((distance.item(), image.detach().clamp(0, 1)))
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        mean, square = first / (1 - 0.9 ** (t + 1)), second / (1 - 0.999 ** (t + 1))
        w = (w - rate * mean / (torch.sqrt(square) + 1e-8)).clamp(-rim, rim)
        if abort_early and t % max(max_iter // 10, 1) == 0:
            if t > 0 and loss.item() > last - 1e-4 * abs(last):
                break
            last = loss.item()
    return found


def papers_search(model, x, y, targeted, const, steps, **options):
    """All values of c: times ten until an image is found, then bisection; the last of ten or more is the upper bound.

    Returns:
        The nearest image, or x, and the values of c.
    """
    low, high, consts, found = 0.0, INF, [], []
    for search in range(steps):
        if steps >= 10 and search == steps - 1 and high < INF:
            const = high
        consts.append(const)
        images = papers_descent(model, x, y, targeted, const, **options)
        found += images
        if images:
            high = min(high, const)
        else:
            low = max(low, const)
        const = 10 * const if high == INF else (low + high) / 2
    return min(found, key=lambda pair: pair[0])[1] if found else x, consts


@both_goals
@pytest.mark.parametrize("abort_early", [False, True])
@pytest.mark.parametrize(
    ("steps", "max_iter", "const", "kappa"),
    [(1, 12, 1.0, 0.0), (5, 8, 0.01, 0.0), (4, 25, 0.1, 0.5), (10, 6, 0.001, 0.0), (11, 11, 10.0, 0.2)],
)
def test_without_adaptation_it_is_the_papers_search(targeted, abort_early, steps, max_iter, const, kappa, net64):
    x = some_images(2, seed=2, dtype=torch.float64)
    y = other_labels(net64, x) if targeted else predictions(net64, x)
    attack = l2(
        net64,
        confidence=kappa,
        targeted=targeted,
        learning_rate=0.05,
        binary_search_steps=steps,
        max_iter=max_iter,
        initial_const=const,
        adaptive=False,
        abort_early=abort_early,
    )
    options = {"kappa": kappa, "rate": 0.05, "max_iter": max_iter, "abort_early": abort_early}
    expected = torch.stack(
        [
            papers_search(net64, image, int(label), targeted, const, steps, **options)[0]
            for image, label in zip(x, y, strict=True)
        ]
    )
    x_adv = attack(x, y)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-8)
    assert np.array_equal(attack.report.fooled, ~is_same(expected, x))


def test_the_oracle_finds_some_and_aborts_some(net64):
    """Or the comparison above would hold for a search that does nothing."""
    x = some_images(5, seed=2, dtype=torch.float64)
    y = predictions(net64, x)
    options = {"kappa": 0.0, "rate": 0.05, "max_iter": 25}
    some, other = (
        [
            papers_search(net64, image, int(label), False, 0.1, 4, abort_early=abort, **options)
            for image, label in zip(x, y, strict=True)
        ]
        for abort in (False, True)
    )
    assert all(not torch.equal(adv, image) for (adv, _), image in zip(some, x, strict=True))
    assert any(not torch.equal(one, two) for (one, _), (two, _) in zip(some, other, strict=True))
    assert len({tuple(consts) for _, consts in some}) > 1


# What comes back


class Notebook(Recorder):
    """Keeps the images that it is asked about."""

    def __init__(self, net):
        super().__init__(net)
        self.queries = []

    def forward(self, x):
        self.queries.append(x.detach().clone())
        return super().forward(x)


@searches
@both_goals
@pytest.mark.parametrize("kappa", [0.0, 0.3])
def test_the_nearest_of_all_that_was_asked_about_comes_back(make, search, targeted, kappa, net64):
    x = some_images(3, seed=5, dtype=torch.float64)
    y = other_labels(net64, x) if targeted else predictions(net64, x)
    p = INF if make is linf else 2
    for image, label in zip(x.split(1), y.split(1), strict=True):
        model = Notebook(net64)
        attack = make(model, targeted=targeted, confidence=kappa, learning_rate=0.1, **search)
        x_adv = attack(image, label)
        asked = torch.cat(model.queries)
        with torch.no_grad():
            margins = margin(net64(asked), label.expand(len(asked)), targeted=targeted)
        assert attack.report.fooled.all()
        assert (asked == x_adv).flatten(1).all(1).any()
        fooling = asked[margins > kappa + 1e-9]
        nearest = size(fooling, image, p).min()
        assert size(x_adv, image, p) <= nearest * (1 + 1e-12)
        assert margin(net64(x_adv), label, targeted=targeted) > kappa


@searches
@boxes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_are_misclassified_already_stay_bit_for_bit(make, search, box, dtype):
    model, x = small_net(dtype=dtype), some_images(12, dtype=dtype)
    y = other_labels(model, x)
    attack = make(model, box=box, **search)
    assert torch.equal(attack(x, y), x)
    assert attack.report.fooled.all()
    attack = make(model, box=box, targeted=True, **search)
    assert torch.equal(attack(x, predictions(model, x)), x)
    assert attack.report.fooled.all()


@searches
def test_images_that_are_misclassified_by_less_than_the_confidence_go_on(make, search, net64):
    x = some_images(12, dtype=torch.float64)
    y = net64(x).topk(2).indices[:, 1]
    kappa = 1.05 * margin(net64(x), y, targeted=False).max().item()
    attack = make(net64, confidence=kappa, **{**search, "max_iter": 50})
    x_adv = attack(x, y)
    moved = ~is_same(x_adv, x)
    assert attack.report.fooled.all()
    assert moved.sum() > 6
    assert (margin(net64(x_adv), y, targeted=False)[moved] > kappa).all()


class Narrow(nn.Module):
    """Sees one pixel, which the range lets change the logits but never the class."""

    def forward(self, x):
        pixel = x[:, 0, 0, 0]
        return torch.stack([2 + pixel, 1 + pixel**2, *[0 * pixel] * (CLASSES - 2)], 1)


@searches
@boxes
@pytest.mark.parametrize("model", [Constant(), Narrow()], ids=["constant", "narrow"])
def test_images_that_cannot_be_fooled_come_back_bit_for_bit(make, search, box, model):
    x, y = some_images(5), torch.zeros(5, dtype=torch.int64)
    attack = make(model, box=box, **search)
    assert torch.equal(attack(x, y), x)
    assert attack.report.fooled.tolist() == [False] * 5
    attack = make(model, box=box, targeted=True, **search)
    assert torch.equal(attack(x, y + 1), x)
    assert attack.report.fooled.tolist() == [False] * 5


@searches
def test_images_out_of_reach_of_a_few_steps_come_back_as_they_are(make, search, net64):
    x = some_images(12, dtype=torch.float64)
    y = predictions(net64, x)
    few = {name: value for name, value in search.items() if name in ("adaptive",)}
    attack = make(net64, learning_rate=1e-4, max_iter=2, **few)
    x_adv = attack(x, y)
    assert np.array_equal(is_same(x_adv, x), ~attack.report.fooled)
    assert not attack.report.fooled.all()


# Pixels at the bounds


def inward_model(x, outwards, seed=0):
    """Two linear classes, with a distance at which class 1 takes over from class 0.

    All pixels of x are 0 or 1. The direction leads inwards, for a share `outwards` of the pixels out of the range.
    """
    generator = torch.Generator().manual_seed(seed)
    slope = 0.5 + torch.rand(PIXELS, generator=generator, dtype=torch.float64)
    feasible = torch.rand(PIXELS, generator=generator) >= outwards
    sign = torch.where(feasible, 1.0, -1.0).double() * (1 - 2 * x.flatten())
    model, gap = linear_model(classes=2), 6.0
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([0 * slope, sign * slope]))
        model[1].bias.copy_(torch.stack([torch.tensor(0.0).double(), -gap - (sign * slope * x.flatten()).sum()]))
    assert (gap * slope[feasible] / slope[feasible].square().sum()).max() < 0.5  # far from the other bound
    return model, gap / float(slope[feasible].norm()), gap / float(slope[feasible].sum())


@boxes
@pytest.mark.parametrize(("kind", "outwards"), [("white", 0.0), ("binary", 0.5)])
def test_pixels_at_the_bounds_move_inwards(box, kind, outwards):
    random = (some_images(1, seed=4, dtype=torch.float64) > 0.5).double()
    x = {"white": torch.ones_like(random), "binary": random}[kind]
    model, best, _ = inward_model(x, outwards)
    y = torch.zeros(1, dtype=torch.int64)
    x_adv = l2(model, box=box, **EXACT)(x, y)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert best * (1 - 1e-9) <= float(size(x_adv, x)) <= 1.05 * best
    for make, search in SEARCHES.values():
        attack = make(model, box=box, learning_rate=0.1, **search)
        x_adv = attack(x, y)
        assert attack.report.fooled.all()
        assert x_adv.isfinite().all()


@boxes
def test_pixels_at_the_bounds_move_inwards_in_norm_inf(box):
    x = (some_images(1, seed=4, dtype=torch.float64) > 0.5).double()
    model, _, best = inward_model(x, 0.5)
    attack = linf(model, box=box, max_iter=50, initial_const=0.01)
    x_adv = attack(x, torch.zeros(1, dtype=torch.int64))
    assert attack.report.fooled.all()
    assert best * (1 - 1e-9) <= float(size(x_adv, x, INF)) <= 1.15 * best


# Invariants

MODELS = {"net": small_net(), "traceable": traceable_net(), "zero gradient": Constant(), "NaN gradient": NanGradient()}
BEFORE = {name: snapshot(model) for name, model in MODELS.items()}
shared = {
    "targeted": st.booleans(),
    "box": st.sampled_from(BOXES),
    "objective_function": st.sampled_from(sorted(OBJECTIVE_FUNCTIONS)),
    "learning_rate": st.sampled_from([0.01, 0.3, 100.0]),
    "max_iter": st.integers(1, 8),
    "initial_const": st.sampled_from([1e-3, 1.0, 1e6]),
    "batch_size": st.integers(1, 7),
    "precision": st.sampled_from(["auto", "float32", "bfloat16"]),
    "seed": st.integers(0, 2**63),
}
any_attack = st.one_of(
    st.fixed_dictionaries(
        {**shared, "adaptive": st.booleans(), "abort_early": st.booleans(), "binary_search_steps": st.integers(1, 3)}
    ).map(lambda options: (l2, options)),
    st.fixed_dictionaries({**shared, "largest_const": st.sampled_from([1e6, 1e7]), "const_factor": st.just(1e3)}).map(
        lambda options: (linf, options)
    ),
)


@pytest.mark.parametrize("name", MODELS)
@given(attack=any_attack, n=st.integers(1, 5), data_seed=st.integers(0, 99), masked=st.booleans())
@settings(max_examples=15)
def test_images_are_allowed_verdicts_true_and_the_model_untouched(name, attack, n, data_seed, masked):
    (make, options), model = attack, MODELS[name]
    x, y = some_images(n, data_seed), some_labels(n, data_seed)
    mask = some_images(n, data_seed + 1) > 0.5 if masked else None
    attacker = make(model, **options)
    x_adv = attacker(x, y, mask=mask)
    assert snapshot(model) == BEFORE[name]

    assert (x_adv.shape, x_adv.dtype) == (x.shape, x.dtype)
    assert x_adv.isfinite().all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    if masked:
        assert torch.equal(x_adv[~mask], x[~mask])

    with torch.no_grad():
        tied = (model(x_adv).topk(2).values.diff().abs() < 1e-5).flatten().numpy()
    fooled, report = is_fooled(model, x_adv, y, options["targeted"]), attacker.report
    assert ((fooled == report.fooled) | tied).all()
    assert (report.fooled | is_same(x_adv, x)).all()
    assert np.array_equal(attacker.generate(x.numpy(), y.numpy(), mask=mask if mask is None else mask.numpy()), x_adv)


@searches
@both_goals
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_labels_the_predictions_are_left(make, search, targeted, dtype):
    model, x = small_net(dtype=dtype), some_images(6, dtype=dtype)
    if targeted:
        with pytest.raises(ValueError, match="y=None"):
            make(model, targeted=True, **search)(x)
    else:
        assert torch.equal(make(model, **search)(x), make(model, **search)(x, predictions(model, x)))


@searches
def test_masked_pixels_keep_their_bits_and_the_others_fool(make, search, net64):
    x = some_images(8, dtype=torch.float64)
    y = predictions(net64, x)
    mask = some_images(1, seed=9) > 0.5
    attack = make(net64, learning_rate=0.1, **{**search, "max_iter": 40})
    x_adv = attack(x, y, mask=mask)
    assert torch.equal(x_adv[~mask.expand(x.shape)], x[~mask.expand(x.shape)])
    assert attack.report.fooled.all()


def test_with_a_mask_l2_of_a_linear_model_is_the_smallest():
    model, x = linear_model(5), grey_images(3, 5)
    y, mask = predictions(model, x), torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.5
    x_adv = l2(model, **EXACT)(x, y, mask=mask)
    blind = linear_model(5)
    with torch.no_grad():
        blind[1].bias.copy_(model[1].bias)
        blind[1].weight.mul_(mask.flatten())
    moved = [half_spaces(model, image, int(label), False, 0.0)[1] for image, label in zip(x, y, strict=True)]
    slopes = [half_spaces(blind, image, int(label), False, 0.0)[0] for image, label in zip(x, y, strict=True)]
    best = [(b / np.linalg.norm(a, axis=1)).min() for a, b in zip(slopes, moved, strict=True)]
    assert_nearly_smallest(x_adv, x, torch.tensor(best), 2, 0.01)


def test_nothing_moves_where_the_mask_is_zero(net64):
    x = some_images(4, dtype=torch.float64)
    for make, search in SEARCHES.values():
        attack = make(net64, **search)
        assert torch.equal(attack(x, predictions(net64, x), mask=np.zeros(SHAPE)), x)
        assert not attack.report.fooled.any()


@pytest.mark.parametrize(
    ("search", "targeted", "more"),
    [
        ("adaptive", False, {}),
        ("adaptive", True, {"abort_early": False}),
        ("paper", True, {}),
        ("paper", False, {"abort_early": False}),
        ("inf", False, {}),
        ("inf", True, {}),
    ],
)
def test_neither_the_batch_size_nor_the_company_matters(search, targeted, more, net64):
    """One image's progress is its own, whichever share its batch and whenever they leave it."""
    x = some_images(6, dtype=torch.float64)
    y = some_labels(6) if targeted else predictions(net64, x)
    make, options = SEARCHES[search]
    attack = make(net64, targeted=targeted, learning_rate=0.1, **options, **more)
    together, fooled = attack(x, y), attack.report.fooled
    assert fooled.any()
    assert len(set(size(together, x).tolist())) > 1
    for batch_size, order in ((4, [0, 1, 2, 3, 4, 5]), (2, [4, 0, 5, 3]), (1, [2, 1])):
        attack.set_params(batch_size=batch_size)
        torch.testing.assert_close(attack(x[order], y[order]), together[order], rtol=0, atol=1e-9)
        assert np.array_equal(attack.report.fooled, fooled[order])


def gradients_of_each(attack, x, y):
    """Asked for by the search for one image at a time; a float64 model has no copies that are tried."""
    counts = []
    for image, label in zip(x.split(1), y.split(1), strict=True):
        attack(image, label)
        counts.append(attack.report.search_backward)
    return np.array(counts)


@pytest.mark.parametrize("adaptive", [False, True])
@both_goals
@pytest.mark.parametrize(("steps", "max_iter"), [(1, 1), (1, 7), (2, 3), (5, 20)])
def test_no_image_costs_more_than_its_steps_and_aborting_saves(adaptive, targeted, steps, max_iter, net64):
    x = some_images(2, dtype=torch.float64)
    y = other_labels(net64, x) if targeted else predictions(net64, x)
    options = {"adaptive": adaptive, "binary_search_steps": steps, "max_iter": max_iter, "targeted": targeted}
    counts = {abort: gradients_of_each(l2(net64, abort_early=abort, **options), x, y) for abort in (False, True)}
    most = steps * max_iter if not adaptive else max(2, steps * max_iter)  # one to measure with, one to take
    assert (counts[False] <= most).all()
    assert (counts[True] <= counts[False]).all()
    if not adaptive:
        assert (counts[False] == most).all()
    if steps * max_iter >= 100:
        assert counts[True].sum() < counts[False].sum()
    together = l2(net64, abort_early=False, **options)
    together(x, y)
    assert together.report.search_backward <= most * len(x)


def test_a_copy_is_tried_on_eight_images_at_most():
    net, x = traceable_net(), some_images(12)
    attack = l2(net, precision="float32", binary_search_steps=2, max_iter=5, abort_early=False)
    attack(x, predictions(net, x))
    assert attack.report.search.startswith("folded")
    assert attack.report.search_backward <= 12 * 10 + 2 * PROBE


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
@searches
def test_the_verdict_is_the_models_own_whatever_searches(make, search, precision):
    net, x = traceable_net(), some_images(12)
    y = predictions(net, x)
    attack = make(net, precision=precision, learning_rate=0.1, **search)
    x_adv = attack(x, y)
    assert np.array_equal(attack.report.fooled, is_fooled(net, x_adv, y))
    assert np.array_equal(is_same(x_adv, x), ~attack.report.fooled)
    assert attack.report.fooled.sum() > 6


class Scaled(nn.Module):
    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        return self.scale * self.net(x)


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e6])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_scale_of_the_logits_moves_no_boundary(scale, targeted, net):
    x = some_images(10)
    y = other_labels(net, x) if targeted else predictions(net, x)
    distances = []
    for model in (net, Scaled(net, scale)):
        attack = CarliniWagnerL2(model, targeted=targeted, verbose=False)
        distances.append(attack.distance(attack(x, y), x).mean().item())
        assert attack.report.fooled.all()
    assert distances[1] == pytest.approx(distances[0], rel=0.01)


class Noisy(nn.Module):
    """A net that adds fresh noise to its logits at every pass."""

    def __init__(self, net, sigma):
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x):
        logits = self.net(x)
        return logits + self.sigma * torch.randn_like(logits)


@searches
@pytest.mark.parametrize(("sigma", "eot_samples"), [(0.5, 1), (0.5, 3), (20.0, 1)])
def test_random_models(make, search, sigma, eot_samples, net):
    x, net = some_images(12), net
    y = predictions(net, x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attack = make(Noisy(net, sigma), eot_samples=eot_samples, judge_samples=5, **search)
        x_adv = attack(x, y)
    fooled = attack.report.fooled
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert torch.equal(x_adv[~fooled], x[~fooled])
    assert fooled.any()


@pytest.mark.parametrize("function", OBJECTIVE_FUNCTIONS)
@pytest.mark.parametrize("make", [l2, linf])
@both_goals
def test_every_objective_function_fools(function, make, targeted, net):
    x = some_images(6)
    y = other_labels(net, x) if targeted else predictions(net, x)
    search = {"binary_search_steps": 3, "max_iter": 40} if make is l2 else {"initial_const": 0.1, "const_factor": 5.0}
    attack = make(net, objective_function=function, learning_rate=0.1, targeted=targeted, **search)
    x_adv = attack(x, y)
    assert np.array_equal(attack.report.fooled, is_fooled(net, x_adv, y, targeted))
    assert torch.equal(x_adv[~attack.report.fooled], x[~attack.report.fooled])
    assert attack.report.fooled.sum() >= (6 if function in ("f1", "f6", "f7") else 3)


# What ends the search of norm inf


@pytest.mark.parametrize(("largest", "values"), [(8.0, 4), (9.0, 4), (7.9, 3), (1.0, 1)])
def test_linf_gives_up_above_the_largest_const(largest, values):
    x = some_images(1, dtype=torch.float64)
    attack = linf(Narrow(), initial_const=1.0, largest_const=largest, const_factor=2.0, max_iter=6)
    assert torch.equal(attack(x, torch.zeros(1, dtype=torch.int64)), x)
    assert attack.report.search_backward == 6 * values + 1  # the engine tries a copy
    assert not attack.report.fooled.any()


def test_linf_with_more_steps_and_a_slower_decrease_is_nearer(net64):
    x = some_images(8, dtype=torch.float64)
    y = predictions(net64, x)
    coarse, fine = (
        size(linf(net64, decrease_factor=factor, max_iter=20, initial_const=0.01)(x, y), x, INF).mean()
        for factor in (0.3, 0.9)
    )
    assert fine < 0.9 * coarse


@searches
def test_more_confidence_is_further(make, search, net64):
    x = some_images(6, dtype=torch.float64)
    y = predictions(net64, x)
    p, sizes = INF if make is linf else 2, []
    for kappa in (0.0, 0.2, 0.5):
        attack = make(net64, confidence=kappa, learning_rate=0.1, **{**search, "max_iter": 60})
        x_adv = attack(x, y)
        assert attack.report.fooled.all()
        assert (margin(net64(x_adv), y, targeted=False) > kappa).all()
        sizes.append(size(x_adv, x, p).mean())
    assert sizes[0] < sizes[1] < sizes[2]


# Unusual models


class WithLogit(nn.Module):
    """A net with one class whose logit is a constant, infinite for example."""

    def __init__(self, net, k, value):
        super().__init__()
        self.net, self.k, self.value = net, k, value

    def forward(self, x):
        return self.net(x).index_fill(1, torch.tensor(self.k), self.value)


@searches
@pytest.mark.parametrize("function", ["f1", "f6"])
def test_a_class_that_never_wins_is_no_obstacle(make, search, function, net64):
    model, x = WithLogit(net64, 3, -INF), some_images(4, dtype=torch.float64)
    y = predictions(model, x)
    assert (y != 3).all()
    attack = make(model, objective_function=function, learning_rate=0.1, **{**search, "max_iter": 25})
    x_adv = attack(x, y)
    assert x_adv.isfinite().all()
    assert np.array_equal(attack.report.fooled, is_fooled(model, x_adv, y))
    assert attack.report.fooled.sum() >= 3
    attack.set_params(targeted=True)
    assert torch.equal(attack(x, torch.full_like(y, 3)), x)
    assert not attack.report.fooled.any()


@searches
@boxes
def test_a_class_that_always_wins(make, search, box, net64):
    model, x = WithLogit(net64, 3, INF), some_images(4, dtype=torch.float64)
    for targeted in (False, True):
        for label in (3, 1):
            attack = make(model, box=box, targeted=targeted, **search)
            assert torch.equal(attack(x, torch.full((4,), label)), x)
            assert attack.report.fooled.all() == attack.report.fooled.any() == ((label == 3) == targeted)


@searches
@both_goals
def test_two_classes(make, search, targeted):
    model, x = linear_model(classes=2), grey_images(6)
    y = predictions(model, x) if not targeted else 1 - predictions(model, x)
    attack = make(model, targeted=targeted, learning_rate=0.1, **{**search, "max_iter": 40})
    x_adv = attack(x, y)
    assert attack.report.fooled.all()
    assert np.array_equal(is_fooled(model, x_adv, y, targeted), attack.report.fooled)


@searches
@boxes
def test_bounds_of_single_features(make, search, box, net64):
    generator = torch.Generator().manual_seed(0)
    low = 0.4 * torch.rand(SHAPE, generator=generator)  # ART keeps bounds in float32
    high = low + 0.2 + 0.4 * torch.rand(SHAPE, generator=generator)
    estimator = art_classifier(net64, clip_values=(low.numpy(), high.numpy()))
    low, high = low.double(), high.double()
    x = (low + (high - low) * some_images(6, dtype=torch.float64)).clamp(low, high)
    attack = make(estimator, box=box, learning_rate=0.1, **{**search, "max_iter": 40})
    x_adv = attack(x, predictions(net64, x))
    assert ((x_adv >= low) & (x_adv <= high)).all()
    assert attack.report.fooled.all()


# What is not allowed

SHARED_ERRORS = {
    "initial_const zero": ({"initial_const": 0}, ValueError, "initial_const=0"),
    "initial_const negative": ({"initial_const": -1.0}, ValueError, "initial_const=-1.0"),
    "initial_const NaN": ({"initial_const": NAN}, ValueError, "initial_const=nan"),
    "confidence negative": ({"confidence": -0.5}, ValueError, "confidence=-0.5"),
    "confidence NaN": ({"confidence": NAN}, ValueError, "confidence=nan"),
    "confidence infinite": ({"confidence": INF}, ValueError, "confidence=inf"),
    "confidence string": ({"confidence": "a"}, TypeError, "confidence='a'"),
    "confidence of probabilities": (
        {"confidence": 1.0, "objective_function": "f2"},
        ValueError,
        "confidence=1.0.*'f2'",
    ),
    "learning_rate negative": ({"learning_rate": -1}, ValueError, "learning_rate=-1"),
    "learning_rate NaN": ({"learning_rate": NAN}, ValueError, "learning_rate=nan"),
    "learning_rate none": ({"learning_rate": None}, TypeError, "learning_rate=None"),
    "max_iter negative": ({"max_iter": -1}, ValueError, "max_iter=-1"),
    "max_iter fraction": ({"max_iter": 2.5}, TypeError, "max_iter=2.5"),
    "max_iter true": ({"max_iter": True}, TypeError, "max_iter=True"),
    "box unknown": ({"box": "sigmoid"}, ValueError, "box='sigmoid'.*tanh, projected, clipped"),
    "box none": ({"box": None}, ValueError, "box=None"),
    "objective_function unknown": ({"objective_function": "f8"}, ValueError, "objective_function='f8'.*f1.*f7"),
    "batch_size zero": ({"batch_size": 0}, ValueError, "batch_size=0"),
    "targeted not bool": ({"targeted": 1}, TypeError, "targeted=1"),
    "precision unknown": ({"precision": "half"}, ValueError, "precision='half'"),
    "eot_samples zero": ({"eot_samples": 0}, ValueError, "eot_samples=0"),
    "seed negative": ({"seed": -1}, ValueError, "seed=-1"),
}
L2_ERRORS = {
    "binary_search_steps negative": ({"binary_search_steps": -1}, ValueError, "binary_search_steps=-1"),
    "binary_search_steps fraction": ({"binary_search_steps": 1.5}, TypeError, "binary_search_steps=1.5"),
    "max_halving zero": ({"max_halving": 0}, ValueError, "max_halving=0"),
    "max_doubling zero": ({"max_doubling": 0}, ValueError, "max_doubling=0"),
    "adaptive not bool": ({"adaptive": 1}, TypeError, "adaptive=1"),
    "abort_early not bool": ({"abort_early": "no"}, TypeError, "abort_early='no'"),
}
LINF_ERRORS = {
    "decrease_factor zero": ({"decrease_factor": 0}, ValueError, "decrease_factor=0"),
    "decrease_factor one": ({"decrease_factor": 1.0}, ValueError, "decrease_factor=1.0"),
    "decrease_factor NaN": ({"decrease_factor": NAN}, ValueError, "decrease_factor=nan"),
    "const_factor one": ({"const_factor": 1.0}, ValueError, "const_factor=1.0"),
    "const_factor infinite": ({"const_factor": INF}, ValueError, "const_factor=inf"),
    "largest_const zero": ({"largest_const": 0}, ValueError, "largest_const=0"),
    "largest_const below the first": (
        {"largest_const": 0.5, "initial_const": 1.0},
        ValueError,
        "largest_const=0.5.*initial_const=1.0",
    ),
    "largest_const NaN": ({"largest_const": NAN}, ValueError, "largest_const=nan"),
}
ERRORS = [
    pytest.param(attack, *case, id=f"{attack.__name__}, {name}")
    for attack, own in ((CarliniWagnerL2, L2_ERRORS), (CarliniWagnerLinf, LINF_ERRORS))
    for name, case in {**SHARED_ERRORS, **own}.items()
]


@pytest.mark.parametrize(("attack", "options", "error", "message"), ERRORS)
def test_arguments_are_refused_by_name_and_value(attack, options, error, message, net):
    with pytest.raises(error, match=message):
        attack(net, **options)
    with pytest.raises(error, match=message):
        attack(net).set_params(**options)
    assert net.images_seen == 0


NOT_SCALARS = {
    "confidence": np.array([0.1, 0.2]),
    "learning_rate": np.array([0.1, 0.2]),
    "initial_const": torch.tensor([0.1, 0.2]),
    "largest_const": np.array([1.0, 2.0]),
    "const_factor": np.array([2.0, 3.0]),
    "decrease_factor": np.array([0.5, 0.6]),
}


@pytest.mark.parametrize("name", NOT_SCALARS)
def test_arrays_are_refused_where_a_number_is_needed(name, net):
    with pytest.raises((TypeError, ValueError), match=name):
        CarliniWagnerLinf(net, **{name: NOT_SCALARS[name]})


@pytest.mark.parametrize("name", ["box", "objective_function"])
def test_choices_that_have_no_hash_are_refused_by_name(name, net):
    with pytest.raises((TypeError, ValueError), match=name):
        CarliniWagnerL2(net, **{name: ["tanh"]})


@pytest.mark.parametrize("attack", [CarliniWagnerL2, CarliniWagnerLinf])
def test_arguments_of_other_attacks_are_unknown(attack, net):
    with pytest.raises(TypeError, match="eps"):
        attack(net, eps=0.3)
    with pytest.raises(ValueError, match="eps_step"):
        attack(net).set_params(eps_step=0.1)
    x = some_images(4)
    with pytest.raises(TypeError, match="x_adv_init"):
        attack(net)(x, some_labels(4), x_adv_init=x)
    assert net.images_seen == 0


@pytest.mark.parametrize("make", [l2, linf])
def test_with_early_stop_the_first_image_that_fools_is_returned(make, net):
    x = some_images(12)
    y = predictions(net, x)
    nearest = make(net, learning_rate=0.1)
    first = make(net, learning_rate=0.1, early_stop=True)
    x_near, x_first = nearest(x, y), first(x, y)
    assert nearest.report.fooled.any()
    assert np.array_equal(first.report.fooled, is_fooled(net, x_first, y))
    assert (first.report.fooled >= nearest.report.fooled).all()
    assert first.report.search_backward < nearest.report.search_backward
    distance = [nearest.distance(images, x)[torch.from_numpy(nearest.report.fooled)] for images in (x_near, x_first)]
    assert (distance[0] <= distance[1] + 1e-6).all()


@pytest.mark.parametrize("options", [{"binary_search_steps": 0}, {"max_iter": 0}, {"learning_rate": 0}])
@pytest.mark.parametrize("adaptive", [True, False])
def test_without_steps_or_their_length_images_stay_as_in_art(options, adaptive, net):
    x = some_images(6)
    attack = CarliniWagnerL2(net, adaptive=adaptive, verbose=False, **options)
    assert torch.equal(attack(x, predictions(net, x)), x)
    assert not attack.report.fooled.any()


@pytest.mark.parametrize("attack", [CarliniWagnerL2, CarliniWagnerLinf])
def test_a_single_logit_is_refused(attack):
    with pytest.raises(ValueError, match="single logit"):
        attack(linear_model(classes=1, dtype=torch.float32))(some_images(4), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("attack", [CarliniWagnerL2, CarliniWagnerLinf])
def test_images_outside_the_range_are_refused(attack, net):
    with pytest.raises(ValueError, match="clip_values"):
        attack(net)(255 * some_images(4), some_labels(4))


# In the place of ART's attacks


def test_l2_takes_arts_arguments_by_position(estimator):
    attack = CarliniL2Method(estimator, 0.0, False, 0.01, 10, 10, 0.01, 5, 5, 1, False)
    names = ("confidence", "targeted", "learning_rate", "binary_search_steps", "max_iter", "initial_const")
    names += ("max_halving", "max_doubling", "batch_size", "verbose")
    assert [getattr(attack, name) for name in names] == [0.0, False, 0.01, 10, 10, 0.01, 5, 5, 1, False]
    assert isinstance(attack, art.attacks.EvasionAttack)
    assert attack.estimator is estimator


def test_linf_takes_arts_arguments_by_position(estimator):
    attack = CarliniLInfMethod(estimator, 0.0, False, 0.01, 10, 0.9, 1e-5, 20.0, 2.0, 1, False)
    names = ("confidence", "targeted", "learning_rate", "max_iter", "decrease_factor", "initial_const")
    names += ("largest_const", "const_factor", "batch_size", "verbose")
    assert [getattr(attack, name) for name in names] == [0.0, False, 0.01, 10, 0.9, 1e-5, 20.0, 2.0, 1, False]
    assert isinstance(attack, art.attacks.EvasionAttack)
    assert attack.estimator is estimator


@pytest.mark.parametrize("attack", [CarliniL2Method, CarliniLInfMethod])
def test_as_art_calls_them(attack, estimator, net):
    x = some_images(6)
    labels = predictions(net, x)
    attacker = attack(estimator, learning_rate=0.1, initial_const=0.1, verbose=False)
    x_adv = attacker.generate(x.numpy(), np.eye(CLASSES)[labels])
    assert (type(x_adv), x_adv.dtype, x_adv.shape) == (np.ndarray, np.float32, x.shape)
    assert (estimator.predict(x_adv).argmax(1) != labels.numpy()).all()
    assert np.array_equal(attacker.generate(x.numpy()), x_adv)


def test_the_names_are_the_same_classes():
    assert attacks.CarliniL2Method is attacks.CarliniWagnerL2
    assert attacks.CarliniLInfMethod is attacks.CarliniWagnerLinf


@pytest.mark.parametrize("attack", [CarliniL2Method, CarliniLInfMethod])
def test_all_parameters_can_be_read_and_set_again(attack, net):
    attacker = attack(net)
    values = {name: getattr(attacker, name) for name in attacker.attack_params if name != "summary_writer"}
    attacker.set_params(**values)
    assert {name: getattr(attacker, name) for name in values} == values
