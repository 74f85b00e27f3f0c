"""The checks for third parties: native pieces pass all of them, and each can fail."""

import unittest
from functools import partial

import numpy as np
import pytest
import torch
from models_for_tests import art_classifier, some_images
from torch import nn

import guardians.evaluation  # noqa: F401, which registers an attack
from guardians.attacks import FGSM, PGD
from guardians.attacks.registry import Spec, families
from guardians.defences import MixupInference, RandomSelfEnsemble
from guardians.parity import checks
from guardians.parity.checks import ATTACK_CHECKS, DEFENCE_CHECKS, check_attack, check_defence, failures
from guardians.toolkits.build import build_attack, is_available

INF = float("inf")
EPS = {1: 1.0, 2: 0.3, INF: 0.03}
PGD_0 = partial(PGD, eps=0.03, eps_step=0.01, max_iter=10, verbose=False)
POOL = some_images(10, seed=3), torch.arange(10) % 5


def natives():
    for family in families():
        for norm in sorted(EPS.keys() & set(family.norms)):
            # In norm 1 a step to a few pixels, and random search, need many to be as strong as FGSM.
            steps = {"steps": 300 if family.name == "Square" else 20} if "steps" in family.parameters else {}
            steps |= {"n_queries": 20} if "n_queries" in family.parameters else {}
            steps |= {"budget": "fast"} if "budget" in family.parameters else {}
            spec = Spec(family.name, norm, None if family.minimises_norm else EPS[norm], params=steps)
            made, arguments = family.native(spec)
            arguments |= {"verbose": False} if "verbose" in made.parameters() else {}
            if not family.made_for:
                yield pytest.param(partial(made, **arguments), id=f"{family.name}-{norm:g}")


@pytest.mark.parametrize("make", list(natives()))
def test_native_attacks_pass(make):
    weaker = () if make.func.__name__ != "SquareAttack" else ("check_never_weaker_than_fgsm",)  # it has no gradients
    found = failures(make, ATTACK_CHECKS)
    assert set(found) <= set(weaker), found


DEFENCES = {
    "RSE": lambda model: RandomSelfEnsemble(model, 0.1, 0.05, 3),
    "MI-PL": lambda model: MixupInference(model, POOL, "MI-PL", num_samples=3),
    "MI-OL": lambda model: MixupInference(model, POOL, "MI-OL", num_samples=3),
    "MI-Combined": lambda model: MixupInference(model, POOL, "MI-Combined", num_samples=3, detection_samples=2),
    "none": lambda model: model,
}


@pytest.mark.parametrize("make", DEFENCES.values(), ids=DEFENCES)
def test_native_defences_pass(make):
    check_defence(make)


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


def adds_a_hook(attack, model, x, y):
    model.register_forward_hook(lambda *_: None)
    return attack(x, y)


COUNTER = iter(range(10**6))
BROKEN_ATTACKS = [
    ("shape_dtype_and_device", lambda attack, model, x, y: attack(x, y)[:5], "shape"),
    ("shape_dtype_and_device", lambda attack, model, x, y: attack(x, y).double(), "dtype"),
    ("shape_dtype_and_device", lambda attack, model, x, y: attack(x, y).numpy(), "not a tensor"),
    ("images_are_finite_and_in_range", lambda attack, model, x, y: attack(x, y) * torch.nan, "NaN"),
    ("images_are_finite_and_in_range", lambda attack, model, x, y: x + 0.03, r"pixels from .* to 1\.02"),
    ("norm_ball", lambda attack, model, x, y: (x + 0.04 * (attack(x, y) - x).sign()).clamp(0, 1), "leaves the ball"),
    ("inputs_are_left_alone", writes_into_images, "writes into the images"),
    ("inputs_are_left_alone", writes_into_labels, "writes into the labels"),
    ("model_is_left_alone", trains_batch_norm, "running_mean"),
    ("model_is_left_alone", leaves_training_mode, "mode of the model"),
    ("model_is_left_alone", adds_a_hook, "hooks of the model"),
    ("parameters_get_no_gradient", leaks_gradients, "adds to the gradient"),
    ("parameters_get_no_gradient", clears_gradients, "clears the gradient"),
    ("seeds_decide", ignores_the_seed, "other images for the same seeds"),
    ("images_do_not_depend_on_the_batch", depends_on_the_batch, "in smaller batches"),
    ("images_do_not_depend_on_the_batch", depends_on_the_order, "in smaller batches|in another order"),
    ("bad_input_is_refused", takes_anything, "takes images with NaN"),
    ("never_weaker_than_fgsm", lambda attack, model, x, y: x.clone(), "fools 0 of"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN_ATTACKS)
def test_each_check_of_attacks_can_fail(name, change, message):
    check = getattr(checks, f"check_{name}")
    check(PGD_0)
    assert_fails(check, broken(change), message)
    assert_fails(check_attack, broken(change), f"check_{name}: .*")


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


def test_one_hot_labels_can_be_taken_wrongly():
    class Wrong(FGSM):
        def generate(self, x, y=None, **options):
            return super().generate(x, y if y.ndim == 1 else np.roll(y, 1, axis=1), **options)

    checks.check_labels_may_be_one_hot(partial(FGSM, eps=0.03))
    assert_fails(checks.check_labels_may_be_one_hot, partial(Wrong, eps=0.03), "one-hot")


def test_what_there_is_nothing_to_check_of_is_skipped():
    with pytest.raises(unittest.SkipTest, match="no eps"):
        checks.check_norm_ball(lambda model: lambda x, y: x)
    with pytest.raises(unittest.SkipTest, match="draws random numbers"):
        checks.check_images_do_not_depend_on_the_batch(partial(PGD_0, num_random_init=1))


def test_an_error_is_a_failure():
    def make(model):
        raise OSError("no disk")

    assert failures(make, [checks.check_norm_ball]) == {"check_norm_ball": "OSError: no disk"}


# Defences


class Wrapped(nn.Module):
    def __init__(self, net, answer):
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, x):
        return self.answer(self.net, x)


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
    ("images_are_answered_alone", lambda net, x: net(x - x.mean(0)), "depend on the others"),
]


@pytest.mark.parametrize(("name", "answer", "message"), BROKEN_DEFENCES)
def test_each_check_of_defences_can_fail(name, answer, message):
    check = getattr(checks, f"check_{name}")
    check(lambda model: model)
    assert_fails(check, lambda model: Wrapped(model, answer), message)
    assert_fails(check_defence, lambda model: Wrapped(model, answer), f"check_{name}: ")


def test_a_defence_that_counts_is_found():
    assert_fails(checks.check_answering_changes_nothing, Counting, "value of seen")


def test_of_draws_that_belong_to_the_batch_nothing_is_said():
    with pytest.raises(unittest.SkipTest, match="its draws are not those of the images"):
        checks.check_images_are_answered_alone(
            lambda model: Wrapped(model, lambda net, x: net(x + 0.1 * torch.randn_like(x)))
        )


def test_every_check_has_a_broken_piece():
    named = {f"check_{name}" for name, *_ in BROKEN_ATTACKS + BROKEN_DEFENCES}
    named |= {"check_success_is_as_reported", "check_targets_are_approached", "check_labels_may_be_one_hot"}
    named |= {"check_answering_changes_nothing"}
    assert {check.__name__ for check in ATTACK_CHECKS + DEFENCE_CHECKS} == named


# Attacks of the toolkits under our interfaces


@pytest.mark.parametrize("toolkit", ["ART", "torchattacks", "foolbox"])
def test_adapted_attacks_keep_to_the_contract(toolkit):
    spec = Spec("PGD", INF, 0.03, params={"steps": 10, "eps_step": 0.01, "random_start": False})
    setting = {"nb_classes": 5, "input_shape": (3, 8, 8), "batch_size": 24}
    if not is_available(toolkit, spec):
        pytest.skip("not installed")
    found = failures(lambda model: build_attack(toolkit, spec, model, **setting), ATTACK_CHECKS)
    assert set(found) == ({"check_bad_input_is_refused"} if toolkit == "ART" else set()), found  # ART attacks NaN
