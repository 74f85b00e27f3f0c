"""The fast gradient (sign) method (Goodfellow et al., "Explaining and harnessing adversarial examples", 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.attacks.norms import per_image
from guardians.attacks.pgd import ProjectedGradientDescent
from guardians.engine.attack import State
from guardians.engine.checks import check_flag
from guardians.engine.rng import SampleRng

__all__ = ["FGSM", "FastGradientMethod"]


class FastGradientMethod(ProjectedGradientDescent):
    """FGSM, and its extension to other norms: one step of PGD of the size of the ball.

        x_adv = clip(x + argmax <g, d> over ||d||_p <= eps)

    (Goodfellow et al. 2015, section 4, for inf, where the step is eps * sign(g)). With a random start the step goes
    from there and is projected (Wong et al., "Fast is better than free", 2020, algorithm 3, with step size eps).

    Takes the arguments of `art.attacks.evasion.FastGradientMethod` with their meaning and order.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, any real p >= 1, inf or "inf".
        eps: size of the step, see `ProjectedGradientDescent`.
        eps_step: with `minimal`, the increment of the step size; otherwise without effect.
        targeted: descend the loss of target labels rather than ascend the loss of the labels.
        num_random_init: random starts; 0 steps from the image. The second and later ones run only for images that
            none has fooled so far.
        batch_size: images in one forward pass.
        minimal: try the sizes eps_step, 2 eps_step, ... up to eps along the gradient at the image, and keep the first
            that fools the model, or the last. Random starts do not apply.
        summary_writer: only False.
        verbose: show a progress bar.
        seed: of the random starts.
        early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    attack_params: ClassVar[list[str]] = [
        *(name for name in ProjectedGradientDescent.attack_params if name not in ("decay", "max_iter", "random_eps")),
        "minimal",
    ]

    def __init__(
        self,
        estimator: PyTorchClassifier | nn.Module,
        norm: float | str = np.inf,
        eps: float | np.ndarray | Tensor = 0.3,
        eps_step: float | np.ndarray | Tensor = 0.1,
        targeted: bool = False,
        num_random_init: int = 0,
        batch_size: int = 32,
        minimal: bool = False,
        summary_writer: Any = False,
        *,
        verbose: bool = False,
        seed: int | None = None,
        early_stop: bool = False,
        precision: str = "auto",
        judge_samples: int | None = None,
        eot_samples: int = 1,
    ) -> None:
        self.minimal = minimal
        super().__init__(
            estimator,
            norm,
            eps,
            eps_step,
            max_iter=1,
            targeted=targeted,
            num_random_init=num_random_init,
            batch_size=batch_size,
            summary_writer=summary_writer,
            verbose=verbose,
            seed=seed,
            early_stop=early_stop,
            precision=precision,
            judge_samples=judge_samples,
            eot_samples=eot_samples,
        )

    def start(self, x: Tensor, y: Tensor, rng: SampleRng, **options: Tensor) -> State:
        """As PGD; with `minimal` the state also knows the labels, the gradient and the number of sizes to try."""
        state = super().start(x, y, rng, **options)
        if self.minimal:
            state["y"] = y
            state["gradient"] = torch.zeros_like(x)
            ratio = (state["eps"].cpu() / super()._radii(x, rng)[1].cpu()).flatten(1).amin(1).numpy()
            # 0.3 / 0.1 is 2.9999999999999996: a whole number of steps must not be lost to rounding.
            state["sizes"] = np.floor(ratio * (1 + 1e-9)).astype(np.int64)
        return state

    def needs_gradient(self, state: State) -> bool:
        """With `minimal` only at the image itself."""
        return not self.minimal or bool((state["steps"] == 0).any())

    def update(self, state: State, logits: Tensor, gradient: Tensor | None) -> np.ndarray:
        """The step; with `minimal` the next larger one, done when the last one fooled the model or was the largest."""
        if not self.minimal:
            return super().update(state, logits, gradient)
        x, steps = state["x"], state["steps"]
        at_image = torch.from_numpy(steps == 0).to(x.device)
        fooled = ~at_image & ((logits.argmax(1) == state["y"]) == self.targeted)
        if gradient is not None:
            ascended = self._ascended(gradient, state)
            state["gradient"] = torch.where(per_image(at_image, x), ascended, state["gradient"])
        done: np.ndarray = fooled.cpu().numpy() | (steps >= state["sizes"])
        steps += 1
        radius = per_image(torch.from_numpy(steps).to(x), x) * state["eps_step"]
        x_adv = self.inside(x + self.step(state["gradient"], x, radius, state), state)
        state["x_adv"] = torch.where(per_image(torch.from_numpy(done).to(x.device), x), state["x_adv"], x_adv)
        return done

    @property
    def starts_at_random(self) -> bool:
        """Not with `minimal`."""
        return not self.minimal and super().starts_at_random

    @property
    def is_memoryless(self) -> bool:
        """Not with `minimal`, which counts sizes."""
        return not self.minimal

    @property
    def uses_success(self) -> bool:
        """With `minimal`."""
        return self.minimal

    @property
    def restarts(self) -> int:
        """One, or as many as there are random starts."""
        return 1 if self.minimal else super().restarts

    def _radii(self, x: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """The step is as large as the ball, but for `minimal`."""
        eps, eps_step = super()._radii(x, rng)
        return eps, eps_step if self.minimal else eps

    def _check_params(self) -> None:
        super()._check_params()
        check_flag("minimal", self.minimal)


FGSM = FastGradientMethod
