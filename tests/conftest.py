import shutil

import pytest
import torch
from hypothesis import settings
from models_for_tests import art_classifier, small_net, some_images, some_labels
from playwright.sync_api import sync_playwright

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


@pytest.fixture(scope="session")
def chromium():
    """A headless browser."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as play, play.chromium.launch(executable_path=path, args=["--no-sandbox"]) as one:
        yield one
