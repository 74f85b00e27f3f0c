"""Models that are spread over two processes, as FSDP and tensor parallelism do."""

import copy
import socket
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models_for_tests import CLASSES, some_images, some_labels
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from guardians.attacks import PGD, CarliniWagnerL2
from guardians.data import Dataset
from guardians.engine import ranks as engine_ranks
from guardians.engine.batch import default_batch_size
from guardians.engine.ranks import Ranks, check_shareable
from guardians.engine.search import folded_view
from guardians.engine.victim import Victim, is_sharded, undisturbed
from guardians.evaluation import evaluate
from guardians.experiments.run import Run, perform
from guardians.experiments.subject import Subject
from guardians.models import digest

_fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not (dist.is_gloo_available() and hasattr(_fsdp, "fully_shard")), reason="needs torch 2.6 with gloo"
)
X, Y = some_images(10, dtype=torch.float64), some_labels(10)


class Net(nn.Sequential):
    """A convolution and a batch norm that could be folded, and two layers to be sharded."""

    copies = 0

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.ReLU()
        )
        self.append(nn.Linear(16, CLASSES)).double().eval()

    def __deepcopy__(self, memo: dict) -> "Net":
        Net.copies += 1
        return Net().load_state_dict(copy.deepcopy(self.state_dict(), memo))


class OnWholeOutput(nn.Module):
    """A linear layer with a weight that is a DTensor, without hooks."""

    def __init__(self, layer: nn.Linear, mesh: object) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        self.bias = nn.Parameter(distribute_tensor(layer.bias.detach(), mesh, [Shard(0)]))

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        whole = DTensor.from_local(x, self.mesh, [Replicate()])
        return nn.functional.linear(whole, self.weight, self.bias).redistribute(self.mesh, [Replicate()]).to_local()


def fsdp(mesh: object) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = Net()
    fully_shard(net[4], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def first_fsdp(mesh: object) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))


def tensor_parallel(mesh: object) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(Net(), mesh, {"4": ColwiseParallel(), "6": RowwiseParallel()})


def without_hooks(mesh: object) -> nn.Module:
    net = Net()
    net[4] = OnWholeOutput(net[4], mesh)
    return net


def of_this_process(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [getattr(p, "to_local", lambda p=p: p)().clone() for p in model.parameters()]


def gradients_of_a_step(model: nn.Module) -> list[Tensor]:
    model.train()
    model.zero_grad()
    cross_entropy(model(X), Y).backward()
    model.eval()
    found = [parameter.grad for parameter in model.parameters()]
    return [getattr(gradient, "full_tensor", lambda g=gradient: g)() for gradient in found]


def compare(make: Callable[[object], nn.Module], mesh: object) -> None:
    """An attack asks a sharded model for what a plain one says, and it comes back as it was."""
    plain, model = Net(), make(mesh)
    assert is_sharded(model)
    assert not is_sharded(plain)
    plain[0].register_forward_hook(lambda *_: None)  # so that it is asked itself, too
    before, modes = of_this_process(model), [part.training for part in model.modules()]
    assert sum(part.numel() for part in before) < sum(parameter.numel() for parameter in plain.parameters())

    for attack in (
        lambda model: PGD(model, 2, 0.5, 0.1, max_iter=5, seed=0, verbose=False),
        lambda model: PGD(
            model, np.inf, 0.03, 0.01, max_iter=5, num_random_init=2, seed=0, early_stop=True, verbose=False
        ),
        lambda model: CarliniWagnerL2(model, max_iter=5, binary_search_steps=2, seed=0, verbose=False),
    ):
        torch.testing.assert_close(attack(model)(X, Y), attack(plain)(X, Y), rtol=0, atol=1e-9)
    data = Dataset((255 * X).to(torch.uint8), Y, tuple("abcdefghij"[:CLASSES]), "noise")
    with mock.patch.object(engine_ranks, "_ranks", Ranks(size=2)):
        check_shareable(Net())
        for ask in (
            lambda: evaluate(model, X, Y, verbose=False),
            lambda: perform([Run(Subject("its", model), data, None, "native")], None, verbose=False),
        ):
            with pytest.raises(ValueError, match="the model is sharded over processes"):
                ask()
    assert folded_view(model, X) is model
    assert Net.copies == 0
    with undisturbed(model), undisturbed(plain):
        assert default_batch_size(Victim(model), X) == default_batch_size(Victim(plain), X)

    assert [part.training for part in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for now, then in zip(of_this_process(model), before, strict=True):
        assert torch.equal(now, then)
    if make is not first_fsdp:  # whose gradients are flat, and whose state is in pieces
        for found, expected in zip(gradients_of_a_step(model), gradients_of_a_step(plain), strict=True):
            torch.testing.assert_close(found, expected)
        digests: list[str] = ["", ""]
        dist.all_gather_object(digests, digest(model))
        assert digests[0] == digests[1]
        left = [evaluate(net, X, Y, norm=np.inf, eps=0.005, verbose=False) for net in (model, plain)]
        assert left[0].robust_accuracy == left[1].robust_accuracy


def compare_all(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for make in (fsdp, first_fsdp, tensor_parallel, without_hooks):
        try:
            compare(make, mesh)
        except Exception as error:
            raise AssertionError(make.__name__) from error
    dist.destroy_process_group()


def test_a_sharded_model_is_only_called() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(compare_all, (port,), nprocs=2)
