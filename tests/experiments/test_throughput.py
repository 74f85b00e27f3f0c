import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import CLASSES, SmallNet, small_net, some_images, some_labels
from PIL import Image
from torch.utils.data import DataLoader

from guardians.attacks import PGD
from guardians.data import Dataset
from guardians.experiments import throughput
from guardians.experiments.throughput import (
    COST_COLUMNS,
    MEMORY_COLUMNS,
    THROUGHPUT_COLUMNS,
    measure_cost_of_images,
    measure_cost_of_robustness,
    measure_memory,
    measure_throughput,
)
from guardians.statistics import paired_difference, wilson_interval

ROOT = Path(__file__).parents[2]
NAMES = ["bare loop", "ART", "torchattacks", "foolbox", "native", "native", "native"]


class Clock:
    """Time that passes when images go through a network, a second each."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class ClockedNet(SmallNet):
    clock: Clock

    def forward(self, x):
        self.clock.now += len(x)
        return super().forward(x)


@pytest.fixture
def clocked(monkeypatch):
    net = small_net()
    net.__class__ = ClockedNet
    ClockedNet.clock = Clock()
    monkeypatch.setattr("guardians.experiments.overhead.time.perf_counter", ClockedNet.clock)
    return net


@pytest.fixture
def measured(clocked):
    n = 12
    images, labels = some_images(n), clocked(some_images(n)).argmax(1)
    labels[:3] = (labels[:3] + 1) % CLASSES
    return measure_throughput(clocked, images, labels, model_name="net", steps=4, batch_size=5, rounds=2)


def test_every_implementation_has_a_row(measured):
    assert list(measured.columns) == list(THROUGHPUT_COLUMNS)
    assert measured["implementation"].tolist() == NAMES
    natives = measured[measured["implementation"] == "native"]
    assert natives[["early_stop", "precision"]].values.tolist() == [
        [False, "float32"],
        [True, "float32"],
        [True, "auto"],
    ]
    assert (measured[["model", "steps", "n", "batch_size", "rounds"]] == ["net", 4, 12, 5, 2]).all(axis=None)


def test_times_and_ratios(measured):
    forward = measured["forward_per_image"] + measured["judgement_per_image"]
    assert measured["forward_per_image"][:5].tolist() == [4, 6, 4, 5, 4]  # ART predicts twice more, foolbox once
    np.testing.assert_allclose(measured["seconds"], 12 * forward)
    np.testing.assert_allclose(measured["images_per_second"], 1 / forward)
    np.testing.assert_allclose(measured["bare_loop_ratio"], forward / 4)
    for column in ("speedup", "speedup_low", "speedup_high"):  # torchattacks is the fastest toolkit
        np.testing.assert_allclose(measured[column], 4 / forward)


def test_the_engine_costs_what_its_passes_cost(measured):
    is_native = measured["implementation"] == "native"
    np.testing.assert_allclose(measured["engine_overhead"][is_native], 1)
    assert measured["engine_overhead"][~is_native].isna().all()


def test_passes_are_those_of_the_report(measured):
    net = small_net()
    images, labels = some_images(12), net(some_images(12)).argmax(1)
    labels[:3] = (labels[:3] + 1) % CLASSES
    for row in measured[measured["implementation"] == "native"].itertuples():
        attack = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=4, batch_size=5, verbose=False)
        attack.set_params(early_stop=row.early_stop, precision=row.precision)
        attack(images, labels)
        report = attack.report
        assert row.search == report.search
        assert row.forward_per_image * 12 == pytest.approx(report.search_forward)
        assert row.backward_per_image * 12 == pytest.approx(report.search_backward)
        assert row.judgement_per_image * 12 == pytest.approx(report.judgement_forward)


def test_robust_accuracy_is_the_models_verdict(measured):
    net = small_net()
    images, labels = some_images(12), net(some_images(12)).argmax(1)
    labels[:3] = (labels[:3] + 1) % CLASSES
    adversarial = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=4, verbose=False)(images, labels)
    robust = (net(images).argmax(1) == labels) & (net(adversarial).argmax(1) == labels)
    rows = measured[measured["implementation"] != "bare loop"]
    np.testing.assert_allclose(rows["robust_accuracy"][:4], float(robust.float().mean()))
    low, high = wilson_interval(int(robust.sum()), 12)
    assert rows["robust_accuracy_low"].iloc[0] == low
    assert rows["robust_accuracy_high"].iloc[0] == high
    assert measured.loc[0, ["robust_accuracy", "difference"]].isna().all()


def test_differences_are_paired():
    robust, reference = np.array([True, True, True, False]), np.array([True, False, False, False])
    row = throughput._robustness(robust, reference)
    assert (row["difference"], row["difference_low"], row["difference_high"]) == paired_difference(robust, reference)
    assert row["difference"] == 0.5
    assert throughput._robustness(None, reference) == {}


def test_ratios_are_taken_within_a_round(monkeypatch):
    seconds = {
        "bare loop": [10.0, 20.0, 30.0],
        "ART": [40.0, 80.0, 120.0],
        "torchattacks": [20.0, 60.0, 90.0],
        "foolbox": [30.0, 40.0, 90.0],
        "native": [5.0, 20.0, 10.0],
    }

    def race(contenders, images, labels, *, after, **options):
        for contender in contenders:
            after(contender, contender.run(images, labels), 1.0)
        return pd.DataFrame({contender: seconds[contender.known["implementation"]] for contender in contenders})

    monkeypatch.setattr(throughput, "_race", race)
    frame = measure_throughput(small_net(), some_images(6), some_labels(6), model_name="net", steps=2, rounds=3)
    native = frame.iloc[4]
    assert native["seconds"] == 10
    assert (native["speedup"], native["speedup_low"], native["speedup_high"]) == (4, 2, 9)  # of 20/5, 40/20, 90/10
    assert native["bare_loop_ratio"] == 0.5  # of 5/10, 20/20, 10/30
    assert frame.loc[1, "speedup"] == 0.5


@pytest.fixture
def few_data():
    images = (255 * some_images(8)).round().to(torch.uint8)
    return Dataset(images, some_labels(8), tuple("abcde"), "random")


def test_memory_of_lazily_read_images(few_data):
    frame = measure_memory("models_for_tests:small_net", few_data, [5, 20], steps=2, batch_size=4)
    assert list(frame.columns) == list(MEMORY_COLUMNS)
    assert frame["n"].tolist() == [5, 20]
    assert (frame[["peak_memory_mb", "peak_anonymous_mb"]] > 10).all(axis=None)
    assert (frame["peak_anonymous_mb"] < frame["peak_memory_mb"]).all()
    np.testing.assert_allclose(frame["images_per_second"], frame["n"] / frame["seconds"])
    assert frame["robust_accuracy"].between(0, 1).all()


def test_a_process_attacks_the_images_that_were_written(tmp_path, few_data):
    throughput._write_images(tmp_path, few_data, 16)
    net = small_net()
    attack = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=2, batch_size=4, verbose=False, early_stop=True)
    attack(few_data.as_floats(), few_data.labels)
    row = throughput._attack_files("models_for_tests:small_net", str(tmp_path), 16, 2, 4, "cpu", 1)
    assert row["robust_accuracy"] == pytest.approx(1 - attack.report.fooled.mean())


def test_images_are_written_piece_by_piece_and_again_where_too_few(tmp_path, few_data, monkeypatch):
    monkeypatch.setattr(throughput, "_CHUNK", 3)
    throughput._write_images(tmp_path, few_data, 20)
    batches = list(DataLoader(throughput._MappedImages(tmp_path, 19), batch_size=4))
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.shape == (19, 3, 8, 8)
    assert images.dtype == torch.float32
    assert torch.equal(images[:8], images[8:16])
    assert torch.equal(labels[:3], labels[16:])
    for image, label in zip(images[:8], labels[:8], strict=True):
        same = (few_data.as_floats() == image).flatten(1).all(1)
        assert few_data.labels[same].tolist() == [label]
    assert torch.equal(throughput._MappedImages(tmp_path, 19)[2][0], images[2])


def test_cost_by_number_of_images(clocked):
    images = some_images(12)
    frame = measure_cost_of_images(
        {"one": clocked, "two": clocked}, images, some_labels(12), [4, 12], toolkit_limit=4, steps=3, rounds=2
    )
    assert list(frame.columns) == list(COST_COLUMNS)
    assert frame["model"].tolist() == 5 * ["one"] + 5 * ["two"]
    assert frame["n"].tolist() == 2 * [4, 4, 4, 12, 12]
    toolkit = frame[frame["implementation"] == "torchattacks"]
    assert (toolkit[["n", "seconds", "seconds_per_image"]] == [4, 12, 3]).all(axis=None)
    np.testing.assert_allclose(frame["seconds_per_image"], frame["seconds"] / frame["n"])
    assert frame["robust_share"].isna().all()


def test_cost_by_share_of_robust_images(clocked):
    images = some_images(40)
    labels = clocked(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % CLASSES
    frame = measure_cost_of_robustness(clocked, images, labels, [0, 0.5, 1], model_name="net", n=4, steps=3, rounds=1)
    assert list(frame.columns) == list(COST_COLUMNS)
    assert (frame["n"] == 4).all()
    native, toolkit = (frame[frame["implementation"] == name] for name in ("native", "torchattacks"))
    assert native["robust_share"].tolist() == toolkit["robust_share"].tolist() == [0, 0.5, 1]
    assert native["seconds"].is_monotonic_increasing
    assert native["seconds"].iloc[-1] >= 4 * (3 + 1)  # all steps, and a judgement
    assert (toolkit["seconds"] == 12).all()


def test_mixes_are_as_large_as_the_smaller_kind(clocked):
    images = some_images(40)
    labels = clocked(images).argmax(1)
    labels[:] = (labels + 1) % CLASSES
    with pytest.raises(ValueError, match="0 of 40 withstand"):
        measure_cost_of_robustness(clocked, images, labels, model_name="net", steps=2)
    labels[:] = clocked(images).argmax(1)
    robust = throughput._is_correct(
        clocked,
        PGD(clocked, np.inf, 8 / 255, 2 / 255, max_iter=3, verbose=False, early_stop=True)(images, labels),
        labels,
        128,
    )
    frame = measure_cost_of_robustness(clocked, images, labels, [1], model_name="net", steps=3, rounds=1)
    assert set(frame["n"]) == {min(robust.sum(), (~robust).sum())}


@pytest.mark.parametrize("name", ["steps", "batch_size", "rounds"])
def test_bad_counts_are_refused(name):
    options = {"model_name": "net", name: 0}
    with pytest.raises(ValueError, match=f"{name}=0"):
        measure_throughput(small_net(), some_images(4), some_labels(4), **options)
    with pytest.raises(ValueError, match=f"{name}=0"):
        measure_cost_of_robustness(small_net(), some_images(4), some_labels(4), **options)
    with pytest.raises(ValueError, match=f"{name}=0"):
        measure_cost_of_images({"net": small_net()}, some_images(4), some_labels(4), [4], **{name: 0})


@pytest.mark.parametrize("sizes", [[], [0], [2, 5]])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes="):
        measure_cost_of_images({"net": small_net()}, some_images(4), some_labels(4), sizes)


def test_bad_sizes_in_memory_are_refused(few_data):
    with pytest.raises(ValueError, match="sizes="):
        measure_memory("models_for_tests:small_net", few_data, [0])
    with pytest.raises(ValueError, match="steps=0"):
        measure_memory("models_for_tests:small_net", few_data, steps=0)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_bad_shares_are_refused(share):
    with pytest.raises(ValueError, match=f"share={share}"):
        measure_cost_of_robustness(small_net(), some_images(4), some_labels(4), [share], model_name="net")


@pytest.fixture
def tree(tmp_path):
    """An ImageFolder of 8 test and 3 training images a class, all of them labelled as `small_net` sees them."""
    for split, n in (("test", 8), ("train", 3)):
        for label in range(CLASSES):
            folder = tmp_path / "tree" / split / str(label)
            folder.mkdir(parents=True)
            images = some_images(200, seed=label)
            chosen = images[small_net()((255 * images).round() / 255).argmax(1) == label][:n]
            for i, image in enumerate((255 * chosen).round().to(torch.uint8)):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return tmp_path / "tree"


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


MODEL = "models_for_tests:small_net"


def test_throughput_script(tree, tmp_path, capsys):
    script("attack_throughput")([MODEL], tree, n=12, batch_size=8, steps=2, rounds=1, out=tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out" / "attack_throughput.csv")
    assert list(frame.columns) == list(THROUGHPUT_COLUMNS)
    assert frame["implementation"].tolist() == NAMES
    assert MODEL in capsys.readouterr().out


def test_memory_script(tree, tmp_path):
    script("attack_memory")(MODEL, tree, size=[4], batch_size=4, steps=2, out=tmp_path / "out")
    assert list(pd.read_csv(tmp_path / "out" / "attack_memory.csv").columns) == list(MEMORY_COLUMNS)


def test_cost_script(tree, tmp_path):
    options = {"toolkit_limit": 8, "mix": 6, "pool": 40, "batch_size": 8, "steps": 2, "rounds": 1}
    script("attack_cost")([MODEL], tree, size=[8, 16], out=tmp_path / "out", **options)
    frame = pd.read_csv(tmp_path / "out" / "attack_cost.csv")
    assert list(frame.columns) == list(COST_COLUMNS)
    assert frame["study"].tolist() == 5 * ["images"] + 10 * ["robustness"]
    assert (tmp_path / "out" / "attack_cost.png").read_bytes().startswith(b"\x89PNG")
