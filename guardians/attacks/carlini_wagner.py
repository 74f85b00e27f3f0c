"""The attacks of Carlini and Wagner, "Towards evaluating the robustness of neural networks", 2017, in norms 2 and inf.

Both minimise a distance plus c * f(x + delta) by Adam, where f is small when the model is fooled (`objectives`), over
variables that keep the image valid (`boxes`). They differ in the distance, and in what steers c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from art.attacks import evasion
from torch import Tensor

from guardians.attacks.boxes import BOXES, Box, NoBox
from guardians.attacks.norms import lp_norm
from guardians.attacks.objectives import OBJECTIVE_FUNCTIONS, TAKE_CONFIDENCE, largest_other, margin
from guardians.attacks.registry import Agreement, Family, Spec, register
from guardians.engine.attack import Attack
from guardians.engine.checks import check_choice, check_number
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Number, OptionalCount, Positive, Size
from guardians.engine.run import rounding
from guardians.engine.state import Answer, Progress, State, per_image

__all__ = ["CarliniL2Method", "CarliniLInfMethod", "CarliniWagnerL2", "CarliniWagnerLinf"]

_LARGEST_CONST = 1e10
_ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class Descent:
    """What the model's answer at the query says of each sample.

    Attributes:
        reached: bool (N,), whether the query fools the model with the confidence asked for.
        f: the objective function (N,).
        gradient: of f with respect to the query (N, ...).
        offset: what is to be small, the query minus the image (N, ...).
        distance: of the query to the image (N,), in the norm of the attack.
    """

    reached: Tensor
    f: Tensor
    gradient: Tensor
    offset: Tensor
    distance: Tensor


class _CarliniWagner(Attack):
    """What the two norms share: variables in a box, an objective function, and Adam."""

    _: KW_ONLY
    box: Annotated[str, partial(check_choice, known=tuple(BOXES))] = "tanh"
    objective_function: Annotated[str, partial(check_choice, known=tuple(OBJECTIVE_FUNCTIONS))] = "f6"

    _options: ClassVar[tuple[str, ...]] = ("mask", "first_index")
    keeps: ClassVar[str] = "nearest"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._made_for: Any = None
        self._bounds: Any = None

    def start(self, state: State) -> None:
        """The variables of the image."""
        x = state.x
        number = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        state.image = x.clone()
        state.home = self.boundary(x).variable(x)
        state.variable = state.home.clone()
        state.mean, state.square = torch.zeros_like(x), torch.zeros_like(x)
        state.step, state.const = number, torch.full_like(number, self.initial_const)

    def query(self, state: State) -> Tensor:
        """The image of the variables."""
        return state.image

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """-f, which is ascended."""
        return -self.f(self.objective_function, logits, y, state)

    def update(self, state: State, answer: Answer) -> Progress:
        """A step of Adam; done when the search is over, or nothing can be nearer."""
        assert answer.gradient is not None
        assert answer.distance is not None
        descent = -answer.gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        if state.mask is not None:
            descent = descent.masked_fill(~state.mask, 0)
        offset = self.boundary(state.x).offset(state.variable, state.x)
        found = Descent(answer.fooled, -answer.value, descent, offset, answer.distance)
        done = self.advance(state, answer.logits, found)
        image = self.boundary(state.x).image(state.variable)
        state.image = image if state.mask is None else torch.where(state.mask, image, state.x)
        return Progress(done | (state.best_distance == 0))

    @abstractmethod
    def advance(self, state: State, logits: Tensor, answer: Descent) -> Tensor:
        """Move the variables, and steer what the norm steers; whose search is over: bool (N,)."""

    def f(self, name: str, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """An objective function (N,)."""
        wanted, unwanted = (y, largest_other(logits, y)) if self.targeted else (self.rival(logits, y, state), y)
        return OBJECTIVE_FUNCTIONS[name](logits, wanted, unwanted, float(self.confidence))

    def rival(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The class (N,) to which an untargeted attack goes: of the others the one with the largest logit."""
        return largest_other(logits, y)

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether the margin is above `confidence`, by more than rounding: bool (N,)."""
        return margin(logits, y, targeted=self.targeted) > self.confidence + rounding(logits)

    def boundary(self, x: Tensor) -> Box:
        """The box of images such as `x`, made once, as its bounds have to be moved to the device."""
        bounds = self.victim.clip_values
        made_for = (self.box, x.device, x.dtype)
        if self._made_for != made_for or self._bounds is not bounds:
            self._boundary = NoBox(x) if bounds is None else BOXES[self.box](bounds, x)
            self._made_for, self._bounds = made_for, bounds
        return self._boundary

    def descend(
        self, state: State, of_model: Tensor, of_distance: Tensor, rate: Tensor, betas: tuple[float, float]
    ) -> None:
        """A step of Adam (Kingma and Ba 2015, algorithm 1) of size `rate` (N,) down c * f plus the distance.

        Args:
            state: whose variables, moments and count of steps are each sample's own.
            of_model: the gradient of f with respect to the image (N, ...).
            of_distance: that of the distance with respect to the offset (N, ...).
            rate: learning rates (N,).
            betas: how much of the moments is kept.
        """
        box, x, variable = self.boundary(state.x), state.x, state.variable
        gradient = box.gradient(per_image(state.const, x) * of_model, of_distance, variable)
        if state.mask is not None:
            gradient = gradient.masked_fill(~state.mask, 0)
        state.step = state.step + 1
        step = per_image(state.step, x)
        state.mean = torch.lerp(gradient, state.mean, betas[0])
        state.square = torch.lerp(gradient.square(), state.square, betas[1])
        scale = (state.square / (1 - betas[1] ** step)).sqrt_().add_(_ADAM_EPSILON)
        change = (state.mean * (per_image(rate, x) / (1 - betas[0] ** step))).div_(scale)
        state.variable = box.confine(variable - change)

    def forget(self, state: State, rows: Tensor, *, position: bool) -> None:
        """Start anew with some samples (N,): fresh moments, and with `position` at the image."""
        images = per_image(rows, state.x)
        if position:
            state.variable = torch.where(images, state.home, state.variable)
        state.mean, state.square = state.mean.masked_fill(images, 0), state.square.masked_fill(images, 0)
        state.step = state.step.masked_fill(rows, 0)

    def _checked_inputs(self, x: Tensor, y: Any, options: dict[str, Any]) -> dict[str, Tensor]:
        inputs = super()._checked_inputs(x, y, options)
        if self.victim.has_single_output:
            raise ValueError("the model returns a single output: Carlini-Wagner compares logits, so needs two or more")
        return inputs

    def _check_params(self) -> None:
        super()._check_params()
        if self.confidence > 0 and self.objective_function not in TAKE_CONFIDENCE:
            raise ValueError(
                f"confidence={self.confidence}: must be 0 for objective_function={self.objective_function!r}; "
                f"{' and '.join(TAKE_CONFIDENCE)} compare logits, in which a confidence is measured"
            )


class CarliniWagnerL2(_CarliniWagner):
    """C&W in norm 2: the smallest ||delta||_2 that fools the model, by descent on ||delta||_2^2 + c * f(x + delta).

    An image that the model already gets wrong, by more than `confidence`, comes back as it is. So does one for which no
    perturbation is found; `report.fooled` tells them apart. What was found is the nearest over the whole search.

    With `adaptive=False` it is the attack of the paper (sections V and VI.A): from the image, `max_iter` steps of Adam
    at a constant learning rate for each of `binary_search_steps` values of c, which grows tenfold until an image is
    found and is bisected from then on. As in the authors' code, a descent ends when a tenth of its steps has not
    lowered the loss by 0.01 % (`abort_early`), and the last of ten or more repeats the smallest c that has succeeded.

    With `adaptive=True`, the default, the same number of steps goes further:

    - An untargeted attack is the best of the targeted ones (section III.B), and the nearest class is often not the
      one with the largest logit. The first steps measure f / ||grad f||, the distance to first order
      (Moosavi-Dezfooli et al., "DeepFool", 2016, equation 8), of up to 9 classes. Descents go to the nearest, the
      second nearest and so on.
    - c starts where the linear model puts it, 2 f / ||grad f||^2, or at `initial_const` where that says nothing. It
      falls by a tenth with each step that fools the model and grows with each that does not.
    - The step size starts in proportion to the distance, at most at `learning_rate`, and falls to a hundredth.
    - With `abort_early`, a descent whose best image gets no better moves on to smaller steps, and ends when it is
      behind another class. Classes that cannot be nearer than the best image, to first order, are left out.

    Takes the arguments of `art.attacks.evasion.CarliniL2Method` with their meaning and order.

    Args:
        classifier: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        confidence: margin, in logits, by which the model is to be wrong (the paper's kappa).
        targeted: reach the labels rather than leave them.
        learning_rate: of Adam, in units of half the range of `clip_values`; with `box="tanh"` for the variable w.
        binary_search_steps: values of c. With 1, c stays at `initial_const`. Adaptive: the most descents.
        max_iter: steps for each of them. An image costs at most `binary_search_steps * max_iter` gradients, or 2.
        initial_const: the first c, for images in the unit of `clip_values`; see above for the adaptive search.
        max_halving, max_doubling: without effect; ART's line search, whose place Adam takes here as in the paper.
        batch_size: images in one forward pass.
        verbose: show a progress bar.
        box: how images stay within `clip_values` (section V.B): "tanh", a change of variables, "projected" or "clipped"
            gradient descent. Estimators without `clip_values` have no box.
        objective_function: "f1" to "f7" (section IV.A), see `objectives`. A `confidence` needs "f6" or "f7".
        adaptive: see above; False is the paper's search.
        abort_early: give up what makes no progress, see above. Each image does so on its own.
        seed, precision, judge_samples, eot_samples: see `Attack`; "auto" is "float32", because what the search is after
            is the boundary, where the rounding of bfloat16 counts.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    classifier: Estimator
    confidence: Number = 0.0
    targeted: Flag = False
    learning_rate: Number = 0.1
    binary_search_steps: Size = 10
    max_iter: Size = 10
    initial_const: Positive = 0.01
    max_halving: Count = 5
    max_doubling: Count = 5
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    adaptive: Flag = True
    abort_early: Flag = True

    norm = 2.0

    def start(self, state: State) -> None:
        """The variables of the image, and what the search for c keeps."""
        super().start(state)
        self._search_for_const.start(state)

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """-f, which is ascended; the gap of the logits while distances are measured."""
        objective, measures = super().objective(logits, y, state), self._search_for_const.measures(state)
        if measures is None or self.objective_function == "f6":
            return objective
        return torch.where(measures, -self.f("f6", logits, y, state), objective)

    def rival(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The class (N,) to which an untargeted attack goes."""
        return self._search_for_const.rival(logits, y, state)

    def advance(self, state: State, logits: Tensor, answer: Descent) -> Tensor:
        """As the search for c does."""
        return self._search_for_const.advance(state, logits, answer)

    @property
    def _search_for_const(self) -> _SearchForConst:
        return (_NearestClasses if self.adaptive else _BinarySearch)(self)


class _SearchForConst(ABC):
    """What steers c, and with it the step size and the class that an untargeted attack goes to."""

    def __init__(self, attack: CarliniWagnerL2) -> None:
        self.attack = attack

    @abstractmethod
    def start(self, state: State) -> None:
        """Its own columns."""

    def measures(self, state: State) -> Tensor | None:
        """Whose distance to a class is being measured, bool (N,); None where nobody's is."""
        return None

    def rival(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """See `_CarliniWagner.rival`."""
        return largest_other(logits, y)

    @abstractmethod
    def advance(self, state: State, logits: Tensor, answer: Descent) -> Tensor:
        """See `_CarliniWagner.advance`."""


class _BinarySearch(_SearchForConst):
    """The paper's: a descent from the image for each c."""

    _betas = (0.9, 0.999)

    def start(self, state: State) -> None:
        """The search has not begun."""
        state.lower, state.search = torch.zeros_like(state.const), torch.zeros_like(state.const)
        state.upper, state.last_loss = (torch.full_like(state.const, torch.inf) for _ in range(2))
        state.found = torch.zeros_like(state.const, dtype=torch.bool)

    def advance(self, state: State, logits: Tensor, answer: Descent) -> Tensor:
        """A step, and where it was the last of a descent the next c."""
        attack = self.attack
        state.found = state.found | answer.reached
        over = self._stalls(state, answer)
        rate = torch.full_like(state.const, attack.learning_rate)
        attack.descend(state, answer.gradient, 2 * answer.offset, rate, self._betas)
        over |= state.step >= attack.max_iter
        self._bisect(state, over)
        attack.forget(state, over, position=True)
        return state.search >= attack.binary_search_steps

    def _stalls(self, state: State, answer: Descent) -> Tensor:
        """Whether a tenth of the descent has not lowered the loss: bool (N,)."""
        if not self.attack.abort_early:
            return torch.zeros_like(state.found)
        checked = state.step % max(self.attack.max_iter // 10, 1) == 0
        loss, last = state.const * answer.f + answer.distance**2, state.last_loss
        state.last_loss = torch.where(checked, loss, last)
        return checked & (loss > last - 1e-4 * last.abs())

    def _bisect(self, state: State, over: Tensor) -> None:
        """The next c of the samples whose descent is over."""
        const, found, searches = state.const, state.found, self.attack.binary_search_steps
        state.upper = torch.where(over & found, torch.minimum(state.upper, const), state.upper)
        state.lower = torch.where(over & ~found, torch.maximum(state.lower, const), state.lower)
        between = (state.lower + state.upper) / 2
        following = torch.where(state.upper.isfinite(), between, 10 * const)
        state.search = state.search + over
        if searches >= 10:
            following = torch.where(state.search == searches - 1, state.upper, following)
        state.const = torch.where(over, following.clamp_max(_LARGEST_CONST), const)
        state.found = found & ~over
        state.last_loss = state.last_loss.masked_fill(over, torch.inf)


class _NearestClasses(_SearchForConst):
    """Descents to the nearest classes, along which c follows every step and the step size falls.

    The numbers were tuned on images of the two bundled models of width 16, one of them adversarially trained.
    """

    _betas = (0.5, 0.999)  # less momentum than usual: the boundary is crossed to and fro
    _candidates = 9
    _steps_per_candidate = 10  # of the whole search: a short one looks at fewer classes
    _shortest_descent = 50
    _first_step = 4.0  # times the distance to the boundary, spread over all pixels
    _last_step = 0.01  # times the first
    _const_fooled, _const_not_fooled, _const_never_fooled = 0.9, 1.1, 1.2
    _improvement = 1e-3
    _leap = 0.1  # of a descent, where it makes no progress
    _behind = 1.1
    _curvature = 0.5  # nearly all boundaries are no nearer than this times the distance to first order

    def __init__(self, attack: CarliniWagnerL2) -> None:
        super().__init__(attack)
        steps = attack.binary_search_steps * attack.max_iter
        assert attack.victim.nb_classes is not None
        most = 1 if attack.targeted else min(self._candidates, attack.victim.nb_classes - 1)
        self.classes = max(1, min(most, steps // self._steps_per_candidate))
        left = max(1, steps - self.classes)
        self.descents = max(1, min(attack.binary_search_steps, left // self._shortest_descent, self.classes))
        self.steps = left // self.descents

    def start(self, state: State) -> None:
        """No class is known."""
        state.rivals = torch.full_like(state.y, -1)[:, None].repeat(1, self.classes)
        state.nearness = torch.full_like(state.const, torch.inf)[:, None].repeat(1, self.classes)
        state.measured, state.descent = torch.zeros_like(state.y), torch.zeros_like(state.y)
        state.progress, state.stalled = torch.zeros_like(state.const), torch.zeros_like(state.const)
        state.nearest = torch.full_like(state.const, torch.inf)

    def rival(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The class to be measured, or gone to; where any is reached on the way, that one."""
        column = torch.where(self.measures(state), state.measured, state.descent)
        chosen, largest = _pick(state.rivals, column), largest_other(logits, y)
        return torch.where((chosen < 0) | self.attack.reached(logits, y), largest, chosen)

    def advance(self, state: State, logits: Tensor, answer: Descent) -> Tensor:
        """Measure a class, or go a step towards one, and where that was the last step of a descent to the next."""
        measures = self.measures(state)
        self._measure(state, logits, answer, measures)
        if self.attack.binary_search_steps > 1:
            self._follow(state, answer)
        rate = self._first_rate(state) * self._last_step**state.progress
        self.attack.descend(state, answer.gradient, 2 * answer.offset, rate, self._betas)
        over = self._descent_is_over(state, answer) & ~measures

        following = state.descent + over
        goes_on = following < self.descents
        if self.attack.abort_early:
            nearness = _pick(state.nearness, following.clamp_max(self.classes - 1))
            best = state.best_distance
            goes_on &= (self._curvature * nearness < best) | best.isinf()
        state.descent = torch.where(goes_on, following, state.descent)
        anew = measures | over
        self.attack.forget(state, anew, position=True)
        state.progress, state.stalled = state.progress.masked_fill(anew, 0), state.stalled.masked_fill(anew, 0)
        state.nearest = state.nearest.masked_fill(anew, torch.inf)
        return over & ~goes_on

    def measures(self, state: State) -> Tensor:
        """Whose classes are not all measured yet: bool (N,)."""
        return state.measured < self.classes

    def _measure(self, state: State, logits: Tensor, answer: Descent, measures: Tensor) -> None:
        """Note how far the class is that was asked about; when all are known, sort them."""
        column = state.measured.clamp_max(self.classes - 1)[:, None]
        if not self.attack.targeted:  # the first class asked about is the first of these
            largest = logits.scatter(1, state.y[:, None], -torch.inf).topk(self.classes).indices
            state.rivals = torch.where((state.measured == 0)[:, None], largest, state.rivals)
        distance = (answer.f + self.attack.confidence) / lp_norm(answer.gradient, 2).flatten()
        distance = torch.where(measures, distance, _pick(state.nearness, column[:, 0]))
        state.nearness = state.nearness.scatter(1, column, distance[:, None])
        state.measured = state.measured + measures
        complete = (measures & ~self.measures(state))[:, None]
        nearness, order = state.nearness.sort(dim=1, stable=True)  # NaN comes last
        state.nearness = torch.where(complete, nearness, state.nearness)
        state.rivals = torch.where(complete, state.rivals.gather(1, order), state.rivals)

    def _follow(self, state: State, answer: Descent) -> None:
        """c after this step."""
        slope = lp_norm(answer.gradient, 2).flatten()
        linear = (2 * (answer.f + self.attack.confidence) / slope.square()).nan_to_num(nan=0, posinf=0)
        factor = torch.full_like(state.const, self._const_never_fooled)
        factor = factor.masked_fill(state.nearest.isfinite(), self._const_not_fooled)
        followed = state.const * factor.masked_fill(answer.reached, self._const_fooled)
        first = linear.where(linear > 0, torch.full_like(linear, self.attack.initial_const))
        state.const = torch.where(state.step == 0, first, followed).clamp_max(_LARGEST_CONST)

    def _first_rate(self, state: State) -> Tensor:
        """Of the descent (N,)."""
        x = state.x
        size = x[0].numel() ** 0.5 * self.attack.boundary(x).half.mean()
        rate = self._first_step * _pick(state.nearness, state.descent) / size
        return rate.nan_to_num(nan=torch.inf).clamp_max(self.attack.learning_rate)

    def _descent_is_over(self, state: State, answer: Descent) -> Tensor:
        """After all steps, or as many as were worth it: bool (N,)."""
        distance = answer.distance.masked_fill(~answer.reached, torch.inf)
        improves = distance < (1 - self._improvement) * state.nearest
        state.nearest = torch.minimum(state.nearest, distance)
        state.progress = state.progress + 1 / self.steps
        over = state.step >= self.steps
        if not self.attack.abort_early:
            return over
        state.stalled = (state.stalled + state.nearest.isfinite()).masked_fill(improves, 0)
        leaps = state.stalled >= max(3, self.steps // 10)
        state.stalled = state.stalled.masked_fill(leaps, 0)
        state.progress = state.progress + self._leap * leaps.to(state.progress)
        behind = state.nearest > self._behind * state.best_distance
        return over | (state.progress >= 1) | ((state.progress >= 0.5) & behind)


class CarliniWagnerLinf(_CarliniWagner):
    """C&W in norm inf: the smallest largest change of a pixel that fools the model (section VI.C).

    Descends on c * f(x + delta) + sum of (|delta_i| - tau)+, with Adam. When an image is found whose pixels are all
    within tau, tau becomes `decrease_factor` times its largest change. When none is found in `max_iter` steps, c
    grows by `const_factor`. The descent goes on from where it is (the paper's warm start), with fresh moments. It
    ends when c is above `largest_const`, or tau below 1/256 of the range. The nearest image of the whole search is
    returned, and images that no perturbation was found for come back as they are, see `report.fooled`.

    Takes the arguments of `art.attacks.evasion.CarliniLInfMethod` with their meaning and order; as ART's starts at the
    image for each tau and each c, an image costs it many times the gradients.

    Args:
        classifier: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        confidence: margin, in logits, by which the model is to be wrong (the paper's kappa).
        targeted: reach the labels rather than leave them.
        learning_rate: of Adam, in units of half the range of `clip_values`; with `box="tanh"` for the variable w. It
            is never more than a tenth of tau, because larger steps carry pixels past it again and again.
        max_iter: steps for each tau and c.
        decrease_factor: of tau, between 0 and 1.
        initial_const: the first c.
        largest_const: the largest.
        const_factor: of c, above 1.
        batch_size: images in one forward pass.
        verbose: show a progress bar.
        box, objective_function: see `CarliniWagnerL2`.
        seed, precision, judge_samples, eot_samples: see `CarliniWagnerL2`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    classifier: Estimator
    confidence: Number = 0.0
    targeted: Flag = False
    learning_rate: Number = 0.01
    max_iter: Size = 10
    decrease_factor: Positive = 0.9
    initial_const: Positive = 1e-5
    largest_const: Positive = 20.0
    const_factor: Annotated[float, partial(check_number, low=1, exclusive=True, single=True)] = 2.0
    batch_size: OptionalCount = None
    verbose: Flag = True

    norm = float("inf")
    _betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    _largest_step: ClassVar[float] = 0.1  # of tau

    def start(self, state: State) -> None:
        """The variables of the image, with tau at the whole range."""
        super().start(state)
        state.tau = torch.ones_like(state.const) * self.boundary(state.x).widest

    def advance(self, state: State, logits: Tensor, answer: Descent) -> Tensor:
        """A step, after which tau falls where the image was within it, and c grows where none was for too long."""
        x, widest = state.x, self.boundary(state.x).widest
        within = answer.reached & (answer.distance <= state.tau)
        state.tau = torch.where(within, self.decrease_factor * answer.distance, state.tau)
        self.forget(state, within, position=False)
        beyond = answer.offset.abs() > per_image(state.tau, x)
        rate = (2 * self._largest_step * state.tau / widest).clamp_max(self.learning_rate)
        self.descend(state, answer.gradient, answer.offset.sign() * beyond, rate, self._betas)
        failed = state.step >= self.max_iter
        self.forget(state, failed, position=False)
        state.const = torch.where(failed, self.const_factor * state.const, state.const)
        return (state.const > self.largest_const) | (state.tau < widest / 256)

    def _check_params(self) -> None:
        super()._check_params()
        if self.decrease_factor >= 1:
            raise ValueError(f"decrease_factor={self.decrease_factor}: must be below 1")
        if self.largest_const < self.initial_const:
            raise ValueError(f"largest_const={self.largest_const}: must be at least initial_const={self.initial_const}")


evasion.CarliniL2Method.register(CarliniWagnerL2)
evasion.CarliniLInfMethod.register(CarliniWagnerLinf)
CarliniL2Method = CarliniWagnerL2
CarliniLInfMethod = CarliniWagnerLinf


def _pick(table: Tensor, columns: Tensor) -> Tensor:
    """One entry (N,) of each row of a table (N, columns)."""
    return table.gather(1, columns[:, None])[:, 0]


def _native(spec: Spec) -> tuple[type[Attack], dict[str, Any]]:
    arguments = spec.arguments("confidence", "learning_rate", steps="max_iter", const="initial_const")
    if spec.norm == float("inf"):
        return CarliniWagnerLinf, arguments
    return CarliniWagnerL2, arguments | spec.arguments("abort_early", "adaptive", searches="binary_search_steps")


# Exact where a toolkit is right, which is each image alone and with no abort. torchattacks has no switch for it; its
# checks end most runs. foolbox' default of 10,000 steps takes ten seconds an image.
_FOOLBOX = {"steps": 25, "searches": 4, "const": 0.01, "learning_rate": 0.01, "abort_early": False}
_TORCHATTACKS = {"steps": 50, "searches": 1, "const": 1.0, "learning_rate": 0.01}

register(
    Family(
        "C&W",
        norms=(2, float("inf")),
        parameters=("confidence", "steps", "searches", "const", "learning_rate", "abort_early", "adaptive"),
        native=_native,
        minimises_norm=True,
        agreements=(
            Agreement("exact", Spec("C&W", 2, params=_FOOLBOX), ("foolbox",)),
            Agreement("exact", Spec("C&W", 2, params=_TORCHATTACKS), ("torchattacks",)),
            Agreement("dominance", Spec("C&W", 2), ("ART", "torchattacks")),
            Agreement("dominance", Spec("C&W", 2, params={"steps": 100}), ("foolbox",)),
            Agreement("dominance", Spec("C&W", float("inf")), ("ART",), targeted=(False,)),
        ),
    )
)
