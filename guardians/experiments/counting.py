"""What an attack costs: samples through the model, and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CountingModel", "PeakMemory", "peak_memory", "resident_peak"]


class CountingModel(nn.Module):
    """A model that counts the samples that go through it, whoever calls it.

    Attributes:
        model: the wrapped model, called as it is. Modes and parameters are shared with it.
        forward_samples: samples that went forward.
        backward_samples: samples whose gradient came back to the model's output.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self.forward_samples = 0
        self.backward_samples = 0

    def forward(self, x: Tensor) -> Any:
        """The output of the model."""
        self.forward_samples += len(x)
        output = self.model(x)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._count_backward)
        return output

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_samples += len(gradient)


@dataclass
class PeakMemory:
    """Peak memory of a block, known after it: `mb` in MB (10^6 bytes), NaN where the system does not tell."""

    mb: float = float("nan")


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """Measure the peak memory of a block, what was there before it included.

    For CUDA the memory that torch allocated on `device`; otherwise the resident memory of the process: on Linux its
    peak within the block, elsewhere, or where the kernel does not reset the peak, its peak since the process started.
    """
    device = torch.device(device)
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.mb = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        reset = _reset_resident_peak()
        yield peak
        peak.mb = (_resident_peak() if reset else None) or resident_peak()


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> float | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def resident_peak(*, of_children: bool = False) -> float:
    """The peak of the resident memory of this process since it started, or of the largest of its children that ended.

    In MB (10^6 bytes); NaN where the system does not tell.
    """
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    whose = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    return resource.getrusage(whose).ru_maxrss * unit / 1e6
