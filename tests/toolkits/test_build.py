import sys
from dataclasses import replace
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from models_for_tests import CLASSES, SHAPE
from torch.nn.functional import cross_entropy

from guardians.attacks import Attack, Spec
from guardians.toolkits.build import IMPLEMENTATIONS, build_attack, is_available, own_spec

INF = float("inf")
FGSM = Spec("FGSM", INF, eps=0.03)
PGD = Spec("PGD", INF, eps=0.03, params={"steps": 3, "eps_step": 0.02})
EVERY = [
    replace(spec, norm=norm, eps=eps, targeted=targeted).having(
        random_start=random_start, eps_step=eps / 2 if spec is PGD else None
    )
    for spec, (norm, eps), targeted, random_start in product(
        (FGSM, PGD), ((INF, 0.03), (2, 0.3), (1, 3.0)), (False, True), (False, True)
    )
]
AVAILABLE = [(name, spec) for name, spec in product(IMPLEMENTATIONS, EVERY) if is_available(name, spec)]


def name_of(value):
    if isinstance(value, Spec):
        flags = ["targeted"] * value.targeted + ["random"] * value.get("random_start")
        return "-".join([value.family, str(value.norm), *flags])
    return str(value)


def build(implementation, spec, net, **options):
    if implementation in ("torchattacks", "foolbox"):
        pytest.importorskip(implementation)
    options = {"batch_size": 5, **options}
    return build_attack(implementation, spec, net, nb_classes=CLASSES, input_shape=SHAPE, **options)


def oracle(spec, net, x, y):
    """PGD for norms inf and 2 on images so far from 0 and 1 that they are never clipped."""
    steps, step = (1, spec.eps) if spec.family == "FGSM" else (spec.get("steps"), spec.get("eps_step"))
    delta = torch.zeros_like(x)
    for _ in range(steps):
        point = (x + delta).requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(net(point), y, reduction="sum"), point)
        if spec.targeted:
            gradient = -gradient
        if spec.norm == INF:
            delta = (delta + step * gradient.sign()).clamp(-spec.eps, spec.eps)
        else:
            delta = delta + step * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = delta * (spec.eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    return x + delta


def norms(delta, spec):
    return delta.flatten(1).double().norm(p=spec.norm, dim=1)


@pytest.fixture
def inner(x):
    return 0.4 + 0.2 * x


def test_what_each_toolkit_has():
    missing = {(name, s.family, s.norm, s.targeted) for name in IMPLEMENTATIONS for s in EVERY} - {
        (name, s.family, s.norm, s.targeted) for name, s in AVAILABLE
    }
    assert missing == {
        *(("torchattacks", attack, 1, targeted) for attack in ("FGSM", "PGD") for targeted in (False, True)),
        *(("torchattacks", "FGSM", 2, targeted) for targeted in (False, True)),
        *(("foolbox", "FGSM", norm, True) for norm in (INF, 2, 1)),
    }


@pytest.mark.parametrize(
    ("implementation", "spec"), [(n, s) for n, s in AVAILABLE if s.norm != 1 and not s.get("random_start")], ids=name_of
)
def test_every_toolkit_takes_the_steps_of_the_textbook(implementation, spec, net, inner, y):
    x_adv = build(implementation, spec, net)(inner, y)
    assert torch.allclose(x_adv, oracle(spec, net, inner, y), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("implementation", "spec"), AVAILABLE, ids=name_of)
def test_every_attack_moves_the_loss_its_way_within_the_ball(implementation, spec, net, x, y):
    x_adv = build(implementation, spec, net, seed=0)(x, y)
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert (norms(x_adv - x, spec) <= spec.eps * (1 + 1e-4)).all()
    assert x_adv.min() >= -1e-6
    assert x_adv.max() <= 1 + 1e-6
    change = cross_entropy(net(x_adv), y) - cross_entropy(net(x), y)
    assert (change < 0) == spec.targeted


@pytest.mark.parametrize(
    ("implementation", "spec"), [(n, s) for n, s in AVAILABLE if s.get("random_start") and not s.targeted], ids=name_of
)
def test_a_seed_repeats_the_random_start_and_leaves_the_generators_alone(implementation, spec, net, x, y):
    first = build(implementation, spec, net, seed=1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    x_adv = first(x, y)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(first(x, y), x_adv)
    assert torch.equal(build(implementation, spec, net, seed=1)(x, y), x_adv)
    assert not torch.equal(build(implementation, spec, net, seed=2)(x, y), x_adv)
    assert not torch.equal(build(implementation, spec.having(random_start=False), net)(x, y), x_adv)
    unseeded = build(implementation, spec, net)
    assert not torch.equal(unseeded(x, y), unseeded(x, y))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_model_comes_back_untouched(implementation, used_net, x, y, state_of, assert_untouched):
    before = state_of(used_net)
    build(implementation, PGD, used_net)(x, y)
    assert_untouched(used_net, before)


def test_what_a_toolkit_lacks_is_an_error(net):
    for implementation, spec in product(IMPLEMENTATIONS, EVERY):
        if (implementation, spec) not in AVAILABLE:
            with pytest.raises(ValueError, match=f"implementation='{implementation}' does not have Spec"):
                build_attack(implementation, spec, net, nb_classes=CLASSES, input_shape=SHAPE, batch_size=5)


@pytest.mark.parametrize(
    ("implementation", "spec", "message"),
    [
        ("cleverhans", PGD, "implementation='cleverhans': must be one of native, ART, torchattacks, foolbox"),
        (
            "native",
            replace(PGD, family="CW"),
            "family='CW': must be one of APGD, ",
        ),
        ("native", replace(PGD, norm=3), "norm=3: must be one of inf, 2, 1 for PGD"),
        ("ART", replace(PGD, eps=None), "eps=None: must be a number for PGD"),
        ("ART", Spec("C&W", 2, eps=0.5), "eps=0.5: must be None for C&W"),
        ("foolbox", FGSM.having(steps=3), "steps=3: FGSM has only random_start"),
    ],
)
def test_unknown_names(implementation, spec, message, net):
    with pytest.raises(ValueError, match=message):
        is_available(implementation, spec)
    with pytest.raises(ValueError, match=message):
        build_attack(implementation, spec, net, nb_classes=CLASSES, input_shape=SHAPE, batch_size=5)


def test_native_is_the_attack_itself(net, x, y):
    classical = build("native", PGD, net)
    assert isinstance(classical, Attack)
    assert (classical.early_stop, classical.precision) == (False, "auto")
    fast = build("native", PGD, net, early_stop=True, precision="float32")
    assert isinstance(fast, Attack)
    assert (fast.early_stop, fast.precision) == (True, "float32")
    assert (norms(fast(x, y) - x, PGD) <= norms(classical(x, y) - x, PGD) + 1e-6).all()
    assert fast.report.search_backward < classical.report.search_backward == len(x) * PGD.get("steps")


@pytest.mark.parametrize("implementation", ["ART", "torchattacks", "foolbox"])
def test_toolkits_have_no_early_stop_and_no_precision(implementation, net):
    build(implementation, PGD, net, early_stop=False, precision="float32")
    with pytest.raises(ValueError, match=f"early_stop=True: must be False for {implementation}"):
        build(implementation, PGD, net, early_stop=True)
    with pytest.raises(ValueError, match=f"precision='bfloat16': must be auto or float32 for {implementation}"):
        build(implementation, PGD, net, precision="bfloat16")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"early_stop": 1}, TypeError, "early_stop=1: must be True or False"),
        ({"precision": "double"}, ValueError, "precision='double': must be one of auto, float32, bfloat16, float16"),
    ],
)
def test_options_of_native_are_checked(options, error, message, net):
    with pytest.raises(error, match=message):
        build("native", PGD, net, **options)


@pytest.fixture
def without_toolkits(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("guardians.toolkits")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("torchattacks", "foolbox"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_toolkits")
def test_toolkits_that_are_not_installed_are_needed_only_when_used(net, x, y):
    from guardians.toolkits import FoolboxAttack, TorchattacksAttack, build, foolbox, torchattacks

    options = {"nb_classes": CLASSES, "input_shape": SHAPE, "batch_size": 5}
    for name in ("native", "ART"):
        assert build.build_attack(name, PGD, net, **options)(x, y).shape == x.shape
    for name, adapter, module in (
        ("torchattacks", TorchattacksAttack, torchattacks),
        ("foolbox", FoolboxAttack, foolbox),
    ):
        assert not build.is_installed(name)
        assert build.is_available(name, PGD)
        with pytest.raises(ImportError, match=rf"{name} is not installed: pip install guardians\[parity\]"):
            build.build_attack(name, PGD, net, **options)
        with pytest.raises(ImportError, match=r"guardians\[parity\]"):
            adapter(net, object)
        with pytest.raises(ImportError, match=r"guardians\[parity\]"):
            module.attacks()


def test_the_former_import_path_warns_and_works():
    sys.modules.pop("guardians.adapters", None)
    with pytest.warns(DeprecationWarning, match=r"guardians\.toolkits"):
        from guardians.adapters import ArtAttack, FoolboxAttack, TorchattacksAttack
    for adapter in (ArtAttack, FoolboxAttack, TorchattacksAttack):
        assert getattr(import_module("guardians.toolkits"), adapter.__name__) is adapter


@pytest.mark.parametrize(
    ("toolkit", "some", "none"),
    [
        ("art", {"ProjectedGradientDescent", "SquareAttack", "DeepFool"}, {"EvasionAttack", "PGD"}),
        ("torchattacks", {"PGD", "CW", "AutoAttack", "FAB"}, {"Attack", "MultiAttack"}),
        ("foolbox", {"DDNAttack", "L2CarliniWagnerAttack", "LInfFMNAttack"}, {"Attack", "LinfPGD", "FGSM"}),
    ],
)
def test_lists_of_what_a_toolkit_has(toolkit, some, none):
    pytest.importorskip(toolkit)
    module = import_module(f"guardians.toolkits.{toolkit}")
    names = list(module.attacks())
    assert names == sorted(set(names))
    assert some <= set(names)
    assert not none & set(names)


def test_every_attack_of_torchattacks_that_is_listed_is_taken(net):
    torchattacks = pytest.importorskip("torchattacks")
    from guardians.toolkits.torchattacks import TorchattacksAttack, attacks

    for name in attacks():
        needed = {"trainloader": []} if name == "LGV" else {}
        TorchattacksAttack(net, getattr(torchattacks, name), **needed)


def test_minimum_norm_attacks_have_no_early_stop(net, x, y):
    spec = Spec("C&W", 2, params={"searches": 1, "steps": 5})
    assert build("native", spec, net)(x, y).shape == x.shape
    with pytest.raises(ValueError, match="early_stop=True: must be False for C&W, which looks for the nearest"):
        build("native", spec, net, early_stop=True)


def test_the_published_auto_attack_of_torchattacks_is_its_four_attacks_with_iterations_and_queries():
    torchattacks = pytest.importorskip("torchattacks")
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), CLASSES))
    y = model(x).argmax(1)
    common = {"norm": "L2", "eps": 0.5, "seed": 0}
    by_hand = torchattacks.MultiAttack(
        [
            torchattacks.APGD(model, steps=7, **common),
            torchattacks.APGDT(model, steps=7, n_classes=CLASSES, **common),
            torchattacks.FAB(model, steps=7, multi_targeted=True, n_classes=CLASSES, **common),
            torchattacks.Square(model, n_queries=9, **common),
        ]
    )
    spec = Spec("AutoAttack", 2, eps=0.5, params={"steps": 7, "n_queries": 9})
    setting = {"nb_classes": CLASSES, "input_shape": x.shape[1:], "batch_size": len(x)}
    found = build_attack("torchattacks", spec, model, **setting)(x, y)
    assert torch.equal(found, by_hand(x, y))
    assert not torch.equal(found, x)


def test_torchattacks_is_told_the_number_of_classes_where_it_would_take_them_to_be_ten():
    torchattacks = pytest.importorskip("torchattacks")
    setting = {"nb_classes": CLASSES, "input_shape": (3, 8, 8), "batch_size": 4}
    for name, given, expected in (("APGDT", {}, CLASSES), ("APGDT", {"n_classes": 3}, 3), ("AutoAttack", {}, CLASSES)):
        spec = own_spec("torchattacks", name, given, np.inf, 0.1)
        attack = build_attack("torchattacks", spec, torch.nn.Flatten(), **setting)
        assert attack.attack is getattr(torchattacks, name)
        assert attack.arguments["n_classes"] == expected
