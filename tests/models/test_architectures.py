"""Architectures against the papers' figures and a second, functional reading of their definition."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, linear, max_pool2d, relu

from guardians.models import CIFAR10_MEAN, CIFAR10_STD, Normalize, resnet9, resnet18, wide_resnet

SMALL = {
    "resnet9": lambda **kwargs: resnet9(4, **kwargs),
    "resnet18": resnet18,
    "wide_resnet": lambda **kwargs: wide_resnet(10, 1, **kwargs),
}


def images(n: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch norm statistics, weights and biases, so that leaving any of them out is noticed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
class TestEveryArchitecture:
    def test_one_row_of_logits_an_image(self, name: str) -> None:
        model = SMALL[name](num_classes=7).eval()
        logits = model(images(3))
        assert logits.shape == (3, 7)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(model(images(3)[1:2]), logits[1:2])

    def test_ten_classes_unless_told(self, name: str) -> None:
        assert SMALL[name]().eval()(images(1)).shape == (1, 10)

    def test_other_image_sizes(self, name: str) -> None:
        assert SMALL[name]().eval()(images(1, side=48)).shape == (1, 10)

    def test_normalisation_is_inside(self, name: str) -> None:
        """Images in [0, 1] go in; what comes after the first layer sees (x - mean) / std of each channel."""
        model = randomise(SMALL[name]())
        x = images(2)
        mean, std = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
        normalised = ((x.permute(0, 2, 3, 1) - mean) / std).permute(0, 3, 1, 2)
        torch.testing.assert_close(model(x), model[1:](normalised))
        assert not torch.allclose(model(x), model[1:](x))

    def test_gradient_reaches_every_pixel(self, name: str) -> None:
        x = images(2).requires_grad_()
        randomise(SMALL[name]())(x).logsumexp(1).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad != 0).float().mean() > 0.5

    def test_every_parameter_has_a_gradient(self, name: str) -> None:
        model = SMALL[name]().train()
        model(images(4)).square().sum().backward()
        unused = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert unused == []

    def test_state_dict_round_trip(self, name: str) -> None:
        torch.manual_seed(0)
        model, other = randomise(SMALL[name](), seed=1), SMALL[name]().eval()
        assert not torch.equal(model(images(2)), other(images(2)))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(images(2)), other(images(2)))

    def test_state_dict_holds_the_normalisation(self, name: str) -> None:
        state = SMALL[name]().state_dict()
        torch.testing.assert_close(state["0.mean"].flatten(), torch.tensor(CIFAR10_MEAN))
        torch.testing.assert_close(state["0.std"].flatten(), torch.tensor(CIFAR10_STD))

    def test_initial_weights_follow_the_seed(self, name: str) -> None:
        def weights(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return torch.cat([p.flatten() for p in SMALL[name]().parameters()])

        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))

    @pytest.mark.parametrize("num_classes", [0, -3])
    def test_no_classes(self, name: str, num_classes: int) -> None:
        with pytest.raises(ValueError, match=f"num_classes={num_classes}: must be at least 1"):
            SMALL[name](num_classes=num_classes)


# Sums over the layers: k k in out for a convolution, 2 channels for a batch norm.
def test_size_of_resnet9() -> None:
    w = 16
    convolutions = 9 * (3 * w + w * 2 * w + 2 * (2 * w) ** 2 + 2 * w * 4 * w + 4 * w * 8 * w + 2 * (8 * w) ** 2)
    norms = 2 * (w + 3 * 2 * w + 4 * w + 3 * 8 * w)
    assert parameters(resnet9(w)) == convolutions + norms + 8 * w * 10 == 412_944
    assert round(parameters(resnet9(16)) / 1e6, 2) == 0.41


def test_size_of_resnet18() -> None:
    """11,173,962 is the size the field reports for the CIFAR ResNet-18 (e.g. kuangliu/pytorch-cifar)."""
    assert parameters(resnet18()) == 11_173_962


@pytest.mark.parametrize(
    ("depth", "widen_factor", "millions"),
    [(28, 10, 36.5), (40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (16, 8, 11.0), (22, 8, 17.2), (16, 10, 17.1)],
)
def test_sizes_of_wide_resnets(depth: int, widen_factor: int, millions: float) -> None:
    """Zagoruyko and Komodakis 2016, tables 4 and 5."""
    with torch.device("meta"):
        model = wide_resnet(depth, widen_factor)
    assert round(parameters(model) / 1e6, 1) == millions
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) == depth - 3


@pytest.mark.parametrize("depth", [-2, 4, 9, 11, 27, 29])
def test_invalid_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth={depth}: "):
        wide_resnet(depth)


@pytest.mark.parametrize("value", [1.5, "16", None, True])
def test_widths_that_are_no_integers(value: int) -> None:
    with pytest.raises(TypeError, match=f"width={value!r}: must be an integer"):
        resnet9(value)
    with pytest.raises(TypeError, match=f"widen_factor={value!r}: must be an integer"):
        wide_resnet(10, value)


@pytest.mark.parametrize("value", [0, -1])
def test_widths_below_one(value: int) -> None:
    with pytest.raises(ValueError, match=f"width={value}: must be at least 1"):
        resnet9(value)
    with pytest.raises(ValueError, match=f"widen_factor={value}: must be at least 1"):
        wide_resnet(10, value)


class Reader:
    """The weights of a model in the order in which they were defined."""

    def __init__(self, model: nn.Module) -> None:
        self.convolutions = iter([m.weight for m in model.modules() if isinstance(m, nn.Conv2d)])
        self.norms = iter([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)])

    def norm(self, x: Tensor) -> Tensor:
        m = next(self.norms)
        return batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=1e-5)

    def conv(self, x: Tensor, stride: int = 1) -> Tensor:
        weight = next(self.convolutions)
        return conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def test_resnet9_is_page_2018() -> None:
    model, x = randomise(resnet9(4)), images(2)
    read = Reader(model)

    def layer(x: Tensor) -> Tensor:
        return relu(read.norm(read.conv(x)))

    h = max_pool2d(layer(layer(Normalize()(x))), 2)
    h = h + layer(layer(h))
    h = max_pool2d(layer(h), 2)
    h = max_pool2d(layer(h), 2)
    h = h + layer(layer(h))
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(model(x), linear(h.amax((2, 3)), head.weight) * 0.125)


def test_wide_resnet_is_zagoruyko_2016() -> None:
    """Pre-activation blocks of two 3 x 3 convolutions; strides 1, 2, 2; where the shape changes, the shortcut is a
    1 x 1 convolution of the activated input."""
    model, x = randomise(wide_resnet(16, 2)), images(2)
    read = Reader(model)
    h = read.conv(Normalize()(x))
    for stride in (1, 2, 2):
        for block in range(2):
            s = stride if block == 0 else 1
            activated = relu(read.norm(h))
            out = read.conv(activated, s)
            out = read.conv(relu(read.norm(out)))
            h = out + (read.conv(activated, s) if block == 0 else h)
    h = avg_pool2d(relu(read.norm(h)), h.shape[-1]).flatten(1)
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(model(x), linear(h, head.weight, head.bias))


def test_resnet18_keeps_the_resolution_in_its_stem() -> None:
    shapes: list[tuple[int, ...]] = []
    model = resnet18().eval()
    model[1].layer1.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model[1].layer4.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model(images(1))
    assert shapes == [(1, 64, 32, 32), (1, 512, 4, 4)]


def test_normalize_takes_other_statistics() -> None:
    layer = Normalize(mean=(0.5,), std=(0.25,))
    assert layer(torch.tensor([[[[0.0, 0.5, 1.0]]]])).flatten().tolist() == [-2.0, 0.0, 2.0]
    assert list(layer.parameters()) == []
