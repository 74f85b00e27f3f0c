"""docs/art.md says of every argument and every member of ART's classes what native ones make of it."""

import inspect
import re
from pathlib import Path

import art.attacks.evasion as art
import pytest
from art.defences import trainer as art_trainers
from art.estimators.classification import PyTorchClassifier

from guardians import attacks, defences, estimators

TEXT = (Path(__file__).parents[1] / "docs" / "art.md").read_text()
SHARED = list(inspect.signature(attacks.Attack).parameters)


def rows_of(heading):
    """The cells of the first table below a heading, without its head."""
    _, found, text = TEXT.partition(f"\n{heading}\n")
    assert found, heading
    lines = re.search(r"\n\|.*?(?=\n\n|\Z)", text.split("\n#")[0], flags=re.DOTALL)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def arguments_of(*functions, without=()):
    """By name, what the table has to show of each: its default."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    signatures = [
        {name: of for name, of in inspect.signature(function).parameters.items() if of.kind not in variadic}
        for function in functions
    ]
    names = dict.fromkeys(name for signature in signatures for name in signature if name not in (*without, "self"))
    return {name: [default_of(signature.get(name)) for signature in signatures] for name in names}


def default_of(parameter):
    if parameter is None:
        return "-"
    return "required" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"


TABLES = {
    "### Every native attack": (attacks.Attack,),
    "### FastGradientMethod (FGSM)": (art.FastGradientMethod, attacks.FGSM),
    "### ProjectedGradientDescent (PGD)": (art.ProjectedGradientDescent, attacks.PGD),
    "### AutoProjectedGradientDescent (APGD)": (art.AutoProjectedGradientDescent, attacks.APGD),
    "### CarliniL2Method (CarliniWagnerL2)": (art.CarliniL2Method, attacks.CarliniL2Method),
    "### CarliniLInfMethod (CarliniWagnerLinf)": (art.CarliniLInfMethod, attacks.CarliniLInfMethod),
    "### SquareAttack (Square)": (art.SquareAttack, attacks.Square),
    "### AutoAttack": (art.AutoAttack, attacks.AutoAttack),
    "### AdversarialTrainer": (art_trainers.AdversarialTrainer, defences.AdversarialTrainer),
    "### AdversarialTrainer.fit": (art_trainers.AdversarialTrainer.fit, defences.AdversarialTrainer.fit),
    "### AdversarialTrainer.fit_generator": (
        art_trainers.AdversarialTrainer.fit_generator,
        defences.AdversarialTrainer.fit_generator,
    ),
}


@pytest.mark.parametrize("heading", TABLES)
def test_every_argument_is_in_the_table_with_its_defaults(heading):
    in_another = SHARED if heading.endswith(")") else ()
    expected = arguments_of(*TABLES[heading], without=in_another)
    found = {row[0].strip("`"): row[1:-1] for row in rows_of(heading)}
    assert found == expected
    assert list(found) == list(expected)
    assert all(row[-1] for row in rows_of(heading))


def test_every_native_attack_that_art_has_too_has_a_table():
    named = {re.search(r"### (\w+)", heading)[1] for heading in TABLES if "Trainer" not in heading}
    both = {name for name in attacks.__all__ if hasattr(art, name)}
    assert both <= named


def test_every_argument_of_an_estimator_is_in_the_table():
    """What an estimator has no name for it passes on to ART's, with its default there."""
    native = estimators.RandomSelfEnsembleClassifier, estimators.MixupInferenceClassifier
    expected = arguments_of(PyTorchClassifier, *native)
    for defaults in expected.values():
        if defaults[0] != "-":
            defaults[1:] = [default if default != "-" else defaults[0] for default in defaults[1:]]
    found = {row[0].strip("`"): row[1:-1] for row in rows_of("## Estimators: arguments of the constructors")}
    assert found == expected


@pytest.mark.parametrize(
    ("heading", "reference"),
    [
        ("## Attacks: what they have", art.ProjectedGradientDescent),
        ("## Estimators: what they have", PyTorchClassifier),
        ("### AdversarialTrainer.fit_generator", art_trainers.AdversarialTrainer),
    ],
    ids=["attacks", "estimators", "trainer"],
)
def test_every_member_is_in_the_table(heading, reference):
    section = TEXT.partition(f"\n{heading}\n")[2].split("\n#")[0]
    table = section[section.index("| member |") :].split("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]
    assert sorted(named) == [name for name in dir(reference) if not name.startswith("_")]
