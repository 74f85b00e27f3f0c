import math
import sys

import pytest
import torch
from torch import nn

from guardians.attacks import Spec
from guardians.experiments.counting import CountingModel, peak_memory
from guardians.toolkits.build import build_attack


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def counts(counting):
    return counting.forward_samples, counting.backward_samples


def test_counts_samples_and_is_the_model_otherwise(model):
    counting = CountingModel(model)
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(counting(x), model(x))
    assert counts(counting) == (5, 0)
    counting(x.requires_grad_()).sum().backward()
    assert counts(counting) == (10, 5)
    logits = counting(x)
    for k in range(4):
        torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)
    assert counts(counting) == (15, 25)
    counting.reset()
    assert counts(counting) == (0, 0)


def test_gradient_is_that_of_the_model(model):
    x = torch.rand(5, 3, 8, 8, requires_grad=True)
    expected = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
    assert torch.equal(torch.autograd.grad(CountingModel(model)(x)[:, 0].sum(), x)[0], expected)


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_keeps_the_mode(model, training):
    model.train(training)
    assert CountingModel(model).training is model.training is training


# What each toolkit spends per image beyond the steps: foolbox judges its last image, ART's PGD that and the first.
@pytest.mark.parametrize(
    ("implementation", "attack", "forward", "backward"),
    [
        ("native", "FGSM", 1, 1),
        ("native", "PGD", 10, 10),
        ("ART", "FGSM", 1, 1),
        ("ART", "PGD", 12, 10),
        ("torchattacks", "FGSM", 1, 1),
        ("torchattacks", "PGD", 10, 10),
        ("foolbox", "FGSM", 2, 1),
        ("foolbox", "PGD", 11, 10),
    ],
)
def test_counts_of_the_toolkits(model, implementation, attack, forward, backward):
    if implementation in ("torchattacks", "foolbox"):
        pytest.importorskip(implementation)
    counting = CountingModel(model)
    spec = Spec(attack, float("inf"), 8 / 255, params={} if attack == "FGSM" else {"steps": 10, "eps_step": 2 / 255})
    run = build_attack(implementation, spec, counting, nb_classes=4, input_shape=(3, 8, 8), batch_size=4)
    x, y = torch.rand(7, 3, 8, 8), torch.arange(7) % 4
    run(x, y)  # the first call may also ask for the number of classes
    counting.reset()
    run(x, y)
    assert counts(counting) == (7 * forward, 7 * backward)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets the peak")
def test_peak_memory_sees_what_the_block_freed_again():
    with peak_memory() as before:
        pass
    with peak_memory() as peak:
        block = torch.ones(60_000_000)
        del block
    with peak_memory() as after:
        pass
    assert peak.mb > before.mb + 100
    assert after.mb < before.mb + 100


def test_peak_memory_without_a_peak_to_reset(monkeypatch):
    monkeypatch.setattr("guardians.experiments.counting._reset_resident_peak", lambda: False)
    with peak_memory() as peak:
        assert math.isnan(peak.mb)
    assert 10 < peak.mb < 1e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_peak_memory_on_the_gpu():
    with peak_memory("cuda") as peak:
        block = torch.ones(50_000_000, device="cuda")
        del block
    with peak_memory("cuda") as after:
        pass
    assert peak.mb == pytest.approx(after.mb + 200, abs=5)
