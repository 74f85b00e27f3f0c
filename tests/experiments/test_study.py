from pathlib import Path

import pytest
import torch
import yaml
from models_for_tests import small_net, some_images

from guardians.data import Dataset
from guardians.experiments import run as run_module
from guardians.experiments import study as study_module
from guardians.experiments.store import Store
from guardians.experiments.study import Study, find_studies, load_study, perform_study
from guardians.experiments.subject import defended
from guardians.tables import read_csv

STUDIES = Path(__file__).parents[2] / "benchmarks"
GOOD = {
    "title": "a title",
    "view": "benchmark",
    "subjects": ["models_for_tests:small_net"],
    "runs": [{"attacks": ["clean", "FGSM"], "implementations": ["native"], "batch_size": 4}],
    "n": 6,
}


@pytest.fixture(autouse=True)
def data(monkeypatch):
    images = (255 * some_images(12)).round().to(torch.uint8)
    with torch.no_grad():
        labels = small_net()(images.float() / 255).argmax(1)

    def load(root, split, n, **_):
        return Dataset(images[:n], labels[:n], tuple("abcde"), f"noise ({split})")

    monkeypatch.setattr(study_module, "load_data", load)


def test_the_studies_of_this_repository_are_read():
    studies = find_studies(STUDIES)
    assert "benchmark.yaml" in {path.name for path in studies}
    for study in studies.values():
        assert study.title
        images = study_module.load_data(None, "test", 12)
        made = study_module._Subjects(study, None, torch.device("cpu"))
        subjects = [defended("small", small_net(), defence, images) for defence in ("none", "rse", "mi-ol(lam=0.5)")]
        for settings in study.runs:
            settings = settings | ({"source": "models_for_tests:linear_model"} if "source" in settings else {})
            assert set(settings.pop("models", [])) <= set(made._models)
            assert any(made.runs(subject, images, settings, [0]) for subject in subjects), settings


def perform(study, out, **options):
    study = Study(**GOOD | study)
    images = study_module.load_data(None, study.split, options.get("n") or study.n)
    return perform_study(study, images, out, verbose=False, **options)


def test_a_study_is_done_and_not_done_again(tmp_path, monkeypatch):
    frame, interrupted = perform({}, tmp_path)
    assert not interrupted
    assert frame["attack"].tolist() == ["clean", "FGSM"]
    assert read_csv(tmp_path / "benchmark.csv")["n"].tolist() == [6, 6]
    monkeypatch.setattr(run_module, "build_attack", None)
    again, _ = perform({}, tmp_path)
    assert again.equals(frame)
    with pytest.raises(TypeError, match="not callable"):
        perform({"n": 5}, tmp_path)


def test_runs_with_a_label_are_done_anew(tmp_path):
    runs = [{"attacks": [attack], "implementations": ["native"], "label": attack} for attack in ("FGSM", "PGD-10")]
    perform({"runs": runs}, tmp_path)
    before = {run["attack"]: run for run in Store(tmp_path).runs()}
    frame, _ = perform({"runs": runs}, tmp_path, again=["PGD-10"])
    after = {run["attack"]: run for run in Store(tmp_path).runs()}
    assert frame["attack"].tolist() == ["FGSM", "PGD-10", "union"]
    assert after["FGSM"] == before["FGSM"]
    assert after["PGD-10"]["key"] == before["PGD-10"]["key"]
    assert after["PGD-10"]["seconds"] != before["PGD-10"]["seconds"]
    with pytest.raises(ValueError, match=r"again='PGD-40'.*FGSM.*PGD-10"):
        perform({"runs": runs}, tmp_path, again=["PGD-40"])
    assert Store(tmp_path).runs() == list(after.values())


def test_fewer_images_than_the_study_says(tmp_path):
    frame, _ = perform({"n": 12, "correct": 8}, tmp_path, n=6)
    assert frame["n"].tolist() == [4, 4]


def test_a_defence_and_a_model_as_subjects(tmp_path):
    subjects = ["models_for_tests:small_net"]
    subjects += [{"model": "models_for_tests:small_net", "defence": defence} for defence in ("rse(n=2)", "mi-ol")]
    frame, _ = perform({"subjects": subjects}, tmp_path)
    names = [name.partition("(")[0] for name in frame["defence"]]
    assert names == ["none", "none", "rse", "rse", "mi-ol", "mi-ol"]


def test_rounds_repeat_each_run(tmp_path):
    frame, _ = perform({"rounds": 3}, tmp_path)
    assert len(frame) == 6
    assert frame["robust_accuracy"].nunique() == 2
    assert [run["repetition"] for run in Store(tmp_path).runs()] == [1, 1, 2, 2, 3, 3]


def test_ctrl_c_leaves_what_is_finished(tmp_path, monkeypatch):
    build = run_module.build_attack

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "build_attack", interrupted)
    frame, was_interrupted = perform({}, tmp_path)
    assert was_interrupted
    assert frame["attack"].tolist() == ["clean"]
    monkeypatch.setattr(run_module, "build_attack", build)
    frame, was_interrupted = perform({}, tmp_path)
    assert not was_interrupted
    assert frame["attack"].tolist() == ["clean", "FGSM"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view": "none"}, "view='none': must be one of benchmark"),
        ({"split": "both"}, "split='both'"),
        ({"n": 0}, "n=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"correct": 0}, "correct=0"),
        ({"subjects": []}, "at least one of subjects"),
        ({"runs": []}, "at least one of subjects and one of runs"),
        ({"subjects": [{"name": "a"}]}, "must be a name, or have model and defence"),
        ({"attacks": ["FGSM"]}, "known are"),
    ],
)
def test_what_is_no_study_is_refused(tmp_path, change, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    assert load_study(path) == Study(**GOOD)
    path.write_text(yaml.safe_dump(GOOD | change))
    with pytest.raises(ValueError, match=message) as error:
        load_study(path)
    assert "study.yaml" in str(error.value)


def test_files_that_are_no_studies(tmp_path):
    path = tmp_path / "study.yaml"
    with pytest.raises(FileNotFoundError):
        load_study(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        load_study(path)
    path.write_text("- a")
    with pytest.raises(ValueError, match="has list: must have title, view, subjects and runs"):
        load_study(path)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([{"attack": ["FGSM"]}], "runs: .*attack"),
        ([{"attacks": ["FGSN"]}], "FGSN.* is unknown"),
        ([{"attacks": ["FGSM"], "eps": -1}], "eps=-1"),
        ([{"attacks": ["PGD-3"], "implementations": ["none"]}], "implementations="),
        ([{"attacks": ["FGSM"], "seeds": 0}], "seeds=0"),
        ([{"attacks": ["FGSM"], "defences": ["rsa"]}], "defences='rsa': must be one of none, rse"),
        ([{"attacks": ["FGSM"], "source": "no-such-model"}], "no-such-model"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_run(tmp_path, runs, message):
    with pytest.raises(ValueError, match=message):
        perform({"runs": GOOD["runs"] + runs}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_images_that_a_model_gets_right(tmp_path):
    with pytest.raises(ValueError, match=r"correct=7: .* gets 6 of the 6 images right"):
        perform({"correct": 7}, tmp_path)
