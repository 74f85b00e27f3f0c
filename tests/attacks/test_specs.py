"""One registration makes an attack known everywhere."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from models_for_tests import CLASSES, SHAPE, small_net, some_images, some_labels

from guardians.attacks import PGD, Spec, registry
from guardians.attacks.registry import Agreement, Family, families, family_of, named, register, usages
from guardians.data import Dataset
from guardians.experiments.bench import run_benchmark
from guardians.parity import cases, run_parity
from guardians.toolkits import art, foolbox
from guardians.toolkits.build import IMPLEMENTATIONS, build_attack, is_available

INF = float("inf")
PGD_40 = Spec("PGD", INF, 8 / 255, params={"steps": 40, "eps_step": 2 / 255, "random_start": True})


def test_equal_specs_are_one_whatever_the_order_and_the_types():
    other = Spec("PGD", "inf", 8 / 255, False, [("random_start", True), ("eps_step", 2 / 255), ("steps", 40)])
    missing = PGD_40.having(confidence=None)
    assert other == missing == PGD_40
    assert len({other, missing, PGD_40}) == 1
    assert other.json == missing.json == PGD_40.json
    assert Spec("C&W", 2).json == Spec("C&W", 2.0).json
    for same in (copy.deepcopy(PGD_40), pickle.loads(pickle.dumps(PGD_40)), replace(PGD_40)):
        assert same == PGD_40
    for different in (PGD_40.having(steps=41), replace(PGD_40, targeted=True), replace(PGD_40, norm=2)):
        assert different != PGD_40
        assert different.json != PGD_40.json


def test_json_is_standard_and_says_all():
    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(PGD_40.json, parse_constant=refuse) == {
        "family": "PGD",
        "norm": "inf",
        "eps": 8 / 255,
        "targeted": False,
        "params": {"steps": 40, "eps_step": 2 / 255, "random_start": True},
    }


def test_names():
    assert PGD_40.name == "PGD-40"
    assert Spec("FGSM", 2, 0.5).name == "FGSM"
    assert Spec("C&W", 2, params={"steps": 25}).name == "C&W"


def test_names_on_the_command_line():
    options = {"eps_step": 0.1, "random_start": True}
    assert named("pgd-7", 2, 0.5, **options) == Spec("PGD", 2, 0.5, params={"steps": 7, **options})
    assert named("fgsm", 2, 0.5, **options) == Spec("FGSM", 2, 0.5)
    assert named("c&w", 2, 0.5, **options) == Spec("C&W", 2)
    for unknown in ("PGD", "PGD-0", "PGD-1.5", "PGD-", "FGSM-2", "C&W-10", "clean", "", "PGD-4\n"):
        assert named(unknown, 2, 0.5) is None
    with pytest.raises(ValueError, match="at most 1,000,000 steps"):
        named("PGD-1000001", 2, 0.5)


@pytest.mark.parametrize("value", ["0.5", 0.5, True])
def test_norms_are_checked(value):
    with pytest.raises(ValueError, match="norm="):
        Spec("PGD", value, 0.1)


def test_kinds_of_agreement_are_checked():
    with pytest.raises(ValueError, match="kind='exactly': must be one of exact, statistical, dominance"):
        Agreement("exactly", PGD_40)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_agreements_are_of_the_family_and_of_toolkits_that_have_it(family):
    for agreement in family.agreements:
        assert family_of(agreement.spec) is family
        references = agreement.references or IMPLEMENTATIONS[1:]
        assert any(is_available(reference, agreement.spec) for reference in references)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_native_takes_all_parameters(family):
    values = {"steps": 3, "eps_step": 0.01, "random_start": True, "confidence": 0.5, "searches": 2, "const": 0.1}
    values |= {"learning_rate": 0.02, "abort_early": False, "init_epsilon": 0.5, "gamma": 0.1}
    values |= {"max_stepsize": 0.5, "min_stepsize": 0.1, "n_targets": 2, "loss": "margin", "untargeted_steps": 1}
    values |= {"p_init": 0.5, "rho": 0.5, "alpha_max": 0.2, "eta": 1.1, "beta": 0.8, "adaptive": False}
    values |= {"version": "plus", "n_queries": 10, "budget": "fast", "num_samples": 2}
    params = {name: values[name] for name in family.parameters}
    for norm in family.norms:
        known = params if norm == 2 else {name: params[name] for name in params if name != "searches"}
        spec = Spec(family.name, norm, None if family.minimises_norm else 0.1, params=known)
        attack, arguments = family_of(spec).native(spec)
        assert set(arguments) <= set(attack.parameters())


@pytest.fixture
def toy(monkeypatch):
    """A new attack: PGD under another name, which ART has and the others do not."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))

    def native(spec):
        return PGD, {"norm": spec.norm, "eps": spec.eps, "eps_step": 0.01, "max_iter": spec.get("steps")}

    def in_art(spec):
        arguments = {"norm": spec.norm, "eps": spec.eps, "eps_step": 0.01, "max_iter": spec.get("steps")}
        return "ProjectedGradientDescent", arguments

    agreement = Agreement("exact", Spec("Toy", INF, 0.05, params={"steps": 4}), targeted=(False,))
    register(Family("Toy", (INF,), ("steps",), native, counts_steps=True, agreements=(agreement,)))
    monkeypatch.setitem(art.BUILDERS, "Toy", in_art)


@pytest.fixture
def data():
    return Dataset((255 * some_images(6)).round().to(torch.uint8), some_labels(6), tuple("abcde"), "noise")


@pytest.mark.usefixtures("toy")
def test_a_new_attack_is_found_by_its_registration(data, tmp_path):
    assert "Toy-<steps>" in usages()
    assert [case.name for case in cases(["toy-4"])] == ["Toy-4 Linf untargeted from-image vs ART"]
    common = {"model_name": "small", "out": tmp_path, "verbose": False}
    assert run_parity(small_net(), data, attacks=["Toy-4"], **common)["verdict"].tolist() == ["exact"]
    frame = run_benchmark(small_net(), data, attacks=["Toy-4"], eps=0.05, **common)
    assert frame["attack"].tolist() == ["Toy-4", "Toy-4", "union"]
    assert frame["implementation"].tolist() == ["native", "ART", "all"]
    assert frame["robust_accuracy"].nunique() == 1


@pytest.mark.parametrize(
    ("family", "norm", "params", "attack"),
    [
        ("DDN", 2, {"steps": 7, "init_epsilon": 0.5, "gamma": 0.1}, "DDNAttack"),
        ("FMN", INF, {"steps": 7, "max_stepsize": 0.5}, "LInfFMNAttack"),
        ("FMN", 2, {"steps": 7, "min_stepsize": 0.1, "gamma": 0.1}, "L2FMNAttack"),
        ("FMN", 1, {"steps": 7}, "L1FMNAttack"),
    ],
)
def test_foolbox_builds_its_own(family, norm, params, attack):
    pytest.importorskip("foolbox")
    spec = Spec(family, norm, params=params)
    assert not is_available("ART", spec)
    built = build_attack("foolbox", spec, small_net(), nb_classes=CLASSES, input_shape=SHAPE, batch_size=2)
    assert isinstance(built, foolbox.FoolboxAttack)
    assert type(built.attack).__name__ == attack
    assert {name: getattr(built.attack, name) for name in params} == params
    assert built.eps is None
    assert built(some_images(2), some_labels(2)).shape == (2, *SHAPE)


RANDOM = {"random_start": True, "steps": 7}


@pytest.mark.parametrize(
    ("toolkit", "norm", "params", "attack", "arguments"),
    [
        ("torchattacks", INF, {"rho": 0.5}, "APGD", {"norm": "Linf", "steps": 7, "thr_decr": 0.5, "loss": "ce"}),
        ("torchattacks", 2, {"loss": "difference_logits_ratio"}, "APGD", {"norm": "L2", "loss": "dlr"}),
        (
            "torchattacks",
            2,
            {"loss": "difference_logits_ratio", "n_targets": 3},
            "APGDT",
            {"norm": "L2", "n_target_classes": 3},
        ),
        ("torchattacks", INF, {"n_targets": 3}, None, {}),
        ("torchattacks", INF, {"loss": "margin"}, None, {}),
        ("torchattacks", 1, {}, None, {}),
        ("torchattacks", INF, {"random_start": False}, None, {}),
        ("ART", 2, {}, "AutoProjectedGradientDescent", {"eps_step": 0.2, "max_iter": 7, "nb_random_init": 1}),
        ("ART", 1, {}, "AutoProjectedGradientDescent", {"eps_step": 0.1, "loss_type": "cross_entropy"}),
        ("ART", INF, {"n_targets": 3}, None, {}),
        ("ART", INF, {"rho": 0.5}, None, {}),
        ("foolbox", INF, {}, None, {}),
    ],
)
def test_toolkits_build_their_own_apgd(toolkit, norm, params, attack, arguments):
    spec = Spec("APGD", norm, 0.1, params={**RANDOM, **params})
    assert is_available(toolkit, spec) is (attack is not None)
    if attack is None:
        return
    built = build_attack(toolkit, spec, small_net(), nb_classes=CLASSES, input_shape=SHAPE, batch_size=2)
    made = built.art_attack if toolkit == "ART" else built._build()
    assert type(made).__name__ == attack
    assert {name: getattr(made, name) for name in arguments} == arguments
    assert built(some_images(2), some_labels(2)).shape == (2, *SHAPE)
