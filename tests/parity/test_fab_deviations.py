"""Where torchattacks' FAB differs from its papers; a row of the documentation each."""

import numpy as np
import pytest
import torch
import torchattacks
from models_for_tests import CLASSES, SHAPE, some_images
from torch import nn

from guardians.attacks import FAB
from guardians.parity.comparison import Recorder


def right(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def inner_images(n):
    """Images of which no pixel is near a bound."""
    return 0.3 + 0.4 * some_images(n)


def test_torchattacks_fab_casts_to_float32(net64):
    x = some_images(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="type"):
        torchattacks.FAB(net64, steps=1)(x, right(net64, x))


def test_torchattacks_fab_fails_in_norm_1(net):
    x = some_images(2)
    with pytest.raises(UnboundLocalError):
        torchattacks.FAB(net, norm="L1", steps=1)(x, right(net, x))


def test_torchattacks_fab_returns_the_image_where_the_nearest_is_beyond_eps(net):
    x = inner_images(6)
    found = torchattacks.FAB(net, eps=1e-6, steps=10)(x, right(net, x))
    assert torch.equal(found, x)


def test_torchattacks_fab_takes_labels_left_for_targets_reached(net):
    x = inner_images(12)
    y, target = right(net, x), (right(net, x) + 1) % CLASSES
    attack = torchattacks.FAB(net, eps=10.0, steps=20)
    attack.set_mode_targeted_by_label(quiet=True)
    found = attack(x, target)  # its labels are the targets
    assert torch.equal(found, x)
    native = FAB(net, targeted=True, max_iter=20, verbose=False)
    assert torch.equal(right(net, native(x, target)), target)
    assert not torch.equal(y, target)


@pytest.mark.parametrize("name", ["L1", "L2"])
def test_torchattacks_fab_does_not_see_gradients_below_1e_8(name):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 2)).eval(), inner_images(4)
    model[1].weight.data *= 1e-8
    model[1].bias.data = 0 * model[1].bias.data
    y, p = right(model, x), int(name[1])
    single = torchattacks.FAB(model, norm=name, eps=1e9, steps=10).attack_single_run
    assert torch.equal(single(x, y), x)
    native = FAB(model, p, max_iter=10, verbose=False)
    native(x, y)
    assert native.report.fooled.any()


def test_torchattacks_fab_takes_no_target_after_the_first_within_eps(net):
    x, asked = inner_images(6), Recorder(net)
    y = right(net, x)
    torchattacks.FAB(asked, eps=1e9, steps=5, multi_targeted=True, n_classes=CLASSES)(x, y)
    assert len(asked.iterates) == 5
    native = FAB(net, max_iter=5, verbose=False)
    native(x, y)
    assert native.report.search_backward == 6 * 5 * (CLASSES - 1)


def test_torchattacks_fab_has_no_final_search(net):
    x = inner_images(20)
    y = right(net, x)
    found = torchattacks.FAB(net, norm="L2", eps=1e9, steps=30)(x, y)
    native = FAB(net, 2, max_iter=30, verbose=False)
    ours, theirs = native.distance(native(x, y), x), native.distance(found, x)
    assert (ours <= 1.001 * theirs).all()  # near the boundary float32 lets the ways part
    assert ours.mean() < 0.998 * theirs.mean()
