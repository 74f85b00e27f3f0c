import shutil

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


@pytest.fixture(scope="session")
def chromium():
    """A driver of headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    browser, driver = (
        next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None),
        shutil.which("chromedriver"),
    )
    if browser is None or driver is None:
        pytest.skip("needs Chromium and its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as chrome:
        yield chrome
