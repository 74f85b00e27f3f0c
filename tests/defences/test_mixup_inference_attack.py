"""The adaptive attack on Mixup Inference against a literal loop, and what users rely on."""

import numpy as np
import pytest
import torch
from models_for_tests import CLASSES, SHAPE, Noted, close, small_net, snapshot, some_images, some_labels
from torch import nn
from torch.nn.functional import cross_entropy

from guardians.defences import AveragedMixturePGD, MixupInference, RandomSelfEnsemble
from guardians.engine.rng import hashed
from guardians.engine.victim import predicted_labels
from guardians.estimators import MixupInferenceClassifier

N, LAM, SEED = 6, 0.6, 3
QUICK = {"eps": 0.05, "eps_step": 0.02, "max_iter": 4, "num_samples": 3, "seed": SEED}
POOL_LABELS = torch.tensor([3, 0, 1, 1, 4, 2, 0, 3, 1, 2, 4, 4, 4, 0, 2])
POOL_SEED = 77
ASKED_OF = {"MI-PL": "MI-PL", "MI-OL": "MI-OL", "MI-Combined": "MI-OL"}

methods = pytest.mark.parametrize("method", ASKED_OF)


def mi(method="MI-OL", dtype=torch.float64, net=None, **options):
    net = small_net(dtype=dtype) if net is None else net
    pool = some_images(len(POOL_LABELS), seed=POOL_SEED, dtype=dtype), POOL_LABELS
    return MixupInference(net, pool, method, LAM, **{"num_samples": 2, "detection_samples": 2, "seed": 1, **options})


def classifier(method="MI-OL", dtype=torch.float64):
    pool = some_images(len(POOL_LABELS), seed=POOL_SEED, dtype=dtype), POOL_LABELS
    loss, options = nn.CrossEntropyLoss(), {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    net = small_net(dtype=dtype)
    return MixupInferenceClassifier(
        net, pool, loss, SHAPE, CLASSES, method=method, lam=LAM, num_samples=2, seed=1, **options
    )


def attack(estimator, **options):
    return AveragedMixturePGD(estimator, **{**QUICK, **options})


def images(dtype=torch.float64):
    return some_images(N, dtype=dtype)


def literal_pgd(net, image, label, eps, eps_step, max_iter):
    """PGD (inf) on a single image."""
    z = image
    for _ in range(max_iter):
        z = z.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(cross_entropy(net(z[None]), label[None]), z)
        z = (z + eps_step * gradient.sign()).detach()
        z = (image + (z - image).clamp(-eps, eps)).clamp(0, 1)
    return z


def literal(defence, x, y, method, eps, eps_step, max_iter, num_samples, seed):
    """Section 4.4 of Pang et al. 2020, image by image and mixture by mixture."""
    found = []
    for index, image in enumerate(x):
        predicted = defence.model(image[None]).argmax(1)
        label = predicted[0] if y is None else y[index]
        rows = defence.partners(predicted, hashed(seed, np.array([index])), method, num_samples)[0]
        perturbations = []
        for row in rows:
            mixture = LAM * image + (1 - LAM) * defence.pool[row]
            perturbations.append(literal_pgd(defence.model, mixture, label, eps, eps_step, max_iter) - mixture)
        mean = torch.stack(perturbations).mean(0)
        found.append((image + mean.clamp(-eps, eps)).clamp(0, 1))
    return torch.stack(found)


@methods
@pytest.mark.parametrize("y", [some_labels(N), None], ids=["labels", "predictions"])
def test_is_the_literal_loop(method, y):
    x, defence = images(), mi(method)
    x_adv = attack(defence)(x, y)
    close(x_adv, literal(defence, x, y, ASKED_OF[method], **QUICK), 1e-10)
    assert (x_adv - x).abs().max() > 0.02
    if y is None:
        close(x_adv, attack(defence)(x, predicted_labels(defence.model, x)), 0)
        assert not torch.equal(x_adv, attack(defence)(x, some_labels(N)))


@methods
def test_generate_and_call_agree_on_module_and_classifier(method):
    x, y = images(), some_labels(N)
    expected = attack(mi(method))(x, y)
    for estimator in (mi(method), classifier(method)):
        generated = attack(estimator).generate(x.numpy(), y.numpy())
        assert isinstance(generated, np.ndarray)
        close(torch.from_numpy(generated), expected)
        close(attack(estimator)(x, y), expected)
    one_hot = np.eye(CLASSES, dtype=np.float32)[y.numpy()]
    assert np.array_equal(attack(mi(method)).generate(x.numpy(), one_hot), expected.numpy())


@pytest.mark.parametrize("eps", [8 / 255, 0.1])
def test_images_are_within_the_ball_to_the_last_bit(eps):
    x = images(torch.float32)
    x_adv = attack(mi(dtype=torch.float32), eps=eps, eps_step=eps / 2, num_samples=1)(x)
    assert x_adv.dtype == torch.float32
    distance = (x_adv.double() - x.double()).abs()
    assert (distance <= eps).all()
    assert distance.max() > 0.99 * eps
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert ((x_adv == 0) | (x_adv == 1)).any()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batch_size_does_not_matter(batch_size):
    x, y = images(), some_labels(N)
    close(attack(mi(), batch_size=batch_size)(x, y), attack(mi(), batch_size=100)(x, y))


def test_an_image_has_its_mixtures_whatever_comes_after_it():
    x, y = images(), some_labels(N)
    close(attack(mi())(x[:4], y[:4]), attack(mi())(x, y)[:4])


def test_a_seed_decides():
    x, y, defence = images(), some_labels(N), mi()
    first = attack(defence)(x, y)
    defence(x)  # whose own draws go on
    assert torch.equal(attack(defence)(x, y), first)
    assert torch.equal(attack(mi(seed=9))(x, y), first)
    assert not torch.allclose(attack(defence, seed=SEED + 1)(x, y), first, rtol=0, atol=1e-3)


@methods
def test_partners_are_of_the_labels_of_the_method(method):
    x, net = images(), Noted(small_net(dtype=torch.float64))
    defence = mi(method, net=net)
    net.asked.clear()
    attack(defence, max_iter=1, num_samples=5)(x, some_labels(N))
    questions = [asked for asked in net.asked if len(asked) == N]
    assert torch.equal(questions[0], x)  # what is predicted
    mixed = torch.stack(questions[1:], 1)
    assert mixed.shape[1] == 5
    pool = some_images(len(POOL_LABELS), seed=POOL_SEED, dtype=torch.float64)
    partners = (mixed - LAM * x[:, None]) / (1 - LAM)
    distances, rows = torch.cdist(partners.flatten(2), pool.flatten(1)[None]).min(2)
    assert distances.max() < 1e-6
    labels, predicted = POOL_LABELS[rows], predicted_labels(net.net, x)
    if method == "MI-PL":
        assert (labels == predicted[:, None]).all()
    else:
        assert (labels != predicted[:, None]).all()
        assert len(labels.unique()) > 2
    assert len(rows.unique()) > 3


@pytest.mark.parametrize("training", [False, True])
def test_the_defence_comes_back_as_it_was(training):
    x, y, defence = images(torch.float32), some_labels(N), mi(dtype=torch.float32)
    expected = attack(defence)(x, y)
    defence.train(training)
    defence.model.head.bias.requires_grad_(False)
    before, seen = snapshot(defence), defence.images_seen
    assert torch.equal(attack(defence)(x, y), expected)
    assert snapshot(defence) == before
    assert defence.images_seen == seen


def test_the_images_are_left_alone():
    x = images()
    before = x.clone()
    attack(mi())(x)
    assert torch.equal(x, before)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    attack(mi())(images())
    assert torch.equal(torch.get_rng_state(), state)


def prototypes(n, seed):
    """Noisy images of classes that differ by a faint pattern of signs, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn((CLASSES, *SHAPE), generator=torch.Generator().manual_seed(0)).sign()
    labels = torch.arange(n) % CLASSES
    noise = torch.randn((n, *SHAPE), generator=generator)
    return (0.5 + 0.04 * patterns[labels] + 0.05 * noise).clamp(0, 1), labels


@pytest.mark.parametrize("method", ["MI-PL", "MI-OL"])
def test_it_fools_a_defence_that_has_learnt_something(method):
    x, y = prototypes(100, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), CLASSES))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        cross_entropy(model(x - 0.5), y).backward()
        optimizer.step()
    with torch.no_grad():
        model[1].bias -= 0.5 * model[1].weight.sum(1)
    model.eval()
    images, labels = prototypes(40, 2)

    def accuracy(asked):
        defence = MixupInference(model, (x, y), method, num_samples=10, seed=5)
        return (predicted_labels(defence, asked) == labels).double().mean().item()

    defence = MixupInference(model, (x, y), method, num_samples=3, seed=1)
    x_adv = AveragedMixturePGD(defence, eps=0.06, eps_step=0.02, max_iter=5, num_samples=4)(images, labels)
    assert accuracy(images) > 0.9
    assert accuracy(x_adv) < 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eps", -0.1),
        ("eps", float("nan")),
        ("eps", np.full(3, 0.1)),
        ("eps_step", 0),
        ("max_iter", 0),
        ("max_iter", 2.5),
        ("num_samples", 0),
        ("num_samples", True),
        ("seed", -1),
        ("seed", None),
        ("batch_size", 0),
    ],
)
def test_bad_arguments_are_errors_that_name_them(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}[ =]"):
        attack(mi(), **{name: value})
    good = attack(mi())
    with pytest.raises((TypeError, ValueError), match=rf"^{name}[ =]"):
        good.set_params(**{name: value})


def test_other_models_are_refused():
    for estimator in (small_net(), RandomSelfEnsemble(small_net(), seed=0)):
        with pytest.raises(TypeError, match=r"^estimator of type \w+: must be a MixupInference"):
            AveragedMixturePGD(estimator)
