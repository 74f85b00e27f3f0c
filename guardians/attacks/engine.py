"""The loop that runs any attack: batches, gradients, restarts, progress.

This engine runs plain fixed batches in the precision of the images. An attack never sees it; `run` is the whole seam.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guardians.attacks.rng import SampleRng

if TYPE_CHECKING:
    from guardians.attacks.base import Attack, State

__all__ = ["run", "value_and_gradient"]


def run(
    attack: Attack,
    x: Tensor,
    y: Tensor | None,
    *,
    seed: int,
    device: torch.device,
    mask: Tensor | None = None,
    x_adv_init: Tensor | None = None,
) -> Tensor:
    """Adversarial images for `x`, where `x` is.

    The search is started up to `attack.restarts` times, each time only for the images that none has fooled so far.

    Args:
        attack: the attack, with its victim, batch size and progress bar.
        x: images (N, ...). Every argument is checked by then, and the victim `undisturbed`.
        y: labels (N,), or targets of a targeted attack; None takes the victim's predictions.
        seed: of all random numbers; those of a sample also depend on its index in `x`, not on the batch.
        device: where batches go.
        mask, x_adv_init: (N, ...) or None, for `attack.start`.
    """
    x_adv = torch.empty_like(x)
    given = {name: value for name, value in (("y", y), ("mask", mask), ("x_adv_init", x_adv_init)) if value is not None}
    progress = tqdm(total=len(x), desc=type(attack).__name__, unit="image", disable=not attack.verbose, leave=False)
    with torch.no_grad(), progress:
        for index in torch.arange(len(x)).split(int(attack.batch_size)):
            rows = slice(int(index[0]), int(index[-1]) + 1)
            batch = {name: value[rows].to(device, copy=True) for name, value in {"x": x, **given}.items()}
            if y is None:
                batch["y"] = attack.victim.predict(batch["x"])
            x_adv[rows] = _search(attack, batch, seed, index)
            progress.update(len(index))
    return x_adv


def value_and_gradient(attack: Attack, query: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Logits at `query`, and the gradient of the attack's objective with respect to it.

    Raises:
        ValueError: the logits do not depend differentiably on the images.
    """
    with torch.enable_grad():
        inputs = query.detach().requires_grad_(True)
        logits = attack.victim.logits(inputs)
        gradient = None
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(attack.objective(logits, y, state).sum(), inputs, allow_unused=True)
    if gradient is None:
        raise ValueError("the model's logits have no gradient with respect to its input")
    return logits.detach(), gradient


def _search(attack: Attack, batch: dict[str, Tensor], seed: int, index: Tensor) -> Tensor:
    """The adversarial images of one batch, over all restarts."""
    found = best = _search_once(attack, batch, SampleRng(seed, index))
    standing = torch.arange(len(index))
    for restart in range(1, attack.restarts):
        still = (attack.victim.predict(found) == batch["y"]) != attack.targeted
        standing = standing[still.cpu()]
        if len(standing) == 0:
            break
        batch = _rows({name: value for name, value in batch.items() if name != "x_adv_init"}, still)
        found = _search_once(attack, batch, SampleRng(seed, index[standing], restart))
        best[standing.to(best.device)] = found
    return best


def _search_once(attack: Attack, batch: dict[str, Tensor], rng: SampleRng) -> Tensor:
    """Start the attack and step until every sample is done; one that is done leaves the batch."""
    state, y = attack.start(rng=rng, **batch), batch["y"]
    results = torch.empty_like(batch["x"])
    active = torch.arange(len(y))
    while len(active):
        query = attack.query(state)
        gradient = None
        if attack.needs_gradient(state):
            logits, gradient = value_and_gradient(attack, query, y, state)
        else:
            logits = attack.victim.logits(query)
        done = attack.update(state, logits, gradient).cpu()
        if done.all() and len(active) == len(results):
            return attack.result(state)
        if done.any():
            results[active[done].to(results.device)] = _rows({"x_adv": attack.result(state)}, done)["x_adv"]
            state, y, active = _rows(state, ~done), y[~done.to(y.device)], active[~done]
    return results


def _rows(tensors: dict[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
    """The rows to keep, of tensors that may be on the host or on the device."""
    return {name: value[keep.to(value.device)] for name, value in tensors.items()}
