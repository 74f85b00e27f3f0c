"""`digest`: the same for the same model, another for one that answers otherwise."""

import copy
import importlib
import subprocess
import sys

import pytest
import torch
from models_for_tests import small_net, some_images
from torch import nn

from guardians.defences import MixupInference, RandomSelfEnsemble
from guardians.models import build_model, digest, load_model

ONE_IN_MANY = (torch.arange(2000) == 1000).float()
WEIGHTED = nn.Linear(4, 4, bias=False)


class Scaled(nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.factor * self.net(x)


class Privately(Scaled):
    def __init__(self, net, factor):
        super().__init__(net, None)
        self._factor = factor


class Attended(nn.Module):
    def __init__(self, num_heads):
        super().__init__()
        self.num_heads = num_heads


class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


class Printed(nn.Module):
    def __init__(self, at_least):
        super().__init__()
        self._hidden = at_least

    def extra_repr(self):
        return f"at_least={self._hidden}"


def with_attribute(value):
    net = small_net()
    net.temperature = value
    return net


def changed(name, change):
    net = small_net()
    with torch.no_grad():
        change(net.get_parameter(name) if "running" not in name else net.get_buffer(name))
    return net


def in_mixup(seed, method="MI-OL"):
    return MixupInference(small_net(), (some_images(10, seed=seed), torch.arange(10) % 5), method, seed=0)


DIFFERENT = {
    "weights": (small_net(), small_net(1)),
    "one weight": (small_net(), changed("head.weight", lambda weight: weight[0, 0].mul_(1.001))),
    "a statistic": (small_net(), changed("features.1.running_mean", lambda mean: mean[0].add_(1e-3))),
    "precision": (small_net(), small_net(dtype=torch.float64)),
    "shape": (nn.ParameterList([torch.zeros(2, 3)]), nn.ParameterList([torch.zeros(3, 2)])),
    "layers without parameters": (nn.Sequential(WEIGHTED, nn.ReLU()), nn.Sequential(WEIGHTED, nn.GELU())),
    "no parameters at all": (nn.ReLU(), nn.GELU()),
    "order": (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
    "how often a layer comes": (nn.Sequential(*[WEIGHTED] * 2), nn.Sequential(*[WEIGHTED] * 3)),
    "stride": (nn.MaxPool2d(2, stride=1), nn.MaxPool2d(2, stride=2)),
    "eps of batch norm": (nn.BatchNorm2d(3), nn.BatchNorm2d(3, eps=1e-3)),
    "an argument": (Scaled(WEIGHTED, 1.0), Scaled(WEIGHTED, 2.0)),
    "an integer argument": (Attended(2), Attended(4)),
    "an argument kept privately": (Privately(WEIGHTED, 1.0), Privately(WEIGHTED, 2.0)),
    "a tensor that is no buffer": (Configured(torch.zeros(2000)), Configured(ONE_IN_MANY)),
    "an array": (Configured(torch.zeros(2000).numpy()), Configured(ONE_IN_MANY.numpy())),
    "modules in a plain list": (Configured([small_net()]), Configured([small_net(1)])),
    "a dictionary": (Configured({"depth": 1}), Configured({"depth": 2})),
    "a function": (Configured(torch.relu), Configured(torch.tanh)),
    "an attribute set from outside": (with_attribute(1.0), with_attribute(2.0)),
    "extra_repr": (Printed(1), Printed(2)),
    "the bundled scale": (build_model("resnet9", width=1)[-1], type(build_model("resnet9", width=1)[-1])(0.25)),
    "noise": (RandomSelfEnsemble(small_net(), 0.2, seed=0), RandomSelfEnsemble(small_net(), 0.1, seed=0)),
    "the pool": (in_mixup(1), in_mixup(2)),
    "the method": (in_mixup(1), in_mixup(1, "MI-PL")),
    "traced code": (torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), torch.fx.symbolic_trace(nn.Sequential())),
}


@pytest.mark.parametrize(("first", "second"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_models_that_differ_have_other_digests(first, second):
    assert digest(first) != digest(second)
    assert digest(copy.deepcopy(first)) == digest(first)


def test_what_does_not_change_the_answer_does_not_change_the_digest():
    net = Scaled(small_net(), 2.0).eval()
    before = digest(net)
    assert len(before) == 8
    int(before, 16)
    net(some_images(2))
    assert net.calls == net.net.images_seen / 2 == 1
    net.train()
    net.requires_grad_(False)
    net.to(memory_format=torch.channels_last)
    assert digest(net) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("kind", [torch.jit.script, torch.fx.symbolic_trace, lambda net: net.bfloat16()])
def test_models_of_any_kind_have_one(kind):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert digest(kind(net)) == digest(kind(copy.deepcopy(net)))


@pytest.mark.parametrize("edited", ["x + 1", "x"])
def test_an_edited_forward_is_another_model(edited, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return "
    digests = []
    for body in ("x", edited):
        (tmp_path / "edited_model.py").write_text(source + body + "\n")
        sys.modules.pop("edited_model", None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        digests.append(digest(importlib.import_module("edited_model").Net()))
        sys.dont_write_bytecode = before
    assert (digests[0] == digests[1]) == (edited == "x")


def test_a_layer_may_know_the_one_above_it():
    above = nn.Sequential(nn.Linear(2, 2))
    above.append(Configured([above]))
    other = copy.deepcopy(above)
    assert digest(other) == digest(above)
    with torch.no_grad():
        other[0].weight.add_(1)
    assert digest(other) != digest(above)


def test_a_class_without_source_has_a_digest():
    space = {}
    exec("from torch import nn\nclass Net(nn.Module):\n    pass", {"__name__": "__nowhere__"}, space)
    assert digest(space["Net"]()) == digest(space["Net"]())


def test_another_process_finds_the_same():
    code = "from guardians.models import *; print(digest(load_model('resnet9-16-standard')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(load_model("resnet9-16-standard"))
