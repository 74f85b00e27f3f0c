import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels
from PIL import Image

from guardians.attacks import PGD
from guardians.data import Dataset, load_data
from guardians.experiments import memory
from guardians.experiments.memory import MEMORY_COLUMNS, measure_memory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def few_data():
    images = (255 * some_images(8)).round().to(torch.uint8)
    return Dataset(images, some_labels(8), tuple("abcde"), "random")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_process_attacks_the_images_that_were_written(tmp_path, few_data, workers):
    memory._write_images(tmp_path, few_data, 16, 16)
    net = torch.nn.Sequential(torch.nn.AvgPool2d(2), small_net()).eval()
    attack = PGD(net, np.inf, 8 / 255, 2 / 255, max_iter=2, batch_size=4, verbose=False, early_stop=True)
    data = load_data(tmp_path)
    labels = torch.tensor([int(name) for name in data.classes])[data.labels]
    assert len(data.classes) < len(few_data.classes)  # some have no images
    attack(data.as_floats(), labels)
    row = memory._attack(
        str(tmp_path), "models_for_tests:small_net", 16, workers, 4, steps=2, size=(8, 8), device="cpu", threads=1
    )
    assert row["robust_accuracy"] == pytest.approx(1 - attack.report.fooled.mean())


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_enlarged_and_linked_where_too_few(tmp_path, few_data, channels):
    """JPEG files of the images in a balanced order, each under as many names as are needed."""
    grey = few_data.images[:, :channels]
    memory._write_images(tmp_path, Dataset(grey, few_data.labels, few_data.classes, "random"), 20, 64)
    data = load_data(tmp_path)
    assert data.images.shape == (20, channels, 64, 64)
    files = list((tmp_path / "test").rglob("*.jpg"))
    assert len({file.stat().st_ino for file in files}) == 8
    small = torch.nn.functional.avg_pool2d(data.images.float(), 8)
    for image, label in zip(small, data.labels, strict=True):
        distances = (grey.float() - image).abs().flatten(1).mean(1)
        assert distances.min() < distances.median() / 3  # but for the losses of JPEG
        assert few_data.labels[distances.argmin()] == int(data.classes[label])


@pytest.mark.parametrize("name", ["sizes", "workers"])
@pytest.mark.parametrize("numbers", [[], [0]])
def test_bad_numbers_are_refused(few_data, name, numbers):
    with pytest.raises(ValueError, match=f"{name}="):
        measure_memory("models_for_tests:small_net", few_data, **{name: numbers})
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
    options = {"size": [6], "workers": [1], "side": 16, "batch_size": 4, "steps": 2}
    script("attack_memory")(MODEL, tree, **options, out=tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out" / "attack_memory.csv")
    assert list(frame.columns) == list(MEMORY_COLUMNS)
    assert frame["work"].tolist() == ["decode", "attack in memory", "attack"]
    assert frame["workers"].tolist() == [1, 0, 1]
    assert (frame["n"] == 6).all()
    assert (frame["peak_memory_mb"] > 10).all()
    np.testing.assert_array_equal(frame["worker_peak_mb"] > 10, frame["workers"] > 0)
    np.testing.assert_allclose(frame["images_per_second"], frame["n"] / frame["seconds"])
    assert frame["robust_accuracy"].iloc[1] == frame["robust_accuracy"].iloc[2]  # of the same images
    assert frame.loc[0, ["model", "robust_accuracy"]].isna().all()
