"""What all samples of one run share: which models search for the attack, and how the user's model judges."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from guardians.engine.report import Report
from guardians.engine.rng import ForkedGenerators, SampleRng, hashed, row_keys
from guardians.engine.search import Logits, Search, choose_searches, differ, judge_logits
from guardians.engine.state import Columns, State, on_host, rounded_towards, select

if TYPE_CHECKING:
    from guardians.engine.attack import Attack

__all__ = ["PROBE", "Run", "evaluate", "margin", "rounding"]

logger = logging.getLogger(__name__)

PROBE = 8
"""Images on which it is seen whether the model is random, and whether a cheaper copy agrees with it."""
_DRAWS = 9
"""Of a random model for one judgement, unless the attack says how many."""
_PROBE_DRAW, _LABEL_DRAW, _SEARCH_DRAW, _JUDGEMENT_DRAW, _VERDICT_DRAW = range(5)
"""What a random model draws for; each has draws of its own."""
_LENGTHS = (1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0)
"""Of a smallest perturbation, that are tried where fresh draws of a random model refuse it."""


class Run:
    """What the pools of one run share.

    Attributes:
        searches: the models to search with, the cheapest first; the last is the user's own.
        judge_logits: the user's model, in the memory format in which it judges.
        batch_size: samples in one forward pass.
        capacity: samples under search at once.
        refills: whether a sample that is finished leaves at once and the next takes its row.
        judges: whether the user's model says what is fooled.
    """

    def __init__(
        self,
        attack: Attack,
        probe: Tensor,
        seed: int,
        report: Report,
        first_index: int | np.ndarray = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.attack, self.victim, self.seed, self.report = attack, attack.victim, seed, report
        self._first_index, self._dtype = first_index, dtype
        self._device = probe.device
        with self.drawing(self.keys(_PROBE_DRAW, np.arange(1))):
            self.batch_size = attack.batch_size_for(probe)
        self.capacity = max(1, self.batch_size // attack.eot_samples)
        self.searches = [Search(self.victim.logits)]
        self.judge_logits: Logits = self.victim.logits
        self.is_random = False
        self.refills = attack.keep != "last"
        self.judges = self.refills or attack.restarts > 1
        if self.judges or attack.precision not in ("auto", "float32"):
            self._probe(probe)
        self.judge_samples = attack.judge_samples or (_DRAWS if self.is_random else 1)

    def keys(self, purpose: int, *numbers: np.ndarray | int) -> np.ndarray:
        """Seeds of a random model's draws: of the sample, of what it is asked for, and of how often it was before."""
        return hashed(self.seed, purpose, *numbers)

    def _probe(self, x: Tensor) -> None:
        """Ask the model about some images: whether it is random, what may search for it, and how it judges fastest."""
        expected = self._asked(x, 0)
        if differ(expected, self._asked_in_other_company(x)):
            self.is_random = self.report.is_random = differ(expected, self._asked(x, 5))
            self.report.depends_on_batch = not self.is_random
            if not self.is_random:
                logger.warning(
                    "the model's answer about an image depends on the other images of the batch: verdicts hold for the "
                    "batches in which they were given, and results change with batch_size"
                )
        known = None if self.is_random else expected
        if known is not None:
            with self.drawing(self.keys(_PROBE_DRAW, np.arange(len(x)), 3)):
                self.judge_logits, tried = judge_logits(self.victim, x, known)
            self.report.judgement_forward += tried * len(x)
        precision = self.attack.precision
        if precision == "auto" and self.attack.keep == "nearest":
            precision = "float32"  # the boundary is where bfloat16's logits are wrong
        if self.refills or precision not in ("auto", "float32"):
            with self.drawing(self.keys(_PROBE_DRAW, np.arange(len(x)), 4)):
                self.searches, tried = choose_searches(self.victim, precision, x, known, self.batch_size)
            self.report.search = self.searches[0].description
            self.report.search_forward += tried * len(x)
            self.report.search_backward += tried * len(x)

    def _asked_in_other_company(self, x: Tensor) -> Tensor:
        """The logits of the images, a half of them at a time, beside a fainter one."""
        faint = self.victim.clip(x[:1] / 2)
        halves = enumerate(x.chunk(2), 1)
        return torch.cat([self._asked(torch.cat([half, faint]), number)[: len(half)] for number, half in halves])

    @cached_property
    def generators(self) -> ForkedGenerators:
        """Those of torch that a model draws from."""
        return ForkedGenerators(self.seed, self._device)

    @contextmanager
    def drawing(self, keys: np.ndarray) -> Iterator[None]:
        """Where the model is asked: its draws, keyed or from torch's generators, are functions of the run's seed."""
        with row_keys(keys), self.generators:
            yield

    def _asked(self, x: Tensor, time: int) -> Tensor:
        self.report.judgement_forward += len(x)
        with self.drawing(self.keys(_PROBE_DRAW, np.arange(len(x)), time)):
            return self.victim.logits(x)

    def start(self, samples: Columns) -> State:
        """State of samples at the start of a search or of a restart, with what the engine knows of them.

        Args:
            samples: "x", "index" and "restart", and what else of `loop._GIVEN` is given.
        """
        x, n = samples["x"], len(samples["x"])
        if "y" not in samples:
            with self.drawing(self.keys(_LABEL_DRAW, self._positions(samples["index"]))):
                samples["y"] = self.victim.predict(x)
            self.report.judgement_forward += n
        known = {"doubted": np.zeros(n, dtype=bool), "stuck": torch.zeros_like(samples["y"], dtype=torch.bool)}
        known |= {name: np.zeros(n, dtype=np.int64) for name in ("asked", "forward", "backward")} | samples
        if self.attack.keeps == "nearest" and "best" not in known:
            known |= {"best": x.clone(), "best_distance": x.new_full((n,), torch.inf)}
        state = State(known, SampleRng(self.seed, *self._numbers(known)))
        self.attack.start(state)
        state.has_started(type(self.attack).__name__)
        return state

    def search_keys(self, state: State) -> np.ndarray:
        """Of the next query of each row, which is counted; its random stream is another one from now on."""
        known = state.known
        keys = self.keys(_SEARCH_DRAW, *self._numbers(known))
        known["asked"] += 1
        state.rng_is(SampleRng(self.seed, *self._numbers(known)))
        return keys

    def _numbers(self, known: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What makes the draws of a sample its own: its position, and how often it was started and asked before."""
        return self._positions(known["index"]), known["restart"], known["asked"]

    def _positions(self, index: np.ndarray) -> np.ndarray:
        """In the data, of samples of this call."""
        first: Any = self._first_index
        return index + first if np.ndim(first) == 0 else first[index]

    def returned(self, images: Tensor, x: Tensor) -> Tensor:
        """Images as they can be given back in the dtype of the user's; they are searched and judged in `x`'s."""
        return images if self._dtype == x.dtype else rounded_towards(x, images, self._dtype).to(x)

    def reached(self, draws: Tensor, y: Tensor) -> Tensor:
        """Whether labels are left, or targets reached, by most of the draws (draws, N, classes): bool (N,)."""
        return self.majority((draws.argmax(-1) == y) == self.attack.targeted)

    @staticmethod
    def majority(votes: Tensor) -> Tensor:
        """Whether more than half of the votes (draws, ...) are true."""
        return votes[0] if len(votes) == 1 else 2 * votes.sum(0) > len(votes)

    def judge(self, images: Tensor, known: Columns, purpose: int = _JUDGEMENT_DRAW) -> tuple[np.ndarray, Tensor]:
        """Whether the user's model is fooled by images (N, ...) in most of fresh draws, and their mean logits."""
        draws = torch.stack([self._answer(images, known, draw, purpose) for draw in range(self.judge_samples)])
        return on_host(self.reached(draws, known["y"])), draws.mean(0)

    def verdict(self, images: Tensor, known: Columns, judged: np.ndarray) -> np.ndarray:
        """What is said of images that leave: of a random model that most of draws are fooled that chose nothing."""
        return self.judge(images, known, _VERDICT_DRAW)[0] if self.is_random else judged

    def judge_unanimously(self, images: Tensor, known: Columns) -> tuple[np.ndarray, Tensor]:
        """Whether it is fooled in all of them, and the logits (N, classes) of the first draw that is not, or the last.

        After the first draw that an image does not fool, it is asked about no more.
        """
        rows, answers = np.arange(len(images)), torch.empty(0)
        for draw in range(self.judge_samples):
            among = {name: select(known[name], rows) for name in ("y", "index", "restart", "asked")}
            logits = self._answer(select(images, rows), among, draw, _JUDGEMENT_DRAW)
            if draw == 0:
                answers = logits.clone()
            answers.index_copy_(0, torch.from_numpy(rows).to(images.device), logits)
            rows = rows[on_host(self.reached(logits[None], among["y"]))]
            if not len(rows):
                break
        return np.isin(np.arange(len(images)), rows), answers

    def further_out(self, images: Tensor, ended: State, fooled: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The images, moved on where they do not fool a random model after all, and whether they do now: bool (N,).

        `fooled` says which seemed to; they are asked once more, for the nearest of all is one that was lucky.
        """
        images, fooled = images.clone(), fooled.copy()
        ended.known["asked"] += 1
        fooled &= self.judge_unanimously(images, ended.known)[0]
        for length in _LENGTHS:
            if fooled.all():
                break
            ended.known["asked"][~fooled] += 1  # for fresh draws
            start, rest = select(ended.x, ~fooled), ended.rows(~fooled)
            tried = self.victim.clip(start + length * (select(images, ~fooled) - start))
            convinced, _ = self.judge_unanimously(tried, rest.known)
            rows = (~fooled).nonzero()[0][convinced]
            images.index_copy_(0, torch.from_numpy(rows).to(images.device), select(tried, convinced))
            fooled[rows] = True
        return images, fooled

    def _answer(self, images: Tensor, known: Columns, draw: int, purpose: int) -> Tensor:
        """Logits (N, classes) of the user's model in one draw."""
        keys = self.keys(purpose, *self._numbers(known), draw)
        asked = images
        if self.refills and not self.is_random:  # in batches of any size
            size = min(round_size(len(images)), self.batch_size)
            keys, asked = np.resize(keys, size), select(images, np.resize(np.arange(len(images)), size))
        self.report.judgement_forward += len(asked)
        with self.drawing(keys):
            return self.judge_logits(asked)[: len(images)]


def evaluate(
    attack: Attack,
    logits_of: Callable[[Tensor], Tensor],
    points: Tensor,
    state: State,
    *,
    gradient: bool = True,
    keys: np.ndarray | None = None,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the model says at points (N, ...), or (N, K, ...) for several of each row.

    Gradient and value are means over the draws of EOT (Athalye et al., "Synthesizing robust adversarial examples",
    2018, section 2), which share batches of at most `batch_size`.

    Args:
        attack: whose objective is differentiated.
        logits_of: the model.
        points: at which it is asked.
        state: of the attack.
        gradient: whether it is wanted.
        keys: the seeds (N,) of the draws of a random model (`row_keys`), of which each draw makes one of its own.
        batch_size: rows of a forward pass; None asks about all draws at once.

    Returns:
        Logits, for each draw (draws, N, classes) or (draws, N, K, classes); values of the objective (N,) or (N, K), and
        its gradient, of the shape of the points, or None.

    Raises:
        ValueError: a gradient is wanted, and the logits do not depend differentiably on the images.
    """
    n, several = len(points), points.ndim > state.x.ndim
    blocks = [(draw, k) for draw in range(attack.eot_samples) for k in range(points.shape[1] if several else 1)]
    at_once = len(blocks) if batch_size is None else max(1, batch_size // n)
    leaf = points.detach().requires_grad_(gradient)
    logits: list[Tensor] = []
    values: list[Tensor] = []
    total = None
    for first in range(0, len(blocks), at_once):
        taken = blocks[first : first + at_once]
        drawing: AbstractContextManager[None] = nullcontext()
        if keys is not None:
            drawing = row_keys(np.concatenate([hashed(keys, *block[: 1 + several]) for block in taken]))
        with torch.set_grad_enabled(gradient), drawing:
            parts = [leaf[:, k] if several else leaf for _, k in taken]
            answers = logits_of(parts[0] if len(parts) == 1 else torch.cat(parts)).split(n)
            objectives = [attack.objective(answer, state.y, state) for answer in answers]
            found = _gradient(objectives, leaf) if gradient else None
        if found is not None:
            total = found if total is None else total.add_(found)
        logits += [answer.detach() for answer in answers]
        values += [value.detach() for value in objectives]
    draws, value = torch.stack(logits), torch.stack(values)
    if several:
        draws, value = (part.unflatten(0, (attack.eot_samples, -1)).transpose(1, 2) for part in (draws, value))
    if attack.eot_samples == 1:
        return draws, value[0], total
    return draws, value.mean(0), None if total is None else total.div_(attack.eot_samples)


def _gradient(objectives: Sequence[Tensor], leaf: Tensor) -> Tensor:
    if objectives[0].requires_grad:
        total = torch.stack([value.sum() for value in objectives]).sum()
        (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError("the model's logits have no gradient with respect to its input")


def margin(logits: Tensor, y: Tensor, *, targeted: bool) -> Tensor:
    """By how much the attack has succeeded (N,): above zero where the label is left, or the target is reached.

    NaN where the logits that decide are infinite and equal.
    """
    own = logits.gather(1, y[:, None])[:, 0]
    other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return own - other if targeted else other - own


def rounding(logits: Tensor) -> Tensor:
    """By how much a margin of logits (N, classes) may change with the batch or the memory format, and some more."""
    return 256 * torch.finfo(logits.dtype).eps * logits.abs().nan_to_num(posinf=0).amax(1)


def round_size(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: for each new size of a batch kernels are prepared anew."""
    power = 1 << (n - 1).bit_length()
    return power - power // 4 if n <= power - power // 4 and power >= 4 else power
