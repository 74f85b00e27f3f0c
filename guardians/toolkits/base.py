"""What the toolkits share: how their packages are found and read, the model that they are given, and the batches."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.attacks.registry import Spec
from guardians.engine.interfaces import ClassifierAttack
from guardians.engine.victim import Victim

__all__ = [
    "Builder",
    "Logits",
    "Recipe",
    "TensorAttack",
    "ToolkitAttack",
    "attack_classes",
    "installed",
    "own_arguments",
]

TensorAttack = Callable[..., Tensor]
"""Of images and labels, and what else it takes, as ART's attacks a `mask`."""
Recipe = tuple[Any, dict[str, Any]]
"""The name of a toolkit's class, or where it has none like this what makes one of its package, and its arguments."""
Builder = Callable[[Spec], Recipe | None]
"""What a toolkit has for a spec; None where it does not have that form."""


def installed(package: str) -> Any:
    """An optional package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is not installed: pip install guardians[parity]") from error


def attack_classes(module: Any, base: type) -> dict[str, type]:
    """The classes of a module that are attacks, by their own names, which leaves out other names for the same."""
    found = {value.__name__: value for value in vars(module).values() if inspect.isclass(value)}
    kept = {name: value for name, value in found.items() if issubclass(value, base) and not inspect.isabstract(value)}
    return {name: kept[name] for name in sorted(kept) if getattr(module, name, None) is kept[name]}


def own_arguments(attack: type, arguments: dict[str, Any], first: int = 1, **defaults: Any) -> dict[str, Any]:
    """Arguments of a toolkit's class, and those of the defaults that it takes and that are not given.

    Args:
        attack: the class.
        arguments: that are given.
        first: how many of its arguments come before, as the model does.
        defaults: by the names that they have where the class takes them.

    Raises:
        ValueError: the class does not take one of the arguments.
    """
    known = list(inspect.signature(attack).parameters)[first:]
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"{argument}: unknown to {attack.__name__}; known are {', '.join(known)}")
    return {name: value for name, value in defaults.items() if name in known} | arguments


class Logits(nn.Module):
    """`Victim.logits` as the module that a toolkit is given.

    The toolkit cannot move the user's model through it, nor put it into another mode.
    """

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        self.training = False
        self.module = victim.module  # a submodule, because torchattacks looks for the device in the parameters
        self._logits = victim.logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, ...)."""
        return self._logits(x)

    def train(self, mode: bool = True) -> Logits:
        """Nothing: the mode is the adapter's business."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Logits:
        return self


class ToolkitAttack(ClassifierAttack):
    """Another toolkit's attack with ART's interface (`generate`) and torchattacks' (`attack(images, labels)`).

    A subclass is the toolkit's call on one batch, `perturb`. The toolkit draws its random numbers as it always does,
    from torch's global generator. What it returns is not clipped or projected again.

    The loss is the toolkit's own. Fields that subclasses have: `batch_size`, images that the toolkit is given at once,
    `targeted` and `verbose`.

    Raises:
        EstimatorError, TypeError, ValueError: see `ClassifierAttack`.
    """

    @cached_property
    def logits(self) -> Logits:
        """The model that the toolkit is given."""
        return Logits(self.victim)

    @abstractmethod
    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """What the toolkit makes of one batch (N, ...) with labels or targets (N,), on the device of the model."""

    def _run(self, inputs: dict[str, Tensor], device: torch.device, first_index: int) -> Tensor:
        x, y = inputs["x"], inputs.get("y")
        found = torch.empty_like(x)
        progress = tqdm(total=len(x), desc=type(self).__name__, unit="image", disable=not self.verbose, leave=False)
        with torch.enable_grad(), progress:
            for first in range(0, len(x), int(self.batch_size)):
                rows = slice(first, first + int(self.batch_size))
                images = x[rows].to(device, copy=True)
                labels = self.victim.predict(images) if y is None else y[rows].to(device, copy=True)
                found[rows] = self.perturb(images, labels).detach()
                progress.update(len(images))
        return found
