"""The benchmark: attacks of every implementation on the same subject and the same images, one row of a table each."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import guardians.evaluation  # noqa: F401, whose attack is known from then on
from guardians.attacks.norms import as_norm
from guardians.attacks.registry import Spec, canonical, family_of, named, usages
from guardians.data import Dataset
from guardians.engine.checks import check_choice, check_flag, check_integer, check_number
from guardians.engine.parameters import PRECISIONS
from guardians.engine.ranks import ranks
from guardians.engine.victim import Victim
from guardians.experiments.names import parsed
from guardians.experiments.run import BARE_LOOP, Run, code, perform
from guardians.experiments.store import Store, standing
from guardians.experiments.subject import Subject, defended
from guardians.statistics import wilson_interval
from guardians.tables import BENCHMARK_COLUMNS, write_csv
from guardians.toolkits.build import IMPLEMENTATIONS, TOOLKITS, is_available, is_installed, own_spec

__all__ = ["ATTACKS", "BENCHMARK_SHOWN", "benchmark_table", "run_benchmark", "runs_of", "spec_of", "summarise"]

logger = logging.getLogger(__name__)

ATTACKS = ("clean", "FGSM", "PGD-10", "PGD-40")
"""Those that run unless others are asked for."""
BENCHMARK_SHOWN = (
    *("model", "defence", "attack", "implementation", "n", "robust_accuracy", "robust_accuracy_low"),
    *("robust_accuracy_high", "success_rate", "l2_mean", "linf_max", "forward_per_image"),
    *("backward_per_image", "judgement_per_image", "seconds", "flags"),
)
"""Columns of `BENCHMARK_COLUMNS` that are shown at first."""
_WEAKEST = "FGSM"
"""No other attack in the same ball should be weaker."""
_NAMES = ("model", "defence", "data")
_SAME_BALL = ("model_digest", "data", "seed", "norm", "eps")


def run_benchmark(
    model: nn.Module,
    data: Dataset,
    *,
    model_name: str,
    out: str | os.PathLike[str],
    defence: str = "none",
    pool: Dataset | None = None,
    device: torch.device | str | None = None,
    verbose: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Run attacks of several implementations on the same images, and write `out/benchmark.csv`, a row for each.

    Each attack runs once on a batch for warm-up and then, timed and counted, on all images. Its images are judged by
    the subject itself, in evaluation mode and float32, a random one by draws that no attack has seen. What was run and
    what became of each image is kept in a `Store` in `out`; a run that is there is not done again, so a killed call is
    continued by the same call. Rows that other versions or commits made are kept with a warning.

    "clean" rows hold the predictions on the images as they are, each through the implementation's own prediction path.
    A last row "union" is the worst case of all attacks in the ball, image by image.

    Ctrl-C (`KeyboardInterrupt`) ends the call but not the program: what is finished comes back. A native attack that it
    stops has a row of the images that were finished by then, with the flag "interrupted"; the same call goes on with
    the others.

    Args:
        model: returns logits for images in [0, 1]; it comes back as it was.
        data: images and labels.
        model_name: for the table.
        out: folder of store and tables, created where it does not exist.
        defence: around the model, such as "rse(sigma_init=0.8)", see `guardians.experiments.subject.defended`.
        pool: images for a defence that mixes with some.
        device: of the model, where images are sent; None takes the model's.
        verbose: show a progress bar.
        settings: of `runs_of`.

    Returns:
        The rows of this call, also those that were there before; columns as in `guardians.tables.BENCHMARK_COLUMNS`.
        Its `attrs["interrupted"]` says whether Ctrl-C ended the call. Of several processes (`guardians.engine.ranks`)
        the first returns and writes them, the others none.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed, or `out` cannot be written; before any work.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model of type {type(model).__name__}: must be a torch.nn.Module")
    if not isinstance(data, Dataset):
        raise TypeError(f"data of type {type(data).__name__}: must be a guardians.data.Dataset, see load_data")
    if not isinstance(model_name, str) or not model_name.strip():
        raise ValueError(f"model_name={model_name!r}: must be a name for the table")
    device = _device_of(model, device)
    if len(data) == 0:
        raise ValueError("data has no images")
    runs = runs_of(defended(model_name, model, defence, pool), data, device, **settings)

    if not ranks().is_first:
        nothing = pd.DataFrame(columns=list(BENCHMARK_COLUMNS))
        nothing.attrs["interrupted"] = perform(runs, None, verbose=False)
        return nothing
    store = Store(out)
    _warn_of_others(runs, store)
    interrupted = perform(runs, store, verbose=verbose)
    write_csv(benchmark_table(store), Path(out) / "benchmark.csv")
    store.export(out)
    frame = benchmark_table(store, runs)
    frame.attrs["interrupted"] = interrupted
    return frame


def benchmark_table(store: Store, runs: Sequence[Run] | None = None) -> pd.DataFrame:
    """Rows of `BENCHMARK_COLUMNS`: all that are complete, or of these runs, also of one that was interrupted.

    The last rows are the "union" of all attacks in one ball, where there are several.
    """
    found = {known["key"]: known for known in store.runs(unfinished=runs is not None)}
    outcomes = {key: store.outcomes(key) for key in found}
    rows = {key: _row(known, outcomes[key]) for key, known in found.items()}
    _flag_weaker(list(rows.values()))
    if runs is not None:  # under the names of this call
        names = {run.key: {name: run.known[name] for name in _NAMES} for run in runs if run.key in rows}
        rows = {key: rows[key] | names[key] for key in names}
    return pd.DataFrame([*rows.values(), *_unions(rows, outcomes)], columns=list(BENCHMARK_COLUMNS))


def summarise(outcomes: pd.DataFrame) -> dict[str, float]:
    """The figures of a row that follow from the outcomes of its images, under their column names."""
    n = len(outcomes)
    correct, robust = (int(which.sum()) for which in standing(outcomes))
    low, high = wilson_interval(robust, n)
    return {
        "n": n,
        "clean_accuracy": correct / n,
        "robust_accuracy": robust / n,
        "robust_accuracy_low": low,
        "robust_accuracy_high": high,
        "success_rate": (correct - robust) / correct if correct else float("nan"),
        "l2_median": float(outcomes["l2"].median()),
        "l2_mean": float(outcomes["l2"].mean()),
        "linf_max": float(outcomes["linf"].max()),
    }


def _row(known: Mapping[str, Any], outcomes: pd.DataFrame) -> dict[str, Any]:
    spec, options, n = known["spec"], known["options"], len(outcomes)
    params: dict[str, Any] = {"batch_size": known["batch_size"]}
    norm, eps, steps = float("nan"), 0.0, 0
    if spec is not None:
        norm, eps = float(spec["norm"]), np.inf if spec["eps"] is None else spec["eps"]
        params |= {name: value for name, value in spec["params"].items() if name != "steps"}
        steps = spec["params"].get("steps", int(spec["eps"] is not None and spec["family"] == _WEAKEST))
    if "early_stop" in options:
        params["early_stop"] = options["early_stop"]
    flags = known["flags"] if known["is_complete"] else [*known["flags"], "interrupted"]
    return {
        **{name: known[name] for name in BENCHMARK_COLUMNS if name in known},
        **summarise(outcomes),
        "norm": norm,
        "eps": eps,
        "steps": steps,
        "params": json.dumps(params, sort_keys=True),
        "eot": options.get("eot_samples", 1),
        "precision": options.get("precision", "float32"),
        **{f"{kind}_per_image": known[kind] / n for kind in ("forward", "backward", "judgement")},
        "images_per_second": n / known["seconds"],
        "flags": ";".join(flags),
        "versions": json.dumps(known["versions"]),
    }


def _unions(rows: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """A row for each ball in which several attacks are complete."""
    balls: dict[tuple[Any, ...], list[str]] = {}
    for key, row in rows.items():
        if row["attack"] != "clean" and np.isfinite(row["eps"]) and "interrupted" not in row["flags"]:
            balls.setdefault(tuple(row[name] for name in _SAME_BALL), []).append(key)
    unions = []
    for keys in balls.values():
        if len({tuple(rows[key][name] for name in ("attack", "implementation", "params")) for key in keys}) < 2:
            continue
        same, first = rows[keys[0]], outcomes[keys[0]]
        felled = np.logical_or.reduce([outcomes[key]["adversarial_prediction"] != first["label"] for key in keys])
        # Which of the wrong labels it is does not matter.
        images = first.assign(adversarial_prediction=first["label"].where(~felled, -1))
        figures = summarise(images) | dict.fromkeys(("l2_median", "l2_mean", "linf_max"), float("nan"))
        known: dict[str, Any] = {
            "attack": "union",
            "implementation": "all",
            "params": "{}",
            "precision": "",
            "search": "",
            "flags": "",
        }
        known |= {"steps": 0, "eot": 1, "seconds": sum(rows[key]["seconds"] for key in keys)}
        kept = {name: same[name] for name in (*_SAME_BALL, "model", "defence", "device", "versions", "commit")}
        unions.append(dict.fromkeys(BENCHMARK_COLUMNS, float("nan")) | kept | figures | known)
    return unions


def _flag_weaker(rows: Sequence[dict[str, Any]]) -> None:
    """Flag rows where FGSM of the same implementation and settings leaves fewer images."""

    def setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
        params = json.loads(row["params"])
        same = (*_SAME_BALL, "implementation", "device", "precision", "eot")
        return (*(row[name] for name in same), params["batch_size"], params.get("early_stop"))

    weakest = {setting(row): row["robust_accuracy"] for row in rows if row["attack"] == _WEAKEST}
    for row in rows:
        if "interrupted" not in row["flags"] and row["robust_accuracy"] > weakest.get(setting(row), 1.0):
            row["flags"] = ";".join(filter(None, [row["flags"], "weaker_than_fgsm"]))


def runs_of(
    subject: Subject,
    data: Dataset,
    device: torch.device,
    *,
    attacks: Sequence[str] = ATTACKS,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    norm: float | str = np.inf,
    eps: float = 8 / 255,
    eps_step: float | None = None,
    random_start: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    early_stop: bool = True,
    precision: str = "auto",
    eot_samples: int = 1,
    repetition: int = 0,
    source: Subject | None = None,
) -> list[Run]:
    """A run for each attack and implementation that has it; otherwise the log says why not.

    Args:
        subject: what is attacked.
        data: images and labels.
        device: of the subject.
        attacks: "clean", and
            - those that are registered, as "FGSM", "PGD-40", of at most 1,000,000 steps, "C&W", "AutoAttack" and
              "evaluate", in upper or lower case, also with arguments, as "APGD-20(loss='margin')". Those that minimise
              a norm are run at the defaults of each implementation;
            - any attack of a toolkit under the name of its class, as "torchattacks:APGD(steps=20)",
              "foolbox:L2DeepFoolAttack" and "ART:SquareAttack(max_iter=500)", with its own arguments; norm and eps are
              those of the call where the class has such arguments and they are not given.
        implementations: of `IMPLEMENTATIONS`, in upper or lower case. What a toolkit does not have, or a toolkit that
            is not installed, is skipped with a line in the log.
        norm: 1, 2, inf or "inf".
        eps: radius of the ball, in the unit of the images; inf in the rows of attacks that minimise a norm.
        eps_step: step size of PGD; None takes eps / 4, or 1 / 255 where eps is 0. FGSM's is eps.
        random_start: start attacks of several steps at a random point of the ball; FGSM always starts at the image.
        batch_size: images in one forward pass.
        seed: of the random starts, and of the draws of a defence.
        early_stop: let native attacks in a ball leave an image as soon as the model is fooled by it; see
            `guardians.engine.attack.Attack`. The toolkits take all steps.
        precision: what native attacks search in: "auto", "float32", "bfloat16" or "float16"; see there.
        eot_samples: draws whose mean gradient native attacks follow; see there.
        repetition: number, from 1, of runs that are made several times for their time.
        source: what the attacks ask, where that is not the subject.

    Raises:
        TypeError, ValueError: an argument is outside what is allowed.
    """
    norm = as_norm(norm)
    eps, eps_step = _sizes(eps, eps_step)
    if not isinstance(random_start, bool):
        raise TypeError(f"random_start={random_start!r}: must be True or False")
    check_integer("batch_size", batch_size, low=1)
    check_integer("seed", seed, low=0)
    check_integer("eot_samples", eot_samples, low=1)
    if not isinstance(implementations, str):
        implementations = [canonical(name, (*IMPLEMENTATIONS, BARE_LOOP)) for name in implementations]
    if not implementations or not set(implementations) <= {*IMPLEMENTATIONS, BARE_LOOP}:
        raise ValueError(f"implementations={implementations!r}: known are {', '.join(IMPLEMENTATIONS)}")
    specs = _specs(attacks, norm, eps, eps_step, random_start)
    check_flag("early_stop", early_stop)
    check_choice("precision", precision, PRECISIONS)
    runs = []
    for spec in specs:
        own = None if spec is None else spec.toolkit
        for implementation in dict.fromkeys(implementations) if own is None else [own]:
            if not _has(implementation, spec, subject.kind):
                continue
            options: dict[str, Any] = {}
            if implementation == "native" and spec is not None:
                options = {"precision": precision, "eot_samples": int(eot_samples)}
                options |= {} if family_of(spec).minimises_norm else {"early_stop": early_stop}
            settings = int(batch_size), int(seed), options, device, repetition, None if spec is None else source
            runs.append(Run(subject, data, spec, implementation, *settings))
    return runs


def _specs(attacks: Sequence[str], norm: float, eps: float, eps_step: float, random_start: bool) -> list[Spec | None]:
    """The attacks under these names, None for "clean", in the order in which they run."""
    if isinstance(attacks, str) or not attacks:
        raise ValueError(f"attacks={attacks!r}: must be a list; known are {_known()}")
    specs: dict[Spec | None, tuple[int, int]] = {}
    for attack in attacks:
        spec = spec_of(str(attack), norm, eps, eps_step=eps_step, random_start=random_start)
        # FGSM comes before the others, which are compared with it.
        steps = 0 if spec is None or spec.toolkit is not None else spec.get("steps", 0)
        specs[spec] = (0, 0) if spec is None else (1 + (spec.family != _WEAKEST), steps)
    return sorted(specs, key=lambda spec: specs[spec])


def spec_of(attack: str, norm: float, eps: float, **params: Any) -> Spec | None:
    """The attack under a name as `runs_of` takes them; None for "clean".

    Args:
        attack: the name, also with arguments.
        norm: of the threat model.
        eps: radius of the ball.
        params: of a registered attack that counts its steps, those that it has.

    Raises:
        ValueError: there is none, or it does not have this norm or one of the arguments.
        ImportError: it is of a toolkit that is not installed.
    """
    name, arguments = parsed(attack)
    toolkit, colon, own = name.partition(":")
    if colon:
        return own_spec(canonical(toolkit, TOOLKITS), own, arguments, norm, eps)
    spec = named(name, norm, eps, **params)
    if spec is None and canonical(name, ("clean",)) != "clean":
        raise ValueError(f"attack {attack!r} is unknown; known are {_known()}")
    if spec is not None and arguments:
        spec = spec.having(**arguments)
    if spec is not None:
        family_of(spec)
    return spec


def _known() -> str:
    return ", ".join(("clean", *usages(), *(f"{toolkit}:NAME" for toolkit in TOOLKITS)))


def _has(implementation: str, spec: Spec | None, defence: str) -> bool:
    """Whether the attack can be run; otherwise the log says why not."""
    name = "clean" if spec is None else spec.name
    if implementation == BARE_LOOP:
        return spec is not None
    if not is_installed(implementation):
        logger.warning("skipped: %s of %s, which is not installed", name, implementation)
        return False
    if spec is not None and not is_available(implementation, spec):
        logger.warning("skipped: %s does not have %s for norm %g", implementation, name, spec.norm)
        return False
    made_for = () if spec is None or spec.toolkit is not None else family_of(spec).made_for
    if made_for and defence not in made_for:
        logger.warning("skipped: %s is made for %s, not for the defence %s", name, ", ".join(made_for), defence)
        return False
    return True


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


def _warn_of_others(runs: Sequence[Run], store: Store) -> None:
    """Say in the log which rows come from other code."""
    here = code()
    others = [known for known in store.runs([run.key for run in runs]) if {name: known[name] for name in here} != here]
    if others:
        logger.warning(
            "%d of the rows in %s were made with other versions or at another commit and are kept; "
            "another folder measures anew",
            len(others),
            store.path,
        )
