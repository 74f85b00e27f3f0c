"""Attacks one after the other, each on the images that still stand: what AutoAttack and `evaluate` are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guardians.engine.attack import Attack
from guardians.engine.interfaces import ClassifierAttack, Estimator
from guardians.engine.parameters import Flag, OptionalCount
from guardians.engine.ranks import agreed, deal
from guardians.engine.report import Report
from guardians.engine.state import Answer, Progress, Query, State

__all__ = ["CLEAN", "AttackSequence", "Judgement", "Ledger", "Stage", "judge_again", "run_stage", "units_of"]

CLEAN = "clean"
"""The stage of images that the model gets wrong as they are."""
STANDS = -1
UNIT = 4
"""Batches that are searched at once. The more, the fewer images are searched in a batch that dwindles; the fewer, the
less is lost where one of several processes is killed."""


class Stage(NamedTuple):
    """An attack of a sequence, under the name by which its images are listed.

    Attributes:
        sampled: whether a few images are tried first, and the others where it fools one of them.
        source: an attack on another model, whose images `attack` starts from; None for one that starts from ours.
    """

    name: str
    attack: Attack
    sampled: bool = False
    source: Attack | None = None


class AttackSequence(ClassifierAttack):
    """An attack that is several, one after the other; it has no targets.

    Attributes:
        ledger: what the last call found of each image, see `Ledger`; None before the first.
        stages: the names of its stages, the first of which is "clean".
    """

    targeted = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ledger: Ledger | None = None
        self.stages: list[str] = []

    def _labels(self, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
        """The labels (N,) where the images are; where none are given, the predictions."""
        x, y = inputs["x"], inputs.get("y")
        if y is not None:
            return y
        size = 256
        return torch.cat([self.victim.predict(part.to(device, copy=True)).to(x.device) for part in x.split(size)])


class Judgement(Attack):
    """No attack: the images, or those of `x_adv_init`, as they are; `report.fooled` says what the model makes of them.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.
    """

    estimator: Estimator
    batch_size: OptionalCount = None
    verbose: Flag = False

    targeted = False
    _options: ClassVar[tuple[str, ...]] = ("x_adv_init", "first_index")

    def start(self, state: State) -> None:
        """At the images."""
        state.point = (state.x if state.x_adv_init is None else state.x_adv_init).clone()

    def query(self, state: State) -> Query:
        """The images, without a gradient."""
        return Query(state.point, gradient=False)

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """Nothing is differentiated."""
        return logits.new_zeros(len(logits))

    def update(self, state: State, answer: Answer) -> Progress:
        """Done."""
        return Progress(np.ones(len(state), dtype=bool))


@dataclass
class Ledger:
    """What is known of each image of a sequence so far.

    Attributes:
        x_adv: the images (N, ...), adversarial where one was found; of several processes the first has them.
        stage: int16 (N,), the number of the stage that felled it; -1 where it stands.
        finished: int16 (N,), how many stages it is through.
        forward, backward: int64 (N,), how often the search evaluated the model and its gradient.
        unsure: bool (N,), of a random model, which images it gets wrong as they are in most of its draws; they are
            attacked too, until one is found that it gets wrong in all.
    """

    x_adv: Tensor
    stage: np.ndarray
    finished: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    unsure: np.ndarray
    report: Report = field(default_factory=Report)

    @classmethod
    def of(cls, x: Tensor) -> Ledger:
        """At the beginning."""
        stage, finished = np.full(len(x), STANDS, dtype=np.int16), np.zeros(len(x), dtype=np.int16)
        forward, backward = (np.zeros(len(x), dtype=np.int64) for _ in range(2))
        return cls(x.clone(), stage, finished, forward, backward, np.zeros(len(x), dtype=bool))

    @property
    def stands(self) -> np.ndarray:
        """Images that nothing has felled, bool (N,)."""
        stands: np.ndarray = self.stage == STANDS
        return stands

    def waiting(self, number: int) -> np.ndarray:
        """The positions of those that have stage `number` before them."""
        return ((self.stands | self.unsure) & (self.finished <= number)).nonzero()[0]

    def come_to(self, number: int) -> np.ndarray:
        """The positions of those that have stage `number` before them, or are through it as the last so far."""
        return np.union1d(self.waiting(number), (self.finished == number + 1).nonzero()[0])

    def enter(self, number: int, entry: _Entry, images: Tensor | None) -> None:
        """Take in what stage `number` found, and the adversarial images of those that it felled, if they are known."""
        rows, felled = entry.rows, entry.rows[entry.felled]
        if images is not None:
            self.x_adv[torch.from_numpy(felled).to(self.x_adv.device)] = images.to(self.x_adv.device)
        self.stage[felled[self.stands[felled]]] = number
        self.unsure[felled] = number == 0 and entry.is_random
        self.finished[rows] = number + 1
        self.forward[rows] += entry.forward
        self.backward[rows] += entry.backward
        if entry.report is not None:
            self.report.add(entry.report)


def run_stage(
    number: int,
    stage: Stage,
    x: Tensor,
    y: Tensor,
    ledger: Ledger,
    *,
    eps: float | None = None,
    device: torch.device | None = None,
    first_index: int = 0,
    among: np.ndarray | None = None,
) -> Iterator[int]:
    """Attack what still stands, and enter it into the ledger; after each entry, the number of images it was about.

    An image's draws depend on its position in the data, not on which others still stand. The images that come to the
    stage are cut into units, searched one after the other, or by several processes (`guardians.engine.ranks`).

    Args:
        number: of the stage in its sequence.
        stage: the attack, with `early_stop` or of the smallest perturbation.
        x: images (N, ...).
        y: labels (N,).
        ledger: of the sequence.
        eps: the radius that the perturbation of an attack that looks for the smallest must not exceed.
        device: of the search.
        first_index: the position of the first image in the data.
        among: positions to which it is confined.
    """

    def attacked(unit: np.ndarray) -> Iterator[tuple[_Entry, Tensor]]:
        rows = unit[ledger.finished[unit] <= number]
        yield from _attacked(rows, stage, x, y, eps, device, first_index)

    rows = ledger.come_to(number)
    if among is not None:
        rows = np.intersect1d(rows, among)
    units = [unit for unit in units_of(rows, stage.attack, x) if (ledger.finished[unit] <= number).any()]
    for entry, images in deal(units, attacked):
        ledger.enter(number, entry, images)
        yield len(entry.rows)


def units_of(rows: np.ndarray, attack: Attack, x: Tensor) -> list[np.ndarray]:
    """Rows of images (N, ...) in parts of equal length, of at most `UNIT` batches, which are searched at once.

    The parts do not depend on how many processes there are, so neither do the results, to the last bit.
    """
    if not len(rows):
        return []
    size = UNIT * attack.settled_batch_size(x)
    return np.array_split(rows, -(-len(rows) // size))


class _Entry(NamedTuple):
    """What was found of some images: their rows, and in that order what a ledger keeps; the report with the last."""

    rows: np.ndarray
    felled: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    is_random: bool
    report: Report | None = None


def _attacked(
    rows: np.ndarray,
    stage: Stage,
    x: Tensor,
    y: Tensor,
    eps: float | None,
    device: torch.device | None,
    first_index: int,
) -> Iterator[tuple[_Entry, Tensor]]:
    """Entries as images are finished, and of those that are felled the adversarial images, where `x` is."""
    attack, chosen = stage.attack, torch.from_numpy(rows).to(x.device)
    inputs = {"x": x[chosen], "y": y[chosen]}
    if stage.source is not None:
        images = x[chosen]
        for finished in stage.source._search([inputs], None, len(rows), first_index + rows):
            images[torch.from_numpy(finished.index).to(x.device)] = finished.x_adv.to(x)
        inputs["x_adv_init"] = images
    for finished in attack._search([inputs], device, len(rows), first_index + rows):
        index = rows[finished.index]
        assert finished.fooled is not None
        assert attack.report is not None
        felled = finished.fooled
        if eps is not None and attack.keeps == "nearest":
            # With the bound in float64, and the perturbation of float32 images exact in it.
            size = attack.distance(
                finished.x_adv.double(), x[torch.from_numpy(index).to(x.device)].to(finished.x_adv).double()
            )
            felled = felled & (size <= eps).cpu().numpy()
        images = finished.x_adv[torch.from_numpy(felled).to(finished.x_adv.device)].to(x)
        yield _Entry(index, felled, finished.forward, finished.backward, attack.report.is_random), images
    assert attack.report is not None
    nothing = np.empty(0, dtype=np.int64)
    yield _Entry(nothing, nothing.astype(bool), nothing, nothing, False, attack.report), x[:0]


def judge_again(estimator: Any, x: Tensor, y: Tensor, ledger: Ledger, *, first_index: int = 0, **options: Any) -> None:
    """Of a random model: let images stand again that fresh draws, which chose nothing, say do not fool it.

    Each stage was a chance to be lucky, and so was each image that it tried.

    Args:
        estimator: the model.
        x: images (N, ...).
        y: labels (N,).
        ledger: of the sequence, at its end.
        first_index: the position of the first image in the data.
        options: of `Judgement`.
    """
    if not ledger.report.is_random or ledger.stands.all():
        return

    def standing_again() -> np.ndarray:
        judgement = Judgement(estimator, **options, early_stop=True)
        rows = (~ledger.stands).nonzero()[0]
        chosen = torch.from_numpy(rows).to(x.device)
        inputs = {"x": x[chosen], "y": y[chosen], "x_adv_init": ledger.x_adv[chosen]}
        judged = list(judgement._search([inputs], x.device, len(rows), first_index + rows))
        back = [finished.index[~finished.fooled] for finished in judged if finished.fooled is not None]
        return rows[np.concatenate([*back, np.empty(0, dtype=np.int64)])]

    ledger.stage[agreed(standing_again)] = STANDS
