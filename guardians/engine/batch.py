"""How many images go through a model at once, unless the user says, and the memory that a CPU takes for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from guardians.engine.victim import Victim, is_sharded

__all__ = ["default_batch_size"]

_ON_A_CPU = 2**27
"""Bytes that a pass may keep for its backward pass there: more images at once are no faster."""
_FEW = 8
"""Images, of which fewer at once are slower on a CPU, even where they need more memory than that."""
_MOST_ON_A_CPU = 2**31
"""Bytes that these may keep."""
_SHARE_OF_A_GPU = 0.25
_MOST = {"cpu": 128, "cuda": 1024}
_LARGEST_RECYCLED = 2**25 - 2**16
"""Bytes of the largest block that glibc keeps for reuse, a little less than 32 MiB."""

# glibc gives large blocks back to the system as soon as they are free, and the next pass waits until the pages of its
# activations are there again, which is up to a third of its time. How large is large it learns from the largest block
# that was ever freed, so it is shown one, of which no page is touched.
torch.empty(_LARGEST_RECYCLED, dtype=torch.uint8, device="cpu")


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
    an_image, most = max(1, an_image), _MOST.get(x.device.type, 128)
    if x.device.type == "cuda":
        fits = int(_SHARE_OF_A_GPU * torch.cuda.get_device_properties(x.device).total_memory) // an_image
    else:
        fits = max(_ON_A_CPU // an_image, min(_FEW, _MOST_ON_A_CPU // an_image))
    fits = max(1, min(most, fits))
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
