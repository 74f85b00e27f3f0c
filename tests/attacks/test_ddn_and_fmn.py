"""DDN and FMN: what their papers and foolbox do, and what every attack owes a user."""

import foolbox
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CLASSES,
    Constant,
    NanGradient,
    art_classifier,
    is_fooled,
    linear_model,
    nudged,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from torch import nn

from guardians.attacks import DDN, FMN
from guardians.attacks.norms import annealed, nearest_in_ball
from guardians.parity.comparison import Recorder
from guardians.parity.rules import RoundedFactors, UnprojectedFastMinimumNorm
from guardians.toolkits import FoolboxAttack

INF = float("inf")


def ddn(model, **options):
    return DDN(model, **{"max_iter": 30, "verbose": False, "seed": 0, **options})


def rounded_ddn(model, **options):
    return RoundedFactors(model, **{"max_iter": 30, "verbose": False, "seed": 0, **options})


def fmn(p, kind=FMN):
    return lambda model, **options: kind(model, p, **{"max_iter": 30, "verbose": False, "seed": 0, **options})


ATTACKS = {"DDN": ddn, "FMN, 1": fmn(1), "FMN, 2": fmn(2), "FMN, inf": fmn(INF)}
attacks = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)
REFERENCES = {
    "DDN": (rounded_ddn, foolbox.attacks.DDNAttack),
    "FMN, 1": (fmn(1), foolbox.attacks.L1FMNAttack),
    "FMN, 2": (fmn(2, UnprojectedFastMinimumNorm), foolbox.attacks.L2FMNAttack),
    "FMN, inf": (fmn(INF), foolbox.attacks.LInfFMNAttack),
}


def right(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def inner_images(n, dtype=torch.float32):
    """Images of which no pixel is near a bound."""
    return 0.3 + 0.4 * some_images(n, dtype=dtype)


def goal(net, x, targeted):
    y = right(net, x)
    return (y + 1) % CLASSES if targeted else y


# Against foolbox


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 13, 60])
@pytest.mark.parametrize(("make", "reference"), REFERENCES.values(), ids=REFERENCES)
def test_every_query_is_foolbox_s(make, reference, steps, targeted, net64):
    x = some_images(10, dtype=torch.float64)
    y = goal(net64, x, targeted)
    ours, theirs = Recorder(net64), Recorder(net64)
    native = make(ours, max_iter=steps, targeted=targeted, batch_size=10)
    x_adv = native(x, y)
    other = FoolboxAttack(theirs, reference(steps=steps), targeted=targeted)(x, y)
    assert len(ours.iterates) == len(theirs.iterates) == steps
    for mine, its in zip(ours.iterates, theirs.iterates, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-10)
    # Which of two images at the same distance is kept is a matter of rounding.
    found = torch.from_numpy(native.report.fooled)
    distance = [native.distance(images, x)[found] for images in (x_adv, other)]
    torch.testing.assert_close(*distance, rtol=0, atol=1e-10)
    assert torch.equal(x_adv[~found], x[~found])


@pytest.mark.parametrize("p", [1, 2, INF])
def test_the_distance_to_a_plane_is_found(p):
    model = linear_model(classes=2)
    x = 0.5 + 0.1 * (some_images(8, dtype=torch.float64) - 0.5)
    y = right(model, x)
    logits = model(x)
    weight = (model[1].weight[0] - model[1].weight[1]).detach()
    expected = (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(weight, {1: INF, 2: 2, INF: 1}[p])
    attacks = [fmn(p)(model, max_iter=600), *([ddn(model, max_iter=600)] if p == 2 else [])]
    for attack in attacks:
        found = attack.distance(attack(x, y), x)
        assert attack.report.fooled.all()
        assert (found >= expected.detach() - 1e-9).all()
        assert (found <= (1.05 if p == 1 else 1.02) * expected.detach() + 1e-6).all()


def simplex_threshold(size, radius):
    """The shrinkage that leaves a sum of `radius`, by bisection."""
    low, high = 0.0, float(size.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (size - middle).clamp_min(0).sum() > radius else (low, middle)
    return high


@given(seed=st.integers(0, 999), radius=st.floats(0, 40))
@settings(max_examples=40)
def test_the_projection_onto_the_ball_of_norm_1_is_the_nearest_point(seed, radius):
    delta = torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eps = torch.full((3, 1, 1, 1), radius, dtype=torch.float64)
    found = nearest_in_ball(delta, eps, 1)
    for image, projected in zip(delta, found, strict=True):
        if image.abs().sum() <= radius:
            assert torch.equal(projected, image)
            continue
        shrunk = image.sign() * (image.abs() - simplex_threshold(image.abs(), radius)).clamp_min(0)
        torch.testing.assert_close(projected, shrunk, rtol=0, atol=1e-9)


def test_annealing_goes_from_the_first_to_the_last():
    shares = annealed(1.0, 0.01, np.array([0.0, 0.5, 1.0]), torch.zeros(3, 1, 1, 1)).flatten()
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.505, 0.01]))


# What every attack owes


MODELS = {
    "traceable": traceable_net(),
    "untraceable": small_net(),
    "zero gradient": Constant().eval(),
    "NaN gradient": NanGradient().eval(),
}
BEFORE = {name: snapshot(model) for name, model in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@attacks
@given(
    n=st.integers(1, 5),
    data_seed=st.integers(0, 50),
    targeted=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([None, 1, 3]),
            "max_iter": st.integers(1, 12),
            "early_stop": st.booleans(),
            "precision": st.sampled_from(["auto", "bfloat16"]),
            "eot_samples": st.integers(1, 2),
        }
    ),
)
@settings(max_examples=8)
def test_images_are_valid_verdicts_true_and_the_model_untouched(make, name, n, data_seed, targeted, options):
    model, x, y = MODELS[name], some_images(n, data_seed), some_labels(n, data_seed)
    attack = make(model, targeted=targeted, **options)
    x_adv = attack(x, y)
    assert snapshot(model) == BEFORE[name]
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    fooled = attack.report.fooled
    assert torch.equal(x_adv[~fooled], x[~fooled])
    assert np.array_equal(fooled, is_fooled(model, x_adv, y, targeted))


@attacks
def test_neither_the_batch_size_nor_the_order_matters(make, net64):
    """Of images whose search is steady where they are moved by less than a rounding; of FMN in norm 1 a few are not."""
    x = some_images(17, dtype=torch.float64)
    y = right(net64, x)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    whole, steady = make(net64, batch_size=17)(x, y), torch.ones(17, dtype=torch.bool)
    for near in nudged(x, 1e-15):
        moved = make(net64, batch_size=17)(near.clamp(0, 1), y) - whole
        steady &= moved.flatten(1).abs().amax(1) < 1e-9
    assert steady.sum() >= 12
    ordered, streamed = torch.empty_like(x), torch.empty_like(x)
    ordered[order] = make(net64, batch_size=5)(x[order], y[order])
    for finished in make(net64, batch_size=4).stream(zip(x.split(3), y.split(3), strict=True)):
        streamed[torch.from_numpy(finished.index)] = finished.x_adv
    for found in (make(net64, batch_size=4)(x, y), ordered, streamed):
        torch.testing.assert_close(found[steady], whole[steady], rtol=0, atol=1e-6)


@attacks
def test_masked_pixels_keep_their_bits_and_the_others_fool(make, net):
    x, mask = inner_images(10), some_images(10, seed=9) > 0.4
    attack = make(net, max_iter=60)
    x_adv = attack(x, right(net, x), mask=mask)
    assert torch.equal(x_adv[~mask], x[~mask])
    assert attack.report.fooled.sum() >= 8


@attacks
def test_an_image_that_is_wrong_already_comes_back_and_costs_little(make, net):
    x = inner_images(8)
    attack = make(net, max_iter=60)
    assert torch.equal(attack(x, (right(net, x) + 1) % CLASSES), x)
    assert attack.report.fooled.all()
    assert attack.report.search_backward <= 3 * 8


@attacks
def test_with_early_stop_the_first_image_that_fools_is_returned(make, net):
    x = inner_images(12)
    y = right(net, x)
    nearest, first = make(net, max_iter=60), make(net, max_iter=60, early_stop=True)
    x_near, x_first = nearest(x, y), first(x, y)
    assert first.report.fooled.all()
    assert nearest.report.fooled.all()
    assert first.report.search_backward < nearest.report.search_backward
    assert (nearest.distance(x_near, x) <= nearest.distance(x_first, x) + 1e-6).all()


@attacks
def test_an_estimator_in_another_range_is_attacked_alike(make):
    net, x = small_net(), inner_images(8)
    y = right(net, x)
    scaled = nn.Sequential(_Over255(), net)
    estimator = art_classifier(scaled, clip_values=(0.0, 255.0))
    plain, other = make(net, max_iter=60), make(estimator, max_iter=60)
    distance = plain.distance(plain(x, y), x).mean()
    found = torch.from_numpy(other.generate(255 * x.numpy(), y.numpy()))
    assert other.report.fooled.all()
    assert plain.distance(found / 255, x).mean() < 1.02 * distance


class _Over255(nn.Module):
    def forward(self, x):
        return x / 255


@pytest.mark.parametrize("levels", [16, 256])
def test_ddn_rounds_to_levels(levels, net):
    x = (some_images(8) * (levels - 1)).round() / (levels - 1)
    attack = ddn(net, max_iter=40, levels=levels)
    x_adv = attack(x, right(net, x))
    assert torch.equal((x_adv * (levels - 1)).round() / (levels - 1), x_adv)
    assert attack.report.fooled.sum() >= 6


def test_ddn_radii_are_computed_in_the_dtype_of_the_images(net64):
    x = inner_images(4, torch.float64)
    asked = Recorder(net64)
    attack = ddn(asked, max_iter=2, batch_size=4)
    attack(x, right(net64, x))
    torch.testing.assert_close(
        attack.distance(asked.iterates[1], x), torch.full((4,), 1.05, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_ddn_leaves_a_plateau_in_a_direction_of_its_own():
    x, y = inner_images(4), torch.zeros(4, dtype=torch.int64)
    runs = []
    for size in (4, 1):
        asked = Recorder(Constant().eval())
        ddn(asked, max_iter=2, batch_size=size)(x, y)
        runs.append(torch.cat(asked.iterates))
    moved = runs[0][4:8]
    assert not torch.equal(moved, x)
    assert torch.equal(moved, runs[1][1::2])


class Noisy(nn.Module):
    def __init__(self, net, sigma):
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x):
        logits = self.net(x)
        return logits + self.sigma * torch.randn_like(logits)


@attacks
def test_a_random_model_is_fooled_by_fresh_draws_too(make, net):
    x = some_images(10)
    y, noisy = right(net, x), Noisy(net, 0.01)
    attack = make(noisy, max_iter=60, eot_samples=2, judge_samples=5)
    x_adv, fooled = attack(x, y), attack.report.fooled
    assert torch.equal(x_adv[~fooled], x[~fooled])
    assert fooled.sum() >= 8
    with torch.no_grad():
        wrong = torch.stack([noisy(x_adv).argmax(1) != y for _ in range(51)]).float().mean(0)
    assert (wrong[torch.from_numpy(fooled)] > 0.5).float().mean() > 0.8


BAD = {
    "max_iter zero": ({"max_iter": 0}, "max_iter=0: must be at least 1"),
    "gamma one": ({"gamma": 1.0}, "gamma=1.0: must be above 0 and below 1"),
    "gamma string": ({"gamma": "a"}, "gamma='a'"),
    "targeted number": ({"targeted": 1}, "targeted=1: must be True or False"),
    "batch_size fraction": ({"batch_size": 1.5}, "batch_size=1.5: must be an integer"),
}
DDN_BAD = {
    "init_epsilon zero": ({"init_epsilon": 0}, "init_epsilon=0: must be above 0"),
    "levels one": ({"levels": 1}, "levels=1: must be at least 2"),
}
FMN_BAD = {
    "norm 3": ({"norm": 3}, "norm=3.*must be one of 1.0, 2.0, inf"),
    "norm 0": ({"norm": 0}, "norm=0"),
    "max_stepsize negative": ({"max_stepsize": -1}, "max_stepsize=-1"),
    "min_stepsize negative": ({"min_stepsize": -1}, "min_stepsize=-1"),
}
CASES = [(kind, *case) for kind, more in ((DDN, DDN_BAD), (FMN, FMN_BAD)) for case in ({**BAD, **more}).values()]


@pytest.mark.parametrize(("kind", "options", "message"), CASES)
def test_bad_arguments_are_refused_by_name(kind, options, message, net):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(net, **options)
    attack = kind(net)
    with pytest.raises((TypeError, ValueError), match=message):
        attack.set_params(**options)
    assert repr(attack) == repr(kind(net))
