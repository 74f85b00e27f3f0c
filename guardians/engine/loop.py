"""The loop that runs any attack: batches that stay full of samples that still stand, cheap search, strict judgement.

Each sample under search has a row in the state of a `_Pool`. A sample that is finished leaves at once and the next one
takes its row, so that the model always sees full batches.

The search may ask cheaper copies of the user's model, see `guardians.engine.search`. Whether a sample is fooled is
decided by the user's model on the image that is returned. A sample that a cheap search takes for fooled and the
user's model does not goes on; when its search ends in vain, the next better model searches it again from the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guardians.engine.report import Finished, Report
from guardians.engine.run import PROBE, Run, evaluate, margin, round_size
from guardians.engine.search import Search
from guardians.engine.state import Answer, Columns, Query, State, join, on_host, per_image, select

if TYPE_CHECKING:
    from guardians.engine.attack import Attack

__all__ = ["stream"]

_GIVEN = ("x", "y", "probabilities", "mask", "x_adv_init", "index", "forward", "backward")
"""What a search starts from, and what it has cost so far."""
_KEPT = ("doubted", "best", "best_distance")
"""What a restart does not forget."""


def stream(
    attack: Attack,
    batches: Iterable[dict[str, Tensor]],
    *,
    seed: int,
    device: torch.device | None,
    report: Report,
    first_index: int | np.ndarray = 0,
) -> Iterator[Finished]:
    """Adversarial images, as they are finished; memory does not grow with their number.

    The caller keeps the victim `undisturbed` and autograd off while this runs.

    Args:
        attack: the attack, with its victim and options.
        batches: dicts of "x" and, where there are any, "y", "probabilities", "mask" and "x_adv_init", each (N, ...),
            read when rows are free. All is checked by then. Without "y" the victim's predictions are the labels.
        seed: of all random numbers; those of a sample also depend on its position in the data, not on the batch.
        first_index: the position of the first sample, or the positions of all.
        device: where batches go; None leaves them where they are.
        report: which is kept up to date.
    """
    new = _Queue(batches, device)
    if not new:
        return
    run = Run(attack, new.peek(PROBE), seed, report, first_index, new.dtype)
    queues = [new, *(_Queue((), device) for _ in run.searches[1:])]
    pools = [
        _Pool(run, search, queue, failed)
        for search, queue, failed in zip(run.searches, queues, [*queues[1:], None], strict=True)
    ]
    while True:
        # What a cheap search has failed waits for a full batch, or until there is nothing else to do.
        waiting = [pool for pool in reversed(pools[1:]) if len(pool.queue) >= run.capacity]
        pool = next((pool for pool in [*waiting, *pools] if pool.fill()), None)
        if pool is None:
            return
        for finished in pool.step():
            yield replace(finished, x_adv=finished.x_adv.to(new.dtype))


@dataclass
class _Claim:
    """Samples that the search takes for fooled.

    Attributes:
        images: that would be returned (N, ...).
        state: from which the search goes on where the user's model is not fooled.
        done: bool (N,), where it does not.
    """

    images: Tensor
    state: State
    done: np.ndarray


class _Pool:
    """Samples under search by one model, a row of the state each.

    Args:
        run: what the pools share.
        search: the model that is asked.
        queue: where the next samples come from.
        failed: where samples go on whose search ended in vain, though another model might have fooled them; None for
            the user's own model.
    """

    def __init__(self, run: Run, search: Search, queue: _Queue, failed: _Queue | None) -> None:
        self.run, self.search, self.queue, self.failed = run, search, queue, failed
        self.state: State | None = None
        self.vacant = np.empty(0, dtype=np.int64)
        self.returning: list[State] = []
        self.claims: list[_Claim] = []

    @property
    def _claimed(self) -> int:
        return sum(len(claim.done) for claim in self.claims)

    def fill(self) -> bool:
        """Give vacant rows to samples that wait, or drop the rows; whether there is anything to search or to judge.

        When none waits any more, the batch shrinks from one round size to the next, and the rows that stay vacant
        meanwhile are asked about in vain. The classical algorithm has fixed batches: the next one starts when all of
        the last is done.
        """
        rows = 0 if self.state is None else len(self.state)
        if len(self.vacant) == rows:
            self.state, self.vacant, rows = None, self.vacant[:0], 0
        for state in self.returning:
            self._place(state)
        self.returning = []
        if self.run.refills or self.state is None:
            rows = 0 if self.state is None else len(self.state)
            batch = self.queue.take(self.run.capacity - self._claimed - rows + len(self.vacant))
            if batch is not None:
                self._place(self.run.start(batch))
        if self.state is None:
            return bool(self.claims)
        rows = len(self.state)
        standing = rows - len(self.vacant)
        size = round_size(standing) if self.run.refills else standing
        if len(self.vacant) and size < rows:
            taken = np.delete(np.arange(rows), self.vacant)
            self.state = self.state.rows(np.append(taken, self.vacant[: size - standing]))
            self.vacant = np.arange(standing, size)
        return True

    def step(self) -> Iterator[Finished]:
        """Ask the model once about every sample, and let the attack take its step; judge what was claimed."""
        if self.state is not None:
            yield from self._search(self.state)
        if self._claimed >= max(1, self.run.capacity // 8) or (self.claims and self.state is None):
            yield from self._settle()

    def _search(self, state: State) -> Iterator[Finished]:
        run, attack, known = self.run, self.run.attack, state.known
        query = attack.query(state)
        query = query if isinstance(query, Query) else Query(query)
        answer, votes = self._ask(query, state)
        points, fooled = _candidates(query.points, answer, state)
        over = np.zeros(len(state), dtype=bool)
        over[self.vacant] = True
        stuck, claimed = np.zeros_like(over), np.zeros_like(over)
        if attack.keeps == "nearest":
            self._keep_nearer(state, answer, points, fooled)
        if attack.keep == "first" or self.failed is not None:
            doubtful = self._doubtful(state, query, answer, votes)
            fools, stuck, doubtful = on_host(torch.stack([fooled, known["stuck"], doubtful]))
            if attack.keep != "nearest":  # which passes the boundary all the time; what counts is what it returns
                claimed = fools & ~over
            known["doubted"] |= claimed | stuck | doubtful
            claimed &= attack.keep == "first"
        claims = None
        if claimed.any():
            claims = run.returned(
                attack.returned(select(points, claimed), state.rows(claimed)), select(state.x, claimed)
            )
            if self.failed is None and not run.is_random and torch.equal(claims, select(points, claimed)):
                yield _finished(known, claimed, claims, claimed[claimed])  # the judge has just been asked
                over, claims = over | claimed, None

        progress = attack.update(state, answer)
        done = (on_host(progress.done) | stuck) & ~over
        if progress.stuck is not None and attack.keep != "last" and not run.is_random:
            known["stuck"] = torch.as_tensor(progress.stuck, device=state.x.device)
        if claims is not None:
            self.claims.append(_Claim(claims, state.rows(claimed), done[claimed]))
            over |= claimed
        ended = done & ~over
        over |= ended
        self.vacant = over.nonzero()[0]
        if ended.any():
            yield from self._end(state.rows(ended))

    def _ask(self, query: Query, state: State) -> tuple[Answer, Tensor]:
        """The model's answer, and each draw's logits (draws, N, classes), or (draws, N, K, classes)."""
        run, attack, report = self.run, self.run.attack, self.run.report
        keys, points, wanted = run.search_keys(state), query.points, query.gradient
        passes = attack.eot_samples * points.numel() // state.x.numel()
        if isinstance(wanted, np.ndarray) and wanted.any() and not wanted.all():
            back = torch.from_numpy(np.argsort(np.argsort(~wanted, kind="stable"))).to(points.device)
            parts = [
                self._evaluate(select(points, mask), state.rows(mask), keys[mask], asked)
                for mask, asked in ((wanted, True), (~wanted, False))
            ]
            draws = torch.cat([part[0] for part in parts], 1).index_select(1, back)
            value, gradient = (torch.cat([part[which] for part in parts]).index_select(0, back) for which in (1, 2))
        else:
            draws, value, gradient = self._evaluate(points, state, keys, bool(np.all(wanted)))
        backward = passes * np.broadcast_to(wanted, len(state))
        state.known["forward"] += passes
        state.known["backward"] += backward
        report.search_forward += passes * len(state)
        report.search_backward += int(backward.sum())
        logits = draws.mean(0)
        if attack.keep == "nearest":
            if run.is_random:
                logits = self._without_luck(points, logits, state)
            fooled = _each(attack.reached, logits, state.y)
        else:
            fooled = run.majority(torch.stack([_each(attack.reached, draw, state.y) for draw in draws]))
        distance = attack.distance(points, state.x) if attack.keeps == "nearest" else None
        return Answer(logits, value, fooled, gradient if np.any(wanted) else None, distance), draws

    def _evaluate(self, points: Tensor, state: State, keys: np.ndarray, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `evaluate`; the gradient is zero where it is not wanted."""
        run = self.run
        options: dict[str, Any] = {"gradient": wanted, "keys": keys, "batch_size": run.batch_size}
        with run.drawing(keys):
            draws, value, gradient = evaluate(run.attack, self.search.logits, points, state, **options)
        return draws, value, points.new_zeros(points.shape) if gradient is None else gradient

    def _doubtful(self, state: State, query: Query, answer: Answer, draws: Tensor) -> Tensor:
        """Where another model might get further: bool (N,)."""
        doubtful = ~draws.isfinite().flatten(2).all(-1).all(0)
        if self.failed is None:
            return doubtful
        if answer.gradient is not None:
            steepest = answer.gradient.flatten(1).abs().amax(1)
            wanted = torch.as_tensor(query.gradient, device=steepest.device)
            doubtful |= wanted & ~((steepest > 0) & steepest.isfinite())
        if self.run.attack.keep == "first":
            doubtful |= self._nearly(answer.logits, state.y).view(len(state), -1).any(1)
        return doubtful

    def _nearly(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether logits (N, ..., classes) fool the model but for the rounding of the copy that searches."""
        short = -_each(partial(margin, targeted=self.run.attack.targeted), logits, y)
        return (short >= 0) & (short <= self.search.rounding * logits.abs().amax(-1))

    def _keep_nearer(self, state: State, answer: Answer, points: Tensor, fooled: Tensor) -> None:
        assert answer.distance is not None
        known, distance = state.known, answer.distance
        if distance.ndim > 1:
            distance = distance.masked_fill(~answer.fooled, torch.inf).amin(1)
        nearer = fooled & (distance < known["best_distance"])
        known["best"] = torch.where(per_image(nearer, state.x), points, known["best"])
        known["best_distance"] = torch.where(nearer, distance, known["best_distance"])

    def _without_luck(self, points: Tensor, logits: Tensor, state: State) -> Tensor:
        """Logits in which a random model is fooled only by points that fool it in all of fresh draws.

        An attack that keeps the nearest image of all would else keep that of its luckiest draw.
        """
        flat = logits.reshape(-1, logits.shape[-1])
        several = len(flat) // len(state)
        known = {name: state.known[name] for name in ("y", "index", "restart", "asked")}
        known = {name: select(value, np.repeat(np.arange(len(state)), several)) for name, value in known.items()}
        rows = on_host(self.run.reached(flat[None], known["y"])).nonzero()[0]
        if not len(rows):
            return logits
        asked = points.reshape(len(flat), *state.x.shape[1:])
        convinced, answers = self.run.judge_unanimously(
            select(asked, rows), {name: select(value, rows) for name, value in known.items()}
        )
        refused = torch.from_numpy(rows[~convinced]).to(logits.device)
        return flat.index_copy(0, refused, select(answers, ~convinced)).view_as(logits)

    def _settle(self) -> Iterator[Finished]:
        """Let the user's model judge what was claimed; what it refuses goes on.

        Of a random model all draws have to be fooled: an image that fools most of them can still be made to fool more.
        """
        run, claims = self.run, self.claims
        self.claims = []
        state = reduce(State.joined, [claim.state for claim in claims])
        images, done = join([claim.images for claim in claims]), join([claim.done for claim in claims])
        judge = run.judge_unanimously if run.is_random else run.judge
        accepted = judge(images, state.known)[0]
        if accepted.any():
            leaving, images = state.rows(accepted), select(images, accepted)
            yield _finished(state.known, accepted, images, run.verdict(images, leaving.known, accepted[accepted]))
        if (~accepted & ~done).any():
            self.returning.append(state.rows(~accepted & ~done))
        if (~accepted & done).any():
            ended = state.rows(~accepted & done)
            ended.known["asked"] += 1  # for draws that have not refused it
            yield from self._end(ended)

    def _end(self, ended: State) -> Iterator[Finished]:
        """Let samples that are out of steps go, or start again, or go on to the next model."""
        run, attack, known = self.run, self.run.attack, ended.known
        nearest = attack.keeps == "nearest"
        images = run.returned(known["best"] if nearest else attack.result(ended), ended.x)
        if not run.judges:
            yield _finished(known, np.ones(len(ended), dtype=bool), images, None)
            return
        again = known["restart"] + 1 < attack.restarts
        if attack.keep == "nearest" and again.any():  # the next start may find a nearer one
            again &= ~on_host(attack.near_enough(ended))
            if again.any():
                self._restart(ended.rows(again))
            if again.all():
                return
            ended, images, again = ended.rows(~again), select(images, ~again), again[~again]
            known = ended.known
        judge = run.judge_unanimously if nearest and run.is_random else run.judge
        fooled, logits = judge(images, known)
        if nearest and run.is_random:
            images, fooled = run.further_out(images, ended, fooled)
        again &= ~fooled
        if nearest:
            known["doubted"] |= on_host((images != ended.x).flatten(1).any(1))
        elif self.failed is not None:
            known["doubted"] |= on_host(self._nearly(logits, ended.y))
        failed = ~fooled & ~again & known["doubted"] & (self.failed is not None)
        if again.any():
            self._restart(ended.rows(again))
        if failed.any():
            assert self.failed is not None
            samples = ended.rows(failed).known
            given = {name: samples[name] for name in _GIVEN if name in samples}
            self.failed.push({**given, "restart": np.zeros_like(samples["restart"])})
        leaves = ~(again | failed)
        if leaves.any():
            leaving, images, fooled = ended.rows(leaves), select(images, leaves), fooled[leaves]
            if attack.restarts > 1 or len(run.searches) > 1 or nearest:  # whose draws have chosen
                fooled = run.verdict(images, leaving.known, fooled)
            if nearest:
                stands = torch.from_numpy(~fooled).to(images.device, non_blocking=True)
                images = torch.where(per_image(stands, images), leaving.x, images)
            yield _finished(known, leaves, images, fooled)

    def _restart(self, ended: State) -> None:
        kept = {name: ended.known[name] for name in (*_GIVEN, *_KEPT) if name in ended.known}
        self.returning.append(self.run.start({**kept, "restart": ended.known["restart"] + 1}))

    def _place(self, state: State) -> None:
        """Into vacant rows as long as there are any, and after the last row what is left."""
        if self.state is None:
            self.state = state
            return
        numbers, n = np.arange(len(state)), len(self.vacant)
        if len(self.vacant):
            self.state.put(self.vacant[: len(state)], state.rows(numbers < n))
        if len(state) > n:
            self.state = self.state.joined(state.rows(numbers >= n))
        self.vacant = self.vacant[len(state) :]


def _finished(known: Columns, rows: np.ndarray, images: Tensor, fooled: np.ndarray | None) -> Finished:
    index, forward, backward = (known[name][rows] for name in ("index", "forward", "backward"))
    return Finished(index, images, fooled, forward, backward)


class _Queue:
    """Samples that wait, read from `batches` when they are asked for."""

    def __init__(self, batches: Iterable[dict[str, Tensor]], device: torch.device | None) -> None:
        self._batches, self._device = iter(batches), device
        self._pieces: deque[Columns] = deque()
        self._read = 0
        self.dtype = torch.float32

    def __len__(self) -> int:
        """Samples that are already read."""
        return sum(len(piece["index"]) for piece in self._pieces)

    def __bool__(self) -> bool:
        return bool(self._pieces) or self._read_on()

    def push(self, samples: Columns) -> None:
        """Let samples wait."""
        self._pieces.append(samples)

    def peek(self, n: int) -> Tensor:
        """The first `n` images, or as many as there are, which stay in the queue."""
        while len(self) < n and self._read_on():
            pass
        return torch.cat([self._staged({"x": piece["x"][:n]})["x"] for piece in self._pieces])[:n]

    def take(self, n: int) -> Columns | None:
        """Up to `n` samples, on the device; None where none waits."""
        taken: list[Columns] = []
        while n > 0 and self:
            piece = self._pieces.popleft()
            if len(piece["index"]) > n:
                self._pieces.appendleft({name: value[n:] for name, value in piece.items()})
                piece = {name: value[:n] for name, value in piece.items()}
            n -= len(piece["index"])
            taken.append(self._staged(piece))
        if len(taken) > 1:
            return {name: join([piece[name] for piece in taken]) for name in taken[0]}
        return taken[0] if taken else None

    def _read_on(self) -> bool:
        batch = next(self._batches, None)
        if batch is None:
            return False
        index = np.arange(self._read, self._read + len(batch["x"]))
        self._read += len(index)
        self.dtype = batch["x"].dtype
        self._pieces.append({**batch, "index": index, "restart": np.zeros_like(index)})
        return True

    def _staged(self, samples: Columns) -> Columns:
        """On the device, in memory of their own; through pinned memory where the device is another one."""
        return {name: self._moved(value) if isinstance(value, Tensor) else value for name, value in samples.items()}

    def _moved(self, value: Tensor) -> Tensor:
        if value.dtype in (torch.bfloat16, torch.float16):  # too coarse to search in
            value = value.float()
        device = self._device or value.device
        if value.device.type == "cpu" and device.type == "cuda":
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device, copy=True)


def _each(of: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor) -> Tensor:
    """What a function of logits (N, classes) and labels says of logits (N, classes) or (N, K, classes)."""
    if logits.ndim == 2:
        return of(logits, y)
    return torch.stack([of(part, y) for part in logits.unbind(1)], 1)


def _candidates(points: Tensor, answer: Answer, state: State) -> tuple[Tensor, Tensor]:
    """Of each row the point that fools the model, the first or the nearest of several, and whether it does: (N,)."""
    if answer.fooled.ndim == 1:
        return points, answer.fooled
    order = ~answer.fooled if answer.distance is None else answer.distance.masked_fill(~answer.fooled, torch.inf)
    chosen = order.to(state.x.dtype).argmin(1)
    return points[torch.arange(len(points), device=points.device), chosen], answer.fooled.any(1)
