"""What is attacked: a model, or a defence around one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from guardians.data import Dataset
from guardians.defences import MixupInference, RandomSelfEnsemble
from guardians.engine.checks import check_choice, check_integer
from guardians.engine.rng import hashed
from guardians.engine.victim import predicted_labels
from guardians.experiments.names import parsed, written
from guardians.models import bundled_models, digest, model_card

__all__ = ["DEFENCES", "KINDS", "PASSES", "SEARCH_PASSES", "Subject", "defended"]

DEFENCES = ("rse", "mi-pl", "mi-ol", "mi-combined")
"""Random Self-Ensemble, and the methods of Mixup Inference."""
KINDS = ("none", *DEFENCES)
PASSES = 10
"""Passes of a randomised defence when it answers."""
SEARCH_PASSES = 2
"""Passes of a randomised defence for one gradient of an attack."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, or a defence around one, known by what it is made of.

    Attributes:
        name: of the model, for tables.
        base: the network, without its defence.
        make: makes the randomised defence from the seed of its draws and its number of passes; None where the network
            is its own defence.
        defence: its name and arguments, for tables.
        passes: when it answers.
        search_passes: for one gradient of an attack.
    """

    name: str
    base: nn.Module
    make: Callable[[int, int], nn.Module] | None = field(default=None, repr=False)
    defence: str = "none"
    passes: int = PASSES
    search_passes: int = SEARCH_PASSES

    def module(self, seed: int, passes: int | None = None) -> nn.Module:
        """The defence with draws of its own, or the network; by default with all its passes."""
        return self.base if self.make is None else self.make(seed, self.passes if passes is None else passes)

    def attacked(self, seed: int) -> nn.Module:
        """The subject as an attack asks it."""
        return self.module(seed, self.search_passes)

    def predictions(self, x: Tensor, rows: np.ndarray, batch_size: int, seed: int, number: int) -> Tensor:
        """Labels (N,) of images (N, ...), by draws that no attack has seen, and that depend on an image's row alone.

        Args:
            x: images.
            rows: int64 (N,), their positions in the data.
            batch_size: images in one forward pass.
            seed: of the draws.
            number: for which time they are asked with this seed.
        """
        return predicted_labels(self.module(seed), x, batch_size, hashed(seed, number, rows))

    @property
    def kind(self) -> str:
        """Of the defence, one of `KINDS`."""
        return parsed(self.defence)[0]

    @cached_property
    def digest(self) -> str:
        """Of all that it is made of, also as an attack asks it, see `guardians.models.digest`."""
        return digest(self.base if self.make is None else nn.ModuleList([self.module(0), self.attacked(0)]))


def defended(name: str, model: nn.Module, defence: str, pool: Dataset | None = None) -> Subject:
    """A model with a defence around it.

    Args:
        name: of the model; of a bundled one trained for Random Self-Ensemble the card says how strong the noise is.
        model: the network.
        defence: such as "rse(sigma_init=0.8, n=10)" or "mi-ol(lam=0.5, num_samples=10)", with arguments of the class,
            and `search_passes`, those for one gradient of an attack; "none" for none.
        pool: images that Mixup Inference mixes with, none of those that are attacked.

    Raises:
        TypeError, ValueError: the defence or an argument is unknown, or there is no pool.
    """
    kind, given = parsed(defence)
    kind = kind.casefold()
    check_choice("defence", kind, KINDS)
    if kind == "none":
        if given:
            raise ValueError(f"defence={defence!r}: none takes no arguments")
        return Subject(name, model)
    arguments, passes_name = dict(given), "n" if kind == "rse" else "num_samples"
    passes, search_passes = arguments.pop(passes_name, PASSES), arguments.pop("search_passes", SEARCH_PASSES)
    check_integer(passes_name, passes, low=1)
    check_integer("search_passes", search_passes, low=1)
    fixed: tuple[Any, ...] = ()
    if kind == "rse":
        card = model_card(name).get("defence", {}) if name in bundled_models() else {}
        arguments = {key: card[key] for key in ("sigma_init", "sigma_inner") if key in card} | arguments
        kind_of_ensemble: Callable[..., nn.Module] = RandomSelfEnsemble
    else:
        if pool is None:
            raise ValueError(f"defence={defence!r}: needs images to mix with, the training images of the data")
        device = next(model.parameters()).device
        fixed = ((pool.as_floats().to(device), pool.labels.to(device)), kind.upper().replace("COMBINED", "Combined"))
        kind_of_ensemble = MixupInference
    _check_known(defence, kind_of_ensemble, arguments)

    def make(seed: int, passes: int) -> nn.Module:
        return partial(kind_of_ensemble, model, *fixed, **{passes_name: passes})(**arguments, seed=seed)

    known = arguments | {passes_name: passes, "search_passes": search_passes}
    subject = Subject(name, model, make, written(kind, known), passes, search_passes)
    subject.module(0)  # which checks the arguments
    return subject


def _check_known(defence: str, ensemble: Callable[..., nn.Module], arguments: dict[str, Any]) -> None:
    known = set(inspect.signature(ensemble).parameters) - {"model", "pool", "method", "seed", "share_parameters"}
    for name in arguments:
        if name not in known:
            raise ValueError(f"defence={defence!r}: {name!r} is unknown; known are {', '.join(sorted(known))}")
