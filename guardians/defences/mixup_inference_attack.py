"""The attack that is adaptive to Mixup Inference (Pang et al. 2020, section 4.4)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from guardians.attacks.norms import pull_into_ball
from guardians.attacks.pgd import ProjectedGradientDescent
from guardians.attacks.registry import Family, Spec, register
from guardians.defences.mixup_inference import MixupInference
from guardians.engine.interfaces import ClassifierAttack, Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, Number, Positive, Size
from guardians.engine.report import Report
from guardians.engine.rng import hashed
from guardians.engine.search import bfloat16_is_native

__all__ = ["AveragedMixturePGD"]


class AveragedMixturePGD(ClassifierAttack):
    """PGD (inf) on mixtures of an image, whose perturbations are averaged.

        x_adv = clip(x + 1/K sum_k (PGD(x_k) - x_k)),    x_k = lam * x + (1 - lam) * s_k

    with s_k drawn as the defence draws them, PGD on the model without the defence, each perturbation within the ball
    (Pang et al. 2020, section 4.4, and their code). Against MI-Combined the s_k are those of MI-OL. Native PGD with
    `eot_samples` on the defence itself is the other attack that should be tried, and is often the stronger one.

    PGD computes in bfloat16 where the device does; against a float64 model in float64.

    Args:
        estimator: a `MixupInference`, or an ART classifier with one as its model and without preprocessing.
        eps: radius of the ball, in the unit of the images.
        eps_step: step size.
        max_iter: steps.
        num_samples: K.
        batch_size: mixtures in one forward pass.
        verbose: show a progress bar of finished mixtures.
        seed: of the mixtures; those of an image depend on (seed, its position).

    Raises:
        EstimatorError, TypeError, ValueError: see `ClassifierAttack`; a TypeError if the model is no `MixupInference`.

    Attributes:
        report: what the last call did, on all mixtures; None before the first.
    """

    estimator: Estimator
    eps: Number = 8 / 255
    eps_step: Positive = 2 / 255
    max_iter: Count = 10
    num_samples: Count = 10
    batch_size: Count = 128
    verbose: Flag = False
    _: KW_ONLY
    seed: Size = 0

    _options: ClassVar[tuple[str, ...]] = ("first_index",)

    def _run(self, inputs: dict[str, Tensor], device: torch.device, first_index: int) -> Tensor:
        x = inputs["x"].to(device)
        defence = self.victim.module
        assert isinstance(defence, MixupInference)
        with torch.no_grad():
            predicted = torch.cat([defence.predicted(images) for images in x.split(int(self.batch_size))])
            method = "MI-PL" if defence.method == "MI-PL" else "MI-OL"
            keys = hashed(self.seed, first_index + np.arange(len(x)))
            partners = defence.partners(predicted, keys, method, int(self.num_samples))
        labels = inputs["y"].to(device) if "y" in inputs else predicted
        pgd = ProjectedGradientDescent(
            defence.model,
            eps=self.eps,
            eps_step=self.eps_step,
            max_iter=self.max_iter,
            batch_size=self.batch_size,
            precision="bfloat16" if x.dtype == torch.float32 and bfloat16_is_native(device) else "auto",
            verbose=self.verbose,
            seed=0,  # of nothing: it starts at the mixture
        )
        perturbation, report = torch.zeros_like(x), Report()
        for rows in partners.unbind(1):
            mixtures = defence.lam * x + (1 - defence.lam) * defence.pool[rows].to(x.dtype)
            perturbation += pgd(mixtures, labels) - mixtures
            assert pgd.report is not None
            report.add(pgd.report)
        self.report = report
        x_adv = self.victim.clip(x + perturbation / int(self.num_samples))
        return pull_into_ball(x_adv, x, torch.tensor(float(self.eps), dtype=torch.float64), np.inf).to(inputs["x"])

    def _check_params(self) -> None:
        super()._check_params()
        if not isinstance(self.victim.module, MixupInference):
            raise TypeError(f"estimator of type {type(self.victim.module).__name__}: must be a MixupInference")


def _native(spec: Spec) -> tuple[type[ClassifierAttack], dict[str, Any]]:
    return AveragedMixturePGD, {"eps": spec.eps, **spec.arguments("eps_step", "num_samples", steps="max_iter")}


register(
    Family(
        "AveragedMixturePGD",
        (np.inf,),
        ("steps", "eps_step", "num_samples"),
        _native,
        counts_steps=True,
        made_for=("mi-pl", "mi-ol", "mi-combined"),
    )
)
