import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels
from PIL import Image
from torch.utils.data import DataLoader

from guardians.attacks import PGD
from guardians.data import Dataset
from guardians.experiments import memory
from guardians.experiments.memory import (
    MEMORY_COLUMNS,
    measure_memory,
)

ROOT = Path(__file__).parents[2]


class Clock:
    """Time that passes when images go through a network, a second each."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


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
    memory._write_images(tmp_path, few_data, 16)
    net = small_net()
    attack = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=2, batch_size=4, verbose=False, early_stop=True)
    attack(few_data.as_floats(), few_data.labels)
    row = memory._attack_files("models_for_tests:small_net", str(tmp_path), 16, 2, 4, "cpu", 1)
    assert row["robust_accuracy"] == pytest.approx(1 - attack.report.fooled.mean())


def test_images_are_written_piece_by_piece_and_again_where_too_few(tmp_path, few_data, monkeypatch):
    monkeypatch.setattr(memory, "_CHUNK", 3)
    memory._write_images(tmp_path, few_data, 20)
    batches = list(DataLoader(memory._MappedImages(tmp_path, 19), batch_size=4))
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert images.shape == (19, 3, 8, 8)
    assert images.dtype == torch.float32
    assert torch.equal(images[:8], images[8:16])
    assert torch.equal(labels[:3], labels[16:])
    for image, label in zip(images[:8], labels[:8], strict=True):
        same = (few_data.as_floats() == image).flatten(1).all(1)
        assert few_data.labels[same].tolist() == [label]
    assert torch.equal(memory._MappedImages(tmp_path, 19)[2][0], images[2])


def test_bad_sizes_in_memory_are_refused(few_data):
    with pytest.raises(ValueError, match="sizes="):
        measure_memory("models_for_tests:small_net", few_data, [0])
    with pytest.raises(ValueError, match="steps=0"):
        measure_memory("models_for_tests:small_net", few_data, steps=0)


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
