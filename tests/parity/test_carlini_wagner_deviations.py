"""Where the toolkits' attacks of Carlini and Wagner differ from the paper; a row of the documentation each.

The tests ask the toolkits themselves, so a failure means that a toolkit has changed: then the row goes or changes too.
"""

import numpy as np
import pytest
import torch
from models_for_tests import CLASSES, SHAPE, Recorder, art_classifier, is_fooled, linear_model, small_net, some_images
from torch import nn

torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")

from art.attacks import evasion as art  # noqa: E402

from guardians.attacks.carlini_wagner import CarliniWagnerL2, CarliniWagnerLinf  # noqa: E402
from guardians.attacks.objectives import margin  # noqa: E402

INF = float("inf")


def torchattacks_cw(model, x, y, targeted=False, **options):
    attack = torchattacks.CW(model, **options)
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack(x, y)


def foolbox_cw(model, x, y, **options):
    """The images, and which of them foolbox says are fooled."""
    attack = foolbox.attacks.L2CarliniWagnerAttack(**options)
    model = foolbox.PyTorchModel(model, bounds=(0, 1))
    _, images, fooled = attack(model, x, foolbox.Misclassification(y), epsilons=None)
    return images, fooled


def art_l2(model, x, y, clip_values=(0.0, 1.0), nb_classes=CLASSES, **options):
    classifier = art_classifier(model, clip_values=clip_values, nb_classes=nb_classes)
    attack = art.CarliniL2Method(classifier, batch_size=8, verbose=False, **options)
    return torch.as_tensor(attack.generate(x.numpy(), y.numpy()))


def art_linf(model, x, y, clip_values=(0.0, 1.0), **options):
    attack = art.CarliniLInfMethod(art_classifier(model, clip_values=clip_values), verbose=False, **options)
    return torch.as_tensor(attack.generate(x.numpy(), y.numpy()))


def native_l2(model, x, y, max_iter=20, **options):
    return CarliniWagnerL2(model, max_iter=max_iter, verbose=False, **options)(x, y)


def native_linf(model, x, y, **options):
    return CarliniWagnerLinf(model, verbose=False, **options)(x, y)


def size(delta, p=2):
    """p-norm of each image, (N,)."""
    return delta.flatten(1).double().norm(p=p, dim=1)


def fooled(model, x_adv, y, targeted=False):
    """How many."""
    return int(is_fooled(model, x_adv, y, targeted).sum())


def margins(model, x_adv, y):
    with torch.no_grad():
        return margin(model(x_adv), y, targeted=False)


def black(images):
    return (images == 0).flatten(1).all(1)


class Shifted(nn.Module):
    """The logits of a net plus a constant, so the same predictions."""

    def __init__(self, net, constant):
        super().__init__()
        self.net, self.constant = net, constant
        self.eval()

    def forward(self, x):
        return self.net(x) + self.constant


class Scaled(nn.Module):
    """The same net for images between 0 and 255."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x):
        return self.net(x / 255)


class Pixels(nn.Module):
    """Two classes told apart by the first pixels, with these weights; keeps the points at which it is asked."""

    def __init__(self, *weights, bias=0.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weights)), bias
        self.seen = []
        self.eval()

    def forward(self, x):
        self.seen.append(x.detach().clone())
        score = (x.flatten(1)[:, : len(self.weight)] - 0.5) @ self.weight + self.bias
        return 100 + torch.stack([-score, score], 1)


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def x():
    return some_images(8)


@pytest.fixture
def y(net, x):
    return net(x).argmax(1)


@pytest.fixture
def binary():
    return (some_images(4) > 0.5).float()


# The whole batch stops


@pytest.fixture
def company():
    """A model and 16 images of class 0: the first is 0.1 from the boundary at all pixels, the others 0.0001."""
    x = 0.5 - torch.tensor([0.1] + 15 * [1e-4])[:, None, None, None].expand(-1, *SHAPE)
    return Pixels(*192 * [1.0]), x, torch.zeros(16, dtype=torch.int64)


def test_torchattacks_cw_stops_the_whole_batch_when_its_summed_cost_rises(company):
    model, x, y = company
    options = {"c": 0.12, "lr": 0.03, "steps": 50}
    alone = torch.cat([torchattacks_cw(model, x[i : i + 1], y[i : i + 1], **options) for i in range(16)])
    together = torchattacks_cw(model, x, y, **options)
    assert is_fooled(model, alone, y).all()
    assert is_fooled(model, together, y).tolist() == [False] + 15 * [True]
    assert_native_does_not_depend_on_the_batch(company)


def test_foolbox_cw_stops_the_whole_batch_when_its_summed_loss_stalls(company):
    model, x, y = company
    options = {"initial_const": 0.12, "stepsize": 0.03, "steps": 50, "binary_search_steps": 1}
    alone = torch.cat([foolbox_cw(model, x[i : i + 1], y[i : i + 1], **options)[0] for i in range(16)])
    together = foolbox_cw(model, x, y, **options)[0]
    assert not black(alone).any()
    assert black(together).tolist() == [True] + 15 * [False]
    assert not black(foolbox_cw(model, x, y, abort_early=False, **options)[0]).any()
    assert_native_does_not_depend_on_the_batch(company)


def assert_native_does_not_depend_on_the_batch(company):
    model, x, y = company
    options = {
        "adaptive": False,
        "learning_rate": 0.03,
        "binary_search_steps": 1,
        "initial_const": 0.12,
        "max_iter": 50,
    }
    alone = torch.cat([native_l2(model, x[i : i + 1], y[i : i + 1], batch_size=1, **options) for i in range(16)])
    together = native_l2(model, x, y, batch_size=16, **options)
    assert is_fooled(model, together, y).all()
    assert (alone - together).abs().max() < 1e-5


# torchattacks


def test_torchattacks_cw_depends_on_a_constant_added_to_all_logits():
    net, x = small_net(), some_images(32)
    y, targets = net(x).argmax(1), net(x).argmin(1)
    left, reached, native = [], [], []
    for constant in (100, 0, -100):
        model = Shifted(net, constant)
        left.append(fooled(model, torchattacks_cw(model, x, y, c=10), y))
        reached.append(fooled(model, torchattacks_cw(model, x, targets, c=100, targeted=True), targets, True))
        native.append(fooled(model, native_l2(model, x, y), y))
    assert left == pytest.approx([32, 27, 0], abs=1)
    assert reached == pytest.approx([31, 4, 0], abs=1)
    assert native == [32, 32, 32]


def test_torchattacks_cw_never_moves_pixels_at_the_bounds(net, x, y, binary):
    net = Shifted(net, 100)
    at_bound = (x == 0) | (x == 1)
    moved = torchattacks_cw(net, x, y, c=10) != x
    assert at_bound.float().mean() == pytest.approx(0.2, abs=0.01)
    assert moved[~at_bound].float().mean() > 0.99
    assert not moved[at_bound].any()
    y = net(binary).argmax(1)
    assert torch.equal(torchattacks_cw(net, binary, y, c=1000, lr=0.1, steps=100), binary)
    assert fooled(net, native_l2(net, binary, y), y) == 4


def test_torchattacks_cw_does_not_search_for_c(net, x, y):
    net = Shifted(net, 100)
    assert fooled(net, torchattacks_cw(net, x, y, c=0.01, steps=200), y) == 3
    assert fooled(net, torchattacks_cw(net, x, y, c=10, steps=200), y) == 8
    assert fooled(net, native_l2(net, x, y, initial_const=0.01, adaptive=False), y) == 8


def test_torchattacks_cw_keeps_images_without_the_confidence_asked_for():
    net, x = Shifted(small_net(), 100), some_images(32)
    y = net(x).argmax(1)
    found = margins(net, torchattacks_cw(net, x, y, c=10, kappa=0.1), y)
    assert (found > 0).sum() == 32
    assert (found >= 0.1).sum() == 0
    assert (found.min().item(), found.max().item()) == pytest.approx((0.0014, 0.0128), abs=0.001)
    assert (margins(net, native_l2(net, x, y, confidence=0.1), y) >= 0.1).all()


# foolbox


def test_foolbox_cw_returns_black_images_where_it_finds_none(net):
    x = some_images(32)
    y = net(x).argmax(1)
    images, success = foolbox_cw(net, x, y, steps=5, binary_search_steps=1)
    assert black(images).all()
    assert int(success.sum()) == fooled(net, images, y) == 26
    assert torch.equal(native_l2(net, x, y, max_iter=1, binary_search_steps=1, adaptive=False), x)


def test_foolbox_cw_finds_nothing_for_binary_images(net, binary):
    y = net(binary).argmax(1)
    assert black(foolbox_cw(net, binary, y, steps=300)[0]).all()  # no progress at its first check
    options = {"steps": 100, "abort_early": False, "binary_search_steps": 3, "initial_const": 1e4}
    assert black(foolbox_cw(net, binary, y, **options)[0]).all()  # w goes from 7.25 to 6.25 at most
    assert fooled(net, native_l2(net, binary, y), y) == 4


# ART, norm 2


def test_art_cw_l2_finds_nothing_for_binary_images(net):
    binary = (some_images(20) > 0.5).float()
    y = net(binary).argmax(1)
    assert torch.equal(art_l2(net, binary, y, initial_const=1.0), binary)
    assert fooled(net, native_l2(net, binary, y), y) == 20


def art_consts(model, x, y, **options):
    """The values of c that ART tries on one image."""
    attack, consts = art.CarliniL2Method(art_classifier(model), verbose=False, **options), []
    loss = attack._loss

    def record(image, x_adv, target, const):
        if np.array_equal(image, x_adv):  # a descent begins
            consts.append(float(const[0]))
        return loss(image, x_adv, target, const)

    attack._loss = record
    attack.generate(x.numpy(), y.numpy())
    return consts


def test_art_cw_l2_does_not_bisect_c():
    model, x = linear_model(dtype=torch.float32), some_images(1)
    y = model(x).argmax(1)
    upwards = art_consts(model, x, y, initial_const=0.01, max_iter=20)
    assert upwards == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16] + 5 * [0.32])  # bisection: 0.24 after 0.32
    downwards = art_consts(model, x, y, initial_const=0.32, max_iter=20)
    assert downwards == pytest.approx([0.32, 0.16] + 8 * [0.24])  # bisection: 0.2 or 0.28 after 0.24


def test_art_cw_l2_doubles_c(net, x, y):
    assert fooled(net, art_l2(net, x, y, initial_const=1e-4), y) == 0
    assert fooled(net, native_l2(net, x, y, initial_const=1e-4, adaptive=False), y) == 8


def test_art_cw_l2_steps_along_the_gradient():
    x, y = torch.full((1, *SHAPE), 0.5), torch.zeros(1, dtype=torch.int64)
    runs = {
        "ART": lambda model: art_l2(model, x, y, nb_classes=2, max_iter=1),
        "native": lambda model: native_l2(model, x, y, adaptive=False),
    }
    first = {}
    for name, run in runs.items():
        model = Pixels(3.0, 2.0, 1.0, bias=-1.0)
        run(model)
        moves = ((seen - x).flatten()[:3].double() for seen in model.seen)
        move = next(move for move in moves if move.abs().max() > 1e-5)
        first[name] = (move / move.max()).tolist()
    assert first["ART"] == pytest.approx([1, 2 / 3, 1 / 3], rel=1e-2)
    assert first["native"] == pytest.approx([1, 1, 1], rel=1e-2)


def test_art_cw_l2_does_not_keep_every_image_that_fools(net, x, y):
    x, y = x[:1], y[:1]
    attack = art.CarliniL2Method(art_classifier(net), initial_const=1.0, binary_search_steps=3, verbose=False)
    loss, nearest = attack._loss, [INF]

    def record(image, x_adv, target, const):
        answer = loss(image, x_adv, target, const)
        if is_fooled(net, torch.as_tensor(x_adv, dtype=torch.float32), y).all():
            nearest[0] = min(nearest[0], float(answer[1][0]) ** 0.5)
        return answer

    attack._loss = record
    found = size(torch.as_tensor(attack.generate(x.numpy(), y.numpy())) - x).item()
    assert found / nearest[0] == pytest.approx(1.205, abs=0.03)


def test_art_cw_l2_without_clip_values_takes_the_range_of_all_images(net):
    x = torch.cat([some_images(1) * 0.2 + 0.4, some_images(1, seed=3)])
    y = net(x).argmax(1)
    alone = art_l2(net, x[:1], y[:1], clip_values=None)
    together = art_l2(net, x, y, clip_values=None)[:1]
    assert alone.min() > 0.4 - 1e-6
    assert alone.max() < 0.6 + 1e-6
    assert together.min() < 0.3999
    assert together.max() > 0.6001


# ART, norm inf


@pytest.fixture
def three(net, x, y):
    return x[:3], y[:3]


def test_art_cw_linf_never_reaches_a_target(net, three):
    x, y = three
    targets = (y + 1) % CLASSES
    found = art_linf(net, x, targets, targeted=True, initial_const=1.0, const_factor=4.0)
    assert fooled(net, found, targets, True) == 0
    assert (size(found - x, INF) > 0).sum() == 2
    assert fooled(net, native_linf(net, x, targets, targeted=True, max_iter=50, initial_const=1.0), targets, True) == 3


def test_art_cw_linf_keeps_images_without_the_confidence_asked_for(net, three):
    x, y = (part[:2] for part in three)
    found = margins(net, art_linf(net, x, y, confidence=0.05, initial_const=1.0), y)
    assert found.min().item() == pytest.approx(0.0101, abs=0.002)
    assert (margins(net, native_linf(net, x, y, confidence=0.05, max_iter=50, initial_const=1.0), y) >= 0.05).all()


def test_art_cw_linf_takes_clip_values_for_0_and_1(net, three):
    x, y = three
    model, x, clip_values = Scaled(net), 255 * x, (0.0, 255.0)
    found = art_linf(model, x, y, clip_values, initial_const=100.0, largest_const=2e4)
    assert fooled(model, found, y) == 0
    native = native_linf(art_classifier(model, clip_values=clip_values), x, y, max_iter=50, initial_const=1.0)
    assert fooled(model, native, y) == 3
    assert size(native - x, INF).max() < 5


def test_art_cw_linf_starts_again_for_each_tau_and_const(net, three):
    x, y = (part[:1] for part in three)
    attack = art.CarliniLInfMethod(art_classifier(net), verbose=False)
    generate, gradient, tried, starts, steps = attack._generate_single, attack._loss_gradient, [], [], []

    def record_descent(*args, const, tau):
        tried.append((tau, const))
        steps.append(0)
        return generate(*args, const=const, tau=tau)

    def record_step(z_logits, target, x_adv, *args):
        if steps[-1] == 0:
            starts.append(x_adv)
        steps[-1] += 1
        return gradient(z_logits, target, x_adv, *args)

    attack._generate_single, attack._loss_gradient = record_descent, record_step
    attack.generate(x.numpy(), y.numpy())
    taus = sorted({tau for tau, _ in tried}, reverse=True)
    consts = [1e-5 * 2**i for i in range(21)]
    assert tried == [(tau, pytest.approx(const)) for tau in taus for const in consts]
    assert max(np.abs(start - x.numpy()).max() for start in starts) < 1e-5
    per_const = np.reshape(steps, (len(taus), 21))
    assert (per_const[:, :14] == 1).all()
    assert per_const[1].tolist() == 14 * [1] + 7 * [10]
    assert taus == pytest.approx([1, 0.009], rel=1e-3)


def test_art_cw_linf_is_further_from_the_image_for_more_gradients(net, three):
    distances, gradients = {}, {}
    for name, run in {"ART": art_linf, "native": native_linf}.items():
        recorder = Recorder(net)
        found = run(recorder, *three)
        assert fooled(net, found, three[1]) == 3
        distances[name], gradients[name] = size(found - three[0], INF).mean().item(), recorder.images(True)
    assert distances == pytest.approx({"ART": 0.0133, "native": 0.0077}, abs=0.0005)
    assert gradients == pytest.approx({"ART": 1124, "native": 475}, rel=0.05)


def test_art_cw_linf_moves_images_that_are_wrong_already(net, three):
    x, y = three
    wrong = (y + 1) % CLASSES
    assert size(art_linf(net, x, wrong, initial_const=1.0) - x, INF).tolist() == pytest.approx([0.005] * 3, abs=1e-4)
    assert torch.equal(native_linf(net, x, wrong), x)
