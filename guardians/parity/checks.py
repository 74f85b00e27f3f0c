"""Checks of attacks and defences that anyone can run on their own, after scikit-learn's `check_estimator`.

An attack is given as what makes it of a model, such as its class: `make(model)(images, labels)` are adversarial
images. A defence likewise: `make(model)(images)` are logits. Each check raises an `AssertionError` that says what is
wrong, or `unittest.SkipTest` where there is nothing to check; pytest knows both.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time
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
    "CLASSES",
    "DEFENCE_CHECKS",
    "OUTCOMES",
    "SHAPE",
    "Result",
    "check_attack",
    "check_defence",
    "failures",
    "is_defence",
    "parametrize_with_checks",
    "results",
]

Make = Callable[..., Any]
"""Makes an attack, or a defence, of a model."""
Check = Callable[[Make], None]

SHAPE, CLASSES, _N = (3, 8, 8), 5, 24
"""Of the images that pieces are checked with."""
_ROUNDING = 1e-5
_FEW = 0.01
"""Share of the pixels that rounding may move by a whole step: those whose gradient is zero but for it."""
_SEEDS, _SIGMAS = 64, 6
"""Seeds over which answers of a random defence are averaged, and standard errors by which two means may differ."""

OUTCOMES = ("passed", "failed", "skipped", "timed out")


@dataclass(frozen=True)
class Result:
    """What came of a check.

    Attributes:
        check: its name, without "check_".
        outcome: one of `OUTCOMES`.
        why: what is wrong, or why nothing was checked; empty where it passed.
    """

    check: str
    outcome: str
    why: str = ""


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
    return {f"check_{found.check}": found.why for found in results(make, checks) if found.outcome == "failed"}


def results(make: Make, checks: Iterable[Check], seconds: float | None = None) -> Iterator[Result]:
    """What comes of each check, from the same state of the global generators of torch and numpy.

    Where a package is not installed that the piece needs, all is skipped.

    Args:
        make: the attack, or the defence.
        checks: of `ATTACK_CHECKS` or `DEFENCE_CHECKS`.
        seconds: of CPU time for all checks together; the one that is interrupted, and those after it, timed out. Only
            in the main thread of a Unix process. None for no limit.
    """
    left = seconds
    for check in checks:
        name = check.__name__.removeprefix("check_")
        began = process_time()
        try:
            with global_seed(0, torch.device("cpu")), _limited(left):
                check(make)
            found = Result(name, "passed")
        except (SkipTest, ImportError) as reason:
            found = Result(name, "skipped", str(reason))
        except _OutOfTime:
            found = Result(name, "timed out", f"the checks have {seconds:g} s of CPU time together")
        except AssertionError as error:
            found = Result(name, "failed", str(error))
        except Exception as error:  # someone else's code may fail in any way
            found = Result(name, "failed", f"{type(error).__name__}: {error}")
        yield found
        left = None if left is None else max(0.0, left - (process_time() - began))


def is_defence(make: Make) -> bool:
    """Whether what is made of a model is a module, as defences are, rather than a callable of images and labels."""
    return isinstance(make(_net()), nn.Module)


def parametrize_with_checks(makes: Iterable[Make], checks: Iterable[Check] | None = None) -> Any:
    """A pytest decorator for a test that takes `make` and `check`, and calls `check(make)`."""
    import pytest

    makes = list(makes)
    pairs = [(make, check) for make in makes for check in (ATTACK_CHECKS if checks is None else list(checks))]
    names = [f"{getattr(make, '__name__', type(make).__name__)}-{check.__name__}" for make, check in pairs]
    return pytest.mark.parametrize(("make", "check"), pairs, ids=names)


def check_shape_dtype_and_device(make: Make) -> None:
    """Adversarial images are tensors like the images; where there is a GPU also on that."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        x, y = (tensor.to(device) for tensor in _images())
        _assert_alike(x, make(_net().to(device))(x, y))


def check_double_precision(make: Make) -> None:
    """For a float64 model and images, adversarial images are in float64 and within the ball and [0, 1]."""
    x, y = _images()
    x = x.double()
    attack = make(_net().double())
    x_adv = attack(x, y)
    _assert_alike(x, x_adv)
    _assert_in_range(x_adv)
    if _has_ball(attack):
        _assert_in_ball(attack, x, x_adv)


def check_images_are_finite_and_in_range(make: Make) -> None:
    """Adversarial images have no NaN and lie in [0, 1], to the last bit."""
    x, y = _images()
    _assert_in_range(make(_net())(x, y))


def check_norm_ball(make: Make) -> None:
    """Where an attack has `eps`, perturbations have a norm (`norm`, else inf) of at most that, but for rounding."""
    attack, (x, y) = make(_net()), _images()
    _ball(attack)
    _assert_in_ball(attack, x, attack(x, y))


def check_inputs_are_left_alone(make: Make) -> None:
    """Images and labels that are given are what they were."""
    x, y = _images()
    before = x.clone(), y.clone()
    make(_net())(x, y)
    assert torch.equal(x, before[0]), "writes into the images that it is given"
    assert torch.equal(y, before[1]), "writes into the labels that it is given"
    assert not x.requires_grad, "leaves the images requiring a gradient"


def check_model_is_left_alone(make: Make) -> None:
    """Weights, buffers, modes, hooks and `requires_grad` are what they were, of a model in evaluation and training."""
    for training in (False, True):
        net = _net().train(training)
        net.features[0].requires_grad_(False)
        before = _state(net)
        make(net)(*_images())
        _assert_same(before, _state(net), "changes the model: ")


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


def check_own_seed_decides(make: Make) -> None:
    """Where it takes a `seed`, that decides alone, and the global generators are not drawn from."""
    found = []
    for state in range(2):
        with global_seed(state, torch.device("cpu")):
            found.append(_with_options(make, seed=0)(*_images()))
    assert _same(*found), "gives other images for the same seed of its own when the global generators differ"


def check_generators_are_not_seeded(make: Make) -> None:
    """The global generators of torch and numpy are not set to a fixed state, by which later draws would repeat."""
    _assert_not_seeded(lambda: make(_net())(*_images()))


def check_images_do_not_depend_on_the_batch(make: Make) -> None:
    """An image is attacked in the same way in smaller batches, and of attacks without chance in another order."""
    x, y = _images()
    whole, others = _seeded(make, 0), {}
    if _same(whole, _seeded(make, 1)):
        others["in smaller batches"] = torch.cat(
            [make(_net())(*part) for part in zip(x.split(5), y.split(5), strict=True)]
        )
        order = torch.from_numpy(np.random.default_rng(0).permutation(_N))
        others["in another order"] = torch.empty_like(whole)
        others["in another order"][order] = make(_net())(x[order], y[order])
    else:  # whose draws depend on a seed of its own, or else on the order of the calls
        whole = _with_options(make, seed=0)(x, y)
        others["for batch_size=5"] = _with_options(make, seed=0, batch_size=5)(x, y)
    for name, other in others.items():
        moved = ((whole - other).abs() > 100 * _ROUNDING).double().mean().item()
        assert moved <= _FEW, f"gives other images {name}: {100 * moved:.1f} % of the pixels"


def check_label_formats(make: Make) -> None:
    """Labels are int64 or int32; ART's `generate` also takes one-hot rows, and returns images in float32."""
    x, y = _images()
    found = {f"labels in {labels.dtype}": _seeded(make, 0, labels) for labels in (y, y.int())}
    if hasattr(make(_net()), "generate"):
        for name, labels in {"indices": y.numpy(), "one-hot labels": np.eye(CLASSES, dtype=np.float32)[y]}.items():
            with global_seed(0, x.device):
                x_adv = make(_net()).generate(x.numpy(), labels)
            assert isinstance(x_adv, np.ndarray), f"generate returns {type(x_adv).__name__}, not an array"
            assert x_adv.dtype == np.float32, f"generate returns {x_adv.dtype}"
            found[f"{name} in generate"] = torch.from_numpy(x_adv)
    first = next(iter(found.values()))
    for name, other in found.items():
        moved = ((first - other).abs() > _ROUNDING).double().mean().item()
        assert moved <= _FEW, f"gives other images for {name}: {100 * moved:.1f} % of the pixels"


def check_predictions_stand_in_for_labels(make: Make) -> None:
    """Where it has ART's `generate`, no labels are the model's predictions."""
    x, y = _images()
    if not hasattr(make(_net()), "generate"):
        raise SkipTest("it has no generate")
    found = []
    for labels in (y.numpy(), None):
        with global_seed(0, x.device):
            found.append(make(_net()).generate(x.numpy(), labels))
    assert np.abs(found[0] - found[1]).max() <= _ROUNDING, "gives other images without labels than for the predictions"


def check_bad_input_is_refused(make: Make) -> None:
    """Images with NaN, labels that no class has, and labels for other images are errors; what is right is none."""
    x, y = _images()
    make(_net())(x, y)
    bad = {
        "images with NaN": (x.clone().index_fill_(0, torch.tensor([1]), float("nan")), y),
        "a label that no class has": (x, y.clone().index_fill_(0, torch.tensor([1]), CLASSES)),
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
    x_adv, reported = attack(x, y), _fooled_in(attack)
    if reported is None:
        attack = _with_options(make, early_stop=True)  # native attacks judge where they stop early
        x_adv, reported = attack(x, y), _fooled_in(attack)
    if reported is None:
        raise SkipTest("it reports nothing")
    fooled = (net(x_adv).argmax(1) != y).numpy()
    assert (np.asarray(reported) == fooled).all(), (
        f"reports {np.sum(reported)} of {_N} as fooled where {fooled.sum()} are"
    )


def check_never_weaker_than_fgsm(make: Make) -> None:
    """Where it has `eps` and asks for gradients, it fools at least as many images as one step of that size."""
    net, (x, y) = _net(), _images()
    attack = make(net)
    norm, eps = _ball(attack)
    if not _asks_for_gradients(make):
        raise SkipTest("it asks the model for no gradients")
    own, other = (int((net(images).argmax(1) != y).sum()) for images in (attack(x, y), FGSM(net, norm, eps)(x, y)))
    assert own >= other, f"fools {own} of {_N} images where FGSM fools {other}"


def check_labels_are_avoided(make: Make) -> None:
    """Without targets the loss of the labels rises."""
    before, after = _losses(make, {}, _images()[1])
    assert after > before, f"the loss of the labels is {after:.4g} after and {before:.4g} before the attack"


def check_targets_are_approached(make: Make) -> None:
    """Where it is made with `targeted=True`, labels are targets, whose loss falls; or it refuses that."""
    _, y = _images()
    try:
        before, after = _losses(make, {"targeted": True}, (y + 1) % CLASSES)
    except (TypeError, ValueError) as error:
        if "target" not in str(error):
            raise
        raise SkipTest("it has no targets") from None
    assert after < before, f"the loss of the targets is {after:.4g} after and {before:.4g} before the attack"


ATTACK_CHECKS: tuple[Check, ...] = (
    check_shape_dtype_and_device,
    check_double_precision,
    check_images_are_finite_and_in_range,
    check_norm_ball,
    check_inputs_are_left_alone,
    check_model_is_left_alone,
    check_parameters_get_no_gradient,
    check_seeds_decide,
    check_own_seed_decides,
    check_generators_are_not_seeded,
    check_images_do_not_depend_on_the_batch,
    check_label_formats,
    check_predictions_stand_in_for_labels,
    check_bad_input_is_refused,
    check_success_is_as_reported,
    check_never_weaker_than_fgsm,
    check_labels_are_avoided,
    check_targets_are_approached,
)
"""Of attacks."""


def check_logits(make: Make) -> None:
    """A defence returns finite logits (N, classes) that are differentiable with respect to the images."""
    x, _ = _images()
    logits = _defence(make)(x)
    assert logits.shape == (_N, CLASSES), f"returns shape {tuple(logits.shape)} for {_N} images and {CLASSES} classes"
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
    """The answer about an image does not depend on the other images of its batch.

    A random one is asked with the draws of each image given (`guardians.engine.rng.row_keys`); if it does not take
    them, the means of its probabilities over many seeds are compared.
    """
    defence, (x, _) = _defence(make), _images()
    keys, rows = np.arange(_N, dtype=np.uint64), np.arange(_N)

    def answer(rows: np.ndarray, seed: int = 0) -> Tensor:
        with torch.no_grad(), row_keys(keys[rows]), global_seed(seed, x.device):
            logits: Tensor = defence(x[torch.from_numpy(rows)])
        return logits

    def moments(rows: np.ndarray, first: int) -> tuple[Tensor, Tensor]:
        drawn = torch.stack([answer(rows, first + seed).double().softmax(1) for seed in range(_SEEDS)])
        return drawn.mean(0), drawn.var(0) / _SEEDS

    whole, others = answer(rows), (rows[:1], rows[::-1].copy(), rows[7:12])
    if _close(whole, answer(rows)) and _close(whole, answer(rows, seed=1)):
        for some in others:
            apart = (whole[torch.from_numpy(some)] - answer(some)).abs().max().item()
            assert apart <= 1e-4, (
                f"answers about an image depend on the others of its batch: logits move by {apart:.3g}"
            )
        return
    mean, variance = moments(rows, 0)
    for number, some in enumerate(others, start=1):
        other, other_variance = moments(some, number * _SEEDS)
        chosen = torch.from_numpy(some)
        error = (variance[chosen] + other_variance).sqrt()
        apart = ((mean[chosen] - other).abs() / error.clamp_min(_ROUNDING)).max().item()
        assert apart <= _SIGMAS, (
            f"answers about an image depend on the others of its batch: the mean probabilities over {_SEEDS} seeds "
            f"are {apart:.3g} standard errors apart"
        )


def check_answering_changes_nothing(make: Make) -> None:
    """Weights, buffers, modes, hooks and the images are the same after a forward pass."""
    defence, (x, _) = _defence(make), _images()
    before, images = _state(defence), x.clone()
    with torch.no_grad():
        defence(x)
    _assert_same(before, _state(defence), "a forward pass changes ")
    assert torch.equal(x, images), "writes into the images that it is given"


def check_answering_seeds_no_generator(make: Make) -> None:
    """The global generators are not set to a fixed state, by which what is random would seem to be none."""
    defence, (x, _) = _defence(make), _images()
    with torch.no_grad():
        _assert_not_seeded(lambda: defence(x))


DEFENCE_CHECKS: tuple[Check, ...] = (
    check_logits,
    check_gradients_exist,
    check_randomness_is_declared,
    check_images_are_answered_alone,
    check_answering_changes_nothing,
    check_answering_seeds_no_generator,
)
"""Of defences."""


class _Net(nn.Module):
    """Convolutions with batch norm and dropout, which a wrong mode makes another function."""

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        parts += [nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.3)]
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(12 * 4 * 4, CLASSES)

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
    x = torch.rand((_N, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return (1.25 * x - 0.125).clamp(0, 1)


def _images() -> tuple[Tensor, Tensor]:
    """Images that the network gets right."""
    x = _pixels(0)
    with torch.no_grad():
        return x, _net()(x).argmax(1)


def _seeded(make: Make, seed: int, labels: Tensor | None = None) -> Tensor:
    x, y = _images()
    with global_seed(seed, x.device):
        x_adv: Tensor = make(_net())(x, y if labels is None else labels)
    return x_adv


def _with_options(make: Make, **options: Any) -> Any:
    try:
        return make(_net(), **options)
    except (TypeError, ValueError) as error:
        raise SkipTest(f"it takes no {' and '.join(options)}") from error


def _fooled_in(attack: Any) -> Any:
    return getattr(getattr(attack, "report", None), "fooled", None)


def _losses(make: Make, options: dict[str, Any], labels: Tensor) -> tuple[float, float]:
    """Of the labels, before and after the attack."""
    net, (x, _) = _net(), _images()
    x_adv = make(net, **options)(x, labels)
    before, after = (nn.functional.cross_entropy(net(images), labels).item() for images in (x, x_adv))
    return before, after


def _has_ball(attack: Any) -> bool:
    return isinstance(getattr(attack, "eps", None), (int, float))


def _ball(attack: Any) -> tuple[float, float]:
    if not _has_ball(attack):
        raise SkipTest("it has no eps")
    return as_norm(getattr(attack, "norm", np.inf)), float(attack.eps)


def _asks_for_gradients(make: Make) -> bool:
    net = _net()
    asked: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, logits: Tensor) -> None:
        if logits.requires_grad:
            logits.register_hook(asked.append)  # which a backward pass calls

    net.register_forward_hook(watch)
    make(net)(*_images())
    return bool(asked)


def _assert_alike(x: Tensor, x_adv: Any) -> None:
    assert isinstance(x_adv, Tensor), f"returns {type(x_adv).__name__}, not a tensor"
    for name in ("shape", "dtype", "device"):
        got, wanted = getattr(x_adv, name), getattr(x, name)
        assert got == wanted, f"returns images of {name} {got} for those of {wanted}"


def _assert_in_range(x_adv: Tensor) -> None:
    assert x_adv.isfinite().all(), "returns images with NaN or infinite pixels"
    low, high = float(x_adv.min()), float(x_adv.max())
    assert low >= 0 and high <= 1, f"returns pixels from {low:.9g} to {high:.9g}: must be in [0, 1]"  # noqa: PT018


def _assert_in_ball(attack: Any, x: Tensor, x_adv: Tensor) -> None:
    norm, eps = _ball(attack)
    size = lp_norm((x_adv - x).double(), norm).max().item()
    assert size <= eps * (1 + _ROUNDING) + 1e-6, f"leaves the ball: norm {size:.6g} where eps is {eps:.6g}"


def _assert_not_seeded(call: Callable[[], Any]) -> None:
    torch_states, numpy_states = [], []
    for seed in range(2):
        with global_seed(seed, torch.device("cpu")):
            call()
            torch_states.append(torch.get_rng_state())
            numpy_states.append(np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    assert not torch.equal(*torch_states), "seeds the global generator of torch"
    assert not np.array_equal(*numpy_states), "seeds the global generator of numpy"


def _assert_same(before: dict[str, Any], after: dict[str, Any], message: str) -> None:
    for name, value in before.items():
        assert _same(value, after[name]), f"{message}{name}"


def _defence(make: Make) -> Any:
    defence = make(_net())
    return defence.eval() if isinstance(defence, nn.Module) else defence


def _state(net: nn.Module) -> dict[str, Any]:
    """All of a module that others might see, but for the gradients."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    tensors = [*net.named_parameters(), *net.named_buffers()]
    state: dict[str, Any] = {f"value of {name}": value.detach().clone() for name, value in tensors}
    state |= {f"requires_grad of {name}": value.requires_grad for name, value in net.named_parameters()}
    for name, part in net.named_modules():
        state[f"mode of {name or 'the model'}"] = part.training
        state[f"hooks of {name or 'the model'}"] = [list(getattr(part, kind)) for kind in kinds]
    return state


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def _raise(found: dict[str, str]) -> None:
    assert not found, "\n".join(f"{name}: {message}" for name, message in found.items())


class _OutOfTime(BaseException):
    """No `Exception`, which an attack may catch."""


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raise inside after so many seconds of CPU time."""
    if seconds is None:
        yield
        return
    if seconds <= 0:
        raise _OutOfTime

    def stop(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
