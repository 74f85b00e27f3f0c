"""Square: what its paper and the toolkits do, and what every attack owes a user."""

import inspect
import math

import numpy as np
import pytest
import torch
import torchattacks
from torch import nn

from guardians.attacks import Square
from guardians.engine.rng import SampleRng

INF = float("inf")
EPS = {INF: 0.03, 2: 0.3, 1: 3.0}
norms = pytest.mark.parametrize("p", EPS)


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


class Draws:
    """The numbers that native draws, in their order, for a toolkit to draw the same."""

    def __init__(self, monkeypatch):
        self.drawn, self.monkeypatch = [], monkeypatch
        original = SampleRng.numbers

        def recorded(rng, count):
            numbers = original(rng, count)
            self.drawn.append(numbers[0])
            return numbers

        monkeypatch.setattr(SampleRng, "numbers", recorded)

    def signs(self, numbers):
        return torch.from_numpy(np.where(numbers < 0.5, -1.0, 1.0))


def without_the_floor():
    """torchattacks' class without the 1e-12 that it adds to norms, which matters where a window nearly cancels out."""
    source = inspect.getsource(inspect.getmodule(torchattacks.Square))
    assert source.count("1e-12") == 4
    module = {"__name__": "torchattacks.attacks.square", "__package__": "torchattacks.attacks"}
    exec(source.replace("1e-12", "1e-100"), module)
    return module["Square"]


class SameDraws(without_the_floor()):
    """torchattacks with given draws, its windows at all places."""

    queue = iter(())

    def perturb(self, x, y=None):
        self.init_hyperparam(x)
        return self.attack_single_run(x, y)[1]

    def random_int(self, low=0, high=1, shape=(1,)):
        return torch.tensor([low + int(next(self.queue) * (high - low + 1))])

    def random_choice(self, shape):
        count = math.prod(shape)
        numbers = np.array([next(self.queue) for _ in range(count)])
        return torch.from_numpy(np.where(numbers < 0.5, -1.0, 1.0)).reshape(tuple(shape))

    def eta(self, s):
        number = next(self.queue)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_: torch.tensor([number]))
            return super().eta(s)


class WindowNormOfEachChannel(SameDraws):
    """With the norm of the windows of each channel by itself, as in algorithm 3."""

    masked = None

    def lp_norm(self, x):
        whole = super().lp_norm(x)
        outer = self.masked
        self.masked = None
        return whole if outer is None else outer


def theirs_with_our_draws(kind, net, x, y, p, draws, targeted, **options):
    asked = Asked(net)
    attack = kind(asked, norm=f"L{p:g}", eps=EPS[p], **options)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    attack.queue = iter(map(float, draws))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return asked.points, attack(x, y)
    finally:
        torch.set_default_dtype(default)


def in_their_order(drawn, shape, p):
    """torchattacks draws of each tile the turn and then its signs; native all turns, and then all signs."""
    if p == INF:
        return [number for numbers in drawn for number in numbers]
    channels = shape[0]
    tiles = drawn[0].reshape(1 + channels, -1).T
    return [number for numbers in (tiles.ravel(), *drawn[1:]) for number in numbers]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["margin", "cross_entropy"])
@pytest.mark.parametrize(
    ("shape", "p"), [((3, 10, 10), INF), ((1, 11, 11), INF), ((1, 10, 10), 2), ((1, 17, 17), 2), ((1, 16, 16), 2)]
)
def test_every_query_is_torchattacks_s(shape, p, loss, targeted, monkeypatch):
    lengths = []
    for seed in range(3):
        net, x = a_net(shape, seed), images_of(shape, seed=seed)
        net[3].bias.data.zero_()
        y = right(net, x)
        if targeted:
            y = net(x).argsort(1)[:, -2]
        net[3].weight.data *= 0.02  # far from saturation, so that the search is long
        with pytest.MonkeyPatch.context() as patch:
            draws = Draws(patch)
            ours = Asked(net)
            x_adv = square(ours, p, max_iter=80, loss=loss, targeted=targeted, p_init=0.5, batch_size=1)(x, y)
        queries, other = theirs_with_our_draws(
            SameDraws,
            net,
            x,
            y,
            p,
            in_their_order(draws.drawn, shape, p),
            targeted,
            n_queries=80,
            p_init=0.5,
            loss="margin" if loss == "margin" else "ce",
        )
        mine = ours.points[1:]  # the first tells how many classes there are
        assert len(mine) == len(queries)
        for own, its in zip(mine, queries, strict=True):
            torch.testing.assert_close(own, its, rtol=0, atol=1e-10)
        torch.testing.assert_close(x_adv, other, rtol=0, atol=1e-10)
        lengths.append(len(mine))
    assert max(lengths) > 20
