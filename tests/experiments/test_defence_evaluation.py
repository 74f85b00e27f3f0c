"""Robust accuracy of defences: what is attacked, by what, who answers, and what the tables say of it."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import small_net, snapshot, some_images
from torch import nn

from guardians.attacks import PGD, CarliniWagnerL2
from guardians.attacks.norms import lp_norm
from guardians.data import Dataset
from guardians.defences import MixupInference, RandomSelfEnsemble
from guardians.engine.search import bfloat16_is_native
from guardians.engine.victim import predicted_labels
from guardians.experiments import defences
from guardians.experiments.defences import (
    ATTACKS,
    DEFENCE_COLUMNS,
    RUN_COLUMNS,
    as_markdown,
    attacks_on,
    bundled,
    evaluate,
    summarise,
)
from guardians.experiments.subject import Subject
from guardians.models import digest
from guardians.statistics import wilson_interval
from guardians.tables import read_csv

N, SEEDS = 8, 2
OF_FIXED = ["clean", "transfer", "FGSM", "PGD-10", "PGD-40", "adaptive", "PGD-L2", "C&W"]
OF_RANDOM = ["clean", "transfer", "oblivious", "FGSM", "PGD-10", "PGD-40", "EOT-PGD", "adaptive", "PGD-L2", "C&W"]
BASE = small_net()


def random_self_ensemble(seed, passes):
    return RandomSelfEnsemble(BASE, 0.1, 0.1, passes, seed=seed)


def mixup_inference(seed, passes):
    pool = some_images(10, seed=77), torch.arange(10) % 5
    return MixupInference(BASE, pool, "MI-PL", num_samples=passes, seed=seed)


FIXED = Subject("fixed", BASE)
RSE = Subject("rse", BASE, random_self_ensemble)
MI = Subject("mi", BASE, mixup_inference)


def make_data():
    """Images of which the model gets all but the first two right."""
    images = (255 * some_images(N)).round().to(torch.uint8)
    labels = predicted_labels(BASE, images.float() / 255)
    return Dataset(images, (labels + (torch.arange(N) < 2)) % 5, tuple("abcde"), "noise")


@pytest.fixture
def data():
    return make_data()


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"PASSES": 3, "SEARCH_PASSES": 2, "EOT_SAMPLES": 2}.items():
            patch.setattr(defences, name, value)
        patch.setattr(defences, "CarliniWagnerL2", partial(CarliniWagnerL2, max_iter=5, binary_search_steps=2))
        yield


def run(out, defended=(FIXED, RSE, MI), data=None, **options):
    options = {"surrogate": small_net(1), "seeds": SEEDS, "batch_size": 5, "verbose": False, **options}
    return evaluate(defended, make_data() if data is None else data, out, **options)


def seeds_of(attack):
    """Of a randomised defence."""
    return 1 if attack in ("PGD-L2", "C&W") else SEEDS


def runs_in(out):
    """The rows of the single runs, without what differs from run to run."""
    rows = read_csv(out / "defences_runs.csv").drop(columns="seconds")
    return rows.sort_values(["defence", "attack", "seed"], ignore_index=True)


def outcomes_in(out):
    return {path.name: pd.read_csv(path, index_col="index") for path in (out / "defences_outcomes").glob("*")}


def outcome(out, name, attack, seed=0):
    (found,) = (
        table
        for file, table in outcomes_in(out).items()
        if file.startswith(f"{name}-{attack.replace('&', '')}-{seed}-")
    )
    return found


@pytest.fixture(scope="module")
def whole(_quick, tmp_path_factory):
    """A folder with everything run, and the summary that came with it."""
    out, before = tmp_path_factory.mktemp("whole"), snapshot(BASE)
    summary = run(out)
    assert snapshot(BASE) == before
    return out, summary


# The tables


def test_the_attacks_are_those_that_tell_something_new():
    assert set(OF_RANDOM) == set(ATTACKS)
    assert attacks_on(FIXED) == OF_FIXED
    assert attacks_on(RSE) == attacks_on(MI) == OF_RANDOM
    standard = Subject("standard", BASE)
    assert attacks_on(standard) == [attack for attack in OF_FIXED if attack != "transfer"]
    assert attacks_on(Subject("standard", BASE, mixup_inference)) == [a for a in OF_RANDOM if a != "transfer"]


def test_a_row_for_each_seed_and_only_one_where_nothing_is_random(whole):
    rows = read_csv(whole[0] / "defences_runs.csv")
    assert list(rows.columns) == list(RUN_COLUMNS)
    found = set(rows[["defence", "attack", "seed"]].itertuples(index=False, name=None))
    expected = {("fixed", attack, 0) for attack in OF_FIXED}
    expected |= {
        (name, attack, seed) for name in ("rse", "mi") for attack in OF_RANDOM for seed in range(seeds_of(attack))
    }
    assert found == expected
    assert len(rows) == len(expected)
    assert rows["seed"].is_monotonic_increasing  # so that a run that is cut short has all defences
    assert set(rows["n"]) == {N}
    assert set(rows["data"]) == {make_data().identity}
    params = rows.set_index("attack")["params"].map(json.loads)
    is_fixed = (rows["defence"] == "fixed").to_numpy()
    of_random = {"passes": 3, "search_passes": 2, "eot_samples": 2}
    assert all(found.items() >= of_random.items() for found in params[~is_fixed])
    inf_norm = {"eps": 8 / 255, "eps_step": 2 / 255}
    expected = {"clean": {}, "FGSM": {"eps": 8 / 255}, "PGD-L2": {"eps": 0.5}, "C&W": {"eps": 0.5}}
    expected["adaptive"] = {**inf_norm, "loss": "margin", "num_random_init": 5}
    expected["transfer"] = {**inf_norm, "surrogate": digest(small_net(1))}
    assert all(found == expected.get(attack, inf_norm) for attack, found in params[is_fixed].items())
    assert (rows.loc[rows["attack"] == "clean", "seconds"] == 0).all()
    assert (rows.loc[rows["attack"] != "clean", "seconds"] > 0).all()


def test_passes_are_counted(whole):
    rows = runs_in(whole[0]).set_index(["attack", "defence", "seed"]).sort_index()
    counts = ["forward_per_image", "backward_per_image", "judgement_per_image"]
    assert (rows.loc["clean", counts] == 0).all(axis=None)
    assert (rows.loc["FGSM", counts] == [1, 1, 0]).all(axis=None)
    eot = rows.loc["EOT-PGD", "backward_per_image"]
    assert (eot > rows.loc["PGD-40", "backward_per_image"].drop("fixed")).all()
    assert (rows.loc["PGD-10", "backward_per_image"] <= 10 + 1).all()


def test_the_summary_has_a_row_for_each_defence_and_attack(whole):
    out, summary = whole
    assert list(summary.columns) == list(DEFENCE_COLUMNS)
    pairs = [*(("fixed", attack) for attack in OF_FIXED), *((name, a) for name in ("rse", "mi") for a in OF_RANDOM)]
    assert list(summary[["defence", "attack"]].itertuples(index=False, name=None)) == pairs
    assert summary["seeds"].tolist() == [1 if name == "fixed" else seeds_of(attack) for name, attack in pairs]
    pd.testing.assert_frame_equal(summary, summarise(read_csv(out / "defences_runs.csv")))
    written = pd.read_csv(out / "defences.csv", dtype={"flags": str}).fillna({"flags": ""})
    pd.testing.assert_frame_equal(written, summary, check_dtype=False)


def test_outcomes_are_those_of_the_rows(whole):
    out, found = whole[0], outcomes_in(whole[0])
    rows = read_csv(out / "defences_runs.csv")
    assert len(found) == len(rows)
    for row in rows.itertuples():
        table = outcome(out, row.defence, row.attack, row.seed)
        assert list(table.columns) == ["label", "stands", "l2"]
        assert table.index.tolist() == list(range(N))
        assert table["label"].tolist() == make_data().labels.tolist()
        assert table["stands"].isin([0, 1]).all()
        assert table["stands"].mean() == row.accuracy
        if row.attack not in ("clean", "C&W"):
            low, high = (table["l2"].quantile(0.5, interpolation=kind) for kind in ("lower", "higher"))
            assert low <= row.l2_median <= high
            largest = 0.5 if row.attack == "PGD-L2" else 8 / 255 * (3 * 8 * 8) ** 0.5
            assert (table["l2"] <= largest * (1 + 1e-6)).all()
    assert rows["accuracy"].nunique() > 2


def test_attacks_do_what_they_are_called(whole):
    accuracy = whole[1].set_index(["defence", "attack"])["accuracy"]
    assert accuracy["fixed", "clean"] == (N - 2) / N
    assert accuracy["fixed", "PGD-40"] <= accuracy["fixed", "PGD-10"] <= accuracy["fixed", "clean"]
    assert accuracy["fixed", "adaptive"] <= accuracy["fixed", "PGD-40"] < accuracy["fixed", "clean"]
    for name in ("rse", "mi"):
        assert accuracy[name, "EOT-PGD"] < accuracy[name, "clean"]


# Resuming


def test_what_is_finished_is_not_run_again(whole, tmp_path, monkeypatch):
    shutil.copytree(whole[0], tmp_path / "copy")

    def never(*_):
        raise AssertionError("it ran again")

    monkeypatch.setattr(defences, "_measure", never)
    before = {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*.csv")}
    pd.testing.assert_frame_equal(run(tmp_path / "copy"), whole[1])
    assert {path: path.read_bytes() for path in (tmp_path / "copy").rglob("*.csv")} == before
    with pytest.raises(AssertionError, match="it ran again"):
        run(tmp_path / "copy", seeds=SEEDS + 1)


def test_an_interrupted_run_goes_on(whole, tmp_path, monkeypatch):
    attacks, done, measure = ("clean", "FGSM", "PGD-10"), [], defences._measure

    def count(defended, attack, x, y, surrogate, seed, batch_size, found):
        if len(done) == 4:
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append((defended.name, attack, seed))
        return measure(defended, attack, x, y, surrogate, seed, batch_size, found)

    monkeypatch.setattr(defences, "_measure", count)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, attacks=attacks)
    assert len(read_csv(tmp_path / "defences_runs.csv")) == 4
    with (tmp_path / "defences_runs.csv").open("a") as file:
        file.write("rse,FG")  # as a kill leaves it
    run(tmp_path, attacks=attacks)
    done.remove("interrupted")
    assert len(done) == len(set(done)) == 3 + 2 * 3 * SEEDS
    expected = runs_in(whole[0])
    expected = expected[expected["attack"].isin(attacks)].reset_index(drop=True)
    pd.testing.assert_frame_equal(runs_in(tmp_path), expected)
    found, complete = outcomes_in(tmp_path), outcomes_in(whole[0])
    assert len(found) == len(expected)
    for name, table in found.items():
        pd.testing.assert_frame_equal(table, complete[name])


def test_names_do_not_leave_the_folder_of_outcomes(tmp_path):
    run(tmp_path / "out", [Subject("../../x", BASE), Subject("=a/b", BASE)], attacks=["clean"], seeds=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(outcomes_in(tmp_path / "out")) == 2
    assert runs_in(tmp_path / "out")["defence"].tolist() == ["../../x", "=a/b"]


def test_the_same_seeds_give_the_same_numbers(whole, tmp_path):
    attacks = ("oblivious", "EOT-PGD", "adaptive", "C&W")
    torch.manual_seed(1234)
    run(tmp_path, (MI, RSE), attacks=attacks, seeds=1)
    expected = runs_in(whole[0])
    chosen = expected["attack"].isin(attacks) & (expected["seed"] == 0) & (expected["defence"] != "fixed")
    pd.testing.assert_frame_equal(runs_in(tmp_path), expected[chosen].reset_index(drop=True))
    for name, table in outcomes_in(tmp_path).items():
        pd.testing.assert_frame_equal(table, outcomes_in(whole[0])[name])


def test_another_seed_draws_anew(whole):
    for attack in ("FGSM", "EOT-PGD", "adaptive"):
        for name in ("rse", "mi"):
            first, second = (outcome(whole[0], name, attack, seed)["l2"] for seed in range(2))
            assert not first.equals(second)


def with_pool(seed):
    pool = some_images(10, seed=seed), torch.arange(10) % 5
    return Subject("mi", BASE, lambda seed, passes: MixupInference(BASE, pool, num_samples=passes, seed=seed))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((FIXED, {}), (Subject("fixed", small_net(2)), {})),
        ((RSE, {}), (Subject("rse", BASE, lambda seed, n: RandomSelfEnsemble(BASE, 0.2, 0.1, n, seed=seed)), {})),
        ((with_pool(1), {}), (with_pool(2), {})),
        ((FIXED, {"surrogate": small_net(1)}), (FIXED, {"surrogate": small_net(2)})),
    ],
    ids=["weights", "noise", "pool", "surrogate"],
)
def test_what_changes_the_answer_is_run_again_whatever_its_name(first, second, tmp_path):
    frames = [
        run(tmp_path, [defended], attacks=["clean", "transfer"], seeds=1, **options)
        for defended, options in (first, second, first)
    ]
    pd.testing.assert_frame_equal(frames[2], frames[0])
    assert len(frames[1]) == 2  # without those of the other under this name
    on_disk = runs_in(tmp_path)
    new = 1 if second[1] else 2  # another surrogate is nothing to clean images
    assert len(on_disk) == len(outcomes_in(tmp_path)) == 2 + new
    run(tmp_path / "alone", [second[0]], attacks=["clean", "transfer"], seeds=1, **second[1])
    for name, table in outcomes_in(tmp_path / "alone").items():
        pd.testing.assert_frame_equal(table, outcomes_in(tmp_path)[name])


@pytest.mark.parametrize(
    ("constant", "attack"),
    [("EPS", "FGSM"), ("EPS_STEP", "PGD-10"), ("L2_RADIUS", "C&W"), ("RANDOM_STARTS", "adaptive")],
)
def test_other_constants_are_run_again(constant, attack, tmp_path, monkeypatch):
    first = run(tmp_path, [FIXED], attacks=[attack])
    monkeypatch.setattr(defences, constant, getattr(defences, constant) * 2)
    second = run(tmp_path, [FIXED], attacks=[attack])
    assert len(runs_in(tmp_path)) == 2
    assert first["params"].item() != second["params"].item()


def test_a_larger_ball_does_not_make_a_smaller_one_flattering():
    rows = made_up([("a", "FGSM", 0, 0.9), ("a", "PGD-40", 0, 0.5), ("a", "PGD-10", 0, 0.3)])
    rows["params"] = [json.dumps({"eps": eps}) for eps in (0.1, 0.1, 0.2)]
    assert summarise(rows)["flags"].tolist() == ["flattering", "", ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["FGSM", "PGD-7"]}, r"attacks=\['PGD-7'\]: unknown; known are clean, "),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": 1.5}, "seeds=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_arguments_are_errors_before_any_work(options, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# What is attacked, and who answers


@pytest.mark.parametrize("attack", ["transfer", "oblivious"])
def test_images_are_made_on_another_model(whole, attack):
    x, y = make_data().as_floats(), make_data().labels
    model = small_net(1) if attack == "transfer" else BASE
    precision = "bfloat16" if bfloat16_is_native(torch.device("cpu")) else "auto"
    pgd = PGD(
        model, precision=precision, eps=8 / 255, eps_step=2 / 255, max_iter=40, seed=0, batch_size=5, verbose=False
    )
    x_adv = pgd(x, y)
    l2 = lp_norm(x_adv - x, 2).flatten().tolist()
    for name in ("rse", "mi"):
        assert outcome(whole[0], name, attack)["l2"].tolist() == pytest.approx(l2, rel=1e-6)
    if attack == "transfer":
        table = outcome(whole[0], "fixed", attack)
        stands = (predicted_labels(BASE, x) == y) & (predicted_labels(BASE, x_adv) == y)
        assert table["l2"].tolist() == pytest.approx(l2, rel=1e-6)
        assert table["stands"].tolist() == stands.int().tolist()


@pytest.mark.parametrize("attack", ["FGSM", "EOT-PGD", "adaptive", "C&W"])
@pytest.mark.parametrize("defended", [RSE, MI], ids=["RSE", "MI"])
def test_answers_are_draws_that_no_attack_has_seen(defended, attack, tmp_path, monkeypatch):
    attacked, answering = [], []
    make_attack, predict = defences._attack, defences.predicted_labels

    def attack_of(*arguments):
        found = make_attack(*arguments)
        attacked.append(found.victim.module)
        return found

    def labels_of(module, *arguments):
        answering.append(module)
        return predict(module, *arguments)

    monkeypatch.setattr(defences, "_attack", attack_of)
    monkeypatch.setattr(defences, "predicted_labels", labels_of)
    run(tmp_path, [defended], attacks=[attack])
    passes = "n" if defended is RSE else "num_samples"
    single = defended is RSE and attack == "adaptive"
    assert [getattr(module, passes) for module in attacked] == [1 if single else 2] * seeds_of(attack)
    assert [getattr(module, passes) for module in answering] == [3] * 2 * seeds_of(attack)
    assert all(type(module) is type(attacked[0]) is not type(BASE) for module in answering)
    assert len({module.seed for module in attacked + answering}) == 3 * seeds_of(attack)


@pytest.mark.parametrize(
    ("defended", "attack", "kind", "expected"),
    [
        (FIXED, "PGD-10", "ProjectedGradientDescent", {"max_iter": 10, "num_random_init": 0, "early_stop": True}),
        (FIXED, "adaptive", "_MarginPGD", {"max_iter": 40, "num_random_init": 5, "early_stop": True}),
        (FIXED, "transfer", "ProjectedGradientDescent", {"max_iter": 40, "early_stop": False, "batch_size": 5}),
        (RSE, "oblivious", "ProjectedGradientDescent", {"max_iter": 40, "early_stop": False, "eot_samples": 1}),
        (RSE, "PGD-40", "ProjectedGradientDescent", {"max_iter": 40, "eot_samples": 1, "batch_size": 5}),
        (MI, "EOT-PGD", "ProjectedGradientDescent", {"max_iter": 20, "eot_samples": 2, "batch_size": 10}),
        (RSE, "adaptive", "ProjectedGradientDescent", {"max_iter": 20, "eot_samples": 4, "num_random_init": 1}),
        (MI, "adaptive", "AveragedMixturePGD", {"eps_step": 2 / 255, "batch_size": 5}),
        (FIXED, "FGSM", "FastGradientMethod", {"early_stop": False, "num_random_init": 0}),
        (FIXED, "PGD-L2", "ProjectedGradientDescent", {"norm": 2, "eps": 0.5, "max_iter": 20, "eot_samples": 1}),
        (RSE, "PGD-L2", "ProjectedGradientDescent", {"norm": 2, "eps": 0.5, "eot_samples": 2, "batch_size": 10}),
        (MI, "C&W", "CarliniWagnerL2", {"batch_size": 5}),
    ],
)
def test_attacks_are_as_described(defended, attack, kind, expected):
    found = defences._attack(defended, attack, small_net(1), 7, 5)
    assert type(found).__name__ == kind
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.seed == 7
    if attack not in ("PGD-L2", "C&W"):
        assert found.eps == 8 / 255


def test_only_images_that_are_right_when_clean_count(data, tmp_path, monkeypatch):
    order = torch.arange(N).roll(1)
    x, predicted = data.as_floats(), predicted_labels(BASE, data.as_floats())
    labels = predicted[order]
    monkeypatch.setattr(defences, "_attack", lambda *_: lambda x, y: x[order])  # now all are right
    right = predicted == labels
    assert 0 < right.sum() < N
    assert (predicted_labels(BASE, x[order]) == labels).all()
    other = Dataset(data.images, labels, data.classes, "noise")
    summary = run(tmp_path, [FIXED], other, attacks=["FGSM"])
    assert summary["accuracy"].tolist() == [right.double().mean().item()]
    assert outcome(tmp_path, "fixed", "FGSM")["stands"].tolist() == right.int().tolist()


class FirstPixel(nn.Module):
    """Label 1 where the first pixel is above a half, else 0."""

    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        excess = x[:, 0, 0, 0] - self.threshold
        return torch.stack([-excess, excess], 1)


MOVES = {  # first pixel, and how far it is moved: of label 0, whether it stands in any attack, and in C&W
    "fooled within the radius": (100, 0.4, 0, 0),
    "fooled, but too far away": (50, 0.6, 0, 1),
    "fooled, but much too far away": (5, 0.7, 0, 1),
    "not fooled": (100, 0.05, 1, 1),
    "not fooled, far away": (10, 0.45, 1, 1),
    "wrong when clean": (200, 0.1, 0, 0),
    "wrong when clean, moved far": (130, 0.45, 0, 0),
    "wrong when clean, then right": (140, -0.51, 0, 0),
}


@pytest.mark.parametrize("attack", ["C&W", "FGSM"])
def test_carlini_wagner_has_to_stay_within_its_radius(attack, tmp_path, monkeypatch):
    pixels, moves, stands, stands_cw = zip(*MOVES.values(), strict=True)
    images = torch.full((len(MOVES), 3, 8, 8), 128, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(pixels)
    data = Dataset(images, torch.zeros(len(MOVES), dtype=torch.int64), ("low", "high"), "pixels")

    def moved(x, y):
        x = x.clone()
        x[:, 0, 0, 0] += torch.tensor(moves)
        return x

    monkeypatch.setattr(defences, "_attack", lambda *_: moved)
    summary = run(tmp_path, [Subject("pixel", FirstPixel())], data, attacks=[attack])
    expected = stands_cw if attack == "C&W" else stands
    assert outcome(tmp_path, "pixel", attack)["stands"].tolist() == list(expected)
    assert summary["accuracy"].item() == pytest.approx(np.mean(expected))
    if attack == "C&W":
        fooled = np.array(pixels) / 255 + moves > 0.5
        assert summary["l2_median"].item() == pytest.approx(np.median(np.abs(moves)[fooled]), rel=1e-5)


def test_the_median_of_an_even_number_is_between_the_two_in_the_middle(whole):
    row = read_csv(whole[0] / "defences_runs.csv").set_index(["defence", "attack", "seed"]).loc["fixed", "PGD-10", 0]
    assert row["l2_median"] == pytest.approx(outcome(whole[0], "fixed", "PGD-10")["l2"].median(), rel=1e-6)


def test_what_fools_nothing_has_no_length(tmp_path, monkeypatch, data):
    right = Dataset(data.images[2:], data.labels[2:], data.classes, "noise")
    monkeypatch.setattr(defences, "_attack", lambda *_: lambda x, y: x)
    summary = run(tmp_path, [FIXED], right, attacks=["C&W"])
    assert summary["accuracy"].item() == 1
    assert summary["l2_median"].isna().all()


# The summary


def made_up(rows, n=100):
    """Rows of the single runs, from (defence, attack, seed, accuracy)."""
    return pd.DataFrame(
        [
            dict.fromkeys(RUN_COLUMNS, 0)
            | {"defence": defence, "attack": attack, "data": "noise", "n": n, "seed": seed, "accuracy": accuracy}
            | {"params": "{}"}
            | {"l2_median": 10 * accuracy, "forward_per_image": seed, "seconds": 2 * seed}
            for defence, attack, seed, accuracy in rows
        ],
        columns=list(RUN_COLUMNS),
    )


def test_a_summary_is_over_the_seeds():
    rows = [("b", "FGSM", 0, 0.5), ("a", "clean", 0, 0.75), ("b", "clean", 0, 0.9)]
    rows += [("b", "FGSM", 1, 0.7), ("b", "FGSM", 2, 0.3)]
    frame = summarise(made_up(rows, n=20))
    assert list(frame.columns) == list(DEFENCE_COLUMNS)
    assert list(frame[["defence", "attack"]].itertuples(index=False, name=None)) == [
        ("b", "FGSM"),
        ("a", "clean"),
        ("b", "clean"),
    ]
    assert frame["seeds"].tolist() == [3, 1, 1]
    assert frame["n"].tolist() == [20, 20, 20]
    assert frame["accuracy"].tolist() == pytest.approx([0.5, 0.75, 0.9])
    for low, high, successes in zip(frame["accuracy_low"], frame["accuracy_high"], (10, 15, 18), strict=True):
        assert (low, high) == pytest.approx(wilson_interval(successes, 20))
    assert frame["seed_sd"].iloc[0] == pytest.approx(0.2)
    assert frame["seed_sd"].iloc[1:].isna().all()
    assert frame["seed_min"].tolist() == pytest.approx([0.3, 0.75, 0.9])
    assert frame["seed_max"].tolist() == pytest.approx([0.7, 0.75, 0.9])
    assert frame["l2_median"].iloc[0] == pytest.approx(5)
    assert frame["forward_per_image"].tolist() == [1, 0, 0]
    assert frame["seconds"].tolist() == [2, 0, 0]


IN_INF, IN_L2 = ("FGSM", "PGD-40", "adaptive"), ("PGD-L2", "C&W")


def test_flattering_is_what_another_attack_in_the_ball_refutes():
    accuracies = {"clean": 1.0, "FGSM": 0.9, "PGD-10": 0.52, "PGD-40": 0.5, "EOT-PGD": 0.64, "PGD-L2": 0.0}
    others = {"clean": 1.0, "FGSM": 0.9, "PGD-L2": 0.1, "C&W": 0.4}
    rows = [("a", attack, 0, accuracy) for attack, accuracy in accuracies.items()]
    rows += [("b", attack, 0, accuracy) for attack, accuracy in others.items()]
    flags = summarise(made_up(rows)).set_index(["defence", "attack"])["flags"]
    assert flags[flags != ""].to_dict() == {("a", "FGSM"): "flattering", ("b", "C&W"): "flattering"}


@settings(max_examples=30)
@given(st.fixed_dictionaries({attack: st.integers(0, 40) for attack in ("clean", *IN_INF, *IN_L2)}))
def test_flags_are_where_intervals_do_not_meet(successes):
    rows = [("a", attack, 0, count / 40) for attack, count in successes.items()]
    flags = summarise(made_up(rows, n=40)).set_index("attack")["flags"].to_dict()
    intervals = {attack: wilson_interval(count, 40) for attack, count in successes.items()}
    for attack, (low, _) in intervals.items():
        ball = next((ball for ball in (IN_INF, IN_L2) if attack in ball), ())
        assert flags[attack] == ("flattering" if any(low > intervals[other][1] for other in ball) else "")


def test_the_table_of_the_readme():
    rows = [("rse", "FGSM", 0, 0.5), ("standard", "clean", 0, 0.9), ("rse", "FGSM", 1, 0.6), ("rse", "PGD-40", 0, 0.1)]
    assert as_markdown(summarise(made_up(rows, n=100))).splitlines() == [
        "| model or defence | " + " | ".join(ATTACKS) + " |",
        "| --- " * 11 + "|",
        "| standard | 90.0 |  |  |  |  |  |  |  |  |  |",
        "| rse |  |  |  | 55.0 ± 7.1* |  | 10.0 |  |  |  |  |",
    ]


# The bundled models


def test_a_bundled_model_comes_with_its_defence(data, monkeypatch):
    card = {"defence": {"sigma_init": 0.3, "sigma_inner": 0.125}}
    asked = []
    monkeypatch.setattr(defences, "load_model", lambda name, device: asked.append(name) or BASE)
    monkeypatch.setattr(defences, "model_card", lambda name: asked.append(name) or card)
    images = torch.cat([data.images, data.images])[:10]
    pool = Dataset(images, torch.arange(10) % 5, data.classes, "noise")
    plain, rse, mixup = (bundled(name, pool, prefix="net") for name in ("pgd-at", "rse", "mixup+MI-OL"))
    assert asked == ["net-pgd-at", "net-rse", "net-rse", "net-mixup"]
    assert plain.module(3, 4) is plain.base is BASE
    assert repr(rse.module(3, 4)).startswith("RandomSelfEnsemble(\n  sigma_init=0.3, sigma_inner=0.125, n=4")
    assert rse.module(3, 4).seed == mixup.module(3, 4).seed == 3
    module = mixup.module(3, 4)
    assert (type(module), module.method, module.num_samples) == (MixupInference, "MI-OL", 4)
    assert torch.equal(module.pool.flatten(1).sum(1).sort().values, pool.as_floats().flatten(1).sum(1).sort().values)


# The labels that a module gives


@pytest.mark.parametrize("batch_size", [1, 5, N, 100])
def test_predicted_labels_are_the_same_in_batches_of_any_size(batch_size, data):
    x = data.as_floats()
    with torch.no_grad():
        assert torch.equal(predicted_labels(BASE, x, batch_size), BASE(x).argmax(1))
    defended = random_self_ensemble(3, 2)
    expected = predicted_labels(random_self_ensemble(3, 2), x)
    assert torch.equal(predicted_labels(defended, x, batch_size), expected)


def test_predicted_labels_leave_the_module_as_it_was(data):
    net, x = small_net(), data.as_floats()
    expected = predicted_labels(net, x)
    net.train()
    net.features[1].eval()
    net.head.bias.requires_grad_(False)
    before = snapshot(net)
    labels = predicted_labels(net, x, 3)
    assert torch.equal(labels, expected)  # in evaluation mode
    assert not labels.requires_grad
    assert snapshot(net) == before
    with pytest.raises(RuntimeError):
        predicted_labels(net, x[:, :1])
    assert snapshot(net) == before
