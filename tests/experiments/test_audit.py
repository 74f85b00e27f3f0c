"""The audit: what only hides is flagged, what is sound is not, and each rule says so for a model that breaks it."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models_for_tests import Constant, NanGradient, art_classifier, linear_model, small_net, some_images
from torch import nn

import guardians
from guardians.cli import run
from guardians.data import Dataset
from guardians.experiments import planted
from guardians.experiments.audit import RULES
from guardians.experiments.planted import AUDIT_COLUMNS, PLANTED, SOUND, Planted, audit_planted, rules_as_markdown
from guardians.tables import read_csv

INF = float("inf")
ROOT = Path(__file__).parents[2]
N = 16


def audited(net, x=None, y=None, **options):
    x = some_images(N) if x is None else x
    with torch.no_grad():
        y = net(x).argmax(1) if y is None else y
    return guardians.audit(net, x, y, **{"eps": 0.02, "verbose": False, **options})


class Changed(nn.Module):
    """A net whose images or logits are changed."""

    def __init__(self, net, images=lambda x: x, logits=lambda z: z):
        super().__init__()
        self.net, self.images, self.logits = net, images, logits

    def forward(self, x):
        return self.logits(self.net(self.images(x)))


def of_batch(x):
    return x - x.mean((0, 2, 3), keepdim=True)


def sawtooth(x):
    """Falls where the image rises, but for jumps: gradients have the wrong sign."""
    return 2 * (20 * x).round() / 20 - x


BROKEN = {
    "random without EOT": lambda: Changed(small_net(), images=lambda x: x + 0.05 * torch.randn_like(x)),
    "depends on batch": lambda: Changed(small_net(), images=of_batch),
    "no gradient": lambda: Changed(small_net(), images=torch.Tensor.detach),
    "vanishing gradients": lambda: Changed(small_net(), images=lambda x: (7 * x).round() / 7),
    "undefined gradients": NanGradient,
    "misleading gradients": lambda: Changed(small_net(), images=sawtooth),
    "saturated outputs": lambda: Changed(small_net(), logits=lambda z: 1e4 * z),
    "quantised outputs": lambda: Changed(small_net(), logits=torch.round),
    "weaker than black-box": lambda: Changed(small_net(), images=sawtooth),
    "robust where nothing can be": lambda: Changed(small_net(), images=lambda x: (7 * x).round() / 7),
}


@pytest.mark.parametrize("flag", BROKEN)
def test_a_model_that_breaks_a_rule_is_flagged(flag):
    torch.manual_seed(0)
    found = audited(BROKEN[flag]())
    assert flag in found.flags
    row = found.table.set_index("flag").loc[flag]
    assert row["value"] > row["threshold"]
    assert row["advice"] in str(found)


@pytest.mark.parametrize(
    ("net", "norm", "eps"),
    [
        (small_net(), 1, 1.0),
        (small_net(), 2, 0.2),
        (small_net(), INF, 0.02),
        (linear_model(dtype=torch.float32), INF, 0.02),
    ],
    ids=["net-1", "net-2", "net-inf", "linear-inf"],
)
def test_an_undefended_model_is_not_flagged(net, norm, eps):
    found = audited(net, norm=norm, eps=eps)
    assert found.flags == []
    assert len(found.table) == len(RULES)
    assert "0 of" in str(found)


def test_means_over_draws_answer_randomness():
    noisy = Changed(small_net(), images=lambda x: x + 0.005 * torch.randn_like(x))
    assert "random without EOT" in audited(noisy).flags
    assert "random without EOT" not in audited(noisy, eot_samples=5).flags


def test_images_of_a_surrogate_are_tried():
    hidden = Changed(small_net(), images=lambda x: (63 * x).round() / 63)
    found = audited(hidden, surrogates=[small_net()]).table.set_index("flag")["value"]
    assert found["weaker than transfer"] > 0.02
    assert np.isnan(audited(hidden).table.set_index("flag")["value"]["weaker than transfer"])


def test_what_cannot_be_measured_without_a_gradient_is_no_flag():
    found = audited(BROKEN["no gradient"]())
    assert found.flags == ["no gradient"]
    assert found.table["value"].isna().sum() >= 5


def test_only_images_that_the_model_gets_right_count():
    x, net = some_images(N), small_net()
    y = net(x).argmax(1)
    y[: N // 2] = (y[: N // 2] + 1) % 5
    assert audited(net, x, y).n == N - N // 2


def test_art_classifiers_and_arrays_are_taken():
    x, net = some_images(N), small_net()
    y = net(x).argmax(1)
    expected = audited(net, x, y).table
    found = guardians.audit(art_classifier(small_net()), x.numpy(), y.numpy(), eps=0.02, verbose=False).table
    assert found.equals(expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0}, ValueError, "eps=0"),
        ({"norm": 3}, ValueError, "norm=3"),
        ({"eot_samples": 0}, ValueError, "eot_samples=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"y": torch.zeros(3, dtype=torch.long)}, ValueError, "labels|y"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        audited(small_net(), **options)


def test_a_model_that_is_all_wrong_cannot_be_audited():
    x, net = some_images(4), Constant()
    with pytest.raises(ValueError, match="none of the images right"):
        audited(net, x, torch.full((4,), 3))


def test_the_model_comes_back_as_it_was():
    net = small_net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    audited(net, y=torch.zeros(N, dtype=torch.long))
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_planted_defences_leave_labels_and_name_flags_that_exist():
    names = {rule.name for rule in RULES}
    assert len({defence.name for defence in (*PLANTED, *SOUND)}) == len(PLANTED) + len(SOUND)
    assert all(defence.flags and set(defence.flags) <= names for defence in PLANTED)
    assert not any(defence.flags for defence in SOUND)


def test_the_table_says_what_was_caught_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "load_model", lambda name, device="cpu": small_net())
    x = (255 * some_images(N)).round().to(torch.uint8)
    with torch.no_grad():
        y = small_net()(x / 255).argmax(1)
    data = Dataset(x, y, tuple("abcde"), "noise")
    defences = [
        Planted("rounded", lambda f: Changed(f, images=lambda x: (7 * x).round() / 7), ("vanishing gradients",)),
        Planted("nothing", lambda f: f, ("saturated outputs",)),
        Planted("sound", lambda f: f),
        Planted("accused", lambda f: Changed(f, images=lambda x: (7 * x).round() / 7)),
    ]
    frame = audit_planted(data, tmp_path, defences=defences, verbose=False)
    assert frame["verdict"].tolist() == ["caught", "missed", "sound", "false alarm"]
    assert list(frame.columns) == list(AUDIT_COLUMNS)
    monkeypatch.setattr(planted, "audit", None)
    assert audit_planted(data, tmp_path, defences=defences, verbose=False).equals(frame)
    assert read_csv(tmp_path / "audit.csv").equals(frame)


@pytest.fixture(scope="module")
def committed():
    return read_csv(ROOT / "results" / "audit.csv")


def test_all_that_was_planted_is_caught_and_nothing_that_is_sound(committed):
    assert list(committed.columns) == list(AUDIT_COLUMNS)
    assert committed["defence"].tolist() == [defence.name for defence in (*PLANTED, *SOUND)]
    assert committed["verdict"].tolist() == ["caught"] * len(PLANTED) + ["sound"] * len(SOUND)


def test_the_docs_have_the_rules_and_what_was_measured(committed):
    assert rules_as_markdown(committed) in (ROOT / "docs" / "audit.md").read_text()


def test_the_command_prints_and_writes_what_was_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["guardians", "audit", "--n", "2", "--eps", "1/255", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        run()
    assert not left.value.code
    printed = capsys.readouterr().out
    assert all(rule.name in printed for rule in RULES)
    assert set(read_csv(tmp_path / "audit.csv")["flag"]) == {rule.name for rule in RULES}
