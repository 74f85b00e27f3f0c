"""Defences that only hide from gradients, and sound ones, on which the audit is audited."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torchvision.io import decode_jpeg, encode_jpeg
from tqdm.auto import tqdm

from guardians.data import Dataset
from guardians.experiments.audit import RULES, audit
from guardians.experiments.subject import defended
from guardians.models import load_model
from guardians.tables import Table

__all__ = ["AUDIT_COLUMNS", "PLANTED", "SOUND", "Planted", "audit_planted", "rules_as_markdown"]

_BASE = "resnet9-16-standard"
AUDIT_COLUMNS = {
    "defence": "what is around the model",
    "model": "name of the model",
    "data": "where the images came from, and the first digits of a SHA-256 digest of images and labels",
    "n": "images",
    "seed": "of all draws",
    "right": "images that the defended model gets right, on which the audit runs",
    "eot": "draws for one gradient; 1 is no EOT",
    "planted": "flags of which one must be raised, joined by semicolons; empty for a sound one, of which none may be",
    "raised": "flags that were",
    "verdict": "caught, missed, sound or false alarm",
    **{rule.name: rule.measured for rule in RULES},
}
"""Columns of `audit.csv`; those of the rules are what was measured."""


@dataclass(frozen=True)
class Planted:
    """A defence around a bundled model.

    Attributes:
        name: for tables.
        make: it around the network.
        flags: of which the audit has to raise one; none for a sound one.
        model: the network.
        eot_samples: with which it is attacked.
        surrogates: models whose images are tried on it.
    """

    name: str
    make: Callable[[nn.Module], nn.Module]
    flags: tuple[str, ...] = ()
    model: str = _BASE
    eot_samples: int = 1
    surrogates: tuple[str, ...] = ()


class _Defended(nn.Module):
    """A network that another function asks.

    Args:
        network: returns logits.
        answer: logits (N, classes) of the network and images (N, C, H, W).
    """

    def __init__(self, network: nn.Module, answer: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.answer = network, answer

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W)."""
        return self.answer(self.network, x)


def _answering(answer: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    return partial(_Defended, answer=answer)


def _rounded(x: Tensor) -> Tensor:
    """Eight levels, without a derivative that is not zero."""
    return (7 * x).round() / 7


def _jpeg(x: Tensor) -> Tensor:
    images = (255 * x.detach().clamp(0, 1)).round().to(torch.uint8).cpu()
    decoded = [decode_jpeg(encode_jpeg(image, quality=75)) for image in images]
    return torch.stack(decoded).to(x) / 255


def _wavy(x: Tensor) -> Tensor:
    """Within 1e-4 of the images, with derivatives of 30 and more that change their sign all the time."""
    return x + 1e-4 * torch.sin(3e5 * x)


def _steep(x: Tensor) -> Tensor:
    """The images, with the derivative of a root at zero."""
    return x + (x - x.detach()).abs().sqrt()


def _stopped(network: nn.Module, x: Tensor) -> Tensor:
    """Logits without a gradient, beside a faint one that has nothing to do with them."""
    logits: Tensor = network(x.detach())
    weight = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0))
    return logits + 1e-3 * x.flatten(1).mean(1, keepdim=True) * weight.to(x)


def _detector(network: nn.Module, x: Tensor) -> Tensor:
    """What is rough is smoothed first, by a switch through which no gradient comes."""
    smooth = avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    is_rough = (x - smooth).abs().mean((1, 2, 3), keepdim=True) > 0.03
    with torch.no_grad():
        answer: Tensor = network(torch.where(is_rough, _rounded(smooth), x))
    seen: Tensor = network(x)
    return torch.where(is_rough[:, :, 0, 0], answer, seen)


def _of_the_batch(x: Tensor) -> Tensor:
    return (x - 0.5 * (x.mean((0, 2, 3), keepdim=True) - 0.45)).clamp(0, 1)


class _WinnersTakeAll(nn.Module):
    """The largest of all activations of an image, and zero (Xiao et al., "Enhancing adversarial defense by
    k-winners-take-all", 2020, equation 2).

    Args:
        share: of the activations that are kept.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Of activations (N, ...)."""
        flat = x.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0.0).view_as(x)


def _winners(network: nn.Module) -> nn.Module:
    """In the place of each ReLU."""
    defended = copy.deepcopy(network)
    for name, layer in list(defended.named_modules()):
        if isinstance(layer, nn.ReLU):
            parent, _, last = name.rpartition(".")
            setattr(defended.get_submodule(parent), last, _WinnersTakeAll(0.2))
    return defended


def _noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn_like(x)


PLANTED = (
    Planted("rounded input", _answering(lambda f, x: f(_rounded(x))), ("vanishing gradients",)),
    Planted("temperature 0.01", _answering(lambda f, x: 100 * f(x)), ("saturated outputs",)),
    Planted("noise at the input", _answering(lambda f, x: f(_noisy(x))), ("random without EOT",)),
    Planted("JPEG", _answering(lambda f, x: f(_jpeg(x))), ("no gradient",)),
    Planted("rounded logits", _answering(lambda f, x: f(x).round()), ("vanishing gradients", "quantised outputs")),
    Planted("wavy layer", _answering(lambda f, x: f(_wavy(x))), ("misleading gradients",)),
    Planted("overflowing layer", _answering(lambda f, x: f(_steep(x))), ("undefined gradients",)),
    Planted(
        "detector",
        _answering(_detector),
        ("weaker than black-box", "vanishing gradients", "weaker than transfer"),
        surrogates=(_BASE,),
    ),
    Planted("mean over the batch", _answering(lambda f, x: f(_of_the_batch(x))), ("depends on batch",)),
    Planted("stopped gradient", _answering(_stopped), ("misleading gradients",)),
    Planted("k winners take all", _winners, ("misleading gradients",)),
)
"""What only hides."""
SOUND = (
    Planted("none", lambda f: f),
    Planted("adversarial training, FGSM", lambda f: f, model="resnet9-16-fgsm-at"),
    Planted("adversarial training, PGD", lambda f: f, model="resnet9-16-pgd-at"),
    Planted("mixup training", lambda f: f, model="resnet9-16-mixup"),
    Planted("interpolated adversarial training", lambda f: f, model="resnet9-16-iat"),
    Planted(
        "RSE under EOT",
        lambda f: defended("resnet9-16-rse", f, "rse(n=3)").module(0),
        model="resnet9-16-rse",
        eot_samples=5,
    ),
)
"""What is as it seems."""


def audit_planted(
    data: Dataset,
    out: str | os.PathLike[str],
    *,
    defences: Sequence[Planted] = (*PLANTED, *SOUND),
    device: torch.device | str = "cpu",
    seed: int = 0,
    verbose: bool = True,
) -> pd.DataFrame:
    """Audit each, in norm inf with eps 8/255, and write `audit.csv`; what has a row is not audited again.

    Args:
        data: images and labels.
        out: folder of the table.
        defences: which.
        device: on which.
        seed: of all draws.
        verbose: show a progress bar.

    Returns:
        The rows of `AUDIT_COLUMNS`.
    """
    table = Table(Path(out) / "audit.csv", AUDIT_COLUMNS, ("defence", "model", "data", "n", "seed"))
    x, y = data.as_floats().to(device), data.labels.to(device)
    keys = []
    for planted in tqdm(defences, desc="audit", unit="defence", disable=not verbose):
        key = {"defence": planted.name, "model": planted.model, "data": data.identity, "n": len(data), "seed": seed}
        keys.append(key)
        if key in table:
            continue
        model = planted.make(load_model(planted.model, device=device)).eval()
        found = audit(
            model,
            x,
            y,
            eot_samples=planted.eot_samples,
            surrogates=[load_model(name, device=device) for name in planted.surrogates],
            seed=seed,
            verbose=False,
        )
        if planted.flags:
            verdict = "caught" if set(planted.flags) & set(found.flags) else "missed"
        else:
            verdict = "false alarm" if found.flags else "sound"
        flags = {"planted": "; ".join(planted.flags), "raised": "; ".join(found.flags)}
        measured = dict(zip(found.table["flag"], found.table["value"], strict=True))
        table.append(key | {"right": found.n, "eot": planted.eot_samples, "verdict": verdict} | flags | measured)
    return table.select(keys)


def rules_as_markdown(frame: pd.DataFrame) -> str:
    """The rules as a table, with what was measured of sound models and of planted defences that they flag.

    Args:
        frame: rows of `AUDIT_COLUMNS`.
    """
    is_sound, raised = frame["planted"].fillna("") == "", frame["raised"].fillna("").str.split("; ")
    lines = ["| flag | measured | limit | sound, at most | flagged, at least | source | what to do |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for rule in RULES:
        values, is_flagged = frame[rule.name], [rule.name in flags for flags in raised]
        figures = [f"{value:.2g}" for value in (rule.threshold, values[is_sound].max(), values[is_flagged].min())]
        figures = ["-" if figure == "nan" else figure for figure in figures]
        lines.append("| " + " | ".join([rule.name, rule.measured, *figures, rule.source, rule.advice]) + " |")
    return "\n".join(lines)
