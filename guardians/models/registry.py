"""Models by name: bundled weights with their cards, other libraries', and a user's own `package.module:callable`."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from guardians.models.architectures import lenet, resnet9, resnet18, wide_resnet
from guardians.models.loaders import LOADERS

__all__ = [
    "ARCHITECTURES",
    "build_model",
    "bundled_models",
    "import_callable",
    "load_model",
    "load_weights",
    "model_card",
    "save_model",
]

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "lenet": lenet,
    "resnet9": resnet9,
    "resnet18": resnet18,
    "wide_resnet": wide_resnet,
}

_WEIGHTS = Path(__file__).parent / "weights"


def bundled_models() -> list[str]:
    """Names of the models whose weights come with the package, as architecture-recipe."""
    return sorted(card.stem for card in _WEIGHTS.glob("*.json"))


def model_card(name: str) -> dict[str, Any]:
    """The JSON card of a bundled model: architecture, recipe, data, accuracy and the command that trained it.

    Raises:
        ValueError: there is no such model; the message lists the known ones.
    """
    if name not in bundled_models():
        raise ValueError(
            f"model={name!r}: unknown; bundled are {', '.join(bundled_models()) or 'none'}; "
            f"those of libraries are named {', '.join(f'{prefix}:NAME' for prefix in LOADERS)}, "
            "and a model of your own package.module:callable"
        )
    card: dict[str, Any] = json.loads((_WEIGHTS / f"{name}.json").read_text())
    return card


def build_model(architecture: str, **arguments: int) -> nn.Module:
    """A freshly initialised model.

    Raises:
        ValueError: the architecture is unknown, or does not take these arguments or values.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r}: unknown; known are {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[architecture](**arguments)
    except TypeError as error:
        raise ValueError(f"architecture={architecture!r} does not take {arguments}: {error}") from error


def load_model(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A model in evaluation mode.

    Args:
        name: a bundled model (see `bundled_models`), a pretrained one of another library, or `package.module:callable`.

            - `torchvision:NAME`, any classifier of `torchvision.models.list_models()`, with its `DEFAULT` weights.
            - `timm:NAME`, any name that `timm.create_model` takes.
            - `hf:ORG/NAME`, or `hf:FOLDER` with what `save_pretrained` of a model and of its image processor wrote:
              transformers' `AutoModelForImageClassification`.
            - `robustbench:NAME`, the first of RobustBench's registry, or `robustbench:cifar10/Linf/NAME`; what is
              downloaded goes where `torch.hub` keeps its files.
            - `package.module:callable`: the callable takes no arguments and returns an `nn.Module`. The working
              directory is searched for the module as well; it is on `sys.path` until the callable has returned.

            All give logits for images in [0, 1]: the normalisation that a library has for the weights is put in front.
            Nothing resizes images.
        weights: a `.safetensors` file, or a file of `torch.save` holding a state dict, which is read with
            `weights_only=True`. It replaces the bundled weights, those that the callable set, or those of the library,
            of whose network it is the state dict. Then none are downloaded; of `hf:` the configuration must be there.
        device: where the model goes.

    Raises:
        ValueError: the name is unknown, the library cannot load or download the model, the callable cannot be imported,
            fails or returns something else, the weights cannot be read (a pickle that needs more than tensors is
            refused), or do not fit the model; the message then names the tensors.
        ImportError: the library is not installed.
        FileNotFoundError: the weights file does not exist.
    """
    if ":" in name:
        prefix = name.partition(":")[0]
        if prefix in LOADERS:
            network, model = LOADERS[prefix](name, weights is None)
        else:
            network = model = _import_model(name)
        if weights is not None:
            load_weights(network, weights)
    else:
        architecture = dict(model_card(name)["architecture"])
        model = build_model(architecture.pop("name"), **architecture)
        load_weights(model, weights if weights is not None else _WEIGHTS / f"{name}.safetensors")
    return model.to(device).eval()


def save_model(model: nn.Module, card: dict[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Write `<card["name"]>.safetensors` and its JSON card into `folder`; returns the path of the weights.

    Args:
        model: the model whose parameters and buffers are written.
        card: what is known of the model. `load_model` needs "name" and "architecture", which holds the "name" of an
            architecture and its arguments.
        folder: made where it does not exist.

    Raises:
        TypeError: the card holds what JSON cannot.
        ValueError: the card lacks "name" or "architecture", or its name cannot be a file name.
    """
    if missing := [key for key in ("name", "architecture") if key not in card]:
        raise ValueError(f"card={card!r}: lacks {', '.join(missing)}")
    name, text = card["name"], json.dumps(card, indent=2) + "\n"
    if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[^/\\:]{1,200}", name) or not name.isprintable():
        raise ValueError(
            f"card['name']={name!r}: must be a file name, of at most 200 characters, without '/', '\\\\' and ':', "
            "and not begin with '.'"
        )
    path = Path(folder) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(text)
    return path


def import_callable(argument: str, name: str) -> Callable[..., Any]:
    """What is called `package.module:callable`; the working directory is searched as well.

    Raises:
        ValueError: it cannot be imported or called; the message names the argument.
    """
    module_name, _, attribute = name.partition(":")
    with _working_directory_on_path():
        try:
            found = getattr(importlib.import_module(module_name), attribute)
        except Exception as error:  # the module is the user's, and its import may fail in any way
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{argument}={name!r}: {attribute or 'nothing'!r} cannot be imported: {reason}") from error
    if not callable(found):
        raise ValueError(f"{argument}={name!r}: not a callable but {type(found).__name__}")
    return found


def _import_model(name: str) -> nn.Module:
    with _working_directory_on_path():  # for the call too: it may import more
        factory = import_callable("model", name)
        try:
            model = factory()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"model={name!r}: the call without arguments failed: {reason}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={name!r}: returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """At its end; what the block itself puts there stays."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict from a `.safetensors` file, or from a file of `torch.save` with `weights_only=True`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, or does not fit the model; the message then names the tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights file {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Tensor] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a different type for each way a file can be broken
        reason = str(error).partition(". ")[0]  # what torch adds is advice to trust the file
        raise ValueError(f"weights file {str(path)!r} cannot be read as a state dict of tensors: {reason}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"weights file {str(path)!r} does not fit the model: {error}") from error
