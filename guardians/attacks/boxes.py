"""Box constraints of an optimisation over images (Carlini and Wagner 2017, section V.B): three ways to stay valid.

Each maps images to variables that an unconstrained optimiser may move, and back. Variables are in units of half the
range of `clip_values`, so a step means the same whatever the range: mid-grey is 0, and the bounds are -1 and 1, or
where the change of variables takes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["BOXES", "Box", "ChangeOfVariables", "Clipped", "NoBox", "Projected"]


class Box(ABC):
    """The interval between `clip_values`, and the variables of an optimiser that may not leave it.

    Args:
        clip_values: bounds that broadcast to one image.
        like: a tensor whose dtype and device are taken.
    """

    def __init__(self, clip_values: tuple[Tensor, Tensor], like: Tensor) -> None:
        self.low, self.high = (bound.to(like) for bound in clip_values)
        self.middle = (self.low + self.high) / 2
        self.half = (self.high - self.low) / 2

    @property
    def widest(self) -> Tensor:
        """The largest range of a pixel, a number; 2 where there are no bounds."""
        return 2 * self.half.max()

    def variable(self, x: Tensor) -> Tensor:
        """The variable of images within the box."""
        return self.from_unit(((x - self.middle) / self.half).nan_to_num(nan=0.0))  # 0 / 0 where the bounds are equal

    def image(self, variable: Tensor) -> Tensor:
        """The image of a variable, within the box to the last bit."""
        return (self.middle + self.half * self.to_unit(variable)).clamp(self.low, self.high)

    def offset(self, variable: Tensor, x: Tensor) -> Tensor:
        """What is to be small: the difference of the image to `x`."""
        return self.image(variable) - x

    def gradient(self, of_model: Tensor, of_distance: Tensor, variable: Tensor) -> Tensor:
        """With respect to the variable, of a function of the image plus a function of the offset."""
        return self.half * (of_model + of_distance) * self.slope(variable)

    def confine(self, variable: Tensor) -> Tensor:
        """The variable after a step, moved to where the method allows it."""
        return variable

    @abstractmethod
    def from_unit(self, unit: Tensor) -> Tensor:
        """The variable of an image whose bounds are -1 and 1."""

    @abstractmethod
    def to_unit(self, variable: Tensor) -> Tensor:
        """The image, with bounds -1 and 1, of a variable."""

    @abstractmethod
    def slope(self, variable: Tensor) -> Tensor | float:
        """The derivative of `to_unit`."""


class ChangeOfVariables(Box):
    """Method 3 of the paper: x = tanh(w), here of an interval that is 5 % longer than the box at either end.

    On the interval itself a pixel at a bound has an infinite w and no slope, so that it would never move. With the
    margin all images have finite w, and a slope of at least 0.09; what the margin adds is cut off again.
    """

    _stretch = 1.05

    def from_unit(self, unit: Tensor) -> Tensor:
        """Finite."""
        return (unit / self._stretch).atanh()

    def to_unit(self, variable: Tensor) -> Tensor:
        """Beyond the bounds by rounding alone."""
        return self._stretch * variable.tanh()

    def slope(self, variable: Tensor) -> Tensor:
        """Largest at mid-grey."""
        return self._stretch * (1 - variable.tanh() ** 2)

    def confine(self, variable: Tensor) -> Tensor:
        """No further than the bounds, from where it would take steps to come back."""
        rim = torch.atanh(torch.ones_like(self.half) / self._stretch)
        return variable.clamp(-rim, rim)


class Projected(Box):
    """Method 1: after each step all pixels are clipped to the box."""

    def from_unit(self, unit: Tensor) -> Tensor:
        """The same."""
        return unit

    def to_unit(self, variable: Tensor) -> Tensor:
        """The same."""
        return variable

    def slope(self, variable: Tensor) -> Tensor | float:
        """One."""
        return 1.0

    def confine(self, variable: Tensor) -> Tensor:
        """Onto the box."""
        return variable.clamp(-1, 1)


class Clipped(Projected):
    """Method 2: the variable is free and its image clipped, so pixels beyond a bound feel the distance alone.

    The paper's distance is that of the variable itself, which is what brings such a pixel back.
    """

    def to_unit(self, variable: Tensor) -> Tensor:
        """What is valid of it."""
        return variable.clamp(-1, 1)

    def slope(self, variable: Tensor) -> Tensor:
        """One, or zero beyond the bounds."""
        return (variable.abs() <= 1).to(variable)

    def offset(self, variable: Tensor, x: Tensor) -> Tensor:
        """That of the image before it is clipped."""
        return self.middle + self.half * variable - x

    def gradient(self, of_model: Tensor, of_distance: Tensor, variable: Tensor) -> Tensor:
        """The distance is felt beyond the bounds too."""
        return self.half * (of_model * self.slope(variable) + of_distance)

    def confine(self, variable: Tensor) -> Tensor:
        """Anywhere."""
        return variable


class NoBox(Projected):
    """For images without bounds, which are their own variables."""

    def __init__(self, like: Tensor) -> None:
        infinity = torch.tensor(torch.inf)
        super().__init__((-infinity, infinity), like)
        self.middle, self.half = torch.zeros_like(self.low), torch.ones_like(self.low)

    def confine(self, variable: Tensor) -> Tensor:
        """Anywhere."""
        return variable


BOXES: dict[str, type[Box]] = {
    "tanh": ChangeOfVariables,
    "projected": Projected,
    "clipped": Clipped,
}
"""The methods by name."""
