import pandas as pd
import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels
from torch import nn

from guardians.data import Dataset
from guardians.parity import cases, run_parity
from guardians.parity.rules import rules_for
from guardians.tables import PARITY_COLUMNS, read_csv

for toolkit in ("torchattacks", "foolbox"):
    pytest.importorskip(toolkit)

N = 6
SOME = {"attacks": ["PGD-10"], "references": ["torchattacks"]}


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


@pytest.fixture
def model():
    return Counted().eval()


@pytest.fixture
def data():
    images = (255 * some_images(N)).round().to(torch.uint8)
    return Dataset(images, some_labels(N), tuple("abcde"[:CLASSES]), "noise")


def run(model, data, out, **options):
    options = {"model_name": "small", "batch_size": 4, "verbose": False, **SOME, **options}
    return run_parity(model, data, out=out, **options)


def test_every_case_becomes_a_row(model, data, tmp_path):
    frame = run(model, data, tmp_path / "new" / "folder", references=["ART", "torchattacks", "foolbox"])
    expected = cases(["PGD-10"])
    assert list(frame.columns) == list(PARITY_COLUMNS)
    assert frame["case"].tolist() == [case.name for case in expected]
    identity = ["small", data.identity, N, 4, 0]
    assert (frame[["model", "data", "n", "batch_size", "seed"]] == identity).all(axis=None)
    assert set(frame["verdict"]) == {"exact"}
    assert (frame["unexplained"] == 0).all()
    assert frame["max_abs_diff_float64"].isna().equals(frame["reference"] == "ART")
    assert ((frame["difference_low"] <= frame["difference"]) & (frame["difference"] <= frame["difference_high"])).all()
    assert (frame["label_agreement"] == 1).all()
    assert (frame[["l2_ratio", "query_ratio"]] > 0).all(axis=None)
    for case, note in zip(expected, frame["note"], strict=True):
        rules = [rule.__name__ for rule in rules_for(case.reference, case.spec)]
        assert note == ("with the toolkit's " + ", ".join(rules) if rules else "")
    assert [path.name for path in (tmp_path / "new" / "folder").glob("[!.]*")] == ["parity.csv"]
    assert read_csv(tmp_path / "new" / "folder" / "parity.csv").equals(frame)


def test_a_second_run_computes_nothing(model, data, tmp_path):
    first = run(model, data, tmp_path)
    content, calls = (tmp_path / "parity.csv").read_bytes(), model.calls
    assert calls > 0
    assert run(model, data, tmp_path).equals(first)
    assert model.calls == calls
    assert (tmp_path / "parity.csv").read_bytes() == content


def test_a_stopped_run_goes_on_where_it_was(model, data, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    from guardians.parity import harness

    whole, done = run(model, data, tmp_path / "whole"), []
    original = harness.compare

    def stopping(case, *arguments, **options):
        if len(done) == 3:
            raise Stop
        done.append(case.name)
        return original(case, *arguments, **options)

    monkeypatch.setattr(harness, "compare", stopping)
    with pytest.raises(Stop):
        run(model, data, tmp_path)
    assert read_csv(tmp_path / "parity.csv")["case"].tolist() == done == whole["case"].tolist()[:3]

    def counting(case, *arguments, **options):
        done.append(case.name)
        return original(case, *arguments, **options)

    monkeypatch.setattr(harness, "compare", counting)
    resumed = run(model, data, tmp_path)
    assert done == whole["case"].tolist()
    assert resumed.drop(columns="time_ratio").equals(whole.drop(columns="time_ratio"))


def test_a_run_returns_its_own_rows_only(model, data, tmp_path):
    few = {"attacks": ["FGSM"]}
    run(model, data, tmp_path, **few)
    assert set(run(model, data, tmp_path, **few, references=["foolbox"])["reference"]) == {"foolbox"}
    assert set(run(model, data, tmp_path, **few, seed=1)["seed"]) == {1}
    assert set(run(model, data, tmp_path, **few, model_name="other")["model"]) == {"other"}
    assert len(read_csv(tmp_path / "parity.csv")) == 4 + 6 + 4 + 4


def test_another_model_under_the_same_name_is_measured(model, data, tmp_path):
    first, other = run(model, data, tmp_path), run(small_net(1), data, tmp_path)
    assert not (first["native_success"] == other["native_success"]).all()
    assert len(read_csv(tmp_path / "parity.csv")) == len(first) + len(other)
    again, alone = run(model, data, tmp_path), run(small_net(1), data, tmp_path / "alone")
    pd.testing.assert_frame_equal(again, first)
    pd.testing.assert_frame_equal(alone.drop(columns="time_ratio"), other.drop(columns="time_ratio"))


def test_own_rules_are_measured_where_there_are_any(model, data, tmp_path):
    frame = run(model, data, tmp_path, references=["ART", "torchattacks", "foolbox"], own_rules=True)
    expected = [case.name for case in cases(["PGD-10"]) if rules_for(case.reference, case.spec)]
    assert frame["case"].tolist() == expected
    assert len(expected) == 4 + 4 + 8  # ART L1, torchattacks L2, foolbox L1 and L2
    assert set(frame["verdict"]) == {"own rule"}
    assert set(frame["kind"]) == {"deviation"}
    assert frame[["pixel_mismatch", "unexplained", "max_abs_diff_float64"]].isna().all(axis=None)
    assert frame["note"].str.startswith("without the toolkit's ").all()
    assert (frame["max_abs_diff"] > 1e-4).all()
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["deviations.csv"]


def test_a_seed_gives_the_same_rows(model, data, tmp_path):
    first, second, other = (
        run(model, data, tmp_path / name, seed=seed).drop(columns=["time_ratio", "seed"])
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    )
    assert first.equals(second)
    assert not first.equals(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["PGD-11"]}, "attacks=.*PGD-11"),
        ({"references": ["cleverhans"]}, "references=.*cleverhans"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),
    ],
)
def test_wrong_arguments_raise_before_any_work(options, message, model, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(model, data, tmp_path / "out", **options)
    assert model.calls == 0
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_raises_before_any_work(model, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((ValueError, OSError), match="cannot be written"):
        run(model, data, tmp_path / "file" / "out")
    assert model.calls == 0


def test_a_table_of_something_else_is_not_touched(model, data, tmp_path):
    (tmp_path / "parity.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"parity.csv.*columns"):
        run(model, data, tmp_path)
    assert model.calls == 0
    assert (tmp_path / "parity.csv").read_text() == "a,b\n1,2\n"
