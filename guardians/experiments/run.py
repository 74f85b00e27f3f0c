"""A run: an attack of an implementation on a subject and its data; how it is told from others, and how it is done."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import guardians
from guardians.attacks.norms import lp_norm
from guardians.attacks.registry import Spec, family_of
from guardians.attacks.sequence import AttackSequence, units_of
from guardians.data import Dataset
from guardians.engine.attack import Attack
from guardians.engine.interfaces import ClassifierAttack
from guardians.engine.ranks import agreed, check_shareable, deal, ranks
from guardians.engine.report import Finished, Report
from guardians.engine.rng import hashed, row_keys
from guardians.engine.victim import Victim, undisturbed
from guardians.experiments.counting import CountingModel, peak_memory
from guardians.experiments.store import OUTCOME_COLUMNS, Store
from guardians.experiments.subject import Subject
from guardians.experiments.timing import bare_loop, forward_backward, price
from guardians.toolkits.build import build_attack, build_prediction

__all__ = ["BARE_LOOP", "IDENTITY", "Run", "code", "key_of", "perform"]

IDENTITY = (
    "model_digest",
    "data_digest",
    "spec",
    "implementation",
    "batch_size",
    "seed",
    "options",
    "device",
    "repetition",
)
"""What tells a run from others."""

BARE_LOOP = "bare loop"
"""In the place of an implementation: forward and backward passes alone, as many as the attack has steps."""

_SAVED_EVERY = 30.0
"""Seconds after which what an attack has finished is on disk."""
_ZERO_GRADIENT_SHARE = 0.01
_NORMS = {"l1": 1.0, "l2": 2.0, "linf": np.inf}


@dataclass(frozen=True, eq=False)
class Run:
    """One attack on one subject.

    Attributes:
        subject: in evaluation mode or not; it comes back as it was.
        data: images and labels.
        attack: None for the subject's predictions of the images as they are.
        implementation: whose code runs.
        batch_size: images in one forward pass.
        seed: of the draws of attack and defence.
        options: of a native attack: early_stop, precision and eot_samples.
        source: what the attack asks, where that is not the subject, by which its images are judged all the same.
        device: of the subject.
        repetition: number, from 1, of a run that is made several times for its time; 0 for others.
    """

    subject: Subject
    data: Dataset
    attack: Spec | None
    implementation: str
    batch_size: int = 128
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    repetition: int = 0
    source: Subject | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that can change the answer, which names and paths cannot."""
        return {
            "model_digest": self.subject.digest,
            "data_digest": self.data.digest,
            "spec": None if self.attack is None else json.loads(self.attack.json),
            "implementation": self.implementation,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "options": dict(self.options) | ({} if self.source is None else {"source": self.source.digest}),
            "device": _name_of(self.device),
            "repetition": self.repetition,
        }

    @cached_property
    def key(self) -> str:
        """The first digits of a SHA-256 digest of the identity."""
        return key_of(self.identity)

    @cached_property
    def known(self) -> dict[str, Any]:
        """The identity, and the names under which tables show it."""
        return {
            **self.identity,
            "model": self.subject.name,
            "defence": self.subject.defence,
            "data": self.data.identity,
            "attack": "clean" if self.attack is None else self.attack.name,
            "n": len(self.data),
        }


def key_of(identity: Mapping[str, Any]) -> str:
    """The key of a run with this identity."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]


def perform(runs: Sequence[Run], store: Store | None, *, verbose: bool = True) -> bool:
    """Do the runs that the store does not have, each once, whoever else works on the same store.

    What another process is at is waited for at the end. Ctrl-C leaves in the store what is finished, of a native attack
    image by image, and the same call goes on from there.

    Of several processes (`guardians.engine.ranks`) all call this with the same runs. They share the images of native
    attacks; other runs are one process' each.

    Args:
        runs: in the order in which they are done.
        store: None in processes that do not write.
        verbose: show a progress bar.

    Returns:
        Whether Ctrl-C ended it.

    Raises:
        ValueError: several processes share runs that are repeated for their time, or a model that is sharded over them.
    """
    made_by = code()
    for subject in {run.subject for run in runs}:
        check_shareable(subject.base)
    if ranks().size > 1 and any(run.repetition for run in runs):
        raise ValueError(f"{ranks().size} processes: times are compared, which one process alone can measure")
    try:
        with tqdm(runs, desc="runs", unit="run", disable=not verbose) as progress:
            if ranks().size > 1:
                for each in _deal(runs, store, made_by):
                    progress.update(each)
                runs = [run for run in runs if _is_shared(run)]
            postponed = [run for run in runs if not _perform_once(run, store, made_by, progress)]
        for run in postponed:
            _perform_once(run, store, made_by, None, wait=True)
    except KeyboardInterrupt:
        return True
    return False


def _is_shared(run: Run) -> bool:
    """Whether several processes do it together, rather than one of them alone."""
    spec = run.attack
    if spec is None or run.implementation != "native":
        return False
    return issubclass(family_of(spec).native(spec)[0], (Attack, AttackSequence))


def _deal(runs: Sequence[Run], store: Store | None, made_by: dict[str, Any]) -> Iterator[int]:
    """Do the runs that are one process' each; counts what is done."""
    whole = [run for run in runs if not _is_shared(run)]
    missing = agreed(lambda: [store is not None and run.key not in store for run in whole])

    def done(run: Run) -> Iterator[tuple[tuple[Any, ...], None]]:
        written: list[tuple[Any, ...]] = []
        _Performance(run, made_by, [], lambda *result, **_: written.append(result)).perform()
        yield written[-1], None

    for result, _ in deal([run for run, is_missing in zip(whole, missing, strict=True) if is_missing], done):
        if store is not None:
            store.write(*result)
        yield 1


def _perform_once(run: Run, store: Store | None, made_by: dict[str, Any], progress: Any, *, wait: bool = False) -> bool:
    """Whether the run is done; False where another process is at it."""

    def is_done() -> bool:
        return store is not None and run.key in store

    if agreed(is_done):
        return _counted(progress)
    with nullcontext(False) if store is None else store.claim(run.key, wait=wait) as claimed:
        if not agreed(lambda: claimed):
            return False
        if not agreed(is_done):
            if progress is not None:
                progress.set_postfix_str(f"{run.known['attack']} {run.implementation} on {run.subject.name}")
            known = agreed(lambda: [] if store is None else store.runs([run.key], unfinished=True))
            for one in known:
                one["outcomes"] = agreed(lambda: pd.DataFrame() if store is None else store.outcomes(run.key))
            with torch.inference_mode(False), torch.enable_grad():
                _Performance(run, made_by, known, _ignored if store is None else store.write).perform()
    return _counted(progress)


def _counted(progress: Any) -> bool:
    if progress is not None:
        progress.update()
    return True


def _ignored(*_: Any, **__: Any) -> None:
    """What a process does with a result that another one writes."""


class _Performance:
    """A run that is being done.

    Args:
        run: to do.
        made_by: see `code`.
        known: at most one, what a call that was stopped has written, with its "outcomes".
        write: takes key, what is known, figures and outcomes, as `Store.write`.
    """

    def __init__(
        self, run: Run, made_by: dict[str, Any], known: Sequence[dict[str, Any]], write: Callable[..., Any]
    ) -> None:
        self.run, self.made_by, self.before, self.write = run, made_by, known, write
        self.about = _about(run.subject, run.data, run.device, run.batch_size)
        self.setting: dict[str, Any] = {
            "nb_classes": self.about.nb_classes,
            "input_shape": tuple(self.about.x.shape[1:]),
            "batch_size": run.batch_size,
        }
        self.flags: set[str] = set()

    def perform(self) -> None:
        """Do it, and write it."""
        run, about = self.run, self.about
        module = self._asked()
        with undisturbed(module):
            if run.attack is None:
                self._predict(module)
                return
            about.prepare(module)
            if run.implementation == BARE_LOOP:
                self._loop(module, run.attack.get("steps", 1))
                return
            counting = CountingModel(module)  # of which a native attack could make no cheaper copy
            asked = module if run.implementation == "native" else counting
            attack = build_attack(run.implementation, run.attack, asked, seed=run.seed, **self.setting, **run.options)
            if isinstance(attack, Attack):
                _Stream(self, attack).perform()
                return
            if run.implementation != "native":
                attack(about.x[:1], about.y[:1])  # some look at the model in their first call
                counting.reset()
            with _measured(run.device) as cost:
                x_adv = attack(about.x, about.y).detach()
        if _is_shared(run) and not ranks().is_first:  # which does not have the images
            return
        outcomes = self._judged(np.arange(len(about.x)), x_adv)
        if isinstance(attack, AttackSequence):
            ledger = attack.ledger
            assert ledger is not None
            names = np.array([*attack.stages, ""])  # the last where it stands
            outcomes = outcomes.assign(forward=ledger.forward, backward=ledger.backward, stage=names[ledger.stage])
        counted = attack.report if isinstance(attack, ClassifierAttack) and run.implementation == "native" else counting
        assert counted is not None
        self._write(outcomes, cost | _counts(counted))

    def _asked(self) -> nn.Module:
        """The subject, or the source, as an attack asks it; with all its passes where the attack's verdicts count."""
        run, spec = self.run, self.run.attack
        subject = run.source or run.subject
        if spec is None or (spec.toolkit is None and issubclass(family_of(spec).native(spec)[0], AttackSequence)):
            return subject.module(run.seed)
        return subject.attacked(run.seed)

    def _loop(self, module: nn.Module, steps: int) -> None:
        """The model's passes alone, of as many steps."""
        about, n = self.about, len(self.about.x)
        with _measured(self.run.device) as cost:
            bare_loop(module, about.x, about.y, steps, self.run.batch_size)
        counts = {"forward": steps * n, "backward": steps * n, "judgement": 0}
        self._write(self._judged(np.arange(n), about.x), cost | counts)

    def _predict(self, module: nn.Module) -> None:
        """The prediction path of an implementation."""
        run, x = self.run, self.about.x
        counting = CountingModel(module)
        predict = build_prediction(run.implementation, counting, **self.setting)
        predict(x[: run.batch_size])  # kernels are prepared
        counting.reset()
        found, rows = [], np.arange(len(x))
        with _measured(run.device) as cost:
            for first in range(0, len(x), run.batch_size):
                part = slice(first, first + run.batch_size)
                with row_keys(hashed(run.seed, 0, rows[part])):
                    found.append(predict(x[part]).argmax(1))
        predictions = torch.cat(found)
        self._write(self._outcomes(rows, x, predictions, predictions), cost | _counts(counting))

    def _judged(self, rows: np.ndarray, x_adv: Tensor) -> pd.DataFrame:
        """Outcomes of the images that an attack returned for these rows, and flags of what is wrong with them."""
        run, about = self.run, self.about
        x, spec = about.x[torch.from_numpy(rows)], run.attack
        assert spec is not None
        predictions = run.subject.predictions(x_adv, rows, run.batch_size, run.seed, 1)
        outcomes = self._outcomes(rows, x_adv, about.clean_predictions(run.seed)[torch.from_numpy(rows)], predictions)
        if x_adv.isnan().any():
            self.flags.add("nan")
        if spec.eps is not None:
            size = lp_norm(x_adv.double() - x.double(), spec.norm).flatten()
            if (size > _with_rounding(spec.eps, spec.norm, x[0].numel())).any():
                self.flags.add("outside_ball")
        if ((x_adv < 0) | (x_adv > 1)).any():
            self.flags.add("outside_clip")
        if about.zero_gradient_share > _ZERO_GRADIENT_SHARE:
            self.flags.add("zero_gradient")
        return outcomes

    def _outcomes(self, rows: np.ndarray, x_adv: Tensor, clean: Tensor, adversarial: Tensor) -> pd.DataFrame:
        """Columns `OUTCOME_COLUMNS` for the images of these rows."""
        x = self.about.x[torch.from_numpy(rows)]
        pairs = list(zip(x_adv.split(self.run.batch_size), x.split(self.run.batch_size), strict=True))
        norms = {
            name: torch.cat([lp_norm(one.double() - two.double(), p).flatten() for one, two in pairs]).cpu().numpy()
            for name, p in _NORMS.items()
        }
        columns = {
            "image": rows,
            "label": self.about.y.cpu().numpy()[rows],
            "clean_prediction": clean.cpu().numpy(),
            "adversarial_prediction": adversarial.cpu().numpy(),
            **norms,
        }
        return pd.DataFrame(columns).reindex(columns=list(OUTCOME_COLUMNS))

    def _write(self, outcomes: pd.DataFrame, cost: Mapping[str, Any], *, is_complete: bool = True) -> None:
        figures = {"search": "model", "flags": sorted(self.flags), **cost, **self.made_by}
        self.write(self.run.key, self.run.known, figures, outcomes, is_complete=is_complete)


class _Stream:
    """A native attack under way, which counts for itself; it goes on from where an earlier call was stopped.

    Attributes:
        found: outcomes of the images that are finished and judged.
        cost: of them, in passes and seconds.
        pieces: what is finished and not judged yet, with its rows in the data.
    """

    def __init__(self, performance: _Performance, attack: Attack) -> None:
        self.performance, self.attack = performance, attack
        self.run, self.about, self.flags = performance.run, performance.about, performance.flags
        self.found = [one["outcomes"] for one in performance.before]
        self.cost: dict[str, Any] = dict.fromkeys(("forward", "backward", "judgement", "seconds"), 0.0)
        for one in performance.before:
            self.cost |= {name: one[name] for name in self.cost}
            self.flags |= set(one["flags"])
        self.finished = np.concatenate([np.empty(0, dtype=np.int64), *(images["image"] for images in self.found)])
        self.pieces: list[tuple[np.ndarray, Finished]] = []
        self._counted: Counter[str] = Counter()  # of the unit under search, as far as it is judged
        self._started = time.perf_counter()

    def perform(self) -> None:
        """Attack what is missing, and write it now and then, and when it is complete."""
        run, about = self.run, self.about
        units = units_of(np.arange(len(about.x)), self.attack, about.x)
        missing = [unit for unit in units if len(np.setdiff1d(unit, self.finished))]
        with peak_memory(run.device) as peak:
            try:
                for piece, _ in deal(missing, self._searched):
                    self._take(*piece)
            except BaseException:
                if self.pieces and ranks().size == 1:  # of several, each has its own
                    self._take(*self._judged())
                raise
        figures: dict[str, Any] = {"peak_memory_mb": peak.mb}
        if run.repetition:
            full = about.x[: run.batch_size], about.y[: run.batch_size]
            counts = self.cost["forward"], self.cost["backward"], self.cost["judgement"]
            figures["price"] = price(self.attack, *full, counts)
        self._write(is_complete=True, **figures)

    def _searched(self, unit: np.ndarray) -> Iterator[tuple[Any, None]]:
        """What `_judged` says of the images of a unit that are missing, all _SAVED_EVERY seconds."""
        self._started = time.perf_counter()
        self._counted.clear()
        rows, about = np.setdiff1d(unit, self.finished), self.about
        parts = torch.from_numpy(rows).split(self.run.batch_size)
        inputs = [{"x": about.x[part], "y": about.y[part]} for part in parts]
        for piece in self.attack._search(inputs, self.run.device, first_index=rows):
            self.pieces.append((rows[piece.index], piece))
            if time.perf_counter() - self._started > _SAVED_EVERY:
                yield self._judged(), None
        yield self._judged(), None

    def _judged(self) -> tuple[pd.DataFrame, Counter[str], float, str, set[str]]:
        """Outcomes of the pieces, what they cost since this was last asked, in passes and seconds, search and flags."""
        report, seconds = self.attack.report, _since(self._started, self.run.device)
        assert report is not None
        new = Counter(_counts(report))
        new.subtract(self._counted)
        self._counted.update(new)
        outcomes = pd.DataFrame()
        if self.pieces:
            rows = np.concatenate([rows for rows, _ in self.pieces])
            x_adv = torch.cat([piece.x_adv for _, piece in self.pieces]).to(self.about.x.device)
            by_image = {
                name: np.concatenate([getattr(piece, name) for _, piece in self.pieces])
                for name in ("forward", "backward")
            }
            outcomes = self.performance._judged(rows, x_adv).assign(**by_image)
            self.pieces.clear()
        self._started = time.perf_counter()
        return outcomes, new, seconds, report.search, self.flags

    def _take(self, outcomes: pd.DataFrame, counts: Counter[str], seconds: float, search: str, flags: set[str]) -> None:
        """Keep and write what `_judged` says, here or in another process."""
        if len(outcomes):
            self.found.append(outcomes)
        self.flags |= flags
        self.cost.update({name: self.cost[name] + count for name, count in counts.items()}, search=search)
        self.cost["seconds"] += seconds
        self._write(is_complete=False)

    def _write(self, *, is_complete: bool, **figures: Any) -> None:
        outcomes = pd.concat(self.found, ignore_index=True)
        cost = {"peak_memory_mb": None, **self.cost, **figures}
        self.performance._write(outcomes, cost, is_complete=is_complete)


class _About:
    """What the runs on one subject and its data share."""

    def __init__(self, subject: Subject, data: Dataset, device: torch.device, batch_size: int) -> None:
        self.subject, self.batch_size = subject, batch_size
        self.x, self.y = data.as_floats().to(device), data.labels.to(device)
        with undisturbed(subject.base), torch.no_grad():
            self.nb_classes = Victim(subject.base).logits(self.x[:1]).shape[1]
        if data.labels.min() < 0 or data.labels.max() >= self.nb_classes:
            span = f"{int(data.labels.min())} to {int(data.labels.max())}"
            raise ValueError(f"data has labels from {span}: the model has {self.nb_classes} classes")
        self._clean: dict[int, Tensor] = {}

    def clean_predictions(self, seed: int) -> Tensor:
        """Of the images as they are, by draws that no attack has seen."""
        if self.subject.make is None:
            seed = 0
        if seed not in self._clean:
            rows = np.arange(len(self.x))
            self._clean[seed] = self.subject.predictions(self.x, rows, self.batch_size, seed, 0)
        return self._clean[seed]

    def prepare(self, module: nn.Module) -> None:
        """Pass a batch through a module: kernels are chosen and memory is there before anything is timed."""
        forward_backward(module, self.x[: self.batch_size], self.y[: self.batch_size])

    @cached_property
    def zero_gradient_share(self) -> float:
        """Fraction of the images at which the gradient of the loss is zero in every pixel."""
        module, zero = self.subject.attacked(0), 0
        with undisturbed(module):
            for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
                zero += int((forward_backward(module, x, y) == 0).flatten(1).all(1).sum())
        return zero / len(self.x)


_about = functools.lru_cache(maxsize=4)(_About)


@contextmanager
def _measured(device: torch.device) -> Iterator[dict[str, Any]]:
    """The seconds and the peak memory that a block takes, known after it."""
    cost: dict[str, Any] = {}
    with peak_memory(device) as peak:
        started = time.perf_counter()
        yield cost
        cost["seconds"] = _since(started, device)
    cost["peak_memory_mb"] = peak.mb


def _since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _counts(counted: Report | CountingModel) -> dict[str, int]:
    """Samples forward, backward and for judgement."""
    if isinstance(counted, CountingModel):
        return {"forward": counted.forward_samples, "backward": counted.backward_samples, "judgement": 0}
    return {
        "forward": counted.search_forward,
        "backward": counted.search_backward,
        "judgement": counted.judgement_forward,
    }


def _with_rounding(eps: float, norm: float, pixels: int) -> float:
    """The radius, and what float32's rounding of the pixels and of a norm may add to it."""
    return float(eps * (1 + 1e-6) + torch.finfo(torch.float32).eps * pixels ** (1 / norm))


def _name_of(device: torch.device) -> str:
    return device.type if device.type != "cuda" else f"cuda ({torch.cuda.get_device_name(device)})"


def code() -> dict[str, Any]:
    """Whose answers they are: versions of the packages, and the commit of this one."""
    return {"versions": _versions(), "commit": _commit()}


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "guardians": guardians.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "art": version("adversarial-robustness-toolbox"),
        "torchattacks": version("torchattacks"),
        "foolbox": version("foolbox"),
    }


def _commit(package: Path = Path(guardians.__file__).parent) -> str:
    """Of the package's source tree, with -dirty where tracked files of it differ; empty where it is in none."""
    # Git says in these, as within its hooks, which repository a command is for.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "env": environment}
        return subprocess.run(command, check=True, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed package may lie within a repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
