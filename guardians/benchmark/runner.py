"""The benchmark: every attack in every toolkit on the same model and the same images, one row of a table each."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

import guardians
from guardians.attacks.norms import as_norm
from guardians.attacks.registry import Spec, canonical, named, usages
from guardians.benchmark.counting import CountingModel, peak_memory
from guardians.benchmark.statistics import wilson_interval
from guardians.data import Dataset
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_flag, check_integer, check_number
from guardians.engine.parameters import PRECISIONS
from guardians.engine.victim import Victim, predicted_labels, undisturbed
from guardians.models import digest
from guardians.tables import BENCHMARK_COLUMNS, Table, as_written
from guardians.toolkits.base import TensorAttack
from guardians.toolkits.build import IMPLEMENTATIONS, build_attack, build_prediction, is_available, is_installed

__all__ = ["ATTACKS", "KEY", "outcome_path", "run_benchmark", "summarise"]

logger = logging.getLogger(__name__)

ATTACKS = ("clean", "FGSM", "PGD-10", "PGD-40")
"""Those that run unless others are asked for."""

KEY = """
    model model_digest data defence attack implementation norm eps steps params eot n seed device precision
""".split()  # noqa: SIM905
"""The columns of benchmark.csv that identify a row: what was run on what, whatever the versions and the commit."""

_ZERO_GRADIENT_SHARE = 0.01
_WEAKEST = "FGSM"
"""No other attack in the same ball should be weaker."""


@dataclass(frozen=True)
class _Job:
    """One row to be measured.

    Attributes:
        implementation: of `IMPLEMENTATIONS`.
        spec: the attack; None for clean.
        options: `early_stop` and `precision` of a native attack.
        known: the columns that are known before.
    """

    implementation: str
    spec: Spec | None
    options: dict[str, Any]
    known: dict[str, Any]


@dataclass(frozen=True)
class _Measured:
    """What an attack, or a prediction of clean images, did.

    Attributes:
        result: adversarial images (M, ...), or logits (M, classes) of clean ones.
        rows: their positions in the data, int64 (M,) in ascending order; a slice for all of them.
        cost: samples forward, backward and for judgement, seconds and peak_memory_mb.
        search: the model that was asked.
        interrupted: whether Ctrl-C ended it.
    """

    result: Tensor
    rows: Tensor | slice
    cost: dict[str, float]
    search: str = "model"
    interrupted: bool = False


def run_benchmark(
    model: nn.Module,
    data: Dataset,
    *,
    model_name: str,
    out: str | os.PathLike[str],
    attacks: Sequence[str] = ATTACKS,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    norm: float | str = np.inf,
    eps: float = 8 / 255,
    eps_step: float | None = None,
    random_start: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    device: torch.device | str | None = None,
    early_stop: bool = True,
    precision: str = "auto",
    verbose: bool = True,
) -> pd.DataFrame:
    """Run attacks of several toolkits on the same images, and append a row for each to `out/benchmark.csv`.

    Each attack runs once on a batch for warm-up and then, timed and counted, on all images. Its images are judged by
    the model itself, in evaluation mode and float32. The predictions and perturbation norms of the single images go to
    `out/outcomes`, see `outcome_path`. A row that is on disk is not run again, so a killed run is continued by the same
    call; rows that other versions or commits made are kept with a warning.

    "clean" rows hold the predictions on the images as they are, each through the implementation's own prediction path.

    Ctrl-C (`KeyboardInterrupt`) ends the run but not the program: what is finished comes back. A native attack that it
    stops has a last row of its own, of the images that were finished by then, with the flag "interrupted"; it is not on
    disk, and the same call runs the attack again. A second Ctrl-C, while those images are judged, leaves that row out.

    Args:
        model: returns logits for images in [0, 1]; it comes back as it was.
        data: images and labels.
        model_name: for the table.
        out: folder of the tables, created where it does not exist.
        attacks: "clean" and those that are registered, as "FGSM", "PGD-40", of at most 1,000,000 steps, and "C&W", in
            upper or lower case. Those that minimise a norm are run at the defaults of each implementation.
        implementations: of `IMPLEMENTATIONS`, in upper or lower case. What a toolkit does not have, or a toolkit that
            is not installed, is skipped with a line in the log.
        norm: 1, 2, inf or "inf".
        eps: radius of the ball, in the unit of the images; inf in the rows of attacks that minimise a norm.
        eps_step: step size of PGD; None takes eps / 4, or 1 / 255 where eps is 0. FGSM's is eps.
        random_start: start attacks of several steps at a random point of the ball; FGSM always starts at the image.
        batch_size: images in one forward pass.
        seed: of the random starts.
        device: of the model, where images are sent; None takes the model's.
        early_stop: let native attacks in a ball leave an image as soon as the model is fooled by it; see
            `guardians.engine.attack.Attack`. The toolkits take all steps.
        precision: what native attacks search in: "auto", "float32", "bfloat16" or "float16"; see there.
        verbose: show a progress bar.

    Returns:
        The rows of this call, also those that were on disk before; columns as in `guardians.tables.BENCHMARK_COLUMNS`.
        Its `attrs["interrupted"]` says whether Ctrl-C ended the run.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed, or `out` cannot be written; before any work.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model of type {type(model).__name__}: must be a torch.nn.Module")
    if not isinstance(data, Dataset):
        raise TypeError(f"data of type {type(data).__name__}: must be a guardians.data.Dataset, see load_data")
    if not isinstance(model_name, str) or not model_name.strip():
        raise ValueError(f"model_name={model_name!r}: must be a name for the table")
    norm = as_norm(norm)
    eps, eps_step = _sizes(eps, eps_step)
    if not isinstance(random_start, bool):
        raise TypeError(f"random_start={random_start!r}: must be True or False")
    check_integer("batch_size", batch_size, low=1)
    check_integer("seed", seed, low=0)
    specs = _specs(attacks, norm, eps, eps_step, random_start)
    if not isinstance(implementations, str):
        implementations = [canonical(name, IMPLEMENTATIONS) for name in implementations]
    if not implementations or not set(implementations) <= set(IMPLEMENTATIONS):
        raise ValueError(f"implementations={implementations!r}: known are {', '.join(IMPLEMENTATIONS)}")
    check_flag("early_stop", early_stop)
    check_choice("precision", precision, PRECISIONS)
    device = _device_of(model, device)
    if len(data) == 0:
        raise ValueError("data has no images")

    common = {
        "model": model_name,
        "model_digest": digest(model),
        "data": data.identity,
        "defence": "none",
        "norm": norm,
        "eot": 1,
        "n": len(data),
        "seed": int(seed),
        "device": device.type if device.type != "cuda" else f"cuda ({torch.cuda.get_device_name(device)})",
        "versions": json.dumps(_versions()),
        "commit": _commit(),
    }
    jobs = []
    for spec in specs:
        for implementation in dict.fromkeys(implementations):
            options: dict[str, Any] = {}
            if implementation == "native" and spec is not None:
                options = {"precision": precision} | ({} if spec.eps is None else {"early_stop": early_stop})
            if _has(implementation, spec):
                columns = _columns_of(implementation, spec, batch_size, options)
                jobs.append(_Job(implementation, spec, options, common | columns))

    table = Table(Path(out) / "benchmark.csv", BENCHMARK_COLUMNS, KEY)
    pending = [job for job in jobs if job.known not in table]
    _warn_of_others([job.known for job in jobs if job not in pending], table)
    unwritten, interrupted = None, False
    if pending:
        try:
            with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
                unwritten = _measure_all(_Run(model, data, batch_size, int(seed), device, table), pending, verbose)
            interrupted = unwritten is not None
        except KeyboardInterrupt:
            interrupted = True
    frame = table.select([job.known for job in jobs], [] if unwritten is None else [unwritten])
    frame.attrs["interrupted"] = interrupted
    return frame


def outcome_path(out: str | os.PathLike[str], row: Mapping[Any, Any] | pd.Series) -> Path:
    """The CSV file with the outcomes of the single images behind a row of `out/benchmark.csv`.

    Its columns are index, label, clean_prediction, adversarial_prediction, l2 and linf, the norms of the perturbation;
    `summarise` makes the row's figures of it.
    """
    key = [as_written(row[name]) for name in KEY]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{row['model']} {row['attack']} {row['implementation']}")[-200:]
    return Path(out) / "outcomes" / f"{readable}-{digest}.csv"


def summarise(outcomes: pd.DataFrame) -> dict[str, float]:
    """The figures of a row that follow from the outcomes of its images, under their column names."""
    n = len(outcomes)
    clean = outcomes["clean_prediction"] == outcomes["label"]
    robust = clean & (outcomes["adversarial_prediction"] == outcomes["label"])
    correct, standing = int(clean.sum()), int(robust.sum())
    low, high = wilson_interval(standing, n)
    return {
        "n": n,
        "clean_accuracy": correct / n,
        "robust_accuracy": standing / n,
        "robust_accuracy_low": low,
        "robust_accuracy_high": high,
        "success_rate": (correct - standing) / correct if correct else float("nan"),
        "l2_median": float(outcomes["l2"].median()),
        "l2_mean": float(outcomes["l2"].mean()),
        "linf_max": float(outcomes["linf"].max()),
    }


def _measure_all(run: _Run, jobs: Sequence[_Job], verbose: bool) -> dict[str, Any] | None:
    """Measure one after the other; up to a row that Ctrl-C left unwritten, which is returned."""
    with tqdm(jobs, desc="benchmark", unit="row", disable=not verbose) as progress:
        for job in progress:
            progress.set_postfix_str(f"{job.known['attack']} {job.implementation}")
            if job.known in run.table:  # another process has been faster
                continue
            unwritten = run.measure(job)
            if unwritten is not None:
                return unwritten
    return None


class _Run:
    """What the rows of one call share: the images on the device, and what the model makes of them."""

    def __init__(
        self, model: nn.Module, data: Dataset, batch_size: int, seed: int, device: torch.device, table: Table
    ) -> None:
        self.model, self.batch_size, self.seed, self.device, self.table = model, batch_size, seed, device, table
        self.images, self.labels = data.as_floats().to(device), data.labels.to(device)
        with torch.no_grad():
            self.nb_classes = Victim(model).logits(self.images[:1]).shape[1]
        if data.labels.min() < 0 or data.labels.max() >= self.nb_classes:
            span = f"{int(data.labels.min())} to {int(data.labels.max())}"
            raise ValueError(f"data has labels from {span}: the model has {self.nb_classes} classes")
        self._setting: dict[str, Any] = {
            "nb_classes": self.nb_classes,
            "input_shape": tuple(self.images.shape[1:]),
            "batch_size": batch_size,
        }
        self.clean_predictions = predicted_labels(model, self.images, batch_size)
        self._zero_gradients: float | None = None

    def measure(self, job: _Job) -> dict[str, Any] | None:
        """Run one attack, and write the outcomes of its images and then its row.

        Returns:
            None; where Ctrl-C stopped a native attack, the row of the images that were finished, which is not written.

        Raises:
            KeyboardInterrupt: Ctrl-C while there was nothing to make a row of.
        """
        if job.implementation == "native" and job.spec is not None:
            measured = self._run_native(job.spec, job.options)
        else:
            measured = self._run_counted(job.implementation, job.spec)
        result, rows = measured.result, measured.rows
        if job.spec is None:
            predictions = result.argmax(1)
            outcomes, flags = self._outcomes(predictions, predictions, self.images, rows), []
        else:
            outcomes = self._outcomes(
                self.clean_predictions[rows], predicted_labels(self.model, result, self.batch_size), result, rows
            )
            flags = self._flags(job, measured, summarise(outcomes)["robust_accuracy"])
        n, cost = len(outcomes), measured.cost
        row = job.known | summarise(outcomes)
        row |= {f"{kind}_per_image": cost[kind] / n for kind in ("forward", "backward", "judgement")}
        row |= {"seconds": cost["seconds"], "images_per_second": n / cost["seconds"]}
        row |= {"peak_memory_mb": cost["peak_memory_mb"], "search": measured.search, "flags": ";".join(flags)}
        if measured.interrupted:
            return row
        self.table.append(row, (outcome_path(self.table.path.parent, row), outcomes))
        return None

    def _run_native(self, spec: Spec, options: dict[str, Any]) -> _Measured:
        """Run a native attack, which counts for itself, and keep what is finished when Ctrl-C stops it.

        It is given the model as it is: the attack cannot make a cheaper copy of one that counts.
        """
        attack = build_attack("native", spec, self.model, seed=self.seed, **self._setting, **options)
        assert isinstance(attack, Attack)
        x, y = self.images.split(self.batch_size), self.labels.split(self.batch_size)
        for _ in attack.stream([(x[0], y[0])]):
            pass
        x_adv, finished = torch.empty_like(self.images), np.zeros(len(self.images), dtype=bool)
        interrupted = False
        with _time_and_memory(self.device) as cost:
            try:
                for part in attack.stream(zip(x, y, strict=True)):
                    x_adv[torch.from_numpy(part.index).to(self.device)] = part.x_adv.to(self.device)
                    finished[part.index] = True
            except KeyboardInterrupt:
                if not finished.any():
                    raise
                interrupted = True
        report = attack.report
        assert report is not None
        cost |= {
            "forward": report.search_forward,
            "backward": report.search_backward,
            "judgement": report.judgement_forward,
        }
        if not interrupted:
            return _Measured(x_adv, slice(None), cost, report.search)
        rows = torch.from_numpy(finished.nonzero()[0]).to(self.device)
        return _Measured(x_adv[rows], rows, cost, report.search, interrupted=True)

    def _run_counted(self, implementation: str, spec: Spec | None) -> _Measured:
        """Run the attack of a toolkit, or the prediction of any implementation, on a model that counts."""
        counting = CountingModel(self.model)
        if spec is None:
            predict = build_prediction(implementation, counting, **self._setting)
            run: TensorAttack = lambda x, _: predict(x)  # noqa: E731
        else:
            run = build_attack(implementation, spec, counting, seed=self.seed, **self._setting)
        run(self.images[: self.batch_size], self.labels[: self.batch_size])
        counting.reset()
        with _time_and_memory(self.device) as cost:
            result = run(self.images, self.labels).detach()
        cost |= {"forward": counting.forward_samples, "backward": counting.backward_samples, "judgement": 0}
        return _Measured(result, slice(None), cost)

    def _outcomes(self, clean: Tensor, adversarial: Tensor, images: Tensor, rows: Tensor | slice) -> pd.DataFrame:
        """A row for each of `images` (M, ...), which are at `rows` in the data, and their predictions (M,)."""
        return pd.DataFrame(
            {
                "index": torch.arange(len(self.images), device=self.device)[rows].cpu().numpy(),
                "label": self.labels[rows].cpu().numpy(),
                "clean_prediction": clean.cpu().numpy(),
                "adversarial_prediction": adversarial.cpu().numpy(),
                "l2": self._perturbation(images, rows, 2).numpy(),
                "linf": self._perturbation(images, rows, np.inf).numpy(),
            }
        )

    def _perturbation(self, images: Tensor, rows: Tensor | slice, p: float) -> Tensor:
        """Its p-norm for each image (M,), in float64."""
        pairs = zip(images.split(self.batch_size), self.images[rows].split(self.batch_size), strict=True)
        norms = [torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), p, dim=1) for x_adv, x in pairs]
        return torch.cat(norms).cpu()

    def _flags(self, job: _Job, measured: _Measured, robust_accuracy: float) -> list[str]:
        """Reasons to distrust the row; of an interrupted one only those that are seen on its own images."""
        assert job.spec is not None
        images, flags = measured.result, []
        if images.isnan().any():
            flags.append("nan")
        if job.spec.eps is not None:
            size = self._perturbation(images, measured.rows, job.spec.norm)
            if (size > _with_rounding(job.spec.eps, job.spec.norm, images[0].numel())).any():
                flags.append("outside_ball")
        if ((images < 0) | (images > 1)).any():
            flags.append("outside_clip")
        if measured.interrupted:
            return [*flags, "interrupted"]
        if job.spec.eps is not None and job.spec.family != _WEAKEST:
            weakest = Spec(_WEAKEST, job.spec.norm, job.spec.eps)
            fgsm = job.known | _columns_of(job.implementation, weakest, self.batch_size, job.options)
            if (self.table.select([fgsm])["robust_accuracy"] < robust_accuracy).any():
                flags.append("weaker_than_fgsm")
        if self._zero_gradients is None:
            self._zero_gradients = self._zero_gradient_share()
        if self._zero_gradients > _ZERO_GRADIENT_SHARE:
            flags.append("zero_gradient")
        return flags

    def _zero_gradient_share(self) -> float:
        """Fraction of the clean images at which the gradient of the loss is zero in every pixel."""
        zero = 0
        for x, y in zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True):
            inputs = x.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(cross_entropy(self.model(inputs), y, reduction="sum"), inputs)
            zero += int((gradient == 0).flatten(1).all(1).sum())
        return zero / len(self.images)


@contextmanager
def _time_and_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """The seconds and the peak memory that a block takes, known after it."""
    cost: dict[str, float] = {}
    with peak_memory(device) as peak:
        start = time.perf_counter()
        yield cost
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost["seconds"] = time.perf_counter() - start
    cost["peak_memory_mb"] = peak.mb


def _with_rounding(eps: float, norm: float, pixels: int) -> float:
    """The radius, and what float32's rounding of the pixels and of a norm may add to it."""
    return float(eps * (1 + 1e-6) + torch.finfo(torch.float32).eps * pixels ** (1 / norm))


def _sizes(eps: Any, eps_step: Any) -> tuple[float, float]:
    """Radius and step size."""
    check_number("eps", eps, low=0)
    if not isinstance(eps, Real):
        raise TypeError(f"eps={eps!r}: must be one number")
    if eps_step is None:
        return float(eps), float(eps) / 4 or 1 / 255
    check_number("eps_step", eps_step, low=0, exclusive=True)
    if not isinstance(eps_step, Real):
        raise TypeError(f"eps_step={eps_step!r}: must be one number")
    return float(eps), float(eps_step)


def _specs(attacks: Sequence[str], norm: float, eps: float, eps_step: float, random_start: bool) -> list[Spec | None]:
    """The attacks under these names, None for "clean", in the order in which they run."""
    known = ", ".join(("clean", *usages()))
    if isinstance(attacks, str) or not attacks:
        raise ValueError(f"attacks={attacks!r}: must be a list; known are {known}")
    specs = {}
    for attack in attacks:
        spec = named(str(attack), norm, eps, eps_step=eps_step, random_start=random_start)
        if spec is None and canonical(attack, ("clean",)) != "clean":
            raise ValueError(f"attack {attack!r} is unknown; known are {known}")
        # FGSM comes before the others, which are compared with it.
        specs[spec] = (0, 0) if spec is None else (1 + (spec.family != _WEAKEST), spec.get("steps", 0))
    return sorted(specs, key=lambda spec: specs[spec])


def _device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    victim = Victim(model)
    if victim.dtype not in (None, torch.float32):
        raise ValueError(f"the model is in {victim.dtype}: must be in torch.float32")
    if device is None:
        return victim.device or torch.device("cpu")
    place = torch.empty(0, device=device).device  # with the index of the GPU
    if victim.device not in (None, place):
        raise ValueError(f"device={str(device)!r}: the model is on {victim.device}; they must be the same")
    return place


def _has(implementation: str, spec: Spec | None) -> bool:
    """Whether the attack can be run; otherwise the log says why not."""
    if not is_installed(implementation):
        logger.warning("skipped: %s of %s, which is not installed", _name(spec), implementation)
        return False
    if spec is not None and not is_available(implementation, spec):
        logger.warning("skipped: %s does not have %s for norm %g", implementation, spec.name, spec.norm)
        return False
    return True


def _name(spec: Spec | None) -> str:
    return "clean" if spec is None else spec.name


def _columns_of(implementation: str, spec: Spec | None, batch_size: int, options: Mapping[str, Any]) -> dict[str, Any]:
    params: dict[str, Any] = {"batch_size": int(batch_size)}
    eps, steps = 0.0, 0
    if spec is not None:
        eps, steps = (np.inf, 0) if spec.eps is None else (spec.eps, 1)
        params |= {} if spec.eps is None else {"eps_step": eps, "random_start": False}
        params |= dict(spec.having(steps=None).params)
        steps = spec.get("steps", steps)
    if "early_stop" in options:
        params["early_stop"] = options["early_stop"]
    return {
        "attack": _name(spec),
        "implementation": implementation,
        "eps": eps,
        "steps": steps,
        "params": json.dumps(params, sort_keys=True),
        "precision": options.get("precision", "float32"),
    }


def _warn_of_others(kept: list[dict[str, Any]], table: Table) -> None:
    """Say in the log which rows come from other code."""
    if not kept:
        return
    frame = table.select(kept)
    others = (frame["versions"] != kept[0]["versions"]) | (frame["commit"] != kept[0]["commit"])
    if others.any():
        logger.warning(
            "%d of the rows in %s were made with other versions or at another commit and are kept; "
            "another folder measures anew",
            others.sum(),
            table.path,
        )


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
