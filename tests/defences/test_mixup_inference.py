"""Mixup Inference against a transcription of the paper, ART's mixup, and what its users rely on."""

import numpy as np
import pytest
import torch
from art.defences.preprocessor.mixup.mixup_pytorch import MixupPyTorch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    CLASSES,
    SHAPE,
    Noted,
    Viewing,
    ask,
    close,
    linear_model,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from torch import nn
from torch.nn.functional import log_softmax, nll_loss

from guardians.defences import MixupInference
from guardians.defences.mixup_inference import METHODS
from guardians.engine.rng import hashed, row_keys

N, SEED = 8, 5
BETWEEN = 0.008
"""Of the detection scores of `some_images(N)` half are above it."""
NAN, INF = float("nan"), float("inf")
POOL_LABELS = torch.tensor([3, 0, 1, 1, 4, 2, 0, 3, 1, 2, 4, 4, 4, 0, 2, 3, 0, 1, 4, 2])

nets = pytest.mark.parametrize("make_net", [small_net, traceable_net], ids=["not traceable", "folded"])
methods = pytest.mark.parametrize("method", METHODS)


def make_pool(dtype=torch.float32):
    """Four images of each class or so, in no order."""
    return some_images(len(POOL_LABELS), seed=77, dtype=dtype), POOL_LABELS.clone()


def mi(net, method="MI-OL", lam=0.6, num_samples=7, pool=None, **options):
    pool = make_pool(next(net.parameters()).dtype) if pool is None else pool
    return MixupInference(net, pool, method, lam, num_samples, **{"seed": SEED, **options})


def softmax(logits):
    return (logits - logits.max()).exp() / (logits - logits.max()).exp().sum()


def literal_partner(key, method, k, predicted, pool):
    """The k-th image of the pool with which the image of a seed is mixed."""
    for_label, for_image = (int(hashed(key, METHODS.index(method), k, number)) >> 1 for number in range(2))
    label = predicted
    if method == "MI-OL":
        others = [(predicted + 1 + i) % CLASSES for i in range(CLASSES - 1)]
        label = others[for_label % (CLASSES - 1)]
    of_label = [image for image, its in zip(*pool, strict=True) if its == label]
    return of_label[for_image % len(of_label)]


def literal_mean(net, image, key, method, lam, num_samples, pool):
    """Algorithm 1 of Pang et al. 2020 for an image: the mean prediction for its mixtures."""
    predicted = int(net(image[None])[0].argmax())
    mean = torch.zeros(CLASSES, dtype=image.dtype)
    for k in range(num_samples):
        partner = literal_partner(key, method, k, predicted, pool)
        mixture = lam * image + (1 - lam) * partner
        mean = mean + softmax(net(mixture[None])[0]) / num_samples
    return mean


def literal_score(net, image, key, pool, lam=0.5, num_samples=5):
    """Equation 11: the confidence that is lost."""
    plain = softmax(net(image[None])[0])
    return (plain - literal_mean(net, image, key, "MI-PL", lam, num_samples, pool))[plain.argmax()]


def literal_mi(net, x, keys, method, lam, num_samples, pool, threshold=0.2):
    answers = []
    for image, key in zip(x, keys, strict=True):
        if method != "MI-Combined":
            answers.append(literal_mean(net, image, key, method, lam, num_samples, pool).log())
        elif literal_score(net, image, key, pool) > threshold:
            answers.append(literal_mean(net, image, key, "MI-OL", lam, num_samples, pool).log())
        else:
            answers.append(softmax(net(image[None])[0]).log())
    return torch.stack(answers)


def test_a_model_that_channels_last_breaks():
    net, x = Viewing(traceable_net(dtype=torch.float64)), some_images(4, dtype=torch.float64)
    expected = mi(traceable_net(dtype=torch.float64))
    close(ask(mi(net), x), ask(expected, x))


def mixtures(method, lam, num_samples, x, pool, **options):
    """The mixtures (N, K, ...) that a model is asked about, and the labels that it predicts for `x`."""
    net = Noted(small_net(dtype=x.dtype))
    module = mi(net, method, lam, num_samples, pool, **options)
    ask(module, x)  # the first time it tries on some images in which memory format the model answers
    net.asked.clear()
    ask(module, x)
    asked = torch.cat(net.asked)
    assert len(asked) == len(x) * (1 + num_samples)
    close(asked[: len(x)], x, 0)
    return asked[len(x) :].view(len(x), num_samples, *x.shape[1:]), net.net(x).argmax(1)


def partners_in(mixed, x, lam, pool):
    """Rows (N, K) of the pool that are in mixtures (N, K, ...)."""
    partners = (mixed - lam * x[:, None]) / (1 - lam)
    distances = torch.cdist(partners.flatten(2), pool[0].flatten(1)[None])
    nearest, rows = distances.min(2)
    assert nearest.max() < 1e-4
    return rows


# Against the paper


@nets
@pytest.mark.parametrize(("method", "threshold"), [("MI-PL", 0.2), ("MI-OL", 0.2), ("MI-Combined", BETWEEN)])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_is_that_of_the_paper(make_net, method, threshold, grad):
    net, x, pool = make_net(dtype=torch.float64), some_images(N, dtype=torch.float64), make_pool(torch.float64)
    module = mi(net, method, threshold=threshold)
    with torch.set_grad_enabled(grad):
        answers = module(x)
    assert answers.requires_grad == grad
    keys = hashed(SEED, np.arange(N))
    close(answers, literal_mi(net, x, keys, method, 0.6, 7, pool, threshold))
    plain = int(((answers - net(x).log_softmax(1)).abs().amax(1) < 1e-9).sum())
    assert (0 < plain < N) if method == "MI-Combined" else plain == 0  # so that both ways are compared


@methods
def test_the_gradient_is_that_of_the_paper(method):
    net, y, pool = traceable_net(dtype=torch.float64), some_labels(N), make_pool(torch.float64)
    x, x_literal = (some_images(N, dtype=torch.float64).requires_grad_(True) for _ in range(2))
    nll_loss(mi(net, method, threshold=BETWEEN)(x), y).backward()
    ours = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    nll_loss(literal_mi(net, x_literal, hashed(SEED, np.arange(N)), method, 0.6, 7, pool, BETWEEN), y).backward()
    assert x_literal.grad.abs().max() > 1e-3
    close(x.grad, x_literal.grad)
    for actual, parameter in zip(ours, net.parameters(), strict=True):
        close(actual, parameter.grad)


@given(
    lam=st.floats(0, 1, exclude_min=True),
    num_samples=st.integers(1, 12),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=40)
def test_any_weight_and_number_give_the_papers_distribution(lam, num_samples, method, seed):
    net, x, pool = small_net(dtype=torch.float64), some_images(3, dtype=torch.float64), make_pool(torch.float64)
    module = mi(net, method, lam, num_samples, seed=seed)
    with torch.no_grad():
        answers = module(x)
        close(answers.exp().sum(1), torch.ones(3, dtype=torch.float64))
        close(answers, literal_mi(net, x, hashed(seed, np.arange(3)), method, lam, num_samples, pool))


def test_the_detection_score_is_that_of_the_paper_and_within_its_bounds():
    net, x, pool = traceable_net(dtype=torch.float64), some_images(N, dtype=torch.float64), make_pool(torch.float64)
    module = mi(net, "MI-Combined", lam=0.9, num_samples=2, detection_lam=0.3, detection_samples=9)
    score = module.detection_score(x)
    keys = hashed(SEED, np.arange(N))
    expected = [literal_score(net, image, key, pool, 0.3, 9) for image, key in zip(x, keys, strict=True)]
    close(score, torch.stack(expected))
    assert (score.abs() <= 1).all()
    assert len(score.unique()) == N
    assert module.images_seen == N


@nets
def test_above_the_threshold_is_adversarial(make_net):
    net, x = make_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    plain, others = log_softmax(net(x), 1), ask(mi(net, "MI-OL"), x)
    close(ask(mi(net, "MI-Combined", threshold=1), x), plain)
    close(ask(mi(net, "MI-Combined", threshold=-1), x), others)
    with row_keys(np.arange(N)):
        score = mi(net, "MI-Combined").detection_score(x).detach()
    for threshold in score.tolist():  # by a margin that is above the rounding of other batches
        for shift, is_above in ((1e-9, score > threshold), (-1e-9, score >= threshold)):
            module = mi(net, "MI-Combined", threshold=threshold + shift)
            close(ask(module, x), torch.where(is_above[:, None], others, plain))


@methods
def test_with_the_whole_weight_on_the_image_it_is_the_model(method):
    net, x = traceable_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    expected = log_softmax(net(x), 1)
    close(ask(mi(net, method, 1.0, detection_lam=1, threshold=-1), x), expected)
    with row_keys(np.arange(N)):
        close(mi(net, method, detection_lam=1).detection_score(x), torch.zeros(N, dtype=torch.float64))


@nets
@methods
def test_in_training_it_is_the_model(make_net, method):
    net, twin = (make_net(dtype=torch.float64).train() for _ in range(2))
    module, x, y = mi(net, method), some_images(N, dtype=torch.float64), some_labels(N)
    close(module(x), log_softmax(twin(x), 1))
    nll_loss(module(x), y).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())
    for (name, ours), theirs in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        if "running" in name:  # a batch further
            assert not torch.allclose(ours, theirs)
    assert module.images_seen == 0  # nothing was drawn


def test_the_model_is_asked_about_each_image_and_each_mixture_once():
    net = Noted(small_net())
    counts = {"MI-PL": 1 + 7, "MI-OL": 1 + 7, "MI-Combined": 1 + 4 + 7}
    for method, count in counts.items():
        module = mi(net, method, detection_samples=4)
        ask(module, some_images(N))
        net.asked.clear()
        ask(module, some_images(N))
        assert sum(map(len, net.asked)) == N * count


# Mixtures and partners


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_is_that_of_arts_mixup(lam, dtype, monkeypatch):
    x, pool = some_images(N, dtype=dtype), make_pool(dtype)
    mixed, _ = mixtures("MI-OL", lam, 6, x, pool)
    partners = pool[0][partners_in(mixed.double(), x.double(), lam, (pool[0].double(),)).flatten()]
    n, images = len(partners), x.repeat_interleave(6, 0)
    mixup = MixupPyTorch(CLASSES, num_mix=2, device_type="cpu")
    monkeypatch.setattr(np.random, "dirichlet", lambda alpha: np.array([lam, 1 - lam]))
    monkeypatch.setattr(torch, "randperm", lambda size, device: torch.arange(size).roll(n))
    reference, _ = mixup.forward(torch.cat([images, partners]), torch.zeros(2 * n, dtype=torch.int64))
    assert torch.equal(mixed.flatten(0, 1), reference[:n])


@pytest.mark.parametrize("method", ["MI-PL", "MI-OL"])
def test_partners_have_the_predicted_label_or_one_of_the_others_with_equal_chances(method):
    x, pool, k = some_images(12, dtype=torch.float64), make_pool(torch.float64), 400
    mixed, predicted = mixtures(method, 0.5, k, x, pool)
    rows = partners_in(mixed, x, 0.5, pool)
    labels = pool[1][rows]
    assert len(predicted.unique()) > 2
    for image, label in enumerate(predicted.tolist()):
        counts = labels[image].bincount(minlength=CLASSES)
        if method == "MI-PL":
            assert counts[label] == k
        else:
            assert counts[label] == 0
            others = counts[torch.arange(CLASSES) != label]
            assert (others - k / 4).abs().max() < 4.5 * (k * 0.25 * 0.75) ** 0.5
    # Of a label each image is as likely as the next, so labels with more images do not come more often.
    for label in labels.unique():
        of_label = (pool[1] == label).nonzero()[:, 0]
        counts = rows[labels == label].bincount(minlength=len(pool[0]))[of_label]
        share = 1 / len(of_label)
        total = int(counts.sum())
        assert (counts - total * share).abs().max() < 4.5 * (total * share * (1 - share)) ** 0.5
    # Images and samples have draws of their own.
    assert len({tuple(drawn) for drawn in rows.tolist()}) == 12
    agreement = (rows[:, 1:] == rows[:, :-1]).double().mean()
    assert float(agreement) == pytest.approx(0.25 if method == "MI-PL" else 1 / 16, abs=0.03)


@pytest.mark.parametrize("method", ["MI-PL", "MI-OL"])
def test_the_order_of_the_pool_does_not_say_which_images_are_eligible(method):
    x, pool = some_images(4, dtype=torch.float64), make_pool(torch.float64)
    order = torch.randperm(len(POOL_LABELS), generator=torch.Generator().manual_seed(3))
    shuffled = (pool[0][order], pool[1][order])
    eligible = []
    for images_and_labels in (pool, shuffled):
        mixed, predicted = mixtures(method, 0.4, 300, x, images_and_labels)
        rows = partners_in(mixed, x, 0.4, pool)  # the same numbers for both
        eligible.append([set(drawn) for drawn in rows.tolist()])
        for drawn, label in zip(eligible[-1], predicted, strict=True):
            assert drawn == set(((pool[1] == label) == (method == "MI-PL")).nonzero()[:, 0].tolist())
    assert eligible[0] == eligible[1]


def test_the_pool_is_copied():
    net, x, pool = small_net(), some_images(N), make_pool()
    module = mi(net, pool=pool)
    before = ask(module, x)
    pool[0].zero_()
    pool[1].zero_()
    assert torch.equal(ask(module, x), before)


# Independence of how it is asked


@nets
@methods
@pytest.mark.parametrize("size", [1, 3, 12])
def test_the_same_in_batches_of_any_size(make_net, method, size):
    net, x = make_net(dtype=torch.float64), some_images(12, dtype=torch.float64)
    module = mi(net, method, threshold=-1)
    with torch.no_grad():
        answers = torch.cat([module(batch) for batch in x.split(size)])
        close(answers, mi(net, method, threshold=-1)(x))
        assert module.images_seen == 12
        assert (module(x) - answers).abs().max() > 1e-3  # the next images have other partners


@nets
@methods
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_the_same_in_chunks_of_any_size_and_so_are_gradients(make_net, method, chunk_size):
    found = []
    for size in (chunk_size, 512):
        net, sizes = make_net(dtype=torch.float64), []
        net.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        module, x = mi(net, method, chunk_size=size), some_images(N, dtype=torch.float64).requires_grad_(True)
        sizes.clear()
        answers = ask(module, x, grad=True)
        nll_loss(answers, some_labels(N)).backward()
        assert max(sizes) <= max(size, N)
        close(ask(module, x), answers)
        found.append([answers, x.grad, *(parameter.grad for parameter in net.parameters())])
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@methods
def test_the_seed_decides(method):
    net, x = small_net(), some_images(N)
    first, same, other = (ask(mi(net, method, threshold=-1, seed=seed), x) for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert (first - other).abs().max() > 1e-3


def test_draws_leave_torchs_generator_alone():
    module, state = mi(small_net(), "MI-Combined"), torch.get_rng_state()
    module(some_images(N))
    assert torch.equal(torch.get_rng_state(), state)


@methods
def test_keys_that_are_given_come_before_the_count(method):
    net, x = small_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    module, keys = mi(net, method), np.array([7, 3, 2**64 - 1, 7, 0, 1, 2, 9], dtype=np.uint64)
    answers = ask(module, x, keys)
    assert module.images_seen == 0
    close(answers, literal_mi(net, x, hashed(SEED, keys), method, 0.6, 7, make_pool(torch.float64)))
    order = [4, 2, 0]
    close(ask(module, x[order], keys[order]), answers[order])


def test_combined_has_the_draws_of_its_parts():
    net, x = small_net(dtype=torch.float64), some_images(N, dtype=torch.float64)
    predicted = net(x).argmax(1)[:, None]
    with row_keys(np.arange(N)):
        score = mi(net, "MI-Combined", detection_lam=0.6, detection_samples=7).detection_score(x)
    lost = log_softmax(net(x), 1).exp() - ask(mi(net, "MI-PL"), x).exp()
    close(score, lost.gather(1, predicted)[:, 0])


# The model and the pool


@nets
@pytest.mark.parametrize("mode", [True, False])
def test_the_model_stays_as_it_is(make_net, mode):
    net = make_net()
    net.train(mode)
    before = snapshot(net)
    module = mi(net, "MI-Combined")
    assert module.model is net
    assert module.training == mode
    assert snapshot(net) == before
    if not mode:
        ask(module, some_images(N))
        module.detection_score(some_images(N))
        assert snapshot(net) == before


def test_follows_the_model_when_it_is_trained():
    net, x = traceable_net(), some_images(N)
    module = mi(net)
    before = ask(module, x)
    nll_loss(ask(module, x, grad=True), some_labels(N)).backward()
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    after = ask(module, x)
    assert (after - before).abs().max() > 1e-2
    assert torch.equal(after, ask(mi(net), x))


def test_moves_with_its_pool_and_leaves_it_out_of_the_state():
    net, x = traceable_net(), some_images(N)
    module = mi(net)
    single = ask(module, x)
    assert [name.removeprefix("model.") for name in module.state_dict()] == list(net.state_dict())
    module.load_state_dict(module.state_dict())
    double = ask(module.to(torch.float64), x.double())
    assert module.pool.dtype == double.dtype == torch.float64
    assert [buffer.dtype for buffer in (module._counts, module._starts)] == [torch.int64] * 2
    close(single.double(), double, 1e-5)


def test_images_of_another_dtype_than_the_pool():
    x = some_images(N, dtype=torch.float64)
    module = mi(linear_model(dtype=torch.float32), pool=make_pool())
    module.model.double()
    answers = ask(module, x)
    assert answers.dtype == torch.float64
    close(answers.exp().sum(1), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("first", ["inference_mode", "no_grad"])
def test_inference_mode_leaves_nothing_behind(first):
    module, x = mi(traceable_net(dtype=torch.float64).requires_grad_(False)), some_images(N, dtype=torch.float64)
    with getattr(torch, first)(), row_keys(np.arange(N)):
        before = module(x)
    inputs = x.clone().requires_grad_(True)
    after = ask(module, inputs, grad=True)
    close(after, before.clone())
    nll_loss(after, some_labels(N)).backward()
    assert inputs.grad.abs().max() > 0


def test_says_what_it_is():
    assert "method=MI-PL, lam=0.75, num_samples=3, pool=(20, 3, 8, 8)" in repr(mi(small_net(), "MI-PL", 0.75, 3))


# What is not allowed


def pool_with(images=None, labels=None):
    pool = make_pool()
    return (pool[0] if images is None else images, pool[1] if labels is None else labels)


def image_with(value):
    images = make_pool()[0]
    images[3, 1, 2, 0] = value
    return images


def labels_with(value):
    labels = POOL_LABELS.clone()
    labels[3] = value
    return labels


BAD = {
    "lam zero": ({"lam": 0}, ValueError, "lam=0"),
    "lam negative": ({"lam": -0.5}, ValueError, "lam=-0.5"),
    "lam above 1": ({"lam": 1.01}, ValueError, "lam=1.01.*1"),
    "lam NaN": ({"lam": NAN}, ValueError, "lam=nan"),
    "lam string": ({"lam": "0.5"}, TypeError, "lam='0.5'"),
    "lam array": ({"lam": np.ones(2)}, TypeError, r"lam has shape \(2,\)"),
    "num_samples zero": ({"num_samples": 0}, ValueError, "num_samples=0"),
    "num_samples fraction": ({"num_samples": 2.5}, TypeError, "num_samples=2.5"),
    "detection_lam zero": ({"detection_lam": 0}, ValueError, "detection_lam=0"),
    "detection_lam above 1": ({"detection_lam": 2}, ValueError, "detection_lam=2"),
    "detection_samples zero": ({"detection_samples": 0}, ValueError, "detection_samples=0"),
    "threshold below -1": ({"threshold": -1.5}, ValueError, "threshold=-1.5"),
    "threshold NaN": ({"threshold": NAN}, ValueError, "threshold=nan"),
    "threshold string": ({"threshold": "a"}, TypeError, "threshold='a'"),
    "method unknown": ({"method": "mi-ol"}, ValueError, "method='mi-ol'.*MI-PL, MI-OL, MI-Combined"),
    "method none": ({"method": None}, ValueError, "method=None"),
    "chunk_size zero": ({"chunk_size": 0}, ValueError, "chunk_size=0"),
    "seed negative": ({"seed": -1}, ValueError, "seed=-1"),
    "no module": ({"model": lambda x: x}, TypeError, "model of type function"),
    "pool none": ({"pool": None}, TypeError, "pool of type NoneType.*pair"),
    "pool of three": ({"pool": (1, 2, 3)}, TypeError, "pool of type tuple.*pair"),
    "pool of images alone": ({"pool": make_pool()[0]}, TypeError, "pool of type Tensor.*pair"),
    "pool of arrays": ({"pool": tuple(part.numpy() for part in make_pool())}, TypeError, "pool.*ndarray"),
    "pool of bytes": ({"pool": pool_with((255 * make_pool()[0]).byte())}, TypeError, "pool.*floating"),
    "pool empty": ({"pool": (make_pool()[0][:0], POOL_LABELS[:0])}, ValueError, r"pool.*\(0, 3, 8, 8\)"),
    "pool below 0": ({"pool": pool_with(image_with(-0.25))}, ValueError, r"pool has values from -0.25.*\[0, 1\]"),
    "pool above 1": ({"pool": pool_with(image_with(1.5))}, ValueError, r"pool has values from 0 to 1.5.*\[0, 1\]"),
    "pool NaN": ({"pool": pool_with(image_with(NAN))}, ValueError, "pool has values.*nan"),
    "pool of other images": ({"pool": pool_with(torch.rand(20, 3, 6, 6))}, ValueError, r"pool.*\(3, 6, 6\)"),
    "labels too many": ({"pool": pool_with(labels=POOL_LABELS[1:])}, ValueError, r"pool.*\(19,\).*\(20,\)"),
    "labels not one-hot": ({"pool": pool_with(labels=torch.ones(20, 5))}, ValueError, "pool.*one-hot"),
    "labels beyond": ({"pool": pool_with(labels=labels_with(5))}, ValueError, "pool.*labels from 0 to 5.*5"),
    "labels negative": ({"pool": pool_with(labels=labels_with(-1))}, ValueError, "pool.*labels from -1"),
    "labels lack a class": ({"pool": pool_with(labels=POOL_LABELS.clamp(max=3))}, ValueError, "pool.*class 4"),
    "labels lack two": ({"pool": pool_with(labels=2 * (POOL_LABELS // 2))}, ValueError, "pool.*class 1, 3"),
    "labels not integer": ({"pool": pool_with(labels=POOL_LABELS + 0.5)}, ValueError, "pool.*not integers"),
    "one class": (
        {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), "pool": pool_with(labels=0 * POOL_LABELS)},
        ValueError,
        "model has 1 class",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_what_is_not_allowed_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        MixupInference(**{"model": small_net(), "pool": make_pool(), **options})


@pytest.mark.parametrize("shape", [(3, 3, 8, 4), (3, 1, 8, 8), SHAPE])
@pytest.mark.parametrize("call", ["forward", "detection_score"])
def test_images_of_another_shape_than_the_pool_are_refused(shape, call):
    module = mi(small_net())
    with pytest.raises(ValueError, match=r"x has shape .*\(3, 8, 8\)"):
        getattr(module, call)(torch.zeros(shape))
    assert module.images_seen == 0
