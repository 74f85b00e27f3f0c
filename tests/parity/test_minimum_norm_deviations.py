"""Where foolbox' DDN and FMN differ from their papers; a row of the documentation each."""

import foolbox
import torch
from models_for_tests import small_net, some_images

from guardians.attacks import DDN, FMN
from guardians.parity.comparison import Recorder
from guardians.toolkits import FoolboxAttack


def right_images(n):
    net, x = small_net(dtype=torch.float64), 0.3 + 0.4 * some_images(n, dtype=torch.float64)
    return net, x, net(x).argmax(1)


def test_foolbox_fmn_l2_does_not_project_onto_the_ball():
    net, x, y = right_images(20)
    native = FMN(net, 2, max_iter=60, verbose=False)
    near = native.distance(native(x, y), x)
    theirs = FoolboxAttack(net, foolbox.attacks.L2FMNAttack(steps=60))(x, y)
    assert native.report.fooled.all()
    assert native.distance(theirs, x).mean() > 3 * near.mean()


def test_foolbox_ddn_rounds_its_factors_to_float32():
    net, x, y = right_images(1)
    asked = Recorder(net)
    FoolboxAttack(asked, foolbox.attacks.DDNAttack(steps=3))(x, y)
    off = float((asked.iterates[1] - x).norm()) - 1.05
    assert 1e-9 < abs(off) < 1e-7


def test_foolbox_ddn_steps_shrink_below_a_gradient_norm_of_1e_12():
    net, x, _ = right_images(30)
    with torch.no_grad():
        net.head.weight *= 1000
        net.head.bias *= 1000
        surest = net(x).topk(2).values.diff().argmin()
    x = x[surest, None]
    y = net(x).argmax(1)
    asked, turns = Recorder(net), []
    for attack in (
        DDN(asked, 3, 0.1, precision="float32", verbose=False),
        FoolboxAttack(asked, foolbox.attacks.DDNAttack(steps=3, init_epsilon=0.1)),
    ):
        asked.iterates, asked.gradients = [], []
        attack(x, y)
        assert max(gradient.norm() for gradient in asked.gradients[:2]) < 1e-15
        first, second = ((iterate - x).flatten() for iterate in asked.iterates[-2:])
        turns.append(1 - first @ second / (first.norm() * second.norm()))
    assert turns[0] > 0.01
    assert turns[1] < 1e-5
