"""What the ART classifiers of the defences share: layers and refitting are matters of the model without its defence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.defences.ensemble import RandomEnsemble

__all__ = ["DefendedClassifier"]


class DefendedClassifier(PyTorchClassifier, ABC):
    """An ART classifier of a `RandomEnsemble`, which is its `model`.

    Predictions and gradients are those of the defence. `layer_names` and `get_activations` are those of the model
    without it, and `clone_for_refitting` puts the same defence around a copy with fresh weights. Images in float64 are
    given to a model without float64 parameters in float32.

    Args:
        undefended: the model as it was given.
        defence: it with its defence.
        loss, input_shape, nb_classes, optimizer, **options: as of `PyTorchClassifier`.
    """

    def __init__(
        self,
        undefended: nn.Module,
        defence: RandomEnsemble,
        loss: Any,
        input_shape: tuple[int, ...],
        nb_classes: int,
        optimizer: Any,
        **options: Any,
    ) -> None:
        super().__init__(defence, loss, input_shape, nb_classes, optimizer, **options)
        self._layer_names = list(undefended._modules)  # as ART lists them
        self.is_rnn = False  # of recurrent models ART takes gradients in training mode, in which nothing is defended

    @abstractmethod
    def defence_arguments(self) -> dict[str, Any]:
        """The constructor's arguments that ART does not know, of which the same draws follow."""

    def clone_for_refitting(self) -> DefendedClassifier:
        """The same classifier with fresh weights, see `PyTorchClassifier.clone_for_refitting`; it shares no tensor.

        Its draws are those of this classifier when it was new, as it has the same seed.

        Raises:
            ValueError: there is no optimizer.
        """
        if self._optimizer is None:
            raise ValueError("optimizer=None: must be an optimizer, of which the clone gets one with the same defaults")
        model = self.model.undefended()
        clone = type(self)(
            model=model,
            loss=self._loss,
            input_shape=self.input_shape,
            nb_classes=self.nb_classes,
            optimizer=type(self._optimizer)(model.parameters(), **self._optimizer.defaults),
            device_type=self.device_type,
            **self.defence_arguments(),
        )
        clone.reset()
        clone.set_params(**{name: value for name, value in self.get_params().items() if name not in _OF_THE_WEIGHTS})
        return clone

    def get_activations(
        self,
        x: np.ndarray | Tensor,
        layer: int | str | None = None,
        batch_size: int = 128,
        framework: bool = False,
    ) -> np.ndarray | Tensor:
        """What a layer of the undefended model gives for images (N, ...) themselves: (N, ...), without random numbers.

        A mean over the passes of a defence would be no output of the layer, and other at each call.

        Args:
            x: images, which are preprocessed.
            layer: index or name, see `layer_names`. Where it is called several times, the last call counts.
            batch_size: images in one forward pass; with `framework` it is one pass.
            framework: return a tensor, through which gradients flow to the images.

        Raises:
            TypeError: `layer` is neither.
            ValueError, IndexError: there is no such layer.
            KeyError: a forward pass does not call it.
        """
        if isinstance(layer, str):
            if layer not in self._layer_names:
                raise ValueError(f"layer={layer!r}: must be one of {', '.join(self._layer_names)}")
            name = layer
        elif isinstance(layer, int):
            name = self._layer_names[layer]
        else:
            raise TypeError(f"layer={layer!r}: must be the index or the name of a layer")
        self._model.eval()
        images, _ = self._apply_preprocessing(x, y=None, fit=False, no_grad=not framework)
        images = torch.as_tensor(images)
        if framework:
            return _output(self.model.model, name, images.to(self._device))
        with torch.no_grad():
            batches = (images[first : first + batch_size] for first in range(0, len(images), batch_size))
            outputs = [_output(self.model.model, name, batch.to(self._device)) for batch in batches]
        return np.concatenate([output.cpu().numpy() for output in outputs])

    def _apply_preprocessing(self, x: Any, y: Any, fit: bool = False, no_grad: bool = True) -> tuple[Any, Any]:
        """ART's, before and after which images are in a precision that the model takes.

        With NumPy 2, ART's decision attacks make float64, and so do some of ART's preprocessors.
        """
        x, y = super()._apply_preprocessing(self._in_its_precision(x), y, fit=fit, no_grad=no_grad)
        return self._in_its_precision(x), y

    def _in_its_precision(self, x: Any) -> Any:
        """Images in float32 for float64, unless the model has float64 parameters."""
        if any(parameter.dtype == torch.float64 for parameter in self.model.parameters()):
            return x
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            return x.float()
        if isinstance(x, np.ndarray) and x.dtype == np.float64:
            return x.astype(np.float32)
        return x


_OF_THE_WEIGHTS = ("model", "optimizer")


def _output(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Of a layer for images (N, ...); no hook stays behind, which could not be pickled."""
    outputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    try:
        model(images)
    finally:
        hook.remove()
    if not outputs:
        raise KeyError(f"layer {name!r} is not called by a forward pass of the model")
    return outputs[-1]
