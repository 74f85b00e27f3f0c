"""How robust a model is: a cascade of attacks, the cheapest first, each on the images that still stand."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import art
import numpy as np
import pandas as pd
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm.auto import tqdm

import guardians
from guardians.attacks.apgd import APGD
from guardians.attacks.auto_attack import auto_attack_stages
from guardians.attacks.malt import MALT
from guardians.attacks.norms import CommonNorm, as_norm, lp_norm
from guardians.attacks.objectives import margin_gradient
from guardians.attacks.pgd import PGD
from guardians.attacks.registry import Family, Spec, register
from guardians.attacks.sequence import CLEAN, STANDS, AttackSequence, Judgement, Ledger, Stage, judge_again, run_stage
from guardians.attacks.square import Square
from guardians.data import Dataset, LazyDataset
from guardians.defences.ensemble import RandomEnsemble
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_integer, check_number, check_seed
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Flag, OptionalCount, Positive, Seed
from guardians.engine.ranks import agreed, alone, check_shareable, deal, ranks
from guardians.engine.rng import ForkedGenerators, fresh_seed
from guardians.engine.victim import Victim, isolated, undisturbed
from guardians.models.identity import digest
from guardians.statistics import wilson_interval
from guardians.tables import write_csv

__all__ = [
    "BUDGETS",
    "FLAGS",
    "Cascade",
    "Evaluation",
    "check_surrogates",
    "checked_inputs",
    "evaluate",
    "transfer_attack",
]

BUDGETS = ("fast", "standard", "thorough")
FLAGS = {
    "random": "the logits of an image differ between passes: gradients are means over draws (EOT), and verdicts those "
    "of fresh draws",
    "depends on batch": "the answer about an image depends on the others of its batch: the number holds for these "
    "batches",
    "no gradient": "the model has no gradient: only Square and what transfers attack it, so the number is an upper "
    "bound",
    "vanishing gradients": "the gradient is zero on half of the images or more: gradient masking, so the number may "
    "flatter the model",
    "probabilities": "the model returns probabilities, which saturate: it is attacked through their logarithm",
    "gradient masking": "Square or what transfers from another model fools images that gradients do not, so the number "
    "may flatter the model",
    "not converged": "the last third of the gradients still fooled more than 1 % of the images: take a larger budget",
    "all wrong": "the model gets no image right as it is",
}
"""What makes a number doubtful, and why."""
_OF_THE_MODEL = ("no gradient", "vanishing gradients", "probabilities")
_PROBED = 64
"""Images on which the gradient is looked at."""
_EOT_SAMPLES = {"fast": 5, "standard": 20, "thorough": 20}
"""Random passes behind a gradient of a random model, those counted that an answer of a `RandomEnsemble` averages."""
_QUERIES = {"fast": 500, "standard": 2000, "thorough": 5000}
"""Of Square, where gradients are of no use."""
_SAMPLE_QUERIES = 300
"""Of Square, where gradients are of use."""
_HOPELESS, _HOPE = {"fast": 0.5, "standard": 1.0}, 0.3
"""Shares of the margin at the image, see `MALT`. Of 124 searches of 10 steps on two adversarially trained models that
went on to fool the model, all were below 0.13 after 3 steps, but for one that was at 1; with 0.5 `standard` lost one of
300 images of a third model, and saved a tenth of its gradients."""
_REACH = {"fast": 2.0, "standard": 3.0}
"""In radii. Of 971 images fooled in norms inf and 2 on four models, the class was at most at 1.8."""
_SAVED = ("stage", "finished", "forward", "backward", "unsure")
_SAVED_EVERY = 30.0
"""Seconds."""
_SHARD = 1024


@dataclass
class Evaluation:
    """What `evaluate` found. Prints as a table.

    Attributes:
        norm, eps: the threat model.
        budget: of the evaluation.
        labels: (N,).
        stages: names of the attacks, the first of which is "clean".
        ledger: what became of each image, see `Ledger`; its columns stage, forward, backward and x_adv are found here
            too.
        distance: (N,), the norm of the perturbation that felled it; NaN where none did.
        seconds: it took.
        flags: keys of `FLAGS`.
        model_digest: of the model, see `guardians.models.identity.digest`.
        seed: of the draws.
        versions: of the packages.
    """

    norm: float
    eps: float
    budget: str
    labels: np.ndarray
    stages: list[str]
    ledger: Ledger
    distance: np.ndarray
    seconds: float
    flags: list[str]
    model_digest: str
    seed: int
    versions: dict[str, str] = field(default_factory=dict)

    stage = property(lambda self: self.ledger.stage)
    forward = property(lambda self: self.ledger.forward)
    backward = property(lambda self: self.ledger.backward)
    x_adv = property(lambda self: self.ledger.x_adv)

    @property
    def clean_accuracy(self) -> float:
        """Fraction of the images that the model gets right as they are."""
        return float((self.stage != 0).mean())

    @property
    def robust_accuracy(self) -> float:
        """Fraction of the images that stand."""
        return float((self.stage == STANDS).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the robust accuracy."""
        return wilson_interval(int((self.stage == STANDS).sum()), len(self.stage))

    def by_stage(self) -> pd.DataFrame:
        """What each stage felled, and the accuracy that was left: a row a stage."""
        felled = [int((self.stage == number).sum()) for number in range(len(self.stages))]
        left = 1 - np.cumsum(felled) / len(self.stage)
        return pd.DataFrame({"stage": self.stages, "felled": felled, "robust_accuracy": left})

    def by_image(self) -> pd.DataFrame:
        """A row an image: its label, the stage that felled it, at what norm, and what that cost."""
        names = [*self.stages, ""]  # -1 is the last
        return pd.DataFrame(
            {
                "index": np.arange(len(self.stage)),
                "label": self.labels,
                "stage": [names[number] for number in self.stage],
                "distance": self.distance,
                "forward": self.forward,
                "backward": self.backward,
            }
        )

    def curve(self) -> pd.DataFrame:
        """Robust accuracy against the gradients spent on an image: where it is flat, more would not change it."""
        spent = np.where(self.stage == STANDS, np.iinfo(np.int64).max, self.backward)
        at = np.unique(np.append(self.backward, 0))
        accuracy = [float((spent > number).mean()) for number in at]
        return pd.DataFrame({"gradients": at, "robust_accuracy": accuracy})

    def summary(self) -> pd.DataFrame:
        """One row, under the names of the columns of `benchmark.csv`."""
        low, high = self.interval
        row = {
            "norm": self.norm,
            "eps": self.eps,
            "budget": self.budget,
            "n": len(self.stage),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_accuracy_low": low,
            "robust_accuracy_high": high,
            "forward_per_image": float(self.forward.mean()),
            "backward_per_image": float(self.backward.mean()),
            "seconds": self.seconds,
            "flags": "; ".join(self.flags),
            "model_digest": self.model_digest,
            "seed": self.seed,
            "versions": json.dumps(self.versions),
        }
        return pd.DataFrame([row])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `evaluation.csv`, `evaluation_stages.csv`, `evaluation_images.csv` and `evaluation_curve.csv`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name, frame in (
            ("evaluation", self.summary()),
            ("evaluation_stages", self.by_stage()),
            ("evaluation_images", self.by_image()),
            ("evaluation_curve", self.curve()),
        ):
            write_csv(frame, path / f"{name}.csv")

    def save_images(self, folder: str | os.PathLike[str]) -> None:
        """Write each adversarial image as `index.png`, in 8 bits, and all of them exactly in `x_adv.npy`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / "x_adv.npy", self.x_adv.cpu().numpy())
        for index in (self.stage > 0).nonzero()[0]:
            save_image(self.x_adv[index], path / f"{index}.png")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw robust accuracy against gradients spent."""
        from guardians.figures import plot_curve

        plot_curve(self.curve(), path)

    def __str__(self) -> str:
        low, high = self.interval
        lines = [f"{'stage':<14} {'felled':>6}  left"]
        lines += [f"{row.stage:<14} {row.felled:>6}  {row.robust_accuracy:.1%}" for row in self.by_stage().itertuples()]
        lines += [
            f"robust accuracy {self.robust_accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}) of "
            f"{len(self.stage)} images, norm {self.norm:g}, eps {self.eps:.4g}, budget {self.budget}",
            f"{self.backward.mean():.1f} gradients an image, {self.seconds:.1f} s",
        ]
        return "\n".join(lines + [f"! {flag}: {FLAGS[flag]}" for flag in self.flags])


def evaluate(
    model: nn.Module | PyTorchClassifier,
    images: Tensor | np.ndarray | Dataset | LazyDataset,
    labels: Tensor | np.ndarray | None = None,
    *,
    norm: float | str = np.inf,
    eps: float | Sequence[float] = 8 / 255,
    budget: str = "standard",
    batch_size: int | None = None,
    seed: int = 0,
    surrogates: Sequence[nn.Module | PyTorchClassifier] = (),
    out: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    first_index: int = 0,
    shard: int | None = None,
) -> Evaluation | list[Evaluation]:
    """How robust a model is to perturbations of norm at most `eps`, as strictly as AutoAttack and much sooner.

    A cascade: each attack is run on what the ones before it left.

    | budget | attacks |
    | --- | --- |
    | fast | the images as they are; `MALT`: 3 untargeted steps, then 9 at each class within two radii |
    | standard | `MALT` at each class within three radii, with longer searches and random starts where the margin is
        nearly gone; APGD on cross-entropy and Square, each on a sample of what stands, and on all of it where that
        finds anything |
    | thorough | the same with all of `MALT`'s searches, none of which is given up; and all of AutoAttack |

    In norm 1 APGD on the margin is in the place of `MALT`, 30 steps untargeted, then 50 at each of nine classes.

    A random model is attacked through the mean gradient of several draws, and judged by draws that chose nothing; APGD
    gives way to 40 steps of PGD on cross-entropy, on all that stands. Where gradients are zero or missing, what
    transfers and Square come first.

    Args:
        model: `nn.Module` that returns logits for images in [0, 1], or ART `PyTorchClassifier`.
        images: (N, C, H, W) within `clip_values`; or a data set, see `guardians.data`, for models of images in [0, 1].
        labels: true labels (N,), or one-hot rows; None where a data set has them.
        norm: 1, 2, inf or "inf".
        eps: radius, or several, of which a larger one takes over what a smaller one has fooled.
        budget: "fast", "standard" or "thorough".
        batch_size: images in one forward pass; None chooses it.
        seed: of the draws; those of an image depend on it and the image's position alone.
        surrogates: other models, whose adversarial images (APGD on the margin, 40 steps in the same ball) are tried on
            this one, on a sample first where gradients are of use. Their gradients are not counted.
        out: folder in which an evaluation that is interrupted leaves what it knows, and from which the same call goes
            on.
        verbose: show a progress bar.
        first_index: the position of the first image in the data, on which draws depend.
        shard: images of a data set that are in memory at once, and go through the whole cascade before the next; the
            adversarial images are not kept. None takes all of a data set in memory, and 1,024 of a lazy one.

    Returns:
        The evaluation; of several `eps` a list, in their order.

    Raises:
        EstimatorError, TypeError, ValueError: an argument is outside what is allowed; checked before any work.
    """
    radii = np.atleast_1d(np.asarray(eps, dtype=float)).tolist()
    if not radii:
        raise ValueError("eps=[]: must be a number above 0, or several")
    for radius in radii:
        check_number("eps", radius, low=0, exclusive=True, single=True)
    check_choice("norm", as_norm(norm), (1.0, 2.0, np.inf))
    check_choice("budget", budget, BUDGETS)
    check_seed("seed", seed)
    check_integer("first_index", first_index, low=0)
    check_shareable(Victim(model).module)
    if shard is not None:
        check_integer("shard", shard, low=1)
    run: dict[str, Any] = {"norm": as_norm(norm), "budget": budget, "batch_size": batch_size, "seed": seed}
    run |= {"surrogates": surrogates, "out": out, "verbose": verbose}
    if isinstance(images, (Dataset, LazyDataset)):
        if labels is not None:
            raise ValueError("labels are given, and the data set has some: must be None")
        if shard is not None or isinstance(images, LazyDataset):
            found = _in_shards(model, images, shard or _SHARD, first_index, radii, run)
            return found[0] if np.ndim(eps) == 0 else found
        labels = images.labels
        images = images.as_floats().to(Victim(model).device or "cpu")
    elif shard is not None:
        raise ValueError(f"shard={shard}: is of a data set, images of type {type(images).__name__} are in memory")
    inputs = checked_inputs(model, images, labels)
    check_surrogates(surrogates, Victim(model), inputs)
    found = _in_balls(model, inputs, radii, first_index=first_index, keeps_images=True, **run)
    return found[0] if np.ndim(eps) == 0 else found


def _in_balls(model: Any, inputs: dict[str, Tensor], radii: list[float], **run: Any) -> list[Evaluation]:
    """An evaluation for each radius, of which a larger one takes over what a smaller one has fooled."""
    found: dict[float, Evaluation] = {}
    for radius in sorted(set(radii)):
        smaller = list(found.values())[-1] if found else None
        found[radius] = _Run(model, inputs, radius, **run).evaluation(smaller)
    return [found[radius] for radius in radii]


def _in_shards(
    model: Any, data: Dataset | LazyDataset, size: int, first_index: int, radii: list[float], run: dict[str, Any]
) -> list[Evaluation]:
    """The same of parts of the data that pass one after the other, or are dealt to several processes."""
    device = Victim(model).device or torch.device("cpu")

    def inputs_of(part: slice) -> dict[str, Tensor]:
        images = data[part]
        return checked_inputs(model, images.as_floats().to(device), images.labels)

    check_surrogates(run["surrogates"], Victim(model), inputs_of(slice(0, 1)) | {"y": data.labels})

    def evaluated(first: int) -> Iterator[tuple[tuple[int, list[Evaluation]], None]]:
        position = {"first_index": first_index + first, "keeps_images": len(radii) > 1}
        with alone():
            found = _in_balls(model, inputs_of(slice(first, first + size)), radii, **position, **run)
        for evaluation in found:
            evaluation.ledger.x_adv = evaluation.ledger.x_adv[:0].cpu()
        yield (first, found), None

    shards: dict[int, list[Evaluation]] = {}
    is_quiet = not (run["verbose"] and ranks().is_first)
    with tqdm(total=len(data), desc="data", unit="image", disable=is_quiet) as bar:
        for (first, found), _ in deal(range(0, len(data), size), evaluated):
            shards[first] = found
            bar.update(len(found[0].labels))
    return [_merged(list(of_radius)) for of_radius in zip(*(shards[first] for first in sorted(shards)), strict=True)]


def _merged(parts: list[Evaluation]) -> Evaluation:
    """The evaluation of all images that parts are of, in their order; without the adversarial images."""
    stages = list(dict.fromkeys(name for part in parts for name in part.stages))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part.ledger, name) for part in parts])

    ledger = Ledger.of(parts[0].x_adv)
    for name in _SAVED:
        setattr(ledger, name, joined(name))
    numbers = [np.array([*map(stages.index, part.stages), STANDS], dtype=np.int16) for part in parts]
    ledger.stage = np.concatenate([of[part.stage] for of, part in zip(numbers, parts, strict=True)])
    for part in parts:
        ledger.report.add(part.ledger.report)
    merged = replace(
        parts[0],
        labels=np.concatenate([part.labels for part in parts]),
        stages=stages,
        ledger=ledger,
        distance=np.concatenate([part.distance for part in parts]),
        seconds=sum(part.seconds for part in parts),
        flags=[name for name in FLAGS if name in _OF_THE_MODEL and any(name in part.flags for part in parts)],
    )
    merged.flags += _flags_of(merged)
    return merged


def _flags_of(evaluation: Evaluation) -> list[str]:
    """What the outcome adds to the flags of the model."""
    flags, stage, ledger = [], evaluation.stage, evaluation.ledger
    if ledger.report.is_random:
        flags.append("random")
    if ledger.report.depends_on_batch:
        flags.append("depends on batch")
    if (stage == 0).all():
        flags.append("all wrong")
    blind = ("square", "aa-square", "transfer")
    black_box = [number for number, name in enumerate(evaluation.stages) if name.startswith(blind)]
    if not {"no gradient", "vanishing gradients"} & set(evaluation.flags) and np.isin(stage, black_box).any():
        flags.append("gradient masking")
    late = (stage > 0) & (evaluation.backward > 2 / 3 * evaluation.backward.max())
    if ledger.stands.any() and late.mean() > 0.01:
        flags.append("not converged")
    return flags


class Cascade(AttackSequence):
    """`evaluate` as an attack in one ball.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `evaluate`.
        norm: 1, 2, inf or "inf".
        eps: radius.
        budget: "fast", "standard" or "thorough".
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        seed: of the draws.

    Attributes:
        evaluation: what the last call found; None before the first.
        ledger, stages: the same by image, see `AttackSequence`.

    Raises:
        EstimatorError, TypeError, ValueError: see `ClassifierAttack`.
    """

    estimator: Estimator
    norm: CommonNorm = np.inf
    eps: Positive = 0.3
    budget: Annotated[str, partial(check_choice, known=BUDGETS)] = "standard"
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    seed: Seed = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.evaluation: Evaluation | None = None

    def _run(self, inputs: dict[str, Tensor], device: torch.device, first_index: int) -> Tensor:
        run: dict[str, Any] = {
            "norm": self.norm,
            "eps": float(self.eps),
            "budget": self.budget,
            "batch_size": self.batch_size,
        }
        seed = fresh_seed() if self.seed is None else int(self.seed)
        run |= {"seed": seed, "verbose": self.verbose, "first_index": first_index}
        found = evaluate(self.estimator, inputs["x"], self._labels(inputs, device), **run)
        assert isinstance(found, Evaluation)
        self.evaluation, self.stages, self.ledger = found, found.stages, found.ledger
        self.report = found.ledger.report
        return found.ledger.x_adv


def _native(spec: Spec) -> tuple[type[Cascade], dict[str, Any]]:
    return Cascade, {"norm": spec.norm, "eps": spec.eps, **spec.arguments("budget")}


register(Family("evaluate", (np.inf, 2, 1), ("budget",), _native))


class _Run:
    """One evaluation in one ball; one that is complete leaves its adversarial images on disk if it `keeps_images`."""

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        eps: float,
        *,
        norm: float,
        budget: str,
        batch_size: int | None,
        seed: int,
        surrogates: Sequence[Any],
        out: str | os.PathLike[str] | None,
        verbose: bool,
        first_index: int,
        keeps_images: bool,
    ) -> None:
        self.x, self.y, self.first_index, self.keeps_images = inputs["x"], inputs["y"], first_index, keeps_images
        self.norm, self.eps, self.budget, self.seed, self.verbose = norm, eps, budget, seed, verbose
        self.distance: np.ndarray | None = None
        self.digest, self.surrogates = digest(Victim(model).module), surrogates
        self.flags: list[str] = []
        self.model, self.has_gradients = self._examined(model)
        self.device = Victim(self.model).device or self.x.device
        settled = Judgement(self.model, batch_size=batch_size).settled_batch_size(self.x)
        self.common: dict[str, Any] = {"batch_size": settled, "seed": seed, "verbose": False}
        self._file = None if out is None else Path(out) / f"evaluation-{self._key()}.npz"

    def _key(self) -> str:
        parts: list[Any] = [self.digest, self.norm, self.eps, self.budget, self.seed, self.first_index]
        parts += [self.keeps_images, __name__, 3]
        parts += [digest(Victim(surrogate).module) for surrogate in self.surrogates]
        state = hashlib.sha256(json.dumps(parts).encode())
        for tensor in (self.x, self.y):
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:12]

    def _examined(self, model: Any) -> tuple[Any, bool]:
        """The model to attack, and whether its gradients are of use."""
        victim = Victim(model)
        x = self.x[:_PROBED].to(victim.device or self.x.device)
        y = self.y[:_PROBED].to(x.device)
        with undisturbed(victim.module), isolated(x.device), ForkedGenerators(self.seed, x.device):
            logits = victim.logits(x)
            sums = logits.double().sum(1)
            are_probabilities = bool((logits >= 0).all() and ((sums - 1).abs() < 1e-3).all())
            if are_probabilities:
                self.flags.append("probabilities")
                if isinstance(model, nn.Module):
                    model = _LogOf(model)
                    victim = Victim(model)
            gradient = margin_gradient(victim, x, y)
        if gradient is None:
            self.flags.append("no gradient")
            return model, False
        vanish = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
        if vanish >= 0.5:
            self.flags.append("vanishing gradients")
        return model, vanish < 1

    def _stages(self, classes: int, is_random: bool) -> list[Stage]:
        """All but the first."""
        ball: dict[str, Any] = {"norm": self.norm, "eps": self.eps}
        common = {**self.common, **ball, "early_stop": True}
        if is_random:
            module = Victim(self.model).module
            averaged = module.passes if isinstance(module, RandomEnsemble) else 1
            common["eot_samples"] = math.ceil(_EOT_SAMPLES[self.budget] / averaged)

        def square(queries: int, *, sampled: bool = False) -> Stage:
            options = {key: value for key, value in common.items() if key != "eot_samples"}
            return Stage("square", Square(self.model, **options, max_iter=queries), sampled)

        def transfer(*, sampled: bool = False) -> list[Stage]:
            judgement = Judgement(self.model, **self.common, early_stop=True)
            names = [f"transfer-{number}" for number in range(1, len(self.surrogates) + 1)]
            options = {**self.common, **ball, "batch_size": None}  # which is the surrogates' own
            return [
                Stage(name, judgement, sampled, transfer_attack(surrogate, **options))
                for name, surrogate in zip(names, self.surrogates, strict=True)
            ]

        if not self.has_gradients:
            return [*transfer(), square(_QUERIES[self.budget])]
        vanish = "vanishing gradients" in self.flags
        stages = [*transfer(), square(_QUERIES[self.budget])] if vanish else []
        if self.norm == 1:  # where steps are long ways along few pixels, and no early margin says where they end
            margin_apgd = partial(APGD, self.model, **common, loss_type="margin", nb_random_init=0)
            gradients = [Stage("apgd", margin_apgd(max_iter=30))]
            if self.budget != "fast":
                gradients.append(Stage("apgd-t", margin_apgd(max_iter=50, n_targets=9)))
        else:
            longer = {"long_iter": 50, "num_random_init": 3, "hope": _HOPE} if self.budget != "fast" else {}
            limits = {"hopeless": _HOPELESS.get(self.budget), "reach": _REACH.get(self.budget)}
            options = {**common, **longer, **limits}
            gradients = [Stage("malt", MALT(self.model, **options, max_iter=9, n_targets=9))]
        stages += gradients
        if not vanish:
            stages += transfer(sampled=True)
        if self.budget == "fast":
            return stages
        if is_random:  # in whose noise APGD cannot tell whether the loss has risen
            stages.append(Stage("pgd", PGD(self.model, **common, eps_step=self.eps / 4, max_iter=40)))
        else:
            ce: dict[str, Any] = {"max_iter": 20, "loss_type": "cross_entropy", "nb_random_init": 1}
            stages.append(Stage("apgd-ce", APGD(self.model, **common, **ce), sampled=True))
        if not vanish:
            stages.append(square(_SAMPLE_QUERIES, sampled=True))
        if self.budget == "thorough":
            attack = "rand" if is_random else "standard"
            rest = auto_attack_stages(self.model, **ball, version=attack, nb_classes=classes, **self.common)
            stages += [Stage(f"aa-{stage.name}", stage.attack) for stage in rest]
        return stages

    def evaluation(self, smaller: Evaluation | None) -> Evaluation:
        """Run the cascade; `smaller` is what it found in a smaller ball."""
        ledger = self._begun()
        clean = Stage(CLEAN, Judgement(self.model, **self.common, early_stop=True))
        self._run_stage(0, clean, ledger)
        victim = clean.attack.victim
        stages = [clean, *self._stages(victim.nb_classes or 2, ledger.report.is_random)]
        if self.distance is None:
            self._attack(stages, ledger, smaller)
            self.distance = agreed(lambda: self._distance(ledger))
            self._save(ledger)
        evaluation = Evaluation(
            norm=self.norm,
            eps=self.eps,
            budget=self.budget,
            labels=self.y.cpu().numpy(),
            stages=[stage.name for stage in stages],
            ledger=ledger,
            distance=self.distance,
            seconds=time.perf_counter() - self._started,
            flags=self.flags,
            model_digest=self.digest,
            seed=self.seed,
            versions={package.__name__: package.__version__ for package in (guardians, torch, art)},
        )
        evaluation.flags += _flags_of(evaluation)
        return evaluation

    def _attack(self, stages: list[Stage], ledger: Ledger, smaller: Evaluation | None) -> None:
        """Run all stages but the first."""
        if smaller is not None:
            fooled = ledger.stands & (smaller.stage != STANDS)
            ledger.stage[fooled] = smaller.stage[fooled]
            rows = torch.from_numpy(fooled).to(self.x.device)
            ledger.x_adv[rows] = smaller.x_adv[rows]
        for number, stage in enumerate(stages[1:], 1):
            if stage.sampled:
                reached = (ledger.stands | (ledger.stage >= number)).nonzero()[0]
                self._run_stage(number, stage, ledger, reached[: max(4, min(64, len(reached) // 16))])
            if not stage.sampled or (ledger.stage == number).any():
                self._run_stage(number, stage, ledger)
        fresh = self.common | {"seed": self.seed + 1}
        judge_again(self.model, self.x, self.y, ledger, first_index=self.first_index, **fresh)

    def _distance(self, ledger: Ledger) -> np.ndarray:
        """Norms of the perturbations (N,); NaN where none fooled the model."""
        size = lp_norm(ledger.x_adv.double() - self.x.double(), self.norm).flatten().cpu().numpy()
        return np.where(ledger.stands, np.nan, size)

    def _run_stage(self, number: int, stage: Stage, ledger: Ledger, among: np.ndarray | None = None) -> None:
        saved = time.perf_counter()
        total = len(ledger.waiting(number)) if among is None else len(among)
        options: dict[str, Any] = {"eps": self.eps, "device": self.device, "first_index": self.first_index}
        with tqdm(total=total, desc=stage.name, unit="image", disable=not self.verbose, leave=False) as bar:
            try:
                for count in run_stage(number, stage, self.x, self.y, ledger, among=among, **options):
                    bar.update(count)
                    bar.set_postfix_str(f"robust accuracy {ledger.stands.mean():.1%}")
                    if time.perf_counter() - saved > _SAVED_EVERY:
                        saved = time.perf_counter()
                        self._save(ledger)
            finally:
                self._save(ledger)

    def _begun(self) -> Ledger:
        """What an interrupted run left; the clock goes on from there."""
        ledger, images = Ledger.of(self.x), None

        def read() -> dict[str, np.ndarray] | None:
            nonlocal images
            if self._file is None or not self._file.exists():
                return None
            with np.load(self._file) as file:
                images = file.get("x_adv")
                return {name: file[name] for name in file.files if name != "x_adv"}

        saved = agreed(read)
        self._started = time.perf_counter()
        if saved is not None:
            for name in _SAVED:
                getattr(ledger, name)[:] = saved[name]
            ledger.report.is_random, ledger.report.depends_on_batch = map(bool, saved["report"])
            self._started -= float(saved["seconds"])
            self.distance = saved.get("distance")
        if images is not None:
            ledger.x_adv[torch.from_numpy(~ledger.stands).to(self.x.device)] = torch.from_numpy(images).to(self.x)
        return ledger

    def _save(self, ledger: Ledger) -> None:
        if self._file is None or not ranks().is_first:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        saved = {name: getattr(ledger, name) for name in _SAVED}
        saved["report"] = np.array([ledger.report.is_random, ledger.report.depends_on_batch])
        saved["seconds"] = np.array(time.perf_counter() - self._started)
        if self.distance is not None:
            saved["distance"] = self.distance
        if self.distance is None or self.keeps_images:
            saved["x_adv"] = ledger.x_adv[torch.from_numpy(~ledger.stands).to(self.x.device)].cpu().numpy()
        unfinished = self._file.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            np.savez(file, **saved)
        unfinished.replace(self._file)


class _LogOf(nn.Module):
    """Logits of a model that returns probabilities: their logarithms."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, ...)."""
        probabilities: Tensor = self.module(x)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def transfer_attack(surrogate: nn.Module | PyTorchClassifier, **options: Any) -> APGD:
    """What makes images on another model that are then tried on the one that is attacked; `options` are of `APGD`."""
    return APGD(surrogate, **options, loss_type="margin", max_iter=40, nb_random_init=0)


def check_surrogates(surrogates: Sequence[Any], victim: Victim, inputs: dict[str, Tensor]) -> None:
    """Raise where one cannot be attacked on these images, or allows others than the model does."""
    if isinstance(surrogates, nn.Module) or not isinstance(surrogates, Sequence):
        raise TypeError(f"surrogates of type {type(surrogates).__name__}: must be a list of models")
    for number, surrogate in enumerate(surrogates):
        if not isinstance(surrogate, (nn.Module, PyTorchClassifier)):
            raise TypeError(
                f"surrogates[{number}] of type {type(surrogate).__name__}: must be an nn.Module or PyTorchClassifier"
            )
        other = Victim(surrogate)
        bounds = [[bound.tolist() for bound in one.clip_values or ()] for one in (other, victim)]
        if bounds[0] != bounds[1]:
            raise ValueError(f"surrogates[{number}] has clip_values {bounds[0]}: must be the model's, {bounds[1]}")
        x = inputs["x"][:1].to(other.device or inputs["x"].device)
        with undisturbed(other.module), isolated(x.device), torch.no_grad():
            classes = other.logits(x).shape[1]
        if inputs["y"].max() >= classes:
            raise ValueError(f"surrogates[{number}] has {classes} classes: labels go up to {int(inputs['y'].max())}")


def checked_inputs(model: Any, images: Any, labels: Any) -> dict[str, Tensor]:
    """Images "x" and labels "y", as an attack checks them."""
    attack: Attack = Judgement(model)
    x = images if isinstance(images, Tensor) else attack._from_array("images", images)
    if labels is None:
        raise ValueError("labels=None: must be the true labels (N,)")
    return attack._checked_inputs(x, labels, {})
