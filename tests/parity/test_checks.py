"""The checks for third parties: each can fail. What native pieces make of them is in `test_conformance`."""

import unittest
from functools import partial

import numpy as np
import pytest
import torch
from models_for_tests import art_classifier
from torch import nn

from guardians.attacks import FGSM, PGD, SquareAttack
from guardians.parity import checks
from guardians.parity.checks import ATTACK_CHECKS, DEFENCE_CHECKS, check_attack, check_defence, failures, results

PGD_0 = partial(PGD, eps=0.03, eps_step=0.01, max_iter=10, verbose=False)


def test_an_estimator_of_art_is_attacked_too():
    check_attack(lambda model, **options: PGD_0(art_classifier(model), **options))


@checks.parametrize_with_checks([PGD_0.func, FGSM], [checks.check_norm_ball, checks.check_seeds_decide])
def test_the_decorator(make, check):
    check(partial(make, eps=0.03))


# Broken on purpose


def assert_fails(check, make, message):
    """A check that passes over what is broken has not failed."""
    try:
        with pytest.raises(AssertionError, match=message):
            check(make)
    except unittest.SkipTest as skipped:
        pytest.fail(f"{check.__name__} is skipped: {skipped}")


def broken(change):
    """PGD, with something wrong in how it is called."""

    def make(model, **options):
        attack = PGD_0(model, **options)

        class Broken:
            eps, norm = attack.eps, attack.norm

            def __call__(self, x, y):
                return change(attack, model, x, y)

        return Broken()

    return make


def trains_batch_norm(attack, model, x, y):
    x_adv = attack(x, y)
    model.train()
    model(x)
    model.eval()
    return x_adv


def leaves_training_mode(attack, model, x, y):
    model.train()
    return attack(x, y)


def leaks_gradients(attack, model, x, y):
    nn.functional.cross_entropy(model(x), y).backward()
    return attack(x, y)


def freezes(attack, model, x, y):
    x_adv = attack(x, y)
    model.requires_grad_(False)
    return x_adv


def adds_to_a_buffer(attack, model, x, y):
    x_adv = attack(x, y)
    model.features[1].running_var.add_(0.1)
    return x_adv


def clears_gradients(attack, model, x, y):
    model.zero_grad()
    return attack(x, y)


def writes_into_images(attack, model, x, y):
    x_adv = attack(x, y)
    x.copy_(x_adv)
    return x_adv


def writes_into_labels(attack, model, x, y):
    x_adv = attack(x, y)
    y.add_(1)
    return x_adv


def ignores_the_seed(attack, model, x, y):
    return (attack(x, y) - 0.001 * torch.rand(x.shape, generator=torch.Generator().manual_seed(next(COUNTER)))).clamp(0)


def depends_on_the_batch(attack, model, x, y):
    return (x + 0.03 * (x - x.mean(0)).sign()).clamp(0, 1)


def depends_on_the_order(attack, model, x, y):
    return (x + 0.03 * torch.linspace(-1, 1, len(x)).view(-1, 1, 1, 1)).clamp(0, 1)


def takes_anything(attack, model, x, y):
    return x.nan_to_num().clone()


def takes_any_label(attack, model, x, y):
    return attack(x, y % 5)


def takes_fewer_labels(attack, model, x, y):
    return attack(x, torch.cat([y, y.new_zeros(len(x) - len(y))]))


def seeds_torch(attack, model, x, y):
    torch.manual_seed(0)
    return attack(x, y)


def seeds_numpy(attack, model, x, y):
    np.random.seed(0)  # noqa: NPY002
    return attack(x, y)


def takes_int64_alone(attack, model, x, y):
    assert y.dtype == torch.int64, "must be int64"
    return attack(x, y)


def adds_a_backward_hook(attack, model, x, y):
    model.head.register_full_backward_hook(lambda *_: None)
    return attack(x, y)


def adds_a_hook(attack, model, x, y):
    model.register_forward_hook(lambda *_: None)
    return attack(x, y)


COUNTER = iter(range(10**6))
BROKEN_ATTACKS = [
    ("shape_dtype_and_device", lambda attack, model, x, y: attack(x, y)[:5], "shape"),
    ("shape_dtype_and_device", lambda attack, model, x, y: attack(x, y).double(), "dtype"),
    ("shape_dtype_and_device", lambda attack, model, x, y: attack(x, y).numpy(), "not a tensor"),
    ("double_precision", lambda attack, model, x, y: attack(x, y).float(), "dtype torch.float32"),
    ("double_precision", lambda attack, model, x, y: attack(x, y).to(x.dtype) * (1 + 1e-15), "to 1"),
    ("double_precision", lambda attack, model, x, y: x + 0.04 * (0.5 - x).sign(), "leaves the ball"),
    ("images_are_finite_and_in_range", lambda attack, model, x, y: attack(x, y) * torch.nan, "NaN"),
    ("images_are_finite_and_in_range", lambda attack, model, x, y: x + 0.03, r"pixels from .* to 1\.02"),
    ("norm_ball", lambda attack, model, x, y: (x + 0.04 * (attack(x, y) - x).sign()).clamp(0, 1), "leaves the ball"),
    ("inputs_are_left_alone", writes_into_images, "writes into the images"),
    ("inputs_are_left_alone", writes_into_labels, "writes into the labels"),
    ("model_is_left_alone", trains_batch_norm, "running_mean"),
    ("model_is_left_alone", leaves_training_mode, "mode of the model"),
    ("model_is_left_alone", adds_to_a_buffer, "running_var"),
    ("model_is_left_alone", freezes, "requires_grad of"),
    ("model_is_left_alone", adds_a_hook, "hooks of the model"),
    ("model_is_left_alone", adds_a_backward_hook, "hooks of head"),
    ("parameters_get_no_gradient", leaks_gradients, "adds to the gradient"),
    ("parameters_get_no_gradient", clears_gradients, "clears the gradient"),
    ("seeds_decide", ignores_the_seed, "other images for the same seeds"),
    ("generators_are_not_seeded", seeds_torch, "generator of torch"),
    ("generators_are_not_seeded", seeds_numpy, "generator of numpy"),
    ("label_formats", takes_int64_alone, "must be int64"),
    ("images_do_not_depend_on_the_batch", depends_on_the_batch, "in smaller batches"),
    ("images_do_not_depend_on_the_batch", depends_on_the_order, "in smaller batches|in another order"),
    ("bad_input_is_refused", takes_anything, "takes images with NaN"),
    ("bad_input_is_refused", takes_any_label, "takes a label that no class has"),
    ("bad_input_is_refused", takes_fewer_labels, "takes fewer labels than images"),
    ("never_weaker_than_fgsm", lambda attack, model, x, y: x + 0.1 * (attack(x, y) - x), "where FGSM fools"),
    ("labels_are_avoided", lambda attack, model, x, y: x.clone(), "the loss of the labels"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN_ATTACKS)
def test_each_check_of_attacks_can_fail(name, change, message):
    assert_fails(getattr(checks, f"check_{name}"), broken(change), message)


def test_check_attack_says_all_that_is_wrong():
    broken_twice = broken(lambda attack, model, x, y: attack(x, y)[:, :1].double() * torch.nan)
    assert_fails(check_attack, broken_twice, r"(?s)check_shape_dtype_and_device: .*\ncheck_norm_ball: ")


class Misreporting(PGD):
    def __call__(self, x, y=None, **options):
        x_adv = super().__call__(x, y, **options)
        self.report.fooled = np.zeros(len(x), dtype=bool)
        return x_adv


class AwayFromTargets(PGD):
    def objective(self, logits, y, state):
        return -super().objective(logits, y, state) if self.targeted else super().objective(logits, y, state)


@pytest.mark.parametrize(
    ("kind", "check", "message"),
    [
        (Misreporting, checks.check_success_is_as_reported, "reports 0 of 24 as fooled"),
        (AwayFromTargets, checks.check_targets_are_approached, "the loss of the targets is"),
    ],
)
def test_what_only_an_attack_with_a_report_or_targets_has_can_fail(kind, check, message):
    options = {"eps": 0.03, "eps_step": 0.01, "max_iter": 10, "early_stop": True, "verbose": False}
    check(partial(PGD, **options))
    assert_fails(check, partial(kind, **options), message)


def test_targets_can_be_ignored():
    def make(model, targeted=False):
        return PGD_0(model)

    assert_fails(checks.check_targets_are_approached, make, "the loss of the targets")


def random_attack(draw):
    """Noise for each batch, which `draw` makes of its seed and shape."""

    def make(model, seed=None, batch_size=24):
        def attack(x, y):
            parts = x.split(batch_size)
            return torch.cat([(part + draw(seed, part.shape)).clamp(0, 1) for part in parts])

        return attack

    return make


def test_an_own_seed_can_be_ignored():
    seeded = random_attack(lambda seed, shape: torch.rand(shape, generator=torch.Generator().manual_seed(seed)))
    checks.check_own_seed_decides(seeded)
    assert_fails(checks.check_own_seed_decides, random_attack(lambda seed, shape: torch.rand(shape)), "the same seed")


def test_draws_can_belong_to_the_batch():
    def draw(seed, shape):
        if seed is None:
            return torch.rand(shape)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))

    check = checks.check_images_do_not_depend_on_the_batch
    check(partial(PGD_0, num_random_init=1))
    assert_fails(check, random_attack(draw), "for batch_size=5")


def test_labels_can_be_other_than_the_predictions():
    class Wrong(FGSM):
        def generate(self, x, y=None, **options):
            return super().generate(x, np.zeros(len(x), dtype=int) if y is None else y, **options)

    check = checks.check_predictions_stand_in_for_labels
    check(partial(FGSM, eps=0.03))
    assert_fails(check, partial(Wrong, eps=0.03), "without labels")


def test_one_hot_labels_can_be_taken_wrongly():
    class Wrong(FGSM):
        def generate(self, x, y=None, **options):
            return super().generate(x, y if y.ndim == 1 else np.roll(y, 1, axis=1), **options)

    checks.check_label_formats(partial(FGSM, eps=0.03))
    assert_fails(checks.check_label_formats, partial(Wrong, eps=0.03), "one-hot")


def test_what_there_is_nothing_to_check_of_is_skipped():
    with pytest.raises(unittest.SkipTest, match="no eps"):
        checks.check_norm_ball(lambda model: lambda x, y: x)
    with pytest.raises(unittest.SkipTest, match="takes no seed"):
        checks.check_images_do_not_depend_on_the_batch(lambda model: lambda x, y: torch.rand(x.shape))
    with pytest.raises(unittest.SkipTest, match="no gradients"):
        checks.check_never_weaker_than_fgsm(partial(SquareAttack, eps=0.03, max_iter=1, verbose=False))
    with pytest.raises(unittest.SkipTest, match="no targets"):
        checks.check_targets_are_approached(lambda model: lambda x, y: x)
    with pytest.raises(unittest.SkipTest, match="no generate"):
        checks.check_predictions_stand_in_for_labels(lambda model: lambda x, y: x)


def test_an_error_is_a_failure():
    def make(model):
        raise OSError("no disk")

    assert failures(make, [checks.check_norm_ball]) == {"check_norm_ball": "OSError: no disk"}


def test_what_takes_too_long_times_out_with_all_that_comes_after():
    def make(model):
        while True:
            try:
                sum(range(1000))
            except Exception:  # as third-party code does
                continue

    found = list(results(make, [checks.check_norm_ball, checks.check_shape_dtype_and_device], seconds=0.2))
    assert [(result.check, result.outcome) for result in found] == [
        ("norm_ball", "timed out"),
        ("shape_dtype_and_device", "timed out"),
    ]
    assert "0.2 s" in found[0].why


def test_checks_leave_the_generators_as_they_were():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(results(lambda model: lambda x, y: torch.rand(x.shape), [checks.check_shape_dtype_and_device]))
    assert torch.equal(torch.get_rng_state(), before)


# Defences


class Wrapped(nn.Module):
    def __init__(self, net, answer):
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, x):
        return self.answer(self.net, x)


def seeded_noise(net, x):
    torch.manual_seed(0)
    return net(x + 0.1 * torch.randn_like(x))


def noise_and_peeking(net, x):
    return net(x - x.mean(0) + 0.1 * torch.randn_like(x))


def writes(net, x):
    return net(x.mul_(0.5))


def trains(net, x):
    return net.train()(x)


class Counting(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.net(x)


BROKEN_DEFENCES = [
    ("logits", lambda net, x: net(x)[:, :3], "returns shape"),
    ("logits", lambda net, x: net(x) / 0, "NaN or infinite"),
    ("gradients_exist", lambda net, x: net((x * 8).round() / 8), "zero at 100 %"),
    ("gradients_exist", lambda net, x: net(x.detach()), "no gradient"),
    ("gradients_exist", lambda net, x: net(x + 0 * (x - x).sqrt()), "NaN"),
    ("randomness_is_declared", lambda net, x: net(x + 0.1 * torch.randn_like(x)), "neither seed nor is_random"),
    ("images_are_answered_alone", lambda net, x: net(x - x.mean(0)), "logits move by"),
    ("images_are_answered_alone", noise_and_peeking, "standard errors apart"),
    ("answering_changes_nothing", writes, "writes into the images"),
    ("answering_changes_nothing", trains, "running_mean"),
    ("answering_seeds_no_generator", seeded_noise, "generator of torch"),
]


@pytest.mark.parametrize(("name", "answer", "message"), BROKEN_DEFENCES)
def test_each_check_of_defences_can_fail(name, answer, message):
    assert_fails(getattr(checks, f"check_{name}"), lambda model: Wrapped(model, answer), message)


def test_check_defence_says_all_that_is_wrong():
    check_defence(lambda model: model)
    message = r"(?s)check_logits: .*\ncheck_images_are_answered_alone: "
    assert_fails(check_defence, lambda model: Wrapped(model, lambda net, x: net(x - x.mean(0))[:, :4]), message)


def test_a_defence_that_counts_is_found():
    assert_fails(checks.check_answering_changes_nothing, Counting, "value of seen")


def test_noise_that_belongs_to_the_batch_is_not_taken_for_peeking():
    noisy = partial(Wrapped, answer=lambda net, x: net(x + 0.1 * torch.randn_like(x)))
    checks.check_images_are_answered_alone(noisy)


def test_every_check_has_a_broken_piece():
    named = {f"check_{name}" for name, *_ in BROKEN_ATTACKS + BROKEN_DEFENCES}
    named |= {"check_success_is_as_reported", "check_targets_are_approached", "check_own_seed_decides"}
    named |= {"check_predictions_stand_in_for_labels"}
    assert {check.__name__ for check in ATTACK_CHECKS + DEFENCE_CHECKS} == named
