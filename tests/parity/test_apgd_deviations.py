"""Where the APGD of torchattacks and ART differs from its paper; a row of the documentation each."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from models_for_tests import CLASSES, art_classifier, small_net, some_images
from torch import nn

from guardians.attacks import APGD
from guardians.attacks.apgd import checkpoints
from guardians.parity.comparison import Recorder

torchattacks = pytest.importorskip("torchattacks")
from art.attacks import evasion as art  # noqa: E402

INF = float("inf")


class Scripted(nn.Module):
    """Two classes. The loss where a gradient is asked for is what a script says, and the gradient up and down in turn.

    So the search never rests, and its points tell the step size. Where only a loss is asked for after the first
    gradient, as ART does, the script says it too.
    """

    def __init__(self, script):
        super().__init__()
        self.script = script
        self.weight = nn.Parameter(torch.zeros(()))
        self.points, self.losses = [], 0

    def forward(self, x):
        value = -5.0
        if x.requires_grad:
            value = self.script[len(self.points)]
            self.points.append(x.detach().clone())
        elif self.points:
            value, self.losses = self.script[min(self.losses, len(self.script) - 1)], self.losses + 1
        sign = 1 - 2 * (len(self.points) % 2)
        moved = sign * (x - x.detach()).flatten(1).sum(1) + value
        return torch.stack([torch.zeros_like(moved), moved], 1)


class Falling(nn.Module):
    """Two classes, and a loss that falls along its gradient: nothing is better than the start."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        moved = (x - x.detach()).flatten(1).sum(1) - 1 - x.detach().flatten(1).mean(1)
        return torch.stack([torch.zeros_like(moved), moved], 1)


def image():
    return 0.5 + 0.1 * (some_images(1) - 0.5)


def points_of(script, steps, native):
    model, y = Scripted(script), torch.zeros(1, dtype=torch.int64)
    if native:
        APGD(model, INF, 0.1, max_iter=steps, nb_random_init=1, seed=0, batch_size=1, verbose=False)(image(), y)
    else:
        torchattacks.APGD(model, eps=0.1, steps=steps)(image(), y)
    return model.points[-steps:] if native else model.points[-steps - 1 : -1]


def halved_after(script, steps, native=False):
    """The number of steps after which the step size is first halved; None where it never is.

    What comes then is another point than where every loss is above the last.
    """
    ours = points_of([*script, *[script[-1]] * steps], steps, native)
    rising = points_of([0.01 * k for k in range(2 * steps)], steps, native)
    other = [not torch.allclose(mine, its, atol=1e-6) for mine, its in zip(ours, rising, strict=True)]
    return other.index(True) - 1 if any(other) else None


def rises(script, steps):
    return sum(later > earlier for earlier, later in pairwise(script[: steps + 1]))


def test_torchattacks_apgd_rounds_its_checkpoints_down():
    assert halved_after([0.0], 20) == 4
    assert halved_after([0.0], 20, native=True) == 5


def test_torchattacks_apgd_halves_after_exactly_rho_rises():
    script = [*(0.01 * k for k in range(34)), *(0.33 - 0.01 * k for k in range(1, 12)), -1.0]
    assert rises(script, 44) == 0.75 * 44
    assert halved_after(script, 200) == 44
    assert halved_after(script, 200, native=True) == 82


def test_torchattacks_apgd_compares_the_first_loss_with_0():
    script = [0.1, *(0.05 + 0.01 * k for k in range(17)), *(0.2 - 0.01 * k for k in range(5)), -1.0]
    assert rises(script, 22) == 16 < 0.75 * 22 < 17
    assert halved_after(script, 100, native=True) == 22
    assert halved_after(script, 100) == 41


def test_torchattacks_apgd_has_no_second_condition_at_the_first_checkpoint():
    script = [5.0, *(0.01 * k for k in range(100))]  # rises in 21 of 22 steps, and never to what it was at the start
    assert halved_after(script, 100, native=True) == 22
    assert halved_after(script, 100) == 41


def test_torchattacks_apgd_radii_are_float32():
    net, x = small_net(dtype=torch.float64), 0.3 + 0.4 * some_images(4, dtype=torch.float64)
    asked = Recorder(net)
    torchattacks.APGD(asked, eps=8 / 255, steps=1)(x, net(x).argmax(1))
    excess = float((asked.iterates[0] - x).abs().max()) - 8 / 255
    assert 1e-10 < excess < 1e-8
    ours = Recorder(net)
    APGD(ours, INF, 8 / 255, max_iter=1, nb_random_init=1, batch_size=4, verbose=False)(x, net(x).argmax(1))
    assert float((ours.iterates[0] - x).abs().max()) <= 8 / 255 + 1e-16


def test_torchattacks_apgd_l2_clips_after_the_projection():
    net, x = small_net(), some_images(12)
    y = net(x).argmax(1)
    theirs = torchattacks.APGD(net, norm="L2", eps=2.0, steps=10)(x, y)
    ours = APGD(net, 2, 2.0, max_iter=10, nb_random_init=1, seed=0, verbose=False)(x, y)
    assert (theirs - x).detach().flatten(1).norm(dim=1).mean() < 1.99
    assert (ours - x).flatten(1).norm(dim=1).mean() > 1.99


def test_torchattacks_apgdt_l2_takes_the_step_size_of_the_first_image():
    net, x = small_net(dtype=torch.float64), some_images(8, dtype=torch.float64)
    y = net(x).argmax(1)

    def second(first, norm, eps):
        asked = Recorder(net)
        rows = [first, 5]
        torchattacks.APGDT(asked, norm=norm, eps=eps, steps=30, n_classes=2)(x[rows], y[rows])
        return torch.stack([points[1] for points in asked.iterates])

    for norm, eps, same in (("Linf", 0.0078125, True), ("L2", 0.0625, False)):
        runs = [second(first, norm, eps) for first in (0, 1, 2, 3)]
        assert all(torch.equal(runs[0], run) for run in runs) is same


def test_torchattacks_apgd_returns_the_image_where_nothing_fools():
    net, x = small_net(), some_images(24)
    y = net(x).argmax(1)
    theirs = torchattacks.APGD(net, eps=0.005, steps=10)(x, y)
    ours = APGD(net, INF, 0.005, max_iter=10, nb_random_init=1, seed=0, verbose=False)(x, y)
    stands = net(theirs).argmax(1) == y
    assert stands.any()
    assert torch.equal(theirs[stands], x[stands])
    assert (ours != x).flatten(1).any(1).all()


def test_torchattacks_apgd_seeds_the_global_generator():
    net, x = small_net(), some_images(2)
    y = net(x).argmax(1)
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torchattacks.APGD(net, steps=1)(x, y)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    for seed in (1, 2):
        torch.manual_seed(seed)
        APGD(net, max_iter=1, verbose=False)(x, y)
        drawn.append(torch.rand(3))
    assert not torch.equal(*drawn[2:])


def art_attack(net, nb_classes=CLASSES, **options):
    np.random.seed(0)  # noqa: NPY002 - what ART draws from
    given = {
        "eps": 0.1,
        "eps_step": 0.2,
        "nb_random_init": 1,
        "loss_type": "cross_entropy",
        "verbose": False,
        **options,
    }
    return art.AutoProjectedGradientDescent(art_classifier(net, nb_classes=nb_classes), **given)


def art_apgd(net, x, y, **options):
    return torch.as_tensor(art_attack(net, **options).generate(x.numpy(), y.numpy()))


def test_art_apgd_returns_the_last_iterate_or_the_start():
    net, x = small_net(), some_images(24)
    y = net(x).argmax(1)
    asked = Recorder(net)
    x_adv = art_apgd(asked, x, y, eps=0.005, eps_step=0.01, max_iter=10)
    stands = net(x_adv).argmax(1) == y
    assert stands.any()
    torch.testing.assert_close(x_adv[stands], asked.iterates[0][stands], rtol=0, atol=1e-6)


def test_art_apgd_checkpoints_are_a_step_late_and_one_is_rounded_up():
    asked, y = Recorder(Falling()), torch.zeros(1, dtype=torch.int64)
    art_apgd(asked, image(), y, max_iter=100, nb_classes=2)
    back = [step for step in range(1, 100) if torch.allclose(asked.iterates[step], asked.iterates[0], atol=1e-6)]
    assert back == [w + 1 for w in (22, 41, 58, 70, 80, 87, 93)]
    assert [w for w in checkpoints(100) if w not in (0, 99)] == [22, 41, 57, 70, 80, 87, 93]


def test_art_apgd_counts_new_maxima_for_rises():
    # of seven losses one falls, and the last two are above all before
    script = [0.02 * (k // 7) + (-1, -0.9, -0.8, -0.7, -0.6, 0.005, 0.02)[k % 7] for k in range(150)]
    first, sizes = 0.2, []

    class Looking(APGD):
        def update(self, state, answer):
            sizes.append(float(state.eps_step))
            return super().update(state, answer)

    y = torch.zeros(1, dtype=torch.int64)
    Looking(Scripted(script), INF, 0.1, nb_random_init=1, batch_size=1, verbose=False)(image(), y)
    assert sizes[-1] == pytest.approx(first)
    attack = art_attack(Scripted(script), max_iter=100, nb_classes=2)
    attack.generate(image().numpy(), y.numpy())
    assert attack.eta_w_j_m_1.item() == pytest.approx(first / 2**8)


def test_art_apgd_descends_the_untargeted_ratio_of_logits_to_targets():
    net, x = small_net(), 0.3 + 0.4 * some_images(10)
    targets = (net(x).argmax(1) + 1) % CLASSES
    asked = Recorder(net)
    options = {"max_iter": 2, "targeted": True, "loss_type": "difference_logits_ratio"}
    art_apgd(asked, x, targets, **options)
    start, moved = asked.iterates[0].clone().requires_grad_(), asked.iterates[1] - asked.iterates[0]
    logits = net(start)
    own, z = logits.gather(1, targets[:, None])[:, 0], logits.sort(1, descending=True).values
    gap = own - logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    counted = moved.abs() > 1e-6
    counted[own == z[:, 2]] = False  # where the target is third the ratio of equation 6 is flat
    agreement = {}
    for equation, spread in ((6, z[:, 0] - z[:, 2]), (8, z[:, 0] - (z[:, 2] + z[:, 3]) / 2)):
        (gradient,) = torch.autograd.grad((gap / spread).sum(), start, retain_graph=True)
        agreement[equation] = (gradient.sign() == moved.sign())[counted].float().mean()
    assert counted.any()
    assert agreement[6] > 0.99
    assert agreement[8] < 0.98
