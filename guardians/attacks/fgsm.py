"""The fast gradient (sign) method (Goodfellow et al., "Explaining and harnessing adversarial examples", 2015)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.attacks import evasion
from torch import Tensor

from guardians.attacks.norms import Norm
from guardians.attacks.pgd import SteepestAscent, _is_finite, register_ascent
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Flag, OptionalCount, PositiveArray, Radius, Size
from guardians.engine.state import Answer, Progress, Query, State, per_image

__all__ = ["FGSM", "FastGradientMethod"]


class FastGradientMethod(SteepestAscent):
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
        batch_size: images in one forward pass; None chooses it.
        minimal: try the sizes eps_step, 2 eps_step, ... up to eps along the gradient at the image, and keep the first
            that fools the model, or the last. Random starts do not apply.
        summary_writer: TensorBoard logs as ART's attacks write them; True, a folder, or an ART `SummaryWriter`.
        verbose: show a progress bar.
        seed, early_stop, precision, judge_samples, eot_samples: see `Attack`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
        ImportError: `summary_writer` needs tensorboardX, which is not installed.
    """

    estimator: Estimator
    norm: Norm = np.inf
    eps: Radius = 0.3
    eps_step: PositiveArray = 0.1
    targeted: Flag = False
    num_random_init: Size = 0
    batch_size: OptionalCount = None
    minimal: Flag = False
    summary_writer: Any = False
    _: KW_ONLY
    verbose: Flag = False

    max_iter, decay, random_eps = 1, None, False

    def start(self, state: State) -> None:
        """As PGD; with `minimal` the state also knows the gradient and the number of sizes to try."""
        super().start(state)
        if self.minimal:
            state.gradient = torch.zeros_like(state.x)
            ratio = (state.eps.cpu() / super()._radii(state)[1].cpu()).flatten(1).amin(1).numpy()
            # 0.3 / 0.1 is 2.9999999999999996: a whole number of steps must not be lost to rounding.
            state.sizes = np.floor(ratio * (1 + 1e-9)).astype(np.int64)

    def query(self, state: State) -> Query:
        """The iterate; with `minimal` a gradient is wanted at the image itself alone."""
        return Query(state.x_adv, not self.minimal or state.steps == 0)

    def update(self, state: State, answer: Answer) -> Progress:
        """The step; with `minimal` the next larger one, done when the last one fooled the model or was the largest."""
        if not self.minimal:
            return super().update(state, answer)
        x, steps = state.x, state.steps
        at_image = torch.from_numpy(steps == 0).to(x.device)
        if answer.gradient is not None:
            if not steps.all():
                self.write_summary(state, answer.gradient)
            ascended = self._ascended(answer.gradient, state)
            state.gradient = torch.where(per_image(at_image, x), ascended, state.gradient)
        done: np.ndarray = (~at_image & answer.fooled).cpu().numpy() | (steps >= state.sizes)
        state.steps = steps + 1
        radius = per_image(torch.from_numpy(state.steps).to(x), x) * state.eps_step
        x_adv = self.inside(x + self.step(state.gradient, x, radius, state), state)
        state.x_adv = torch.where(per_image(torch.from_numpy(done).to(x.device), x), state.x_adv, x_adv)
        return Progress(done)

    def step(self, gradient: Tensor, x: Tensor, radius: Tensor, state: State) -> Tensor:
        """As PGD; where the gradient is zero a step of infinite size is zero too, as ART has it."""
        return super().step(gradient, x, radius, state).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)

    @property
    def keep(self) -> str:
        """As `Attack`; where a copy in low precision looks for the smallest size, the model itself has to judge it."""
        return "first" if self.minimal and self.precision not in ("auto", "float32") else super().keep

    @property
    def starts_at_random(self) -> bool:
        """Not with `minimal`."""
        return not self.minimal and super().starts_at_random

    @property
    def restarts(self) -> int:
        """One, or as many as there are random starts."""
        return 1 if self.minimal else super().restarts

    def _radii(self, state: State) -> tuple[Tensor, Tensor]:
        """The step is as large as the ball, but for `minimal`."""
        eps, eps_step = super()._radii(state)
        return eps, eps_step if self.minimal else eps

    def _check_params(self) -> None:
        super()._check_params()
        if self.minimal and not _is_finite(self.eps):
            raise ValueError(f"eps={self.eps}: must be finite with minimal=True")


evasion.FastGradientMethod.register(FastGradientMethod)
FGSM = FastGradientMethod

register_ascent("FGSM", FGSM)
