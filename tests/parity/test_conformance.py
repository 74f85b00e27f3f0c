"""Native pieces pass the checks; what the toolkits make of them is in the committed table, and named in the docs."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from models_for_tests import small_net
from torch import nn

from guardians.attacks import PGD
from guardians.attacks.registry import families
from guardians.experiments.names import parsed
from guardians.parity import conformance
from guardians.parity.checks import ATTACK_CHECKS, DEFENCE_CHECKS, OUTCOMES
from guardians.parity.conformance import LEFT_OUT, all_names, piece, run_conformance
from guardians.tables import CONFORMANCE_COLUMNS, read_csv
from guardians.toolkits.build import TOOLKITS, is_installed

ROOT = Path(__file__).parents[2]
NATIVE = [(name, norm) for name, norm in all_names() if ":" not in name]


# AutoAttack in the other norms is in the committed table: it takes half a minute.
@pytest.mark.parametrize(("name", "norm"), [one for one in NATIVE if "AutoAttack" not in one[0] or one[1] == np.inf])
def test_native_pieces_pass(name, norm):
    found = list(piece(name, norm).results())
    assert not [result for result in found if result.outcome not in ("passed", "skipped")]
    assert sum(result.outcome == "passed" for result in found) > len(found) / 2


def test_all_that_is_known_by_name_is_checked_or_left_out():
    checked = {name.partition("(")[0].partition("-")[0] for name, _ in NATIVE}
    left = {family.name for family in families()} - checked
    assert left == {name for name in LEFT_OUT if ":" not in name}
    for toolkit in filter(is_installed, TOOLKITS):
        own = {parsed(name)[0] for name, _ in all_names() if name.startswith(f"{toolkit}:")}
        left = {name for name in LEFT_OUT if name.startswith(f"{toolkit}:")}
        assert own | left == {f"{toolkit}:{name}" for name in TOOLKITS[toolkit].attacks()}
        assert not own & left


# Names


def test_a_name_is_an_attack_in_its_own_ball():
    pytest.importorskip("foolbox")
    found = piece("foolbox:L2ProjectedGradientDescentAttack(steps=2)")
    assert (found.implementation, found.norm, found.checks) == ("foolbox", 2, ATTACK_CHECKS)
    attack = found.make(small_net())
    assert (attack.eps, attack.norm) == (0.3, 2)
    assert piece("art:SquareAttack(max_iter=10, norm=2)", eps=0.1).make(small_net()).eps == 0.1
    assert piece("pgd-10").make(small_net()).max_iter == 10


def make_defence(model, scale=1.0):
    return nn.Sequential(model, nn.Softplus(beta=scale))


make_attack = PGD


def test_what_a_user_has_is_recognised():
    attack = piece("test_conformance:make_attack(eps=0.01, eps_step=0.005, max_iter=2)")
    assert (attack.checks, attack.make(small_net()).eps) == (ATTACK_CHECKS, 0.01)
    defence = piece("test_conformance:make_defence(scale=2.0)")
    assert defence.checks == DEFENCE_CHECKS
    assert defence.make(small_net())[1].beta == 2.0
    assert piece("test_conformance:make_defence", defence=False).checks == ATTACK_CHECKS
    assert piece("rse(n=2)").checks == DEFENCE_CHECKS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "name='nothing': .* unknown; known are .*FGSM.* defences are rse"),
        ("torchattacks:Nothing", "name='torchattacks:Nothing': .* torchattacks has APGD"),
        ("torchattacks:PGD(depth=2)", "depth: unknown to PGD; known are eps, alpha"),
        ("no.module:here", "name='no.module:here': 'here' cannot be imported"),
        ("test_conformance:ROOT", "name='test_conformance:ROOT': not a callable but PosixPath"),
        ("clean", "name='clean': must be an attack"),
        ("AveragedMixturePGD-5", "name='AveragedMixturePGD-5': must be an attack on any classifier"),
    ],
)
def test_a_wrong_name_is_said_to_be_one(name, message):
    pytest.importorskip("torchattacks")
    with pytest.raises(ValueError, match=message):
        piece(name)


def test_targets_that_an_attack_does_not_take_are_an_error():
    with pytest.raises(ValueError, match="targeted=True: art's DeepFool does not take targets"):
        piece("ART:DeepFool").make(small_net(), targeted=True)


# The table


def test_a_run_goes_on_from_what_is_there(tmp_path, monkeypatch):
    names = [("FGSM", 2), ("rse(n=2)", np.inf)]
    monkeypatch.setattr(conformance, "all_names", lambda: names)
    whole, interrupted = run_conformance(tmp_path / "whole")
    assert not interrupted
    monkeypatch.setattr(conformance, "all_names", lambda: names[:1])
    run_conformance(tmp_path / "parts")
    path = tmp_path / "parts" / "conformance.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]))
    monkeypatch.setattr(conformance, "all_names", lambda: names)
    parts, _ = run_conformance(tmp_path / "parts")
    parts, whole = (
        frame.sort_values(["implementation", "name", "check"], ignore_index=True) for frame in (parts, whole)
    )
    pd.testing.assert_frame_equal(parts, whole)
    assert list(whole.columns) == list(CONFORMANCE_COLUMNS)


def test_an_interrupted_run_keeps_its_rows(tmp_path, monkeypatch):
    def stop(make):
        raise KeyboardInterrupt

    monkeypatch.setattr(conformance, "all_names", lambda: [("FGSM", 2)])
    monkeypatch.setattr(conformance, "ATTACK_CHECKS", (*ATTACK_CHECKS[:2], stop))
    frame, interrupted = run_conformance(tmp_path)
    assert interrupted
    assert list(frame.loc[frame["name"] == "FGSM", "outcome"]) == ["passed", "passed"]


@pytest.fixture(scope="module")
def committed():
    return read_csv(ROOT / "results" / "conformance.csv")


def test_the_table_is_of_all_pieces_and_checks(committed):
    assert list(committed.columns) == list(CONFORMANCE_COLUMNS)
    assert set(committed["outcome"]) <= {*OUTCOMES, "left out"}
    ran = committed[committed["outcome"] != "left out"]
    assert not committed.duplicated(["implementation", "name", "norm", "check"]).any()
    kinds = [{check.__name__.removeprefix("check_") for check in kind} for kind in (ATTACK_CHECKS, DEFENCE_CHECKS)]
    for _, rows in ran.groupby(["implementation", "name", "norm"], dropna=False):
        assert set(rows["check"]) in kinds
    if all(map(is_installed, TOOLKITS)):
        assert set(ran["name"]) == {name for name, _ in all_names()}
        assert set(committed["name"]) - set(ran["name"]) == {name for name in LEFT_OUT if ":" in name}


def test_native_pieces_passed(committed):
    native = committed[committed["implementation"] == "native"]
    assert set(native["outcome"]) == {"passed", "skipped"}


def test_what_failed_is_named_in_the_docs(committed):
    section = (ROOT / "docs" / "deviations.md").read_text().split("## Conformance")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `?([\w ]+)`? \|(.*)\|$", section, re.MULTILINE))
    named = {check: set(re.findall(r"`(\w+:\w+)`", row)) for check, row in rows.items() if check != "check"}
    failed = committed[committed["outcome"] == "failed"]
    passing = set(committed.loc[committed["outcome"] == "passed", "name"])
    expected: dict[str, set[str]] = {}
    for check, name in zip(failed["check"], failed["name"], strict=True):
        expected.setdefault(check if name in passing else "all that ran", set()).add(parsed(name)[0])
    assert named == expected
