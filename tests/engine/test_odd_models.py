"""Models that return more than logits, or are not plain modules, are attacked as the plain one, or refused clearly."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from models_for_tests import CLASSES, SHAPE, art_classifier, is_fooled, snapshot, some_images, traceable_net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guardians.attacks import FGSM, PGD, CarliniL2Method
from guardians.engine.victim import Victim, predicted_labels
from guardians.toolkits import TorchattacksAttack

ATTACKS = {
    "FGSM": lambda model: FGSM(model, eps=0.05),
    "PGD": lambda model: PGD(model, eps=0.05, eps_step=0.02, max_iter=4, verbose=False),
    "PGD, early stop": lambda model: PGD(
        model, eps=0.05, eps_step=0.02, max_iter=4, early_stop=True, precision="float32", verbose=False
    ),
    "C&W": lambda model: CarliniL2Method(model, max_iter=3, binary_search_steps=2, verbose=False),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@pytest.fixture
def x() -> Tensor:
    return some_images(6)


@pytest.fixture
def y(x) -> Tensor:
    return traceable_net()(x).argmax(1)


def assert_attacked_as_the_plain_net(attack, model, x, y):
    plain, odd = attack(traceable_net()), attack(model)
    x_adv = odd(x, y)
    torch.testing.assert_close(x_adv, plain(x, y), rtol=0, atol=1e-3)
    verdicts = is_fooled(traceable_net(), x_adv, y)
    assert odd.report.fooled is None or np.array_equal(odd.report.fooled, verdicts)


def exported(**options) -> nn.Module:
    return torch.export.export(traceable_net(), (some_images(6),), **options).module()


COMPILED = {
    "scripted": lambda: torch.jit.script(traceable_net()),
    "traced": lambda: torch.jit.trace(traceable_net(), some_images(2)),
    "scripted and frozen": lambda: torch.jit.freeze(torch.jit.script(traceable_net())),
    "traced and frozen": lambda: torch.jit.freeze(torch.jit.trace(traceable_net(), some_images(2))),
    "exported": lambda: exported(dynamic_shapes=({0: torch.export.Dim("n")},)),
}


@every_attack
@pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
def test_compiled_models(attack, compiled, x, y):
    assert_attacked_as_the_plain_net(attack, compiled(), x, y)


def test_a_scripted_model_comes_back_as_it_was(x, y):
    model = torch.jit.script(traceable_net()).train()
    modes = [part.training for part in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert any(modes)
    ATTACKS["PGD, early stop"](model)(x, y)
    assert [part.training for part in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted


def test_a_model_exported_for_one_batch_size(x, y):
    with pytest.raises(ValueError, match="dynamic_shapes"):
        ATTACKS["PGD"](exported())(x, y)


def test_an_exported_program_is_no_module():
    with pytest.raises(TypeError, match=r"program\.module\(\)"):
        PGD(torch.export.export(traceable_net(), (some_images(6),)))


@dataclass
class Output:
    """As models of Hugging Face return."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class Outputs(OrderedDict):
    """An output that is a dict with attributes."""

    @property
    def logits(self):
        return self["logits"]


Named = namedtuple("Named", ["aux", "logits"])


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = traceable_net(), wrap

    def forward(self, x):
        return self.wrap(x, self.net(x))


# id: (what the model returns, how it is said to have been found)
CONTAINERS = {
    "an object with logits": (lambda x, logits: Output(None, logits, (x,)), ".logits"),
    "a dict with attributes": (lambda x, logits: Outputs(logits=logits, hidden_states=x), ".logits"),
    "a dict": (lambda x, logits: {"features": x, "logits": logits}, "['logits']"),
    "a named tuple": (lambda x, logits: Named(x, logits), ".logits"),
    "a tuple": (lambda x, logits: (logits, x), "[0]"),
    "a list": (lambda x, logits: [logits], "[0]"),
}


@every_attack
@pytest.mark.parametrize("wrap", [lambda net: net, art_classifier], ids=["module", "estimator"])
@pytest.mark.parametrize(("returned", "where"), CONTAINERS.values(), ids=CONTAINERS)
def test_logits_are_taken_out_of_what_a_model_returns(attack, wrap, returned, where, x, y, caplog):
    model = Returns(returned)
    before = snapshot(model)
    attacker = attack(wrap(model))
    assert_attacked_as_the_plain_net(lambda net: attacker if net is model else attack(net), model, x, y)
    attacker(x, y)
    lines = [record for record in caplog.records if where in record.getMessage()]
    assert len(lines) == 1
    assert snapshot(model) == before


def test_a_scripted_model_that_returns_a_tuple(x, y):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = traceable_net()

        def forward(self, x):
            return self.net(x), x

    assert_attacked_as_the_plain_net(ATTACKS["PGD, early stop"], torch.jit.trace(Pair(), x), x, y)


def test_predictions_of_such_models(x, y):
    model = Returns(lambda x, logits: Output(None, logits))
    assert torch.equal(Victim(model).predict(x), y)
    assert torch.equal(predicted_labels(model, x), y)


def test_other_toolkits_attack_such_models(x, y):
    torchattacks = pytest.importorskip("torchattacks")
    model = Returns(lambda x, logits: Output(None, logits))
    options = {"eps": 0.05, "alpha": 0.02, "steps": 3, "random_start": False}
    odd, plain = (TorchattacksAttack(net, torchattacks.PGD, **options) for net in (model, model.net))
    assert torch.equal(odd(x, y), plain(x, y))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.net, self.use_reentrant = traceable_net(), use_reentrant

    def forward(self, x):
        return self.net[-1](checkpoint(self.net[:-1], x, use_reentrant=self.use_reentrant))


@every_attack
def test_checkpoints(attack, x, y):
    assert_attacked_as_the_plain_net(attack, Checkpointed(use_reentrant=False), x, y)


@every_attack
def test_reentrant_checkpoints(attack, x, y):
    model = Checkpointed(use_reentrant=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        attack(model)(x, y)
    assert snapshot(model) == before


def test_a_single_logit_of_a_bare_module_is_refused(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 1))
    with pytest.raises(ValueError, match="single logit"):
        PGD(model)(x, torch.zeros(6, dtype=torch.int64))
    assert CLASSES > 2
    with pytest.raises(ValueError, match="BCEWithLogitsLoss"):
        PGD(art_classifier(model, nb_classes=2))(x, torch.zeros(6, dtype=torch.int64))
