import numpy as np
import pytest
import torch
from models_for_tests import some_images, some_labels

from guardians.data import Dataset
from guardians.experiments.training_scaling import SCALING_COLUMNS, measure_scaling


@pytest.fixture
def data():
    return Dataset((255 * some_images(16)).round().to(torch.uint8), some_labels(16), tuple("abcde"), "random")


def test_processes_are_compared_on_the_same_steps(data):
    small = {"width": 2, "batch_size": 4, "steps": 2, "repeats": 1}
    frame = measure_scaling(data, ["standard"], [1, 2], **small)
    assert list(frame.columns) == list(SCALING_COLUMNS)
    assert frame["processes"].tolist() == [1, 2]
    assert (frame["seconds"] > 0).all()
    np.testing.assert_allclose(frame["images_per_second"], 8 / frame["seconds"])
    np.testing.assert_allclose(frame["speedup"], frame["images_per_second"] / frame["images_per_second"][0])


@pytest.mark.parametrize(
    ("recipe", "processes", "options", "message"),
    [
        ("other", 1, {}, "recipes='other': must be one of"),
        ("standard", 0, {}, "processes=0: must be"),
        ("standard", 1, {"repeats": 0}, "repeats=0: must be"),
        (
            "standard",
            1,
            {"steps": 5, "batch_size": 4},
            "steps=5: an epoch of standard takes 20 images, the data has 16",
        ),
    ],
)
def test_bad_arguments(data, recipe, processes, options, message):
    with pytest.raises(ValueError, match=message):
        measure_scaling(data, [recipe], [processes], **options)
