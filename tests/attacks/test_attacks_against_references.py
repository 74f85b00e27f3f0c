"""FGSM and PGD against a literal transcription of the papers, closed forms, and ART's attacks."""

import art.attacks.evasion as art
import numpy as np
import pytest
import torch
from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothing
from models_for_tests import CLASSES, art_classifier, linear_model, small_net, some_images, some_labels
from scipy import stats
from torch import nn

from guardians.attacks import FGSM, PGD
from guardians.engine.victim import Victim

INF = float("inf")


def literal_pgd(model, x, y, p, eps, eps_step, max_iter, targeted=False, decay=None, mask=None, clip=(0.0, 1.0)):
    """PGD on softmax regression, image by image in numpy float64; Madry et al. 2018, Dong et al. 2018, eq. 6."""
    weight, bias = (parameter.detach().numpy() for parameter in model[1].parameters())
    x_adv = x.copy()
    for i in range(len(x)):
        momentum = np.zeros(x[i].size)
        for _ in range(max_iter):
            logits = weight @ x_adv[i].ravel() + bias
            softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            gradient = weight.T @ (softmax - np.eye(len(bias))[y[i]])
            if targeted:
                gradient = -gradient
            if mask is not None:
                gradient = gradient * np.broadcast_to(mask, x.shape)[i].ravel()
            if decay is not None:
                momentum = decay * momentum + gradient / np.abs(gradient).sum()
                gradient = momentum
            if p == INF:
                step = eps_step * np.sign(gradient)
            elif p == 1:  # the largest coordinates up to the bounds, until the step is used up
                step, left = np.zeros_like(gradient), eps_step
                for k in np.argsort(-np.abs(gradient), kind="stable"):
                    pixel, up = x_adv[i].ravel()[k], gradient[k] > 0
                    room = np.inf if clip is None else clip[1] - pixel if up else pixel - clip[0]
                    step[k] = np.sign(gradient[k]) * min(room, left)
                    left -= abs(step[k])
            else:
                q = p / (p - 1)
                step = eps_step * np.sign(gradient) * (np.abs(gradient) / np.linalg.norm(gradient, q)) ** (q - 1)
            stepped = x_adv[i] + step.reshape(x[i].shape)
            if clip is not None:
                stepped = np.clip(stepped, *clip)
            delta = stepped - x[i]
            if p == INF:
                delta = np.clip(delta, -eps, eps)
            else:
                delta *= min(1.0, eps / max(np.linalg.norm(delta.ravel(), p), 1e-300))
            x_adv[i] = x[i] + delta
    return x_adv


# Radius and step that leave some images inside the ball and project others.
BUDGETS = {1: (3.0, 1.0), 1.5: (1.2, 0.4), 2: (0.8, 0.25), 3: (0.4, 0.15), INF: (0.1, 0.03)}


@pytest.mark.parametrize("p", BUDGETS)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("decay", [None, 0.0, 0.9])
@pytest.mark.parametrize("masked", [False, True])
def test_pgd_is_that_of_the_papers(p, targeted, decay, masked, x64, y):
    model, (eps, eps_step) = linear_model(), BUDGETS[p]
    mask = (some_images(12, seed=5) > 0.4).numpy() if masked else None
    attack = PGD(model, p, eps, eps_step, decay, max_iter=6, targeted=targeted, verbose=False)
    expected = literal_pgd(model, x64.numpy(), y, p, eps, eps_step, 6, targeted, decay, mask)
    np.testing.assert_allclose(attack.generate(x64.numpy(), y.numpy(), mask=mask), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", BUDGETS)
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_is_one_step_of_the_size_of_the_ball(p, targeted, x64, y):
    model, eps = linear_model(), BUDGETS[p][0]
    attack = FGSM(model, p, eps, targeted=targeted)
    expected = literal_pgd(model, x64.numpy(), y, p, eps, eps, 1, targeted)
    np.testing.assert_allclose(attack.generate(x64.numpy(), y.numpy()), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("p", BUDGETS)
@pytest.mark.parametrize("attack", [FGSM, PGD])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_margin_of_a_linear_model_falls_by_eps_times_the_dual_norm(p, attack, targeted, x64):
    model = linear_model(classes=2)
    estimator = art_classifier(model, nb_classes=2, clip_values=None)
    y, eps = torch.arange(12) % 2, 0.37
    options = {} if attack is FGSM else {"max_iter": 5, "verbose": False}
    x_adv = attack(estimator, p, eps, eps, targeted=targeted, **options)(x64, y)
    weight = (model[1].weight[1] - model[1].weight[0]).detach().numpy()
    dual = {1: INF, INF: 1}.get(p) or p / (p - 1)
    sign = (2 * y - 1).numpy() * (1 if targeted else -1)
    gained = sign * ((x_adv - x64).flatten(1).numpy() @ weight)
    np.testing.assert_allclose(gained, eps * np.linalg.norm(weight, dual), rtol=1e-9)


# Against ART


def scorer():
    """A loss that says nothing of its reduction and is given one-hot labels."""
    return lambda logits, onehot: (logits.logsumexp(1) - 2 * (logits * onehot).sum(1)).mean()


class Squeezing(FeatureSqueezing):
    """ART's, which returns float64 and so fails in ART's own attacks on float32 models."""

    def __call__(self, x, y=None):
        x, y = super().__call__(x, y)
        return x.astype(np.float32), y


def rows(low, high, shape=(12, 1, 1, 1)):
    return np.linspace(low, high, int(np.prod(shape)), dtype=np.float32).reshape(shape)


PIXELS = (3, 8, 8)
ESTIMATORS = {
    "plain": dict,
    "mean and std": lambda: {"preprocessing": (np.float32([0.4, 0.5, 0.6]), np.float32([0.3, 0.2, 0.25]))},
    "spatial smoothing": lambda: {"preprocessing_defences": SpatialSmoothing(window_size=3, channels_first=True)},
    "feature squeezing": lambda: {"preprocessing_defences": Squeezing(clip_values=(0, 1), bit_depth=3)},
    "both": lambda: {
        "preprocessing": (0.5, 0.25),
        "preprocessing_defences": SpatialSmoothing(window_size=3, channels_first=True),
    },
    "multi-margin": lambda: {"loss": nn.MultiMarginLoss()},
    "summed": lambda: {"loss": nn.CrossEntropyLoss(reduction="sum")},
    "weighted": lambda: {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0]))},
    "one-hot loss": lambda: {"loss": nn.MSELoss()},
    "custom loss": lambda: {"loss": scorer()},
    "from -1 to 1": lambda: {"clip_values": (-1.0, 1.0)},
    "bytes": lambda: {"clip_values": (0.0, 255.0), "preprocessing": (127.5, 64.0)},
    "unbounded": lambda: {"clip_values": None},
    "bounds per pixel": lambda: {"clip_values": (rows(0, 0.2, PIXELS), rows(0.8, 1, PIXELS))},
}
SCALE = {"from -1 to 1": (-1, 2), "bytes": (0, 255)}


def both(estimator_name, native, reference, options, call, labels="indices"):
    """The native images and ART's, in the unit [0, 1], the two estimators that they attacked, and the labels."""
    low, width = SCALE.get(estimator_name, (0, 1))
    options = {k: v * width if k in ("eps", "eps_step") else v for k, v in options.items()}
    x = some_images(12).numpy() * width + low
    y = {"indices": some_labels(12).numpy(), "one-hot": np.eye(CLASSES, dtype=np.float32)[some_labels(12)]}
    images = []
    for attack in (native, reference):
        settings = ESTIMATORS[estimator_name]()
        if options.get("norm") == 1:
            settings["clip_values"] = None  # with bounds ART's steps of 1-norm go to pixels that cannot move
        estimator = art_classifier(small_net(), **settings)
        if estimator.clip_values is not None:
            x = np.clip(x, *estimator.clip_values)
        images.append(attack(estimator, **options).generate(x, y.get(labels), **call))
    return x / width, *(x_adv / width for x_adv in images), estimator, (low, width)


def assert_same(estimator_name, *args, **kwargs):
    x, native, reference, estimator, (_, width) = both(estimator_name, *args, **kwargs)
    assert native.dtype == np.float32
    assert np.abs(reference - x).max() > 1e-3  # there is something to compare
    np.testing.assert_allclose(native, reference, rtol=0, atol=1e-5)
    predictions = [estimator.predict((images * width).astype(np.float32)).argmax(1) for images in (native, reference)]
    assert np.array_equal(*predictions)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (nn.CrossEntropyLoss(), lambda z, y: z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]),
        (nn.MultiMarginLoss(), lambda z, y: ((1 + z - z.gather(1, y[:, None])).relu().sum(1) - 1) / CLASSES),
        (nn.MSELoss(), lambda z, y: (z - torch.eye(CLASSES)[y]).square().sum(1)),
    ],
)
def test_the_loss_of_an_estimator_is_taken_per_sample(loss, expected, net, x, y):
    logits = net(x).detach()
    victim = Victim(art_classifier(net, loss=loss))
    torch.testing.assert_close(victim.loss(logits, y), expected(logits, y))
    assert loss.reduction == "mean"


def pgd(**options):
    return {"norm": np.inf, "eps": 0.1, "eps_step": 0.03, "max_iter": 7, "verbose": False, **options}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("norm", "eps", "eps_step"), [(np.inf, 0.1, 0.03), (2, 0.8, 0.25), (1, 3.0, 1.0)])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_equals_that_of_art_on_any_estimator(name, norm, eps, eps_step, targeted):
    options = pgd(norm=norm, eps=eps, eps_step=eps_step, targeted=targeted)
    assert_same(name, PGD, art.ProjectedGradientDescent, options, {})


OPTIONS = {
    "norm as a string": {"norm": "inf"},
    "other norm": {"norm": 3, "eps": 0.4, "eps_step": 0.15},
    "momentum": {"decay": 0.8},
    "momentum, 2-norm": {"decay": 1.0, "norm": 2, "eps": 0.8, "eps_step": 0.25},
    "small batches": {"batch_size": 5},
    "eps per sample": {"eps": rows(0.01, 0.2), "eps_step": rows(0.03, 0.02)},
    "eps per sample in small batches": {"eps": rows(0.01, 0.2), "eps_step": rows(0.03, 0.02), "batch_size": 5},
    "eps per sample, 2-norm": {"norm": 2, "eps": rows(0.1, 1), "eps_step": rows(0.4, 0.2), "batch_size": 5},
    "eps per sample, 1-norm": {"norm": 1, "eps": rows(0.5, 4), "eps_step": rows(1, 0.8)},
    "eps per pixel": {"eps": rows(0.0, 0.2, PIXELS), "eps_step": rows(0.05, 0.02, PIXELS)},
    "eps per channel": {"eps": rows(0.02, 0.2, (3, 1, 1)), "eps_step": rows(0.05, 0.02, (3, 1, 1))},
    "eps per sample and pixel": {"eps": rows(0, 0.2, (12, *PIXELS)), "eps_step": rows(0.05, 0.02, (12, *PIXELS))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pgd_equals_that_of_art_for_any_option(options):
    assert_same("plain", PGD, art.ProjectedGradientDescent, pgd(**options), {})


def masks():
    pixels = some_images(12, seed=3).numpy()
    return {
        "of the batch": (pixels > 0.5),
        "as floats": (pixels > 0.5).astype(np.float32),
        "of an image": pixels[0] > 0.5,
    }


@pytest.mark.parametrize("mask", masks().values(), ids=masks())
@pytest.mark.parametrize("options", [{}, {"norm": 2, "eps": 0.8, "eps_step": 0.25}])
@pytest.mark.parametrize(
    ("native", "reference", "iterations"),
    [
        (PGD, art.ProjectedGradientDescent, {"max_iter": 5, "verbose": False}),
        (PGD, art.ProjectedGradientDescent, {"max_iter": 5, "verbose": False, "decay": 0.5}),
        (FGSM, art.FastGradientMethod, {}),
        (FGSM, art.FastGradientMethod, {"minimal": True}),
    ],
    ids=["PGD", "PGD with momentum", "FGSM", "minimal FGSM"],
)
def test_masked_attacks_equal_those_of_art(native, reference, iterations, mask, options):
    assert_same("plain", native, reference, {**options, **iterations, "batch_size": 5}, {"mask": mask})


@pytest.mark.parametrize("labels", ["one-hot", "none"])
@pytest.mark.parametrize(
    ("native", "reference", "options"),
    [(PGD, art.ProjectedGradientDescent, pgd()), (FGSM, art.FastGradientMethod, {"eps": 0.1})],
)
def test_labels_are_taken_as_art_takes_them(native, reference, options, labels):
    assert_same("plain", native, reference, options, {}, labels)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(("norm", "eps"), [(np.inf, 0.1), (2, 0.8), (1, 3.0)])
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_equals_that_of_art(name, norm, eps, targeted):
    assert_same(name, FGSM, art.FastGradientMethod, {"norm": norm, "eps": eps, "targeted": targeted}, {})


# Steps that are powers of two, so that ART's running sum of them is exact.
@pytest.mark.parametrize(("norm", "eps", "eps_step"), [(np.inf, 0.25, 2**-6), (2, 2.0, 2**-4), (1, 8.0, 0.5)])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("extra", [{}, {"batch_size": 5}, {"num_random_init": 3}])
def test_fgsm_with_the_smallest_step_equals_that_of_art(norm, eps, eps_step, targeted, extra):
    options = {"norm": norm, "eps": eps, "eps_step": eps_step, "targeted": targeted, "minimal": True, **extra}
    assert_same("plain", FGSM, art.FastGradientMethod, options, {})


def test_the_smallest_step_is_a_multiple_of_eps_step_that_fools_where_the_one_before_does_not(net, x):
    y, step = net(x).argmax(1), 2**-7
    size = (FGSM(net, eps=0.25, eps_step=step, minimal=True)(x, y) - x).abs().amax((1, 2, 3))
    multiples = (size / step).round().long()
    torch.testing.assert_close(size, multiples * step, rtol=0, atol=1e-6)
    assert len(multiples.unique()) > 1
    for image, label, k in zip(x.split(1), y.split(1), multiples.tolist(), strict=True):
        fooled = [bool(net(FGSM(net, eps=j * step)(image, label)).argmax() != label) for j in range(1, k + 1)]
        assert not any(fooled[:-1])
        assert fooled[-1] or k * step == 0.25


def test_the_last_multiple_of_eps_step_is_not_lost_to_rounding(x):
    # 0.3 / 0.1 is 2.9999999999999996; no size fools this model, so the largest is kept.
    model = linear_model(dtype=torch.float32)
    nn.init.constant_(model[1].bias[0], 9.0)
    x_adv = FGSM(model, eps=0.3, eps_step=0.1, minimal=True)(x, torch.zeros(12, dtype=torch.int64))
    assert (model(x_adv).argmax(1) == 0).all()
    torch.testing.assert_close((x_adv - x).abs().amax((1, 2, 3)), torch.full((12,), 0.3))


def test_steps_of_1_norm_do_more_harm_within_bounds_than_those_of_art(net, estimator, x):
    y, options = net(x).argmax(1), pgd(norm=1, eps=6.0, eps_step=1.0, max_iter=20)
    attacked = [
        torch.as_tensor(attack(estimator, **options).generate(x.numpy(), y.numpy()))
        for attack in (PGD, art.ProjectedGradientDescent)
    ]
    native, reference = (nn.functional.cross_entropy(net(x_adv), y, reduction="none") for x_adv in attacked)
    assert (native > reference).all()


def test_more_steps_raise_the_loss_of_a_deep_model(net, x):
    y = net(x).argmax(1)
    loss = [
        nn.functional.cross_entropy(net(x_adv), y).item()
        for x_adv in (x, FGSM(net, eps=0.03)(x, y), PGD(net, eps=0.03, eps_step=0.0075, max_iter=20)(x, y))
    ]
    assert loss[0] < loss[1] <= loss[2]


# random_eps


def test_random_radii_follow_the_truncated_normal_law_with_the_step_in_proportion():
    n = 1500
    estimator = art_classifier(linear_model(dtype=torch.float64), clip_values=None)
    x, y = some_images(n, dtype=torch.float64), some_labels(n)
    attack = PGD(estimator, eps=0.2, eps_step=0.1, max_iter=1, random_eps=True, seed=3, verbose=False)
    step = (attack(x, y) - x).flatten(1).abs().amax(1).numpy()
    assert step.max() <= 0.1
    # |N(0, 1/2)| given that it is at most 1, of half of eps
    assert stats.kstest(step / 0.1, stats.truncnorm(0, 2, scale=0.5).cdf).pvalue > 0.01
