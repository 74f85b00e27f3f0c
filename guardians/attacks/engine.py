"""The loop that runs any attack: batches, gradients, restarts, progress.

This engine runs plain fixed batches in the precision of the images. An attack never sees it; `run` is the whole seam.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guardians.attacks.rng import SampleRng
from guardians.attacks.victim import Victim, undisturbed

if TYPE_CHECKING:
    from guardians.attacks.base import Attack, State

__all__ = ["run", "value_and_gradient"]


def run(
    attack: Attack,
    victim: Victim,
    x: Tensor,
    y: Tensor | None,
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    restarts: int = 1,
    mask: Tensor | None = None,
    x_adv_init: Tensor | None = None,
    verbose: bool = False,
) -> Tensor:
    """Adversarial images for `x`, on its device; the victim computes on `device`.

    Args:
        attack: the attack, whose `start`, `query`, `objective`, `update` and `result` are called.
        victim: the model; it comes back as it was.
        x: images (N, ...). Every argument is checked by then.
        y: labels (N,), or targets of a targeted attack; None takes the victim's predictions.
        seed: of all random numbers; those of a sample also depend on its index in `x`, not on the batch.
        batch_size: images in one forward pass.
        device: where batches go.
        restarts: how often `start` and the loop are run; the second and later ones only for images that no earlier
            one fooled. An image that none fools keeps the result of the first.
        mask: (N, ...) or None, handed to `start`.
        x_adv_init: (N, ...) or None, handed to `start` of the first restart.
        verbose: show a progress bar of finished images.
    """
    x_adv = torch.empty_like(x)
    progress = tqdm(total=len(x), desc=type(attack).__name__, unit="image", disable=not verbose, leave=False)
    # Leaving inference mode makes gradients possible wherever the caller stands.
    with undisturbed(victim.module), torch.inference_mode(False), torch.no_grad(), progress:
        for first in range(0, len(x), batch_size):
            rows = torch.arange(first, min(first + batch_size, len(x)))
            images = x[first : first + batch_size].to(device, copy=True)
            labels = victim.predict(images) if y is None else y[first : first + batch_size].to(device)
            best = images
            standing = torch.arange(len(rows))
            for restart in range(restarts):
                chosen, at = standing.to(device), rows[standing]
                options = {} if mask is None else {"mask": mask[at.to(mask.device)].to(device)}
                if x_adv_init is not None and restart == 0:
                    options["x_adv_init"] = x_adv_init[at.to(x_adv_init.device)].to(device)
                state = attack.start(images[chosen], labels[chosen], SampleRng(seed, at, restart), **options)
                found = _run_batch(attack, victim, state, labels[chosen])
                if restart == 0:
                    best = found
                if restarts == 1:
                    break
                fooled = (victim.predict(found) == labels[chosen]) == attack.targeted
                best[chosen[fooled]] = found[fooled]
                standing = standing[~fooled.cpu()]
                if len(standing) == 0:
                    break
            x_adv[first : first + batch_size] = best.to(x.device)
            progress.update(len(rows))
    return x_adv


def _run_batch(attack: Attack, victim: Victim, state: State, y: Tensor) -> Tensor:
    """Step the samples of one state until every one is done; a sample that is done leaves the batch."""
    results: Tensor | None = None
    active = torch.arange(len(y))
    while True:
        query = attack.query(state)
        if attack.needs_gradient(state):
            logits, gradient = value_and_gradient(attack, victim, query, y, state)
        else:
            logits, gradient = victim.logits(query), None
        done = attack.update(state, logits, gradient).cpu()
        if not done.any():
            continue
        finished = attack.result(state)
        if results is None:
            if done.all():
                return finished
            results = torch.empty_like(finished)
        results[active[done].to(results.device)] = finished[done.to(finished.device)]
        if done.all():
            return results
        active, going_on = active[~done], ~done
        state = {name: value[going_on.to(value.device)] for name, value in state.items()}
        y = y[going_on.to(y.device)]


def value_and_gradient(attack: Attack, victim: Victim, query: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Logits at `query`, and the gradient of the attack's objective with respect to it.

    Raises:
        ValueError: the logits do not depend differentiably on the images.
    """
    with torch.enable_grad():
        inputs = query.detach().requires_grad_(True)
        logits = victim.logits(inputs)
        if not logits.requires_grad:
            raise ValueError("the model's logits have no gradient with respect to its input")
        objective = attack.objective(logits, y, state).sum()
    (gradient,) = torch.autograd.grad(objective, inputs)
    return logits.detach(), gradient
