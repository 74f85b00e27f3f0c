"""The processes that train one model: the default group of `torch.distributed`, started from torchrun's environment."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from guardians.engine.ranks import is_launched

__all__ = ["ALONE", "TIMEOUT", "ProcessGroup", "process_group"]

TIMEOUT = 1800.0
"""Seconds after which a process that does not answer is given up; torch's default too."""
_GRACE = 5.0
"""Seconds in which a process that lives says so, when another has not answered."""

T = TypeVar("T")


class ProcessGroup:
    """What the processes of a training tell each other; a process alone tells itself.

    All of them call the same methods in the same order. Errors of another process are RuntimeErrors of torch's.

    Args:
        rank: number of this process, from 0; 0 is the one that reads and writes files.
        size: how many there are. With more than one they are the default group of `torch.distributed`.
        timeout: seconds after which a process that does not answer is given up.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = TIMEOUT) -> None:
        self.rank, self.size = rank, size
        self._hosts: Any = None
        if size > 1:  # on the host also where the default group is of GPUs, which then need not be waited for
            self._hosts = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @property
    def is_first(self) -> bool:
        """Whether this process reads, writes and prints."""
        return self.rank == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place, of a tensor on their devices."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self._hosts)
        return bool(flags)

    def from_first(self, work: Callable[[], T]) -> T:
        """What the first process makes of it, on all of them."""
        if self.size == 1:
            return work()
        found = [work() if self.is_first else None]
        distributed.broadcast_object_list(found, 0, group=self._hosts)
        return found[0]  # type: ignore[return-value]

    @contextmanager
    def naming_the_missing(self) -> Iterator[None]:
        """Where a process does not answer any more, the error says which.

        Raises:
            ConnectionError: one has died or hangs.
        """
        try:
            yield
        except RuntimeError as error:
            missing = self._missing() if self.size > 1 and _is_of_communication(error) else []
            if not missing:
                raise
            named = ", ".join(map(str, missing))
            raise ConnectionError(f"process {named} of {self.size} has died, or hangs: {error}") from error

    def _missing(self) -> list[int]:
        """The processes that do not say in time that they live, in torchrun's store, which needs none of them."""
        if not is_launched():
            return []
        store, _, _ = _rendezvous("lives", _GRACE)
        store.set(str(self.rank), "")
        missing, end = set(range(self.size)), time.monotonic() + _GRACE
        while missing and time.monotonic() < end:
            missing = {rank for rank in missing if not store.check([str(rank)])}
            time.sleep(0.05)
        return sorted(missing)


def _rendezvous(purpose: str, timeout: float) -> tuple[Any, int, int]:
    """A part of torchrun's store, the number of this process, and how many there are.

    After a restart, or another training, the store still has what was said before.
    """
    store, rank, size = next(iter(distributed.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"guardians/{purpose}/{restarts}/{_groups}", store), rank, size


_groups = 0
"""That this process has started."""


def _is_of_communication(error: RuntimeError) -> bool:
    """Whether gloo or NCCL raised it; older versions of torch have no type of their own for all of theirs."""
    return isinstance(error, distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))


ALONE = ProcessGroup()


@contextmanager
def process_group(device: torch.device, timeout: float = TIMEOUT) -> Iterator[ProcessGroup]:
    """The processes that torchrun launched, or those of a default group that the caller has started.

    Args:
        device: of this process; the group is of NCCL where it is a GPU and of gloo where not.
        timeout: seconds after which a process that does not answer is given up.
    """
    global _groups
    is_ours = is_launched() and not distributed.is_initialized()
    if is_ours:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend, patience = ("nccl", 2 * timeout) if device.type == "cuda" else ("gloo", timeout)  # NCCL would abort
        _groups += 1
        store, rank, size = _rendezvous("group", timeout)
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=patience)
        )
    if distributed.is_available() and distributed.is_initialized():
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size(), timeout)
    else:
        yield ALONE
    if is_ours:  # after an error there may be nobody who would take part
        distributed.destroy_process_group()
