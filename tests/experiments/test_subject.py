import copy

import numpy as np
import pytest
import torch
from models_for_tests import small_net

from guardians.data import Dataset
from guardians.defences import MixupInference, RandomSelfEnsemble
from guardians.experiments.subject import defended
from guardians.models import load_model


@pytest.fixture
def pool():
    images = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Dataset(images, torch.arange(10) % 5, tuple("abcde"), "noise")


def test_a_model_is_its_own_defence():
    net = small_net()
    subject = defended("net", net, "none")
    assert subject.module(0) is subject.module(1, 5) is subject.attacked(0) is net
    assert subject.defence == "none"


def test_random_self_ensemble():
    subject = defended("net", small_net(), "RSE(sigma_init=0.3, n=4, search_passes=3)")
    assert subject.defence == "rse(n=4, search_passes=3, sigma_init=0.3)"
    answers, asked = subject.module(0), subject.attacked(0)
    assert isinstance(answers, RandomSelfEnsemble)
    assert (answers.n, asked.n) == (4, 3)


def test_predictions_depend_on_seed_number_and_row_alone():
    subject = defended("net", small_net(), "rse(sigma_init=2, n=1)")
    x, rows = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), np.arange(40)
    first = subject.predictions(x, rows, 40, 0, 1)
    assert torch.equal(first, subject.predictions(x, rows, 7, 0, 1))
    chosen = np.array([31, 4, 15])
    assert torch.equal(first[chosen], subject.predictions(x[chosen], chosen, 2, 0, 1))
    for seed, number in ((1, 1), (0, 0)):
        assert not torch.equal(first, subject.predictions(x, rows, 40, seed, number))


def test_the_noise_of_a_bundled_model_is_that_of_its_card():
    subject = defended("resnet9-16-rse", load_model("resnet9-16-rse"), "rse")
    assert subject.defence == "rse(n=10, search_passes=2, sigma_init=0.8, sigma_inner=0.2)"


@pytest.mark.parametrize("method", ["mi-pl", "MI-OL", "mi-combined"])
def test_mixup_inference(pool, method):
    subject = defended("net", small_net(), f"{method}(lam=0.6, num_samples=3)", pool)
    answers = subject.module(0)
    assert isinstance(answers, MixupInference)
    assert (answers.num_samples, subject.attacked(0).num_samples, answers.lam) == (3, 2, 0.6)
    assert answers.method.casefold() == method.casefold()


def test_the_digest_is_of_all_that_a_subject_is_made_of(pool):
    net, other = small_net(), small_net(seed=1)
    fewer = Dataset(pool.images[:8], pool.labels[:8], pool.classes, pool.source)
    subjects = [
        defended("net", net, "none"),
        defended("net", other, "none"),
        defended("net", net, "rse(sigma_init=0.3)"),
        defended("net", net, "rse(sigma_init=0.4)"),
        defended("net", net, "rse(sigma_init=0.3, n=5)"),
        defended("net", net, "rse(sigma_init=0.3, search_passes=3)"),
        defended("net", net, "mi-ol", pool),
        defended("net", net, "mi-pl", pool),
        defended("net", net, "mi-ol", fewer),
    ]
    assert len({subject.digest for subject in subjects}) == len(subjects)
    assert defended("another name", copy.deepcopy(net), "none").digest == subjects[0].digest


@pytest.mark.parametrize(
    ("defence", "message"),
    [
        ("rsa", "defence='rsa': must be one of none, rse"),
        ("none(a=1)", r"defence='none\(a=1\)': none takes no arguments"),
        ("rse(sigma=1)", "'sigma' is unknown; known are .*sigma_init"),
        ("rse(seed=1)", "'seed' is unknown"),
        ("rse(n=0)", "n=0"),
        ("rse(sigma_init=-1)", "sigma_init=-1"),
        ("rse(search_passes=0)", "search_passes=0"),
        ("mi-ol(num_samples=0)", "num_samples=0"),
        ("mi-ol(method='MI-PL')", "'method' is unknown"),
    ],
)
def test_what_is_no_defence_is_refused(pool, defence, message):
    with pytest.raises(ValueError, match=message):
        defended("net", small_net(), defence, pool)


def test_mixup_inference_without_images_is_refused():
    with pytest.raises(ValueError, match="needs images to mix with"):
        defended("net", small_net(), "mi-ol")
