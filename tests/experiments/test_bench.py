import copy
import json
import logging
import subprocess
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from guardians.attacks import PGD, Attack
from guardians.data import Dataset
from guardians.experiments import run as run_module
from guardians.experiments.bench import run_benchmark, summarise
from guardians.experiments.store import OUTCOME_COLUMNS, Store
from guardians.tables import BENCHMARK_COLUMNS, read_csv
from guardians.toolkits import build

pytest.importorskip("torchattacks")
pytest.importorskip("foolbox")


def run_quietly(*arguments, **options):
    """The rows but for the unions."""
    frame = run_benchmark(*arguments, **{"model_name": "tiny", "verbose": False, "batch_size": 8} | options)
    kept = without_unions(frame)
    kept.attrs = frame.attrs
    return kept


def without_unions(frame):
    return frame[frame["attack"] != "union"].reset_index(drop=True)


def written(out):
    return without_unions(read_csv(out / "benchmark.csv"))


def assert_same(first, second):
    pd.testing.assert_frame_equal(first, second, check_dtype=False)


OF_IMAGES = ["attack", "implementation", "n", "clean_accuracy", "robust_accuracy", "l2_mean", "linf_max", "flags"]
FIGURES = [name for name in BENCHMARK_COLUMNS if name not in ("seconds", "images_per_second", "peak_memory_mb")]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


@pytest.fixture
def data(model):
    images = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    labels[:4] = (labels[:4] + 1) % 4
    return Dataset(images, labels, tuple("abcd"), "random images")


def constant_data(n=6):
    return Dataset(
        torch.full((n, 3, 8, 8), 128, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ("a", "b"), "grey"
    )


@pytest.fixture
def replace_attack(monkeypatch):
    """Let `benchmark` run `attack(images, labels)` in place of every implementation's; returns the calls so far."""
    calls = []

    def replace(attack):
        def build(implementation, spec, *_, **__):
            calls.append((implementation, spec))
            return attack

        monkeypatch.setattr(run_module, "build_attack", build)
        return calls

    return replace


def test_every_attack_in_every_toolkit(model, data, tmp_path):
    frame = run_quietly(model, data, out=tmp_path, attacks=("PGD-3", "FGSM", "clean"), early_stop=False)
    assert list(frame.columns) == list(BENCHMARK_COLUMNS)
    toolkits = ["native", "ART", "torchattacks", "foolbox"]
    assert list(zip(frame["attack"], frame["implementation"], strict=True)) == [
        (attack, toolkit) for attack in ("clean", "FGSM", "PGD-3") for toolkit in toolkits
    ]
    assert (frame["clean_accuracy"] == 0.8).all()
    assert (frame["robust_accuracy"] <= 0.8).all()
    assert (frame["n"] == 20).all()
    assert (frame["flags"] == "").all()
    assert frame["steps"].tolist() == [0] * 4 + [1] * 4 + [3] * 4
    assert frame["eps"].tolist() == [0.0] * 4 + [8 / 255] * 8
    assert frame["norm"].isna().tolist() == [True] * 4 + [False] * 8
    assert (frame["norm"][4:] == np.inf).all()
    assert frame["backward_per_image"].tolist() == [0] * 4 + [1] * 4 + [3] * 4
    assert frame["forward_per_image"].tolist() == [1] * 4 + [1, 1, 1, 2] + [3, 5, 3, 4]
    assert (frame["judgement_per_image"] == 0).all()
    assert (frame["search"] == "model").all()
    assert frame["precision"].tolist() == ["float32"] * 4 + ["auto", "float32", "float32", "float32"] * 2
    assert frame["linf_max"].to_numpy() == pytest.approx([0] * 4 + [8 / 255] * 4 + [6 / 255] * 4, abs=1e-6)
    assert (frame["images_per_second"] * frame["seconds"]).to_numpy() == pytest.approx(20)
    assert (frame["device"] == "cpu").all()
    assert json.loads(frame["params"][11]) == {"batch_size": 8, "eps_step": 2 / 255, "random_start": False}
    assert set(json.loads(frame["versions"][0])) == {"guardians", "python", "torch", "art", "torchattacks", "foolbox"}
    assert json.loads(frame["params"][8]) == json.loads(frame["params"][11]) | {"early_stop": False}
    assert frame.attrs == {"interrupted": False}
    assert_same(frame, written(tmp_path))


@pytest.mark.parametrize(("norm", "eps"), [("inf", 8 / 255), (2, 1.0), (1, 4.0)])
@pytest.mark.parametrize("random_start", [False, True])
def test_outcomes_recompute_the_row_exactly(model, data, tmp_path, norm, eps, random_start):
    frame = run_quietly(
        model, data, out=tmp_path, attacks=("clean", "FGSM", "PGD-2"), norm=norm, eps=eps, random_start=random_start
    )
    store = Store(tmp_path)
    for known, (_, row) in zip(store.runs(), written(tmp_path).iterrows(), strict=True):
        outcomes = store.outcomes(known["key"])
        assert list(outcomes) == list(OUTCOME_COLUMNS)
        assert (known["attack"], known["implementation"]) == (row["attack"], row["implementation"])
        for name, value in summarise(outcomes).items():
            assert row[name] == value, name
        is_native = row["implementation"] == "native" and row["attack"] != "clean"
        assert outcomes["forward"].notna().all() == is_native
        if is_native:
            # Rows of a batch that are vacant at its end are asked about in vain, on no image's account.
            assert row["forward_per_image"] >= outcomes["forward"].mean() > 0
            assert row["backward_per_image"] >= outcomes["backward"].mean() > 0
        assert outcomes["label"].tolist() == data.labels.tolist()
        robust = (outcomes["clean_prediction"] == outcomes["label"]) & (
            outcomes["adversarial_prediction"] == outcomes["label"]
        )
        assert row["robust_accuracy"] == robust.mean()
        assert row["success_rate"] == pytest.approx(1 - row["robust_accuracy"] / row["clean_accuracy"])
        assert row["robust_accuracy_low"] <= row["robust_accuracy"] <= row["robust_accuracy_high"]
        assert row["l2_mean"] == np.mean(outcomes["l2"])
        assert row["l2_median"] == np.median(outcomes["l2"])
    assert len(store.runs()) == len(frame)


def test_robust_is_correct_on_both_images():
    outcomes = pd.DataFrame(
        {
            "label": [0, 0, 0, 0, 0],
            "clean_prediction": [0, 0, 0, 1, 1],
            "adversarial_prediction": [0, 0, 1, 0, 1],
            "l2": [0.0, 1.0, 2.0, 3.0, 10.0],
            "linf": [0.0, 0.1, 0.5, 0.3, 0.2],
        }
    )
    figures = summarise(outcomes)
    assert (figures["n"], figures["clean_accuracy"], figures["robust_accuracy"]) == (5, 0.6, 0.4)
    assert figures["success_rate"] == pytest.approx(1 / 3)
    assert (figures["l2_median"], figures["l2_mean"], figures["linf_max"]) == (2.0, 3.2, 0.5)


def test_judged_by_the_model_itself(data, model, tmp_path, replace_attack):
    """An attack that moves half of the images as far as it may: everything follows from its images."""
    step = torch.zeros(20, 1, 1, 1)
    step[::2] = 8 / 255
    replace_attack(lambda x, _: (x + step[: len(x)]).clamp(0, 1))
    row = run_quietly(model, data, out=tmp_path, attacks=["FGSM"], implementations=["ART"]).iloc[0]
    x = data.as_floats()
    x_adv = (x + step).clamp(0, 1)
    with torch.no_grad():
        standing = (model(x).argmax(1) == data.labels) & (model(x_adv).argmax(1) == data.labels)
    assert row["robust_accuracy"] == standing.double().mean().item()
    l2 = (x_adv - x).double().flatten(1).norm(dim=1)
    assert row["l2_mean"] == pytest.approx(l2.mean().item(), rel=1e-6)
    assert row["l2_median"] == pytest.approx(np.median(l2.numpy()), rel=1e-6)
    assert row["linf_max"] == pytest.approx(8 / 255, rel=1e-5)


def test_what_a_toolkit_does_not_have_is_skipped(model, data, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        frame = run_quietly(model, data, out=tmp_path, attacks=["FGSM", "PGD-2"], norm=2, eps=0.5)
    rows = set(zip(frame["attack"], frame["implementation"], strict=True))
    assert ("FGSM", "torchattacks") not in rows
    assert ("PGD-2", "torchattacks") in rows
    assert "skipped: torchattacks does not have FGSM for norm 2" in caplog.text


def test_a_toolkit_that_is_not_installed_is_skipped(model, data, tmp_path, caplog, monkeypatch):
    find_spec = build.find_spec
    monkeypatch.setattr(build, "find_spec", lambda name: None if name == "foolbox" else find_spec(name))
    frame = run_quietly(model, data, out=tmp_path, attacks=["clean"])
    assert "foolbox" not in frame["implementation"].tolist()
    assert "foolbox, which is not installed" in caplog.text


def test_attacks_that_minimise_a_norm_are_found_by_their_name(model, data, tmp_path):
    run = partial(run_quietly, model, data, out=tmp_path, attacks=["c&w", "FGSM"], norm=2, eps=0.5)
    frame = run(implementations=["native", "torchattacks"])
    assert frame["attack"].tolist() == ["FGSM", "C&W", "C&W"]  # torchattacks has no FGSM in norm 2
    nearest = frame[frame["attack"] == "C&W"]
    assert nearest["eps"].tolist() == [np.inf, np.inf]
    assert nearest["steps"].tolist() == [0, 0]
    assert nearest["params"].tolist() == ['{"batch_size": 8}'] * 2
    assert nearest["flags"].tolist() == ["", ""]
    assert nearest["robust_accuracy"].iloc[0] == 0
    content = (tmp_path / "benchmark.csv").read_bytes()
    assert run(implementations=["native", "torchattacks"]).equals(frame)
    assert (tmp_path / "benchmark.csv").read_bytes() == content
    with pytest.raises(ValueError, match="norm=1: must be one of 2, inf for C&W"):
        run(norm=1)


def test_a_stopped_call_continues_where_it_stopped(model, data, tmp_path, monkeypatch):
    attacks = ("clean", "FGSM", "PGD-2")
    whole = run_quietly(model, data, out=tmp_path / "whole", attacks=attacks)
    build, built = run_module.build_attack, []

    def build_until_stopped(implementation, spec, *arguments, **options):
        built.append((implementation, spec.get("steps", 1)))
        if len(built) == 4:
            raise KeyboardInterrupt
        return build(implementation, spec, *arguments, **options)

    monkeypatch.setattr(run_module, "build_attack", build_until_stopped)
    stopped = run_quietly(model, data, out=tmp_path, attacks=attacks)
    assert stopped.attrs["interrupted"]
    assert_same(stopped, written(tmp_path))
    assert_same(stopped[FIGURES], whole[FIGURES].head(4 + 3))

    resumed = run_quietly(model, data, out=tmp_path, attacks=attacks)
    assert built[4:] == built[3:4] + [(toolkit, 2) for toolkit in ("native", "ART", "torchattacks", "foolbox")]
    assert not resumed.attrs["interrupted"]
    assert_same(resumed.head(7), stopped)
    assert_same(resumed[FIGURES], whole[FIGURES])

    again = (tmp_path / "benchmark.csv").read_bytes()
    assert_same(run_quietly(model, data, out=tmp_path, attacks=attacks), resumed)
    assert len(built) == 8 + 1
    assert (tmp_path / "benchmark.csv").read_bytes() == again


@pytest.fixture
def interrupt_search(monkeypatch):
    """Let Ctrl-C arrive once in a native PGD on all images, after so many results; returns what was finished."""
    search = PGD._search

    def interrupt(results):
        finished = []

        def until_interrupted(self, batches, *arguments, **options):
            batches = list(batches)
            for part in search(self, batches, *arguments, **options):
                if len(batches) > 1 and type(self) is PGD:
                    if len(finished) == results:
                        monkeypatch.setattr(PGD, "_search", search)
                        raise KeyboardInterrupt
                    finished.append(part)
                yield part

        monkeypatch.setattr(PGD, "_search", until_interrupted)
        return finished

    return interrupt


@pytest.mark.parametrize("early_stop", [True, False])
def test_what_a_native_attack_has_finished_survives_an_interrupt(model, data, tmp_path, interrupt_search, early_stop):
    run = partial(run_quietly, model, data, attacks=("clean", "FGSM", "PGD-4"), early_stop=early_stop)
    run = partial(run, implementations=["native", "foolbox"])
    whole = run(out=tmp_path / "whole")
    finished = interrupt_search(2)
    stopped = run(out=tmp_path)
    assert stopped.attrs["interrupted"]
    assert_same(stopped[FIGURES].head(4), whole[FIGURES].head(4))
    assert_same(stopped.head(4), written(tmp_path))

    assert list(stopped.columns) == list(BENCHMARK_COLUMNS)
    assert stopped["flags"].tolist() == [""] * 4 + ["interrupted"]
    row = stopped.iloc[4]
    assert (row["attack"], row["implementation"]) == ("PGD-4", "native")
    rows = np.sort(np.concatenate([part.index for part in finished]))
    store = Store(tmp_path / "whole")
    outcomes = store.outcomes(store.runs()[4]["key"])
    for name, value in summarise(outcomes.iloc[rows]).items():
        assert row[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
    assert 0 < row["n"] == len(rows) < 20
    assert row["images_per_second"] * row["seconds"] == pytest.approx(len(rows))
    assert 0 < row["forward_per_image"] * row["n"] <= whole["forward_per_image"][4] * 20

    resumed = run(out=tmp_path)
    assert not resumed.attrs["interrupted"]
    assert_same(resumed[OF_IMAGES], whole[OF_IMAGES])


def test_an_interrupt_before_the_first_image_is_finished_leaves_no_row(model, data, tmp_path, interrupt_search):
    interrupt_search(0)
    stopped = run_quietly(model, data, out=tmp_path, attacks=["FGSM", "PGD-2"], implementations=["native"])
    assert stopped.attrs["interrupted"]
    assert stopped["attack"].tolist() == ["FGSM"]


def test_an_interrupt_of_all_images_but_not_of_the_attack_still_ends_the_run(model, data, tmp_path, monkeypatch):
    search = Attack._search

    def and_interrupt(self, batches, *arguments, **options):
        batches = list(batches)
        yield from search(self, batches, *arguments, **options)
        if len(batches) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Attack, "_search", and_interrupt)
    stopped = run_quietly(model, data, out=tmp_path, attacks=["FGSM", "PGD-2"], implementations=["native"])
    assert stopped.attrs["interrupted"]
    assert stopped[["attack", "n", "flags"]].to_numpy().tolist() == [["FGSM", 20, "interrupted"]]
    assert len(written(tmp_path)) == 0


@pytest.mark.parametrize("again_and_again", [False, True])
@pytest.mark.parametrize("implementation", ["native", "ART"])
def test_an_interrupt_at_any_pass(model, data, tmp_path, implementation, again_and_again):
    """Ctrl-C in every forward pass of a run in turn, once, or also while what is finished is judged."""
    passes, stop = 0, None

    def count(*_):
        nonlocal passes
        passes += 1
        if passes == stop or (again_and_again and stop is not None and passes > stop):
            raise KeyboardInterrupt

    model.register_forward_pre_hook(count)
    run = partial(run_quietly, model, data, attacks=["clean", "PGD-3"], implementations=[implementation])
    whole = run(out=tmp_path / "whole")
    total, partial_rows = passes, []
    for stop in range(1, total + 1):
        passes = 0
        model.train()
        out = tmp_path / str(stop)
        stopped = run(out=out)
        assert stopped.attrs["interrupted"]
        assert all(part.training for part in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        on_disk = written(out)
        assert not on_disk["flags"].astype(str).str.contains("interrupted").any()
        is_partial = stopped["flags"].astype(str) == "interrupted"
        assert_same(stopped[~is_partial][FIGURES], whole[FIGURES].head(len(on_disk)))
        partial_rows += stopped["n"][is_partial].tolist()
    assert partial_rows == sorted(partial_rows)
    assert bool(partial_rows) == (implementation == "native" and not again_and_again)
    stop = None
    assert_same(run(out=out)[OF_IMAGES], whole[OF_IMAGES])


def test_other_settings_are_other_rows(model, data, tmp_path):
    run = partial(run_quietly, model, data, out=tmp_path, attacks=["FGSM", "PGD-1"], implementations=["native"])
    run()
    for change in ({"seed": 1}, {"eps": 4 / 255}, {"norm": 2}, {"batch_size": 4}):
        assert len(run(**change)) == 2
    assert len(written(tmp_path)) == 10
    run(random_start=True)  # concerns PGD alone
    assert len(written(tmp_path)) == 11
    assert run(model_name="other")["model"].tolist() == ["other"] * 2  # another name is the same model
    assert len(Store(tmp_path).runs()) == 11


def test_other_ways_to_search_are_other_rows_of_native_attacks_alone(model, data, tmp_path):
    run = partial(run_quietly, model, data, out=tmp_path, attacks=["clean", "FGSM"], implementations=["native", "ART"])
    run()
    assert len(written(tmp_path)) == 4
    for count, change in enumerate(({"early_stop": False}, {"precision": "float32"}, {"precision": "bfloat16"}), 5):
        assert len(run(**change)) == 4
        frame = written(tmp_path)
        assert len(frame) == count
        assert tuple(frame.iloc[-1][["attack", "implementation"]]) == ("FGSM", "native")
        assert frame["precision"].iloc[-1] == change.get("precision", "auto")
        assert json.loads(frame["params"].iloc[-1])["early_stop"] == change.get("early_stop", True)
    again = (tmp_path / "benchmark.csv").read_bytes()
    run()
    assert (tmp_path / "benchmark.csv").read_bytes() == again


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_the_fast_search_is_never_weaker_and_asks_less(model, data, tmp_path, precision):
    run = partial(run_quietly, model, data, out=tmp_path, attacks=["PGD-5"], implementations=["native"])
    classical = run(early_stop=False, precision="float32").iloc[0]
    fast, thorough = run(precision=precision).iloc[0], run(early_stop=False, precision=precision).iloc[0]
    assert 0 < fast["robust_accuracy"] <= classical["robust_accuracy"] < 0.8
    assert thorough["robust_accuracy"] <= classical["robust_accuracy"]
    assert fast["linf_max"] <= 8 / 255 + 1e-6
    assert fast["l2_mean"] < classical["l2_mean"]
    assert classical["backward_per_image"] == 5
    # In low precision, images that it leaves near the boundary are searched again: of this untrained net most.
    assert fast["backward_per_image"] < (5 if precision == "float32" else 10)
    assert fast["judgement_per_image"] > 0
    assert fast["search"].startswith("folded")
    assert classical["search"] == "model"


@pytest.mark.parametrize(("early_stop", "precision"), [(True, "auto"), (False, "float32"), (False, "bfloat16")])
def test_what_native_attacks_cost_is_what_they_report(model, data, tmp_path, monkeypatch, early_stop, precision):
    build, built, seen = run_module.build_attack, [], []

    def remember(*arguments, **options):
        built.append(build(*arguments, **options))
        return built[-1]

    monkeypatch.setattr(run_module, "build_attack", remember)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))  # no copy is made of it
    row = run_quietly(
        model,
        data,
        out=tmp_path,
        attacks=["PGD-5"],
        implementations=["native"],
        early_stop=early_stop,
        precision=precision,
    ).iloc[0]
    report = built[0].report
    assert row["search"] == report.search == "model"
    assert row["forward_per_image"] == report.search_forward / 20
    assert row["backward_per_image"] == report.search_backward / 20
    assert row["judgement_per_image"] == report.judgement_forward / 20
    if not early_stop and precision == "float32":
        # Besides: the number of classes, a warm-up batch, two predictions and one gradient of all.
        assert sum(seen) - 1 - 8 - 3 * 20 == report.search_forward + report.judgement_forward == 100


def test_rows_of_other_code_are_kept_with_a_warning(model, data, tmp_path, caplog, monkeypatch):
    run = partial(run_quietly, model, data, out=tmp_path, attacks=["FGSM"], implementations=["native", "ART"])
    first = run()
    assert caplog.text == ""
    monkeypatch.setattr(run_module, "_commit", lambda: "another")
    assert_same(run(), first)
    assert "2 of the rows" in caplog.text


def test_another_model_under_the_same_name_is_measured(model, data, tmp_path):
    run = partial(run_quietly, data=data, attacks=["FGSM"], implementations=["native"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[-1].weight.neg_()
    first, second = run(model, out=tmp_path), run(other, out=tmp_path)
    assert first["clean_accuracy"].tolist() == [0.8]
    assert second["clean_accuracy"].item() < 0.8
    assert_same(run(model, out=tmp_path), first)
    assert_same(run(other, out=tmp_path), second)


def test_random_starts_repeat_with_the_seed(model, data, tmp_path):
    run = partial(run_quietly, model, data, attacks=["PGD-1"], eps_step=1e-3, random_start=True)
    first, second, other = run(out=tmp_path / "a"), run(out=tmp_path / "b"), run(out=tmp_path / "c", seed=1)
    assert (first["l2_mean"] == second["l2_mean"]).all()
    assert (first["l2_mean"] != other["l2_mean"]).all()


def test_saturated_softmax_is_flagged(data, tmp_path, model):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 1e6 * self.model(x)

    frame = run_quietly(Masked(), data, out=tmp_path, attacks=["clean", "FGSM", "PGD-2"])
    assert (frame["flags"][frame["attack"] == "clean"] == "").all()
    assert (frame["flags"][frame["attack"] != "clean"] == "zero_gradient").all()


class Barrier(nn.Module):
    """Class 0 at grey; one full step brightens it to class 1, small steps turn around at a barrier."""

    def forward(self, x):
        u = x.mean((1, 2, 3)) - 128 / 255
        margin = torch.where(u < 0.01, 1 - u, torch.where(u < 0.03, 0.98 + u, -1 + 0 * u))
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_pgd_that_is_weaker_than_fgsm_is_flagged(tmp_path):
    run = partial(run_quietly, Barrier(), constant_data(), eps=0.04, eps_step=0.015)
    frame = run(out=tmp_path, attacks=["PGD-4", "FGSM"])
    assert frame["attack"].tolist() == ["FGSM"] * 4 + ["PGD-4"] * 4
    assert frame["robust_accuracy"].tolist() == [0] * 4 + [1] * 4
    assert frame["flags"].tolist() == [""] * 4 + ["weaker_than_fgsm"] * 4
    resumed = run(out=tmp_path, attacks=["PGD-6"], implementations=["native"])  # FGSM's row is on disk
    assert resumed["flags"].tolist() == ["weaker_than_fgsm"]
    classical = run(out=tmp_path, attacks=["PGD-4"], implementations=["native"], early_stop=False)
    assert classical["flags"].tolist() == [""]  # there is no FGSM that searched like it
    run(out=tmp_path, attacks=["FGSM"], implementations=["native"], early_stop=False)
    classical = run(out=tmp_path, attacks=["PGD-6"], implementations=["native"], early_stop=False)
    assert classical["flags"].tolist() == ["weaker_than_fgsm"]
    alone = run(out=tmp_path / "alone", attacks=["PGD-4"], implementations=["native"])
    assert alone["flags"].tolist() == [""]


@pytest.mark.parametrize(
    ("attack", "norm", "flags"),
    [
        (lambda x, y: x.clone().index_fill_(0, torch.tensor([0]), float("nan")), "inf", "nan"),
        (lambda x, y: x + 8 / 255 * 1.001, "inf", "outside_ball"),
        (lambda x, y: x + 8 / 255, "inf", ""),
        (lambda x, y: x + 8 / 255 * 1.001 / 192**0.5, 2, "outside_ball"),
        (lambda x, y: x + 8 / 255 / 192**0.5, 2, ""),
        (lambda x, y: x * 0 - 1e-6, "inf", "outside_ball;outside_clip"),
    ],
)
def test_images_that_break_the_threat_model_are_flagged(tmp_path, replace_attack, attack, norm, flags):
    replace_attack(attack)
    frame = run_quietly(Barrier(), constant_data(), out=tmp_path, attacks=["FGSM"], implementations=["ART"], norm=norm)
    assert frame["flags"].tolist() == [flags]


def test_no_image_correct_leaves_the_success_rate_empty(tmp_path):
    data = constant_data()
    data.labels.fill_(1)
    row = run_quietly(Barrier(), data, out=tmp_path, attacks=["FGSM"], implementations=["native"]).iloc[0]
    assert row["clean_accuracy"] == row["robust_accuracy"] == 0
    assert np.isnan(row["success_rate"])


def test_the_model_comes_back_as_it_was(model, data, tmp_path):
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    state = copy.deepcopy(model.state_dict())
    run_quietly(model, data, out=tmp_path, attacks=["clean", "FGSM", "PGD-1"])
    assert [part.training for part in model] == [True, False, True, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
    assert model[0].weight.grad is None
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not model[5]._forward_hooks


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"attacks": ["FGSM", "PGD"]},
            ValueError,
            "'PGD' is unknown; known are clean, .*FGSM.*PGD-<steps>",
        ),
        ({"attacks": ["PGD-0"]}, ValueError, "'PGD-0' is unknown"),
        ({"attacks": ["PGD-1000001"]}, ValueError, "'PGD-1000001': must have at most 1,000,000 steps"),
        ({"attacks": []}, ValueError, "attacks="),
        ({"attacks": "FGSM"}, ValueError, "attacks='FGSM': must be a list"),
        ({"implementations": ["advlib"]}, ValueError, "advlib.*known are native, ART, torchattacks, foolbox"),
        ({"norm": 0.5}, ValueError, "norm=0.5"),
        ({"norm": 3}, ValueError, "norm=3"),
        ({"eps": -1}, ValueError, "eps=-1"),
        ({"eps": float("nan")}, ValueError, "eps=nan"),
        ({"eps": "8/255"}, TypeError, "eps='8/255'"),
        ({"eps": np.ones(3)}, TypeError, "one number"),
        ({"eps_step": 0}, ValueError, "eps_step=0"),
        ({"random_start": 1}, TypeError, "random_start=1"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"early_stop": 1}, TypeError, "early_stop=1: must be True or False"),
        ({"precision": "float64"}, ValueError, "precision='float64': must be one of auto, float32, bfloat16, float16"),
        ({"precision": None}, ValueError, "precision=None: must be one of auto, float32, bfloat16, float16"),
        ({"model_name": " "}, ValueError, "model_name"),
        ({"device": "meta"}, ValueError, "device='meta': the model is on cpu"),
    ],
)
def test_invalid_arguments_are_refused_before_any_work(model, data, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        run_quietly(model, data, out=tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_models_and_data_that_do_not_fit_are_refused(model, data, tmp_path):
    with pytest.raises(TypeError, match="model of type function"):
        run_quietly(lambda x: x, data, out=tmp_path)
    with pytest.raises(TypeError, match="data of type Tensor"):
        run_quietly(model, data.images, out=tmp_path)
    with pytest.raises(ValueError, match="float64"):
        run_quietly(copy.deepcopy(model).double(), data, out=tmp_path)
    ten_classes = Dataset(data.images, torch.arange(20) % 10, tuple("abcdefghij"), "ten")
    with pytest.raises(ValueError, match="labels from 0 to 9: the model has 4 classes"):
        run_quietly(model, ten_classes, out=tmp_path)
    with pytest.raises(ValueError, match="no images"):
        run_quietly(model, Dataset(data.images[:0], data.labels[:0], data.classes, "none"), out=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(model, data, tmp_path, replace_attack):
    (tmp_path / "file").write_text("")
    calls = replace_attack(None)
    with pytest.raises(ValueError, match=r"file/store\.sqlite' cannot be written"):
        run_quietly(model, data, out=tmp_path / "file")
    assert calls == []


@pytest.fixture
def repository(tmp_path):
    """A git repository with a package in it, and what runs git there."""
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    for name in ("package/__init__.py", "table.csv", ".gitignore"):
        (folder / name).write_text("installed\n")

    def git(*arguments):
        command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return folder, git


def test_the_commit_is_that_of_the_package_wherever_it_runs(repository, monkeypatch, tmp_path):
    folder, git = repository
    here = run_module._commit()
    for place in (folder, tmp_path):
        monkeypatch.chdir(place)
        monkeypatch.setenv("GIT_DIR", str(folder / ".git"))
        assert run_module._commit() == here
    monkeypatch.delenv("GIT_DIR")
    assert run_module._commit(folder / "package") == git("rev-parse", "HEAD")


def test_a_commit_whose_package_was_changed_is_dirty(repository):
    folder, git = repository
    (folder / "table.csv").write_text("of another folder\n")
    (folder / "package" / "new.py").write_text("not tracked\n")
    assert run_module._commit(folder / "package") == git("rev-parse", "HEAD")
    (folder / "package" / "__init__.py").write_text("changed\n")
    assert run_module._commit(folder / "package") == git("rev-parse", "HEAD") + "-dirty"


def test_an_installed_package_has_no_commit(repository, monkeypatch, tmp_path):
    folder, _ = repository
    installed = folder / "installed" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert run_module._commit(installed) == ""
    assert run_module._commit(tmp_path) == ""
    monkeypatch.setenv("PATH", "")
    assert run_module._commit(folder / "package") == ""


def test_the_union_is_the_worst_case_of_each_image(model, data, tmp_path, replace_attack):
    """Two attacks, each of which moves other images: in the union all of them are moved."""
    x = data.as_floats()
    with torch.no_grad():
        wrong = [model(x + step).argmax(1) != data.labels for step in (-8 / 255, 8 / 255)]
    steps = iter([-8 / 255] * 3 + [8 / 255] * 3)
    replace_attack(lambda x, _: x + next(steps))
    options = {"model_name": "tiny", "verbose": False, "attacks": ["FGSM", "PGD-1"], "implementations": ["ART"]}
    frame = run_benchmark(model, data, out=tmp_path, batch_size=20, **options)
    assert frame["attack"].tolist() == ["FGSM", "PGD-1", "union"]
    first, second, union = frame["robust_accuracy"]
    correct = predicted(model, x) == data.labels
    standing = correct & ~wrong[0] & ~wrong[1]
    assert union == standing.double().mean().item() <= min(first, second)
    row = frame.iloc[2]
    assert (row["implementation"], row["norm"], row["eps"], row["n"]) == ("all", np.inf, 8 / 255, 20)
    assert row["seconds"] == frame["seconds"][:2].sum()
    assert np.isnan(row["l2_mean"])


def predicted(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def test_attacks_of_other_balls_have_no_union(model, data, tmp_path):
    run = partial(run_benchmark, model, data, out=tmp_path, model_name="tiny", verbose=False, batch_size=8)
    for eps in (0.01, 0.02):
        assert run(attacks=["clean", "FGSM"], implementations=["native"], eps=eps)["attack"].tolist() == [
            "clean",
            "FGSM",
        ]
    assert "union" not in read_csv(tmp_path / "benchmark.csv")["attack"].tolist()
    assert run(attacks=["FGSM", "DDN-5"], implementations=["native"], norm=2)["attack"].tolist() == ["FGSM", "DDN-5"]


def test_attacks_of_the_toolkits_under_their_own_names(model, data, tmp_path):
    attacks = [
        "torchattacks:PGD(alpha=2/255, steps=3, random_start=False)",
        "PGD-3",
        "foolbox:LinfProjectedGradientDescentAttack(steps=3)",
    ]
    attacks += ["art:ProjectedGradientDescent(max_iter=3, eps_step=2/255)", "foolbox:L2DeepFoolAttack"]
    frame = run_quietly(model, data, out=tmp_path, attacks=attacks, eps_step=2 / 255)
    of = {(row["attack"], row["implementation"]): row for _, row in frame.iterrows()}
    assert of["torchattacks:PGD", "torchattacks"]["l2_mean"] == of["PGD-3", "torchattacks"]["l2_mean"]
    assert of["ART:ProjectedGradientDescent", "ART"]["l2_mean"] == pytest.approx(of["PGD-3", "ART"]["l2_mean"])
    assert of["foolbox:LinfProjectedGradientDescentAttack", "foolbox"]["eps"] == 8 / 255
    assert of["foolbox:L2DeepFoolAttack", "foolbox"]["eps"] == np.inf
    assert json.loads(of["torchattacks:PGD", "torchattacks"]["params"]) == {
        "alpha": 2 / 255,
        "batch_size": 8,
        "eps": 8 / 255,
        "random_start": False,
    }
    assert (frame["flags"] == "").all()


def test_sequences_of_attacks_say_which_stage_felled_an_image(model, data, tmp_path):
    attacks = ["evaluate(budget='fast')", "AutoAttack(steps=3, n_queries=5)", "PGD-3"]
    frame = run_quietly(model, data, out=tmp_path, attacks=attacks, implementations=["native"])
    assert frame["attack"].tolist() == ["evaluate", "AutoAttack", "PGD-3"]
    assert (frame["clean_accuracy"] == 0.8).all()
    store = Store(tmp_path)
    for known, (_, row) in zip(store.runs(), frame.iterrows(), strict=True):
        outcomes = store.outcomes(known["key"])
        if row["attack"] == "PGD-3":
            continue
        stands = outcomes["stage"] == ""
        assert stands.mean() == row["robust_accuracy"]
        assert ((outcomes["stage"] == "clean") == (outcomes["clean_prediction"] != outcomes["label"])).all()
        assert row["backward_per_image"] >= outcomes["backward"].mean() > 0
        assert row["judgement_per_image"] > 0


def test_arguments_of_attacks_are_other_rows(model, data, tmp_path):
    attacks = ["PGD-3", "PGD-3(eps_step=0.001)", "APGD-3(loss='margin')", "APGD-3"]
    frame = run_quietly(model, data, out=tmp_path, attacks=attacks, implementations=["native"])
    assert [json.loads(params).get("eps_step") for params in frame["params"]] == [2 / 255, 0.001, None, None]
    assert [json.loads(params).get("loss") for params in frame["params"]] == [None, None, "margin", None]
    with pytest.raises(ValueError, match="gamma=1: PGD has only"):
        run_quietly(model, data, out=tmp_path, attacks=["PGD-3(gamma=1)"])


def test_a_defence_is_attacked_and_judged_by_draws_of_their_own(model, data, tmp_path):
    run = partial(run_quietly, model, data, out=tmp_path, implementations=["native"], attacks=["clean", "PGD-3"])
    plain = run()
    weak, strong = run(defence="rse(sigma_init=0.01, sigma_inner=0)"), run(defence="rse(sigma_init=5, sigma_inner=0)")
    assert weak["defence"].tolist() == ["rse(n=10, search_passes=2, sigma_init=0.01, sigma_inner=0)"] * 2
    assert weak["clean_accuracy"][0] == plain["clean_accuracy"][0] == 0.8 > strong["clean_accuracy"][0]
    averaged = run(defence="rse(sigma_init=0.01, sigma_inner=0)", eot_samples=3)
    assert averaged["eot"].tolist() == [1, 3]
    assert averaged["backward_per_image"][1] > weak["backward_per_image"][1]
    pool = Dataset(data.images, torch.arange(20) % 4, data.classes, "pool")
    mixed = run(defence="mi-ol(num_samples=3)", pool=pool)
    assert mixed["clean_accuracy"].nunique() == 1
    assert len(Store(tmp_path).runs()) == 2 + 2 + 2 + 1 + 2


def test_other_data_is_measured_whatever_its_name(model, data, tmp_path):
    run = partial(run_quietly, model, out=tmp_path, implementations=["native"], attacks=["FGSM"])
    images = data.images.clone()
    images[0, 0, 0, 0] ^= 1
    others = [Dataset(images, data.labels, data.classes, data.source)]
    others.append(Dataset(data.images, data.labels.roll(1), data.classes, data.source))
    others.append(Dataset(data.images.flatten(2).unflatten(2, (4, 16)), data.labels, data.classes, data.source))
    for count, each in enumerate([data, *others], 1):
        run(data=each)
        assert len(Store(tmp_path).runs()) == count
    run(data=Dataset(data.images, data.labels, data.classes, "another name"))
    assert len(Store(tmp_path).runs()) == len(others) + 1


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("torchattacks:PGD(step=3)", "step: unknown to PGD; known are eps, alpha, steps"),
        ("torchattacks:Pgd", "attack torchattacks:Pgd is unknown; torchattacks has .*PGD"),
        ("advlib:PGD", "toolkit='advlib': must be one of ART, torchattacks, foolbox"),
        ("evaluate(budget='slow')", "budget='slow': must be one of fast, standard, thorough"),
        ("PGD-3(", "must be a name, or a name and arguments"),
    ],
)
def test_what_is_no_attack_is_refused(model, data, tmp_path, attack, message):
    with pytest.raises(ValueError, match=message):
        run_quietly(model, data, out=tmp_path, attacks=[attack], implementations=["native"])
