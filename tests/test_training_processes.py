"""Several processes train as one does, and nothing is lost or counted twice when some of them die."""

import csv
import json
import multiprocessing

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training_processes_for_tests import EPOCHS, command, recipe_named, train_all, train_with, trained

from guardians.training import RECIPES

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch without distributed or without gloo",
)


def launch(work, *arguments, restarts=0):
    """As torchrun does, but the processes are forked from one that has imported all."""
    multiprocessing.set_forkserver_preload(["guardians.cli"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=restarts,
        start_method="forkserver",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        monitor_interval=0.05,
    )
    elastic_launch(config, work)(*arguments)


def outcome(out):
    accuracy, state = torch.load(out / "outcome.pt", weights_only=True)
    with (out / "log.csv").open(newline="") as stream:
        log = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(stream)]
    assert [row["epoch"] for row in log] == [str(epoch + 1) for epoch in range(EPOCHS)]
    return accuracy, {name: tensor.tolist() for name, tensor in state.items()}, log


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, that goes through two micro-batches."""
    out = tmp_path_factory.mktemp("alone")
    for name in RECIPES:
        trained(out / name, recipe_named(name), micro_batches=2)
    return out


def test_two_processes_train_every_recipe_as_one_does_bit_for_bit(alone, tmp_path):
    launch(train_all, tmp_path)
    for name in RECIPES:
        assert outcome(tmp_path / name) == outcome(alone / name), name
    _, uneven = torch.load(tmp_path / "uneven" / "outcome.pt", weights_only=True)
    _, expected = trained(tmp_path / "expected", recipe_named("standard"), micro_batches=3)
    torch.testing.assert_close(uneven, expected, rtol=1e-3, atol=1e-5)
    assert not torch.equal(expected["0.weight"], torch.load(alone / "standard" / "outcome.pt")[1]["0.weight"])


def test_the_command_writes_what_one_process_writes(tmp_path, monkeypatch):
    monkeypatch.delenv("GUARDIANS_DATA", raising=False)
    launch(command, tmp_path / "two")
    command(tmp_path / "one", "--micro-batches", "2")
    one, two = (tmp_path / name / "resnet9-2-pgd-at" for name in ("one", "two"))
    assert two.with_suffix(".safetensors").read_bytes() == one.with_suffix(".safetensors").read_bytes()
    cards = [json.loads(folder.with_suffix(".json").read_text()) for folder in (one, two)]
    assert cards[1].pop("command").startswith("torchrun --nproc-per-node 2 -m guardians train ")
    assert cards[0].pop("command").startswith("guardians train ")
    assert cards[0] == cards[1]


FAULTS = {"one": "", "all": "", "hang": "process 1 of 2 has died, or hangs", "half": "", "full": "cannot be written"}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_and_a_restart_the_outcome_is_the_same(alone, tmp_path, fault):
    launch(train_with, fault, tmp_path, restarts=1)
    assert outcome(tmp_path) == outcome(alone / "iat")
    said = tmp_path / "error-0"
    assert FAULTS[fault] in (said.read_text() if said.exists() else "")
    assert not (tmp_path / "checkpoint.pt.partial").exists()


def test_the_previous_checkpoint_outlives_a_full_disk(alone, tmp_path):
    with pytest.raises(ChildFailedError):
        launch(train_with, "full", tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["epoch"] == 1
    trained(tmp_path, recipe_named("iat"))  # in one process, with as many micro-batches as before
    assert outcome(tmp_path) == outcome(alone / "iat")


def test_all_stop_after_the_same_step_when_one_is_told_to(alone, tmp_path):
    with pytest.raises(ChildFailedError):
        launch(train_with, "term", tmp_path)
    assert {(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)} == {"KeyboardInterrupt: "}
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]
    assert (saved["epoch"], saved["step"]) == (1, 2)
    launch(train_with, "none", tmp_path)
    assert outcome(tmp_path) == outcome(alone / "iat")
