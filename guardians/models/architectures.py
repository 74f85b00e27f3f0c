"""Classifiers for 32 x 32 images: logits for float images in [0, 1], with the normalisation inside the model."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torchvision.models import resnet18 as torchvision_resnet18

__all__ = ["CIFAR10_MEAN", "CIFAR10_STD", "Normalize", "lenet", "resnet9", "resnet18", "wide_resnet"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class Normalize(nn.Module):
    """Per-channel (x - mean) / std of images (N, C, H, W), as the first layer of a model."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = CIFAR10_MEAN, std: Sequence[float] = CIFAR10_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        return (x - self.mean) / self.std


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r}: must be an integer")
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def _residual(channels: int) -> _Residual:
    return _Residual(nn.Sequential(_conv_bn_relu(channels, channels), _conv_bn_relu(channels, channels)))


def lenet(num_classes: int = 10) -> nn.Sequential:
    """LeNet-5 (LeCun et al., "Gradient-based learning applied to document recognition", 1998, section II.B), with ReLU,
    maxima for pooling and colours, as the CIFAR-10 tutorial of PyTorch has it; for 32 x 32 images.

    Args:
        num_classes: number of logits.

    Raises:
        TypeError: `num_classes` is not an integer.
        ValueError: `num_classes` is below 1.
    """
    _check_positive(num_classes=num_classes)
    return nn.Sequential(
        Normalize(),
        nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(16 * 5 * 5, 120), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU(inplace=True)),
        nn.Linear(84, num_classes),
    )


def resnet9(width: int = 64, num_classes: int = 10) -> nn.Sequential:
    """The nine-layer residual network of the DAWNBench CIFAR-10 entries (Page, "How to train your ResNet", 2018).

    Args:
        width: channels of the first convolution; the stages have 2, 4 and 8 times as many.
        num_classes: number of logits.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is below 1.
    """
    _check_positive(width=width, num_classes=num_classes)
    return nn.Sequential(
        Normalize(),
        _conv_bn_relu(3, width),
        _conv_bn_relu(width, 2 * width),
        nn.MaxPool2d(2),
        _residual(2 * width),
        _conv_bn_relu(2 * width, 4 * width),
        nn.MaxPool2d(2),
        _conv_bn_relu(4 * width, 8 * width),
        nn.MaxPool2d(2),
        _residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes, bias=False),
        _Scale(0.125),
    )


def resnet18(num_classes: int = 10) -> nn.Sequential:
    """torchvision's ResNet-18 with the CIFAR stem: a 3 x 3 convolution of stride 1 and no first pooling.

    Raises:
        TypeError: `num_classes` is not an integer.
        ValueError: `num_classes` is below 1.
    """
    _check_positive(num_classes=num_classes)
    network = torchvision_resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return nn.Sequential(Normalize(), network)


class _WideBlock(nn.Module):
    """Pre-activation basic block (Zagoruyko and Komodakis 2016, figure 1d without dropout)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = relu(self.bn1(x))
        out = self.conv2(relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def wide_resnet(depth: int = 28, widen_factor: int = 10, num_classes: int = 10) -> nn.Sequential:
    """WRN-depth-widen_factor ("Wide Residual Networks", Zagoruyko and Komodakis 2016, table 1), without dropout.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: `depth` is not 6 n + 4 with n >= 1, or another argument is below 1.
    """
    _check_positive(depth=depth, widen_factor=widen_factor, num_classes=num_classes)
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth}: a wide ResNet has depth 6 n + 4 with n >= 1 (10, 16, 22, 28, 34, 40, ...)")
    blocks_per_group = (depth - 4) // 6
    channels = 16
    layers: list[nn.Module] = [Normalize(), nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for group, out_channels in enumerate((16 * widen_factor, 32 * widen_factor, 64 * widen_factor)):
        for block in range(blocks_per_group):
            layers.append(_WideBlock(channels, out_channels, stride=2 if group > 0 and block == 0 else 1))
            channels = out_channels
    head = (nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *head, nn.Linear(channels, num_classes))
