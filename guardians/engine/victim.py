"""The model under attack: what an attack may ask of an `nn.Module` or of an ART estimator."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from guardians.engine.own_gradients import EstimatorModule, is_plain
from guardians.engine.rng import row_keys

__all__ = ["Victim", "is_sharded", "isolated", "predicted_labels", "undisturbed"]

logger = logging.getLogger(__name__)

_UNIT = (torch.zeros((), dtype=torch.float64, device="cpu"), torch.ones((), dtype=torch.float64, device="cpu"))
_OTHER_SHAPE = ("Guard failed", "Expected input at *args")
"""What torch says where an exported module is given another shape than it was exported for."""
_LOW_PRECISIONS = (torch.bfloat16, torch.float16)


class Victim:
    """Differentiable logits and the loss of a classifier, with ART's preprocessing and loss where there are any.

    An estimator that predicts or differentiates in a way of its own, such as ART's for randomised smoothing, is asked
    through its `predict`, `loss_gradient` and `class_gradient`, see `EstimatorModule`.

    Attributes:
        module: the user's model.
        clip_values: bounds of valid images as tensors that broadcast to one image, or None where the estimator has
            none. Images of a bare module are in [0, 1].
        input_shape: the shape of one image, or None where it is not known.
        nb_classes: number of classes, or None until the first forward pass.
        device, dtype: of the model's first floating-point parameter or buffer; None where it has none.
        has_own_gradients: whether the estimator itself is asked, rather than its module.
    """

    def __init__(self, estimator: PyTorchClassifier | nn.Module) -> None:
        self._estimator: PyTorchClassifier | None = None
        self._asked: EstimatorModule | None = None
        self._known_classes: int | None = None
        self._returns_one: bool | None = None
        self._said: set[str] = set()
        self._differentiable = False
        self._loss_of: tuple[Any, Callable[[Tensor, Tensor], Tensor]] | None = None  # and what was made of it
        self._bounds_of: tuple[Any, tuple[Tensor, Tensor] | None] | None = None
        self.module: nn.Module
        if isinstance(estimator, nn.Module):
            self.module = estimator
        elif is_plain(estimator):
            self._estimator, self.module = estimator, estimator.model
        else:
            self._asked = EstimatorModule(estimator)
            self._estimator, self.module = estimator, self._asked

    @property
    def clip_values(self) -> tuple[Tensor, Tensor] | None:
        """As the estimator has them now."""
        if self._estimator is None:
            return _UNIT
        given = self._estimator.clip_values
        if self._bounds_of is None or self._bounds_of[0] is not given:
            self._bounds_of = given, _clip_tensors(given, tuple(self._estimator.input_shape))
        return self._bounds_of[1]

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """As the estimator has it now."""
        return None if self._estimator is None else tuple(self._estimator.input_shape)

    @property
    def nb_classes(self) -> int | None:
        """As the estimator has it, or of a bare module as its logits have shown it."""
        return self._known_classes if self._estimator is None else self._estimator.nb_classes

    @property
    def has_own_gradients(self) -> bool:
        """Whether the estimator itself is asked, rather than its module."""
        return self._asked is not None

    @property
    def has_single_output(self) -> bool | None:
        """Whether the model returns one number for two classes; None until it is asked."""
        return False if self._threshold is None else self._returns_one

    @property
    def averages_loss(self) -> bool:
        """Whether ART has the gradient of the mean loss of a batch, where `loss` is that of each sample."""
        return not self.has_own_gradients and getattr(getattr(self._estimator, "loss", None), "reduction", "") == "mean"

    @property
    def _threshold(self) -> float | None:
        """Above which a single output stands for class 1; None where the loss does not say so."""
        if self._estimator is None or self.has_own_gradients or self.nb_classes != 2:
            return None
        given = self._estimator.loss
        return 0.5 if isinstance(given, nn.BCELoss) else 0.0 if isinstance(given, nn.BCEWithLogitsLoss) else None

    @property
    def device(self) -> torch.device | None:
        """Of the model's first floating-point parameter or buffer; None where it has none."""
        weight = self._weight
        return None if weight is None else weight.device

    @property
    def dtype(self) -> torch.dtype | None:
        """As `device`."""
        weight = self._weight
        return None if weight is None else weight.dtype

    @property
    def _weight(self) -> Tensor | None:
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        return next((tensor for tensor in tensors if tensor.is_floating_point()), None)

    def logits(self, x: Tensor, module: Callable[[Tensor], Any] | None = None) -> Tensor:
        """Logits (N, classes) of images (N, ...), differentiable with respect to `x`.

        Of an estimator with a single output s for two classes they are (threshold, s): 0.5 for `BCELoss`, 0 for
        `BCEWithLogitsLoss`. What comes back as an object with `logits`, or in front of other things, is taken out.

        Args:
            x: images.
            module: what to ask in the place of the user's model, after the same preprocessing.

        Raises:
            ValueError: the model does not return one row of logits for each image, is exported for another batch size,
                or has no gradient of its input alone (reentrant checkpoints).
        """
        asked = x.clone()  # the model may write into it
        if self._estimator is not None and not self.has_own_gradients:
            asked = self._preprocess(asked)
        low = self.dtype if self.dtype in _LOW_PRECISIONS else None
        try:
            output = (module or self.module)(asked if low is None else asked.to(low))
        except (AssertionError, RuntimeError) as error:
            if any(sign in str(error) for sign in _OTHER_SHAPE):
                raise ValueError(
                    "the model was exported for batches of one size: torch.export needs dynamic_shapes for dimension 0"
                ) from error
            raise
        logits, where = _found_in(output)
        if where:
            self._say(f"the model returns more than logits: they are taken from output{where}")
        if self._threshold is not None and isinstance(logits, Tensor) and logits.shape in ((len(x),), (len(x), 1)):
            self._returns_one = True
            column = logits.reshape(len(x), 1)
            logits = torch.cat([torch.full_like(column, self._threshold), column], 1)
        elif self._returns_one is None:
            self._returns_one = False
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the model returned {got} for {len(x)} images; needed are logits (N, classes), of another model those "
                "of a module around it"
            )
        if logits.shape[1] == 1 and self.nb_classes is not None and self._estimator is not None:
            raise ValueError(
                f"the model returned {tuple(logits.shape)} for {len(x)} images; a single output needs nb_classes=2 and "
                "the loss BCELoss or BCEWithLogitsLoss"
            )
        if module is None:
            self._known_classes = logits.shape[1]
            self._check_graph(logits)
        return logits if low is None else logits.float()

    def clip(self, x: Tensor) -> Tensor:
        """`x` clamped to `clip_values`."""
        return x if self.clip_values is None else x.clamp(*(bound.to(x) for bound in self.clip_values))

    def loss(self, logits: Tensor, y: Tensor, probabilities: Tensor | None = None) -> Tensor:
        """Loss of each sample: cross-entropy, or the loss of the estimator.

        A loss that cannot be had per sample comes back as it is; its sum has the same gradient direction.

        Args:
            logits: (N, classes).
            y: labels (N,).
            probabilities: of the classes (N, classes), in the place of the labels where the loss is defined for them.
        """
        if self._asked is not None:
            return self._asked.loss(logits, y, probabilities)
        if self._estimator is None:
            return cross_entropy(logits, y if probabilities is None else probabilities.to(logits), reduction="none")
        given = self._estimator.loss
        if self._loss_of is None or self._loss_of[0] is not given:
            self._loss_of = given, _PerSampleLoss(given)
        rows = one_hot(y, logits.shape[1]) if probabilities is None else probabilities
        target = self._estimator.reduce_labels(rows.to(logits.dtype))
        if self.has_single_output:
            logits, target = logits[:, 1:], target.to(logits.dtype)[:, None]
        return self._loss_of[1](logits, target)

    def predict(self, x: Tensor) -> Tensor:
        """Labels (N,) that the model gives to images (N, ...), after an estimator's postprocessing."""
        with torch.no_grad():
            logits = self.logits(x)
        if self._estimator is None or not self._estimator.postprocessing_defences:
            return logits.argmax(1)
        predictions = self._estimator._apply_postprocessing(logits.cpu().numpy(), fit=False)
        return torch.from_numpy(np.asarray(predictions)).argmax(1).to(x.device)

    def _say(self, what: str) -> None:
        """Once."""
        if what not in self._said:
            self._said.add(what)
            logger.warning(what)

    def _check_graph(self, logits: Tensor) -> None:
        """Raise on reentrant checkpoints, at the first logits that have a graph."""
        if self._differentiable or logits.grad_fn is None:
            return
        seen, left = {logits.grad_fn}, [logits.grad_fn]
        while left:
            node = left.pop()
            if node.name() == "CheckpointFunctionBackward":
                raise ValueError(
                    "the model has checkpoints with use_reentrant=True, through which there is no gradient of images "
                    "alone: set use_reentrant=False"
                )
            new = {following for following, _ in node.next_functions if following is not None} - seen
            seen |= new
            left += new
        self._differentiable = True

    def _preprocess(self, x: Tensor) -> Tensor:
        estimator = self._estimator
        assert estimator is not None
        if estimator.all_framework_preprocessing:
            preprocessed: Tensor = estimator._apply_preprocessing(x, y=None, fit=False, no_grad=False)[0]
            return preprocessed
        output: Tensor = _NumpyPreprocessing.apply(x, estimator)
        return output


class _NumpyPreprocessing(torch.autograd.Function):
    """ART preprocessors that exist in numpy only, with the gradient estimates that they come with."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: PyTorchClassifier) -> Tensor:
        array = x.detach().cpu().numpy()
        ctx.estimator, ctx.array = estimator, array
        return torch.from_numpy(np.asarray(estimator._apply_preprocessing(array, y=None, fit=False)[0])).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        with torch.enable_grad():  # ART's estimates differentiate; autograd is off in a backward pass
            estimated = ctx.estimator._apply_preprocessing_gradient(ctx.array, gradient.cpu().numpy())
        return torch.from_numpy(np.asarray(estimated)).to(gradient), None


class _PerSampleLoss:
    """A loss without its reduction, where it has one."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss = loss
        if hasattr(loss, "reduction"):
            self._loss = copy.copy(loss)
            self._loss.reduction = "none"

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        loss = self._loss(logits, target)
        return loss.flatten(1).sum(1) if loss.ndim > 1 else loss


def _clip_tensors(clip_values: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    if clip_values is None:
        return None
    low, high = (torch.from_numpy(np.array(bound, dtype=np.float64)) for bound in clip_values)
    # ART lets the bounds of single features come flat, in the shape of an image, or broadcastable to it.
    pixels = math.prod(shape)
    low, high = (bound.reshape(shape) if bound.numel() == pixels > 1 else bound for bound in (low, high))
    return (low.reshape(()), high.reshape(())) if low.numel() == high.numel() == 1 else (low, high)


def predicted_labels(
    module: nn.Module, images: Tensor, batch_size: int = 256, keys: np.ndarray | None = None
) -> Tensor:
    """Labels (N,) that a module, in evaluation mode, gives to images (N, ...); `keys` (N,) are of its draws."""
    found = []
    with undisturbed(module), torch.no_grad():
        for first in range(0, len(images), batch_size):
            part = slice(first, first + batch_size)
            with nullcontext() if keys is None else row_keys(keys[part]):
                found.append(_found_in(module(images[part]))[0].argmax(1))
    return torch.cat(found)


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are spread over processes, by FSDP or tensor parallelism: such a model is only called."""
    if not _has_processes():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return any(isinstance(part, FullyShardedDataParallel) for part in module.modules()) or any(
        hasattr(parameter, "to_local")  # a DTensor, whose class moved between versions of torch
        for parameter in module.parameters()
    )


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _let_go(module: nn.Module) -> None:
    """Have FSDP give up the whole parameters that it keeps after a pass, which are others than those to be trained."""
    if _has_processes():
        from torch.distributed import fsdp

        kind: Any = getattr(fsdp, "FSDPModule", ())  # since torch 2.6
        for part in module.modules():
            if isinstance(part, kind):
                part.reshard()


def _found_in(output: Any) -> tuple[Any, str]:
    """The logits in what a model returns, and where they were; the output itself where there are none to see."""
    if isinstance(output, Tensor):
        return output, ""
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits, ".logits"
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"], "['logits']"
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], "[0]"
    return output, ""


class _Users:
    """How many attacks use each part of a model now, and what has to be restored when the last one leaves.

    Attacks in several threads, or streams that are open at the same time, may overlap in any way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[int, list[Any]] = {}  # by id: the part, how often it is used, its flag

    def enter(self, module: nn.Module) -> list[Any]:
        """Evaluation mode and frozen parameters; what `leave` is to be given."""
        with self._lock:
            used: list[nn.Module | Tensor] = [*module.modules()]
            used += (p for p in module.parameters() if p.requires_grad or id(p) in self._parts)
            for part in used:
                entry = self._parts.setdefault(id(part), [part, 0, _flag(part)])
                entry[1] += 1
                _set_flag(part, False)
            return used

    def leave(self, used: list[Any]) -> None:
        """Restore what nobody uses any more."""
        with self._lock:
            for part in used:
                entry = self._parts[id(part)]
                entry[1] -= 1
                if not entry[1]:
                    _set_flag(part, entry[2])
                    del self._parts[id(part)]


_USERS = _Users()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside, everything as it was outside, once the last user has left.

    The flags are set directly, so a module that overrides `train` does not notice.
    """
    _let_go(module)
    used = _USERS.enter(module)
    try:
        yield
    finally:
        _let_go(module)
        _USERS.leave(used)


def _flag(part: nn.Module | Tensor) -> bool:
    return part.requires_grad if isinstance(part, Tensor) else getattr(part, "training", False)


def _set_flag(part: nn.Module | Tensor, value: bool) -> None:
    if isinstance(part, Tensor):
        part.requires_grad_(value)
    elif _flag(part) != value:  # to set an attribute of a module takes long
        part.training = value


@contextmanager
def isolated(device: torch.device | None) -> Iterator[None]:
    """Neither autocast, nor inference mode, nor a default device of the caller inside; autograd off."""
    with ExitStack() as stack:
        for kind in {"cpu", "cpu" if device is None else device.type}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device(device or "cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
