from dataclasses import replace

import pytest
import torch
from models_for_tests import CLASSES, small_net, some_images, some_labels
from torch import nn

from guardians.attacks import Spec
from guardians.attacks.norms import as_norm, project
from guardians.engine.state import Progress
from guardians.parity import Case, cases, compare, comparison, harness
from guardians.parity.comparison import Steps, Trajectory, compare_steps, native_attack, record

for toolkit in ("torchattacks", "foolbox"):
    pytest.importorskip(toolkit)

INF = float("inf")
CASES = {case.name: case for case in cases(attacks=["PGD-10"])}
BROKEN_IN = [
    "PGD-10 Linf targeted random-start vs ART",
    "PGD-10 L2 targeted random-start vs ART",
    "PGD-10 L1 targeted random-start vs ART",
    "PGD-10 Linf targeted random-start vs torchattacks",
    "PGD-10 L2 targeted random-start vs torchattacks",
    "PGD-10 Linf targeted random-start vs foolbox",
    "PGD-10 L2 targeted random-start vs foolbox",
    "PGD-10 L1 targeted random-start vs foolbox",
]


class LongerStep:
    def step(self, *arguments):
        return 1.01 * super().step(*arguments)


class NoProjection:
    def inside(self, x_adv, state):
        return x_adv.clamp(0, 1)


class NoClip:
    def inside(self, x_adv, state):
        return state.x + project(x_adv - state.x, state.eps.to(x_adv.dtype), as_norm(self.norm))


class NoSignForTargets:
    def objective(self, logits, y, state):
        return self.victim.loss(logits, y)


class OtherLoss:
    def objective(self, logits, y, state):
        return logits.gather(1, y[:, None]).squeeze(1)


class OwnStart:
    def start(self, state):
        given = state.known.pop("x_adv_init")
        super().start(state)
        state.known["x_adv_init"] = given


class NanIterate:
    def inside(self, x_adv, state):
        return super().inside(x_adv, state) * float("nan")


class CleanResult:
    def result(self, state):
        return state.x


class OneStepLess:
    def update(self, state, answer):
        super().update(state, answer)
        return Progress(state.steps >= self.max_iter - 1)


def run(case, net=None, **options):
    net = small_net() if net is None else net
    return compare(case, net, some_images(8), some_labels(8), nb_classes=CLASSES, batch_size=5, **options)


@pytest.fixture
def break_native(monkeypatch):
    """Put a class in front of the one with which native runs."""

    def put(fault):
        original = comparison.native_class

        def broken(*arguments):
            found = original(*arguments)
            return type(f"{fault.__name__}{found.__name__}", (fault, found), {})

        monkeypatch.setattr(comparison, "native_class", broken)

    return put


def reaches(fault, name):
    """ART's step of norm 1, one pixel by 2, ends at a bound however long it is."""
    return not (fault is LongerStep and " L1 " in name and name.endswith("ART"))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (fault, name)
        for fault in (LongerStep, NoProjection, NoClip, NoSignForTargets, OtherLoss, OwnStart)
        for name in BROKEN_IN
        if reaches(fault, name)
    ],
)
def test_a_fault_in_native_is_found_step_by_step(fault, name, break_native):
    assert run(CASES[name]).verdict == "exact"
    break_native(fault)
    found = run(CASES[name])
    assert found.verdict == "different"
    assert found.steps.unexplained > 0
    assert found.steps.max_abs_diff > 1e-5
    if found.max_abs_diff_float64 is not None:
        assert found.max_abs_diff_float64 > 1e-5


@pytest.mark.parametrize("name", BROKEN_IN)
def test_one_pixel_of_one_iterate_of_the_reference_is_enough(name, monkeypatch):
    original = harness.record

    def changed(*arguments):
        trajectory = original(*arguments)
        if len(trajectory.x_adv) == 5:  # the first batch in float32
            iterate, gradient = trajectory.iterates[6][4], trajectory.gradients[5][4].abs()
            # neither within rounding of zero nor the largest, which decides ART's step of norm 1
            pixel = (gradient - gradient.median()).abs().argmin()
            iterate.view(-1)[pixel] += 1e-3
        return trajectory

    monkeypatch.setattr(harness, "record", changed)
    found = run(CASES[name])
    assert found.verdict == "different"
    assert found.steps.unexplained >= 1


@pytest.mark.parametrize("name", BROKEN_IN)
def test_another_last_image_of_the_reference_is_found(name, monkeypatch):
    original = harness.record

    def changed(*arguments):
        trajectory = original(*arguments)
        gradient = trajectory.gradients[-1][0].abs()
        x_adv = trajectory.x_adv.clone()
        x_adv[0].view(-1)[(gradient - gradient.median()).abs().argmin()] += 1e-3
        return replace(trajectory, x_adv=x_adv)

    monkeypatch.setattr(harness, "record", changed)
    found = run(CASES[name])
    assert found.verdict == "different"
    assert found.steps.unexplained == 2  # one pixel in each of two batches


@pytest.mark.parametrize("name", BROKEN_IN)
@pytest.mark.parametrize("fault", [NanIterate, CleanResult, OneStepLess])
def test_a_fault_in_what_native_returns_is_found(fault, name, break_native):
    break_native(fault)
    assert run(CASES[name]).verdict == "different"


# What rounding decides


@pytest.fixture
def faint_pixel():
    """A linear model whose loss hardly depends on pixel 7, and images in the middle of the range."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(model[1].weight.shape, generator=torch.Generator().manual_seed(0)))
        model[1].weight[:, 7] *= 1e-8
    return model, torch.full((2, 3, 8, 8), 0.5), torch.tensor([0, 1])


def with_flip(trajectory, x, pixel):
    x_adv = trajectory.x_adv.clone()
    x_adv[1].view(-1)[pixel] = 2 * x[1].view(-1)[pixel] - x_adv[1].view(-1)[pixel]
    return replace(trajectory, x_adv=x_adv)


@pytest.mark.parametrize(("pixel", "unexplained"), [(7, 0), (8, 1)])
@pytest.mark.parametrize("reference", ["ART", "torchattacks", "foolbox"])
def test_a_flip_is_excused_only_where_the_gradient_is_within_rounding_of_zero(
    reference, pixel, unexplained, faint_pixel
):
    model, x, y = faint_pixel
    spec = Spec("PGD", INF, 8 / 255, params={"steps": 3, "eps_step": 2 / 255})
    trajectory = record(reference, spec, model, x, y, CLASSES, 0)
    attack = native_attack(spec, model, 2, reference)
    assert compare_steps(attack, trajectory, x, y).mismatches == 0
    found = compare_steps(attack, with_flip(trajectory, x, pixel), x, y)
    assert (found.mismatches, found.unexplained) == (1, unexplained)
    # 3 of 3 steps in the other direction
    assert found.max_abs_diff == (pytest.approx(12 / 255, abs=1e-6) if unexplained else pytest.approx(0, abs=5e-7))


@pytest.mark.parametrize("reference", ["ART", "torchattacks", "foolbox"])
def test_no_pixel_is_excused_in_norm_2(reference, faint_pixel):
    model, x, y = faint_pixel
    spec = Spec("PGD", 2, 0.5, params={"steps": 3, "eps_step": 0.1})
    trajectory = record(reference, spec, model, x, y, CLASSES, 0)
    x_adv = trajectory.x_adv.clone()
    x_adv[1].view(-1)[7] += 1e-4
    found = compare_steps(native_attack(spec, model, 2, reference), replace(trajectory, x_adv=x_adv), x, y)
    assert (found.mismatches, found.unexplained) == (1, 1)


def test_one_coordinate_for_another_is_excused_only_where_both_are_the_largest():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(0.1)
        model[1].weight[1, 3:6] = torch.tensor([2.0, 2.0, 1.9])
    x, y = torch.full((1, 3, 8, 8), 0.5), torch.tensor([0])
    spec = Spec("PGD", 1, 1.0, params={"steps": 1, "eps_step": 0.25})
    with torch.no_grad():  # as large as rounding can tell
        model[1].weight[:, 4] = model[1].weight[:, 3] * (1 - 1e-7)
    trajectory = record("ART", spec, model, x, y, CLASSES, 0)
    attack = native_attack(spec, model, 1, "ART")
    for pixel, unexplained in ((4, 0), (5, 1)):
        x_adv = x.clone()
        x_adv.view(-1)[pixel] += 0.25
        found = compare_steps(attack, replace(trajectory, x_adv=x_adv), x, y)
        assert (found.mismatches, found.unexplained) == (2, unexplained)


def test_the_outcome_of_two_batches_is_the_sum():
    assert Steps(3, 1, 0.25) + Steps(4, 0, 0.5) == Steps(7, 1, 0.5)
    assert Steps(0, 0, 0.0) + Steps(4, 2, 0.125) == Steps(4, 2, 0.125)


# The recording


@pytest.mark.parametrize("reference", ["ART", "torchattacks", "foolbox"])
def test_a_recording_is_complete(reference):
    net, x, y = small_net(), some_images(4), some_labels(4)
    spec = Spec("PGD", INF, 8 / 255, params={"steps": 3, "eps_step": 2 / 255})
    found = record(reference, spec, net, x, y, CLASSES, 0)
    assert isinstance(found, Trajectory)
    assert torch.equal(found.iterates[0], x)
    assert len(found.iterates) == len(found.gradients) == 3
    assert found.passes >= 2 * 3 * 4
    assert found.passes == net.images_seen + 3 * 4
    point = found.iterates[2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(net(point), y), point)
    scale = gradient.abs().max() / found.gradients[2].abs().max()  # of the loss: mean or sum
    torch.testing.assert_close(scale * found.gradients[2], gradient, rtol=1e-4, atol=1e-7)
    assert not torch.equal(found.x_adv, found.iterates[2])


@pytest.mark.parametrize("reference", ["ART", "torchattacks", "foolbox"])
def test_another_number_of_gradients_than_steps_is_an_error(reference, monkeypatch):
    spec = Spec("PGD", INF, 8 / 255, params={"steps": 3, "eps_step": 2 / 255})
    build = comparison.build_attack

    def of_one_step(name, spec, *arguments, **options):
        return build(name, spec.having(steps=1), *arguments, **options)

    monkeypatch.setattr(comparison, "build_attack", of_one_step)
    with pytest.raises(RuntimeError, match=f"{reference} took 1 gradients for 3 steps"):
        record(reference, spec, small_net(), some_images(2), some_labels(2), CLASSES, 0)


# What a comparison leaves behind


@pytest.mark.parametrize("name", [*BROKEN_IN, "PGD-10 Linf untargeted from-image vs ART"])
def test_model_and_images_are_untouched(name):
    net = small_net().train()
    net.features[1].eval()
    net.head.bias.requires_grad_(False)
    for parameter in net.features.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    x, y = some_images(6), some_labels(6)
    modes = [part.training for part in net.modules()]
    values = {key: value.clone() for key, value in net.state_dict().items()}

    compare(CASES[name], net, x, y, nb_classes=CLASSES, batch_size=4)

    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(value, values[key]) for key, value in net.state_dict().items())
    assert [p.requires_grad for p in net.head.parameters()] == [True, False]
    assert all((p.grad == 0.25).all() for p in net.features.parameters())
    assert all(p.grad is None for p in net.head.parameters())
    assert not any(part._forward_hooks or part._backward_hooks for part in net.modules())
    assert torch.equal(x, some_images(6))


def test_the_seed_is_that_of_the_start():
    case = CASES["PGD-10 L2 untargeted random-start vs foolbox"]
    assert torch.equal(run(case, seed=3).reference, run(case, seed=3).reference)
    assert not torch.equal(run(case, seed=3).reference, run(case, seed=4).reference)


@pytest.mark.parametrize("name", BROKEN_IN)
def test_with_its_own_rules_native_is_not_judged(name):
    found = run(CASES[name], own_rules=True)
    assert found.verdict == "own rule"
    assert found.steps is None
    assert found.max_abs_diff_float64 is None
    with_rules = "Linf" not in name and name != "PGD-10 L2 targeted random-start vs ART"
    assert ((found.native - found.reference).abs().max() > 1e-4) == with_rules


def test_targets_are_the_next_class():
    labels = torch.tensor([0, 3, 4])
    assert harness.target_labels(labels, CLASSES).tolist() == [1, 4, 0]


def test_success_is_that_of_the_goal():
    net = small_net()
    case = Case(Spec("PGD", INF, 0.3, params={"steps": 10, "eps_step": 0.05}), "torchattacks")
    untargeted, targeted = (run(replace(case, spec=replace(case.spec, targeted=t)), net) for t in (False, True))
    for found, goal in (
        (untargeted, lambda guess: guess != some_labels(8)),
        (targeted, lambda guess: guess == harness.target_labels(some_labels(8), CLASSES)),
    ):
        assert torch.equal(found.native_success, goal(net(found.native).argmax(1)))
        assert torch.equal(found.reference_success, goal(net(found.reference).argmax(1)))
        assert found.native_success.any()
    assert untargeted.query_ratio <= 1
