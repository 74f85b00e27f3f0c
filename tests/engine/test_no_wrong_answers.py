"""Ways in which a user once got a wrong answer without a word, whatever the attack: each is refused, right, or told."""

import contextlib
import gc
import logging
import math
import os
import platform
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod as ArtFGSM
from art.attacks.evasion import ProjectedGradientDescent as ArtPGD
from art.defences.postprocessor import Postprocessor
from art.defences.preprocessor import FeatureSqueezing
from models_for_tests import (
    CLASSES,
    SHAPE,
    Constant,
    Recorder,
    art_classifier,
    is_fooled,
    linear_model,
    small_net,
    some_images,
    some_labels,
)
from torch import nn
from torch.nn.functional import one_hot

from guardians.attacks import FGSM, PGD, CarliniWagnerL2, CarliniWagnerLinf
from guardians.defences import RandomSelfEnsemble
from guardians.toolkits.foolbox import FoolboxAttack
from guardians.toolkits.torchattacks import TorchattacksAttack

INF = float("inf")
N = 6


def pgd(model, norm=INF, eps=0.05, eps_step=0.02, **options):
    return PGD(model, norm, eps, eps_step, **{"max_iter": 4, "seed": 0, "verbose": False, **options})


def fgsm(model, **options):
    return FGSM(model, **{"eps": 0.05, "eps_step": 0.01, "seed": 0, **options})


def cw2(model, **options):
    return CarliniWagnerL2(model, **{"binary_search_steps": 2, "max_iter": 10, "seed": 0, "verbose": False, **options})


def cwinf(model, **options):
    given = {"max_iter": 5, "initial_const": 1e-2, "largest_const": 1e4, "const_factor": 100.0}
    return CarliniWagnerLinf(model, **{**given, "seed": 0, "verbose": False, **options})


ATTACKS = {
    "PGD inf": lambda model, **options: pgd(model, num_random_init=1, **options),
    "PGD 2": lambda model, **options: pgd(model, 2, 0.5, 0.2, num_random_init=2, **options),
    "PGD 1": lambda model, **options: pgd(model, 1, 3.0, 1.0, **options),
    "PGD early": lambda model, **options: pgd(model, early_stop=True, **options),
    "FGSM": fgsm,
    "FGSM minimal": lambda model, **options: fgsm(model, minimal=True, **options),
    "C&W 2": cw2,
    "C&W 2, of the paper": lambda model, **options: cw2(model, adaptive=False, **options),
    "C&W inf": cwinf,
}
every_attack = pytest.mark.parametrize("make", ATTACKS.values(), ids=ATTACKS)


# What surrounds the call


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "default dtype": default_dtype,
    "default device": default_device,
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)
@every_attack
def test_what_surrounds_a_call_changes_no_bit(make, ambient, net):
    x, y, mask = some_images(N), some_labels(N), np.ones(SHAPE, np.float32)
    attack = make(net)
    expected, fooled = attack(x), attack.report.fooled
    generated = attack.generate(x.numpy(), y.numpy(), mask=mask)
    with ambient():
        inside = attack(x)
        assert np.array_equal(attack.report.fooled, fooled)
        made_inside = make(net)(x)
        generated_inside = attack.generate(x.numpy(), y.numpy(), mask=mask)
    assert torch.equal(inside, expected)
    assert torch.equal(made_inside, expected)
    assert np.array_equal(generated_inside, generated)
    assert not inside.is_inference()


@pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)
@every_attack
def test_what_surrounds_a_call_changes_no_bit_on_an_estimator(make, ambient, estimator):
    x, y = some_images(N), some_labels(N)
    estimator.set_params(preprocessing=(0.4, 0.5))
    attack = make(estimator)
    expected = attack(x, y)
    with ambient():
        assert torch.equal(attack(x, y), expected)


@pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)
def test_what_surrounds_a_stream_changes_no_bit(ambient, net):
    attack, x, y = pgd(net, early_stop=True, num_random_init=2, batch_size=3), some_images(N), some_labels(N)
    expected = attack(x, y)
    with ambient():
        parts = list(attack.stream([(x[:4], y[:4]), (x[4:], y[4:])]))
    for part in parts:
        torch.testing.assert_close(part.x_adv, expected[torch.from_numpy(part.index)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("ambient", AMBIENT.values(), ids=AMBIENT)
def test_radii_and_starts_as_arrays_are_read_the_same_whatever_surrounds(ambient, net):
    x, y, eps = some_images(N), some_labels(N), np.linspace(0.1, 0.6, N).reshape(N, 1, 1, 1)
    attack = pgd(net, 2, eps, eps / 3, early_stop=True)
    start = some_images(N, seed=3)
    expected = attack.generate(x.numpy(), y.numpy(), x_adv_init=start.numpy(), mask=x.numpy() > 0.2)
    with ambient():
        again = attack.generate(x.numpy(), y.numpy(), x_adv_init=start.numpy(), mask=x.numpy() > 0.2)
        attack.set_params(num_random_init=2)
    assert np.array_equal(again, expected)


# Models in half precision

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("through", ["arrays", "tensors"])
@pytest.mark.parametrize("dtype", LOW)
@every_attack
def test_models_in_half_precision(make, dtype, through):
    net, y = small_net().to(dtype), some_labels(16)
    attack, x = make(net), some_images(16)
    if through == "tensors":
        x = x.to(dtype)
        x_adv = attack(x, y)
    else:
        x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    assert x_adv.dtype == x.dtype
    assert x_adv.isfinite().all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    if isinstance(attack, PGD | FGSM):
        size = torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), float(attack.norm), dim=1)
        assert (size <= attack.eps * (1 if attack.norm == INF else 1 + 1e-12)).all()
    if attack.report.fooled is not None:
        assert np.array_equal(attack.report.fooled, is_fooled(net, x_adv.to(dtype), y))
        assert attack.report.fooled.any()


@pytest.mark.parametrize("dtype", LOW)
def test_the_search_for_a_smallest_image_is_as_good_on_a_model_in_half_precision(dtype):
    x = some_images(16)
    y = small_net()(x).argmax(1)
    sizes = []
    for net in (small_net(), small_net().to(dtype)):
        x_adv = cw2(net, binary_search_steps=3, max_iter=60)(x.to(dtype).to(next(net.parameters()).dtype), y)
        sizes.append((x_adv.double() - x.to(dtype).double()).flatten(1).norm(dim=1).median().item())
    assert sizes[1] < 1.1 * sizes[0]


# Verdicts on random models


class Coin(nn.Module):
    """Wrong about any image in a known share of its draws."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        wrong = torch.rand(len(x), device="cpu") < self.share
        noise = 1e-3 * torch.randn(len(x), CLASSES, device="cpu")
        return 4 * one_hot(wrong.long(), CLASSES).to(x) + noise + 1e-3 * x.flatten(1)[:, :CLASSES]


def majority_of(draws, share):
    """The probability that most of the draws are wrong."""
    return sum(
        math.comb(draws, wrong) * share**wrong * (1 - share) ** (draws - wrong)
        for wrong in range(draws // 2 + 1, draws + 1)
    )


def assert_unbiased(fooled, expected):
    deviation = max(math.sqrt(expected * (1 - expected) / len(fooled)), 0.5 / len(fooled))
    assert abs(fooled.mean() - expected) < 3.5 * deviation, (fooled.mean(), expected)


JUDGED = {
    "8 restarts": lambda model, **options: pgd(model, eps=0.01, max_iter=2, num_random_init=8, **options),
    "8 restarts, early": lambda model, **options: pgd(
        model, eps=0.01, max_iter=2, num_random_init=8, early_stop=True, **options
    ),
    "early": lambda model, **options: pgd(model, eps=0.01, max_iter=20, early_stop=True, **options),
    "FGSM, early": lambda model, **options: fgsm(model, early_stop=True, **options),
    "C&W": cw2,
    "C&W inf": lambda model, **options: cwinf(model, max_iter=3, const_factor=1e3, **options),
    "C&W, early": lambda model, **options: cw2(model, early_stop=True, **options),
}


class KeyedCoin(Coin):
    """Whose draws are those of the keys that it is given, as the defences' are."""

    def forward(self, x):
        from guardians.engine.rng import given_keys, hashed

        draw = torch.from_numpy((hashed(given_keys(len(x)), 7) >> np.uint64(11)).astype(np.float64)) / 2**53
        logits = 4 * one_hot((draw < self.share).long(), CLASSES) + 1e-3 * draw[:, None] * torch.arange(CLASSES)
        return logits.to(x) + 1e-3 * x.flatten(1)[:, :CLASSES]


every_share = pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
every_judge = pytest.mark.parametrize("make", JUDGED.values(), ids=JUDGED)


def assert_judged_by_draws_that_chose_nothing(make, model, judge_samples, precision):
    n = 400
    x = torch.rand(n, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    attack = make(model, judge_samples=judge_samples, batch_size=512, precision=precision)
    attack(x, torch.zeros(n, dtype=torch.int64))
    assert_unbiased(attack.report.fooled, majority_of(judge_samples or 9, model.share))


@pytest.mark.parametrize("judge_samples", [None, 1])
@every_share
@every_judge
def test_the_verdict_on_a_random_model_is_that_of_draws_that_chose_nothing(make, share, judge_samples):
    assert_judged_by_draws_that_chose_nothing(make, Coin(share), judge_samples, "float32")


@every_share
@every_judge
def test_the_verdict_is_that_of_draws_that_chose_nothing_where_draws_have_keys(make, share):
    assert_judged_by_draws_that_chose_nothing(make, KeyedCoin(share), None, "float32")


EARLY = [make for name, make in JUDGED.items() if "early" in name]


@pytest.mark.parametrize("make", EARLY)
def test_a_second_search_is_no_second_chance_for_the_verdict(make):
    assert_judged_by_draws_that_chose_nothing(make, Coin(0.5), None, "bfloat16")


@pytest.mark.parametrize("make", [JUDGED["FGSM, early"], JUDGED["C&W, early"]])
def test_draws_that_refused_a_claim_do_not_judge_it_at_the_end(make):
    assert_judged_by_draws_that_chose_nothing(make, KeyedCoin(0.5), 1, "float32")


@pytest.mark.parametrize("share", [0.35, 0.65])
@every_judge
def test_the_verdict_on_a_random_model_agrees_with_many_fresh_draws(make, share):
    n, model = 100, Coin(share)
    x, y = torch.rand(n, 1, 2, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(n, dtype=torch.int64)
    attack = make(model, judge_samples=101, batch_size=512, precision="float32")
    x_adv = attack(x, y)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        wrong = torch.stack([model(x_adv).argmax(1) != y for _ in range(301)]).float().mean(0) > 0.5
    assert abs(attack.report.fooled.mean() - wrong.float().mean().item()) <= 0.02


def test_restarts_without_early_stop_judge_a_random_model_by_nine_draws():
    model = Recorder(Coin(0.0))
    attack = pgd(model, eps=0.01, max_iter=2, num_random_init=2, batch_size=64)
    x = torch.rand(10, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    attack(x, torch.zeros(10, dtype=torch.int64))
    # 3 looks at 8 images, the second in company; 9 draws after each start, and 9 that chose nothing.
    assert attack.report.judgement_forward == 3 * 8 + 2 + 2 * 9 * 10 + 9 * 10
    assert not attack.report.fooled.any()


# The arguments of an attack


BAD = {
    "PGD inf": {"eps": -1.0, "max_iter": -1, "norm": 0.5, "eps_step": 0, "decay": -1.0, "seed": -1, "precision": "x"},
    "FGSM": {"eps": -1.0, "minimal": 1, "eps_step": 0, "num_random_init": -1, "eot_samples": 0, "targeted": "no"},
    "C&W 2": {"confidence": -1.0, "max_iter": -1, "box": "x", "objective_function": "f8", "judge_samples": 0},
    "C&W inf": {"decrease_factor": 1.5, "largest_const": 1e-9, "const_factor": 1.0, "batch_size": 0},
}


@pytest.mark.parametrize(
    ("attack", "name", "value"), [(attack, name, value) for attack in BAD for name, value in BAD[attack].items()]
)
def test_a_refused_change_changes_nothing(attack, name, value, net):
    made, x, y = ATTACKS[attack](net), some_images(N), some_labels(N)
    before, expected = {key: getattr(made, key) for key in made.attack_params}, made(x, y)
    with pytest.raises((TypeError, ValueError), match=name):
        made.set_params(**{"verbose": True, name: value})
    assert {key: getattr(made, key) for key in made.attack_params} == before
    assert torch.equal(made(x, y), expected)


def test_two_values_that_do_not_go_together_change_nothing(net):
    made = cw2(net)
    with pytest.raises(ValueError, match="confidence"):
        made.set_params(confidence=1.0, objective_function="f1")
    assert (made.confidence, made.objective_function) == (0.0, "f6")


ADAPTERS = {
    "torchattacks": (
        lambda package, net: TorchattacksAttack(net, package.PGD, eps=0.1, alpha=0.05, steps=2, random_start=False),
        {"batch_size": 0, "targeted": 1, "attack": "PGD", "verbose": "yes", "eps_step": 0.1},
    ),
    "foolbox": (
        lambda package, net: FoolboxAttack(net, package.attacks.LinfPGD(steps=2, random_start=False), 0.1),
        {"batch_size": 0, "targeted": 1, "attack": "PGD", "verbose": "yes", "eps": -1.0, "eps_step": 0.1},
    ),
}


@pytest.mark.parametrize(
    ("toolkit", "name", "value"), [(key, name, value) for key in ADAPTERS for name, value in ADAPTERS[key][1].items()]
)
def test_a_refused_change_of_an_adapter_changes_nothing(toolkit, name, value, net):
    made = ADAPTERS[toolkit][0](pytest.importorskip(toolkit), net)
    x, y = some_images(N), some_labels(N)
    before, expected = {key: getattr(made, key) for key in made.attack_params}, made(x, y)
    with pytest.raises((TypeError, ValueError), match=name):
        made.set_params(**{name: value})
    with pytest.raises((TypeError, ValueError), match=name):
        made.set_params(**{"batch_size": 3, name: value})
    assert {key: getattr(made, key) for key in made.attack_params} == before
    assert torch.equal(made(x, y), expected)


# The columns of an attack


def pgd_with(column, model, **options):
    """PGD that has columns besides."""

    class WithColumn(PGD):
        def start(self, state):
            super().start(state)
            column(state)

    return WithColumn(model, **{"eps": 0.1, "eps_step": 0.05, "max_iter": 2, "verbose": False, "seed": 0, **options})


@pytest.mark.parametrize(
    "name",
    [
        *("x", "y", "mask", "x_adv_init", "index", "restart", "best", "best_distance", "rng", "own", "known"),
        *("asked", "doubted", "stuck", "rows", "put", "joined"),
    ],
)
def test_a_column_with_a_name_of_the_engines_is_refused(name, net):
    attack = pgd_with(lambda state: setattr(state, name, state.x.clone()), net)
    with pytest.raises(AttributeError, match=f"{name!r} is the engine's"):
        attack(some_images(N), some_labels(N))


def twins(state):
    state.first = torch.zeros_like(state.x)
    state.mine = state.first


def halves(state):
    state.first, state.mine = torch.zeros(2, len(state)).unbind()


def twins_on_the_host(state):
    state.first = np.zeros(len(state))
    state.mine = state.first[:]


# what is made of the state, what the error says
REFUSED = {
    "too long": (lambda state: torch.zeros(len(state) + 1), "first dimension must be 6"),
    "too short": (lambda state: np.zeros(len(state) - 1), "first dimension must be 6"),
    "no dimension": (lambda state: torch.tensor(1.0), "first dimension must be 6"),
    "a number": (lambda state: 1.0, "of type float"),
    "a list": (lambda state: [0] * len(state), "of type list"),
    "nothing": (lambda state: None, "of type NoneType"),
    "another device": (lambda state: torch.zeros(len(state), device="meta"), "on meta"),
    "expanded": (lambda state: torch.zeros(1).expand(len(state)), "expanded"),
    "expanded pixels": (lambda state: torch.zeros(len(state), 1).expand(-1, 3), "expanded"),
    "expanded on the host": (lambda state: np.broadcast_to(np.zeros(1), len(state)), "expanded"),
    "the images": (lambda state: state.x, "shares memory with 'x'"),
    "the labels": (lambda state: state.y[:, None], "shares memory with 'y'"),
    "the index": (lambda state: state.index, "shares memory with 'index'"),
    "the restart": (lambda state: state.restart[:], "shares memory with 'restart'"),
    "another column": (twins, "shares memory with 'first'"),
    "a part of another column": (halves, "shares memory with 'first'"),
    "another column on the host": (twins_on_the_host, "shares memory with 'first'"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_column_that_the_engine_cannot_work_with_is_refused_by_name(make, message, net):
    def column(state):
        made = make(state)
        if "mine" not in state.own:
            state.mine = made

    with pytest.raises((TypeError, ValueError), match=f"column 'mine'.*{message}"):
        pgd_with(column, net)(some_images(N), some_labels(N))


def test_a_column_that_is_made_at_some_starts_alone_is_refused_by_name(net):
    def at_first(state):
        if not state.restart.any():
            state.mine = state.x.clone()

    def later(state):
        if state.restart.any():
            state.mine = state.x.clone()

    x, y = some_images(20), small_net()(some_images(20)).argmax(1)
    for column in (at_first, later):
        attack = pgd_with(column, net, num_random_init=4, early_stop=True, batch_size=8, eps=0.01, max_iter=3)
        with pytest.raises(ValueError, match="'mine'"):
            attack(x, y)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_a_row_is_always_that_of_its_sample(batch_size, precision):
    x, y = some_images(40), some_labels(40)

    class Marked(PGD):
        def start(self, state):
            super().start(state)
            state.mark, state.number = state.x.flatten(1).sum(1), 10 * state.index + state.restart
            state.empty = state.x.new_zeros(len(state), 0)

        def update(self, state, answer):
            assert torch.equal(state.mark, state.x.flatten(1).sum(1))
            assert np.array_equal(state.number, 10 * state.index + state.restart)
            assert torch.equal(state.x, x[torch.from_numpy(state.index)])
            assert torch.equal(state.y, y[torch.from_numpy(state.index)])
            assert ((state.x_adv - state.x).abs() <= 0.03).all()
            assert state.empty.shape == (len(state), 0)
            return super().update(state, answer)

    attack = Marked(
        *(small_net(), np.inf, 0.02, 0.01),
        max_iter=5,
        num_random_init=3,
        early_stop=True,
        verbose=False,
        seed=0,
        batch_size=batch_size,
        precision=precision,
    )
    x_adv = attack(x, y)
    assert np.array_equal(attack.report.fooled, is_fooled(small_net(), x_adv, y))
    assert 0 < attack.report.fooled.mean() < 1


# Parts of a data set

PARTS = {
    "PGD with random starts": (small_net, lambda model: pgd(model, num_random_init=2, early_stop=True)),
    "PGD, classical": (small_net, lambda model: pgd(model, 2, 0.5, 0.2, num_random_init=1)),
    "random radii": (small_net, lambda model: pgd(model, num_random_init=1, random_eps=True)),
    "C&W": (small_net, cw2),
    "random model": (
        lambda: RandomSelfEnsemble(small_net(), sigma_init=0.1, sigma_inner=0.05, n=2),
        lambda model: pgd(model, num_random_init=2, early_stop=True, eot_samples=2),
    ),
    "random model, C&W": (
        lambda: RandomSelfEnsemble(small_net(), sigma_init=0.1, sigma_inner=0.05, n=2),
        lambda model: cw2(model, judge_samples=3),
    ),
    "random model, classical": (
        lambda: RandomSelfEnsemble(small_net(), sigma_init=0.1, sigma_inner=0.05, n=2),
        lambda model: pgd(model, num_random_init=1),
    ),
}
every_part = pytest.mark.parametrize(("build", "make"), PARTS.values(), ids=PARTS)


@pytest.mark.parametrize("labelled", [True, False])
@every_part
def test_parts_of_a_data_set_are_attacked_as_the_whole(build, make, labelled):
    x, y = some_images(11, dtype=torch.float64), some_labels(11)
    attack = make(build().eval().double())
    whole, fooled = attack(x, y if labelled else None), attack.report.fooled
    for first, last in ((0, 4), (4, 8), (8, 11)):
        part = attack(x[first:last], y[first:last] if labelled else None, first_index=first)
        torch.testing.assert_close(part, whole[first:last], rtol=0, atol=1e-6)
        if fooled is not None:
            assert np.array_equal(attack.report.fooled, fooled[first:last])
        generated = attack.generate(
            x[first:last].numpy(), y[first:last].numpy() if labelled else None, first_index=first
        )
        torch.testing.assert_close(torch.from_numpy(generated), part, rtol=0, atol=1e-6)


@every_part
def test_streams_of_parts_of_a_data_set_are_attacked_as_the_whole(build, make):
    x, y = some_images(11, dtype=torch.float64), some_labels(11)
    attack = make(build().eval().double())
    whole, found = attack(x, y), torch.full_like(x, torch.nan)
    for first, last in ((0, 5), (5, 11)):
        batches = [(x[first : first + 2], y[first : first + 2]), (x[first + 2 : last], y[first + 2 : last])]
        for part in attack.stream(batches, first_index=first):
            found[torch.from_numpy(part.index) + first] = part.x_adv
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)


def test_radii_of_single_samples_are_those_of_the_call(net64):
    x, y = some_images(8, dtype=torch.float64), some_labels(8)
    eps = np.linspace(0, 0.3, 8).reshape(8, 1, 1, 1)
    whole = pgd(net64, INF, eps, np.full_like(eps, 0.05), num_random_init=1)(x, y)
    part = pgd(net64, INF, eps[5:], np.full_like(eps[5:], 0.05), num_random_init=1)(x[5:], y[5:], first_index=5)
    torch.testing.assert_close(part, whole[5:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [-1, 1.5, "3", True])
def test_a_first_index_that_is_none_is_refused_by_name(index, net):
    x, y = some_images(2), some_labels(2)
    with pytest.raises((TypeError, ValueError), match=f"first_index={index!r}"):
        pgd(net)(x, y, first_index=index)
    with pytest.raises((TypeError, ValueError), match=f"first_index={index!r}"):
        pgd(net).generate(x.numpy(), y.numpy(), first_index=index)
    with pytest.raises((TypeError, ValueError), match=f"first_index={index!r}"):
        list(pgd(net).stream([(x, y)], first_index=index))
    assert net.images_seen == 0


# Expectation over transformation where logits alone are asked for


class Tilted(nn.Module):
    """Its second class is above the first in every other pass of `rows` images by less than it is below in the rest."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.asked, self.draws = rows, [], 0

    def forward(self, x):
        self.asked.append(len(x))
        above = []
        for _ in range(0, len(x), self.rows):
            above += [1.0 if self.draws % 2 else -3.0] * self.rows
            self.draws += 1
        logits = torch.zeros(len(x), CLASSES) - 10
        logits[:, 0], logits[:, 1] = 0.0, torch.tensor(above[: len(x)])
        return logits + 1e-3 * x.flatten(1)[:, :CLASSES]


@pytest.mark.parametrize("batch_size", [4, 16])
def test_the_sizes_of_a_smallest_step_are_tried_in_all_draws(batch_size):
    model = Tilted(1)
    attack = fgsm(model, eps=0.05, eps_step=0.01, minimal=True, eot_samples=4, batch_size=batch_size)
    x = torch.full((1, 3, 8, 8), 0.5)
    x_adv = attack(x, torch.tensor([0]))
    # A draw in two is wrong, which is not most of them: every size is tried, 5 and the image itself.
    assert (x_adv - x).abs().max().item() == pytest.approx(0.05, abs=1e-6)
    assert attack.report.search_forward == 6 * 4
    assert attack.report.search_backward == 4
    assert max(model.asked) <= max(batch_size, 1)


def test_all_draws_of_a_query_for_logits_share_the_batch():
    recorder = Recorder(small_net())
    attack = fgsm(recorder, minimal=True, eot_samples=3, batch_size=9, eps=0.05, eps_step=0.01)
    attack(some_images(7), recorder.net(some_images(7)).argmax(1))
    assert max(n for n, _ in recorder.asked) <= 9
    assert recorder.images() == attack.report.search_forward + attack.report.judgement_forward + 1
    assert recorder.images(True) == attack.report.search_backward == 3 * 7


# Several attacks on a model at a time


class Gate(nn.Module):
    """Calls back at each pass, and notes whether it is in evaluation mode and frozen."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.at_pass = {}
        self.quiet = []

    def forward(self, x):
        self.at_pass.get(threading.get_ident(), lambda: None)()
        modes = [part.training for part in self.modules()]
        self.quiet.append(not any(modes) and not any(p.requires_grad for p in self.net.parameters()))
        return self.net(x)


def flags(model):
    return [part.training for part in model.modules()], [p.requires_grad for p in model.parameters()]


def gate(net=None):
    net = small_net().train() if net is None else net
    net.features[1].eval()
    net.features[3].requires_grad_(False)
    return Gate(net)


def overlapping(first, second, *, second_ends_first, errors=()):
    """Run two calls in threads so that they overlap; each is given what it must call at its model's passes."""
    inside, other_done, failures = [threading.Event(), threading.Event()], threading.Event(), []

    def run(which, call, at_pass):
        try:
            call(at_pass)
        except Exception as error:
            failures.append(error)

    def first_pass():
        inside[0].set()
        (other_done if second_ends_first else inside[1]).wait(20)

    def second_pass():
        inside[1].set()
        if not second_ends_first:
            other_done.wait(20)

    threads = [
        threading.Thread(target=run, args=(0, first, first_pass)),
        threading.Thread(target=run, args=(1, second, second_pass)),
    ]
    threads[0].start()
    assert inside[0].wait(20)
    threads[1].start()
    ends = threads[1] if second_ends_first else threads[0]
    ends.join(30)
    other_done.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert [type(error) for error in failures] == list(errors)


def attacking(model, make, x, y, found):
    def call(at_pass):
        model.at_pass[threading.get_ident()] = at_pass
        found.append(make(model)(x, y))

    return call


@pytest.mark.parametrize("second_ends_first", [True, False])
@pytest.mark.parametrize("make", [pgd, cw2], ids=["PGD", "C&W"])
def test_attacks_in_two_threads_leave_the_model_as_it_was(make, second_ends_first):
    model, x, y = gate(), some_images(N), some_labels(N)
    before, expected = flags(model), make(gate())(x, y)
    found = []
    call = attacking(model, make, x, y, found)
    overlapping(call, call, second_ends_first=second_ends_first)
    assert flags(model) == before
    assert all(model.quiet)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("second_ends_first", [True, False])
def test_attacks_in_two_threads_on_models_that_share_parts(second_ends_first):
    net = small_net().train()
    one, two, x, y = gate(net), gate(net), some_images(N), some_labels(N)
    before = flags(one), flags(two)
    found = []
    overlapping(attacking(one, pgd, x, y, found), attacking(two, pgd, x, y, found), second_ends_first=second_ends_first)
    assert (flags(one), flags(two)) == before
    assert all(one.quiet + two.quiet)


@pytest.mark.parametrize("second_ends_first", [True, False])
def test_an_error_in_one_of_two_threads_leaves_the_model_as_it_was(second_ends_first):
    model, x, y = gate(), some_images(N), some_labels(N)
    before, found = flags(model), []

    def failing(at_pass):
        def fail():
            at_pass()
            raise KeyError

        model.at_pass[threading.get_ident()] = fail
        pgd(model)(x, y)

    overlapping(failing, attacking(model, pgd, x, y, found), second_ends_first=second_ends_first, errors=[KeyError])
    assert flags(model) == before
    assert all(model.quiet)


@pytest.mark.parametrize("second_ends_first", [True, False])
def test_attacks_in_two_threads_leave_torchs_generator_as_it_was(second_ends_first):
    x, y, before = some_images(N), some_labels(N), torch.get_rng_state()
    model = gate()
    call = attacking(model, pgd, x, y, [])
    overlapping(call, call, second_ends_first=second_ends_first)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_that_are_open_at_a_time_leave_the_model_as_it_was():
    model, x, y = gate(), some_images(N), some_labels(N)
    before = flags(model)
    for ends in ("first", "second", "closed", "collected"):
        streams = [pgd(model, batch_size=2).stream([(x, y)]) for _ in range(2)]
        for stream in streams:
            next(stream)
            assert flags(model) == before
        cw2(model)(x, y)
        assert flags(model) == before
        if ends in ("first", "second"):
            for stream in streams if ends == "first" else streams[::-1]:
                list(stream)
                assert flags(model) == before
        elif ends == "closed":
            streams[0].close()
            pgd(model)(x, y)
            streams[1].close()
        del streams, stream
        gc.collect()
        assert flags(model) == before
    assert all(model.quiet)


def test_a_stream_that_ends_while_an_attack_runs_leaves_the_model_as_it_was():
    model, x, y = gate(), some_images(N), some_labels(N)
    before, stream = flags(model), pgd(model, batch_size=2).stream([(x, y)])
    next(stream)
    streams = [stream]
    del stream

    def at_pass():
        if streams:
            streams.pop().close()
            gc.collect()

    model.at_pass[threading.get_ident()] = at_pass
    pgd(model)(x, y)
    assert flags(model) == before
    assert all(model.quiet)
    assert not streams


def test_a_stream_of_what_another_stream_finds_leaves_the_model_as_it_was():
    model, x, y = gate(), some_images(N), some_labels(N)
    before = flags(model)
    inner = pgd(model, batch_size=2).stream([(x, y)])
    outer = pgd(model, 2, 0.5, 0.2, batch_size=3).stream(
        (part.x_adv, y[torch.from_numpy(part.index)]) for part in inner
    )
    next(outer)
    assert flags(model) == before
    assert len(list(outer)) > 0
    assert flags(model) == before
    assert all(model.quiet)


def test_a_stream_whose_batches_fail_leaves_the_model_as_it_was():
    model, x, y = gate(), some_images(N), some_labels(N)
    before = flags(model)

    def batches():
        yield x, y
        raise KeyError

    stream = pgd(model, batch_size=2).stream(batches())
    with pytest.raises(KeyError):
        list(stream)
    assert flags(model) == before


# Models that write into their input


class Writes(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.net, self.write = small_net(), write

    def forward(self, x):
        return self.net(self.write(x))


def subtracts(x):
    return x.sub_(0.5).add(0.5)


def scales_its_data(x):
    x.data.mul_(0.5)
    return 2 * x


def clamps(x):
    return x.clamp_(0.2, 0.8)


def fills_after(x):
    copy = x * 1
    x.detach().fill_(7.0)
    return copy


@pytest.mark.parametrize("wrap", [lambda model: model, art_classifier], ids=["module", "estimator"])
@pytest.mark.parametrize("write", [subtracts, scales_its_data, clamps, fills_after])
@every_attack
def test_models_that_write_into_their_input(make, write, wrap):
    model = Writes(write).eval()
    x, y = some_images(N), some_labels(N)
    attack, kept = make(wrap(model)), x.clone()
    for x_adv in (attack(x, y), torch.from_numpy(attack.generate(x.numpy(), y.numpy()))):
        assert torch.equal(x, kept)
        assert ((x_adv >= 0) & (x_adv <= 1)).all()
        if isinstance(attack, PGD | FGSM):
            size = torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), float(attack.norm), dim=1)
            assert (size <= attack.eps * (1 if attack.norm == INF else 1 + 1e-12)).all()
        if attack.report.fooled is not None:
            assert np.array_equal(attack.report.fooled, is_fooled(model, x_adv.clone(), y))


@every_attack
def test_a_model_that_writes_into_its_input_is_attacked_as_one_that_does_not(make):
    x, y = some_images(N), some_labels(N)
    assert torch.equal(make(Writes(subtracts).eval())(x, y), make(Writes(lambda x: x.sub(0.5).add(0.5)).eval())(x, y))


# Models whose answer about an image depends on the others of its batch


class OfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()
        for name, part in self.net.features.named_children():
            if isinstance(part, nn.BatchNorm2d):
                setattr(self.net.features, name, nn.BatchNorm2d(part.num_features, track_running_stats=False))

    def forward(self, x):
        return self.net(x)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x) + (self.net(x).mean() if x.mean() > 0.1 else 1.0)


class SoftmaxOfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x).softmax(0)


class NoisyLogits(nn.Module):
    def __init__(self, sigma=0.1):
        super().__init__()
        self.net, self.sigma = small_net(), sigma

    def forward(self, x):
        logits = self.net(x)
        return logits + self.sigma * torch.randn(logits.shape, device=logits.device, dtype=logits.dtype)


WATCHED = {
    "early": lambda model: pgd(model, early_stop=True, batch_size=4),
    "restarts": lambda model: pgd(model, num_random_init=2, batch_size=4),
    "in low precision": lambda model: pgd(model, precision="bfloat16"),
    "C&W": cw2,
    "C&W inf": cwinf,
}
every_watched = pytest.mark.parametrize("make", WATCHED.values(), ids=WATCHED)


def warnings_of_batches(caplog):
    return [record for record in caplog.records if "batch" in record.message and record.levelno >= logging.WARNING]


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("model", [OfTheBatch, Mean, SoftmaxOfTheBatch])
@every_watched
def test_a_model_that_looks_at_the_whole_batch_is_told_of(make, model, n, caplog):
    attack = make(model().eval())
    attack(some_images(n), some_labels(n))
    assert attack.report.depends_on_batch
    assert len(warnings_of_batches(caplog)) == 1
    list(attack.stream([(some_images(n), some_labels(n))] * 3))
    assert attack.report.depends_on_batch
    assert len(warnings_of_batches(caplog)) == 2


ORDINARY = {
    "ordinary": small_net,
    "constant": Constant,
    "noise": NoisyLogits,
    "little noise": lambda: NoisyLogits(1e-2),
    "RSE": lambda: RandomSelfEnsemble(small_net(), sigma_init=0.1, sigma_inner=0.05, n=2),
    "float64": lambda: small_net().double(),
    "bfloat16": lambda: small_net().bfloat16(),
}


@pytest.mark.parametrize("n", [1, 2, 3, 12])
@pytest.mark.parametrize("model", ORDINARY.values(), ids=ORDINARY)
@every_watched
def test_other_models_are_not_told_of(make, model, n, caplog):
    model = model().eval()
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    attack = make(model)
    attack(some_images(n, dtype=dtype), some_labels(n))
    assert not attack.report.depends_on_batch
    assert not warnings_of_batches(caplog)


# Estimators that change after the attack was made


def assert_as_art(ours, theirs, atol=1e-5):
    """But for the pixels whose gradient is within rounding of zero."""
    assert ours.shape == theirs.shape
    assert np.mean(np.abs(ours - theirs) <= atol) > 0.998, np.abs(ours - theirs).max()


class Squeezing(FeatureSqueezing):
    """In float32, which the model needs."""

    def __call__(self, x, y=None):
        squeezed, y = super().__call__(x, y)
        return squeezed.astype(np.float32), y


def shifted_loss(logits, y):
    return nn.functional.multi_margin_loss(logits, y.argmax(1) if y.ndim > 1 else y)


CHANGES = {
    "narrower clip_values": lambda estimator: estimator.set_params(clip_values=(0.3, 0.6)),
    "clip_values of pixels": lambda estimator: estimator.set_params(
        clip_values=(np.linspace(0.2, 0.3, 8), np.linspace(0.6, 0.65, 8))
    ),
    "another loss": lambda estimator: setattr(estimator, "_loss", shifted_loss),
    "another reduction": lambda estimator: setattr(estimator, "_loss", nn.CrossEntropyLoss(reduction="sum")),
    "preprocessing": lambda estimator: estimator.set_params(preprocessing=(np.float32(0.3), np.float32(0.6))),
    "a preprocessor": lambda estimator: estimator.set_params(
        preprocessing_defences=[Squeezing(clip_values=(0, 1), bit_depth=3)]
    ),
}


@pytest.mark.parametrize("called_before", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["PGD", "FGSM"])
def test_an_estimator_that_changes_is_attacked_as_it_is_now(kind, change, called_before, estimator):
    x, y = some_images(12).clamp(0.3, 0.6).numpy(), some_labels(12).numpy()
    ours = pgd(estimator, eps=0.1, max_iter=3) if kind == "PGD" else fgsm(estimator, eps=0.2)
    before = ours.generate(x, y) if called_before else None
    change(estimator)
    if kind == "PGD":  # which looks at the preprocessing when it is made
        theirs = ArtPGD(estimator, np.inf, 0.1, 0.02, max_iter=3, verbose=False)
    else:
        theirs = ArtFGSM(estimator, np.inf, 0.2)
    after = ours.generate(x, y)
    assert_as_art(after, theirs.generate(x, y))
    if before is not None and change is not CHANGES["another reduction"]:
        assert not np.array_equal(after, before)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("make", [cw2, cwinf], ids=["C&W 2", "C&W inf"])
def test_a_minimum_norm_attack_follows_its_estimator(make, change, estimator):
    x, y = some_images(12).clamp(0.3, 0.6), some_labels(12)
    attack = make(estimator)
    attack(x, y)
    change(estimator)
    fresh = make(estimator)
    expected = fresh(x, y)
    assert torch.equal(attack(x, y), expected)
    change(estimator)
    assert torch.equal(attack(x, y), expected)
    low, high = (np.broadcast_to(bound, SHAPE) for bound in estimator.clip_values)
    assert ((expected.numpy() >= low) & (expected.numpy() <= high)).all()
    assert np.array_equal(attack.report.fooled, estimator.predict(expected.numpy()).argmax(1) != y.numpy())


# Calls that ART takes


def both(kind, estimator, **options):
    if kind == "FGSM":
        return fgsm(estimator, **{"eps": 0.1, **options}), ArtFGSM(estimator, np.inf, **{"eps": 0.1, **options})
    given = {"eps": 0.1, "eps_step": 0.03, "max_iter": 3, "verbose": False, **options}
    return PGD(estimator, np.inf, seed=0, **given), ArtPGD(estimator, np.inf, **given)


every_kind = pytest.mark.parametrize("kind", ["PGD", "FGSM"])


@every_kind
def test_pixels_outside_by_rounding_are_taken_as_art_takes_them(kind, estimator, caplog):
    x, y = some_images(12).numpy(), some_labels(12).numpy()
    x = np.where(x == 1, np.float32(1 + 1e-6), np.where(x == 0, np.float32(-1e-6), x))
    ours, theirs = both(kind, estimator)
    assert_as_art(ours.generate(x, y), theirs.generate(x, y))
    assert "outside clip_values" in caplog.text


@every_kind
def test_pixels_outside_are_attacked_from_the_clipped_image(kind, estimator, caplog):
    x, y = some_images(12).numpy(), some_labels(12).numpy()
    ours, _ = both(kind, estimator)
    outside = np.where(x == 1, np.float32(1.03), x)
    assert np.array_equal(ours.generate(outside, y), ours.generate(x, y))
    assert "outside clip_values" in caplog.text


@every_kind
def test_bytes_are_taken_as_art_takes_them(kind, net):
    estimator = art_classifier(net, clip_values=(0, 255), preprocessing=(0.0, 255.0))
    x, y = (255 * some_images(12)).round().numpy().astype(np.uint8), some_labels(12).numpy()
    ours, theirs = both(kind, estimator, eps=8.0, **({"eps_step": 3.0} if kind == "PGD" else {}))
    found = ours.generate(x, y)
    assert found.dtype == np.float32
    assert_as_art(found, theirs.generate(x, y), 1e-3)


CLIP = {
    "a row": (np.linspace(0, 0.05, 8), np.linspace(0.9, 1, 8)),
    "an image": (np.zeros(SHAPE), np.linspace(0.9, 1, 192).reshape(SHAPE)),
    "a channel": (np.zeros((3, 1, 1)), np.array([0.9, 0.95, 1.0]).reshape(3, 1, 1)),
}


@pytest.mark.parametrize("clip_values", CLIP.values(), ids=CLIP)
@every_kind
def test_bounds_of_single_pixels_are_taken_as_art_takes_them(kind, clip_values, net):
    estimator = art_classifier(net, clip_values=clip_values)
    x = np.clip(some_images(12).numpy(), *clip_values).astype(np.float32)
    ours, theirs = both(kind, estimator)
    assert_as_art(ours.generate(x, some_labels(12).numpy()), theirs.generate(x, some_labels(12).numpy()))


@pytest.mark.parametrize("make", [cw2, cwinf], ids=["C&W 2", "C&W inf"])
@pytest.mark.parametrize("clip_values", CLIP.values(), ids=CLIP)
def test_bounds_of_single_pixels_hold_for_the_smallest_image(make, clip_values, net):
    x = torch.from_numpy(np.clip(some_images(12).numpy(), *clip_values).astype(np.float32))
    x_adv = make(art_classifier(net, clip_values=clip_values))(x, some_labels(12)).numpy()
    low, high = (np.asarray(bound, np.float32) for bound in clip_values)
    assert ((x_adv >= low) & (x_adv <= high)).all()


@every_kind
def test_probabilities_are_ascended_as_by_art_and_success_goes_by_the_largest(kind, estimator, caplog):
    x, y = some_images(12).numpy(), some_labels(12)
    ours, theirs = both(kind, estimator)
    rows = (0.6 * one_hot(y, CLASSES) + 0.1).numpy() / 1.1
    with caplog.at_level(logging.INFO):
        found = ours.generate(x, rows)
    assert_as_art(found, theirs.generate(x, rows))
    assert not np.allclose(found, ours.generate(x, y.numpy()))
    assert "probabilities" in caplog.text
    ours.set_params(early_stop=True)
    predicted = estimator.predict(ours.generate(x, rows)).argmax(1)
    assert np.array_equal(ours.report.fooled, predicted != y.numpy())


@pytest.mark.parametrize("make", [cw2, cwinf], ids=["C&W 2", "C&W inf"])
def test_probabilities_stand_for_their_largest_where_there_is_no_loss(make, estimator):
    x, y = some_images(6), some_labels(6)
    found = make(estimator).generate(x.numpy(), (0.6 * one_hot(y, CLASSES) + 0.1).numpy() / 1.1)
    assert np.array_equal(found, make(estimator).generate(x.numpy(), y.numpy()))


@every_kind
def test_images_of_another_size_are_taken_as_art_takes_them(kind, caplog):
    net = nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = np.random.default_rng(0).random((4, 3, 9, 11), dtype=np.float32)
    ours, theirs = both(kind, art_classifier(net))
    assert_as_art(ours.generate(x, np.arange(4)), theirs.generate(x, np.arange(4)))
    assert "input_shape is (3, 8, 8)" in caplog.text


class Turned(Postprocessor):
    """Names each class as the one after it."""

    params = ()

    def __init__(self):
        super().__init__(apply_fit=False, apply_predict=True)

    def __call__(self, preds):
        return np.roll(preds, 1, axis=1)


@every_kind
def test_labels_that_are_not_given_are_those_that_the_estimator_predicts(kind, net):
    estimator = art_classifier(net, postprocessing_defences=[Turned()])
    x = some_images(12).numpy()
    ours, theirs = both(kind, estimator)
    expected = theirs.generate(x)
    assert_as_art(ours.generate(x), expected)
    assert_as_art(ours.generate(x), ours.generate(x, estimator.predict(x).argmax(1)), 0)


# Values at the edge


@pytest.mark.parametrize("options", [{"max_iter": 0}, {"eps": INF}, {"eps": INF, "norm": 2}, {"eps": INF, "norm": 1}])
def test_values_at_the_edge_are_taken_as_art_takes_them(options, estimator):
    x, y = some_images(12).numpy(), some_labels(12).numpy()
    given = {"norm": np.inf, "eps": 0.1, "eps_step": 0.05, "max_iter": 3, "verbose": False, **options}
    ours = PGD(estimator, seed=0, **given).generate(x, y)
    assert np.isfinite(ours).all()
    if given["norm"] != 1:  # steps of 1-norm are not ART's
        assert_as_art(ours, ArtPGD(estimator, **given).generate(x, y))


class Blind(nn.Module):
    """Looks at half of the pixels alone; the gradient of the others is 0."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(torch.cat([x[..., :4], torch.zeros_like(x[..., 4:])], -1))


@pytest.mark.parametrize("model", [Blind, Constant])
@pytest.mark.parametrize("norm", [1, 1.5, 2, INF])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_step_without_end_moves_no_pixel_without_gradient(norm, early_stop, model):
    x, y = some_images(12), some_labels(12)
    x_adv = FGSM(model().eval(), norm, INF, early_stop=early_stop)(x, y)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    blind = (slice(None),) * 3 + ((slice(4, None) if model is Blind else slice(None)),)
    assert torch.equal(x_adv[blind], x[blind])


@pytest.mark.parametrize("norm", [2, INF])
def test_a_step_without_end_is_that_of_art(norm, estimator):
    x, y = some_images(12).numpy(), some_labels(12).numpy()
    assert_as_art(FGSM(estimator, norm, INF).generate(x, y), ArtFGSM(estimator, norm, INF).generate(x, y))


class Root(nn.Module):
    """Whose gradient is infinite where a pixel is 0."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        return self.net(x.sqrt())


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("norm", [1, 1.5, 2, INF])
def test_infinite_gradients_make_no_nan(norm, decay):
    x, y = some_images(12), some_labels(12)
    x_adv = PGD(Root().eval(), norm, 0.5, 0.1, decay, max_iter=4, verbose=False)(x, y)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (torch.linalg.vector_norm((x_adv.double() - x).flatten(1), norm, dim=1) <= 0.5 + 1e-12).all()


def test_the_smallest_step_of_any_size_is_refused_by_name(net):
    with pytest.raises(ValueError, match=r"eps=inf.*minimal"):
        FGSM(net, eps=INF, minimal=True)


# Seeds


SCRIPT = """
import sys
sys.path[:0] = {path}
import numpy as np, torch
from models_for_tests import small_net, some_images, some_labels
from guardians.attacks import PGD
from torch import nn
class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()
    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))
x, y = some_images(4), some_labels(4)
for model in (small_net(), Noisy().eval()):
    attack = PGD(model, eps=0.1, eps_step=0.05, max_iter=2, num_random_init=1, verbose=False)
    def run(seed):
        {seed}
        return attack(x, y), attack(x, y)
    (a, b), (c, d), (e, f) = run(0), run(0), run(1)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)
print("repeated")
"""


@pytest.mark.parametrize("seed", ["np.random.seed(seed)", "np.random.seed(3); torch.manual_seed(seed)"])
def test_scripts_that_seed_a_generator_repeat(seed):
    script = textwrap.dedent(SCRIPT).format(path=sys.path, seed=seed)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip() == "repeated", done.stderr


class NoisyInput(NoisyLogits):
    def forward(self, x):
        return self.net(x + self.sigma * torch.randn_like(x))


@pytest.mark.parametrize("wrap", [lambda model: model, art_classifier], ids=["module", "estimator"])
@pytest.mark.parametrize("labelled", [True, False])
@every_attack
def test_a_seed_covers_the_draws_of_a_model_that_knows_of_none(make, labelled, wrap):
    x, y = some_images(N), some_labels(N) if labelled else None
    found = []
    for state in range(2):
        torch.manual_seed(state)
        attack, before = make(wrap(NoisyInput().eval())), torch.get_rng_state()
        found += [attack(x, y), attack(x, y), torch.from_numpy(attack.generate(x.numpy(), y))]
        assert torch.equal(torch.get_rng_state(), before)
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_a_stream_leaves_torchs_generator_as_it_was():
    x, y, before = some_images(N), some_labels(N), torch.get_rng_state()
    attack = pgd(NoisyInput().eval(), batch_size=2)
    parts = []
    for part in attack.stream([(x, y)]):
        assert torch.equal(torch.get_rng_state(), before)
        parts.append(part.x_adv)
    assert torch.equal(torch.cat(parts), attack(x, y))


# The size of a batch that nobody gave


@every_attack
def test_the_size_of_a_batch_that_nobody_gave_matters_no_more_than_rounding(make, net64):
    x, y = some_images(20, dtype=torch.float64), some_labels(20)
    given = make(net64, batch_size=None)
    expected = given(x, y)
    assert torch.equal(given(x, y), expected)
    assert torch.equal(make(small_net(dtype=torch.float64), batch_size=None)(x, y), expected)
    for batch_size in (1, 7, 64):
        found = make(net64, batch_size=batch_size)(x, y)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("memory", [1, 10**4, 10**5, 2**20, 2**40])
def test_the_size_of_a_batch_is_a_power_of_two_that_fits_into_memory(memory, net, monkeypatch):
    from guardians.engine import batch
    from guardians.engine.victim import Victim, undisturbed

    for name in ("_ON_A_CPU", "_MOST_ON_A_CPU"):
        monkeypatch.setattr(batch, name, memory)
    with undisturbed(net):
        size = batch.default_batch_size(Victim(net), some_images(3))
        assert batch.default_batch_size(Victim(net), some_images(1, seed=8)) == size
    assert 1 <= size <= 128
    assert size & (size - 1) == 0
    assert {1: 1, 2**40: 128}.get(memory, size) == size
    asked = []
    handle = net.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    pgd(net, early_stop=True, batch_size=None)(some_images(200), some_labels(200))
    handle.remove()
    assert max(asked) <= max(size, 8)  # the probe is of 8 images


def test_a_batch_on_a_cpu_holds_some_images_even_where_each_takes_much_memory(net, monkeypatch):
    from guardians.engine import batch
    from guardians.engine.victim import Victim, undisturbed

    monkeypatch.setattr(batch, "_ON_A_CPU", 1)
    with undisturbed(net):
        assert batch.default_batch_size(Victim(net), some_images(1)) == 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's allocator")
def test_the_memory_of_a_pass_is_there_for_the_next_one():
    faults = """
import resource, torch
{imported}
def a_pass():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(2**19) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
a_pass()
print(a_pass())
"""
    free = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}

    def counted(imported):
        command = [sys.executable, "-c", faults.format(imported=imported)]
        return int(subprocess.run(command, env=free, capture_output=True, check=True).stdout)

    assert counted("") > 10 * counted("import guardians.attacks")


def test_the_memory_of_parameters_does_not_count():
    from guardians.engine import batch
    from guardians.engine.victim import Victim

    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 2000), nn.Linear(2000, CLASSES)).requires_grad_(False)
    narrow = linear_model(dtype=torch.float32).requires_grad_(False)
    sizes = [batch.default_batch_size(Victim(model), some_images(1)) for model in (wide, narrow)]
    assert sizes == [128, 128]
