"""The loop keeps to its device. Fake tensors know theirs, refuse to mix two, and have no values to read."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from models_for_tests import SHAPE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from guardians.attacks import APGD, FGSM, PGD, CarliniWagnerL2, CarliniWagnerLinf, apgd
from guardians.engine import loop
from guardians.engine import run as run_module
from guardians.engine.report import Report
from guardians.engine.rng import row_keys
from guardians.engine.run import Run
from guardians.engine.search import Search

INF = float("inf")
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
N = 7


@pytest.fixture
def reads(monkeypatch):
    """A machine with a CUDA device, without values; what tries to read some from there is listed."""
    read = []

    def listed(name):
        original = getattr(torch.Tensor, name)

        def method(tensor, *arguments, **options):
            result = original(tensor, *arguments, **options)
            if tensor.device == CUDA and result.device != CUDA:
                read.append(name)
            return result

        return method

    def numpy(tensor):
        assert tensor.device == CPU
        return np.zeros(tensor.shape, dtype=bool) if tensor.dtype == torch.bool else np.full(tensor.shape, 2.0)

    def gradient(objective, inputs, allow_unused=False):
        assert objective.device == inputs.device == CUDA
        assert objective.shape == ()
        assert objective.requires_grad
        return (torch.ones_like(inputs),)

    for name in ("cpu", "to"):
        monkeypatch.setattr(torch.Tensor, name, listed(name))
    monkeypatch.setattr(torch.Tensor, "numpy", numpy)
    # Autograd's own threads look for the real device, and fake tensors have no pinned memory.
    monkeypatch.setattr(torch.autograd, "grad", gradient)
    monkeypatch.setattr(loop._Queue, "_moved", lambda queue, value: value.to(queue._device, copy=True))
    monkeypatch.setattr(Run, "drawing", lambda run, keys: row_keys(keys))  # a machine without a generator there
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield read


def fake_net():
    with CUDA:
        net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
    return net.eval().requires_grad_(False)


def batches(*sizes, labels=True, start=False):
    for n in sizes:
        batch = {"x": torch.rand(n, *SHAPE), "mask": torch.rand(n, *SHAPE) > 0.5}
        if labels:
            batch["y"] = torch.zeros(n, dtype=torch.int64)
        if start:
            batch["x_adv_init"] = torch.rand(n, *SHAPE)
        yield batch


def run(attack, data):
    report, indices = Report(), []
    with torch.no_grad():
        for finished in loop.stream(attack, data, seed=0, device=CUDA, report=report):
            assert isinstance(finished.x_adv, FakeTensor)
            assert finished.x_adv.device == CUDA
            assert finished.x_adv.shape == (len(finished.index), *SHAPE)
            indices += finished.index.tolist()
    assert sorted(indices) == list(range(N))
    return report


def on_host_is(monkeypatch, on_host):
    for module in (loop, run_module):
        monkeypatch.setattr(module, "on_host", on_host)


norms = pytest.mark.parametrize("norm", [1, 2, 3, INF])
PGD_OPTIONS = {
    "plain": {},
    "random starts": {"num_random_init": 2, "random_eps": True},
    "momentum": {"decay": 0.9, "eot_samples": 2},
    "eps of each sample": {
        "eps": np.full((N, 1, 1, 1), 0.1),
        "eps_step": np.full(1, 0.05),
        "targeted": True,
        "eot_samples": 4,
    },
}
pgd_options = pytest.mark.parametrize("options", PGD_OPTIONS.values(), ids=PGD_OPTIONS)


def pgd(**options):
    options = {"eps": 0.1, "eps_step": 0.05, "max_iter": 3, "batch_size": 3, "verbose": False, **options}
    return PGD(fake_net(), **options)


@norms
@pgd_options
def test_the_classical_loop_stays_on_its_device_and_reads_nothing(norm, options, reads):
    start = norm in (2, INF)
    attack = pgd(norm=norm, **{**options, "num_random_init": min(1, options.get("num_random_init", 0))})
    report = run(attack, batches(3, 2, 2, start=start, labels=not start))
    assert reads == []
    assert report.search_forward == report.search_backward == 3 * N * attack.eot_samples


@norms
@pytest.mark.parametrize("minimal", [False, True])
def test_fgsm_stays_on_its_device(norm, minimal, reads):
    attack = FGSM(fake_net(), norm, 0.1, 0.05, num_random_init=1, minimal=minimal, batch_size=3)
    run(attack, batches(3, 2, 2))
    if not minimal:  # which wants to know whether it has found a size
        assert reads == []


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize(
    "options",
    [{"nb_random_init": 0, "eot_samples": 2}, {"loss_type": "margin", "targeted": True}, {"n_targets": 1}],
    ids=["from the image", "margin", "targets"],
)
def test_apgd_stays_on_its_device(norm, options, reads, monkeypatch):
    monkeypatch.setattr(apgd, "ForkedGenerators", lambda seed, device: nullcontext())
    common = {"max_iter": 7, "nb_random_init": 1, "batch_size": 3, "verbose": False}
    attack = APGD(fake_net(), norm, 0.1, **{**common, **options})
    report = run(attack, batches(3, 2, 2, start=norm == 2))
    assert reads == []
    assert report.search_forward == 8 * N * attack.eot_samples
    assert report.search_backward == 7 * N * attack.eot_samples


@norms
@pgd_options
def test_retiring_refilling_and_restarting_stay_on_the_device(norm, options, reads, monkeypatch):
    random, waits = np.random.default_rng(0), []

    def on_host(values):
        if isinstance(values, np.ndarray):
            return values
        assert values.device == CUDA
        waits.append(values.shape)
        return random.random(tuple(values.shape)) < 0.25

    def equal(one, other):
        assert one.device == other.device == CUDA
        assert one.shape == other.shape
        return bool(random.random() < 0.5)

    on_host_is(monkeypatch, on_host)
    monkeypatch.setattr(torch, "equal", equal)
    monkeypatch.setattr(Run, "_probe", lambda run, x: None)  # compares values
    report = run(pgd(norm=norm, early_stop=True, **options), batches(3, 2, 2, start=True))
    assert reads == []
    assert report.judgement_forward > 0
    assert report.search_forward < (2 * 3 + 1) * N * 4
    assert waits


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_what_a_copy_fails_is_searched_again_on_the_device(share, reads, monkeypatch):
    random, asked = np.random.default_rng(1), []

    def on_host(values):
        return values if isinstance(values, np.ndarray) else random.random(tuple(values.shape)) < share

    def search_with_a_copy(run, x):
        copy = fake_net()

        def logits(images):
            asked.append(len(images))
            return copy(images)

        run.searches = [Search(logits, "copy"), *run.searches]

    on_host_is(monkeypatch, on_host)
    monkeypatch.setattr(torch, "equal", lambda one, other: False)
    monkeypatch.setattr(Run, "_probe", search_with_a_copy)
    report = run(pgd(norm=INF, early_stop=True, num_random_init=2), batches(3, 2, 2))
    assert reads == []
    assert N <= sum(asked) < report.search_forward


@pytest.mark.parametrize("box", ["tanh", "projected", "clipped"])
@pytest.mark.parametrize(
    ("attack_class", "options"),
    [
        (CarliniWagnerL2, {"binary_search_steps": 4, "max_iter": 30}),
        (CarliniWagnerL2, {"targeted": True, "objective_function": "f7", "eot_samples": 2}),
        (CarliniWagnerL2, {"binary_search_steps": 10, "max_iter": 2, "adaptive": False}),
        (CarliniWagnerLinf, {}),
    ],
)
def test_minimum_norm_attacks_stay_on_the_device(attack_class, options, box, reads, monkeypatch):
    random = np.random.default_rng(2)

    def on_host(values):
        return values if isinstance(values, np.ndarray) else random.random(tuple(values.shape)) < 0.25

    on_host_is(monkeypatch, on_host)
    monkeypatch.setattr(Run, "_probe", lambda run, x: None)
    attack = attack_class(fake_net(), box=box, batch_size=3, verbose=False, **options)
    attack.victim._known_classes = 5
    run(attack, batches(3, 2, 2))
    assert reads == []
