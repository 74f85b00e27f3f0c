from importlib.util import find_spec

import pytest
import torch
from models_for_tests import small_net
from torch import nn

collect_ignore = [f"test_{toolkit}.py" for toolkit in ("torchattacks", "foolbox") if find_spec(toolkit) is None]


class Normalised(nn.Module):
    """The oracle for ART's `preprocessing=(mean, std)`."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.mean, self.std = net, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


@pytest.fixture
def normalised(net):
    return Normalised(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).eval()


@pytest.fixture
def used_net():
    """In the middle of a training: mixed modes, a frozen layer, gradients."""
    net = small_net().train()
    net.features[1].eval()
    net.head.bias.requires_grad_(False)
    for parameter in net.features.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    return net


@pytest.fixture
def state_of():
    """All of a model that an attack could change."""

    def state(net):
        modes = {name: part.training for name, part in net.named_modules()}
        values = {name: value.clone() for name, value in net.state_dict().items()}
        trainable = {name: p.requires_grad for name, p in net.named_parameters()}
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
        hooks = [len(part._forward_hooks) + len(part._backward_hooks) for part in net.modules()]
        return modes, values, trainable, grads, hooks

    return state


@pytest.fixture
def assert_untouched(state_of):
    def check(net, before):
        modes, values, trainable, grads, hooks = state_of(net)
        assert (modes, trainable, hooks) == (before[0], before[2], before[4])
        assert all(torch.equal(values[name], before[1][name]) for name in values)
        for name, grad in grads.items():
            assert (grad is None) == (before[3][name] is None), name
            assert grad is None or torch.equal(grad, before[3][name])

    return check
