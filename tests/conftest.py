import pytest
import torch
from hypothesis import settings
from models_for_tests import art_classifier, small_net, some_images, some_labels

settings.register_profile("guardians", deadline=None, derandomize=True)
settings.load_profile("guardians")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def net64():
    return small_net(dtype=torch.float64)


@pytest.fixture
def estimator(net):
    return art_classifier(net)


@pytest.fixture
def x():
    return some_images(12)


@pytest.fixture
def x64():
    return some_images(12, dtype=torch.float64)


@pytest.fixture
def y():
    return some_labels(12)
