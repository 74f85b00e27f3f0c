from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats

from guardians.attacks.norms import (
    as_norm,
    lp_norm,
    project,
    pull_into_ball,
    random_in_ball,
    steepest_ascent,
    steepest_ascent_in_box,
)
from guardians.engine.rng import SampleRng

INF = float("inf")
NORMS = [1, 1.5, 2, 3, INF]
signed = arrays(np.float64, (3, 2, 4), elements=st.floats(-10, 10, allow_subnormal=False))
radii = st.floats(1e-3, 20)


def norm_of(a, p):
    return np.linalg.norm(np.asarray(a, dtype=np.float64).reshape(len(a), -1), ord=p, axis=1)


@pytest.mark.parametrize(
    ("norm", "order"), [(1, 1), (2, 2), (3.5, 3.5), (np.inf, INF), ("inf", INF), (np.float32(2), 2), (np.int64(1), 1)]
)
def test_norm_orders_as_art_takes_them(norm, order):
    assert as_norm(norm) == order


@pytest.mark.parametrize("norm", [0, 0.5, -1, -np.inf, "l2", "2", np.nan, True, None, 2j, [2]])
def test_other_norm_orders_are_refused_by_name(norm):
    with pytest.raises(ValueError, match="norm="):
        as_norm(norm)


@pytest.mark.parametrize("p", NORMS)
def test_lp_norm_is_that_of_each_sample(p):
    a = np.random.default_rng(0).normal(size=(4, 3, 5, 5))
    norms = lp_norm(torch.from_numpy(a), p)
    assert norms.shape == (4, 1, 1, 1)
    np.testing.assert_allclose(norms.flatten().numpy(), norm_of(a, p), rtol=1e-14)


@pytest.mark.parametrize("p", NORMS)
@given(gradient=signed)
@settings(max_examples=30)
def test_steepest_ascent_attains_the_dual_norm_with_a_unit_vector(p, gradient):
    direction = steepest_ascent(torch.from_numpy(gradient), p).numpy()
    dual = {1: INF, INF: 1}.get(p) or p / (p - 1)
    largest = np.abs(gradient).max(axis=(1, 2), keepdims=True)
    scaled = gradient / np.where(largest > 0, largest, 1)  # so that the oracle does not underflow
    np.testing.assert_allclose((scaled * direction).sum(axis=(1, 2)), norm_of(scaled, dual), rtol=1e-12)
    np.testing.assert_allclose(norm_of(direction, p), largest.ravel() > 0, rtol=1e-12)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30])
def test_steepest_ascent_of_extreme_float32_gradients_has_unit_norm(p, size):
    gradient = torch.full((2, 3, 4, 4), size)
    gradient[0, 0, 0, 0] *= -1
    direction = steepest_ascent(gradient, p)
    assert direction.dtype == torch.float32
    np.testing.assert_allclose(norm_of(direction, p), 1, rtol=1e-5)


def test_steepest_ascent_of_the_1_norm_moves_one_pixel():
    gradient = torch.tensor([[[1.0, -3.0], [3.0, 2.0]]])
    assert torch.equal(steepest_ascent(gradient, 1), torch.tensor([[[0.0, -1.0], [0.0, 0.0]]]))


@given(
    gradient=arrays(np.float64, 6, elements=st.just(0.0) | st.floats(0.01, 10) | st.floats(-10, -0.01)),
    x=arrays(np.float64, 6, elements=st.sampled_from([0.0, 1.0]) | st.floats(0, 1, allow_subnormal=False)),
    radius=st.floats(0.01, 7),
)
@settings(max_examples=40)
def test_steepest_ascent_in_a_box_solves_the_linear_programme(gradient, x, radius):
    g, x_in = torch.from_numpy(gradient).view(1, -1), torch.from_numpy(x).view(1, -1)
    bounds, size = (torch.zeros_like(x_in), torch.ones_like(x_in)), torch.tensor([[radius]], dtype=torch.float64)
    step = steepest_ascent_in_box(g, x_in, *bounds, size)[0].numpy()
    assert np.abs(step).sum() <= radius * (1 + 1e-12)
    assert (x + step >= -1e-12).all()
    assert (x + step <= 1 + 1e-12).all()
    # step = up - down, each at least 0 and at most the room; what they sum to is bounded by the radius
    rooms = [(0, room) for room in (*(1 - x), *x)]
    best = optimize.linprog(np.r_[-gradient, gradient], np.ones((1, 12)), [radius], bounds=rooms)
    np.testing.assert_allclose(gradient @ step, -best.fun, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("p", NORMS)
@given(delta=signed, eps=radii)
@settings(max_examples=30)
def test_projection_ends_in_the_ball_and_leaves_what_is_inside(p, delta, eps):
    start, radius = torch.from_numpy(delta), torch.full((3, 1, 1), eps, dtype=torch.float64)
    projected = project(start, radius, p)
    assert (norm_of(projected, p) <= eps * (1 + 1e-12)).all()
    inside = norm_of(delta, p) <= eps * (1 - 1e-12)
    assert torch.equal(projected[inside], start[inside])
    torch.testing.assert_close(project(projected, radius, p), projected, rtol=1e-12, atol=0)


@given(delta=signed, eps=radii)
@settings(max_examples=30)
def test_projection_onto_the_2_ball_is_the_nearest_point(delta, eps):
    start = torch.from_numpy(delta)
    projected = project(start, torch.full((3, 1, 1), eps, dtype=torch.float64), 2)
    away = (start - projected).flatten(1).norm(dim=1)
    np.testing.assert_allclose(away, np.maximum(norm_of(delta, 2) - eps, 0), atol=1e-12)


@pytest.mark.parametrize("p", NORMS)
def test_radii_are_taken_per_sample(p):
    delta = torch.ones(3, 2, 4, dtype=torch.float64)
    eps = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64).view(3, 1, 1)
    np.testing.assert_allclose(norm_of(project(delta, eps, p), p), [0, 0.1, 0.5], rtol=1e-12)
    drawn = random_in_ball(delta, eps, p, SampleRng(0, np.arange(3)))
    assert (norm_of(drawn, p) <= [0, 0.1, 0.5]).all()


# Random starts

DRAWS, SIDE = 3000, (1, 2, 3)


def draws(p, eps):
    like = torch.empty(DRAWS, *SIDE, dtype=torch.float64)
    radius = torch.full((DRAWS, 1, 1, 1), eps, dtype=torch.float64)
    return random_in_ball(like, radius, p, SampleRng(7, np.arange(DRAWS)))


@pytest.mark.parametrize("p", NORMS)
def test_random_points_are_uniform_in_the_ball(p):
    points, d = draws(p, 0.3), int(np.prod(SIDE))
    radius = norm_of(points, p) / 0.3
    assert radius.max() <= 1 + 1e-12
    assert stats.kstest(radius**d, "uniform").pvalue > 0.01  # the volume of a ball of radius r is r^d
    # The marginal density of a coordinate t is proportional to (1 - |t|^p)^((d - 1) / p).
    flat = points.flatten(1).numpy() / 0.3
    for i in (0, d - 1):
        marginal = np.abs(flat[:, i]) if p == INF else np.abs(flat[:, i]) ** p
        law = stats.uniform() if p == INF else stats.beta(1 / p, (d - 1) / p + 1)
        assert stats.kstest(marginal, law.cdf).pvalue > 0.01
        assert stats.binomtest(int((flat[:, i] > 0).sum()), DRAWS).pvalue > 0.01
    assert abs(np.corrcoef(flat[:, 0], flat[:, -1])[0, 1]) < 0.06


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_points_come_in_the_dtype_of_the_images(p, dtype):
    like = torch.empty(4, 3, 2, 2, dtype=dtype)
    eps = torch.full((4, 1, 1, 1), 0.1, dtype=torch.float64)
    assert random_in_ball(like, eps, p, SampleRng(0, np.arange(4))).dtype == dtype


# To the last bit

PIXELS = 6
# Zero or at least 2^-20: then the difference of two pixels is exact in float64, and only the rounding under test is
# left. `grid` are the pixels of 8-bit images, whose neighbours at 8/255 rounding puts just inside or outside.
grid = st.integers(0, 255).map(lambda level: np.float32(level / 255))
pixel = grid | st.floats(2**-20, 1, width=32).map(np.float32) | st.just(np.float32(0))
sizes = st.sampled_from([0.0, 8 / 255, 16 / 255, 0.03, 0.1, 0.3, 0.5, 1.0]) | st.floats(1e-4, 2)


@st.composite
def attacked(draw):
    """An image, a radius, and an attacked image: anywhere, or a step of about eps from the image in float32."""
    x, eps = np.array(draw(st.lists(pixel, min_size=PIXELS, max_size=PIXELS)), np.float32), draw(sizes)
    if draw(st.booleans()):
        return x, eps, np.array(draw(st.lists(pixel, min_size=PIXELS, max_size=PIXELS)), np.float32)
    steps = draw(st.lists(st.sampled_from([-1, 1]), min_size=PIXELS, max_size=PIXELS))
    return x, eps, (x + np.float32(eps) * np.array(steps, np.float32)).astype(np.float32)


def exact_norm_power(x_adv, x, p):
    """||x_adv - x||_p ^ p in rational numbers; the norm itself for inf."""
    differences = [abs(Fraction(float(a)) - Fraction(float(b))) for a, b in zip(x_adv, x, strict=True)]
    return max(differences) if p == INF else sum(difference**p for difference in differences)


@pytest.mark.parametrize("p", [1, 2, 3, INF])
@given(case=attacked())
@settings(max_examples=150)
def test_pulled_images_are_in_the_ball_in_exact_arithmetic(p, case):
    x, eps, x_adv = case
    x_in, adv_in = (torch.from_numpy(a).view(1, -1) for a in (x, x_adv))
    pulled = pull_into_ball(adv_in, x_in, torch.tensor([[eps]], dtype=torch.float64), p)[0]
    assert pulled.dtype == torch.float32
    power = 1 if p == INF else p
    # A norm that rounds to eps in float64 may stay: sums of 6 terms are exact up to some 2^-52.
    slack = 1 if p == INF else 1 + Fraction(1, 2**50)
    assert exact_norm_power(pulled.numpy(), x, p) <= Fraction(eps) ** power * slack
    if exact_norm_power(x_adv, x, p) <= Fraction(eps) ** power * (2 - slack):
        assert np.array_equal(pulled.numpy(), x_adv)
    low, high = torch.minimum(x_in, adv_in)[0], torch.maximum(x_in, adv_in)[0]
    assert ((low <= pulled) & (pulled <= high)).all()


@pytest.mark.parametrize("p", [1, 2, INF])
def test_pulling_moves_by_no_more_than_rounding(p):
    x, delta = torch.randn(2, 50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    eps = torch.full((50, 1, 1, 1), 0.2, dtype=torch.float64)
    on_the_sphere = x + project(100 * delta, 0.2, p)
    pulled = pull_into_ball(on_the_sphere, x, eps, p)
    assert not torch.equal(pulled, on_the_sphere)
    torch.testing.assert_close(pulled, on_the_sphere, rtol=2.0**-22, atol=1e-7)
