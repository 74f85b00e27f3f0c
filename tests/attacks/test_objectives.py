"""The seven objective functions, against the paper's formulas written out for one image at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guardians.attacks.objectives import OBJECTIVE_FUNCTIONS, TAKE_CONFIDENCE, largest_other, margin

CLASSES = 6
INF = float("inf")


def softmax(z):
    powers = [math.exp(value - max(z)) for value in z]
    return [power / sum(powers) for power in powers]


def log_softmax(z, k):
    return z[k] - max(z) - math.log(sum(math.exp(value - max(z)) for value in z))


def splus(value):
    return math.log1p(math.exp(-abs(value))) + max(value, 0)


# The formulas of section IV.A: z are the logits, t the class that is wanted, o the one that stands in its way.
PAPER = {
    "f1": lambda z, t, o, kappa: -log_softmax(z, t) - 1,
    "f2": lambda z, t, o, kappa: max(softmax(z)[o] - softmax(z)[t], 0),
    "f3": lambda z, t, o, kappa: splus(softmax(z)[o] - softmax(z)[t]) - math.log(2),
    "f4": lambda z, t, o, kappa: max(0.5 - softmax(z)[t], 0),
    "f5": lambda z, t, o, kappa: -math.log(2) - log_softmax(z, t),
    "f6": lambda z, t, o, kappa: max(z[o] - z[t], -kappa),
    "f7": lambda z, t, o, kappa: splus(z[o] - z[t] + kappa) - math.log(2),
}
functions = pytest.mark.parametrize("name", PAPER)
conventions = pytest.mark.parametrize("targeted", [True, False], ids=["targeted", "untargeted"])


def random_logits(seed, size, n=12):
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn((n, CLASSES), generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (n,), generator=generator)


def wanted_and_unwanted(logits, y, targeted):
    """By hand: the largest other class stands in a target's way; without a target it is the one that is wanted."""
    rows = logits.tolist()
    others = [
        max((k for k in range(CLASSES) if k != int(label)), key=row.__getitem__)
        for row, label in zip(rows, y, strict=True)
    ]
    others = torch.tensor(others)
    return (y, others) if targeted else (others, y)


def test_all_seven_are_known_by_name():
    assert list(OBJECTIVE_FUNCTIONS) == list(PAPER)
    assert set(TAKE_CONFIDENCE) == {"f6", "f7"}


@functions
@conventions
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.01, 1.0, 30.0]), confidence=st.sampled_from([0.0, 0.5, 7.0]))
@settings(max_examples=20)
def test_values_are_those_of_the_paper(name, targeted, seed, size, confidence):
    logits, y = random_logits(seed, size)
    wanted, unwanted = wanted_and_unwanted(logits, y, targeted)
    confidence = confidence if name in TAKE_CONFIDENCE else 0.0
    ours = OBJECTIVE_FUNCTIONS[name](logits, wanted, unwanted, confidence)
    assert ours.shape == (len(logits),)
    expected = [
        PAPER[name](row, int(t), int(o), confidence)
        for row, t, o in zip(logits.tolist(), wanted, unwanted, strict=True)
    ]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)


@functions
@conventions
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.3, 1.0, 5.0]))
@settings(max_examples=20)
def test_it_is_not_above_zero_only_where_the_wanted_class_is_predicted(name, targeted, seed, size):
    logits, y = random_logits(seed, size, n=40)
    predicted = logits.argmax(1)
    fooled = (predicted == y) == targeted
    wanted, unwanted = wanted_and_unwanted(logits, y, targeted)
    low = OBJECTIVE_FUNCTIONS[name](logits, wanted, unwanted, 0.0) <= 0
    if name in ("f2", "f3", "f6", "f7"):
        assert torch.equal(low, fooled)
    elif name in ("f4", "f5"):
        assert fooled[low].all()
        assert torch.equal(low, logits.softmax(1).gather(1, wanted[:, None])[:, 0] >= 0.5)
    else:  # the constant 1 is that of logarithms to the base 2; with natural ones 1 / e is enough
        assert torch.equal(low, logits.softmax(1).gather(1, wanted[:, None])[:, 0] >= math.exp(-1))


@functions
@conventions
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_it_falls_on_the_way_to_the_wanted_class(name, targeted, seed):
    logits, y = random_logits(seed, 1.0)
    wanted, unwanted = wanted_and_unwanted(logits, y, targeted)
    before = OBJECTIVE_FUNCTIONS[name](logits, wanted, unwanted, 0.0)
    more = logits.scatter_add(1, wanted[:, None], torch.full((len(y), 1), 0.1, dtype=torch.float64))
    after = OBJECTIVE_FUNCTIONS[name](more, wanted, unwanted, 0.0)
    flat = before == 0 if name in ("f2", "f4", "f6") else torch.zeros_like(before, dtype=torch.bool)
    assert (after < before)[~flat].all()
    assert (after <= before).all()


@conventions
@given(seed=st.integers(0, 2**31), confidence=st.floats(0.01, 10))
@settings(max_examples=20)
def test_with_confidence_the_sign_tells_of_the_margin(targeted, seed, confidence):
    logits, y = random_logits(seed, 6.0, n=30)
    wanted, unwanted = wanted_and_unwanted(logits, y, targeted)
    reached = margin(logits, y, targeted=targeted) >= confidence
    f6 = OBJECTIVE_FUNCTIONS["f6"](logits, wanted, unwanted, confidence)
    assert torch.equal(f6 <= -confidence, reached)
    assert (f6 >= -confidence).all()
    assert torch.equal(OBJECTIVE_FUNCTIONS["f7"](logits, wanted, unwanted, confidence) <= 0, reached)


@functions
@conventions
def test_a_class_that_never_wins_changes_nothing(name, targeted):
    logits, y = random_logits(0, 2.0, n=200)
    keep = y != 2
    logits, y = logits[keep], y[keep]
    never = logits.clone()
    never[:, 2] = -INF
    least = logits.clone()
    least[:, 2] = -1e4
    never.requires_grad_(True)
    wanted, unwanted = wanted_and_unwanted(least, y, targeted)
    assert torch.equal(largest_other(never, y), unwanted if targeted else wanted)
    ours = OBJECTIVE_FUNCTIONS[name](never, wanted, unwanted, 0.0)
    torch.testing.assert_close(ours, OBJECTIVE_FUNCTIONS[name](least, wanted, unwanted, 0.0))
    (gradient,) = torch.autograd.grad(ours.sum(), never)
    assert gradient.isfinite().all()
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize(("name", "expected"), [("f2", 1.0), ("f3", splus(1.0) - math.log(2)), ("f4", 0.5)])
def test_functions_of_probabilities_are_finite_where_the_target_has_none(name, expected):
    logits = torch.tensor([[9.0, -INF, -INF]], dtype=torch.float64)
    f = OBJECTIVE_FUNCTIONS[name](logits, torch.tensor([1]), torch.tensor([0]), 0.0)
    assert f.item() == pytest.approx(expected, rel=1e-12)


@functions
def test_large_logits_do_not_overflow(name):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 0.0]], dtype=torch.float32, requires_grad=True)
    f = OBJECTIVE_FUNCTIONS[name](logits, torch.tensor([1, 1]), torch.tensor([0, 0]), 0.0)
    (gradient,) = torch.autograd.grad(f.sum(), logits)
    assert f.isfinite().all()
    assert gradient.isfinite().all()
    assert f[0] > 0 >= f[1]


# Logits, label, largest other class, untargeted margin
ROWS = {
    "plain": ([3.0, 1.0, 2.0], 0, 2, -1.0),
    "left": ([3.0, 1.0, 2.0], 1, 0, 2.0),
    "tie with the label": ([2.0, 2.0, 1.0], 0, 1, 0.0),
    "tie of others, the first": ([5.0, 1.0, 1.0], 0, 1, -4.0),
    "all equal": ([1.0, 1.0, 1.0], 1, 0, 0.0),
    "label never wins": ([-INF, 1.0, 2.0], 0, 2, INF),
    "other never wins": ([4.0, -INF, 2.0], 0, 2, -2.0),
    "no other ever wins": ([4.0, -INF, -INF], 2, 0, INF),
    "label always wins": ([INF, 1.0, 2.0], 0, 2, -INF),
    "other always wins": ([1.0, INF, 2.0], 0, 1, INF),
}


@pytest.mark.parametrize(("row", "label", "other", "by"), ROWS.values(), ids=ROWS)
def test_margin_and_largest_other(row, label, other, by):
    logits, y = torch.tensor([row]), torch.tensor([label])
    assert largest_other(logits, y).tolist() == [other]
    assert margin(logits, y, targeted=False).tolist() == [by]
    assert margin(logits, y, targeted=True).tolist() == [-by]


def test_two_infinite_logits_have_no_margin():
    assert margin(torch.tensor([[INF, INF, 0.0]]), torch.tensor([0]), targeted=False).isnan().all()


@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.1, 1.0, 100.0]))
@settings(max_examples=20)
def test_margin_by_hand(seed, size):
    logits, y = random_logits(seed, size)
    expected = [
        max(v for k, v in enumerate(row) if k != label) - row[label]
        for row, label in zip(logits.tolist(), y, strict=True)
    ]
    np.testing.assert_array_equal(margin(logits, y, targeted=False).numpy(), expected)
    np.testing.assert_array_equal(margin(logits, y, targeted=True).numpy(), -np.array(expected))


@given(seed=st.integers(0, 2**31), classes=st.integers(2, 6))
@settings(max_examples=20)
def test_the_largest_other_class_is_never_the_class_itself(seed, classes):
    logits, y = random_logits(seed, 1.0)
    others = largest_other(logits[:, :classes], y % classes)
    assert (others != y % classes).all()
    assert (others < classes).all()


def test_the_largest_other_class_is_another_one_even_where_no_other_ever_wins():
    assert largest_other(torch.tensor([[4.0, -INF, -INF]]), torch.tensor([0])).tolist() != [0]
