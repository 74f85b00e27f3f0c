"""Small seeded models, images and ART estimators that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from guardians.engine.rng import row_keys

SHAPE = (3, 8, 8)
CLASSES = 5


class SmallNet(nn.Module):
    """Two convolutions with batch normalisation, whose statistics are far from those of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
        )
        self.head = nn.Linear(12 * 4 * 4, CLASSES)
        self.images_seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images_seen += len(x)
        return self.head(self.features(x).flatten(1))


def small_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> SmallNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SmallNet()
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.3)
                layer.running_var.uniform_(0.5, 1.5)
    net.eval()
    with torch.no_grad():  # so that no class is predicted for all images
        net.head.weight *= 4
        net.head.bias -= net(some_images(64, seed=99)).mean(0)
    net.images_seen = 0
    return net.to(dtype)


def linear_model(seed: int = 0, classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), classes)).to(dtype).eval()


def some_images(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in [0, 1] of which a tenth of the pixels is exactly 0 and a tenth exactly 1."""
    x = torch.rand((n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.25 * x - 0.125).clamp(0, 1).to(dtype)


def some_labels(n: int, seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def art_classifier(model: nn.Module, **options: Any) -> PyTorchClassifier:
    settings = {
        "loss": nn.CrossEntropyLoss(),
        "input_shape": SHAPE,
        "nb_classes": CLASSES,
        "clip_values": (0.0, 1.0),
        "device_type": "cpu",
    }
    return PyTorchClassifier(model, **{**settings, **options})


class Constant(nn.Module):
    """Logits that are zero whatever the image, with a gradient that is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :CLASSES]


class NanGradient(nn.Module):
    """Finite logits with a gradient that is NaN everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x).sqrt().flatten(1)[:, :CLASSES] + x.flatten(1)[:, :CLASSES]


def traceable_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The function of `small_net`, which `torch.fx` can trace."""
    net = small_net(seed)
    return nn.Sequential(*net.features, nn.Flatten(), net.head).to(dtype).eval()


class Recorder(nn.Module):
    """Notes how it is asked. Where its net can be traced so can it, and a copy's questions are not noted here."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.asked: list[tuple[int, bool]] = []
        """Images, and whether their gradient was wanted."""

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append((x.shape[0], x.requires_grad))
        return self.net(x)

    def images(self, with_gradient: bool | None = None) -> int:
        """Asked about with, without, or either way."""
        return sum(n for n, wanted in self.asked if with_gradient in (None, wanted))


class Noted(nn.Module):
    """Keeps what it is asked about, as `Recorder` does the numbers. It cannot be traced."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.training = net.training
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) > 0  # is what cannot be traced
        self.asked.append(x.detach().clone())
        return self.net(x)


class Split(nn.Module):
    """A net in two: what comes before it flattens its features, and its last layer."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.features, self.head = net[:-2], net[-1]
        self.training = net.training


class Viewing(Split):
    """Views the output of a convolution, which channels_last does not allow, as one row."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).view(len(x), -1))


class _Float32Only(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Uncastable(Split):
    """What it does in the middle is for float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Float32Only.apply(self.features(x)).flatten(1))


def ask(module: nn.Module, x: Tensor, keys: np.ndarray | None = None, grad: bool = False) -> Tensor:
    """The answers of a random module with draws of their own for each of the images, the same at each call."""
    with row_keys(np.arange(len(x)) if keys is None else keys), torch.set_grad_enabled(grad):
        return module(x)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=atol)


def nudged(x: Tensor, by: float) -> Iterator[Tensor]:
    """The images a few roundings away, eight times: what moves with them is a matter of rounding."""
    for seed in range(8):
        yield x + 2 * by * (torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) - 0.5)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that an attack must leave as it is."""
    tensors = (*model.parameters(), *model.buffers())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "values": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "no gradients": all(parameter.grad is None for parameter in model.parameters()),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "training": [part.training for part in model.modules()],
        "hooks": [list(getattr(part, kind).items()) for part in model.modules() for kind in kinds],
        "memory": [(id(tensor), tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in tensors],
        "modules": [(name, id(part)) for name, part in model.named_modules()],
    }


def is_fooled(model: nn.Module, x_adv: Tensor, y: Tensor, targeted: bool = False) -> np.ndarray:
    """The verdict of the model itself."""
    with torch.no_grad():
        return ((model(x_adv).argmax(1) == y) == targeted).numpy()
