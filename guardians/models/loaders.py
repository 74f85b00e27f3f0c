"""Classifiers of other libraries by `prefix:name`, with the normalisation that belongs to their weights in front."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from guardians.models.architectures import Normalize

__all__ = ["LOADERS"]

Loader = Callable[[str, bool], tuple[nn.Module, nn.Module]]
"""Of `prefix:name`, and whether to load the weights that the library has for it, which may download them.

Returns:
    The library's network, whose state dict a weights file holds, and the model around it, which gives logits
    (N, classes) for images (N, C, H, W) in [0, 1].

Raises:
    ImportError: the library is not installed.
    ValueError: the name is unknown, or the library cannot load it, as without a network.
"""


def _torchvision(model: str, pretrained: bool) -> tuple[nn.Module, nn.Module]:
    name = _name(model)
    known = models.list_models(module=models)  # what its other modules have detects, segments or is quantised
    if name not in known:
        raise _unknown(model, known, "torchvision.models.list_models(module=torchvision.models)")
    weights = models.get_model_weights(name).DEFAULT
    preset = weights.transforms()
    # Weights of these two are for inputs that the network transforms further.
    transforms_further = not pretrained and name in ("googlenet", "inception_v3")
    options = {"transform_input": True, "init_weights": False} if transforms_further else {}
    with _reason(model):
        network = models.get_model(name, weights=weights if pretrained else None, **options)
    return network, nn.Sequential(Normalize(preset.mean, preset.std), network)


def _timm(model: str, pretrained: bool) -> tuple[nn.Module, nn.Module]:
    timm = _installed("timm", model)
    name = _name(model)
    if ":" not in name and not timm.is_model(name):  # with one, as in hf-hub:ORG/NAME, timm asks elsewhere
        raise _unknown(model, timm.list_models(), "timm.list_models()")
    with _reason(model):
        network = timm.create_model(name, pretrained=pretrained)
    if not network.num_classes:
        raise ValueError(f"model={model!r}: has no classifier, only features")
    config = network.pretrained_cfg
    return network, nn.Sequential(Normalize(config["mean"], config["std"]), network)


def _hf(model: str, pretrained: bool) -> tuple[nn.Module, nn.Module]:
    transformers = _installed("transformers", model)
    classifiers = transformers.AutoModelForImageClassification
    source = os.path.expanduser(_name(model))
    options = {"local_files_only": not pretrained, "trust_remote_code": False}
    with _reason(model):
        preprocessing = _preprocessing(transformers.AutoImageProcessor.from_pretrained(source, **options))
        if pretrained:
            network, loaded = classifiers.from_pretrained(source, output_loading_info=True, **options)
            if missing := loaded["missing_keys"]:  # transformers fills them with random numbers, and warns
                raise ValueError(f"its weights lack {', '.join(sorted(missing))}")
        else:
            network = classifiers.from_config(transformers.AutoConfig.from_pretrained(source, **options))
    network = network.float()  # it may be stored in half precision
    return network, nn.Sequential(*preprocessing, network, _Logits())


def _preprocessing(processor: Any) -> list[nn.Module]:
    """What an image processor of transformers does to colours, read off images of one colour.

    Its attributes say it too, but other kinds have others: EfficientNet's divides twice, MobileViT's gives BGR.
    """
    colours = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    values = processor(images=images, return_tensors="pt")["pixel_values"]
    black, *primaries = values[:, :, values.shape[2] // 2, values.shape[3] // 2]  # at the edge it may pad
    slopes = torch.stack(primaries) - black  # of an output channel (column) along an input channel (row)
    flipped = not slopes[0, 0]
    scale = (slopes.flip(0) if flipped else slopes).diag()
    if not scale.all() or slopes.count_nonzero() > len(scale):
        raise ValueError(f"its {type(processor).__name__} does more to a channel than to scale and to shift it")
    normalize = Normalize((-black / scale).tolist(), (1 / scale).tolist())
    return [_FlipChannels(), normalize] if flipped else [normalize]


class _FlipChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


class _Logits(nn.Module):
    """Of the output of a classifier of transformers."""

    def forward(self, output: Any) -> Tensor:
        logits: Tensor = output.logits
        return logits


def _robustbench(model: str, pretrained: bool) -> tuple[nn.Module, nn.Module]:
    zoo = _installed("robustbench.model_zoo", model).model_dicts
    known = {
        f"{dataset.value}/{threat_model.value}/{name}": entry
        for dataset, threat_models in zoo.items()
        for threat_model, entries in threat_models.items()
        for name, entry in entries.items()
    }
    found = next((key for key in known if f"/{key}".endswith(f"/{_name(model)}")), None)
    if found is None:
        names = [*known, *{key.rpartition("/")[2] for key in known}]
        raise _unknown(model, names, "robustbench.model_zoo.model_dicts")
    dataset, threat_model, name = found.split("/")
    with _reason(model):
        if pretrained:
            folder = Path(torch.hub.get_dir()) / "robustbench"
            load = import_module("robustbench.utils").load_model
            network = load(name, model_dir=folder, dataset=dataset, threat_model=threat_model)
        else:
            network = known[found]["model"]()
    return network, network


def _name(model: str) -> str:
    return model.partition(":")[2]


def _installed(package: str, model: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:  # also where the package lacks another
        extra = model.partition(":")[0]
        raise ImportError(
            f"model={model!r}: {package.partition('.')[0]} is not installed: pip install guardians[{extra}] ({error})"
        ) from error


def _unknown(model: str, known: Iterable[str], listing: str) -> ValueError:
    close = difflib.get_close_matches(_name(model), list(known))
    meant = f"close are {', '.join(close)}; " if close else ""
    return ValueError(f"model={model!r}: unknown; {meant}{listing} has all")


@contextmanager
def _reason(model: str) -> Iterator[None]:
    """Why a library cannot load a model, as a ValueError that names it."""
    try:
        yield
    except ImportError:  # says itself what is missing
        raise
    except Exception as error:  # each library has errors of its own for a lost connection or a broken file
        raise ValueError(f"model={model!r} cannot be loaded: {type(error).__name__}: {error}") from error


LOADERS: dict[str, Loader] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _hf,
    "robustbench": _robustbench,
}
