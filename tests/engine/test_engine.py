"""The loop that runs every attack: what a user may rely on, whatever the batches, the model and the options."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CLASSES,
    Constant,
    NanGradient,
    Recorder,
    art_classifier,
    is_fooled,
    linear_model,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from guardians.attacks import FGSM, PGD
from guardians.attacks.norms import ball_bounds, pull_into_ball, random_in_ball
from guardians.engine.rng import SampleRng
from guardians.engine.run import evaluate
from guardians.engine.state import State

INF = float("inf")
PROBE = 8


def pgd(model, *args, **options):
    return PGD(model, *args, **{"verbose": False, "seed": 0, **options})


class Untraceable(Recorder):
    """A recorder with control flow on its input, of which no copy can be made by tracing."""

    def forward(self, x):
        assert len(x) > 0
        return super().forward(x)


# Whatever the attack, the model and the options


def hooked_net():
    net = small_net()
    net.train()
    net.features[0].register_forward_hook(lambda module, inputs, output: None)
    net.features[3].register_full_backward_hook(lambda module, before, after: None)
    net.head.requires_grad_(False)
    return net


MODELS = {
    "traceable": traceable_net(),
    "traceable in channels_last": traceable_net(1).to(memory_format=torch.channels_last),
    "untraceable": small_net(),
    "hooks": hooked_net(),
    "zero gradient": Constant(),
    "NaN gradient": NanGradient(),
}
BEFORE = {name: snapshot(model) for name, model in MODELS.items()}
engine_options = {
    "norm": st.sampled_from([1, 2, INF]),
    "eps": st.sampled_from([0, 8 / 255, 0.3, 3.0]),
    "targeted": st.booleans(),
    "num_random_init": st.integers(0, 2),
    "batch_size": st.integers(1, 7),
    "seed": st.integers(0, 2**63),
    "precision": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    "early_stop": st.booleans(),
    "eot_samples": st.integers(1, 3),
    "judge_samples": st.sampled_from([None, 1, 2]),
}
attacks = st.one_of(
    st.fixed_dictionaries(
        {
            **engine_options,
            "eps_step": st.sampled_from([0.01, 0.1, 1.0]),
            "max_iter": st.integers(1, 4),
            "decay": st.sampled_from([None, 0.9]),
            "verbose": st.just(False),
        }
    ).map(lambda options: (PGD, options)),
    st.fixed_dictionaries({**engine_options, "eps_step": st.sampled_from([0.1, 1.0]), "minimal": st.booleans()}).map(
        lambda options: (FGSM, options)
    ),
)


@pytest.mark.parametrize("name", MODELS)
@given(attack=attacks, n=st.integers(1, 6), data_seed=st.integers(0, 99), labelled=st.booleans())
@settings(max_examples=30)
def test_images_are_allowed_verdicts_true_and_the_model_untouched(name, attack, n, data_seed, labelled):
    (kind, options), model = attack, MODELS[name]
    x, y = some_images(n, data_seed), some_labels(n, data_seed)
    given_y = y if labelled or options["targeted"] else None
    attacker = kind(model, **options)
    x_adv = attacker(x, given_y)
    assert snapshot(model) == BEFORE[name]

    assert (x_adv.shape, x_adv.dtype) == (x.shape, x.dtype)
    assert x_adv.isfinite().all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    size = torch.linalg.vector_norm((x_adv.double() - x.double()).flatten(1), options["norm"], dim=1)
    assert (size <= options["eps"] * (1 if options["norm"] == INF else 1 + 1e-12)).all()

    training = [part.training for part in model.modules()]
    model.eval()
    with torch.no_grad():
        y = model(x).argmax(1) if given_y is None else given_y
        logits = model(x_adv)
    for part, mode in zip(model.modules(), training, strict=True):
        part.training = mode
    report = attacker.report
    assert report.fooled is None or report.fooled.shape == (n,)
    assert report.fooled is not None or not (options["early_stop"] or attacker.restarts > 1)
    if report.fooled is not None:
        tied = (logits.topk(2).values.diff().abs() < 1e-5).flatten().numpy()
        assert ((((logits.argmax(1) == y) == options["targeted"]).numpy() == report.fooled) | tied).all()


# The batches do not matter


STOPPING = {
    "inf": {"eps": 0.04, "eps_step": 0.01},
    "2": {"norm": 2, "eps": 0.4, "eps_step": 0.1},
    "1": {"norm": 1, "eps": 2.0, "eps_step": 0.5},
    "momentum": {"eps": 0.03, "eps_step": 0.01, "decay": 0.9},
}
RANDOM = {
    "random starts": {"eps": 0.04, "eps_step": 0.01, "num_random_init": 3},
    "random starts, 2": {"norm": 2, "eps": 0.4, "eps_step": 0.1, "num_random_init": 3, "random_eps": True},
}


@pytest.mark.parametrize("options", [*STOPPING.values(), *RANDOM.values()], ids=[*STOPPING, *RANDOM])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_batch_size_matters_no_more_than_rounding(options, targeted, net64):
    x = some_images(30, dtype=torch.float64)
    y = some_labels(30) if targeted else net64(x).argmax(1)
    options = {"targeted": targeted, "max_iter": 6, "early_stop": True, "num_random_init": 2, **options}
    first = None
    for size in (1, 4, 11, 64):
        attack = pgd(net64, batch_size=size, **options)
        x_adv = attack(x, y)
        first = first or (x_adv, attack.report.fooled)
        torch.testing.assert_close(x_adv, first[0], rtol=0, atol=1e-10)
        assert np.array_equal(attack.report.fooled, first[1])
    assert 0 < first[1].sum() < 30


@pytest.mark.parametrize("options", STOPPING.values(), ids=STOPPING)
def test_the_order_of_the_images_matters_no_more_than_rounding(options, net64):
    x, y = some_images(30, dtype=torch.float64), some_labels(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    attack = pgd(net64, max_iter=6, early_stop=True, batch_size=7, targeted=True, **options)
    x_adv, fooled = attack(x, y), attack.report.fooled
    torch.testing.assert_close(attack(x[order], y[order]), x_adv[order], rtol=0, atol=1e-10)
    assert np.array_equal(attack.report.fooled, fooled[order.numpy()])
    assert 0 < fooled.sum() < 30


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make", [small_net, traceable_net])
def test_success_in_float32_does_not_depend_on_the_batch_size(make, precision):
    net, x = make(), some_images(60)
    y = net(x).argmax(1)
    counts = []
    for size in (1, 7, 64):
        attack = pgd(net, eps=0.04, eps_step=0.01, max_iter=6, early_stop=True, batch_size=size, precision=precision)
        assert np.array_equal(is_fooled(net, attack(x, y), y), attack.report.fooled)
        counts.append(attack.report.fooled.sum())
    assert 0 < min(counts) <= max(counts) < 60
    assert max(counts) - min(counts) <= 1


# Oracle: the paper's loop, an image at a time


def ascent(model, x_t, y, norm, targeted):
    x_t = x_t.detach().requires_grad_(True)
    logits = model(x_t)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, y), x_t)
    gradient = -gradient if targeted else gradient
    direction = gradient.sign() if norm == INF else gradient / gradient.norm()
    return bool((logits.argmax(1) == y) == targeted), direction


def inside(x_t, x, norm, eps):
    if norm == INF:
        return torch.minimum(torch.maximum(x_t, x - eps), x + eps).clamp(0, 1)
    delta = x_t.clamp(0, 1) - x
    return x + delta * min(1.0, eps / max(float(delta.norm()), 1e-300))


def first_that_fools(model, x, y, starts, norm, eps, eps_step, steps, targeted):
    """The image (1, ...) that fools first, else the last; and how many were looked at."""
    looks = 0
    for start in starts:
        x_t = inside(start, x, norm, eps)
        for _ in range(steps):
            fooled, direction = ascent(model, x_t, y, norm, targeted)
            looks += 1
            if fooled:
                return x_t, True, looks
            x_t = inside(x_t + eps_step * direction, x, norm, eps)
        if bool((model(x_t).argmax(1) == y) == targeted):
            return x_t, True, looks
    return x_t, False, looks


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("restarts", [0, 1, 3])
@pytest.mark.parametrize(("norm", "eps"), [(INF, 0.03), (2, 0.3)])
def test_stopping_early_returns_the_first_iterate_that_fools(norm, eps, restarts, targeted, net64):
    n, seed, steps = 24, 5, 4
    x = some_images(n, dtype=torch.float64)
    y = some_labels(n) if targeted else torch.where(torch.arange(n) < 4, some_labels(n), net64(x).argmax(1))
    options = {"eps_step": eps / 3, "max_iter": steps, "num_random_init": restarts, "targeted": targeted}
    attack = pgd(net64, norm, eps, seed=seed, batch_size=5, early_stop=True, **options)
    x_adv = attack(x, y)
    passes, radius = 0, torch.full((1, 1, 1, 1), eps, dtype=torch.float64)
    for i in range(n):
        image, label = x[i : i + 1], y[i : i + 1]
        draws = [
            image + random_in_ball(image, radius, norm, SampleRng(seed, np.array([i]), r)) for r in range(restarts)
        ]
        expected, fooled, looks = first_that_fools(
            net64, image, label, draws or [image], norm, eps, eps / 3, steps, targeted
        )
        torch.testing.assert_close(x_adv[i : i + 1], expected, rtol=0, atol=1e-10)
        assert attack.report.fooled[i] == fooled
        passes += looks
    assert 0 < attack.report.fooled.sum() < n
    assert attack.report.search_forward == attack.report.search_backward == passes


def classical(model, x, y, p, eps, eps_step, steps, rng):
    """PGD on one fixed batch, in the arithmetic of `guardians.attacks.norms`."""
    radius = torch.full((len(x), 1, 1, 1), eps, dtype=torch.float64)
    low, high = (b.clamp(0, 1) for b in ball_bounds(x, radius)) if p == INF else (0 * x, 0 * x + 1)

    def project_on_ball(x_t):
        x_t = x_t.clamp(low, high)
        if p == INF:
            return x_t
        delta = x_t - x
        norm = torch.linalg.vector_norm(delta, 2, dim=(1, 2, 3), keepdim=True)
        return x + delta * (radius.float() / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1)

    x_t = project_on_ball(x if rng is None else x + random_in_ball(x, radius, p, rng))
    for _ in range(steps):
        x_t = x_t.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(model(x_t), y, reduction="sum"), x_t)
        if p == INF:
            direction = gradient.sign()
        else:
            scaled = gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
            direction = scaled / torch.linalg.vector_norm(scaled, 2, dim=(1, 2, 3), keepdim=True)
        x_t = project_on_ball(x_t.detach() + torch.tensor(eps_step).float() * direction)
    return x_t if p == INF else pull_into_ball(x_t.clamp(low, high), x, radius, p)


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize(("norm", "eps"), [(INF, 0.05), (2, 0.5)])
@pytest.mark.parametrize("random_start", [False, True])
def test_without_early_stop_it_is_the_classical_algorithm_bit_for_bit(norm, eps, random_start, precision):
    net, steps, size, seed = Recorder(traceable_net()), 5, 5, 11
    x, y = some_images(13), some_labels(13)
    attack = pgd(
        net, norm, eps, 0.02, max_iter=steps, batch_size=size, precision=precision, num_random_init=int(random_start)
    )
    attack.set_params(seed=seed)
    attack(x[:1], y[:1])  # finds the number of classes
    net.asked.clear()
    x_adv = attack(x, y)
    report = attack.report
    assert net.asked == [(n, True) for n in (5, 5, 3) for _ in range(steps)]
    assert (report.search, report.fooled, report.judgement_forward) == ("model", None, 0)
    assert report.search_forward == report.search_backward == steps * 13
    for i in range(0, 13, size):
        rows = slice(i, i + size)
        rng = SampleRng(seed, np.arange(13)[rows]) if random_start else None
        assert torch.equal(x_adv[rows], classical(net, x[rows], y[rows], norm, eps, 0.02, steps, rng))
    assert is_fooled(net, x_adv, y).any()


# What it costs


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("eot_samples", [1, 2])
def test_the_report_counts_every_pass_of_a_model_that_is_not_copied(precision, restarts, labelled, eot_samples):
    net, x = Untraceable(traceable_net()), some_images(30)
    y = net(x).argmax(1) if labelled else None
    attack = pgd(net, eps=0.02, eps_step=0.01, max_iter=4, num_random_init=restarts, batch_size=7, early_stop=True)
    attack.set_params(precision=precision, eot_samples=eot_samples)
    attack(x[:1], some_labels(1))  # finds the number of classes
    net.asked.clear()
    attack(x, y)
    report = attack.report
    assert net.images() == report.search_forward + report.judgement_forward
    assert net.images(with_gradient=True) == report.search_backward
    assert report.search == ("model" if precision == "float32" else "model, bfloat16")
    assert 0 < report.fooled.sum() < 30


def test_the_report_counts_backward_passes():
    net, x = traceable_net(), some_images(20)
    backward = []

    class WithBackward(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            logits = self.net(x)
            if len(x) and logits.requires_grad:
                logits.register_hook(lambda gradient: backward.append(len(gradient)))
            return logits

    model, y = WithBackward(), net(x).argmax(1)
    attack = pgd(model, eps=0.02, eps_step=0.01, max_iter=4, batch_size=7, early_stop=True, precision="float32")
    attack(x, y)
    assert sum(backward) == attack.report.search_backward == attack.report.search_forward
    backward.clear()
    minimal = FGSM(model, eps=0.05, eps_step=0.01, minimal=True, precision="float32", batch_size=20)
    minimal(x, y)
    assert sum(backward) == minimal.report.search_backward == 20  # at the images alone
    assert minimal.report.search_forward > 20


def test_a_run_without_early_stop_and_with_restarts_costs_a_judgement_of_each_end_and_a_look_at_the_model():
    net, n, steps = Untraceable(traceable_net()), 12, 3
    x = some_images(n)
    y = net(x).argmax(1)
    attack = pgd(net, eps=1e-6, eps_step=1e-6, max_iter=steps, num_random_init=4, batch_size=5)
    attack(x, y)
    assert attack.report.fooled.tolist() == [False] * n
    assert (attack.report.search_forward, attack.report.judgement_forward) == (4 * steps * n, 4 * n + 3 * PROBE + 2)


def test_an_image_misclassified_at_the_start_costs_one_pass_and_keeps_its_bits():
    net, x = Untraceable(traceable_net()), some_images(20)
    y = (net(x).argmax(1) + 1) % CLASSES
    attack = pgd(net, eps=0.1, eps_step=0.02, max_iter=30, batch_size=6, early_stop=True, precision="float32")
    assert torch.equal(attack(x, y), x)
    assert attack.report.fooled.all()
    assert attack.report.search_forward == attack.report.search_backward == 20
    assert attack.report.judgement_forward <= 3 * PROBE + 2  # the model's own logits need no second look


@pytest.mark.parametrize("early_stop", [False, True])
def test_restarts_run_only_for_images_that_stand(early_stop):
    net, x, steps, restarts = Untraceable(traceable_net()), some_images(20), 3, 5
    predicted = net(x).argmax(1)
    y = torch.where(torch.arange(20) < 15, (predicted + 1) % CLASSES, predicted)  # 15 are fooled whatever happens
    attack = pgd(net, eps=1e-6, eps_step=1e-6, max_iter=steps, num_random_init=restarts, early_stop=early_stop)
    attack.set_params(precision="float32", batch_size=6)
    attack(x, y)
    assert attack.report.fooled.tolist() == [True] * 15 + [False] * 5
    needed = 15 * (1 if early_stop else steps) + 5 * steps * restarts
    if early_stop:  # and rows that stay vacant when nothing waits
        assert needed <= attack.report.search_forward <= needed * 4 / 3
    else:
        assert attack.report.search_forward == needed


def test_batches_stay_full_until_nothing_waits():
    net, x, size = Untraceable(traceable_net()), some_images(50), 8
    y = torch.where(torch.arange(50) % 3 == 0, some_labels(50), net(x).argmax(1))
    net.asked.clear()
    at_the_end = []

    def one_by_one():
        yield from ((x[i : i + 1], y[i : i + 1]) for i in range(50))
        at_the_end.append(len(net.asked))

    attack = pgd(net, eps=0.04, eps_step=0.01, max_iter=6, batch_size=size, early_stop=True, precision="float32")
    for _ in attack.stream(one_by_one()):
        pass
    searched, tail = (
        [n for n, with_gradient in part if with_gradient]
        for part in (net.asked[: at_the_end[0]], net.asked[at_the_end[0] :])
    )
    assert searched == [size] * len(searched)
    assert len(searched) > 10
    assert tail == sorted(tail, reverse=True)
    assert len(tail) <= 6
    assert sum(searched) + sum(tail) == attack.report.search_forward


def test_a_model_is_never_asked_about_more_images_than_a_batch_holds():
    for size, eot_samples in itertools.product((1, 3, 8), (1, 2, 5)):
        net, x = Untraceable(traceable_net()), some_images(9)
        attack = pgd(net, eps=0.03, eps_step=0.01, max_iter=3, num_random_init=2, early_stop=True, precision="float32")
        attack.set_params(batch_size=size, eot_samples=eot_samples)
        attack(x)
        # The check of the model itself looks at some images at once.
        assert max(n for n, with_gradient in net.asked if with_gradient) <= size


# A search that has come to rest


class UntraceableConstant(nn.Module):
    def forward(self, x):
        return 0 * x.flatten(1)[: len(x), :CLASSES]


@pytest.mark.parametrize(("decay", "passes"), [(None, 2), (0.9, 40)])
def test_images_that_no_longer_move_are_finished(decay, passes):
    x, y = some_images(20), torch.zeros(20, dtype=torch.int64)
    options = {"eps": 0.1, "eps_step": 0.01, "max_iter": 40, "decay": decay, "batch_size": 6, "precision": "float32"}
    attack = pgd(UntraceableConstant(), early_stop=True, **options)
    assert torch.equal(attack(x, y), x)
    assert not attack.report.fooled.any()
    assert attack.report.search_forward == passes * 20


def test_an_image_at_rest_in_a_corner_is_what_the_classical_algorithm_returns():
    model, x = linear_model(classes=2), some_images(20, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias[0] += 1000  # never fooled
    y = torch.zeros(20, dtype=torch.int64)
    options = {"eps": 0.1, "eps_step": 0.05, "max_iter": 40, "batch_size": 6}
    attack = pgd(model, early_stop=True, **options)
    torch.testing.assert_close(attack(x, y), pgd(model, **options)(x, y), rtol=0, atol=1e-12)
    assert attack.report.search_forward <= 5 * 20


def test_restarts_follow_an_image_that_came_to_rest():
    model, x = NanGradient(), some_images(20)  # only random starts move
    y = model(x).argmax(1)
    attack = pgd(model, eps=0.3, eps_step=0.1, max_iter=40, num_random_init=8, early_stop=True)
    assert np.array_equal(is_fooled(model, attack(x, y), y), attack.report.fooled)
    assert attack.report.fooled.sum() > 12


# Random models


class Noisy(nn.Module):
    def __init__(self, net, sigma=1.0):
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x):
        logits = self.net(x)
        return logits + self.sigma * torch.randn(logits.shape).to(logits)


class NoisyInput(Noisy):
    def forward(self, x):
        return self.net(x + self.sigma * torch.randn_like(x))


@pytest.mark.parametrize("model", [Noisy, NoisyInput])
@pytest.mark.parametrize(("judge_samples", "draws"), [(None, 9), (1, 1), (4, 4)])
def test_draws_that_judge_a_random_model_are_its_own_and_counted(model, judge_samples, draws):
    net, x = Recorder(traceable_net()), some_images(10)
    noisy = model(net, 1e-3)
    y = (net(x).argmax(1) + 1) % CLASSES
    attack = pgd(noisy, eps=0.1, eps_step=0.1, max_iter=3, early_stop=True, precision="float32", batch_size=32)
    attack.set_params(judge_samples=judge_samples)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attack(x[:1], y[:1])
        net.asked.clear()
        assert torch.equal(attack(x, y), x)
    report = attack.report
    assert report.search == "model"
    # Two looks at the model and a third, as they differ; draws that let an image go, and others for the verdict.
    assert (report.search_forward, report.judgement_forward) == (10, 3 * PROBE + 2 + 2 * draws * 10)
    assert net.images() == report.search_forward + report.judgement_forward
    assert report.fooled.all()


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_random_model_is_not_copied(precision, monkeypatch):
    copied = []
    monkeypatch.setattr("guardians.engine.search.folded_copy", copied.append)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pgd(Noisy(traceable_net()), eps=0.1, eps_step=0.1, max_iter=2, early_stop=True, precision=precision)(
            some_images(5), some_labels(5)
        )
    assert copied == []


class Scripted(nn.Module):
    """Whether it is fooled by its one image is written down for each pass."""

    def __init__(self, script):
        super().__init__()
        self.script, self.passes = script, 0

    def forward(self, x):
        fooled = self.script[self.passes]
        self.passes += 1
        return one_hot(torch.tensor([int(fooled)] * len(x)), CLASSES).to(x) + 1e-3 * x.flatten(1)[:, :CLASSES]


@pytest.mark.parametrize(
    ("judge_samples", "votes", "fooled", "moved"),
    [
        (3, [[1, 1, 1, 1, 0, 1]], True, 0),  # all of the first judgement, and most of the verdict
        (3, [[1, 1, 1, 0, 0, 1]], False, 0),  # all of those that let it go, but not of fresh ones
        (3, [[1, 0], [1, 1, 1, 1, 1, 0]], True, 1),  # not the first, but the second, a step later
        (3, [[0], [1, 1, 0], [1, 0, 1]], True, 2),  # most, after the last step
        (3, [[0], [0], [0, 0, 1]], False, 2),
        (4, [[1, 1, 0], [0], [1, 0, 1, 0]], False, 2),  # half is not most
    ],
)
def test_a_random_model_lets_an_image_go_when_all_draws_are_fooled_and_in_the_end_when_most_are(
    judge_samples, votes, fooled, moved
):
    # One pass finds the classes, three that the model is random; each step's pass is fooled, then come the votes.
    script = [0, 0, 1, 1]
    for step, vote in enumerate(votes):
        script += ([1] if step < 2 else []) + vote
    model, x = Scripted(script), torch.full((1, 3, 8, 8), 0.5)
    attack = pgd(model, eps=1.0, eps_step=0.1, max_iter=2, early_stop=True, precision="float32", batch_size=1)
    attack.set_params(judge_samples=judge_samples)
    x_adv = attack(x, torch.tensor([0]))
    assert attack.report.fooled.tolist() == [fooled]
    assert model.passes == len(script)
    assert (x_adv - x).abs().max().item() == pytest.approx(0.1 * moved, abs=1e-6)


class Lottery(nn.Module):
    """Wrong about any image in one of five draws."""

    def forward(self, x):
        wrong = torch.rand(len(x)) < 0.2
        return one_hot(wrong.long(), CLASSES).to(x) + 1e-6 * x.flatten(1)[:, :CLASSES]


@pytest.mark.parametrize(("judge_samples", "at_most"), [(None, 9), (25, 1)])
def test_a_lucky_draw_is_no_success(judge_samples, at_most):
    # Of 20 draws one fools 99 images of 100. A majority of nine is wrong in 2 of 100 judgements, of which there are 5.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attack = pgd(Lottery(), eps=1e-4, eps_step=1e-5, max_iter=20, early_stop=True, precision="float32")
        attack.set_params(judge_samples=judge_samples)
        attack(some_images(30), torch.zeros(30, dtype=torch.int64))
    assert attack.report.fooled.sum() <= at_most
    assert attack.report.search_forward > 15 * 30  # they were searched to the end


class Unmoved(nn.Module):
    def forward(self, x):
        return 0 * x.flatten(1)[: len(x), :CLASSES] + torch.arange(CLASSES).to(x)


def test_a_random_model_at_rest_is_searched_to_the_end():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attack = pgd(Noisy(Unmoved(), 0.01), eps=0.1, eps_step=0.1, max_iter=10, early_stop=True, precision="float32")
        attack(some_images(8), torch.full((8,), CLASSES - 1))
    assert attack.report.search_forward == 10 * 8


# Expectation over transformation


class Cycling(nn.Module):
    """A linear model whose weight is another one for each draw of `rows` images."""

    def __init__(self, weights, rows):
        super().__init__()
        self.register_buffer("weights", weights)
        self.rows, self.draws, self.sizes = rows, 0, []

    def forward(self, x):
        self.sizes.append(len(x))
        count = len(x) // self.rows
        which = torch.arange(self.draws, self.draws + count).repeat_interleave(self.rows) % len(self.weights)
        self.draws += count
        score = (x.flatten(1) * self.weights[which]).sum(1, keepdim=True)
        return torch.cat([score, torch.zeros_like(score)], 1)


@pytest.mark.parametrize(
    ("batch_size", "eot_samples", "rows", "sizes"),
    [
        (12, 3, 4, [12]),  # all draws of all images at once
        (11, 3, 3, [9, 3]),  # three images, then the last one
        (4, 3, 1, [3] * 4),
        (4, 6, 1, [4, 2] * 4),  # more draws than a batch holds
        (1, 3, 1, [1] * 12),
    ],
)
def test_the_gradient_of_eot_is_the_mean_over_the_draws(batch_size, eot_samples, rows, sizes):
    if (batch_size, rows) == (11, 3):  # the last image is alone
        n, sizes = 3, sizes[:1]
    else:
        n = 4
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn((3, 192), generator=generator, dtype=torch.float64)
    x = 0.5 + 0.1 * (some_images(n, dtype=torch.float64) - 0.5)
    y = torch.tensor([0, 1, 1, 0])[:n]
    model = Cycling(weights, rows)
    attack = FGSM(model, 2, 0.2, eot_samples=eot_samples, batch_size=batch_size)
    model.rows = 1
    attack(x[:1], y[:1])
    model.rows, model.draws = rows, 0
    model.sizes.clear()
    x_adv = attack(x, y)
    assert model.sizes == sizes
    inputs = x.clone().requires_grad_(True)
    scores = inputs.flatten(1) @ weights.T  # (N, draws)
    logits = torch.stack([scores, torch.zeros_like(scores)], -1)
    loss = torch.stack([cross_entropy(logits[:, k], y, reduction="none") for k in range(3)]).mean(0).sum()
    (gradient,) = torch.autograd.grad(loss, inputs)
    step = 0.2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_adv, x + step, rtol=0, atol=1e-10)
    assert attack.report.search_forward == attack.report.search_backward == n * eot_samples


def test_what_an_attack_is_given_is_the_mean_gradient_and_each_draw():
    weights = torch.tensor([1.0, 2.0, 6.0]).double()[:, None].expand(3, 192)
    attack = FGSM(Cycling(weights, rows=2), eot_samples=3, batch_size=2)
    x, y = some_images(2, dtype=torch.float64), torch.tensor([0, 1])
    attack.objective = lambda logits, y, state: logits[:, 0]
    state = State({"x": x, "y": y, "index": np.arange(2), "restart": np.zeros(2, dtype=np.int64)})
    draws, value, gradient = evaluate(attack, attack.victim.logits, x, state)
    torch.testing.assert_close(draws[:, :, 0], torch.tensor([[1.0], [2.0], [6.0]]) * x.flatten(1).sum(1))
    torch.testing.assert_close(gradient, torch.full_like(x, 3.0))
    torch.testing.assert_close(value, 3 * x.flatten(1).sum(1))


def test_eot_beats_the_noise():
    net, x = traceable_net(), some_images(40)
    y, noise = net(x).argmax(1), NoisyInput(net, 0.3)
    fooled = []
    for eot_samples in (1, 16):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            x_adv = pgd(noise, 2, 0.5, 0.1, max_iter=8, eot_samples=eot_samples, batch_size=640)(x, y)
            with torch.no_grad():
                votes = torch.stack([noise(x_adv).argmax(1) != y for _ in range(50)])
        fooled.append(votes.float().mean().item())
    assert fooled[1] > fooled[0] + 0.01


# Streams


def batches_of(size, *tensors):
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("source", [1, 3, 50])
def test_a_stream_gives_what_a_call_gives(source, restarts, early_stop, net64):
    x, y = some_images(23, dtype=torch.float64), some_labels(23)
    options = {"eps": 0.03, "eps_step": 0.01, "max_iter": 4, "num_random_init": restarts, "early_stop": early_stop}
    attack = pgd(net64, batch_size=5, **options)
    x_adv, fooled = attack(x, y), attack.report.fooled
    seen = []
    for finished in attack.stream(batches_of(source, x, y)):
        torch.testing.assert_close(finished.x_adv, x_adv[finished.index], rtol=0, atol=1e-10)
        assert (finished.fooled is None) == (fooled is None)
        if fooled is not None:
            assert np.array_equal(finished.fooled, fooled[finished.index])
        seen += finished.index.tolist()
    assert sorted(seen) == list(range(23))
    unlabelled = attack(x)
    seen = []
    for finished in attack.stream(x.split(source)):
        torch.testing.assert_close(finished.x_adv, unlabelled[finished.index], rtol=0, atol=1e-10)
        seen += finished.index.tolist()
    assert sorted(seen) == list(range(23))


def test_a_stream_takes_a_data_loader(net):
    x, y = some_images(10), some_labels(10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    attack = pgd(net, eps=0.02, max_iter=2, early_stop=True)
    indices = [finished.index for finished in attack.stream(loader)]
    assert sorted(np.concatenate(indices)) == list(range(10))


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("make", [small_net, traceable_net])
def test_a_stream_reads_no_further_than_the_search_has_room(make, early_stop):
    net, size, source, read = make(), 6, 4, 0

    def forever():
        nonlocal read
        for seed in itertools.count():
            read += source
            yield some_images(source, seed), some_labels(source, seed)

    attack = pgd(net, eps=0.03, eps_step=0.01, max_iter=4, batch_size=size, early_stop=early_stop)
    done = 0
    for finished in attack.stream(forever()):
        # What one model has failed waits for the next until it fills a batch; there are three here.
        assert read - done <= 3 * size + source
        done += len(finished.index)
        if done > 100:
            break
    assert done > 100


def test_the_model_is_the_users_between_two_results():
    net = hooked_net()
    before = snapshot(net)
    attack = pgd(net, eps=0.03, eps_step=0.01, max_iter=4, batch_size=4, early_stop=True)
    stream = attack.stream(batches_of(5, some_images(20), some_labels(20)))
    for _ in range(3):
        next(stream)
        assert snapshot(net) == before
        assert torch.is_grad_enabled()
    stream.close()
    assert snapshot(net) == before
    for finished in attack.stream(batches_of(5, some_images(20), some_labels(20))):
        assert len(finished.index)
        break
    assert snapshot(net) == before


BAD = {
    "NaN": ((torch.full((2, 3, 8, 8), float("nan")), some_labels(2)), ValueError, "x has NaN"),
    "out of range": ((some_images(2) + 1, some_labels(2)), ValueError, "x has entries from"),
    "label": ((some_images(2), torch.tensor([0, CLASSES])), ValueError, "y has labels from 0 to 5"),
    "length": ((some_images(2), some_labels(3)), ValueError, "y has shape"),
    "dtype": ((some_images(2).double(), some_labels(2)), TypeError, "x has dtype torch.float64"),
    "integers": ((some_images(2).byte(), some_labels(2)), TypeError, "x has dtype torch.uint8"),
    "no images": ((some_images(2)[:0], some_labels(0)), ValueError, "x has shape"),
    "one image": ((some_images(2)[0], some_labels(1)), ValueError, "x has shape"),
    "arrays": ((some_images(2).numpy(), some_labels(2).numpy()), TypeError, "x of type ndarray"),
    "array of images": (some_images(2).numpy(), TypeError, "x of type ndarray"),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    BAD.values(),
    ids=BAD,
)
def test_a_bad_batch_is_refused_by_name(bad, error, message, first, net):
    before = snapshot(net)
    batches = [bad] if first else [(some_images(3), some_labels(3)), bad]
    attack = pgd(net, eps=0.03, eps_step=0.01, max_iter=2, early_stop=True, batch_size=4)
    with pytest.raises(error, match=message):
        list(attack.stream(batches))
    assert snapshot(net) == before


UNLIKE = {
    "other size": ((some_images(2), some_labels(2)), (torch.rand(2, 3, 10, 10), some_labels(2)), "x has shape"),
    "labels missing": ((some_images(2), some_labels(2)), some_images(2), r"\by\b|labels"),
    "labels late": (some_images(2), (some_images(2), some_labels(2)), r"\by\b|labels"),
}


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("case", UNLIKE.values(), ids=UNLIKE)
def test_a_batch_unlike_the_first_is_refused_by_name(case, batch_size, net):
    first, second, message = case
    attack = pgd(net, eps=0.03, eps_step=0.01, max_iter=2, early_stop=True, batch_size=batch_size)
    with pytest.raises(ValueError, match=message):
        list(attack.stream([first, second]))


def test_a_stream_of_nothing_yields_nothing(net):
    attack = pgd(net, eps=0.03, early_stop=True)
    assert list(attack.stream([])) == []
    assert net.images_seen == 0
    assert (attack.report.search_forward, attack.report.judgement_forward) == (0, 0)


def test_a_targeted_stream_needs_labels(net):
    with pytest.raises(ValueError, match="y=None"):
        list(pgd(net, targeted=True).stream([some_images(2)]))


def test_radii_of_single_samples_do_not_go_with_a_stream(net):
    attack = pgd(net, eps=np.full((3, 1, 1, 1), 0.1), eps_step=np.full(1, 0.1), max_iter=1)
    with pytest.raises(ValueError, match="eps has shape"):
        list(attack.stream(batches_of(3, some_images(6), some_labels(6))))


# Rows keep what belongs to their sample


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize("restarts", [0, 3])
def test_radii_masks_and_starts_follow_their_sample(norm, restarts, net64):
    n, scale = 24, {1: 40, 2: 4, INF: 1}[norm]
    x, y = some_images(n, dtype=torch.float64), net64(some_images(n, dtype=torch.float64)).argmax(1)
    eps = scale * np.linspace(0, 0.08, n).reshape(n, 1, 1, 1)
    step = scale * np.linspace(0.02, 0.01, n).reshape(n, 1, 1, 1)
    mask = some_images(n, seed=9) > 0.3
    start = (x + 0.01 * some_images(n, seed=8, dtype=torch.float64)).clamp(0, 1)
    options = {"max_iter": 5, "num_random_init": restarts, "early_stop": True}
    attacks = [pgd(net64, norm, eps, step, batch_size=size, **options) for size in (n, 5, 1)]
    one, *others = (attack(x, y, mask=mask, x_adv_init=start) for attack in attacks)
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)
    assert torch.equal(one[~mask], x[~mask])
    size = torch.linalg.vector_norm((one - x).flatten(1), norm, dim=1)
    assert (size <= torch.from_numpy(eps.ravel()) * (1 + 1e-12)).all()
    assert 0 < attacks[0].report.fooled.sum() < n
    assert not torch.equal(one, pgd(net64, norm, eps, step, **options)(x, y))


# Estimators


@pytest.mark.parametrize("precision", ["auto", "float32"])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("make", [small_net, traceable_net])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (-1.0, 3.0)])
def test_the_verdict_is_that_of_the_estimator(low, high, make, targeted, precision):
    width = high - low
    mean = np.array([0.1, 0.0, -0.1], dtype=np.float32).reshape(3, 1, 1) * width + low
    std = np.array([0.9, 1.0, 1.1], dtype=np.float32).reshape(3, 1, 1) * width
    estimator = art_classifier(make(), clip_values=(low, high), preprocessing=(mean, std))
    x = (some_images(40) * width + low).clamp(low, high).numpy()
    y = estimator.predict(x).argmax(1) if not targeted else some_labels(40).numpy()
    options = {"max_iter": 5, "early_stop": True, "targeted": targeted, "precision": precision, "batch_size": 9}
    attack = pgd(estimator, eps=0.03 * width, eps_step=0.01 * width, **options)
    x_adv = attack.generate(x, y)
    assert x_adv.min() >= low
    assert x_adv.max() <= high
    predicted = estimator.predict(x_adv).argmax(1)
    assert np.array_equal((predicted == y) == targeted, attack.report.fooled)
    assert 0 < attack.report.fooled.sum() < 40


# What is not allowed


ARGUMENTS = {
    "early_stop string": ({"early_stop": "yes"}, TypeError, "early_stop='yes': must be True or False"),
    "early_stop number": ({"early_stop": 1}, TypeError, "early_stop=1: must be True or False"),
    "precision unknown": ({"precision": "int8"}, ValueError, "precision='int8': must be one of auto, float32"),
    "precision none": ({"precision": None}, ValueError, "precision=None: must be one of auto, float32"),
    "precision dtype": ({"precision": torch.float16}, ValueError, "precision=torch.float16: must be one of auto"),
    "precision list": ({"precision": ["auto"]}, (TypeError, ValueError), r"precision=\['auto'\]: must be"),
    "judge_samples zero": ({"judge_samples": 0}, ValueError, "judge_samples=0: must be at least 1"),
    "judge_samples negative": ({"judge_samples": -3}, ValueError, "judge_samples=-3: must be at least 1"),
    "judge_samples fraction": ({"judge_samples": 1.5}, TypeError, "judge_samples=1.5: must be an integer"),
    "judge_samples true": ({"judge_samples": True}, TypeError, "judge_samples=True: must be an integer"),
    "eot_samples zero": ({"eot_samples": 0}, ValueError, "eot_samples=0: must be at least 1"),
    "eot_samples fraction": ({"eot_samples": 2.0}, TypeError, "eot_samples=2.0: must be an integer"),
    "eot_samples true": ({"eot_samples": True}, TypeError, "eot_samples=True: must be an integer"),
    "eot_samples none": ({"eot_samples": None}, TypeError, "eot_samples=None: must be an integer"),
}


@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize("through", ["constructor", "set_params"])
@pytest.mark.parametrize(
    ("options", "error", "message"), [pytest.param(*case, id=name) for name, case in ARGUMENTS.items()]
)
def test_arguments_that_are_not_allowed_are_refused_by_name(options, error, message, through, attack, net):
    if through == "constructor":
        with pytest.raises(error, match=message):
            attack(net, **options)
    else:
        made = attack(net)
        with pytest.raises(error, match=message):
            made.set_params(**options)
    assert net.images_seen == 0


class NotFinite(nn.Module):
    """Logits of single images are not finite, as those of a model that overflows."""

    def __init__(self, value):
        super().__init__()
        self.net, self.value = traceable_net(), value

    def forward(self, x):
        bad = x.flatten(1)[:, :1] > 0.8
        return torch.where(bad, self.value, self.net(x))


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
    ],
)
def test_a_model_whose_logits_are_not_finite_is_attacked_all_the_same(value):
    model, x = NotFinite(value), some_images(30)
    y = model(x).argmax(1)
    assert not model(x[:PROBE]).isfinite().all()
    attack = pgd(model, eps=0.03, eps_step=0.01, max_iter=5, early_stop=True)
    x_adv = attack(x, y)
    assert x_adv.isfinite().all()
    assert (is_fooled(model, x_adv, y) == attack.report.fooled).all()
    assert 0 < attack.report.fooled.sum() < 30


@pytest.mark.parametrize("odd", [None, float("inf")])
def test_a_random_model_is_recognised_next_to_an_infinite_logit(odd):
    class Odd(Noisy):
        def forward(self, x):
            first = torch.arange(len(x))[:, None] + torch.arange(CLASSES) == 0
            return super().forward(x) if odd is None else super().forward(x).masked_fill(first, odd)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        attack = pgd(Odd(small_net()), eps=1e-6, eps_step=1e-6, max_iter=1, early_stop=True, precision="float32")
        attack(some_images(8), some_labels(8))
    assert (
        attack.report.judgement_forward >= 2 * PROBE + 8 * 9
    )  # each image by nine draws, when it leaves or in the end


def test_a_model_interrupted_in_the_search_comes_back_as_it_was():
    net, calls = hooked_net(), []

    def interrupt(module, inputs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    net.head.register_forward_pre_hook(interrupt)
    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        pgd(net, eps=0.03, eps_step=0.01, max_iter=20, early_stop=True)(some_images(9), some_labels(9))
    assert len(calls) == 6
    assert snapshot(net) == before
