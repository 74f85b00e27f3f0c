"""The worked example of the guide is an attack that works."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchattacks
from models_for_tests import is_fooled, small_net, some_images, some_labels
from torch.nn.functional import cross_entropy

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def attack_class():
    names = {"__name__": "worked_example"}
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(compile(code, str(GUIDE), "exec"), names)
    return names["NIFGSM"]


def literally(model, x, y, eps, steps, decay):
    """The loop of the paper (algorithm 1, with one copy of the image)."""
    x_t, g = x.clone(), torch.zeros_like(x)
    for _ in range(steps):
        x_nes = (x_t + eps / steps * decay * g).requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(model(x_nes), y, reduction="sum"), x_nes)
        g = decay * g + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        x_t = (x_t + eps / steps * g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return x_t


@pytest.mark.parametrize("batch_size", [3, 12])
def test_it_is_the_papers_loop(attack_class, batch_size, net64):
    x, y = some_images(12, dtype=torch.float64), some_labels(12)
    attack = attack_class(net64, eps=0.05, max_iter=7, decay=0.9, batch_size=batch_size)
    torch.testing.assert_close(attack(x, y), literally(net64, x, y, 0.05, 7, 0.9), rtol=0, atol=1e-12)


def test_without_decay_it_is_bim_of_torchattacks(attack_class, net):
    x, y = some_images(12), some_labels(12)
    expected = torchattacks.BIM(net, eps=0.05, alpha=0.05 / 5, steps=5)(x, y)
    agree = (attack_class(net, eps=0.05, max_iter=5, decay=0)(x, y) - expected).abs() < 1e-6
    assert agree.float().mean() > 0.999  # but for pixels whose gradient is within rounding of zero


def test_it_gets_what_the_engine_gives(attack_class):
    net, x = small_net(), some_images(20)
    y, mask = net(x).argmax(1), some_images(20, seed=4) > 0.3
    attack = attack_class(net, eps=0.06, early_stop=True, batch_size=7)
    x_adv = attack(x, y, mask=mask)
    assert np.array_equal(attack.report.fooled, is_fooled(net, x_adv, y))
    assert attack.report.fooled.any()
    assert torch.equal(x_adv[~mask], x[~mask])
    assert ((x_adv.double() - x.double()).abs() <= 0.06).all()
    assert repr(attack) == "NIFGSM(eps=0.06, batch_size=7, early_stop=True)"
    with pytest.raises(ValueError, match="eps=-1"):
        attack.set_params(eps=-1)
