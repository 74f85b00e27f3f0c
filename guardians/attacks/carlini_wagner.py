"""The attacks of Carlini and Wagner, "Towards evaluating the robustness of neural networks", 2017, in norms 2 and inf.

Both minimise a distance plus c * f(x + delta), where f is small when the model is fooled (`objectives`), within the box
of valid images (`boxes`), by Adam. They differ in the distance, and in what steers c.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.attacks.base import Attack, State
from guardians.attacks.boxes import BOXES, Box, NoBox
from guardians.attacks.checks import check_flag, check_integer, check_number
from guardians.attacks.norms import lp_norm
from guardians.attacks.objectives import OBJECTIVE_FUNCTIONS, TAKE_CONFIDENCE, largest_other, margin
from guardians.attacks.rng import SampleRng

__all__ = ["CarliniL2Method", "CarliniWagnerL2"]

_LARGEST_CONST = 1e10
_ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class _Answer:
    """What the model's answer at the query says of each sample.

    Attributes:
        reached: bool (N,), whether the query fools the model with the confidence asked for.
        better: bool (N,), whether it is also the nearest such image so far.
        f: the objective function (N,).
        gradient: of f with respect to the query (N, ...).
        offset: what is to be small, the query minus the image (N, ...).
        distance: of the query to the image (N,).
    """

    reached: Tensor
    better: Tensor
    f: Tensor
    gradient: Tensor
    offset: Tensor
    distance: Tensor


class _CarliniWagner(Attack):
    """What the two norms share: variables in a box, an objective function, Adam, and the best image so far."""

    attack_params: ClassVar[list[str]] = [
        *(name for name in Attack.attack_params if name != "early_stop"),
        "confidence",
        "learning_rate",
        "max_iter",
        "initial_const",
        "box",
        "objective_function",
    ]
    _norm: ClassVar[float]

    def __init__(
        self,
        classifier: PyTorchClassifier | nn.Module,
        *,
        confidence: float,
        learning_rate: float,
        max_iter: int,
        initial_const: float,
        box: str,
        objective_function: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(classifier, **kwargs)
        self.confidence = confidence
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.initial_const = initial_const
        self.box = box
        self.objective_function = objective_function

    @property
    def minimises_norm(self) -> bool:
        """Yes."""
        return True

    def start(self, x: Tensor, y: Tensor, rng: SampleRng, **options: Tensor) -> State:
        """Variables at the image, or at `x_adv_init`; no best image yet."""
        box = self.boundary(x)
        variable = box.variable(options.get("x_adv_init", x))
        state: State = {"x": x, "y": y}
        if "mask" in options:
            state["fixed"] = ~options["mask"]
            variable = torch.where(state["fixed"], box.variable(x), variable)
        number = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        state |= {"variable": variable, "mean": torch.zeros_like(x), "square": torch.zeros_like(x)}
        state |= {"step": number, "const": torch.full_like(number, self.initial_const)}
        state |= {"best": x.clone(), "best_distance": torch.full_like(number, torch.inf)}
        state["image"] = self._image(state)
        return state

    def query(self, state: State) -> Tensor:
        """The image of the variables."""
        return state["image"]

    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """-f, which is ascended."""
        wanted, unwanted = (y, largest_other(logits, y)) if self.targeted else (self.rival(logits, y, state), y)
        return -OBJECTIVE_FUNCTIONS[self.objective_function](logits, wanted, unwanted, float(self.confidence))

    def result(self, state: State) -> Tensor:
        """The nearest image that fooled the model, or where none did the image itself."""
        return state["best"]

    def rival(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The class (N,) to which an untargeted attack goes: of the others the one with the largest logit."""
        return largest_other(logits, y)

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether the margin is above `confidence`, by more than the rounding of another batch size: bool (N,)."""
        rounding = 256 * torch.finfo(logits.dtype).eps * logits.abs().nan_to_num(posinf=0).amax(1)
        return margin(logits, y, targeted=self.targeted) > self.confidence + rounding

    def boundary(self, x: Tensor) -> Box:
        """The box of images such as `x`."""
        clip_values = self.victim.clip_values
        return NoBox(x) if clip_values is None else BOXES[self.box](clip_values, x)

    def _take(self, state: State, logits: Tensor, gradient: Tensor | None) -> _Answer:
        """Read the answer, and keep the query where it is the best image so far."""
        assert gradient is not None
        x, image = state["x"], state["image"]
        reached = self.reached(logits, state["y"])
        distance = lp_norm(image - x, self._norm).flatten()
        better = reached & (distance < state["best_distance"])
        state["best"] = torch.where(_per_image(better, x), image, state["best"])
        state["best_distance"] = torch.where(better, distance, state["best_distance"])
        gradient = -gradient.nan_to_num(nan=0, posinf=0, neginf=0)
        if "fixed" in state:
            gradient = gradient.masked_fill(state["fixed"], 0)
        f = -self.objective(logits, state["y"], state)
        return _Answer(reached, better, f, gradient, self.boundary(x).offset(state["variable"], x), distance)

    def _descend(
        self, state: State, of_model: Tensor, of_distance: Tensor, rate: Tensor, betas: tuple[float, float]
    ) -> None:
        """One step of Adam (Kingma and Ba 2015, algorithm 1), each sample with its own moments and count of steps."""
        box, x, variable = self.boundary(state["x"]), state["x"], state["variable"]
        gradient = box.gradient(_per_image(state["const"], x) * of_model, of_distance, variable)
        if "fixed" in state:
            gradient = gradient.masked_fill(state["fixed"], 0)
        state["step"] = state["step"] + 1
        step = _per_image(state["step"], x)
        state["mean"] = torch.lerp(gradient, state["mean"], betas[0])
        state["square"] = torch.lerp(gradient.square(), state["square"], betas[1])
        scale = (state["square"] / (1 - betas[1] ** step)).sqrt_().add_(_ADAM_EPSILON)
        change = (state["mean"] * (_per_image(rate, x) / (1 - betas[0] ** step))).div_(scale)
        state["variable"] = box.confine(variable - change)

    def _begin_again(self, state: State, rows: Tensor) -> None:
        """Put some samples (N,) back to the image, with fresh moments."""
        images = _per_image(rows, state["x"])
        state["variable"] = torch.where(images, self.boundary(state["x"]).variable(state["x"]), state["variable"])
        for name in ("mean", "square"):
            state[name] = state[name].masked_fill(images, 0)
        state["step"] = state["step"].masked_fill(rows, 0)

    def _image(self, state: State) -> Tensor:
        image = self.boundary(state["x"]).image(state["variable"])
        return torch.where(state["fixed"], state["x"], image) if "fixed" in state else image

    def _check_params(self) -> None:
        super()._check_params()
        check_number("confidence", self.confidence, low=0)
        check_number("learning_rate", self.learning_rate, low=0, exclusive=True)
        check_number("initial_const", self.initial_const, low=0, exclusive=True)
        check_integer("max_iter", self.max_iter, low=1)
        _check_choice("box", self.box, BOXES)
        _check_choice("objective_function", self.objective_function, OBJECTIVE_FUNCTIONS)
        if self.confidence > 0 and self.objective_function not in TAKE_CONFIDENCE:
            raise ValueError(
                f"confidence={self.confidence}: must be 0 for objective_function={self.objective_function!r}; "
                f"only {' and '.join(TAKE_CONFIDENCE)} compare logits"
            )


class CarliniWagnerL2(_CarliniWagner):
    """TODO"""

    attack_params: ClassVar[list[str]] = [
        *_CarliniWagner.attack_params,
        "binary_search_steps",
        "max_halving",
        "max_doubling",
        "adaptive",
        "abort_early",
    ]
    _norm: ClassVar[float] = 2

    def __init__(
        self,
        classifier: PyTorchClassifier | nn.Module,
        confidence: float = 0.0,
        targeted: bool = False,
        learning_rate: float = 0.1,
        binary_search_steps: int = 10,
        max_iter: int = 10,
        initial_const: float = 0.01,
        max_halving: int = 5,
        max_doubling: int = 5,
        batch_size: int = 32,
        verbose: bool = True,
        *,
        box: str = "tanh",
        objective_function: str = "f6",
        adaptive: bool = True,
        abort_early: bool = True,
        seed: int | None = None,
        precision: str = "auto",
        judge_samples: int | None = None,
        eot_samples: int = 1,
    ) -> None:
        super().__init__(
            classifier,
            confidence=confidence,
            learning_rate=learning_rate,
            max_iter=max_iter,
            initial_const=initial_const,
            box=box,
            objective_function=objective_function,
            targeted=targeted,
            batch_size=batch_size,
            verbose=verbose,
            seed=seed,
            precision=precision,
            judge_samples=judge_samples,
            eot_samples=eot_samples,
        )
        self.binary_search_steps = binary_search_steps
        self.max_halving = max_halving
        self.max_doubling = max_doubling
        self.adaptive = adaptive
        self.abort_early = abort_early
        self._check_params()

    @property
    def _schedule(self) -> _Schedule:
        return _ADAPTIVE if self.adaptive else _BINARY_SEARCH

    def start(self, x: Tensor, y: Tensor, rng: SampleRng, **options: Tensor) -> State:
        """Variables at the image, or at `x_adv_init`; no best image yet."""
        state = super().start(x, y, rng, **options)
        return state | self._schedule.start(self, state)

    def rival(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """The class (N,) to which an untargeted attack goes."""
        return self._schedule.rival(self, logits, y, state)

    def update(self, state: State, logits: Tensor, gradient: Tensor | None) -> Tensor:
        """One step of Adam; done when the schedule says so, or the image itself fools the model."""
        done = self._schedule.step(self, state, logits, self._take(state, logits, gradient))
        state["image"] = self._image(state)
        return done | (state["best_distance"] == 0)

    def _check_params(self) -> None:
        super()._check_params()
        for name in ("binary_search_steps", "max_halving", "max_doubling"):
            check_integer(name, getattr(self, name), low=1)
        check_flag("adaptive", self.adaptive)
        check_flag("abort_early", self.abort_early)


class _Schedule(ABC):
    """What steers c, the step size and the class that is gone to."""

    @abstractmethod
    def start(self, attack: CarliniWagnerL2, state: State) -> State:
        """State of its own."""

    @abstractmethod
    def rival(self, attack: CarliniWagnerL2, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """See `_CarliniWagner.rival`."""

    @abstractmethod
    def step(self, attack: CarliniWagnerL2, state: State, logits: Tensor, answer: _Answer) -> Tensor:
        """Move the variables; which samples are done, bool (N,)."""


class _BinarySearch(_Schedule):
    """The paper's: for each c a descent from the image; c grows tenfold until one succeeds, then is bisected."""

    _betas = (0.9, 0.999)

    def start(self, attack: CarliniWagnerL2, state: State) -> State:  # noqa: D102
        number = torch.zeros_like(state["const"])
        bounds = {"lower": number.clone(), "upper": torch.full_like(number, torch.inf)}
        return {**bounds, "search": number.clone(), "found": number.bool(), "last_loss": torch.full_like(number, torch.inf)}

    def rival(self, attack: CarliniWagnerL2, logits: Tensor, y: Tensor, state: State) -> Tensor:  # noqa: D102
        return largest_other(logits, y)

    def step(self, attack: CarliniWagnerL2, state: State, logits: Tensor, answer: _Answer) -> Tensor:  # noqa: D102
        state["found"] = state["found"] | answer.reached
        over = self._stalls(attack, state, answer)
        rate = torch.full_like(state["const"], attack.learning_rate)
        attack._descend(state, answer.gradient, 2 * answer.offset, rate, self._betas)
        over |= state["step"] >= attack.max_iter
        self._next_const(attack, state, over)
        attack._begin_again(state, over)
        return state["search"] >= attack.binary_search_steps

    def _stalls(self, attack: CarliniWagnerL2, state: State, answer: _Answer) -> Tensor:
        """Whether the loss has not fallen since the last tenth of the descent: bool (N,)."""
        if not attack.abort_early:
            return torch.zeros_like(state["found"])
        checked = state["step"] % max(attack.max_iter // 10, 1) == 0
        loss, last = state["const"] * answer.f + answer.distance**2, state["last_loss"]
        state["last_loss"] = torch.where(checked, loss, last)
        return checked & (loss > last - 1e-4 * last.abs())

    def _next_const(self, attack: CarliniWagnerL2, state: State, over: Tensor) -> None:
        const, found = state["const"], state["found"]
        state["upper"] = torch.where(over & found, torch.minimum(state["upper"], const), state["upper"])
        state["lower"] = torch.where(over & ~found, torch.maximum(state["lower"], const), state["lower"])
        bounded = state["upper"].isfinite()
        following = torch.where(bounded, (state["lower"] + state["upper"]) / 2, 10 * const)
        state["search"] = state["search"] + over
        if attack.binary_search_steps >= 10:  # the last search repeats the smallest c that has succeeded
            is_last = state["search"] == attack.binary_search_steps - 1
            following = torch.where(is_last, state["upper"], following)
        state["const"] = torch.where(over, following.clamp_max(_LARGEST_CONST), const)
        state["found"] = found & ~over
        state["last_loss"] = state["last_loss"].masked_fill(over, torch.inf)


class _Adaptive(_Schedule):
    """Descents to the nearest classes, along which c follows each step and the step size falls."""

    _betas = (0.5, 0.999)
    _candidates = 9
    _shortest = 50
    _shrinks_to = 0.01
    _decrease, _increase = 0.9, 1.1

    def start(self, attack: CarliniWagnerL2, state: State) -> State:  # noqa: D102
        number = torch.zeros_like(state["const"])
        classes = self._classes(attack)
        rivals = torch.full((len(number), classes), -1, dtype=torch.int64, device=number.device)
        nearness = torch.full((len(number), classes), torch.inf, dtype=number.dtype, device=number.device)
        return {
            "rivals": rivals,
            "nearness": nearness,
            "probe": torch.zeros_like(state["y"]),
            "descent": torch.zeros_like(state["y"]),
            "progress": number.clone(),
            "stalled": number.clone(),
            "descent_best": torch.full_like(number, torch.inf),
        }

    def rival(self, attack: CarliniWagnerL2, logits: Tensor, y: Tensor, state: State) -> Tensor:  # noqa: D102
        largest = largest_other(logits, y)
        column = torch.where(self._probing(state), state["probe"], state["descent"])
        chosen = state["rivals"].gather(1, column[:, None])[:, 0]
        # Where another class is reached on the way, that is as good.
        return torch.where((chosen < 0) | attack.reached(logits, y), largest, chosen)

    def step(self, attack: CarliniWagnerL2, state: State, logits: Tensor, answer: _Answer) -> Tensor:  # noqa: D102
        budget = attack.binary_search_steps * attack.max_iter
        classes = state["rivals"].shape[1]
        descents = min(attack.binary_search_steps, max(1, (budget - classes) // self._shortest), classes)
        steps = max(1, (budget - classes) // descents)

        probing = self._probing(state)
        self._probe(attack, state, logits, answer, probing)
        self._adapt_const(attack, state, answer, probing)
        rate = self._rate(attack, state) * self._shrinks_to ** state["progress"]
        attack._descend(state, answer.gradient, 2 * answer.offset, rate.masked_fill(probing, 0), self._betas)

        improves = answer.reached & (answer.distance < 0.999 * state["descent_best"])
        state["descent_best"] = torch.where(answer.reached, torch.minimum(answer.distance, state["descent_best"]), state["descent_best"])
        hit = state["descent_best"].isfinite()
        state["stalled"] = (state["stalled"] + hit).masked_fill(improves, 0)
        state["progress"] = state["progress"] + 1 / steps
        over = state["step"] >= steps
        if attack.abort_early:
            plateau = state["stalled"] >= max(3, steps // 10)
            state["progress"] = state["progress"] + self._jump * plateau
            state["stalled"] = state["stalled"].masked_fill(plateau, 0)
            over |= state["progress"] >= 1
            over |= (state["progress"] >= 0.5) & (state["descent_best"] > 1.1 * state["best_distance"])
        over = over & ~probing
        following = state["descent"] + over
        more = following < descents
        nearness = state["nearness"].gather(1, following.clamp_max(classes - 1)[:, None])[:, 0]
        if attack.abort_early:
            more &= 0.6 * nearness < state["best_distance"]
        state["descent"] = torch.where(more, following, state["descent"])
        again = (over & more) | probing
        attack._begin_again(state, again)
        for name in ("progress", "stalled"):
            state[name] = state[name].masked_fill(again, 0)
        state["descent_best"] = state["descent_best"].masked_fill(again, torch.inf)
        return over & ~more

    _jump = 0.1

    def _probing(self, state: State) -> Tensor:
        return state["probe"] < state["rivals"].shape[1]

    def _classes(self, attack: CarliniWagnerL2) -> int:
        """How many classes are looked at."""
        if attack.targeted:
            return 1
        assert attack.victim.nb_classes is not None
        budget = attack.binary_search_steps * attack.max_iter
        return min(self._candidates, attack.victim.nb_classes - 1, max(1, budget // 10))

    def _probe(self, attack: CarliniWagnerL2, state: State, logits: Tensor, answer: _Answer, probing: Tensor) -> None:
        """Note the distance, to first order, of the class that was asked for, and sort when all are known."""
        y, column = state["y"][:, None], state["probe"][:, None]
        classes = state["rivals"].shape[1]
        first = probing & (state["probe"] == 0)
        if not attack.targeted:
            candidates = logits.scatter(1, y, -torch.inf).topk(classes).indices
            state["rivals"] = torch.where(first[:, None], candidates, state["rivals"])
        distance = (answer.f + attack.confidence) / lp_norm(answer.gradient, 2).flatten()
        column = column.clamp_max(classes - 1)
        known = torch.where(probing[:, None], distance[:, None], state["nearness"].gather(1, column))
        nearness = state["nearness"].scatter(1, column, known)
        state["probe"] = state["probe"] + probing
        nearness, order = nearness.sort(dim=1, stable=True)
        complete = (probing & ~self._probing(state))[:, None]
        state["rivals"] = torch.where(complete, state["rivals"].gather(1, order), state["rivals"])
        state["nearness"] = torch.where(complete, nearness, state["nearness"].scatter(1, column, known))

    def _adapt_const(self, attack: CarliniWagnerL2, state: State, answer: _Answer, probing: Tensor) -> None:
        if attack.binary_search_steps == 1:
            return
        needed = 2 * answer.f / lp_norm(answer.gradient, 2).flatten().square()
        first = state["step"] == 0
        factor = torch.where(answer.reached, self._decrease, self._increase)
        const = torch.where(first, needed.nan_to_num(nan=0, posinf=0).clamp_min(attack.initial_const), state["const"] * factor)
        state["const"] = const.clamp_max(_LARGEST_CONST)

    def _rate(self, attack: CarliniWagnerL2, state: State) -> Tensor:
        nearness = state["nearness"].gather(1, state["descent"][:, None])[:, 0]
        size = state["x"][0].numel() ** 0.5 * attack.boundary(state["x"]).half.mean()
        return (4 * nearness / size).nan_to_num(nan=torch.inf).clamp_max(attack.learning_rate)


_BINARY_SEARCH = _BinarySearch()
_ADAPTIVE = _Adaptive()

CarliniL2Method = CarliniWagnerL2


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), to broadcast against images."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def _check_choice(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")
