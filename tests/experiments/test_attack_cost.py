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
from guardians.experiments import attack_cost
from guardians.experiments.attack_cost import (
    COST_COLUMNS,
    MEMORY_COLUMNS,
    measure_cost_of_images,
    measure_cost_of_robustness,
    measure_memory,
)

ROOT = Path(__file__).parents[2]


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
    monkeypatch.setattr("guardians.experiments.timing.time.perf_counter", ClockedNet.clock)
    return net


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
    attack_cost._write_images(tmp_path, few_data, 16)
    net = small_net()
    attack = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=2, batch_size=4, verbose=False, early_stop=True)
    attack(few_data.as_floats(), few_data.labels)
    row = attack_cost._attack_files("models_for_tests:small_net", str(tmp_path), 16, 2, 4, "cpu", 1)
    assert row["robust_accuracy"] == pytest.approx(1 - attack.report.fooled.mean())


def test_images_are_written_piece_by_piece_and_again_where_too_few(tmp_path, few_data, monkeypatch):
    monkeypatch.setattr(attack_cost, "_CHUNK", 3)
    attack_cost._write_images(tmp_path, few_data, 20)
    batches = list(DataLoader(attack_cost._MappedImages(tmp_path, 19), batch_size=4))
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.shape == (19, 3, 8, 8)
    assert images.dtype == torch.float32
    assert torch.equal(images[:8], images[8:16])
    assert torch.equal(labels[:3], labels[16:])
    for image, label in zip(images[:8], labels[:8], strict=True):
        same = (few_data.as_floats() == image).flatten(1).all(1)
        assert few_data.labels[same].tolist() == [label]
    assert torch.equal(attack_cost._MappedImages(tmp_path, 19)[2][0], images[2])


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
    robust = attack_cost._is_correct(
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
