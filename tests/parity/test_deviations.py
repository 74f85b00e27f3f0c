"""What the toolkits do otherwise than the papers and native; a row of docs/deviations.md each.

The tests ask the toolkits themselves, so a failure means that a toolkit has changed: then the row goes or changes too.
"""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import (
    SHAPE,
    Constant,
    NanGradient,
    art_classifier,
    linear_model,
    small_net,
    some_images,
)
from torch import nn

torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")

from art.attacks import evasion as art  # noqa: E402

from guardians.attacks import FGSM, PGD  # noqa: E402
from guardians.experiments.counting import CountingModel  # noqa: E402

INF = float("inf")
DOCUMENT = Path(__file__).parents[2] / "docs" / "deviations.md"


def with_foolbox(attack, model, x, y, eps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model is in training mode
        return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, foolbox.Misclassification(y), epsilons=eps)[1]


def foolbox_pgd(norm, model, x, y, eps, step, steps, starts=0):
    attacks = {INF: foolbox.attacks.LinfPGD, 2: foolbox.attacks.L2PGD, 1: foolbox.attacks.L1PGD}
    return with_foolbox(attacks[norm](abs_stepsize=step, steps=steps, random_start=bool(starts)), model, x, y, eps)


def torchattacks_pgd(norm, model, x, y, eps, step, steps, starts=0):
    attack = {INF: torchattacks.PGD, 2: torchattacks.PGDL2}[norm]
    return attack(model, eps=eps, alpha=step, steps=steps, random_start=bool(starts))(x, y)


def art_pgd(norm, model, x, y, eps, step, steps, starts=0, **options):
    attack = art.ProjectedGradientDescent(
        art_classifier(model),
        norm,
        eps,
        step,
        max_iter=steps,
        num_random_init=starts,
        verbose=False,
        **options,
    )
    return torch.as_tensor(attack.generate(x.numpy(), y.numpy()))


def art_fgm(model, x, y, norm=INF, **options):
    return torch.as_tensor(
        art.FastGradientMethod(art_classifier(model), norm, **options).generate(x.numpy(), y.numpy())
    )


def native_pgd(norm, model, x, y, eps, step, steps, starts=0, **options):
    attack = PGD(model, norm, eps, step, max_iter=steps, num_random_init=starts, verbose=False, seed=0, **options)
    return attack(x, y)


def size(delta, p=2):
    """p-norm of each image, (N,)."""
    return delta.flatten(1).double().norm(p=p, dim=1)


def seed_all(seed=0):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what ART draws from


class Starts(nn.Module):
    """Linear logits; keeps the points at which it is asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 193.0).repeat(5, 1) * torch.tensor([[1.0], [2], [3], [4], [5]]))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return x.flatten(1) @ self.weight.T / 1000


class Pixels(nn.Module):
    """Two classes told apart by the first pixels, with these weights."""

    def __init__(self, *weights, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=dtype))

    def forward(self, x):
        score = x.flatten(1)[:, : len(self.weight)] @ self.weight
        return torch.stack([-score, score], 1)


@pytest.fixture
def x():
    return some_images(12)


@pytest.fixture
def y(x, net):
    return net(x).argmax(1)


@pytest.fixture
def grey():
    return torch.full((1, *SHAPE), 0.5)


# Starts


def test_torchattacks_l2_starts_at_a_uniform_radius():
    x, y = torch.full((400, *SHAPE), 0.5), torch.zeros(400, dtype=torch.int64)
    radii = {}
    for name, run in {
        "torchattacks": torchattacks_pgd,
        "foolbox": foolbox_pgd,
        "ART": lambda *a, **o: art_pgd(*a, **o, batch_size=400),
        "native": lambda *a, **o: native_pgd(*a, **o, batch_size=400),
    }.items():
        seed_all()
        model = Starts()
        run(2, model, x, y, 0.5, 0.1, 1, starts=1)
        first = next(batch for batch in model.seen if len(batch) == 400)
        radii[name] = size(first - x) / 0.5
    assert radii["torchattacks"].median() == pytest.approx(0.5, abs=0.06)
    assert radii["torchattacks"].min() < 0.05
    for name in ("foolbox", "ART", "native"):  # uniform in a ball of dimension 192: the median is 2 ** (-1 / 192)
        assert radii[name].median() == pytest.approx(2 ** (-1 / 192), abs=1e-3)
        assert radii[name].min() > 0.9


def test_random_starts_of_toolkits_depend_on_global_generators(net, x, y):
    arguments = (2, net, x, y, 0.5, 0.1, 1)
    for run in (torchattacks_pgd, foolbox_pgd, art_pgd):
        seed_all()
        first = run(*arguments, starts=1)
        assert not torch.equal(run(*arguments, starts=1), first)
        seed_all()
        assert torch.equal(run(*arguments, starts=1), first)
    first = native_pgd(*arguments, starts=1)
    seed_all(1)
    assert torch.equal(native_pgd(*arguments, starts=1), first)


def test_random_starts_of_toolkits_depend_on_the_batches(net, x, y):
    halves = (slice(0, 5), slice(5, 12))
    for run in (torchattacks_pgd, foolbox_pgd):  # whole batches are all that they take
        seed_all()
        whole = run(2, net, x, y, 0.5, 0.1, 1, starts=1)
        seed_all()
        parts = [run(2, net, x[part], y[part], 0.5, 0.1, 1, starts=1) for part in halves]
        assert not torch.allclose(torch.cat(parts), whole, atol=1e-4)
    seed_all()
    whole = art_pgd(INF, net, x, y, 0.1, 0.01, 1, starts=2, batch_size=12)
    seed_all()
    assert not torch.equal(art_pgd(INF, net, x, y, 0.1, 0.01, 1, starts=2, batch_size=5), whole)
    for norm in (INF, 2):
        whole, parts = (native_pgd(norm, net, x, y, 0.1, 0.01, 1, starts=2, batch_size=size) for size in (12, 5))
        assert torch.allclose(whole, parts, atol=1e-6)


# Steps


def test_torchattacks_l2_steps_shrink_with_confidence_and_with_the_batch():
    model = linear_model(dtype=torch.float32)
    with torch.no_grad():
        model[1].bias[0] = 20.0  # a confidence of 1 - 1e-8
    x, y = 0.4 + 0.2 * some_images(8), torch.zeros(8, dtype=torch.int64)
    together = size(torchattacks_pgd(2, model, x, y, 0.5, 0.1, 1) - x)
    alone = torch.cat(
        [
            size(torchattacks_pgd(2, model, *one, 0.5, 0.1, 1) - one[0])
            for one in zip(x.split(1), y.split(1), strict=True)
        ]
    )
    assert (together < 0.083).all()
    assert ((alone > 0.096) & (alone < 0.098)).all()
    for run in (native_pgd, foolbox_pgd):
        torch.testing.assert_close(size(run(2, model, x, y, 0.5, 0.1, 1) - x), torch.full((8,), 0.1).double())


def test_foolbox_steps_shrink_below_a_gradient_norm_of_1e_12(grey):
    x, y = grey.double(), torch.tensor([0])
    for norm in (2, 1):
        for weight, step in ((1e-9, 0.1), (1e-13, 0.01)):  # the gradient of the loss has the size of the weight
            model = Pixels(weight, dtype=torch.float64)
            delta = foolbox_pgd(norm, model, x, y, 0.5, 0.1, 1) - x
            assert size(delta, norm).item() == pytest.approx(step, rel=0.01)
            native = native_pgd(norm, model, x, y, 0.5, 0.1, 1) - x
            assert size(native, norm).item() == pytest.approx(0.1, rel=1e-9)


def test_art_l2_steps_vanish_where_squares_of_the_gradient_underflow(grey):
    y = torch.tensor([0])
    for weight, step in ((1e-15, 0.1), (1e-25, 0.0)):
        model = Pixels(weight)
        for x_adv in (art_pgd(2, model, grey, y, 0.5, 0.1, 1), art_fgm(model, grey, y, 2, eps=0.1)):
            assert size(x_adv - grey).item() == pytest.approx(step, rel=1e-3)
        native = native_pgd(2, model, grey, y, 0.5, 0.1, 1)
        assert size(native - grey).item() == pytest.approx(0.1, rel=1e-6)


def test_art_l1_steps_along_one_coordinate_even_where_a_bound_stops_it(grey):
    model, y = Pixels(3.0, 2.0, 1.0), torch.tensor([0])
    grey[0, 0, 0, 0] = 1.0  # the pixel with the largest gradient has no room
    assert torch.equal(art_pgd(1, model, grey, y, 1.0, 0.25, 4), grey)
    native = (native_pgd(1, model, grey, y, 1.0, 0.25, 4) - grey).flatten()
    assert native[:4].tolist() == pytest.approx([0, 0.5, 0.5, 0])


def test_foolbox_l1_steps_along_the_gradient(grey):
    model, y = Pixels(3.0, 2.0, 1.0), torch.tensor([0])
    step = (foolbox_pgd(1, model, grey, y, 1.0, 0.3, 1) - grey).flatten()
    assert step[:4].tolist() == pytest.approx([0.15, 0.1, 0.05, 0])
    native = (native_pgd(1, model, grey, y, 1.0, 0.3, 1) - grey).flatten()
    assert native[:4].tolist() == pytest.approx([0.3, 0, 0, 0])


# The ball


def test_foolbox_and_torchattacks_clip_after_the_projection(net, x, y):
    loss = {}
    for name, run, used in (
        ("torchattacks", torchattacks_pgd, False),
        ("foolbox", foolbox_pgd, False),
        ("ART", art_pgd, True),
        ("native", native_pgd, True),
    ):
        x_adv = run(2, net, x, y, 2.0, 0.5, 20)
        assert bool(((size(x_adv - x) > 1.999) == used).all()), name
        assert size(x_adv - x).min() > 1.95
        loss[name] = nn.functional.cross_entropy(net(x_adv), y).item()
    assert max(loss["foolbox"], loss["torchattacks"]) < min(loss["ART"], loss["native"])


def test_foolbox_l1_clips_after_the_projection(grey):
    model, y = Pixels(*[1.0] * 192), torch.tensor([0])
    grey[0, 0] = 0.9  # a third of the pixels has little room
    used = [size(run(1, model, grey, y, 24.0, 24.0, 1) - grey, 1).item() for run in (foolbox_pgd, native_pgd)]
    assert used[0] == pytest.approx(24 - 64 * (0.125 - 0.1), abs=1e-4)
    assert used[1] == pytest.approx(24, abs=1e-4)


@pytest.mark.parametrize("eps", [8 / 255, 0.1, 0.3])
def test_toolkits_exceed_the_inf_ball_by_a_rounding(eps, net):
    x = some_images(200)
    y = net(x).argmax(1)
    found = {
        "torchattacks PGD": torchattacks_pgd(INF, net, x, y, eps, eps / 4, 10),
        "torchattacks FGSM": torchattacks.FGSM(net, eps)(x, y),
        "foolbox PGD": foolbox_pgd(INF, net, x, y, eps, eps / 4, 10),
        "ART PGD": art_pgd(INF, net, x, y, eps, eps / 4, 10),
        "ART FGM": art_fgm(net, x, y, eps=eps),
    }
    for name, x_adv in found.items():
        excess = (x_adv.double() - x.double()).abs().max().item() - eps
        assert 1e-8 < excess < 6e-8, name
    for x_adv in (native_pgd(INF, net, x, y, eps, eps / 4, 10), FGSM(net, eps=eps)(x, y)):
        assert (x_adv.double() - x.double()).abs().max().item() <= eps


def test_no_toolkit_exceeds_the_clip_range(net):
    """Not a deviation: held so that the document may say so."""
    x = some_images(200)
    y = net(x).argmax(1)
    for norm, run in (
        *((norm, run) for norm in (INF, 2) for run in (torchattacks_pgd, foolbox_pgd, art_pgd, native_pgd)),
        *((1, run) for run in (foolbox_pgd, art_pgd, native_pgd)),
    ):
        x_adv = run(norm, net, x, y, 0.5, 0.25, 4)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1


def test_torchattacks_l2_of_radius_0_is_nan_where_the_gradient_is_zero(x, y):
    model = Constant()
    model.weight = nn.Parameter(torch.zeros(1))  # torchattacks and ART look for one
    assert torchattacks_pgd(2, model, x, y, 0.0, 0.1, 2).isnan().all()
    assert torch.equal(torchattacks_pgd(2, model, x, y, 0.5, 0.1, 2), x)
    for run in (foolbox_pgd, art_pgd, native_pgd):
        assert torch.equal(run(2, model, x, y, 0.0, 0.1, 2), x)


# NaN and float64


def test_nan_gradients_make_nan_images_in_torchattacks_and_foolbox(x, y):
    model = NanGradient()
    model.weight = nn.Parameter(torch.zeros(1))
    assert torchattacks_pgd(2, model, x, y, 0.5, 0.1, 2).isnan().all()
    assert foolbox_pgd(2, model, x, y, 0.5, 0.1, 2).isnan().all()
    assert foolbox_pgd(1, model, x, y, 0.5, 0.1, 2).isnan().all()
    # The sign of NaN is 0 in torch.
    assert torch.equal(torchattacks_pgd(INF, model, x, y, 0.5, 0.1, 2), x)
    assert torch.equal(foolbox_pgd(INF, model, x, y, 0.5, 0.1, 2), x)
    for norm in (INF, 2, 1):
        for run in (art_pgd, native_pgd):
            assert torch.equal(run(norm, model, x, y, 0.5, 0.1, 2), x)


def test_art_computes_in_float32_only(net64, x64):
    y = net64(x64).argmax(1)
    for run in (lambda: art_pgd(INF, net64, x64, y, 0.1, 0.05, 2), lambda: art_fgm(net64, x64, y, eps=0.1)):
        with pytest.raises(RuntimeError, match=r"float.*double"):
            run()
    for run in (torchattacks_pgd, foolbox_pgd, native_pgd):
        assert run(INF, net64, x64, y, 0.1, 0.05, 2).dtype == torch.float64


# ART's options


def test_art_random_eps_is_one_draw_for_all_images_and_stays(net, x, y):
    seed_all()
    attack = art.ProjectedGradientDescentPyTorch(
        art_classifier(net), eps=0.2, eps_step=0.1, max_iter=1, random_eps=True, verbose=False
    )
    steps = size(torch.as_tensor(attack.generate(x.numpy(), y.numpy())) - x, INF)
    assert steps.max() - steps.min() < 1e-6
    assert attack.eps != 0.2
    assert steps[0].item() == pytest.approx(attack.eps / 2, abs=1e-6)
    assert attack.eps_step == pytest.approx(attack.eps / 2)
    native = PGD(net, eps=0.2, eps_step=0.1, max_iter=1, random_eps=True, verbose=False, seed=0)
    assert len((size(native(x, y) - x, INF) * 1e4).round().unique()) == len(x)
    assert (native.eps, native.eps_step) == (0.2, 0.1)


def test_art_fgm_keeps_the_restart_that_is_best_over_all_images(net):
    x = some_images(400)
    y = net(x).argmax(1)
    seed_all()
    fooled = [net(art_fgm(net, x, y, eps=0.02, num_random_init=1)).argmax(1) != y for _ in range(5)]
    union = torch.stack(fooled).any(0)
    seed_all()
    kept = net(art_fgm(net, x, y, eps=0.02, num_random_init=5)).argmax(1) != y
    assert kept.sum() == max(one.sum() for one in fooled)
    assert kept.sum() < union.sum() - 5
    one, five = (net(FGSM(net, eps=0.02, num_random_init=k, seed=0)(x, y)).argmax(1) != y for k in (1, 5))
    assert (five | ~one).all()
    assert five.sum() > one.sum()


def test_art_fgm_returns_clean_images_where_no_restart_fools_any(x):
    model = linear_model(dtype=torch.float32)
    nn.init.constant_(model[1].bias[0], 50.0)
    y = torch.zeros(12, dtype=torch.int64)
    assert torch.equal(art_fgm(model, x, y, eps=0.1, num_random_init=2), x)
    for x_adv in (art_fgm(model, x, y, eps=0.1, num_random_init=1), FGSM(model, eps=0.1, num_random_init=2)(x, y)):
        assert (size(x_adv - x, INF) > 0.09).all()


def test_art_pgd_runs_every_restart_on_every_image(net, x, y):
    passes = []
    for run in (art_pgd, native_pgd):
        counting = CountingModel(net)
        x_adv = run(INF, counting, x, y, 0.3, 0.1, 5, starts=4)
        assert (net(x_adv).argmax(1) != y).all()
        passes.append(counting.backward_samples)
    assert passes == [12 * 5 * 4, 12 * 5]


def hard_model():
    """Predicts class 0 whatever small perturbation."""
    model = linear_model(dtype=torch.float32)
    nn.init.constant_(model[1].bias[0], 9.0)
    return model


def test_art_minimal_fgm_loses_the_last_size_to_rounding(x):
    model, y = hard_model(), torch.zeros(12, dtype=torch.int64)
    options = {"eps": 0.3, "eps_step": 0.1, "minimal": True}  # 0.1 + 0.1 + 0.1 > 0.3
    for x_adv, largest in ((art_fgm(model, x, y, **options), 0.2), (FGSM(model, **options)(x, y), 0.3)):
        torch.testing.assert_close(size(x_adv - x, INF), torch.full((12,), largest).double(), atol=1e-6, rtol=0)


def test_art_minimal_fgm_stops_all_images_with_the_smallest_eps():
    model, x, y = hard_model(), some_images(2), torch.zeros(2, dtype=torch.int64)
    eps = np.array([0.1, 0.4], dtype=np.float32).reshape(2, 1, 1, 1)
    options = {"eps": eps, "eps_step": np.full_like(eps, 0.1), "minimal": True}
    assert size(art_fgm(model, x, y, **options) - x, INF).tolist() == pytest.approx([0.1, 0.1], abs=1e-6)
    assert size(FGSM(model, **options)(x, y) - x, INF).tolist() == pytest.approx([0.1, 0.4], abs=1e-6)


# What is missing


def test_foolbox_fast_gradient_takes_no_targets(net, x, y):
    for name in ("Linf", "L2", "L1"):
        attack = getattr(foolbox.attacks, f"{name}FastGradientAttack")()
        with pytest.raises(ValueError, match="unsupported criterion"):
            attack(foolbox.PyTorchModel(net, (0, 1)), x, foolbox.TargetedMisclassification(y), epsilons=0.1)
    for norm in (INF, 2, 1):
        assert FGSM(net, norm, 0.1, targeted=True)(x, y).shape == x.shape


def test_torchattacks_has_no_fgsm_of_norm_2_or_1_and_no_pgd_of_norm_1():
    assert not {"FGSML2", "FGML2", "FGM", "FGSML1", "PGDL1"} & set(dir(torchattacks))
    norms = {name for name in dir(torchattacks) if re.fullmatch(r"(F|FF|R)?(FGSM|PGD)(L\d)?", name)}
    assert norms == {"FGSM", "FFGSM", "RFGSM", "PGD", "PGDL2"}


# What is left behind


@pytest.fixture
def used():
    """In the middle of a training: one normalisation frozen, gradients there."""
    net = small_net().train()
    net.features[1].eval()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    return net


def modes(net):
    return net.training, net.features[1].training, net.features[4].training


def gradients_kept(net):
    return all(p.grad is not None and bool((p.grad == 0.25).all()) for p in net.parameters())


def statistics_kept(net):
    return torch.equal(net.features[4].running_mean, small_net().features[4].running_mean)


def test_art_leaves_the_model_in_evaluation_mode_with_gradients_of_its_own(used, x, y):
    art_pgd(INF, used, x, y, 0.1, 0.05, 2)
    assert modes(used) == (False, False, False)
    assert not gradients_kept(used)
    assert statistics_kept(used)


def test_foolbox_attacks_in_training_mode_and_adds_to_gradients(used, x, y):
    foolbox_pgd(INF, used, x, y, 0.1, 0.05, 2)
    assert modes(used) == (True, False, True)
    assert not gradients_kept(used)
    assert not statistics_kept(used)
    evaluated = small_net()
    for steps in (1, 2):  # the second run adds to what the first left
        before = None if evaluated.head.bias.grad is None else evaluated.head.bias.grad.clone()
        foolbox_pgd(INF, evaluated, x, y, 0.1, 0.05, steps)
        assert (evaluated.head.bias.grad != 0).any()
        assert before is None or not torch.equal(evaluated.head.bias.grad, before)


def test_torchattacks_leaves_every_layer_in_training_mode(used, x, y):
    torchattacks_pgd(INF, used, x, y, 0.1, 0.05, 2)
    assert modes(used) == (True, True, True)
    assert gradients_kept(used)
    assert statistics_kept(used)


def test_native_leaves_the_model_as_it_was(used, x, y):
    native_pgd(INF, used, x, y, 0.1, 0.05, 2)
    assert modes(used) == (True, False, True)
    assert gradients_kept(used)
    assert statistics_kept(used)


# The document


def test_the_document_names_every_test_and_no_other():
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT.read_text(encoding="utf-8")))
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*deviations.py")]
    tests = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert named == tests - {"test_the_document_names_every_test_and_no_other"}
