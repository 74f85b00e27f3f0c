import contextlib
import io
import sys
from collections import Counter

import pytest
import torch

from guardians.attacks import fmn, pgd
from guardians.attacks.pgd import SteepestAscent
from guardians.attacks.registry import Spec
from guardians.cli import run
from guardians.parity import Case, fuzz
from guardians.parity.fuzz import Problem
from guardians.toolkits.build import TOOLKITS

for package in ("torchattacks", "foolbox", "hypothesis"):
    pytest.importorskip(package)


def found(n=200, **options):
    return fuzz.fuzz(n, verbose=False, **options)


def test_native_agrees_with_the_toolkits_on_fifty_problems():
    findings = found(50)
    assert findings.counterexample is None, findings.counterexample.code
    assert findings.difference is None
    assert findings.counts.total() == 50
    assert set(findings.counts) == set(TOOLKITS)


def towards_the_label(attack, logits, y, state):
    return attack.victim.loss(logits, y)


def without_projection(attack, x_adv, state):
    return x_adv.clamp(state.low, state.high)


def in_float32(attack, points, state):
    return points.float().to(points)


def without_mask(gradient, mask):
    return gradient


def without_annealing(first, last, share, x):
    return torch.full_like(x.flatten(1)[:, :1], first).reshape((-1,) + (1,) * (x.ndim - 1))


PLANTED = {
    "the sign of targets": (SteepestAscent, "objective", towards_the_label, "FGSM", "ART"),
    "no projection": (SteepestAscent, "inside", without_projection, "PGD-10", "ART"),
    "an output in float32": (SteepestAscent, "returned", in_float32, "FGSM", "foolbox"),
    "no mask": (pgd, "free_gradient", without_mask, "FGSM", "ART"),
    "no annealing": (fmn, "annealed", without_annealing, "FMN-20", "foolbox"),
}
HAS = {
    "the sign of targets": lambda problem: problem.case.spec.targeted,
    "no projection": lambda problem: problem.case.spec.norm != float("inf"),
    "an output in float32": lambda problem: problem.dtype == "float64",
    "no mask": lambda problem: problem.masked and problem.case.reference == "ART",
    "no annealing": lambda problem: problem.case.spec.get("steps") > 1,
}


def plant(fault, monkeypatch):
    owner, name, faulty, attack, reference = PLANTED[fault]
    monkeypatch.setattr(owner, name, faulty)
    return found(attacks=[attack], references=[reference])


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_and_shrunk(fault, monkeypatch):
    findings = plant(fault, monkeypatch)
    smallest = findings.counterexample
    assert smallest is not None
    assert HAS[fault](smallest)
    assert findings.difference == smallest.difference() is not None
    assert (smallest.n, smallest.batch_size, smallest.net, smallest.one_hot) == (1, 1, "linear", False)
    assert smallest.shape[0] * smallest.shape[1] * smallest.shape[2] <= 3
    monkeypatch.undo()
    assert smallest.difference() is None


def test_the_same_seed_finds_the_same_counterexample_whose_code_shows_the_difference(monkeypatch):
    findings = plant("the sign of targets", monkeypatch)
    assert found(attacks=["FGSM"], references=["ART"]) == findings
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(findings.counterexample.code, {})
    assert printed.getvalue().strip() == findings.difference


def test_a_seed_gives_the_same_problems():
    assert found(12, seed=3).counts == found(12, seed=3).counts != found(12, seed=4).counts


def test_an_error_is_a_difference(monkeypatch):
    def fails(attack, logits, y, state):
        raise RuntimeError("planted")

    monkeypatch.setattr(SteepestAscent, "objective", fails)
    assert Problem(Case(Spec("FGSM", 2, 0.5), "foolbox")).difference() == "RuntimeError: planted"


def test_attacks_that_step_onto_the_boundary_are_compared_up_to_there(monkeypatch):
    """A ReLU network is linear between the image and the class next to it: foolbox' FMN lands on a tie."""
    params = {"gamma": 0.01, "max_stepsize": 1.5, "min_stepsize": 0.007004432146915161, "steps": 8}
    case = Case(Spec("FMN", 1, params=params), "foolbox")
    problem = Problem(case, net="ReLU", classes=3, shape=(3, 1, 2), pixels="continuous", n=3, seed=1536)
    assert problem.difference() is None
    monkeypatch.setattr(fuzz, "before_ties", lambda run, model: run)
    assert problem.difference().startswith("up to 0.0024 in a pixel")


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "n=0"),
        (1, {"seed": -1}, "seed=-1"),
        (1, {"attacks": ["PGD-11"]}, "attacks=.*PGD-11"),
        (1, {"references": ["cleverhans"]}, "references=.*cleverhans"),
        (1, {"attacks": ["FAB-100"]}, "FAB-100.*no toolkit here has an exact case"),
    ],
)
def test_wrong_arguments_are_errors(n, options, message):
    with pytest.raises(ValueError, match=message):
        found(n, **options)


@pytest.mark.parametrize("package", ["hypothesis", "foolbox"])
def test_what_is_not_installed_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed: pip install guardians\[parity\]"):
        found(1, references=["foolbox"])


def test_toolkits_that_are_not_installed_are_left_out(monkeypatch):
    for package in ("torchattacks", "foolbox"):
        monkeypatch.setitem(sys.modules, package, None)
    assert found(5).counts == {"ART": 5}
    monkeypatch.setattr(fuzz, "is_installed", lambda name: False)
    with pytest.raises(ValueError, match="no toolkit here has an exact case"):
        found(1)


def test_the_command_says_what_it_compared(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["guardians", "parity", "--fuzz", "5", "--attack", "fgsm", "--reference", "ART"])
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code in (0, None)
    assert capsys.readouterr().out.splitlines() == ["5 problems: 5 against ART", "no difference"]


def test_the_command_prints_the_counterexample_and_fails(monkeypatch, capsys):
    problem = Problem(Case(Spec("FGSM", 2, 0.5), "foolbox"))
    findings = fuzz.Findings(Counter(foolbox=3), problem, "up to 0.1 in a pixel")
    monkeypatch.setattr(fuzz, "fuzz", lambda n, **options: findings)
    monkeypatch.setattr(sys, "argv", ["guardians", "parity", "--fuzz", "99"])
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "3 problems: 3 against foolbox",
        "native differs: up to 0.1 in a pixel",
        "The smallest counterexample found, to run again:",
        "",
        *problem.code.splitlines(),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["5", "--own-rules"], "--own-rules: --fuzz compares"), (["0"], "fuzz=0: must be")]
)
def test_the_command_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["guardians", "parity", "--fuzz", *arguments])
    with pytest.raises(SystemExit) as exit:
        run()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
