"""Checks of attacks and defences that anyone can run on their own, after scikit-learn's `check_estimator`.

An attack is given as what makes it of a model, such as its class: `make(model)(images, labels)` are adversarial
images. A defence likewise: `make(model)(images)` are logits. Each check raises an `AssertionError` that says what is
wrong, or `unittest.SkipTest` where there is nothing to check; pytest knows both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor, nn

from guardians.attacks.fgsm import FGSM
from guardians.attacks.norms import as_norm, lp_norm
from guardians.engine.rng import row_keys
from guardians.toolkits.build import global_seed

__all__ = [
    "ATTACK_CHECKS",
    "DEFENCE_CHECKS",
    "check_attack",
    "check_defence",
    "failures",
    "parametrize_with_checks",
]

Make = Callable[..., Any]
"""Makes an attack, or a defence, of a model."""
Check = Callable[[Make], None]

_SHAPE, _CLASSES, _N = (3, 8, 8), 5, 24
_ROUNDING = 1e-5
_FEW = 0.01
"""Share of the pixels that rounding may move by a whole step: those whose gradient is zero but for it."""


def check_attack(make: Make) -> None:
    """Run all of `ATTACK_CHECKS`.

    Raises:
        AssertionError: of all that fail, a line each.
    """
    _raise(failures(make, ATTACK_CHECKS))


def check_defence(make: Make) -> None:
    """Run all of `DEFENCE_CHECKS`.

    Raises:
        AssertionError: of all that fail, a line each.
    """
    _raise(failures(make, DEFENCE_CHECKS))


def failures(make: Make, checks: Iterable[Check]) -> dict[str, str]:
    """What is wrong, by the name of the check; an error of another kind is wrong as well."""
    found = {}
    for check in checks:
        try:
            check(make)
        except SkipTest:
            continue
        except Exception as error:  # someone else's code may fail in any way
            found[check.__name__] = (
                str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            )
    return found


def parametrize_with_checks(makes: Iterable[Make], checks: Iterable[Check] | None = None) -> Any:
    """A pytest decorator for a test that takes `make` and `check`, and calls `check(make)`."""
    import pytest

    makes = list(makes)
    pairs = [(make, check) for make in makes for check in (ATTACK_CHECKS if checks is None else list(checks))]
    names = [f"{getattr(make, '__name__', type(make).__name__)}-{check.__name__}" for make, check in pairs]
    return pytest.mark.parametrize(("make", "check"), pairs, ids=names)


def check_shape_dtype_and_device(make: Make) -> None:
    """Adversarial images are tensors like the images."""
    x, _, x_adv = _attacked(make)
    assert isinstance(x_adv, Tensor), f"returns {type(x_adv).__name__}, not a tensor"
    for name in ("shape", "dtype", "device"):
        got, wanted = getattr(x_adv, name), getattr(x, name)
        assert got == wanted, f"returns images of {name} {got} for those of {wanted}"


def check_images_are_finite_and_in_range(make: Make) -> None:
    """Adversarial images have no NaN and lie in [0, 1], to the last bit."""
    _, _, x_adv = _attacked(make)
    assert x_adv.isfinite().all(), "returns images with NaN or infinite pixels"
    low, high = float(x_adv.min()), float(x_adv.max())
    assert low >= 0 and high <= 1, f"returns pixels from {low:.9g} to {high:.9g}: must be in [0, 1]"  # noqa: PT018


def check_norm_ball(make: Make) -> None:
    """Where an attack has `eps`, perturbations have a norm (`norm`, else inf) of at most that, but for rounding."""
    attack, x, y = make(_net()), *_images()
    norm, eps = _ball(attack)
    size = lp_norm((attack(x, y) - x).double(), norm).max().item()
    assert size <= eps * (1 + _ROUNDING) + 1e-6, f"leaves the ball: norm {size:.6g} where eps is {eps:.6g}"


def check_inputs_are_left_alone(make: Make) -> None:
    """Images and labels that are given are what they were."""
    x, y = _images()
    before = x.clone(), y.clone()
    make(_net())(x, y)
    assert torch.equal(x, before[0]), "writes into the images that it is given"
    assert torch.equal(y, before[1]), "writes into the labels that it is given"
    assert not x.requires_grad, "leaves the images requiring a gradient"


def check_model_is_left_alone(make: Make) -> None:
    """Parameters, buffers, modes, hooks and `requires_grad` of the model are what they were."""
    net = _net()
    net.features[0].requires_grad_(False)
    before = _state(net)
    make(net)(*_images())
    after = _state(net)
    for name, value in before.items():
        assert _same(value, after[name]), f"changes the model: {name}"


def check_parameters_get_no_gradient(make: Make) -> None:
    """Gradients are taken with respect to the images alone."""
    net = _net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    make(net)(*_images())
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, f"clears the gradient of {name}"
        assert (parameter.grad == 1).all(), f"adds to the gradient of {name}"


def check_seeds_decide(make: Make) -> None:
    """The same seeds of torch and numpy give the same images."""
    first, second = (_seeded(make, 0) for _ in range(2))
    assert _same(first, second), "gives other images for the same seeds"


def check_images_do_not_depend_on_the_batch(make: Make) -> None:
    """An image is attacked in the same way in smaller batches, and in another order; of attacks without chance."""
    x, y = _images()
    whole = _seeded(make, 0)
    if not _same(whole, _seeded(make, 1)):
        raise SkipTest("it draws random numbers")
    parts = torch.cat([make(_net())(*part) for part in zip(x.split(5), y.split(5), strict=True)])
    order = torch.from_numpy(np.random.default_rng(0).permutation(_N))
    shuffled = torch.empty_like(whole)
    shuffled[order] = make(_net())(x[order], y[order])
    for name, other in (("in smaller batches", parts), ("in another order", shuffled)):
        moved = ((whole - other).abs() > 100 * _ROUNDING).double().mean().item()
        assert moved <= _FEW, f"gives other images {name}: {100 * moved:.1f} % of the pixels"


def check_labels_may_be_one_hot(make: Make) -> None:
    """Where it has ART's `generate`, indices and one-hot rows are the same labels, and images come back in float32."""
    x, y = _images()
    if not hasattr(make(_net()), "generate"):
        raise SkipTest("it has no generate")
    found = []
    for labels in (y.numpy(), np.eye(_CLASSES, dtype=np.float32)[y.numpy()]):
        with global_seed(0, x.device):
            found.append(make(_net()).generate(x.numpy(), labels))
    assert isinstance(found[0], np.ndarray), f"generate returns {type(found[0]).__name__}, not an array"
    assert found[0].dtype == np.float32, f"generate returns {found[0].dtype}"
    assert np.abs(found[0] - found[1]).max() <= _ROUNDING, "gives other images for one-hot labels"


def check_bad_input_is_refused(make: Make) -> None:
    """Images with NaN, labels that no class has, and labels for other images are errors."""
    x, y = _images()
    bad = {
        "images with NaN": (x.clone().index_fill_(0, torch.tensor([1]), float("nan")), y),
        "a label that no class has": (x, y.clone().index_fill_(0, torch.tensor([1]), _CLASSES)),
        "fewer labels than images": (x, y[1:]),
    }
    for name, (images, labels) in bad.items():
        try:
            make(_net())(images, labels)
        except Exception:  # whatever it is called
            continue
        raise AssertionError(f"takes {name}")


def check_success_is_as_reported(make: Make) -> None:
    """Where it has `report.fooled`, that is what the model makes of the images."""
    net, (x, y) = _net(), _images()
    attack = make(net)
    x_adv, reported = attack(x, y), getattr(getattr(attack, "report", None), "fooled", None)
    if reported is None:
        raise SkipTest("it reports nothing")
    fooled = (net(x_adv).argmax(1) != y).numpy()
    assert (np.asarray(reported) == fooled).all(), (
        f"reports {np.sum(reported)} of {_N} as fooled where {fooled.sum()} are"
    )


def check_never_weaker_than_fgsm(make: Make) -> None:
    """Where it has `eps`, it fools at least as many images as one step of that size."""
    net, (x, y) = _net(), _images()
    attack = make(net)
    norm, eps = _ball(attack)
    own, other = (int((net(images).argmax(1) != y).sum()) for images in (attack(x, y), FGSM(net, norm, eps)(x, y)))
    assert own >= other, f"fools {own} of {_N} images where FGSM fools {other}"


def check_targets_are_approached(make: Make) -> None:
    """Where it is made with `targeted=True`, labels are targets, whose loss falls."""
    net, (x, y) = _net(), _images()
    try:
        attack = make(net, targeted=True)
    except TypeError:
        raise SkipTest("it has no targets") from None
    targets = (y + 1) % _CLASSES
    before, after = (nn.functional.cross_entropy(net(images), targets).item() for images in (x, attack(x, targets)))
    assert after < before, f"the loss of the targets is {after:.4g} after and {before:.4g} before the attack"


ATTACK_CHECKS: tuple[Check, ...] = (
    check_shape_dtype_and_device,
    check_images_are_finite_and_in_range,
    check_norm_ball,
    check_inputs_are_left_alone,
    check_model_is_left_alone,
    check_parameters_get_no_gradient,
    check_seeds_decide,
    check_images_do_not_depend_on_the_batch,
    check_labels_may_be_one_hot,
    check_bad_input_is_refused,
    check_success_is_as_reported,
    check_never_weaker_than_fgsm,
    check_targets_are_approached,
)
"""Of attacks."""


def check_logits(make: Make) -> None:
    """A defence returns finite logits (N, classes) that are differentiable with respect to the images."""
    x, _ = _images()
    logits = _defence(make)(x)
    assert logits.shape == (_N, _CLASSES), f"returns shape {tuple(logits.shape)} for {_N} images and {_CLASSES} classes"
    assert logits.isfinite().all(), "returns logits that are NaN or infinite"


def check_gradients_exist(make: Make) -> None:
    """Logits have a gradient with respect to most images that is neither zero nor NaN."""
    x, y = _images()
    inputs = x.requires_grad_(True)
    loss = nn.functional.cross_entropy(_defence(make)(inputs), y, reduction="sum")
    assert loss.requires_grad, "has no gradient with respect to the images"
    (gradient,) = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert gradient is not None, "has no gradient with respect to the images"
    assert gradient.isfinite().all(), "has gradients that are NaN or infinite"
    zero = (gradient == 0).flatten(1).all(1).double().mean().item()
    assert zero <= 0.5, f"has a gradient of zero at {100 * zero:.0f} % of the images: it is masked"


def check_randomness_is_declared(make: Make) -> None:
    """What answers differently when it is asked again has a `seed`, or says `is_random`."""
    defence, (x, _) = _defence(make), _images()
    with torch.no_grad():
        if _close(defence(x), defence(x)):
            return
    declared = hasattr(defence, "seed") or bool(getattr(defence, "is_random", False))
    assert declared, "answers differently when asked again, but has neither seed nor is_random"


def check_images_are_answered_alone(make: Make) -> None:
    """The answer about an image does not depend on the other images of the batch; a random one's given its draws."""
    defence, (x, _) = _defence(make), _images()
    keys, rows = np.arange(_N, dtype=np.uint64), np.arange(_N)

    def answer(rows: np.ndarray, seed: int = 0) -> Tensor:
        with torch.no_grad(), row_keys(keys[rows]), global_seed(seed, x.device):
            logits: Tensor = defence(x[torch.from_numpy(rows)])
        return logits

    whole = answer(rows)
    if not (_close(whole, answer(rows)) and _close(whole, answer(rows, seed=1))):
        raise SkipTest("its draws are not those of the images")
    for some in (rows[:1], rows[::-1].copy(), rows[7:12]):
        apart = (whole[torch.from_numpy(some)] - answer(some)).abs().max().item()
        assert apart <= 1e-4, f"answers about an image depend on the others of its batch: logits move by {apart:.3g}"


def check_answering_changes_nothing(make: Make) -> None:
    """Parameters, buffers and modes are the same after a forward pass."""
    defence, (x, _) = _defence(make), _images()
    before = _state(defence)
    with torch.no_grad():
        defence(x)
    after = _state(defence)
    for name, value in before.items():
        assert _same(value, after[name]), f"a forward pass changes {name}"


DEFENCE_CHECKS: tuple[Check, ...] = (
    check_logits,
    check_gradients_exist,
    check_randomness_is_declared,
    check_images_are_answered_alone,
    check_answering_changes_nothing,
)
"""Of defences."""


class _Net(nn.Module):
    """Convolutions with batch norm and dropout, which a wrong mode makes another function."""

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        parts += [nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.3)]
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(12 * 4 * 4, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 8, 8)."""
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


def _net() -> _Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _Net()
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
                layer.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    net.eval()
    with torch.no_grad():  # no class for all images
        net.head.weight *= 4
        net.head.bias.sub_(net(_pixels(1)).mean(0))
    return net


def _pixels(seed: int) -> Tensor:
    """Of which some are exactly 0 and 1."""
    x = torch.rand((_N, *_SHAPE), generator=torch.Generator().manual_seed(seed))
    return (1.25 * x - 0.125).clamp(0, 1)


def _images() -> tuple[Tensor, Tensor]:
    """Images that the network gets right."""
    x = _pixels(0)
    with torch.no_grad():
        return x, _net()(x).argmax(1)


def _attacked(make: Make) -> tuple[Tensor, Tensor, Any]:
    x, y = _images()
    return x, y, make(_net())(x, y)


def _seeded(make: Make, seed: int) -> Tensor:
    x, y = _images()
    with global_seed(seed, x.device):
        x_adv: Tensor = make(_net())(x, y)
    return x_adv


def _ball(attack: Any) -> tuple[float, float]:
    eps = getattr(attack, "eps", None)
    if not isinstance(eps, (int, float)):
        raise SkipTest("it has no eps")
    return as_norm(getattr(attack, "norm", np.inf)), float(eps)


def _defence(make: Make) -> Any:
    defence = make(_net())
    return defence.eval() if isinstance(defence, nn.Module) else defence


def _state(net: nn.Module) -> dict[str, Any]:
    """All of a module that others might see."""
    state: dict[str, Any] = {f"value of {name}": value.clone() for name, value in net.state_dict().items()}
    state |= {f"requires_grad of {name}": value.requires_grad for name, value in net.named_parameters()}
    for name, part in net.named_modules():
        state[f"mode of {name or 'the model'}"] = part.training
        state[f"hooks of {name or 'the model'}"] = list(part._forward_hooks)
    return state


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def _raise(found: dict[str, str]) -> None:
    assert not found, "\n".join(f"{name}: {message}" for name, message in found.items())
