import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels

from guardians.attacks.carlini_wagner import _BinarySearch
from guardians.data import Dataset
from guardians.parity import cases, compare, run_parity
from guardians.parity.comparison import FLOAT64_TOLERANCE
from guardians.parity.rules import TorchattacksCarliniWagner
from guardians.parity.single_images import is_dominated

for toolkit in ("torchattacks", "foolbox"):
    pytest.importorskip(toolkit)

CASES = {case.name: case for case in cases(["C&W"])}
EXACT = [case for case in CASES.values() if case.kind == "exact"]
DOMINANCE = [case for case in CASES.values() if case.kind == "dominance"]


def found(case, n=4):
    return compare(case, small_net(), some_images(n), predictions(n), nb_classes=CLASSES, batch_size=3)


def predictions(n):
    with torch.no_grad():
        return small_net()(some_images(n)).argmax(1)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_native_takes_the_steps_of_a_toolkit_that_is_given_one_image_at_a_time(case):
    comparison = found(case)
    assert comparison.verdict == "exact"
    assert comparison.max_abs_diff_float64 <= FLOAT64_TOLERANCE
    assert len(comparison.x) == 4


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_another_optimiser_is_found_out(case, monkeypatch):
    monkeypatch.setattr(_BinarySearch, "_betas", (0.9, 0.99))
    assert found(case).verdict == "different"


def test_the_rule_of_torchattacks_is_what_makes_it_exact(monkeypatch):
    monkeypatch.delattr(TorchattacksCarliniWagner, "boundary")
    assert found(CASES["C&W L2 untargeted exact vs torchattacks"]).verdict == "different"


def test_images_that_the_model_gets_wrong_are_left_out():
    case = CASES["C&W L2 untargeted exact vs torchattacks"]
    wrong = (predictions(4) + torch.tensor([0, 1, 0, 1])) % CLASSES
    comparison = compare(case, small_net(), some_images(4), wrong, nb_classes=CLASSES)
    assert len(comparison.x) == 2
    assert comparison.verdict == "exact"


@pytest.mark.parametrize("case", DOMINANCE, ids=lambda case: case.name)
def test_native_is_never_weaker(case):
    comparison = found(case)
    assert comparison.verdict == "dominates"
    assert comparison.native_success.sum() >= comparison.reference_success.sum()


X = torch.zeros(3, 1, 2, 2)
NEAR, FAR = torch.full_like(X, 0.1), torch.full_like(X, 0.2)
ALL, ONE, NONE = torch.tensor([True] * 3), torch.tensor([True, False, False]), torch.tensor([False] * 3)


@pytest.mark.parametrize("norm", [2.0, float("inf")])
@pytest.mark.parametrize(
    ("native", "reference", "native_success", "reference_success", "dominated"),
    [
        (NEAR, FAR, ALL, ALL, True),
        (FAR, NEAR, ALL, ALL, False),
        (NEAR, NEAR, ALL, ALL, True),
        (FAR, FAR, ALL, ONE, True),
        (NEAR, FAR, ONE, ALL, False),
        (NEAR, FAR, ALL, NONE, True),
    ],
)
def test_dominance_is_as_many_images_and_no_larger_norms(
    native, reference, native_success, reference_success, dominated, norm
):
    assert is_dominated(native, reference, X, native_success, reference_success, norm) is dominated


def test_only_images_that_both_fool_are_compared():
    far_where_the_reference_fails = torch.cat([NEAR[:1], 10 * FAR[1:]])
    assert is_dominated(far_where_the_reference_fails, FAR, X, ALL, ONE, 2.0)


def test_rows_say_what_was_compared(tmp_path):
    data = Dataset((255 * some_images(4)).round().to(torch.uint8), some_labels(4), tuple("abcde"), "noise")
    frame = run_parity(
        small_net(), data, model_name="small", out=tmp_path, attacks=["C&W"], references=["torchattacks"], verbose=False
    )
    assert frame["kind"].tolist() == ["exact", "exact", "dominance", "dominance"]
    assert frame["attack"].tolist() == ["C&W"] * 4
    assert frame["note"].str.contains("each alone|defaults").all()
    assert frame["max_abs_diff_float64"].notna().tolist() == [True, True, False, False]
    own_rules = run_parity(
        small_net(), data, model_name="small", out=tmp_path, attacks=["C&W"], own_rules=True, verbose=False
    )
    assert own_rules.empty
