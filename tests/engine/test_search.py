"""The cheap copies that search: what is copied, what is not, and that they never decide."""

import copy
import logging

import pytest
import torch
from models_for_tests import (
    CLASSES,
    Recorder,
    Uncastable,
    Viewing,
    is_fooled,
    small_net,
    snapshot,
    some_images,
    some_labels,
    traceable_net,
)
from torch import fx, nn

from guardians.attacks import FGSM, PGD
from guardians.engine import search
from guardians.engine.search import bfloat16_is_native, seconds_of_a_pass
from guardians.engine.victim import Victim, undisturbed
from guardians.models import resnet9, resnet18, wide_resnet

LOGGER = "guardians.engine.search"
CPU = torch.device("cpu")


def pgd(model, **options):
    defaults = {"eps": 0.03, "eps_step": 0.01, "max_iter": 6, "seed": 0, "early_stop": True, "batch_size": 9}
    return PGD(model, **{**defaults, "verbose": False, **options})


@pytest.fixture
def copies_asked(monkeypatch):
    """Images that any copy is asked about, a number a pass."""
    asked, ask = [], search.InPrecision.__call__

    def count(cheap, x):
        asked.append(len(x))
        return ask(cheap, x)

    monkeypatch.setattr(search.InPrecision, "__call__", count)
    return asked


# Copies


def settled(model):
    """With statistics and affine parameters of batch norms that are not those of a new model, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.bias):
                if tensor is not None:
                    tensor.data.normal_(0, 0.2, generator=generator)
            for tensor in (part.running_var, part.weight):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settled(make())


def norms(model):
    return sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def used_norms(traced):
    modules = dict(traced.named_modules())
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    return sum(isinstance(modules[node.target], nn.BatchNorm2d) for node in nodes)


class SharedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.conv(self.first(self.conv(x)).relu())).relu().flatten(1))


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.two(self.norm(self.one(x)).relu())).relu().flatten(1))


class SameUnderTwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.same = self.conv
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.same(self.first(self.conv(x)).relu())).relu().flatten(1))


class OutputUsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(192, CLASSES)

    def forward(self, x):
        out = self.conv(x)
        return self.head((out + self.norm(out).relu()).flatten(1))


def plain(*layers):
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, CLASSES))


# id: (model, side of its images, batch norms that stay)
FOLDED = {
    "conv-bn-relu": (traceable_net, 8, 0),
    "resnet9": (lambda: resnet9(4), 32, 0),
    "wide_resnet": (lambda: wide_resnet(10, 1), 32, 4),  # norms before convolutions have none to go into
    "resnet18": (lambda: resnet18(), 32, 0),
    "without bias": (lambda: plain(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)), 8, 0),
    "without affine": (lambda: plain(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)), 8, 0),
    "groups": (lambda: plain(nn.Conv2d(3, 9, 3, groups=3), nn.BatchNorm2d(9), nn.Conv2d(9, 8, 3, padding=2)), 8, 0),
    "without statistics": (
        lambda: plain(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)),
        8,
        1,
    ),
    "transposed": (lambda: plain(nn.ConvTranspose2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)), 8, 1),
    "shared convolution": (SharedConv, 8, 2),
    "shared norm": (SharedNorm, 8, 2),
    "one module, two names": (SameUnderTwoNames, 8, None),
    "output used twice": (OutputUsedTwice, 8, 1),
}


@pytest.mark.parametrize(("make", "side", "left"), FOLDED.values(), ids=FOLDED)
def test_a_folded_copy_has_the_logits_and_gradients_of_the_model(make, side, left):
    model = seeded(make).double()  # in float32 a ReLU at zero may fall to either side
    before = snapshot(model)
    folded = search.folded_copy(model)
    assert snapshot(model) == before
    assert left is None or used_norms(folded) == left
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, side, side, generator=generator, dtype=torch.float64).requires_grad_(True)
    expected, got = model(x), folded(x)
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    wanted, found = (torch.autograd.grad(logits.logsumexp(1).sum(), x)[0] for logits in (expected, got))
    assert (found - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.parametrize(("make", "side", "left"), FOLDED.values(), ids=FOLDED)
def test_a_folded_view_follows_the_model_that_is_trained(make, side, left):
    model = seeded(make).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, side, side, generator=generator, dtype=torch.float64)
    before = snapshot(model)
    view = search.folded_view(model, x)
    assert snapshot(model) == before
    assert left is None or used_norms(view) == left
    for _ in range(2):
        expected = model(x)
        assert (view(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(x).logsumexp(1).sum().backward()  # changes running statistics too
        optimizer.step()
        model.eval()
        assert not torch.allclose(model(x), expected)


def test_without_a_view_that_agrees_the_model_is_its_own():
    x = torch.rand(3, 3, 8, 8)
    model = seeded(SharedNorm)
    assert search.folded_view(model, x) is not model
    model.register_forward_hook(lambda *_: None)
    assert search.folded_view(model, x) is model  # the hook would not be asked
    for make in (Branching, Counting, TracedOtherwise):
        model = make(traceable_net())
        assert search.folded_view(model, x) is model


@pytest.mark.parametrize(
    ("precision", "description", "dtype"),
    [
        ("float32", "folded, channels_last, float32", torch.float32),
        ("bfloat16", "folded, channels_last, bfloat16", torch.bfloat16),
        ("float16", "folded, channels_last, float16", torch.float16),
    ],
)
def test_the_precision_is_what_the_copy_computes_in(precision, description, dtype, monkeypatch):
    seen, ask = set(), search.InPrecision.__call__

    def look(cheap, x):
        hook = cheap.module.get_submodule("3").register_forward_hook(lambda *arguments: seen.add(arguments[2].dtype))
        try:
            return ask(cheap, x)
        finally:
            hook.remove()

    monkeypatch.setattr(search.InPrecision, "__call__", look)
    attack = pgd(traceable_net(), precision=precision)
    attack(some_images(9), some_labels(9))
    assert attack.report.search == description
    assert seen == {dtype}


def test_the_time_of_a_pass_follows_from_the_operations_of_the_model():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 50), nn.ReLU(), nn.Linear(50, 5))
    forward = 2 * (192 * 50 + 50 * 5)
    seconds = seconds_of_a_pass(Victim(net), some_images(2), batch_size=100, processors=10)
    assert seconds == pytest.approx(3 * forward * 100 / (10 * 4e11))


def test_a_model_that_cannot_be_looked_into_is_no_work():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("not today")

    assert seconds_of_a_pass(Victim(Failing()), some_images(2), batch_size=100, processors=10) == 0


def test_auto_is_bfloat16_where_it_is_native():
    attack = pgd(traceable_net())
    attack(some_images(9), some_labels(9))
    assert attack.report.search.endswith("bfloat16" if bfloat16_is_native(CPU) else "float32")


@pytest.mark.parametrize("native", [True, False])
def test_auto_follows_the_device(native, monkeypatch):
    monkeypatch.setattr(search, "bfloat16_is_native", lambda device: native)
    attack = pgd(traceable_net())
    attack(some_images(9), some_labels(9))
    assert attack.report.search == f"folded, channels_last, {'bfloat16' if native else 'float32'}"


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_a_model_in_float64_searches_itself(precision, copies_asked):
    net = traceable_net(dtype=torch.float64)
    attack = pgd(net, precision=precision)
    attack(some_images(9, dtype=torch.float64), some_labels(9))
    assert attack.report.search == "model"
    assert copies_asked == []


# What it costs: the user's model judges, the copy searches


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("restarts", [0, 3])
def test_the_model_judges_and_its_copy_searches(precision, restarts, copies_asked):
    net, x = Recorder(traceable_net()), some_images(40)
    y = net(x).argmax(1)
    attack = pgd(net, precision=precision, num_random_init=restarts, eps=0.02)
    attack(x[:1], y[:1])  # finds the number of classes
    net.asked.clear()
    copies_asked.clear()
    x_adv = attack(x, y)
    report = attack.report
    assert report.search.startswith("folded")
    assert (is_fooled(net.net, x_adv, y) == report.fooled).all()
    assert 0 < report.fooled.sum() < 40
    with_gradient = net.images(with_gradient=True)  # what the copy took for fooled, and the model did not
    assert sum(copies_asked) + with_gradient == report.search_forward == report.search_backward
    assert net.images() == with_gradient + report.judgement_forward
    if precision == "float32":
        assert with_gradient == 0
        # The probe, what the search took for fooled and the ends of the starts, in batches of round sizes.
        assert report.judgement_forward <= 3 * 8 + 2 + 40 * max(1, restarts) * 4 / 3


def test_a_lower_precision_also_searches_without_early_stop(copies_asked):
    net, x, y = Recorder(traceable_net()), some_images(20), some_labels(20)
    attack = pgd(net, precision="bfloat16", early_stop=False)
    attack(x[:1], y[:1])
    net.asked.clear()
    copies_asked.clear()
    attack(x, y)
    assert attack.report.search == "folded, channels_last, bfloat16"
    assert net.images(with_gradient=True) == 0
    assert net.images() == attack.report.judgement_forward
    assert sum(copies_asked) == attack.report.search_forward == 6 * 20 + 8


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("make", [small_net, traceable_net])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("restarts", [0, 2])
def test_a_cheap_search_finds_what_the_model_finds(precision, make, targeted, restarts):
    net, x = make(), some_images(80)
    y = some_labels(80) if targeted else net(x).argmax(1)
    options = {"targeted": targeted, "num_random_init": restarts, "batch_size": 80}
    expected = pgd(Hooked(net), precision="float32", **options)
    expected(x, y)
    attack = pgd(net, precision=precision, **options)
    assert (is_fooled(net, attack(x, y), y, targeted) == attack.report.fooled).all()
    assert 0 < expected.report.fooled.sum() < 80
    assert abs(int(attack.report.fooled.sum()) - int(expected.report.fooled.sum())) <= 2


# Strict judgement of copies that are wrong


class Hooked(nn.Module):
    """A net that is asked itself, as a hook might see a copy."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_forward_hook(lambda module, inputs, output: None)

    def forward(self, x):
        return self.net(x)


class WrongOffTheData(nn.Module):
    """The net's logits on the data, and something else off it."""

    def __init__(self, net, data, error, detach=False):
        super().__init__()
        self.net, self.data, self.error, self.detach = copy.deepcopy(net), data.flatten(1), error, detach

    def forward(self, x):
        logits = self.net(x)
        off = (x.detach().flatten(1)[:, None] - self.data).abs().amax(2).amin(1) > 1e-3
        logits = torch.where(off[:, None], self.error(logits), logits)
        return logits.detach() + 0 * x.flatten(1)[:, :CLASSES] if self.detach else logits


WRONG = {
    "takes all for fooled": {"error": lambda logits: logits.roll(1, 1)},
    "takes some for fooled": {"error": lambda logits: logits + torch.tensor([0, 0, 2.0, 0, 0])},
    "not finite": {"error": lambda logits: logits * float("nan")},
    "infinite": {"error": lambda logits: logits + float("inf")},
    "without a gradient": {"error": lambda logits: logits, "detach": True},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("restarts", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 64])
def test_what_a_wrong_copy_fails_is_searched_again_by_the_model(wrong, restarts, batch_size, monkeypatch):
    net, x = traceable_net(), some_images(30)
    y = net(x).argmax(1)
    options = {"batch_size": batch_size, "num_random_init": restarts, "precision": "float32"}
    if restarts:
        options |= {"eps": 0.04}
    own = pgd(Hooked(net), **options)
    expected = own(x, y)
    monkeypatch.setattr(search, "folded_copy", lambda module: WrongOffTheData(net, x, **wrong))
    recorder = Recorder(net)
    attack = pgd(recorder, **options)
    if restarts:  # the probe sees clean images, the search starts off them
        attack.set_params(eps=0.04)
    x_adv = attack(x, y)
    report = attack.report
    assert report.search == "folded, channels_last, float32"
    assert (is_fooled(net, x_adv, y) == report.fooled).all()
    assert (report.fooled >= own.report.fooled).all()
    assert 0 < own.report.fooled.sum() < 30
    assert recorder.images(with_gradient=True) > 0
    assert recorder.images() == recorder.images(with_gradient=True) + report.judgement_forward + 1
    stands = torch.from_numpy(~report.fooled)
    torch.testing.assert_close(x_adv[stands], expected[stands], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param({"error": lambda logits: torch.full_like(logits, float("nan"))}, id="NaN"),
        pytest.param({"error": lambda logits: torch.full_like(logits, float("inf"))}, id="inf"),
        pytest.param({"error": lambda logits: logits * float("nan")}, id="NaN gradient"),
        pytest.param({"error": lambda logits: logits, "detach": True}, id="no gradient"),
    ],
)
def test_with_momentum_what_a_wrong_copy_fails_is_searched_again_too(error, monkeypatch):
    net, x = traceable_net(), some_images(60)
    y = net(x).argmax(1)
    x, y = x[y == 0], y[y == 0]  # to the copy's argmax NaN is class 0, so that it never takes one for fooled
    own = pgd(Hooked(net), precision="float32", decay=0.9)
    own(x, y)
    wrong = WrongOffTheData(net, x, **error)
    monkeypatch.setattr(search, "folded_copy", lambda module: wrong)
    recorder = Recorder(net)
    attack = pgd(recorder, precision="float32", decay=0.9)
    x_adv = attack(x, y)
    assert attack.report.search.startswith("folded")
    assert 3 < own.report.fooled.sum() < len(x)
    assert recorder.images(with_gradient=True) > 0
    assert (is_fooled(net, x_adv, y) == attack.report.fooled).all()
    assert (attack.report.fooled >= own.report.fooled).all()


class WrongInTurn(nn.Module):
    """Right at first, then for some passes not finite, then with a gradient that leads away."""

    def __init__(self, net, passes):
        super().__init__()
        self.net, self.passes, self.asked = copy.deepcopy(net), passes, 0

    def forward(self, x):
        self.asked += 1
        logits = self.net(x)
        if self.asked == 1:
            return logits
        return logits * float("nan") if self.asked <= 1 + self.passes else 2 * logits.detach() - logits


def test_doubts_outlive_a_restart(monkeypatch):
    net, x = traceable_net(), some_images(30)
    y = net(x).argmax(1)
    options = {"max_iter": 3, "eps_step": 0.015, "num_random_init": 2, "batch_size": 64, "precision": "float32"}
    own = pgd(Hooked(net), **options)
    own(x, y)
    fooled_by_chance = is_fooled(net, pgd(Hooked(net), **{**options, "eps_step": 1e-9})(x, y), y)
    monkeypatch.setattr(search, "folded_copy", lambda module: WrongInTurn(net, passes=2))  # by then it is at rest
    recorder = Recorder(net)
    attack = pgd(recorder, **options)
    attack(x, y)
    assert (attack.report.fooled >= own.report.fooled).all()
    assert own.report.fooled.sum() > fooled_by_chance.sum() + 5
    assert recorder.images(with_gradient=True) > 0


def test_what_a_copy_finds_while_it_looks_for_the_smallest_size_is_judged(monkeypatch):
    net, x = traceable_net(), some_images(30)
    y = net(x).argmax(1)
    options = {"eps": 0.05, "eps_step": 0.01, "minimal": True, "batch_size": 64}
    own = FGSM(Hooked(net), precision="float32", **options)
    fooled = is_fooled(net, own(x, y), y)
    monkeypatch.setattr(search, "folded_copy", lambda module: WrongOffTheData(net, x, lambda logits: logits.roll(1, 1)))
    recorder = Recorder(net)
    attack = FGSM(recorder, precision="bfloat16", **options)
    x_adv = attack(x, y)
    assert attack.report.search.startswith("folded")
    assert (is_fooled(net, x_adv, y) == attack.report.fooled).all()
    assert (attack.report.fooled >= fooled).all()
    assert 0 < fooled.sum() < 30
    assert recorder.images(with_gradient=True) > 0


class Misled(nn.Module):
    """The logits of a net up to rounding, and a gradient that leads nowhere."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)
        self.register_buffer("wrong", torch.randn(192, CLASSES, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return 1.01 * self.net(x.detach()) + (x - x.detach()).flatten(1) @ self.wrong


@pytest.mark.parametrize("targeted", [False, True])
def test_what_ends_just_short_of_the_boundary_is_searched_again_by_a_better_model(targeted, monkeypatch):
    net, x = traceable_net(), some_images(40)
    y = some_labels(40) if targeted else net(x).argmax(1)
    monkeypatch.setattr(search, "folded_copy", lambda module: Misled(net))
    own = pgd(Hooked(net), precision="float32", targeted=targeted)
    fooled = is_fooled(net, own(x, y), y, targeted)
    short = []
    for magnified in (0.0, 12.0):
        monkeypatch.setattr(search, "_MAGNIFIED", magnified)
        attack = pgd(net, precision="bfloat16", targeted=targeted)
        assert (is_fooled(net, attack(x, y), y, targeted) == attack.report.fooled).all()
        short.append((fooled & ~attack.report.fooled).sum())
    assert short[1] < short[0]


WORSE_THAN_ROUNDING = {
    "another model": lambda net: traceable_net(seed=5),
    "always NaN": lambda net: WrongOffTheData(net, torch.full((1, 3, 8, 8), 9.0), lambda logits: logits * float("nan")),
    "no gradient": lambda net: nn.Sequential(net, _Detached()),
    "raises": lambda net: nn.Sequential(net, nn.Linear(99, 2)),
    "other classes": lambda net: nn.Sequential(net, nn.Linear(CLASSES, 2)),
    "off by more than rounding": lambda net: nn.Sequential(net, _Off(0.3)),
}


class _Detached(nn.Module):
    def forward(self, x):
        return x.detach()


class _Off(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, logits):
        return logits + self.share * logits.detach().abs().max()


@pytest.mark.parametrize(
    "make_wrong",
    WORSE_THAN_ROUNDING.values(),
    ids=WORSE_THAN_ROUNDING,
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_copy_that_disagrees_on_the_first_images_is_not_used(make_wrong, precision, monkeypatch, caplog):
    net, x = traceable_net(), some_images(20)
    y = net(x).argmax(1)
    expected = pgd(Hooked(net), precision="float32")
    expected(x, y)
    monkeypatch.setattr(search, "folded_copy", lambda module: make_wrong(net))
    attack = pgd(net, precision=precision)
    caplog.clear()
    attack(x, y)
    assert attack.report.search == ("model" if precision == "float32" else "model, bfloat16")
    assert abs(int(attack.report.fooled.sum()) - int(expected.report.fooled.sum())) <= 1
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (1 if precision == "float32" else 0)


# Models of which there is no copy


class Branching(Recorder):
    def forward(self, x):
        return self.net(x) if x.mean() > -1 else self.net(-x)


class Counting(Recorder):
    def forward(self, x):
        self.seen = getattr(self, "seen", 0) + len(x)
        return self.net(x)


class TracedOtherwise(Recorder):
    def forward(self, x):
        return self.net(2 * x if isinstance(x, fx.Proxy) else x)


class Uncopyable(Recorder):
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


NO_COPY = {
    "control flow on data": Branching,
    "Python side effects": Counting,
    "cannot be copied": Uncopyable,
    "hooks": Hooked,
}


@pytest.mark.parametrize("make", NO_COPY.values(), ids=NO_COPY)
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_a_model_that_is_not_copied_is_searched_all_the_same(make, precision, caplog):
    net, x = traceable_net(), some_images(40)
    y = net(x).argmax(1)
    expected = pgd(Hooked(net), precision="float32")
    expected(x, y)
    model = make(net)
    before = snapshot(model)
    attack = pgd(model, precision=precision)
    caplog.clear()
    x_adv = attack(x, y)
    attack(x, y)  # a warning comes once
    assert snapshot(model) == before
    assert (is_fooled(net, x_adv, y) == attack.report.fooled).all()
    assert abs(int(attack.report.fooled.sum()) - int(expected.report.fooled.sum())) <= 1
    assert 0 < attack.report.fooled.sum() < 40
    assert not attack.report.search.startswith("folded")
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (attack.report.search == "model")
    assert (attack.report.search == "model") == (make is Hooked or precision == "float32" or not low(precision))


def low(precision):
    return bfloat16_is_native(CPU) if precision == "auto" else precision != "float32"


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_a_view_that_channels_last_breaks_falls_back_to_the_usual_format(precision):
    net, x = traceable_net(), some_images(40)
    y = net(x).argmax(1)
    expected = pgd(Hooked(net), precision="float32")
    expected(x, y)
    model = Viewing(net)
    traced = Traced(net)
    for viewing in (model, traced):
        attack = pgd(viewing, precision=precision)
        assert (is_fooled(net, attack(x, y), y) == attack.report.fooled).all()
        assert "channels_last" not in attack.report.search
        assert abs(int(attack.report.fooled.sum()) - int(expected.report.fooled.sum())) <= 1
    assert attack.report.search.startswith("folded")


class Traced(Viewing):
    """Without `len`, so that a copy can be traced."""

    def forward(self, x):
        return self.head(self.features(x).view(x.shape[0], -1))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_model_that_autocast_breaks_is_searched_in_float32(precision):
    net, x = traceable_net(), some_images(40)
    y = net(x).argmax(1)
    attack = pgd(Uncastable(net), precision=precision)
    assert (is_fooled(net, attack(x, y), y) == attack.report.fooled).all()
    expected = pgd(Hooked(net), precision="float32")
    expected(x, y)
    assert attack.report.search.endswith("float32") or attack.report.search == "model"
    assert abs(int(attack.report.fooled.sum()) - int(expected.report.fooled.sum())) <= 1


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_dropout_and_norms_in_training_mode_are_in_evaluation_mode_in_the_copy(precision):
    net, parts = traceable_net(), traceable_net()
    model = nn.Sequential(nn.Dropout(0.5), *parts[:3], nn.Dropout2d(0.5), *parts[3:]).train()
    before, x = snapshot(model), some_images(40)
    y = net(x).argmax(1)
    attack, expected = pgd(model, precision=precision), pgd(Hooked(net), precision="float32")
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        x_adv = attack(x, y)
        assert torch.equal(torch.get_rng_state(), state)
    expected(x, y)
    assert snapshot(model) == before
    assert attack.report.search.startswith("folded")
    assert (is_fooled(net, x_adv, y) == attack.report.fooled).all()
    assert abs(int(attack.report.fooled.sum()) - int(expected.report.fooled.sum())) <= 1


def test_functional_dropout_follows_the_mode_too():
    class Functional(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(nn.functional.dropout(x, 0.5, self.training))

    net, x = traceable_net(), some_images(40)
    y = net(x).argmax(1)
    attack = pgd(Functional(traceable_net()).train(), precision="float32")
    x_adv = attack(x, y)
    assert attack.report.search.startswith("folded")
    assert (is_fooled(net, x_adv, y) == attack.report.fooled).all()


@pytest.mark.parametrize("make", [small_net, traceable_net])
def test_weights_changed_between_two_calls_are_seen(make):
    net, x = make(), some_images(40)
    attack = pgd(net)
    attack(x, net(x).argmax(1))
    other = make(seed=1)
    net.load_state_dict(other.state_dict())
    y = other(x).argmax(1)
    x_adv = attack(x, y)
    expected = pgd(other)
    assert torch.equal(x_adv, expected(x, y))
    assert (is_fooled(net, x_adv, y) == attack.report.fooled).all()


def test_float16_keeps_small_gradients():
    net, x = traceable_net(), some_images(8).requires_grad_(True)
    small = 1e-7  # times a probability it is nothing in float16
    (expected,) = torch.autograd.grad(small * net(x).logsumexp(1).sum(), x)
    logits = search.InPrecision(search.folded_copy(net), torch.float16)(x)
    assert logits.dtype == torch.float32
    (got,) = torch.autograd.grad(small * logits.logsumexp(1).sum(), x)
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("precision", "decay"),
    [("float16", None), ("float16", 0.9), ("bfloat16", None), ("bfloat16", 0.9)],
)
def test_images_that_the_model_is_sure_of_are_fooled_all_the_same(precision, decay):
    net, x = traceable_net(), some_images(40)
    y = net(x).argmax(1)
    with torch.no_grad():  # the same labels, but the gradients of most images vanish in float16
        net[-1].weight *= 600
        net[-1].bias *= 600
        assert (net(x).double().softmax(1).topk(2).values[:, 1] < 1e-8).sum() >= 15
    expected, attack = pgd(Hooked(net), precision="float32", decay=decay), pgd(net, precision=precision, decay=decay)
    expected(x, y)
    x_adv = attack(x, y)
    assert attack.report.search == f"folded, channels_last, {precision}"
    assert (is_fooled(net, x_adv, y) == attack.report.fooled).all()
    assert attack.report.fooled.sum() >= expected.report.fooled.sum() - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_low_precision_holds_its_weights_in_it_and_says_what_autocast_says(dtype):
    net, x = traceable_net(), some_images(12)
    with undisturbed(net):
        searches, _ = search.choose_searches(Victim(net), str(dtype).removeprefix("torch."), x, net(x), 12)
        found = searches[0].logits(x)
        folded = search.folded_copy(net).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype):
            expected = folded(x.contiguous(memory_format=torch.channels_last)).float()
    (asked,) = (argument for argument in searches[0].logits.keywords.values())
    parts = [part for part in asked.module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert {part.weight.dtype for part in parts} == {dtype}
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert searches[0].description.startswith("folded")
    assert torch.equal(found, expected)
