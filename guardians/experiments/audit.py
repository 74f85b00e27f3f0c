"""An audit of what makes a robustness evaluation untrustworthy: each rule measured, with its source and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.attacks.apgd import APGD
from guardians.attacks.fgsm import FGSM
from guardians.attacks.norms import as_norm, dual, lp_norm, random_in_ball, steepest_ascent
from guardians.attacks.objectives import margin, margin_gradient
from guardians.attacks.pgd import PGD
from guardians.attacks.sequence import Judgement
from guardians.attacks.square import Square
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_integer, check_number, check_seed
from guardians.engine.report import Report
from guardians.engine.rng import ForkedGenerators, SampleRng, row_keys
from guardians.engine.victim import Victim, isolated, undisturbed
from guardians.evaluation import check_surrogates, checked_inputs, transfer_attack

__all__ = ["RULES", "Audit", "Rule", "audit"]

_PROBED = 64
"""Images at which gradients are looked at."""
_STEPS = 20
_QUERIES = 300
_FEW = 0.02
"""Of the images. Limits were set on 60 images and looked at on 100 others, where all measures of sound models are 0 and
the least that raised a flag of a planted defence is 0.07 (docs/audit.md)."""


@dataclass(frozen=True)
class Rule:
    """What is looked at.

    Attributes:
        name: of the flag.
        measured: what the number is that raises it.
        threshold: above which it does.
        source: paper, and section.
        advice: what to do about it.
        measure: the number; None where it cannot be said of this model.
    """

    name: str
    measured: str
    threshold: float
    source: str
    advice: str
    measure: Callable[[_Probed], float | None]


@dataclass(frozen=True)
class Audit:
    """What was found. Prints as a table.

    Attributes:
        table: a row a rule: flag, raised, measured, value, threshold, source, advice.
        n: images, of those that the model gets right.
    """

    table: pd.DataFrame
    n: int

    @property
    def flags(self) -> list[str]:
        """The names of the rules that are broken."""
        return list(self.table["flag"][self.table["raised"]])

    def __str__(self) -> str:
        lines = [f"{'':<2}{'flag':<26} {'value':>8} {'limit':>6}  measured"]
        for row in self.table.itertuples():
            value = f"{row.value:.3g}".replace("nan", "-")
            lines.append(f"{'!' if row.raised else '':<2}{row.flag:<26} {value:>8} {row.threshold:>6g}  {row.measured}")
        lines += [f"! {row.flag}: {row.advice} ({row.source})" for row in self.table[self.table["raised"]].itertuples()]
        return "\n".join([*lines, f"{len(self.flags)} of {len(self.table)} flags raised, on {self.n} images"])


class _Probed:
    """A model, images that it gets right, and what attacks on them find; each is run when it is first asked for."""

    def __init__(
        self,
        model: Any,
        x: Tensor,
        y: Tensor,
        norm: float,
        eps: float,
        eot_samples: int,
        surrogates: Sequence[Any],
        common: dict[str, Any],
    ) -> None:
        self.model, self.victim, self.surrogates = model, Victim(model), surrogates
        self.norm, self.eps, self.eot_samples, self.common = norm, eps, eot_samples, common
        clean = _run(Judgement(model, **common, early_stop=True), x, y)
        self.is_random, self.depends_on_batch = clean.is_random, clean.depends_on_batch
        right = torch.from_numpy(~_fooled(clean)).to(x.device)
        self.x, self.y = x[right], y[right]
        self._found: dict[Any, np.ndarray] = {}

    def fooled(self, kind: type[Attack], **options: Any) -> np.ndarray:
        """Which of the images an attack fools, bool (N,); none where it needs a gradient and there is none."""
        if kind is not Square:
            options["eot_samples"] = self.eot_samples
        options = {"norm": self.norm, "eps": self.eps, **options}
        key = kind, *options.items()
        if key not in self._found:
            self._found[key] = np.zeros(len(self.x), dtype=bool)
            if self.has_gradient or kind is Square:
                attack = kind(self.model, **options, **self.common, early_stop=True)
                self._found[key] = _fooled(_run(attack, self.x, self.y))
        return self._found[key]

    def pgd(self, eps: float | None = None, steps: int = _STEPS, reach: float = 2.5) -> np.ndarray:
        """Which PGD fools, whose steps together are `reach` radii long (Madry et al. 2018)."""
        radius = self.eps if eps is None else eps
        return self.fooled(PGD, eps=radius, max_iter=steps, eps_step=reach * radius / steps)

    @property
    def by_gradients(self) -> np.ndarray:
        """Which PGD fools, on cross-entropy or, as that does not lead to the nearest other class, on the margin."""
        return self.pgd() | self.fooled(APGD, loss_type="margin", max_iter=_STEPS, nb_random_init=0)

    def missed(self, stronger: np.ndarray, weaker: np.ndarray) -> float | None:
        """Share of the images that what should be the weaker attack fools, and the stronger does not.

        A single one is chance and not counted.
        """
        missed = int(np.count_nonzero(weaker & ~stronger))
        return max(0, missed - 1) / len(weaker) if self.has_gradient else None

    def missed_by_transfer(self) -> float | None:
        """The largest share that images of a surrogate fool, and PGD does not; None without a surrogate."""
        shares = [self.missed(self.by_gradients, self._transferred(surrogate)) for surrogate in self.surrogates]
        return max((share for share in shares if share is not None), default=None)

    def _transferred(self, surrogate: Any) -> np.ndarray:
        x_adv = transfer_attack(surrogate, norm=self.norm, eps=self.eps, **self.common)(self.x, self.y)
        judgement = Judgement(self.model, **self.common, early_stop=True)
        return _fooled(_run(judgement, self.x, self.y, x_adv_init=x_adv))

    @contextmanager
    def _asking(self, points: Tensor) -> Iterator[None]:
        """Where the model is asked about points (N, ...); a random one has the same draws each time."""
        draws = ForkedGenerators(self.common["seed"], points.device)
        keys = row_keys(np.arange(len(points), dtype=np.uint64))
        with undisturbed(self.victim.module), isolated(points.device), keys, draws:
            yield

    def _asked(self, points: Tensor) -> Tensor:
        """Logits (N, classes) at points (N, ...)."""
        with self._asking(points), torch.no_grad():
            return self.victim.logits(points)

    @cached_property
    def points(self) -> tuple[Tensor, Tensor]:
        """Some images and as many points of their balls (N, ...), and the labels (N,)."""
        device = self.victim.device or self.x.device
        x, y = self.x[:_PROBED].to(device), self.y[:_PROBED].to(device)
        eps = torch.full((len(x), *[1] * (x.ndim - 1)), self.eps, dtype=x.dtype, device=x.device)
        noise = random_in_ball(x, eps, self.norm, SampleRng(self.common["seed"], np.arange(len(x))))
        return torch.cat([x, self.victim.clip(x + noise)]), torch.cat([y, y])

    @cached_property
    def logits(self) -> Tensor:
        """At `points`."""
        return self._asked(self.points[0])

    @property
    def clean_logits(self) -> Tensor:
        """At the images among them."""
        return self.logits[: len(self.logits) // 2]

    @cached_property
    def gradients(self) -> Tensor | None:
        """Of the margin by which another class is ahead, at `points`; None where there is none."""
        points, y = self.points
        with self._asking(points):
            return margin_gradient(self.victim, points, y)

    @property
    def has_gradient(self) -> bool:
        """Whether the logits depend differentiably on the images."""
        return self.gradients is not None

    def share_of_gradients(self, holds: Callable[[Tensor], Tensor]) -> float | None:
        """Of the gradients (N, pixels), those of which something holds."""
        return None if self.gradients is None else float(holds(self.gradients.flatten(1)).double().mean())

    def unpredicted(self) -> float | None:
        """Share of the points from which a step along the gradient changes the margin by another amount than it says.

        By less than half or more than twice, in a step of a twentieth of the radius; where the gradient is zero, see
        another rule.
        """
        if self.gradients is None:
            return None
        points, y = self.points
        gradient = self.gradients.nan_to_num()
        length = self.eps / 20
        predicted = length * lp_norm(gradient.double(), dual(self.norm)).flatten()
        moved = points + length * steepest_ascent(gradient, self.norm)
        before, after = (margin(logits, y, targeted=False).double() for logits in (self.logits, self._asked(moved)))
        ratio = (after - before) / predicted
        known = predicted > 0
        return float(((ratio < 0.5) | (ratio > 2))[known].double().mean()) if known.any() else None

    def saturated(self) -> float:
        """Share of the images whose probability is 1 in the precision of the logits."""
        probabilities = self.clean_logits.softmax(1).amax(1)
        return float((probabilities >= 1 - torch.finfo(probabilities.dtype).eps).double().mean())

    def repeated(self) -> float:
        """Share of the logits that another image has too, of the same class and to the last bit."""
        distinct = [column.unique().numel() for column in self.clean_logits.unbind(1)]
        return 1 - sum(distinct) / self.clean_logits.numel()

    def unbounded(self) -> float | None:
        """Share that stands where the ball holds a grey image of every other one."""
        farthest = 0.5 * self.x[0].numel() ** (1 / self.norm)
        return float((~self.pgd(eps=farthest, steps=40)).mean()) if self.has_gradient else None


def _run(attack: Attack, x: Tensor, y: Tensor, **options: Any) -> Report:
    attack(x, y, **options)
    assert attack.report is not None
    return attack.report


def _fooled(report: Report) -> np.ndarray:
    assert report.fooled is not None
    return report.fooled


_CARLINI = "Carlini et al. 2019, On evaluating adversarial robustness"
_PINTOR = "Pintor et al. 2022, Indicators of attack failure"
_ATHALYE = "Athalye et al. 2018, Obfuscated gradients"
_CROCE = "Croce and Hein 2020, AutoAttack's checks"
RULES = (
    Rule(
        "random without EOT",
        "whether logits differ between passes, and gradients are those of one draw",
        0,
        f"{_ATHALYE}, section 3.1; {_CROCE}",
        "give eot_samples, or a budget of `evaluate`, which takes means over draws by itself",
        lambda probed: float(probed.is_random and probed.eot_samples == 1),
    ),
    Rule(
        "depends on batch",
        "whether the answer about an image changes with the others of its batch",
        0,
        f"{_CROCE}; {_CARLINI}",
        "evaluate with statistics of the training set; else the number holds for these batches alone",
        lambda probed: float(probed.depends_on_batch),
    ),
    Rule(
        "no gradient",
        "whether logits do not depend differentiably on the images",
        0,
        f"{_ATHALYE}, section 3.1",
        "replace what has no derivative by something like it in the backward pass (BPDA); report Square and transfer",
        lambda probed: float(not probed.has_gradient),
    ),
    Rule(
        "vanishing gradients",
        "share of the images whose gradient is zero",
        0.5,
        f"{_CROCE}; {_PINTOR}; {_ATHALYE}, section 3.1",
        "differentiate through what rounds or saturates (BPDA), or attack the logits before it",
        lambda probed: probed.share_of_gradients(lambda gradient: gradient.abs().amax(1) == 0),
    ),
    Rule(
        "undefined gradients",
        "share of the images with an infinite or undefined gradient",
        0,
        f"{_ATHALYE}, section 3.1; {_CARLINI}",
        "find the operation that overflows; attacks step nowhere along such gradients",
        lambda probed: probed.share_of_gradients(lambda gradient: ~gradient.isfinite().all(1)),
    ),
    Rule(
        "misleading gradients",
        "share of points where a small step along the gradient does not change the margin as it says",
        0.5,
        f"{_ATHALYE}, section 3.1; {_PINTOR}",
        "smooth the model or the gradient (BPDA, means over noise); trust Square and transfer more than gradients",
        _Probed.unpredicted,
    ),
    Rule(
        "saturated outputs",
        "share of the images whose probability is 1 in floating point, so that cross-entropy has no gradient",
        0.5,
        f"{_CARLINI}; Carlini and Wagner 2016, Defensive distillation is not robust",
        "attack the logit margin rather than cross-entropy, or divide the logits by a temperature",
        _Probed.saturated,
    ),
    Rule(
        "quantised outputs",
        "share of the logits that are those of another image too",
        0.5,
        f"{_ATHALYE}, section 3.1",
        "attack what comes before the outputs are rounded",
        _Probed.repeated,
    ),
    Rule(
        "weaker than FGSM",
        "share of the images that FGSM fools and PGD does not",
        _FEW,
        _CARLINI,
        "the loss is not followed by its gradient: look for what masks it",
        lambda probed: probed.missed(probed.by_gradients, probed.fooled(FGSM)),
    ),
    Rule(
        "weaker than black-box",
        f"share of the images that Square fools in {_QUERIES} queries and PGD does not",
        _FEW,
        f"{_ATHALYE}, section 3.1; {_CARLINI}",
        "gradients are masked: report black-box attacks, and replace what masks them",
        lambda probed: probed.missed(probed.by_gradients, probed.fooled(Square, max_iter=_QUERIES)),
    ),
    Rule(
        "weaker than transfer",
        "share of the images that those of a surrogate fool and PGD does not",
        _FEW,
        f"{_CARLINI}; {_ATHALYE}, section 3.1",
        "gradients are masked: report transfer, and replace what masks them",
        _Probed.missed_by_transfer,
    ),
    Rule(
        "not falling with eps",
        "share of the images that PGD fools in a ball of half the radius, and not in one of twice the radius",
        _FEW,
        _CARLINI,
        "the search fails, not the radius: more steps, restarts, another loss",
        lambda probed: probed.missed(probed.pgd(2 * probed.eps), probed.pgd(probed.eps / 2)),
    ),
    Rule(
        "robust where nothing can be",
        "share of the images that stand in a ball that holds a grey image of every other one",
        _FEW,
        f"{_CARLINI}; {_ATHALYE}, section 3.1",
        "the search fails: no model can be right there",
        _Probed.unbounded,
    ),
    Rule(
        "not converged",
        f"share of the images that PGD fools in {5 * _STEPS} steps and not in {_STEPS}",
        0.05,
        f"{_CARLINI}; {_PINTOR}",
        "take more steps, until more change nothing",
        lambda probed: probed.missed(probed.pgd(), probed.pgd(steps=5 * _STEPS)),
    ),
    Rule(
        "bad step size",
        "share of the images that PGD fools with steps four times longer or shorter, and not with those of the rule",
        0.05,
        f"{_PINTOR}; Croce and Hein 2020, section 3",
        "choose the step by trying several, or take APGD or `evaluate`, which adapt it",
        lambda probed: probed.missed(probed.pgd(), probed.pgd(reach=0.625) | probed.pgd(reach=10)),
    ),
)
"""All that is looked at, in this order."""


def audit(
    model: nn.Module | PyTorchClassifier,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    norm: float | str = np.inf,
    eps: float = 8 / 255,
    eot_samples: int = 1,
    surrogates: Sequence[nn.Module | PyTorchClassifier] = (),
    batch_size: int | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> Audit:
    """What would make an evaluation of this model by its gradients untrustworthy, see `RULES`.

    A few attacks of the kind that people report are run, beside others that cannot be stronger unless something hinders
    the first. A flag says that a number may flatter the model, not that the model is not robust.

    Args:
        model: `nn.Module` that returns logits for images in [0, 1], or ART `PyTorchClassifier`.
        images: (N, C, H, W) within `clip_values`; one or two hundred are enough.
        labels: true labels (N,), or one-hot rows.
        norm: 1, 2, inf or "inf".
        eps: radius of the ball that is claimed.
        eot_samples: draws of a random model for one gradient, as in the evaluation that is examined.
        surrogates: other models, whose adversarial images are tried on this one.
        batch_size: images in one forward pass; None chooses it.
        seed: of the draws.
        verbose: show a progress bar.

    Raises:
        EstimatorError, TypeError, ValueError: an argument is outside what is allowed, checked before any work; also
            where the model gets none of the images right.
    """
    check_choice("norm", as_norm(norm), (1.0, 2.0, np.inf))
    check_number("eps", eps, low=0, exclusive=True, single=True)
    check_integer("eot_samples", eot_samples, low=1)
    check_seed("seed", seed)
    inputs = checked_inputs(model, images, labels)
    check_surrogates(surrogates, Victim(model), inputs)
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "verbose": False}
    probed = _Probed(model, inputs["x"], inputs["y"], as_norm(norm), float(eps), eot_samples, surrogates, common)
    if not len(probed.x):
        raise ValueError("labels: the model gets none of the images right, so there is nothing to audit")
    rows = []
    for rule in tqdm(RULES, desc="audit", unit="rule", disable=not verbose, leave=False):
        value = rule.measure(probed)
        rows.append(
            {
                "flag": rule.name,
                "raised": value is not None and value > rule.threshold,
                "value": np.nan if value is None else value,
                "threshold": rule.threshold,
                "measured": rule.measured,
                "source": rule.source,
                "advice": rule.advice,
            }
        )
    return Audit(pd.DataFrame(rows), len(probed.x))
