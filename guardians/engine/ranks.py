"""Processes that share the work on one data set: who does which unit of it, and how all come to know the result.

They are launched by `torchrun` and meet in its key-value store alone, without collective operations, so that no process
waits for one that has died. All run the same code in the same order; what they share passes `deal` and `agreed`.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed, nn

from guardians.engine.victim import is_sharded

__all__ = ["Ranks", "agreed", "alone", "check_shareable", "deal", "is_launched", "local_device", "ranks", "sharing"]

T = TypeVar("T")

_PART = 4 * 2**20
"""Bytes of one value of the store, which takes no more than 8 MB."""


class Ranks:
    """The processes that work together.

    Args:
        rank: number of this process, from 0; 0 is the one that reads and writes files.
        size: how many there are.
        store: key-value store of `torch.distributed` that all of them reach; None for a process alone.
        timeout: seconds after which a process that is waited for is given up.
        patience: seconds that a unit may be under way elsewhere before a process that has nothing else to do takes it
            too; at least three times as long as the longest of its own.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, timeout: float = 1800.0, patience: float = 60.0
    ) -> None:
        self.rank, self.size, self.timeout, self.patience = rank, size, timeout, patience
        self._store, self._calls, self._longest = store, 0, 0.0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reads, writes and prints."""
        return self.rank == 0

    def agreed(self, work: Callable[[], T]) -> T:
        """What the first process makes of it, on all of them.

        Raises:
            RuntimeError: it has not answered in time.
        """
        if self.size == 1:
            return work()
        name = self._next()
        if self.is_first:
            result = work()
            self._put(name, pickle.dumps(result))
            return result
        self._expect(name, self.timeout)
        found: T = pickle.loads(self._get(name))
        return found

    def deal(self, units: Sequence[T], work: Callable[[T], Iterable[tuple[Any, Any]]]) -> Iterator[tuple[Any, Any]]:
        """What `work` yields for each unit, done by whichever process is free; the same on all, in any order.

        A unit that does not come back, as its process hangs, is done again by one that has nothing else to do.

        Args:
            units: the same on all processes.
            work: yields pairs of what all processes need to know and of what the first alone keeps, the same wherever
                it runs. The other processes get None in the place of the second.
        """
        if self.size == 1:
            for unit in units:
                yield from work(unit)
            return
        name = self._next()
        out = set(range(len(units)))
        while (number := self._store.add(f"{name}/next", 1) - 1) < len(units):
            started = time.monotonic()
            self._publish(f"{name}/{number}", work(units[number]))
            self._longest = max(self._longest, time.monotonic() - started)
            yield from self._arrived(name, out)
        while out:
            number = min(out)
            if not self._comes(f"{name}/{number}", max(self.patience, 3 * self._longest)):
                self._publish(f"{name}/{number}", work(units[number]))
            yield from self._arrived(name, out)

    def leave(self) -> None:
        """Let the first process wait for the others, for torchrun takes what ends for the end of all.

        Raises:
            RuntimeError: some do not end.
        """
        if self.size == 1:
            return
        self._store.set(f"left/{self.rank}", "")
        if self.is_first:
            for rank in range(1, self.size):
                self._expect(f"left/{rank}", self.patience, rank)

    def _next(self) -> str:
        self._calls += 1
        return str(self._calls)

    def _publish(self, name: str, found: Iterable[tuple[Any, Any]]) -> None:
        pairs = list(found)
        self._put(f"{name}/first", pickle.dumps([kept for _, kept in pairs]))
        self._put(name, pickle.dumps([known for known, _ in pairs]))

    def _arrived(self, name: str, out: set[int]) -> Iterator[tuple[Any, Any]]:
        for number in sorted(out):
            key = f"{name}/{number}"
            if self._store.check([key]):
                out.remove(number)
                known = pickle.loads(self._get(key))
                kept = [None] * len(known)
                if self.is_first:
                    kept = pickle.loads(self._get(f"{key}/first"))
                    self._drop(f"{key}/first")
                yield from zip(known, kept, strict=True)

    def _put(self, name: str, value: bytes) -> None:
        """A value of any length; it is there when its name is."""
        starts = range(0, len(value), _PART)
        for number, start in enumerate(starts):
            self._store.set(f"{name}/part/{number}", value[start : start + _PART])
        self._store.set(name, str(len(starts)))

    def _get(self, name: str) -> bytes:
        return b"".join(self._store.get(f"{name}/part/{number}") for number in range(int(self._store.get(name))))

    def _drop(self, name: str) -> None:
        for number in range(int(self._store.get(name))):
            self._store.delete_key(f"{name}/part/{number}")

    def _comes(self, name: str, seconds: float) -> bool:
        """Whether a name is there within so many seconds; asked for again and again, as `store.wait` ignores Ctrl-C."""
        end, pause = time.monotonic() + seconds, 0.005
        while not self._store.check([name]):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)
        return True

    def _expect(self, name: str, seconds: float, rank: int = 0) -> None:
        if not self._comes(name, seconds):
            raise RuntimeError(f"process {rank} of {self.size} has not answered for {seconds:g} s")


_ranks = Ranks()


def ranks() -> Ranks:
    """Those that this process works with: itself alone, but within `sharing`."""
    return _ranks


def deal(units: Sequence[T], work: Callable[[T], Iterable[tuple[Any, Any]]]) -> Iterator[tuple[Any, Any]]:
    """See `Ranks.deal`."""
    yield from _ranks.deal(units, work)


def agreed(work: Callable[[], T]) -> T:
    """See `Ranks.agreed`."""
    return _ranks.agreed(work)


def check_shareable(model: nn.Module) -> None:
    """Raise a ValueError where processes that share work would each ask a model apart that is sharded over them."""
    if _ranks.size > 1 and is_sharded(model):
        raise ValueError(
            "the model is sharded over processes, which have to ask it together, while `torchrun -m guardians` deals "
            "images to each apart; let all processes of a script call guardians.evaluate on the same images"
        )


def is_launched() -> bool:
    """Whether `torchrun` has launched this process."""
    return bool(distributed.is_available() and distributed.is_torchelastic_launched())


@contextmanager
def sharing(timeout: float = 1800.0, patience: float = 60.0) -> Iterator[Ranks]:
    """Within it evaluations, benchmarks and studies are shared with the other processes that torchrun launched.

    Args:
        timeout, patience: see `Ranks`.

    Raises:
        RuntimeError: a process has not answered in time.
    """
    global _ranks
    if not is_launched():
        yield _ranks
        return
    store, rank, size = next(iter(distributed.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    # After a restart torchrun's store still has what the processes before it said.
    started = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = distributed.PrefixStore(f"guardians/{started}", store)
    before, _ranks = _ranks, Ranks(rank, size, own, timeout, patience)
    try:
        yield _ranks
        _ranks.leave()
    finally:
        _ranks = before


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process works by itself, on something that has been dealt to it as a whole."""
    global _ranks
    before, _ranks = _ranks, Ranks()
    try:
        yield
    finally:
        _ranks = before


def local_device(device: str) -> str:
    """The device of this process where a kind of device is named: of several GPUs each process has its own."""
    return f"{device}:{os.environ['LOCAL_RANK']}" if is_launched() and device != "cpu" and ":" not in device else device
