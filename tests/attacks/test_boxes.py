"""Variables that keep images within `clip_values`: there and back, whatever the steps, and with true gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guardians.attacks.boxes import BOXES, NoBox

SHAPE = (3, 4, 4)


def per_feature(dtype=torch.float64):
    """Bounds of their own for each feature, equal for one of them."""
    generator = torch.Generator().manual_seed(5)
    low = 4 * torch.rand(SHAPE, generator=generator, dtype=dtype) - 3
    high = low + 0.1 + 3 * torch.rand(SHAPE, generator=generator, dtype=dtype)
    high[0, 1, 2] = low[0, 1, 2]
    return low, high


BOUNDS = {
    "unit": (torch.tensor(0.0), torch.tensor(1.0)),
    "symmetric": (torch.tensor(-1.0), torch.tensor(1.0)),
    "bytes": (torch.tensor(0.0), torch.tensor(255.0)),
    "one-sided": (torch.tensor(-3.0), torch.tensor(-0.5)),
    "per feature": per_feature(),
}
boxes = pytest.mark.parametrize("kind", BOXES.values(), ids=BOXES)
bounds = pytest.mark.parametrize("clip_values", BOUNDS.values(), ids=BOUNDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def images_between(clip_values, dtype, n=6, seed=0):
    """Images of which a quarter of the pixels is at the lower bound and a quarter at the upper one, to the last bit."""
    low, high = (bound.to(dtype) for bound in clip_values)
    share = torch.rand((n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share = (2 * share - 0.5).clamp(0, 1).to(dtype)
    x = (low + (high - low) * share).clamp(low, high)
    return torch.where(share == 1, high.expand_as(x), x)


def width_of(clip_values):
    return float((clip_values[1] - clip_values[0]).max())


@boxes
@bounds
@dtypes
@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_there_and_back_is_the_image_to_rounding(kind, clip_values, dtype, seed):
    x = images_between(clip_values, dtype, seed=seed)
    box = kind(clip_values, x)
    variable = box.variable(x)
    assert (variable.shape, variable.dtype) == (x.shape, x.dtype)
    assert variable.isfinite().all()
    image = box.image(variable)
    assert image.dtype == dtype
    largest = max(float(bound.abs().max()) for bound in clip_values)
    assert (image - x).abs().max() <= 32 * torch.finfo(dtype).eps * largest
    assert torch.equal(box.confine(variable), variable) or (box.image(box.confine(variable)) - image).abs().max() <= (
        32 * torch.finfo(dtype).eps * largest
    )


@boxes
@bounds
def test_mid_grey_is_zero_and_variables_do_not_depend_on_the_range(kind, clip_values):
    low, high = (bound.double() for bound in clip_values)
    share = torch.rand((5, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    unit = kind(BOUNDS["symmetric"], share).variable(2 * share - 1)
    box = kind(clip_values, share)
    same = (high > low).expand(SHAPE)
    torch.testing.assert_close(box.variable(low + (high - low) * share)[:, same], unit[:, same], rtol=1e-9, atol=1e-9)
    assert torch.equal(box.variable((low + high).expand(1, *SHAPE) / 2), torch.zeros(1, *SHAPE, dtype=torch.float64))


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_pixels_at_a_bound_have_a_slope_with_the_change_of_variables(bound):
    x = torch.full((1, *SHAPE), bound, dtype=torch.float64)
    box = BOXES["tanh"](BOUNDS["unit"], x)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    # tanh on the interval itself would have none. 5 % more of it at either end: 1.05 * (1 - 1 / 1.05**2) / 2.
    torch.testing.assert_close(box.gradient(one, zero, box.variable(x)), 1.05 * (1 - 1.05**-2) / 2 * one)


@boxes
@bounds
@dtypes
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1e-3, 0.3, 10.0, 1e6, 1e30]))
@settings(max_examples=15)
def test_images_are_within_the_bounds_to_the_last_bit_after_any_steps(kind, clip_values, dtype, seed, size):
    x = images_between(clip_values, dtype, seed=seed)
    box = kind(clip_values, x)
    generator = torch.Generator().manual_seed(seed)
    variable = box.variable(x)
    for _ in range(3):
        step = size * torch.randn(x.shape, generator=generator, dtype=dtype)
        variable = box.confine(variable + step)
        image = box.image(variable)
        assert image.isfinite().all()
        assert ((image >= clip_values[0].to(dtype)) & (image <= clip_values[1].to(dtype))).all()


@pytest.mark.parametrize("kind", [BOXES["tanh"], BOXES["projected"]])
@bounds
def test_a_confined_variable_is_no_further_than_the_bounds(kind, clip_values):
    """From beyond them an optimiser would need steps to come back that leave the image as it is."""
    low, high = (bound.double().expand(SHAPE) for bound in clip_values)
    box = kind(clip_values, torch.zeros(1, dtype=torch.float64))
    for sign, bound in ((1, high), (-1, low)):
        variable = box.confine(torch.full((1, *SHAPE), sign * 1e9, dtype=torch.float64))
        torch.testing.assert_close(box.image(variable)[0], bound, rtol=0, atol=1e-12 * float(bound.abs().max()) + 1e-15)
        wide = high > low
        assert (box.image(variable - sign * 1e-3)[0] != bound)[wide].all()


def test_the_variable_of_clipped_descent_is_free():
    x = images_between(BOUNDS["unit"], torch.float64)
    box = BOXES["clipped"](BOUNDS["unit"], x)
    variable = 5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(box.confine(variable), variable)
    torch.testing.assert_close(box.image(variable), (0.5 + 0.5 * variable).clamp(0, 1))
    # The distance is that of what is clipped, so it is the distance that leads back.
    torch.testing.assert_close(box.offset(variable, x), 0.5 + 0.5 * variable - x)


@pytest.mark.parametrize("kind", [BOXES["tanh"], BOXES["projected"]])
@bounds
def test_the_offset_is_the_difference_of_the_images(kind, clip_values):
    x, other = (images_between(clip_values, torch.float64, seed=seed) for seed in (0, 1))
    box = kind(clip_values, x)
    scale = width_of(clip_values)
    torch.testing.assert_close(box.offset(box.variable(other), x), other - x, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("kind", [*BOXES.values(), "none"], ids=[*BOXES, "none"])
@bounds
@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 0.95))
@settings(max_examples=10)
def test_the_gradient_is_autograds_at_interior_points(kind, clip_values, seed, share):
    generator = torch.Generator().manual_seed(seed)
    low, high = (bound.double() for bound in clip_values)
    shares = share * torch.rand((4, *SHAPE), generator=generator, dtype=torch.float64) + (1 - share) / 2
    inside, a = low + (high - low) * shares, torch.randn((4, *SHAPE), generator=generator, dtype=torch.float64)
    x = images_between(clip_values, torch.float64, n=4, seed=seed)
    box = NoBox(x) if kind == "none" else kind(clip_values, x)
    variable = box.variable(inside).requires_grad_(True)
    (expected,) = torch.autograd.grad(
        (a * box.image(variable)).sum() + box.offset(variable, x).square().sum(), variable
    )
    variable = variable.detach()
    ours = box.gradient(a, 2 * box.offset(variable, x), variable)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10 * width_of(clip_values) ** 2)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_beyond_a_bound_clipped_descent_feels_the_distance_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    x = images_between(BOUNDS["unit"], torch.float64, n=4, seed=seed)
    box, a = BOXES["clipped"](BOUNDS["unit"], x), torch.randn(x.shape, generator=generator, dtype=torch.float64)
    sign = torch.randn(x.shape, generator=generator, dtype=torch.float64).sign()
    variable = sign * (1.01 + 3 * torch.rand(x.shape, generator=generator, dtype=torch.float64))
    variable.requires_grad_(True)
    offset = (variable + 1) / 2 - x
    (expected,) = torch.autograd.grad((a * ((variable + 1) / 2).clamp(0, 1)).sum() + offset.square().sum(), variable)
    ours = box.gradient(a, 2 * offset.detach(), variable.detach())
    torch.testing.assert_close(ours, expected)
    assert ((ours.sign() == sign) | (ours.abs() < 1e-12)).all()  # down is inwards


@pytest.mark.parametrize("clip_values", BOUNDS.values(), ids=BOUNDS)
@boxes
def test_the_widest_pixel(kind, clip_values):
    box = kind(clip_values, torch.zeros(1, dtype=torch.float64))
    assert float(box.widest) == pytest.approx(width_of(clip_values), rel=1e-12)


@dtypes
def test_without_bounds_images_are_their_own_variables(dtype):
    x = 100 * torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=dtype)
    box = NoBox(x)
    for values in (box.variable(x), box.image(x), box.confine(x)):
        assert torch.equal(values, x)
    far = x + 1e6
    assert torch.equal(box.image(box.confine(far)), far)
    assert torch.equal(box.offset(far, x), far - x)
    a = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    assert torch.equal(box.gradient(a, far, x), a + far)
    assert float(box.widest) == 2
