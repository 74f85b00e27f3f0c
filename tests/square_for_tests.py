"""What tests of Square share: small networks, images of any shape, and what is asked."""

import math

import art.attacks.evasion
import torch
from models_for_tests import art_classifier
from torch import nn

from guardians.attacks import Square

INF = float("inf")
EPS = {INF: 0.03, 2: 0.3, 1: 3.0}


def square(model, p=INF, **options):
    return Square(model, p, **{"eps": EPS[p], "max_iter": 60, "verbose": False, "seed": 0, **options})


def right(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def images_of(shape, n=1, seed=0, dtype=torch.float64):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_net(shape, seed=0, dtype=torch.float64):
    """Of which an image is never far from being fooled, nor close to it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = math.prod(shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype).eval()


class Asked(nn.Module):
    """Keeps all that it is asked."""

    def __init__(self, net):
        super().__init__()
        self.net, self.points = net, []
        self.weight = nn.Parameter(torch.zeros((), dtype=next(net.parameters()).dtype))

    def forward(self, x):
        self.points.append(x.detach().clone())
        return self.net(x)


def a_search(shape, seed, targeted=False):
    """A network, one image and its label or a target; the network is soft, so that the search is long."""
    net, x = a_net(shape, seed), images_of(shape, seed=seed)
    net[3].bias.data.zero_()
    y = net(x).argsort(1)[:, -2] if targeted else right(net, x)
    net[3].weight.data *= 0.02
    return net, x, y


def art_square(net, shape, p, **options):
    estimator = art_classifier(net, input_shape=shape, nb_classes=4)
    return art.attacks.evasion.SquareAttack(estimator, p, verbose=False, **options)
