"""The attack contract: a small state machine over samples that the engine runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from guardians.engine import loop
from guardians.engine.batch import default_batch_size
from guardians.engine.checks import check_integer
from guardians.engine.interfaces import ClassifierAttack
from guardians.engine.parameters import KW_ONLY, Count, Flag, OptionalCount, Precision, Seed
from guardians.engine.report import Finished, Report
from guardians.engine.rng import ForkedGenerators, fresh_seed, hashed, row_keys
from guardians.engine.run import margin, rounding
from guardians.engine.state import Answer, Progress, Query, State
from guardians.engine.victim import isolated, undisturbed

__all__ = ["Attack"]


class Attack(ClassifierAttack):
    """A native attack: `start`, `query`, `objective` and `update`, and what it keeps; the engine does the rest.

    The arguments of its constructor are annotated fields, ART's in ART's order, the estimator first. All take, besides:

    Args:
        seed: of all randomness. The numbers of a sample depend on (seed, index of the sample) alone. None draws a new
            seed at every call, from torch's global generator, or where that was never seeded from numpy's.
        early_stop: let an image go as soon as the model is fooled by it, at which it is often in the middle of the
            ball, rather than after the last step. Robust accuracy is what an attacker who keeps the best iterate gets,
            so never higher, and most of the work is saved. False is the classical algorithm bit for bit.
        precision: what the search computes in: "float32", "bfloat16", "float16", or "auto", the fastest that the
            device has. The search may ask a copy of the model with batch norm folded into the convolutions, in
            channels_last, under autocast; the model itself judges. With `early_stop=False`, where nothing is judged,
            "auto" and "float32" ask the model itself. For models in other dtypes than float32 there is only their own.
        judge_samples: draws of a random model that judge an image: it is fooled when most of them are, and leaves
            before the last step when all are. They are none of those that the search has seen. None is 1, or 9 for a
            model whose logits differ between two passes.
        eot_samples: evaluations whose mean gradient is the gradient of a random model (expectation over
            transformation, Athalye et al. 2018). They share batches.

    and, where they are fields, `targeted` (labels are targets to reach rather than labels to leave), `batch_size`
    (samples in one forward pass, which does not change the result beyond rounding; None chooses it by the memory that
    the model needs for an image), `verbose` (a progress bar of finished images, and the share that stands) and
    `summary_writer`.

    A model that is sharded over processes, by FSDP or tensor parallelism, is only called. It answers when all of them
    ask, so each attacks the same images with the same seed.

    A call takes `first_index`, the position of its first image in the data: with a seed, parts of a data set that are
    attacked one after the other have the draws that they would have together.

    Raises:
        EstimatorError: the estimator is neither an ART `PyTorchClassifier` nor an `nn.Module`.
        TypeError, ValueError: an argument is outside what is allowed; checked before any work.
    """

    _: KW_ONLY
    seed: Seed = None
    early_stop: Flag = False
    precision: Precision = "auto"
    judge_samples: OptionalCount = None
    eot_samples: Count = 1

    keeps: ClassVar[str] = "last"
    """What is returned without `early_stop`: the "last" iterate, the "first" that fools the model, or the "nearest"."""
    _options: ClassVar[tuple[str, ...]] = ("mask", "x_adv_init", "first_index")

    @abstractmethod
    def start(self, state: State) -> None:
        """Give `state`, which knows the images and labels, the columns with which the search begins."""

    @abstractmethod
    def query(self, state: State) -> Query | Tensor:
        """Where the model is evaluated next; a tensor (N, ...) stands for points whose gradient is wanted."""

    @abstractmethod
    def objective(self, logits: Tensor, y: Tensor, state: State) -> Tensor:
        """What is differentiated with respect to the points (N,), for logits (N, classes)."""

    @abstractmethod
    def update(self, state: State, answer: Answer) -> Progress:
        """Take the model's answer at the points, advance `state`, and say which samples are done or stuck."""

    @property
    def keep(self) -> str:
        """What is returned; with `early_stop` the first point that fools the model."""
        return "first" if self.early_stop else self.keeps

    @property
    def restarts(self) -> int:
        """How often the search is started: for an image that still stands, or of which the nearest point is wanted."""
        return 1

    def reached(self, logits: Tensor, y: Tensor) -> Tensor:
        """Whether points count as fooling the model, bool (N,), by their logits (N, classes).

        The nearest points are those on the boundary: there the margin has to be above rounding.
        """
        if self.keeps == "nearest":
            return margin(logits, y, targeted=self.targeted) > rounding(logits)
        return (logits.argmax(1) == y) == self.targeted

    def distance(self, points: Tensor, x: Tensor) -> Tensor:
        """Of points to their images in the attack's norm, (N,) for points (N, ...) and (N, K) for (N, K, ...)."""
        delta = points - (x if points.ndim == x.ndim else x[:, None])
        return torch.linalg.vector_norm(delta.flatten(1 + points.ndim - x.ndim), float(self.norm), dim=-1)

    def near_enough(self, state: State) -> Tensor:
        """Where no restart is to look for a nearer image than `state.best`: bool (N,), for attacks that keep it."""
        return state.best_distance == 0

    def result(self, state: State) -> Tensor:
        """The last iterate (N, ...), as it is returned."""
        query = self.query(state)
        return self.returned(query.points if isinstance(query, Query) else query, state)

    def returned(self, points: Tensor, state: State) -> Tensor:
        """Points (N, ...) brought inside the norm ball and `clip_values` to the last bit.

        They are kept while the search goes on, so `update` does not write into their memory.
        """
        return points

    def batch_size_for(self, x: Tensor) -> int:
        """Samples in one forward pass, for images such as `x`."""
        return default_batch_size(self.victim, x) if self.batch_size is None else int(self.batch_size)

    def settled_batch_size(self, x: Tensor) -> int:
        """The same, asked from outside of a search; the model is left as it was."""
        if self.batch_size is not None:
            return int(self.batch_size)
        device = self.victim.device or x.device
        alone = row_keys(hashed(0, np.arange(1)))
        with undisturbed(self.victim.module), isolated(device), ForkedGenerators(0, device), alone:
            return self.batch_size_for(x[:1].to(device, copy=True))

    def stream(self, batches: Iterable[tuple[Tensor, Tensor] | Tensor], *, first_index: int = 0) -> Iterator[Finished]:
        """Adversarial images of a data set of any size, in the order in which they are finished.

        Batches are read when the search has room, so memory is bounded by a few times `batch_size`, and theirs. Between
        two results the model is as it was. `report` counts along.

        Args:
            batches: such as a `DataLoader`'s: pairs of images (N, C, H, W) and labels (N,), or images alone, whose
                labels are then the model's predictions; of rows (N, classes) the largest counts. Images are of the
                model's dtype, on any device. Arguments of the attack that differ from sample to sample do not fit a
                stream.
            first_index: the position of the first image in the data, on which draws depend; those of the results count
                from 0.

        Raises:
            TypeError, ValueError: a batch or `first_index` is outside what is allowed.
        """
        check_integer("first_index", first_index, low=0)
        yield from self._search(self._checked_batches(batches), first_index=int(first_index))

    def _checked_batches(self, batches: Iterable[tuple[Tensor, Tensor] | Tensor]) -> Iterator[dict[str, Tensor]]:
        names, shape = None, None  # of the first batch
        for batch in batches:
            x, y = (batch, None) if isinstance(batch, (Tensor, np.ndarray)) else batch
            if not isinstance(x, Tensor):
                raise TypeError(f"x of type {type(x).__name__}: batches must be of tensors")
            inputs = self._checked_inputs(x, y, {})
            inputs.pop("probabilities", None)
            for n in (2, 3):  # what fits two lengths fits any
                self._check_call(x[:1].expand(n, *x.shape[1:]))
            names, shape = names or inputs.keys(), shape or x.shape[1:]
            if x.shape[1:] != shape:
                raise ValueError(f"x has shape {tuple(x.shape)}: images of earlier batches have {tuple(shape)}")
            if inputs.keys() != names:
                raise ValueError(
                    f"y is {'missing' if y is None else 'given'}: labels must be in all batches or in none"
                )
            yield inputs

    def _run(self, inputs: dict[str, Tensor], device: torch.device, first_index: int | np.ndarray) -> Tensor:
        x = inputs["x"]
        x_adv, fooled, judged = torch.empty_like(x), np.zeros(len(x), dtype=bool), True
        for finished in self._search([inputs], device, len(x), first_index):
            x_adv[torch.from_numpy(finished.index).to(x.device)] = finished.x_adv.to(x.device)
            if finished.fooled is None:
                judged = False
            else:
                fooled[finished.index] = finished.fooled
        assert self.report is not None
        self.report.fooled = fooled if judged else None
        return x_adv

    def _search(
        self,
        batches: Iterable[dict[str, Tensor]],
        device: torch.device | None = None,
        total: int | None = None,
        first_index: int | np.ndarray = 0,
    ) -> Iterator[Finished]:
        """Run the engine with the model `undisturbed` while it searches, but not between two results."""
        seed = fresh_seed() if self.seed is None else int(self.seed)
        device = device or self.victim.device
        self.report = report = Report()
        search = loop.stream(self, batches, seed=seed, device=device, report=report, first_index=first_index)
        done = fooled = 0
        with tqdm(total=total, desc=type(self).__name__, unit="image", disable=not self.verbose, leave=False) as bar:
            while True:
                with undisturbed(self.victim.module), isolated(device):
                    finished = next(search, None)
                if finished is None:
                    return
                bar.update(len(finished.index))
                if finished.fooled is not None and self.verbose:
                    done, fooled = done + len(finished.fooled), fooled + int(finished.fooled.sum())
                    bar.set_postfix_str(f"robust accuracy {1 - fooled / done:.1%}")
                yield finished
