"""The scripts of examples/ run on a few images, and print for native pieces what they print for ART's."""

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def printed(monkeypatch, capsys):
    """The lines that a script prints, on the offline images."""

    def run(name, *arguments):
        monkeypatch.delenv("GUARDIANS_DATA", raising=False)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(autouse=True)
def _arts_table(monkeypatch):
    from art.metrics import metrics

    monkeypatch.setattr(metrics, "SUPPORTED_METHODS", dict(metrics.SUPPORTED_METHODS))


def after(lines, start):
    """What follows in the lines that begin so."""
    found = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert found, (start, lines)
    return found


def test_attack_swap(printed):
    lines = printed("art_attack_swap.py", "--n", "6")
    for name in ("FastGradientMethod", "ProjectedGradientDescent"):
        theirs, ours = (line.split() for line in after(lines, name))
        assert theirs[0] == "ART"
        assert ours[1] == theirs[1]
        assert float(ours[-1]) < 1e-6
    for name in ("AutoProjectedGradientDescent", "CarliniL2Method"):
        theirs, ours = (float(line.split()[1].rstrip("%")) for line in after(lines, name))
        assert ours <= theirs


def test_auto_attack(printed):
    lines = printed("art_auto_attack.py", "--n", "6", "--iterations", "5")
    theirs, *ours = [float(re.search(r"robust accuracy ([\d.]+)%", line)[1]) for line in lines]
    assert len(ours) == 2
    assert max(ours) <= theirs < 100


def test_metrics(printed):
    lines = printed("art_metrics.py", "--n", "6")
    for metric in ("adversarial accuracy, PGD-10 of", "empirical robustness, FGSM of"):
        (theirs,), (ours,) = (after(lines, f"{metric} {whose}: ") for whose in ("ART", "Guardians"))
        assert float(ours) == pytest.approx(float(theirs), abs=2e-5)
    (nearest,) = after(lines, "empirical robustness, FMN of Guardians: ")
    assert 0 < float(nearest) < float(after(lines, "empirical robustness, FGSM of ART: ")[0])
    assert len(after(lines, "loss sensitivity, ")) == 2


def test_trainer(printed):
    lines = printed("art_trainer.py", "--n", "6")
    accuracies = {re.search("robust accuracy (.*?),", line)[1] for line in after(lines, "")}
    assert len(accuracies) == 1
    differences = [float(line.split()[-1]) for line in lines]
    assert differences[0] == 0
    assert max(differences) < 1e-5


def test_defended_estimator(printed):
    lines = printed("art_defended_estimator.py", "--n", "4")
    assert [line.split(":")[0] for line in lines if "clean" in line] == [
        "no defence",
        "Random Self-Ensemble",
    ]
    theirs, ours = (after(lines, f"    {whose} PGD-10 ")[0].strip() for whose in ("ART", "native"))
    assert ours == theirs  # of no defence
    assert "largest change 0.016" in theirs
