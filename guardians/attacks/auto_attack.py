"""AutoAttack (Croce and Hein, "Reliable evaluation of adversarial robustness", 2020), on the engine."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from guardians.attacks.apgd import APGD
from guardians.attacks.fab import FAB
from guardians.attacks.norms import CommonNorm, as_norm
from guardians.attacks.registry import Family, Spec, register
from guardians.attacks.sequence import CLEAN, AttackSequence, Judgement, Ledger, Stage, judge_again, run_stage
from guardians.attacks.square import Square
from guardians.engine.checks import check_choice
from guardians.engine.interfaces import Estimator
from guardians.engine.parameters import KW_ONLY, Count, Flag, OptionalCount, Positive, Precision, Seed
from guardians.engine.rng import fresh_seed

__all__ = ["VERSIONS", "AutoAttack", "auto_attack_stages"]

VERSIONS = ("standard", "plus", "rand")
_EOT_SAMPLES = 20
"""Of the version for random models."""


class AutoAttack(AttackSequence):
    """APGD, targeted APGD, FAB and Square, one after the other, each on the images that still stand.

    | version | sequence |
    | --- | --- |
    | standard | APGD on cross-entropy, targeted APGD on the DLR loss, targeted FAB, Square |
    | plus | APGD on cross-entropy and on DLR, and FAB, each five times; Square, targeted APGD, targeted FAB |
    | rand | APGD on cross-entropy and on DLR, with the mean gradient of 20 draws |

    with 100 iterations, nine targets and 5,000 queries of Square (Croce and Hein 2020, sections 4 to 6), and for norm 1
    five starts of the first (Croce and Hein, "Mind the box", 2021). Where the model has fewer than four classes, which
    the targeted DLR loss needs, the difference of two logits takes its place.

    What is fooled is judged by the model itself; a random model by draws that chose nothing, once more at the end.

    Args:
        estimator: ART `PyTorchClassifier` or `nn.Module`, see `Attack`.
        norm: 1, 2, inf or "inf".
        eps: radius of the ball.
        version: "standard", "plus" or "rand".
        batch_size: images in one forward pass; None chooses it.
        verbose: show a progress bar.
        max_iter: iterations of APGD and FAB.
        n_queries: of Square.
        n_targets: of the targeted attacks.
        seed, precision, judge_samples: see `Attack`.

    Attributes:
        ledger: what the last call found of each image, see `Ledger`; None before the first.
        stages: the names of the stages of the last call, the first of which is "clean".
        report: of the last call, see `Report`.

    Raises:
        EstimatorError, TypeError, ValueError: see `Attack`.
    """

    estimator: Estimator
    norm: CommonNorm = np.inf
    eps: Positive = 0.3
    version: Annotated[str, partial(check_choice, known=VERSIONS)] = "standard"
    batch_size: OptionalCount = None
    verbose: Flag = True
    _: KW_ONLY
    max_iter: Count = 100
    n_queries: Count = 5000
    n_targets: Count = 9
    seed: Seed = None
    precision: Precision = "auto"
    judge_samples: OptionalCount = None

    _options = ("first_index",)

    def _run(self, inputs: dict[str, Tensor], device: torch.device, first_index: int) -> Tensor:
        x, y = inputs["x"], self._labels(inputs, device)
        seed = fresh_seed() if self.seed is None else int(self.seed)
        common: dict[str, Any] = {"batch_size": self.batch_size, "precision": self.precision}
        common |= {"judge_samples": self.judge_samples, "seed": seed, "verbose": False}
        assert self.victim.nb_classes is not None
        stages = [Stage(CLEAN, Judgement(self.estimator, **common, early_stop=True))]
        stages += auto_attack_stages(
            self.estimator,
            norm=self.norm,
            eps=self.eps,
            version=self.version,
            nb_classes=self.victim.nb_classes,
            max_iter=self.max_iter,
            n_queries=self.n_queries,
            n_targets=self.n_targets,
            **common,
        )
        self.ledger, self.stages = ledger, names = Ledger.of(x), [stage.name for stage in stages]
        self.report = ledger.report
        for number, stage in enumerate(stages):
            rows = ledger.waiting(number)
            with tqdm(total=len(rows), desc=names[number], unit="image", disable=not self.verbose, leave=False) as bar:
                for count in run_stage(
                    number, stage, x, y, ledger, eps=float(self.eps), device=device, first_index=first_index
                ):
                    bar.update(count)
                    bar.set_postfix_str(f"robust accuracy {ledger.stands.mean():.1%}")
        judge_again(self.estimator, x, y, ledger, first_index=first_index, **common | {"seed": seed + 1})
        ledger.report.fooled = ~ledger.stands
        return ledger.x_adv


def auto_attack_stages(
    estimator: Any | nn.Module,
    *,
    norm: float | str,
    eps: float,
    version: str,
    nb_classes: int,
    max_iter: int = 100,
    n_queries: int = 5000,
    n_targets: int = 9,
    **options: Any,
) -> list[Stage]:
    """The attacks of a version of AutoAttack in their order, with `options` that all native attacks take."""
    ball: dict[str, Any] = {"norm": norm, "eps": eps}
    many = 5 if version == "plus" or as_norm(norm) == 1 else 1
    targeted_loss = "difference_logits_ratio" if nb_classes >= 4 else "margin"
    loss = "difference_logits_ratio" if nb_classes >= 3 else "margin"

    def apgd(name: str, loss_type: str, **more: Any) -> Stage:
        given = {**ball, "max_iter": max_iter, "loss_type": loss_type, "early_stop": True, **options, **more}
        return Stage(name, APGD(estimator, **given))

    def fab(name: str, **more: Any) -> Stage:
        return Stage(name, FAB(estimator, **{**ball, "max_iter": max_iter, **options, **more}))

    square_attack = Square(estimator, **ball, max_iter=n_queries, early_stop=True, **options)
    apgd_t = apgd("apgd-t", targeted_loss, n_targets=n_targets, nb_random_init=1)
    fab_t = fab("fab-t", n_targets=n_targets)
    square = Stage("square", square_attack)
    if version == "standard":
        return [apgd("apgd-ce", "cross_entropy", nb_random_init=many), apgd_t, fab_t, square]
    if version == "plus":
        first = [apgd("apgd-ce", "cross_entropy", nb_random_init=many), apgd("apgd-dlr", loss, nb_random_init=many)]
        return [*first, fab("fab", n_targets=0, num_random_init=many - 1), square, apgd_t, fab_t]
    eot = {"eot_samples": _EOT_SAMPLES, "nb_random_init": 1}
    return [apgd("apgd-ce", "cross_entropy", **eot), apgd("apgd-dlr", loss, **eot)]


def _native(spec: Spec) -> tuple[type[AutoAttack], dict[str, Any]]:
    return AutoAttack, {"norm": spec.norm, "eps": spec.eps, **spec.arguments("version", "n_queries", steps="max_iter")}


register(Family("AutoAttack", (np.inf, 2, 1), ("version", "steps", "n_queries"), _native))
