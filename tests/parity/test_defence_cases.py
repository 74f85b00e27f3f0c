"""The rows of defences and of what belongs to them: native agrees, and what is wrong is seen."""

import numpy as np
import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels

from guardians.parity import defences
from guardians.parity.defences import DEFENCE_CASES

pytest.importorskip("torchattacks")

N = 6
NAMED = {case.name: case for case in DEFENCE_CASES}


def row_of(name):
    return NAMED[name].row(small_net(), some_images(N), some_labels(N), CLASSES, seed=3)


@pytest.mark.parametrize("name", NAMED)
def test_native_agrees(name):
    net = small_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    row = NAMED[name].row(net, some_images(N), some_labels(N), CLASSES, seed=3)
    assert row["verdict"] == "exact"
    assert row["max_abs_diff_float64"] <= NAMED[name].tolerance
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def with_other(argument, change):
    """A change of a class: one of its arguments is another."""

    def changed(kind):
        def make(*args, **options):
            return kind(*args, **{**options, argument: change(options[argument])})

        return make

    return changed


def with_positional(number, change):
    """A change of a class: one of its positional arguments is another."""

    def changed(kind):
        return lambda *args, **options: kind(*args[:number], change(args[number]), *args[number + 1 :], **options)

    return changed


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("RSE log-probabilities vs paper", "RandomSelfEnsemble", with_positional(2, lambda sigma: 1.01 * sigma)),
        ("RSE log-probabilities vs paper", "RandomSelfEnsemble", with_positional(3, lambda passes: passes + 1)),
        ("RSE log-probabilities vs paper", "RandomSelfEnsemble", with_other("seed", lambda value: 2 * value)),
        ("RSE votes vs ART", "RandomSelfEnsemble", with_positional(1, lambda sigma: 4 * sigma)),
        ("MI-PL log-probabilities vs paper", "MixupInference", with_other("lam", lambda value: 1.01 * value)),
        ("MI-OL log-probabilities vs paper", "MixupInference", with_other("num_samples", lambda value: 2 * value)),
        ("MI-OL log-probabilities vs paper", "MixupInference", with_positional(2, lambda method: "MI-PL")),
        ("MI-Combined log-probabilities vs paper", "MixupInference", with_other("seed", lambda value: 2 * value)),
        ("MI-OL mixtures vs ART", "MixupInference", with_positional(3, lambda lam: 1.01 * lam)),
        ("AveragedMixturePGD images vs paper", "AveragedMixturePGD", with_positional(4, lambda samples: samples + 1)),
        ("EOT-PGD images vs torchattacks", "PGD", with_other("eps_step", lambda value: 0.9 * value)),
        (
            "RandomSelfEnsembleClassifier predictions vs ART",
            "RandomSelfEnsembleClassifier",
            with_other("sigma_init", lambda sigma: sigma + 0.1),
        ),
        (
            "MixupInferenceClassifier class gradients vs ART",
            "MixupInferenceClassifier",
            with_other("lam", lambda value: 0.9 * value),
        ),
        ("AdversarialTrainer weights at ratio 0.5 vs ART", "AdversarialTrainer", with_positional(2, lambda ratio: 1.0)),
        ("AdversarialTrainer weights at ratio 1 vs ART", "PGD", with_other("max_iter", lambda value: 2 * value)),
    ],
)
def test_what_is_wrong_is_seen(name, kind, change, monkeypatch):
    monkeypatch.setattr(defences, kind, change(getattr(defences, kind)))
    assert row_of(name)["verdict"] == "different"


def test_the_threshold_of_mi_combined_divides_the_images(monkeypatch):
    seen = []
    kind = defences.MixupInference

    def noted(*args, **options):
        seen.append(kind(*args, **options))
        return seen[-1]

    monkeypatch.setattr(defences, "MixupInference", noted)
    row_of("MI-Combined log-probabilities vs paper")
    defence = kind(seen[-1].model, (seen[-1].pool, seen[-1].pool_labels), "MI-Combined", seed=3)
    scores = defence.detection_score(some_images(N).double()).detach().numpy()
    assert np.count_nonzero(scores > seen[-1].threshold) == N // 2
