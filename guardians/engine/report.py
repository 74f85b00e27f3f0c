"""What a run of an attack gives back: samples as they are finished, and what it has done so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

__all__ = ["Finished", "Report"]


@dataclass(frozen=True)
class Finished:
    """Samples whose search is over.

    Attributes:
        index: int64 array (M,), their positions in the data.
        x_adv: adversarial images (M, ...), on the device of the search.
        fooled: bool array (M,), whether the user's model is wrong on `x_adv`, or for a targeted attack gives the
            target; None where nothing was judged (`early_stop=False`, a single start).
        forward, backward: int64 arrays (M,), how often the search evaluated the model, and its gradient, for the
            sample.
    """

    index: np.ndarray
    x_adv: Tensor
    fooled: np.ndarray | None
    forward: np.ndarray
    backward: np.ndarray


@dataclass
class Report:
    """What a run has done so far.

    Attributes:
        fooled: bool array (N,), whether the user's model was fooled by the image returned, or gave the target of a
            targeted attack; for a random model, in most of draws that chose nothing. None where nothing was judged, and
            for a `stream`, whose results tell.
        search: the model that the search asked first: "model" for the user's own, or a cheaper copy such as "folded,
            channels_last, bfloat16".
        is_random: whether two passes give one image different logits; not looked at where nothing is judged.
        depends_on_batch: whether the model's answer about an image changes with the other images of a batch (batch norm
            without running statistics, a mean over the batch). Then `fooled` holds for the batch in which it was
            judged, and results for the batches of the search; nothing is promised for others.
        search_forward: samples that went forward in the search, through the user's model or its copies.
        search_backward: samples that went backward.
        judgement_forward: samples that went forward through the user's model for another end: judgement, predictions
            that stand in for labels, and the check of a copy.
    """

    fooled: np.ndarray | None = None
    search: str = "model"
    is_random: bool = False
    depends_on_batch: bool = False
    search_forward: int = 0
    search_backward: int = 0
    judgement_forward: int = 0

    def add(self, other: Report) -> None:
        """Count what another run has done, too."""
        self.search_forward += other.search_forward
        self.search_backward += other.search_backward
        self.judgement_forward += other.judgement_forward
        self.is_random |= other.is_random
        self.depends_on_batch |= other.depends_on_batch
