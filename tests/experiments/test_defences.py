"""The study of defences: what is run on whom, and the table of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import small_net, some_images
from store_for_tests import made_up

from guardians.attacks import PGD
from guardians.attacks.registry import Spec
from guardians.data import Dataset
from guardians.experiments import study as study_module
from guardians.experiments.defences import DEFENCE_COLUMNS, as_markdown, defences_table
from guardians.experiments.store import Store
from guardians.experiments.study import Study, perform_study
from guardians.experiments.subject import defended
from guardians.statistics import wilson_interval
from guardians.tables import read_csv

INF = float("inf")
N = 12
SMALL, OTHER = "models_for_tests:small_net", "other"


def the_images(split="test", n=N):
    images = (255 * some_images(N, seed=int(split == "train"))).round().to(torch.uint8)
    with torch.no_grad():
        labels = small_net()(images.float() / 255).argmax(1) if split == "test" else torch.arange(N) % 5
    return Dataset(images[:n], labels[:n], tuple("abcde"), f"noise ({split})")


@pytest.fixture(autouse=True)
def other_model(monkeypatch):
    load = study_module.load_model
    monkeypatch.setattr(
        study_module, "load_model", lambda name, **options: small_net(1) if name == OTHER else load(name, **options)
    )
    monkeypatch.setattr(study_module, "load_data", lambda root, split, n, **_: the_images(split, n))


def perform(subjects, runs, out, **options):
    runs = [{"implementations": ["native"], "batch_size": 8, **run} for run in runs]
    frame, interrupted = perform_study(
        Study("title", "defences", subjects, runs, n=N, **options), the_images(), out, verbose=False
    )
    assert not interrupted
    return frame.set_index(["defence", "attack"])


RSE = {"model": SMALL, "defence": "rse(sigma_init=0.3, n=3)"}
RSE_NAME = "rse(n=3, search_passes=2, sigma_init=0.3)"


def test_what_is_random_has_several_seeds(tmp_path):
    runs = [{"label": "FGSM", "attacks": ["FGSM"]}, {"label": "once", "attacks": ["PGD-2"], "seeds": 1}]
    frame = perform([SMALL, RSE], runs, tmp_path, seeds=3)
    assert frame["seeds"].to_dict() == {
        ("none", "FGSM"): 1,
        ("none", "once"): 1,
        (RSE_NAME, "FGSM"): 3,
        (RSE_NAME, "once"): 1,
    }
    written = read_csv(tmp_path / "defences.csv")
    assert list(written.columns) == list(DEFENCE_COLUMNS)
    assert len(Store(tmp_path).runs()) == 6
    assert (tmp_path / "defences.md").read_text().startswith("| model | defence | FGSM | once |\n")


def test_images_are_made_on_the_source_and_judged_by_the_subject(tmp_path):
    transfer = {"label": "transfer", "attacks": ["PGD-5"], "source": OTHER, "eps": 0.1, "eps_step": 0.05}
    frame = perform([SMALL, OTHER], [transfer | {"early_stop": False}], tmp_path)
    assert len(frame) == 1  # not of what is its own source
    data, net = the_images(), small_net()
    x, y = data.as_floats(), data.labels
    x_adv = PGD(small_net(1), eps=0.1, eps_step=0.05, max_iter=5, verbose=False)(x, y)
    expected = ((net(x).argmax(1) == y) & (net(x_adv).argmax(1) == y)).float().mean()
    assert 0 < expected < 1
    assert frame["accuracy"].iloc[0] == pytest.approx(expected.item())


def test_the_network_behind_a_defence_is_a_source(tmp_path):
    oblivious = {"label": "oblivious", "attacks": ["PGD-3"], "source": "none", "eps": 0.05}
    few = {"label": "single", "attacks": ["PGD-3"], "source": "rse(sigma_init=0.3, n=3, search_passes=1)"}
    frame = perform([SMALL, RSE], [oblivious, few], tmp_path)
    assert list(frame.index) == [("none", "single"), (RSE_NAME, "oblivious"), (RSE_NAME, "single")]
    sources = {run["options"]["source"] for run in Store(tmp_path).runs()}
    assert sources == {
        defended("a", small_net(), defence).digest for defence in ("none", "rse(sigma_init=0.3, n=3, search_passes=1)")
    }


def test_runs_are_of_the_defences_that_they_name(tmp_path, caplog):
    subjects = [SMALL, RSE, {"model": SMALL, "defence": "mi-ol(num_samples=2)"}]
    runs = [
        {"label": "not none", "attacks": ["FGSM"], "defences": ["rse", "mi-ol"]},
        {"label": "made for it", "attacks": ["AveragedMixturePGD-3(num_samples=2)"]},
    ]
    frame = perform(subjects, runs, tmp_path)
    mixup = "mi-ol(num_samples=2, search_passes=2)"
    assert list(frame.index) == [(RSE_NAME, "not none"), (mixup, "not none"), (mixup, "made for it")]
    assert 2 * 3 <= frame.loc[(mixup, "made for it"), "backward_per_image"] < 2 * 4  # of 2 mixtures, and probes
    assert "AveragedMixturePGD-3 is made for mi-pl, mi-ol, mi-combined, not for the defence none" in caplog.text


# The table


def standing(count, n):
    return np.arange(n) < count


IN_INF, IN_L2, SMALLEST = Spec("FGSM", INF, 0.03), Spec("FGSM", 2, 0.5), Spec("DDN", 2, params={"steps": 5})


def test_seeds_are_one_row(tmp_path):
    rows = [("a", "FGSM", IN_INF, standing(count, 20), {"seed": seed}) for seed, count in enumerate((10, 14, 6))]
    rows += [("a", "clean", None, standing(18, 20))]
    frame = defences_table(*made_up(tmp_path, rows)).set_index("attack")
    assert frame["seeds"].tolist() == [3, 1]
    assert frame["accuracy"].tolist() == pytest.approx([0.5, 0.9])
    for label, successes in (("FGSM", 10), ("clean", 18)):
        assert tuple(frame.loc[label, ["accuracy_low", "accuracy_high"]]) == pytest.approx(
            wilson_interval(successes, 20)
        )
    assert frame.loc["FGSM", ["seed_sd", "seed_min", "seed_max"]].tolist() == pytest.approx([0.2, 0.3, 0.7])
    assert np.isnan(frame.loc["clean", "seed_sd"])
    assert frame["forward_per_image"].tolist() == [2, 2]


@pytest.mark.parametrize(("l2", "accuracy"), [(0.4, 0.25), (0.5, 0.25), (0.6, 1.0)])
def test_the_smallest_perturbation_counts_within_the_radius_of_the_others(tmp_path, l2, accuracy):
    rows = [("a", "FGSM", IN_L2, standing(10, 20)), ("a", "DDN", SMALLEST, standing(5, 20), {"l2": l2})]
    frame = defences_table(*made_up(tmp_path, rows)).set_index("attack")
    assert frame.loc["DDN", "accuracy"] == accuracy
    assert frame.loc["DDN", "eps"] == 0.5


@settings(max_examples=20)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_flattering_is_what_another_attack_in_the_ball_refutes(tmp_path_factory, counts):
    specs = [IN_INF, Spec("PGD", INF, 0.03, params={"steps": 2}), IN_L2, Spec("PGD", 2, 0.5, params={"steps": 2})]
    rows = [("a", str(i), spec, standing(count, 40)) for i, (spec, count) in enumerate(zip(specs, counts, strict=True))]
    frame = defences_table(*made_up(tmp_path_factory.mktemp("store"), rows))
    intervals = [wilson_interval(count, 40) for count in counts]
    for i, flags in enumerate(frame["flags"]):
        assert flags == ("flattering" if intervals[i][0] > intervals[i ^ 1][1] else "")


def test_the_table_for_people(tmp_path):
    rows = [("a", "clean", None, standing(90, 100))]
    rows += [("b", "FGSM", IN_INF, standing(count, 100), {"seed": seed}) for seed, count in enumerate((50, 60))]
    rows += [("b", "PGD", Spec("PGD", INF, 0.03, params={"steps": 2}), standing(10, 100))]
    assert as_markdown(defences_table(*made_up(tmp_path, rows))).splitlines() == [
        "| model | defence | clean | FGSM | PGD |",
        "| --- | --- | --- | --- | --- |",
        "| a | none | 90.0 |  |  |",
        "| b | none |  | 55.0 ± 7.1* | 10.0 |",
    ]
