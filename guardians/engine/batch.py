"""How many images go through a model at once, unless the user says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from guardians.engine.victim import Victim, is_sharded

__all__ = ["default_batch_size"]

_ON_A_CPU = 2**28
"""Bytes that a pass may keep for its backward pass there: more images at once are no faster."""
_SHARE_OF_A_GPU = 0.25
_MOST = {"cpu": 128, "cuda": 1024}


def default_batch_size(victim: Victim, x: Tensor) -> int:
    """A power of two, from the memory that the model keeps for the gradient of an image, and that of the device.

    The same for the same model, image size and kind of device, as no time is measured.

    Args:
        victim: `undisturbed`.
        x: images (N, ...), of which the first is tried.
    """
    if is_sharded(victim.module):  # what it keeps of its parameters is not the memory in which they are
        an_image = sum(_kept(victim, x[:1].repeat_interleave(2, 0)).values()) - sum(_kept(victim, x[:1]).values())
    else:
        of_parameters = {_storage(parameter).data_ptr() for parameter in victim.module.parameters()}
        an_image = sum(size for memory, size in _kept(victim, x[:1]).items() if memory not in of_parameters)
    memory = float(_ON_A_CPU)
    if x.device.type == "cuda":
        memory = _SHARE_OF_A_GPU * torch.cuda.get_device_properties(x.device).total_memory
    most = _MOST.get(x.device.type, 128)
    fits = max(1, min(most, int(memory / max(1, an_image))))
    return 1 << (fits.bit_length() - 1)


def _kept(victim: Victim, x: Tensor) -> dict[int, int]:
    """The memory that a forward pass of images keeps for the backward pass: bytes, by where they begin."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[_storage(tensor).data_ptr()] = _storage(tensor).nbytes()
        return tensor

    def same(tensor: Any) -> Any:
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, same):
        victim.logits(x.detach().requires_grad_(True))
    return kept


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    with torch.no_grad():  # of a DTensor the share of this process
        return getattr(tensor, "to_local", lambda: tensor)().untyped_storage()
