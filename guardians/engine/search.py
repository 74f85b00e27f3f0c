"""A cheaper copy of the model under attack, to search with but never to judge by."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights
from torch.utils.flop_counter import FlopCounterMode

from guardians.engine.victim import Victim, is_sharded, undisturbed

__all__ = [
    "InPrecision",
    "Search",
    "bfloat16_is_native",
    "choose_searches",
    "differ",
    "folded_copy",
    "folded_view",
    "has_hooks",
    "judge_logits",
    "seconds_of_a_pass",
    "works_in",
]

logger = logging.getLogger(__name__)

_BATCH_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: nn.Conv1d,
    nn.BatchNorm2d: nn.Conv2d,
    nn.BatchNorm3d: nn.Conv3d,
}
_CAST_BY_AUTOCAST = {nn.Linear, *_BATCH_NORMS.values()}
"""Modules all of whose weights are."""
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Of logits, relative to the largest: a copy that differs by more is another model."""
_MAGNIFIED = 12.0
"""Times the rounding of logits: how far short of the boundary the rounding of gradients may leave a search."""
_PER_PROCESSOR = 4e11
"""Operations a second of one of a GPU's multiprocessors in float32."""
_WORTHWHILE = 0.02
"""Seconds of a pass from which low precision gains on a GPU: below it waits for the launches, of which there are more.

On an H100 PGD-20 with early stop took 0.69 s in bfloat16 and 1.13 in float32 where a pass is 0.06 (a ResNet-50, 128
images of 224 x 224), and 0.30 and 0.21 where it is 0.01 (a ResNet-9 of width 32, 1,000 of CIFAR-10).
"""
_LOSS_SCALE = 2.0**12
"""Keeps gradients of images that the model is sure of out of float16's underflow."""

Logits = Callable[[Tensor], Tensor]


def bfloat16_is_native(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu_check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return device.type == "cpu" and cpu_check is not None and bool(cpu_check())


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two logits of the same images differ by more than rounding."""
    largest = float(first.abs().nan_to_num(nan=0, posinf=0).max())
    return not torch.allclose(first, second, rtol=1e-4, atol=1e-5 * largest, equal_nan=True)


def judge_logits(victim: Victim, x: Tensor, expected: Tensor) -> tuple[Logits, int]:
    """The victim's logits, asked in the memory format in which it is fastest, and how often it was tried on `x`.

    On a CPU convolutions are nearly twice as fast in channels_last. It is used where it changes logits by no more than
    rounding, as another batch size does too.
    """
    if x.device.type != "cpu" or x.ndim != 4:
        return victim.logits, 0

    def in_channels_last(images: Tensor) -> Tensor:
        return victim.logits(images.contiguous(memory_format=torch.channels_last))

    try:
        return (victim.logits if differ(expected, in_channels_last(x)) else in_channels_last), 1
    except RuntimeError as error:  # Tensor.view has none of it
        logger.debug("not judged in channels_last: %s", error)
        return victim.logits, 1


@dataclass(frozen=True)
class Search:
    """What a search asks for logits.

    Attributes:
        logits: of images (N, ...), as `Victim.logits`.
        description: of the model behind them, such as "folded, channels_last, bfloat16".
        rounding: how far short of the boundary they may end a search for their rounding, relative to the largest logit.
    """

    logits: Logits
    description: str = "model"
    rounding: float = 0.0


def choose_searches(
    victim: Victim, precision: str, x: Tensor, expected: Tensor | None, batch_size: int
) -> tuple[list[Search], int]:
    """The models to search with, the cheapest first, and how many were tried on `x`; the last is the victim itself.

    Cheaper ones have the victim's logits up to rounding: a copy with batch norm folded into the convolutions, in
    channels_last where that is fast, else in the usual memory format, or else the user's model, under autocast where
    the precision is lower than float32; and on a CPU the copy in float32, which on a GPU saves less than it costs to
    search a few images again. A model with hooks is neither copied nor autocast, as
    they would see it, nor is one that is sharded over processes; a random one is not copied, as a copy might repeat its
    draws.

    Args:
        victim: `undisturbed`.
        precision: "float32", "bfloat16", "float16", or "auto": bfloat16 or float16 where the device computes in it, and
            on a CPU after that the copy in float32; on a GPU where a batch is work enough for it.
        x: images to try.
        expected: the victim's logits of `x`; None for a random model.
        batch_size: images in a pass of the search.
    """
    own, found, tried = Search(victim.logits), [], 0
    if victim.dtype not in (None, torch.float32):
        return [own], 0
    if has_hooks(victim.module) or is_sharded(victim.module):
        _warn_once(victim.module, "the model has hooks or is sharded over processes")
        return [own], 0
    if x.device.type == "cuda" and precision == "auto":
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        if seconds_of_a_pass(victim, x, batch_size, processors) < _WORTHWHILE:
            logger.info("a pass is too little work for the GPU: the search asks the model itself")
            return [own], 0
    for candidates in _candidates(victim, precision, x.device, is_random=expected is None):
        for candidate in candidates:
            tried += 1
            off = _disagreement(victim, candidate, x, expected)
            if off is not None and off <= _ROUNDING[candidate.dtype]:
                found.append(Search(partial(victim.logits, module=candidate), str(candidate), _MAGNIFIED * off))
                break
    if not found:
        _warn_once(victim.module, "nothing cheaper gives the model's logits")
    return [*found, own], tried


_WARNED: WeakSet[nn.Module] = WeakSet()


def _warn_once(model: nn.Module, why: str) -> None:
    """Say that the search takes longer than it could."""
    if model not in _WARNED:
        _WARNED.add(model)
        logger.warning("%s: the search asks the model itself, which takes longer", why)


class InPrecision(nn.Module):
    """A module asked in a memory format and a precision.

    Args:
        module: the module itself, not a copy.
        dtype: float32, or a lower precision under autocast, from which logits come back in float32.
        is_folded: whether batch norm is folded into its convolutions; for the description alone.
        channels_last: whether images are given to it in that format.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, is_folded: bool = True, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.module, self.dtype, self.is_folded, self.channels_last = module, dtype, is_folded, channels_last

    def __str__(self) -> str:
        parts = ["folded" if self.is_folded else "model"]
        return ", ".join([*parts, *["channels_last"] * self.channels_last, str(self.dtype).removeprefix("torch.")])

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (N, ...)."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.dtype == torch.float32:
            output: Tensor = self.module(x)
            return output
        scale = _LOSS_SCALE if self.dtype == torch.float16 else 1.0
        with torch.autocast(x.device.type, self.dtype):
            output = self.module(_scale_gradient(x, 1 / scale))
        return _scale_gradient(output.float(), scale)


def seconds_of_a_pass(victim: Victim, x: Tensor, batch_size: int, processors: int) -> float:
    """Roughly, forward and backward, for so many images such as `x` (N, ...), on a GPU's processors in float32.

    From the operations of the model, so the same at each call; 0 where they cannot be counted.
    """
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            victim.logits(x[:1])
    except Exception as error:  # a model may fail to be looked into in any way it likes
        logger.debug("not counted: %s", error)
        return 0.0
    return 3 * counter.get_total_flops() * batch_size / (processors * _PER_PROCESSOR)


def works_in(victim: Victim, x: Tensor, dtype: torch.dtype, *, channels_last: bool) -> bool:
    """Whether a model gives the same logits of images (N, ...), up to rounding, in a precision and a memory format.

    On a CPU convolutions are nearly twice as fast in channels_last, but `Tensor.view` fails on what they return.
    """
    with undisturbed(victim.module), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        candidate = InPrecision(victim.module, dtype, is_folded=False, channels_last=channels_last)
        off = _disagreement(victim, candidate, x, victim.logits(x))
        return off is not None and off <= _ROUNDING[dtype]


def _candidates(
    victim: Victim, precision: str, device: torch.device, *, is_random: bool
) -> Iterator[Iterator[InPrecision]]:
    """For each precision that is to be searched in, the cheapest first."""
    low = _low_precision(precision, device)
    dtypes = [] if low is None else [low]
    if device.type == "cpu" and (low is None or precision == "auto"):
        dtypes.append(torch.float32)
    folded = None if is_random else folded_copy(victim.module)

    def of(dtype: torch.dtype) -> Iterator[InPrecision]:
        if folded is not None:
            own = folded if dtype == dtypes[-1] else copy.deepcopy(folded)
            if dtype != torch.float32:
                _cast_weights(own, dtype)
            yield InPrecision(own.to(memory_format=torch.channels_last), dtype, channels_last=True)
            yield InPrecision(own.to(memory_format=torch.contiguous_format), dtype)
        if dtype != torch.float32:
            yield InPrecision(victim.module, dtype, is_folded=False)

    return map(of, dtypes)


def _cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """To what autocast would cast them to in each pass anew."""
    for part in module.modules():
        if type(part) in _CAST_BY_AUTOCAST:
            part.to(dtype)


def _low_precision(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        if bfloat16_is_native(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else None
    return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


class _Tracer(fx.Tracer):
    """Follows what a module asks of its parts; how a part without parts answers is its own business."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or next(m.children(), None) is None


def folded_copy(module: nn.Module) -> nn.Module | None:
    """A traced copy with every batch norm that follows a convolution folded into it; None where it cannot be traced.

    It need not be the same function, as tracing takes one way through what a forward pass decides: compare before use.

    Args:
        module: in evaluation mode.
    """
    try:
        return _folded(copy.deepcopy(module), fuse_conv_bn_eval)
    except Exception as error:  # a model may fail to be copied or traced in any way it likes
        logger.debug("not copied or traced: %s", error)
        return None


def folded_view(module: nn.Module, x: Tensor) -> nn.Module:
    """What computes a module's logits in evaluation mode with its batch norms folded into its convolutions.

    It has the module's own parts and parameters, and folds them at each pass: it follows when they are trained.

    Args:
        module: in any mode.
        x: images (N, ...), on which the view must agree with the module up to the rounding of float32.

    Returns:
        The module itself where it has hooks, is sharded over processes, cannot be traced, or does not agree with its
        view.
    """
    if has_hooks(module) or is_sharded(module):
        return module
    with undisturbed(module), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        try:
            view = _folded(module, _FoldedConvolution)
            expected = module(x)
            agrees = torch.allclose(view(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        except Exception as error:  # a model may fail to be traced in any way it likes
            logger.debug("not traced: %s", error)
            return module
    return view if agrees else module


class _FoldedConvolution(nn.Module):
    """A convolution and the batch norm that follows it, as one convolution."""

    def __init__(self, conv: _ConvNd, norm: Any) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        """What the norm answers in evaluation mode."""
        conv, norm = self.conv, self.norm
        statistics = norm.running_mean, norm.running_var, norm.eps
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)
        output: Tensor = conv._conv_forward(x, weight, bias)
        return output


def _folded(module: nn.Module, fuse: Callable[[Any, Any], nn.Module]) -> fx.GraphModule:
    """The module, traced, with `fuse(convolution, batch norm)` in the place of each such pair."""
    tracer = _Tracer()
    graph = tracer.trace(module)
    traced = fx.GraphModule(tracer.root, graph)
    modules = dict(traced.named_modules())
    uses = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and node.op == before.op == "call_module" and len(before.users) == 1):
            continue
        norm, conv = modules[node.target], modules[before.target]
        pair = type(conv) is _BATCH_NORMS.get(type(norm)) and uses[node.target] == uses[before.target] == 1
        if pair and norm.running_mean is not None:
            parent, _, name = str(before.target).rpartition(".")
            setattr(traced.get_submodule(parent), name, fuse(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def has_hooks(module: nn.Module) -> bool:
    """Whether the module or a part of it has hooks, which would see what a copy is asked, or would not."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(part, kind, None) for part in module.modules() for kind in kinds)


def _disagreement(victim: Victim, cheap: InPrecision, x: Tensor, expected: Tensor | None) -> float | None:
    """By how much the cheap model's logits differ from the victim's, relative to the largest; 0 for a random victim.

    None where it has none of that shape, or no gradient.
    """
    try:
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(True)
            logits = victim.logits(inputs, cheap)
            torch.autograd.grad(logits.sum(), inputs)
    except Exception as error:  # an operation may lack this dtype or memory format, each says so in its own way
        logger.debug("not usable: %s", error)
        return None
    if expected is None:
        return 0.0
    if logits.shape != expected.shape:
        return None
    off, largest = (logits.detach() - expected).abs().max(), expected.abs().max()
    return 0.0 if off == 0 else float(off / largest)


class _GradientScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied on its way back."""
    if factor == 1:
        return x
    scaled: Tensor = _GradientScale.apply(x, factor)
    return scaled
