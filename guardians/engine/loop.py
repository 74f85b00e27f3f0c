"""The loop that runs any attack: batches that stay full of samples that still stand, cheap search, strict judgement.

Each sample under search has a row in the state of a `_Pool`. A sample that is finished leaves at once and the next one
takes its row, so that the model always sees full batches; a restart keeps the row.

The search may ask a cheaper copy of the user's model, see `guardians.engine.search`. Whether a sample is fooled is
decided by the user's model on the image that is returned. A sample that the cheap search takes for fooled and the
user's model does not goes on; when its search ends in vain, the user's own model searches it again from the start.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guardians.engine.rng import SampleRng, hashed, row_keys
from guardians.engine.search import Search, choose_search, is_random, judge_logits

if TYPE_CHECKING:
    from guardians.engine.attack import Attack, State

__all__ = ["PROBE", "Finished", "Report", "Run", "stream", "value_and_gradient"]

PROBE = 8
"""Images on which it is seen whether the model is random, and whether a cheaper copy agrees with it."""
_DRAWS = 9
"""Of a random model for one judgement, unless the attack says how many."""
_PROBE_DRAW, _LABEL_DRAW, _SEARCH_DRAW, _JUDGEMENT_DRAW = range(4)
"""What a random model draws for; each has draws of its own."""

_LENGTHS = (1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0)
"""Of a smallest perturbation, that are tried where fresh draws of a random model refuse it."""


@dataclass(frozen=True)
class Finished:
    """Samples whose search is over.

    Attributes:
        index: int64 array (M,), their positions in the data.
        x_adv: adversarial images (M, ...), on the device of the search.
        fooled: bool array (M,), whether the user's model is wrong on `x_adv`, or for a targeted attack gives the
            target; None where nothing was judged (`early_stop=False`, a single start, the user's own model).
    """

    index: np.ndarray
    x_adv: Tensor
    fooled: np.ndarray | None


@dataclass
class Report:
    """What a run has done so far.

    Attributes:
        fooled: bool array (N,), whether the user's model was fooled by the image returned, or gave the target of a
            targeted attack; None where nothing was judged, and for a `stream`, whose results tell.
        search: the model that the search asked: "model" for the user's own, or a cheaper copy such as "folded,
            channels_last, bfloat16".
        search_forward: samples that went forward in the search, through the user's model or its copy.
        search_backward: samples that went backward.
        judgement_forward: samples that went forward through the user's model for another end: judgement, predictions
            that stand in for labels, and the check of a copy.
    """

    fooled: np.ndarray | None = None
    search: str = "model"
    search_forward: int = 0
    search_backward: int = 0
    judgement_forward: int = 0


def stream(
    attack: Attack, batches: Iterable[dict[str, Tensor]], *, seed: int, device: torch.device | None, report: Report
) -> Iterator[Finished]:
    """Adversarial images, as they are finished; memory does not grow with their number.

    The caller keeps the victim `undisturbed` and autograd off while this runs.

    Args:
        attack: the attack, with its victim and options.
        batches: dicts of "x" and, where there are any, "y", "mask" and "x_adv_init", each (N, ...), read when rows are
            free. All is checked by then. Without "y" the victim's predictions are the labels.
        seed: of all random numbers; those of a sample also depend on its position in the data, not on the batch.
        device: where batches go; None leaves them where they are.
        report: which is kept up to date.
    """
    new, failed = _Queue(batches, device), _Queue((), device)
    if not new:
        return
    run = Run(attack, new.peek(PROBE), seed, report)
    pools = [_Pool(run, attack.victim.logits, new)]
    if run.search.is_cheap:
        pools = [_Pool(run, run.search.logits, new, failed), _Pool(run, attack.victim.logits, failed)]
    while True:
        # What the cheap search has failed waits for a full batch, or until there is nothing else to do.
        order = pools[::-1] if len(failed) >= run.capacity else pools
        pool = next((pool for pool in order if pool.fill()), None)
        if pool is None:
            return
        yield from pool.step()


def value_and_gradient(
    attack: Attack,
    logits_of: Callable[[Tensor], Tensor],
    query: Tensor,
    y: Tensor,
    state: State,
    keys: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits at `query`, one for each draw of EOT (draws, N, classes), and the gradient of the objective.

    The gradient is the mean over the draws (Athalye et al., "Synthesizing robust adversarial examples", 2018,
    section 2), which share batches of at most `attack.batch_size`. `keys` (N,) are the seeds of the draws of a random
    model (`row_keys`), of which each draw makes one of its own.

    Raises:
        ValueError: the logits do not depend differentiably on the images.
    """
    draws: list[Tensor] = []
    total = None
    at_once = max(1, int(attack.batch_size) // len(query))
    for first in range(0, attack.eot_samples, at_once):
        count = min(at_once, attack.eot_samples - first)
        draw = np.arange(first, first + count)[:, None]
        drawing = nullcontext() if keys is None else row_keys(hashed(keys, draw).reshape(-1))
        with torch.enable_grad(), drawing:
            inputs = query.detach().requires_grad_(True)
            logits = logits_of(inputs if count == 1 else inputs.repeat(count, *(1,) * (inputs.ndim - 1)))
            gradient = None
            if logits.requires_grad:
                objective = torch.stack([attack.objective(draw, y, state).sum() for draw in logits.chunk(count)]).sum()
                (gradient,) = torch.autograd.grad(objective, inputs, allow_unused=True)
        if gradient is None:
            raise ValueError("the model's logits have no gradient with respect to its input")
        draws += logits.detach().chunk(count)
        total = gradient if total is None else total.add_(gradient)
    assert total is not None
    return torch.stack(draws), total if attack.eot_samples == 1 else total.div_(attack.eot_samples)


class Run:
    """What the pools of one run share: how it searches and judges.

    Attributes:
        search: the model that the search asks.
        judge_logits: the user's model, in the memory format in which it judges.
    """

    def __init__(self, attack: Attack, probe: Tensor, seed: int, report: Report) -> None:
        self.attack, self.victim, self.seed, self.report = attack, attack.victim, seed, report
        self.capacity = max(1, int(attack.batch_size) // attack.eot_samples)
        self.search = Search(self.victim.logits)
        self.judge_logits: Callable[[Tensor], Tensor] = self.victim.logits
        self.is_random = False
        self.refills = attack.early_stop or attack.minimises_norm
        if self.refills or attack.precision not in ("auto", "float32"):
            self._probe(probe)
        self.judges = self.refills or attack.restarts > 1 or (attack.uses_success and self.search.is_cheap)
        self.judge_samples = attack.judge_samples or (_DRAWS if self.is_random else 1)
        self.sees_fixed_points = attack.early_stop and attack.is_memoryless and not self.is_random

    def keys(self, purpose: int, *numbers: np.ndarray | int) -> np.ndarray:
        """Seeds of a random model's draws: of the sample, of what it is asked for, and of how often it was before."""
        return hashed(self.seed, purpose, *numbers)

    def _probe(self, x: Tensor) -> None:
        """Ask the model about some images: whether it is random, what may search for it, and how it judges fastest."""
        with row_keys(self.keys(_PROBE_DRAW, np.arange(len(x)))):
            expected = self.victim.logits(x)
        with row_keys(self.keys(_PROBE_DRAW, np.arange(len(x)), 1)):
            self.is_random = is_random(expected, self.victim.logits(x))
        self.report.judgement_forward += 2 * len(x)
        known = None if self.is_random else expected
        if known is not None:
            self.judge_logits, tried = judge_logits(self.victim, x, known)
            self.report.judgement_forward += tried * len(x)
        precision = self.attack.precision
        if precision == "auto" and self.attack.minimises_norm:
            precision = "float32"  # the boundary is where bfloat16's logits are wrong
        self.search = choose_search(self.victim, precision, x, known)
        self.report.search = self.search.description
        self.report.search_forward += self.search.tried * len(x)
        self.report.search_backward += self.search.tried * len(x)

    def start(self, batch: State) -> State:
        """State of samples at the start of a search or of a restart, with what the engine knows of them."""
        x, attack = batch["x"], self.attack
        if "y" not in batch:
            with row_keys(self.keys(_LABEL_DRAW, batch["index"])):
                batch["y"] = self.victim.predict(x)
            self.report.judgement_forward += len(x)
        given = {"mask", "x_adv_init"} if not batch["restart"].any() else {"mask"}
        rng = SampleRng(self.seed, batch["index"], batch["restart"])
        state = attack.start(x, batch["y"], rng, **{name: batch[name] for name in given & batch.keys()})
        own = {
            "doubted": np.zeros(len(x), dtype=bool),
            "at_fixed_point": torch.zeros_like(batch["y"], dtype=torch.bool),
            "asked": np.zeros(len(x), dtype=np.int64),
        }
        return {**batch, **own, **state}

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether labels are left, or targets reached, by most of the draws (draws, N, classes): bool (N,)."""
        return _majority((logits.argmax(-1) == y) == self.attack.targeted)

    def judge(self, images: Tensor, samples: State) -> np.ndarray:
        """Whether the user's model is fooled by the images of `samples` in most of fresh draws."""
        draws = [self._answer(images, samples, draw) for draw in range(self.judge_samples)]
        return _on_host(self.reached(torch.stack(draws), samples["y"]))

    def judge_unanimously(self, images: Tensor, samples: State) -> tuple[np.ndarray, Tensor]:
        """Whether it is fooled in all of them, and the logits (N, classes) of the first draw that is not, or the last.

        After the first draw that an image does not fool, it is asked about no more.
        """
        rows, answers = np.arange(len(images)), torch.empty(0)
        for draw in range(self.judge_samples):
            among = _rows({name: samples[name] for name in ("y", "index", "restart", "asked")}, rows)
            logits = self._answer(_select(images, rows), among, draw)
            if draw == 0:
                answers = logits.clone()
            answers.index_copy_(0, torch.from_numpy(rows).to(images.device), logits)
            rows = rows[_on_host(self.reached(logits[None], among["y"]))]
            if not len(rows):
                break
        return np.isin(np.arange(len(images)), rows), answers

    def _answer(self, images: Tensor, samples: State, draw: int) -> Tensor:
        """Logits (N, classes) of the user's model in one draw."""
        keys = self.keys(_JUDGEMENT_DRAW, samples["index"], samples["restart"], samples["asked"], draw)
        asked = images
        if self.refills and not self.is_random:  # in batches of any size
            size = min(_round_size(len(images)), int(self.attack.batch_size))
            keys, asked = np.resize(keys, size), _select(images, np.resize(np.arange(len(images)), size))
        self.report.judgement_forward += len(asked)
        with row_keys(keys):
            return self.judge_logits(asked)[: len(images)]


class _Pool:
    """Samples under search by one model, a row of the state each.

    Args:
        run: what the pools share.
        logits_of: the model that the search asks.
        queue: where the next samples come from.
        failed: where samples go on whose search ended in vain, though the model that was asked took them for fooled;
            None for the user's own model, which is never wrong about itself.
    """

    def __init__(
        self, run: Run, logits_of: Callable[[Tensor], Tensor], queue: _Queue, failed: _Queue | None = None
    ) -> None:
        self.run, self.logits_of, self.queue = run, logits_of, queue
        self.failed = failed
        self.state: State = {}
        self.vacant = np.empty(0, dtype=np.int64)

    def fill(self) -> bool:
        """Give vacant rows to samples that wait, or drop the rows; whether there is anything to search.

        When none waits any more, the batch shrinks from one round size to the next, and the rows that stay vacant
        meanwhile are asked about in vain. The classical algorithm has fixed batches: the next one starts when all of
        the last is done.
        """
        rows = _length(self.state)
        if len(self.vacant) == rows:
            self.state, self.vacant, rows = {}, self.vacant[:0], 0
        if self.run.refills or not self.state:
            batch = self.queue.take(self.run.capacity - rows + len(self.vacant))
            if batch is not None:
                self._place(self.run.start(batch))
        standing = rows - len(self.vacant)
        size = _round_size(standing) if self.run.refills else standing
        if len(self.vacant) and size < rows:
            taken = np.delete(np.arange(rows), self.vacant)
            self.state = _rows(self.state, np.append(taken, self.vacant[: size - standing]))
            self.vacant = np.arange(standing, size)
        return bool(self.state)

    def step(self) -> Iterator[Finished]:
        """Ask the model once about every sample, and let the attack take its step."""
        run, attack, state = self.run, self.run.attack, self.state
        query, y = attack.query(state), state["y"]
        logits, gradient = self._ask(query, y)
        over = np.zeros(len(query), dtype=bool)
        over[self.vacant] = True
        at_fixed_point = np.zeros_like(over)
        if attack.early_stop or self.failed is not None:
            flags = [run.reached(logits, y), state["at_fixed_point"], ~logits.isfinite().all(-1).all(0)]
            if self.failed is not None and gradient is not None:
                steepest = gradient.flatten(1).abs().amax(1)
                flags[-1] |= ~((steepest > 0) & steepest.isfinite())
            reached, at_fixed_point, broken = _on_host(torch.stack(flags))
            reached &= ~over
            if attack.early_stop and reached.any():
                rows = reached.nonzero()[0]
                samples = _rows(state, rows)
                images = attack.result(samples)
                fooled = self._confirm(images, _select(query, rows), samples)
                over[rows[fooled]] = True
                if fooled.any():
                    yield Finished(state["index"][rows[fooled]], _select(images, fooled), fooled[fooled])
            # A minimum-norm attack passes the boundary all the time; what counts is the image that it returns.
            claimed = np.zeros_like(over) if attack.minimises_norm else reached & ~over
            state["doubted"] |= claimed | at_fixed_point | broken
        told = logits.mean(0)
        if attack.minimises_norm and run.is_random:
            told = self._without_luck(query, told)
        done = (_on_host(attack.update(state, told, gradient)) | at_fixed_point) & ~over
        if run.sees_fixed_points:
            state["at_fixed_point"] = (attack.query(state) == query).flatten(1).all(1)
        if done.any():
            yield from self._end(done.nonzero()[0], over)
        self.vacant = over.nonzero()[0]

    def _ask(self, query: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits (draws, N, classes), and the gradient where the attack wants it."""
        attack, report, state = self.run.attack, self.run.report, self.state
        keys = self.run.keys(_SEARCH_DRAW, state["index"], state["restart"], state["asked"])
        state["asked"] += 1
        if not attack.needs_gradient(state):
            report.search_forward += len(query)
            with row_keys(keys):
                return self.logits_of(query)[None], None
        report.search_forward += len(query) * attack.eot_samples
        report.search_backward += len(query) * attack.eot_samples
        return value_and_gradient(attack, self.logits_of, query, y, state, keys)

    def _confirm(self, images: Tensor, query: Tensor, samples: State) -> np.ndarray:
        """Whether the user's model is fooled by images that the search takes for fooled, so that they can leave early.

        Of a random model all draws have to be: an image that fools most of them can still be made to fool more.
        """
        asked_itself = self.failed is None and not self.run.is_random
        if asked_itself and torch.equal(images, query):
            return np.ones(len(images), dtype=bool)
        return self.run.judge_unanimously(images, samples)[0]

    def _without_luck(self, query: Tensor, logits: Tensor) -> Tensor:
        """Logits (N, classes) in which a random model is fooled only by queries that fool it in all of fresh draws.

        An attack that keeps the nearest image of all would else keep that of its luckiest draw.
        """
        rows = _on_host(self.run.reached(logits[None], self.state["y"])).nonzero()[0]
        if not len(rows):
            return logits
        samples = _rows({name: self.state[name] for name in ("y", "index", "restart", "asked")}, rows)
        convinced, answers = self.run.judge_unanimously(_select(query, rows), samples)
        refused = torch.from_numpy(rows[~convinced]).to(logits.device)
        return logits.index_copy(0, refused, _select(answers, ~convinced))

    def _end(self, rows: np.ndarray, over: np.ndarray) -> Iterator[Finished]:
        """Let samples that are out of steps go, or start again; `over` learns which rows are free."""
        run, attack = self.run, self.run.attack
        ended = _rows(self.state, rows)
        images = attack.result(ended)
        fooled = run.judge(images, ended) if run.judges else None
        if fooled is not None and attack.minimises_norm and run.is_random:
            images, fooled = self._further_out(images, ended, fooled)
        stands = np.zeros(len(rows), dtype=bool) if fooled is None else ~fooled
        if attack.minimises_norm and stands.any():
            ended["doubted"] |= _on_host((images != ended["x"]).flatten(1).any(1))
            stays = torch.from_numpy(stands).to(images.device, non_blocking=True).view(-1, *(1,) * (images.ndim - 1))
            images = torch.where(stays, ended["x"], images)
        restarts = stands & (ended["restart"] + 1 < attack.restarts)
        failed = stands & ~restarts & ended["doubted"] if self.failed is not None else np.zeros_like(stands)
        leaves = ~(restarts | failed)
        over[rows[~restarts]] = True
        if leaves.any():
            yield Finished(ended["index"][leaves], _select(images, leaves), None if fooled is None else fooled[leaves])
        if failed.any():
            assert self.failed is not None
            self.failed.push(_inputs(_rows(ended, failed), restart=0))
        if restarts.any():
            again = _rows(ended, restarts)
            state = run.start(_inputs(again, restart=again["restart"] + 1)) | {"doubted": again["doubted"]}
            if restarts.all() and len(rows) == len(over):
                self.state = state
            else:
                _put(self.state, rows[restarts], state)

    def _further_out(self, images: Tensor, ended: State, fooled: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The images, moved on where they do not fool a random model after all, and whether they do now: bool (N,)."""
        run, x = self.run, ended["x"]
        images, fooled = images.clone(), fooled.copy()
        for length in _LENGTHS:
            rows = (~fooled).nonzero()[0]
            if not len(rows):
                break
            ended["asked"][rows] += 1  # for fresh draws
            start = _select(x, rows)
            tried = run.victim.clip(start + length * (_select(images, rows) - start))
            convinced, _ = run.judge_unanimously(tried, _rows(ended, rows))
            accepted = torch.from_numpy(rows[convinced]).to(images.device)
            images.index_copy_(0, accepted, _select(tried, convinced))
            fooled[rows[convinced]] = True
        return images, fooled

    def _place(self, state: State) -> None:
        """Into vacant rows as long as there are any, and after the last row what is left."""
        if not self.state:
            self.state = state
            return
        into, n = self.vacant[: _length(state)], _length(state)
        _put(self.state, into, state if len(into) == n else _rows(state, np.arange(len(into))))
        if len(into) < n:
            self.state = _joined([self.state, _rows(state, np.arange(len(into), n))])
        self.vacant = self.vacant[len(into) :]


class _Queue:
    """Samples that wait, read from `batches` when they are asked for."""

    def __init__(self, batches: Iterable[dict[str, Tensor]], device: torch.device | None) -> None:
        self._batches, self._device = iter(batches), device
        self._pieces: deque[State] = deque()
        self._read = 0

    def __len__(self) -> int:
        """Samples that are already read."""
        return sum(map(_length, self._pieces))

    def __bool__(self) -> bool:
        return bool(self._pieces) or self._read_on()

    def push(self, samples: State) -> None:
        """Let samples wait."""
        self._pieces.append(samples)

    def peek(self, n: int) -> Tensor:
        """The first `n` images, or as many as there are, which stay in the queue."""
        while len(self) < n and self._read_on():
            pass
        return torch.cat([self._staged({"x": piece["x"][:n]})["x"] for piece in self._pieces])[:n]

    def take(self, n: int) -> State | None:
        """Up to `n` samples, on the device; None where none waits."""
        taken: list[State] = []
        while n > 0 and self:
            piece = self._pieces.popleft()
            if _length(piece) > n:
                self._pieces.appendleft(_slice(piece, n, None))
                piece = _slice(piece, 0, n)
            n -= _length(piece)
            taken.append(self._staged(piece))
        return _joined(taken) if taken else None

    def _read_on(self) -> bool:
        batch = next(self._batches, None)
        if batch is None:
            return False
        index = np.arange(self._read, self._read + len(batch["x"]))
        self._read += len(index)
        self._pieces.append({**batch, "index": index, "restart": np.zeros_like(index)})
        return True

    def _staged(self, samples: State) -> State:
        """On the device, in memory of their own; through pinned memory where the device is another one."""
        return {name: self._moved(value) if isinstance(value, Tensor) else value for name, value in samples.items()}

    def _moved(self, value: Tensor) -> Tensor:
        device = self._device or value.device
        if value.device.type == "cpu" and device.type == "cuda":
            return value.pin_memory().to(device, non_blocking=True)
        return value.to(device, copy=True)


def _majority(votes: Tensor) -> Tensor:
    """Whether more than half of the votes (draws, N) are true: (N,)."""
    return votes[0] if len(votes) == 1 else 2 * votes.sum(0) > len(votes)


def _on_host(values: Tensor | np.ndarray) -> np.ndarray:
    """Where the loop waits for the device."""
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def _round_size(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: for each new size of a batch kernels are prepared anew."""
    power = 1 << (n - 1).bit_length()
    return power - power // 4 if n <= power - power // 4 and power >= 4 else power


def _length(state: State) -> int:
    return len(state["index"]) if state else 0


def _inputs(state: State, restart: np.ndarray | int) -> State:
    """What a search starts from."""
    inputs: State = {name: state[name] for name in ("x", "y", "mask", "x_adv_init", "index") if name in state}
    return {**inputs, "restart": np.zeros(_length(state), dtype=np.int64) + restart}


def _select(values: Any, rows: np.ndarray) -> Any:
    """The rows with these numbers, or where a mask is true."""
    if isinstance(values, np.ndarray):
        return values[rows]
    if rows.dtype == bool:
        if rows.all():
            return values
        rows = rows.nonzero()[0]
    return values.index_select(0, torch.from_numpy(rows).to(values.device, non_blocking=True))


def _slice(state: State, start: int, stop: int | None) -> State:
    return {name: value[start:stop] for name, value in state.items()}


def _rows(state: State, rows: np.ndarray) -> State:
    if rows.dtype != bool and len(rows) == _length(state):
        return dict(state)
    return {name: _select(value, rows) for name, value in state.items()}


def _joined(states: list[State]) -> State:
    if len(states) == 1:
        return states[0]
    return {
        name: np.concatenate([state[name] for state in states])
        if isinstance(states[0][name], np.ndarray)
        else torch.cat([state[name] for state in states])
        for name in states[0]
    }


def _put(state: State, rows: np.ndarray, new: State) -> None:
    """Overwrite rows of `state`."""
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            value[rows] = new[name]
        else:
            value.index_copy_(0, torch.from_numpy(rows).to(value.device, non_blocking=True), new[name])
