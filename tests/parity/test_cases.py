from collections import Counter
from dataclasses import replace

import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels

from guardians.attacks.square import Square
from guardians.parity import REFERENCES, cases, compare
from guardians.parity.cases import Case, pieces
from guardians.parity.comparison import FLOAT64_TOLERANCE
from guardians.toolkits.build import is_available

for toolkit in ("torchattacks", "foolbox"):
    pytest.importorskip(toolkit)


GRADIENT_SIGN = ("FGSM", "PGD-10", "PGD-40")


def of_attacks(*names):
    return [case for case in cases(*names) if isinstance(case, Case)]


def test_every_form_that_a_toolkit_has_is_a_case():
    of = {reference: Counter(case.attack for case in of_attacks([], [reference])) for reference in REFERENCES}
    assert of["ART"] == {"FGSM": 12, "PGD-10": 12, "PGD-40": 12, "C&W": 3, "Square-100": 1}
    assert of["torchattacks"] == {
        "FGSM": 4,
        "PGD-10": 8,
        "PGD-40": 8,
        "C&W": 4,
        "APGD-100": 2,
        "APGD-20": 2,
        "FAB-100": 2,
        "Square-100": 2,
    }
    assert of["foolbox"] == {"FGSM": 6, "PGD-10": 12, "PGD-40": 12, "C&W": 4, "DDN-20": 2, "FMN-20": 6}
    assert of["paper"] == {}
    assert all(is_available(case.reference, case.spec) for case in of_attacks())
    assert {case.kind for case in cases(GRADIENT_SIGN)} == {"exact"}
    assert Counter((case.reference, case.kind) for case in cases(["C&W"])) == {
        ("ART", "dominance"): 3,  # norm 2 targeted or not, norm inf
        ("torchattacks", "exact"): 2,
        ("torchattacks", "dominance"): 2,
        ("foolbox", "exact"): 2,
        ("foolbox", "dominance"): 2,
    }


def test_names_say_all_and_are_unique():
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names) == 130
    assert "PGD-40 L2 targeted random-start vs ART" in names
    assert "APGD-100 L2 untargeted random-start vs torchattacks" in names
    assert "FGSM Linf untargeted from-image vs foolbox" in names
    assert "C&W L2 targeted exact vs foolbox" in names
    assert "FMN-20 L1 untargeted exact vs foolbox" in names
    assert "C&W Linf untargeted dominance vs ART" in names
    assert "Square-100 Linf untargeted statistical vs ART" in names
    assert "RSE log-probabilities vs paper" in names


def test_filters_keep_the_cases_of_the_whole():
    every = cases()
    for attacks, references in (
        (["PGD-40"], []),
        ([], ["foolbox"]),
        (["FGSM", "PGD-10"], ["ART", "torchattacks"]),
        (["C&W"], []),
        (["RSE", "FGSM"], []),
        (["MI-OL"], ["paper"]),
    ):
        kept = [
            case
            for case in every
            if case.attack in (attacks or pieces()) and case.reference in (references or REFERENCES)
        ]
        assert cases(attacks, references) == kept
        assert kept


def test_names_are_known_in_any_case_and_once():
    assert cases(["fgsm", "pgd-10", "c&w"], ["art", "FoolBox"]) == cases(["FGSM", "PGD-10", "C&W"], ["ART", "foolbox"])
    assert cases(["FGSM", "fgsm"], ["ART", "art"]) == cases(["FGSM"], ["ART"])


@pytest.mark.parametrize(
    ("attacks", "references", "message"),
    [
        (["PGD"], [], r"attacks=\['PGD'\]: unknown; known are APGD-100, APGD-20, C&W, DDN-20, FAB-100, FGSM, FMN-20"),
        ([], ["ART", "cleverhans"], r"references=\['cleverhans'\]: unknown; known are ART, torchattacks, foolbox"),
        ([], ["native"], r"references=\['native'\]: unknown"),
    ],
)
def test_unknown_names_are_errors(attacks, references, message):
    with pytest.raises(ValueError, match=message):
        cases(attacks, references)


@pytest.mark.parametrize("case", cases(GRADIENT_SIGN), ids=lambda case: case.name)
def test_native_agrees_exactly(case):
    found = compare(case, small_net(), some_images(8), some_labels(8), nb_classes=CLASSES, batch_size=5)
    assert found.verdict == "exact"
    assert found.steps.unexplained == 0
    if case.reference == "ART":  # it casts to float32
        assert found.max_abs_diff_float64 is None
    else:
        assert found.max_abs_diff_float64 <= FLOAT64_TOLERANCE <= 1e-10
    assert found.native.shape == found.reference.shape == (8, 3, 8, 8)
    assert found.same_label.all()
    assert (found.native_success == found.reference_success).all()


@pytest.mark.parametrize("case", cases(["DDN-20", "FMN-20"]), ids=lambda case: case.name)
def test_attacks_that_minimise_a_norm_agree_query_by_query(case):
    with torch.no_grad():
        labels = small_net()(some_images(3)).argmax(1)
    found = compare(case, small_net(), some_images(3), labels, nb_classes=CLASSES)
    assert found.verdict == "exact"
    assert found.max_abs_diff_float64 <= FLOAT64_TOLERANCE
    assert len(found.x) == 3


@pytest.mark.parametrize("case", cases(["FAB-100"]), ids=lambda case: case.name)
def test_fab_dominates(case):
    with torch.no_grad():
        labels = small_net()(some_images(3)).argmax(1)
    assert compare(case, small_net(), some_images(3), labels, nb_classes=CLASSES).verdict == "dominates"


@pytest.mark.parametrize("case", cases(["APGD-100", "APGD-20"]), ids=lambda case: case.name)
def test_apgd_agrees_query_by_query_from_the_start_of_the_toolkit(case):
    with torch.no_grad():
        labels = small_net()(some_images(3)).argmax(1)
    found = compare(case, small_net(), some_images(3), labels, nb_classes=CLASSES)
    assert found.verdict == "exact"
    assert found.max_abs_diff_float64 <= FLOAT64_TOLERANCE
    assert torch.equal(found.native_success, found.reference_success)


SQUARE = cases(["Square-100"], ["torchattacks"])[0]


def square_compared(n, seed=0):
    x = some_images(n)
    with torch.no_grad():
        labels = small_net()(x).argmax(1)
    case = replace(SQUARE, spec=replace(SQUARE.spec, eps=0.02))
    return compare(case, small_net(), x, labels, nb_classes=CLASSES, seed=seed)


def test_the_same_algorithm_with_other_draws_is_equivalent():
    found = square_compared(200)
    assert found.verdict == "equivalent"
    assert 0.1 < found.native_success.double().mean() < 0.9
    assert not torch.equal(found.native, found.reference)


def test_few_images_leave_it_undecided():
    assert square_compared(8).verdict == "undecided"


def test_a_weaker_algorithm_is_different(monkeypatch):
    monkeypatch.setattr(Square, "max_iter", property(lambda self: 1, lambda self, value: None), raising=False)
    assert square_compared(200).verdict == "different"
