"""The checks over what is known by name: native attacks and defences, and the attacks of the toolkits.

`run_conformance` writes conformance.csv, a row a check. Attacks of the toolkits have few steps, and those in `LEFT_OUT`
are not run: they need more than a classifier of images, or change images in another way than pixel by pixel.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from guardians.attacks.registry import Spec, canonical, families, family_of
from guardians.data import Dataset
from guardians.experiments.bench import spec_of
from guardians.experiments.names import parsed, written
from guardians.experiments.subject import DEFENCES, defended
from guardians.models.registry import import_callable
from guardians.parity.checks import (
    ATTACK_CHECKS,
    CLASSES,
    DEFENCE_CHECKS,
    SHAPE,
    Check,
    Make,
    Result,
    is_defence,
    results,
)
from guardians.tables import CONFORMANCE_COLUMNS, Table
from guardians.toolkits.build import TOOLKITS, build_attack, is_installed

__all__ = ["LEFT_OUT", "Piece", "all_names", "piece", "run_conformance"]

EPS = {1: 1.0, 2: 0.3, np.inf: 0.03}
"""Radii with which attacks are run, by norm."""
SECONDS = 5.0
"""Of CPU time for all checks of an attack of a toolkit together."""
_FEW = {
    "binary_search_steps": 3,
    "conjugate_sinkhorn_max_iter": 20,
    "directions": 20,
    "init_eval": 10,
    "init_size": 20,
    "initial_const": 1.0,
    "max_eval": 100,
    "max_iter": 10,
    "max_iterations": 10,
    "n_queries": 100,
    "nb_steps": 10,
    "num_trial": 5,
    "projected_sinkhorn_max_iter": 20,
    "query_limit": 500,
    "rel_stepsize": 0.25,
    "repeats": 10,
    "steps": 10,
    "sub_dim": 5,
}
"""Values of arguments, where an attack of a toolkit has them."""
_OWN: dict[str, dict[str, Any]] = {
    "ART:SpatialTransformation": {
        "max_rotation": 15.0,
        "max_translation": 20.0,
        "num_rotations": 3,
        "num_translations": 3,
    },
    "ART:Wasserstein": {"norm": "wasserstein"},
}
"""Arguments without which an attack of a toolkit does nothing, or nothing here."""

LEFT_OUT = {
    name: reason
    for reason, names in {
        "is for another framework than PyTorch": """ART:AdversarialPatchTensorFlowV2 ART:FeatureAdversariesTensorFlowV2
            ART:MalwareGDTensorFlow ART:ProjectedGradientDescentTensorFlowV2""",
        "is for sounds": "ART:CarliniWagnerASR ART:ImperceptibleASR ART:ImperceptibleASRPyTorch",
        "is for videos": "ART:AdversarialTexturePyTorch ART:FrameSaliencyAttack ART:OverTheAirFlickeringPyTorch",
        "is for detectors of objects": "ART:DPatch ART:OverloadPyTorch ART:RobustDPatch ART:SNAL",
        "is for decision trees or Gaussian processes": "ART:DecisionTreeAttack ART:HighConfidenceLowUncertainty",
        "is for tables of features": "ART:LowProFool",
        "pastes a patch or a beam of light": """ART:AdversarialPatch ART:AdversarialPatchNumpy
            ART:AdversarialPatchPyTorch ART:GRAPHITEBlackbox ART:GRAPHITEWhiteboxPyTorch ART:LaserAttack""",
        "needs other images": """ART:FeatureAdversariesNumpy ART:FeatureAdversariesPyTorch
            foolbox:BinarizationRefinementAttack foolbox:DatasetAttack torchattacks:LGV""",
        "takes one image at a time": "ART:ShadowAttack",
        "is for models that return probabilities": "ART:SimBA ART:VirtualAdversarialMethod",
        "takes targets only": "ART:TargetedUniversalPerturbation foolbox:GenAttack",
        "is made for a defence": "AveragedMixturePGD",
    }.items()
    for name in names.split()
}
"""Attacks that no check is run on, and why."""


@dataclass(frozen=True)
class Piece:
    """An attack or a defence under the checks.

    Attributes:
        name: as `guardians check` takes it.
        make: makes it of a model.
        checks: those that it has to pass.
        implementation: whose code it is: of `IMPLEMENTATIONS`, or the module of a user's.
        norm: of an attack known by name.
    """

    name: str
    make: Make
    checks: tuple[Check, ...]
    implementation: str = "native"
    norm: float | None = None

    def results(self, seconds: float | None = None) -> Iterator[Result]:
        """What comes of each check, see `guardians.parity.checks.results`; nothing is printed meanwhile."""
        found = results(self.make, self.checks, seconds)
        while True:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                result = next(found, None)
            if result is None:
                return
            yield result


def piece(name: str, norm: float | None = None, eps: float | None = None, defence: bool | None = None) -> Piece:
    """What a user names on the command line.

    Args:
        name: an attack as `guardians bench` takes it, a defence of `DEFENCES` as in "rse(n=3)", or what makes either of
            a model, "package.module:callable", also with arguments.
        norm: of an attack known by name: 1, 2 or inf; None takes the one that the name of a toolkit's class says, or
            else inf.
        eps: radius of its ball; None takes `EPS`.
        defence: whether "package.module:callable" makes defences; None takes modules for defences, and all else for
            attacks.

    Raises:
        ImportError: it is of a toolkit that is not installed.
        ValueError: there is none of this name, or with these arguments.
    """
    stem, arguments = parsed(name)
    prefix, colon, _ = stem.partition(":")
    if colon and canonical(prefix, TOOLKITS) not in TOOLKITS:
        make: Make = partial(import_callable("name", stem), **arguments)
        if defence is None:
            defence = is_defence(make)
        return Piece(name, make, DEFENCE_CHECKS if defence else ATTACK_CHECKS, prefix)
    if stem.casefold() in DEFENCES:
        return Piece(name, partial(_defence, name), DEFENCE_CHECKS)
    norm = _norm_in(stem) if norm is None else norm
    try:
        spec = spec_of(name, norm, EPS[norm] if eps is None else eps)
    except ValueError as error:
        others = f"defences are {', '.join(DEFENCES)}, and package.module:callable is one of your own"
        raise ValueError(f"name={name!r}: {error}; {others}") from None
    if spec is None or (spec.toolkit is None and family_of(spec).made_for):
        raise ValueError(f"name={name!r}: must be an attack on any classifier, as `guardians attacks` lists them")
    return Piece(name, partial(_attack, spec), ATTACK_CHECKS, spec.toolkit or "native", _norm_of(spec))


def all_names() -> list[tuple[str, float]]:
    """The names and norms of all that is checked, of the toolkits that are installed."""
    names = [(f"{kind}({'n' if kind == 'rse' else 'num_samples'}=3)", np.inf) for kind in DEFENCES]
    for family in families():
        for norm in sorted(EPS.keys() & set(family.norms)):
            # In norm 1 a step changes few pixels, and many are needed to be as strong as FGSM.
            few = {"steps": 20 if norm == 1 else 5, "n_queries": 5, "budget": "fast", "searches": 3}
            few = {key: value for key, value in few.items() if key in family.parameters}
            if family.name not in LEFT_OUT:
                stem = f"{family.name}-{few.pop('steps')}" if family.counts_steps else family.name
                names.append((written(stem, few), norm))
    for toolkit in filter(is_installed, TOOLKITS):
        for attack in TOOLKITS[toolkit].attacks():
            if f"{toolkit}:{attack}" not in LEFT_OUT:
                norm = _norm_in(attack)
                names.append((written(f"{toolkit}:{attack}", _few_steps(toolkit, attack, norm)), norm))
    return names


def run_conformance(out: Path, seconds: float = SECONDS) -> tuple[pd.DataFrame, bool]:
    """Run the checks on all of `all_names`, as far as they are not in `out`/conformance.csv yet.

    Args:
        out: folder of the table; each row is on disk before the next check of its piece starts.
        seconds: of CPU time for an attack of a toolkit; what is not finished then "timed out".

    Returns:
        The table, and whether the run was interrupted.

    Raises:
        ValueError: the table cannot be written.
    """
    table = Table(out / "conformance.csv", CONFORMANCE_COLUMNS, key=("implementation", "name", "norm", "check"))
    for toolkit in filter(is_installed, TOOLKITS):
        for name, reason in LEFT_OUT.items():
            if name.startswith(f"{toolkit}:"):
                _write(table, (toolkit, name, None), Result("", "left out", reason))
    interrupted = False
    try:
        for name, norm in tqdm(all_names(), unit="piece"):
            wanted = piece(name, norm)
            limit = None if wanted.implementation == "native" else seconds
            key = wanted.implementation, name, wanted.norm
            missing = [check for check in wanted.checks if (*key, check.__name__.removeprefix("check_")) not in table]
            for result in replace(wanted, checks=tuple(missing)).results(limit):
                _write(table, key, result)
    except KeyboardInterrupt:
        interrupted = True
    return table.frame(), interrupted


def _write(table: Table, key: tuple[str, str, float | None], result: Result) -> None:
    values = *key, result.check, result.outcome, result.why.partition("\n")[0][:200]
    row = dict(zip(CONFORMANCE_COLUMNS, values, strict=True))
    if row not in table:
        table.append(row)


def _attack(spec: Spec, model: nn.Module, targeted: bool = False, **options: Any) -> Any:
    """An attack of a spec, which takes the options of `build_attack` where it is native."""
    implementation = spec.toolkit or "native"
    if options and spec.toolkit:
        raise TypeError(f"{', '.join(options)}: unknown to the attacks of toolkits")
    setting: dict[str, Any] = {"nb_classes": CLASSES, "input_shape": SHAPE, "batch_size": 32} | options
    attack: Any = build_attack(implementation, replace(spec, targeted=targeted), model, **setting)
    if spec.toolkit and spec.eps is not None and _norm_of(spec) is not None:
        attack.eps, attack.norm = spec.eps, _norm_of(spec)  # where the checks look for them
    if spec.toolkit == "ART":
        attack.generate = attack.art_attack.generate
    return attack


def _defence(name: str, model: nn.Module) -> nn.Module:
    pixels = torch.randint(256, (4 * CLASSES, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    classes = tuple(map(str, range(CLASSES)))
    pool = Dataset(pixels, torch.arange(4 * CLASSES) % CLASSES, classes, "random pixels")
    return defended("a network", model, name, pool).module(0)


def _norm_of(spec: Spec) -> float | None:
    """Of the ball of an attack of a toolkit, whatever the spec says where the class has one norm only."""
    if spec.toolkit is None:
        return spec.norm
    given = spec.get("norm")
    if given is None:
        return _norm_in(spec.family)
    return None if given == "wasserstein" else float(str(given).removeprefix("L"))


def _norm_in(name: str) -> float:
    """The norm that the name of a toolkit's class says; inf where it says none."""
    if "VirtualAdversarial" in name:
        return 2.0
    found = re.search(r"L([12])(?![a-z])", name)
    return float(found[1]) if found else np.inf


def _few_steps(toolkit: str, attack: str, norm: float) -> dict[str, Any]:
    """Arguments of a toolkit's class with which it is quick, on images of 5 classes."""
    few: dict[str, Any] = _FEW | {"eps_step": EPS[norm] / 4, "n_classes": CLASSES}
    few |= _OWN.get(f"{toolkit}:{attack}", {})
    known = inspect.signature(TOOLKITS[toolkit].attacks()[attack]).parameters
    return {name: value for name, value in few.items() if name in known}
