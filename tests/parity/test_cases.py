from collections import Counter

import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels

from guardians.parity import REFERENCES, cases, compare
from guardians.parity.comparison import FLOAT64_TOLERANCE
from guardians.toolkits.build import is_available

for toolkit in ("torchattacks", "foolbox"):
    pytest.importorskip(toolkit)


GRADIENT_SIGN = ("FGSM", "PGD-10", "PGD-40")
EVERY = (*GRADIENT_SIGN, "APGD-100", "APGD-20", "C&W", "DDN-20", "FAB-100", "FMN-20")


def test_every_form_that_a_toolkit_has_is_a_case():
    of = {reference: Counter(case.spec.name for case in cases(references=[reference])) for reference in REFERENCES}
    assert of["ART"] == {"FGSM": 12, "PGD-10": 12, "PGD-40": 12, "C&W": 3}
    assert of["torchattacks"] == {
        "FGSM": 4,
        "PGD-10": 8,
        "PGD-40": 8,
        "C&W": 4,
        "APGD-100": 2,
        "APGD-20": 2,
        "FAB-100": 2,
    }
    assert of["foolbox"] == {"FGSM": 6, "PGD-10": 12, "PGD-40": 12, "C&W": 4, "DDN-20": 2, "FMN-20": 6}
    assert all(is_available(case.reference, case.spec) for case in cases())
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
    assert len(set(names)) == len(names) == 111
    assert "PGD-40 L2 targeted random-start vs ART" in names
    assert "APGD-100 L2 untargeted random-start vs torchattacks" in names
    assert "FGSM Linf untargeted from-image vs foolbox" in names
    assert "C&W L2 targeted exact vs foolbox" in names
    assert "FMN-20 L1 untargeted exact vs foolbox" in names
    assert "C&W Linf untargeted dominance vs ART" in names


def test_filters_keep_the_cases_of_the_whole():
    every = cases()
    for attacks, references in (
        (["PGD-40"], []),
        ([], ["foolbox"]),
        (["FGSM", "PGD-10"], ["ART", "torchattacks"]),
        (["C&W"], []),
    ):
        kept = [
            case
            for case in every
            if case.spec.name in (attacks or EVERY) and case.reference in (references or REFERENCES)
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
