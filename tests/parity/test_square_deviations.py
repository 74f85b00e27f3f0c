"""Where Square of torchattacks and ART differs from its paper; a row of the documentation each."""

import math

import numpy as np
import pytest
import torch
import torchattacks
from square_for_tests import INF, Asked, a_net, a_search, art_square, images_of, right, square
from torch import nn

from guardians.toolkits import TorchattacksAttack


def test_toolkits_never_put_a_window_at_the_last_place():
    """The paper draws corners from {0, ..., w - h}; torchattacks and ART leave out the last one."""
    net, x, y = a_search((1, 8, 8), 1)
    net[3].bias.data[y] += 100
    theirs, ours = Asked(net), Asked(net)
    TorchattacksAttack(theirs, torchattacks.Square, eps=0.03, n_queries=200, p_init=0.1)(x, y)
    square(ours, max_iter=200, p_init=0.1)(x, y)
    runs = [torch.cat(asked.points[-150:]) for asked in (theirs, ours)]
    last = [run[:, :, -1:].unique(dim=0).shape[0] for run in runs]
    assert last[0] == 1
    assert last[1] > 1


def test_torchattacks_has_one_window_for_the_whole_batch():
    net, _, _ = a_search((1, 8, 8), 1)
    x = 0.5 + 0 * images_of((1, 8, 8), n=6)
    y = right(net, x)
    net[3].bias.data[y[0]] += 100
    moved = []
    for attack in (
        lambda asked: TorchattacksAttack(asked, torchattacks.Square, eps=0.03, n_queries=1, p_init=0.2, batch_size=6),
        lambda asked: square(asked, max_iter=1, p_init=0.2, batch_size=6),
    ):
        asked = Asked(net)
        attack(asked)(x, y)
        before, after = asked.points[-2:] if len(asked.points[-1]) == 6 else asked.points[-3:-1]
        moved.append((after != before).flatten(1).any(0).sum().item())
    assert moved[0] <= round(math.sqrt(0.2 * 64)) ** 2 < moved[1]


def test_torchattacks_reseeds_the_global_generator():
    net, x, y = a_search((1, 8, 8), 1)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        TorchattacksAttack(net, torchattacks.Square, eps=0.03, n_queries=5)(x, y)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_torchattacks_spends_the_norm_of_all_channels_on_each():
    net, x, y = a_search((3, 10, 10), 0)
    net[3].bias.data[y] += 100
    asked = Asked(net)
    TorchattacksAttack(asked, torchattacks.Square, norm="L2", eps=0.3, n_queries=1, p_init=0.1)(x, y)
    start, first = (points - x for points in asked.points[-3:-1])  # the last is what it returns
    outside = (first.abs() > 0) & (start.abs() > 0)
    ratio = (first[outside] / start[outside]).median()
    assert ratio < 0.999  # what no window has touched is scaled down
    ours = Asked(net)
    inner = 0.4 + 0.2 * x
    square(ours, 2, max_iter=1, p_init=0.1)(inner, y)
    start, first = (points - inner for points in ours.points[-2:])
    assert ((first - start).abs() < 1e-12).sum() > 150


@pytest.mark.parametrize("size", [4, 12, 14, 24])
def test_torchattacks_l2_fails_on_sizes_that_five_tiles_do_not_cover(size):
    net, x, y = a_search((1, size, size), 0)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        TorchattacksAttack(net, torchattacks.Square, norm="L2", eps=0.3, n_queries=2)(x, y)
    square(net, 2, max_iter=2)(x, y)


def test_art_returns_the_images_in_norm_1():
    net, x = a_net((1, 10, 10), dtype=torch.float32), images_of((1, 10, 10), 3, dtype=torch.float32).numpy()
    assert np.array_equal(art_square(net, (1, 10, 10), 1, eps=3.0, max_iter=10).generate(x), x)


def test_art_puts_nearly_all_of_an_l2_perturbation_into_each_new_window():
    """It divides by what the window may have, instead of multiplying with it, and scales the whole image after."""
    x = 0.3 + 0.4 * images_of((1, 20, 20), dtype=torch.float32)
    net = a_net((1, 20, 20), dtype=torch.float32)
    net[3].bias.data[right(net, x)] += 100  # too sure to be fooled
    theirs, ours = Asked(net), Asked(net)
    np.random.seed(0)  # noqa: NPY002
    art_square(theirs, (1, 20, 20), 2, eps=0.3, max_iter=1, p_init=0.05).generate(x.numpy())
    square(ours, 2, max_iter=1, p_init=0.05)(x)
    shares = []
    for asked in (theirs, ours):
        power = (asked.points[-1] - x) ** 2
        shares.append((nn.functional.avg_pool2d(power, 5, 1).max() * 25 / power.sum()).item())
    assert shares[0] > 0.99
    assert shares[1] < 0.3


def test_art_fails_where_the_window_is_as_wide_as_the_image():
    net, x = a_net((1, 4, 4), dtype=torch.float32), images_of((1, 4, 4), 3, dtype=torch.float32).numpy()
    net[3].bias.data[right(net, torch.from_numpy(x))[0]] += 100
    with pytest.raises(ValueError, match=r"high <= 0|low >= high"):
        art_square(net, (1, 4, 4), INF, eps=0.01, p_init=0.9).generate(x)
    square(net, eps=0.01, p_init=0.9).generate(x)


def test_torchattacks_adds_1e_12_to_norms():
    attack = torchattacks.Square(a_net((1, 8, 8)), norm="L2")
    unit = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    attack.init_hyperparam(unit)
    assert abs(attack.normalize_delta(unit).item() - (1 - 1e-12)) < 1e-15
