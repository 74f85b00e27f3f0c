"""Processes that share an evaluation find what one finds, to the last bit, whichever of them dies on the way."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from ranks_for_tests import benchmarked, evaluated, model_and_data

from guardians.engine.ranks import Ranks, agreed, deal, is_launched, local_device, ranks

TIMED = ["seconds", "images_per_second", "peak_memory_mb"]


def launch(fault, out, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    script = Path(__file__).with_name("ranks_for_tests.py")
    return subprocess.run([*command, script, fault, out], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    evaluated(out / "evaluation")
    benchmarked(out / "benchmark")
    return out


def images(out):
    return pd.concat([pd.read_csv(out / "evaluation" / name) for name in ("images.csv", "shards.csv")])


def test_two_processes_find_what_one_finds_row_for_row_and_image_for_image(alone, tmp_path):
    done = launch("none", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_frame_equal(images(tmp_path), images(alone), check_exact=True)
    assert 0 < (images(alone)["stage"].isna()).sum() < 60  # else the tables would say little
    key = ["attack", "implementation", "defence"]
    tables = [pd.read_csv(out / "benchmark" / "benchmark.csv").sort_values(key) for out in (tmp_path, alone)]
    tables = [table.drop(columns=TIMED).reset_index(drop=True) for table in tables]
    assert_frame_equal(*tables, check_exact=True)
    outcomes = [pd.read_csv(out / "benchmark" / "outcomes.csv.xz") for out in (tmp_path, alone)]
    outcomes = [table.sort_values(["key", "image"]).reset_index(drop=True) for table in outcomes]
    assert_frame_equal(*outcomes, check_exact=True)


@pytest.mark.parametrize("fault", ["one", "all"])
def test_after_a_kill_and_a_restart_the_result_is_the_same(alone, tmp_path, fault):
    done = launch(fault, tmp_path, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr or "exitcode: -9" in done.stderr
    assert_frame_equal(images(tmp_path), images(alone), check_exact=True)


def test_a_process_that_hangs_is_done_without_and_named(alone, tmp_path):
    done = launch("hang", tmp_path)
    assert done.returncode != 0
    assert "process 1 of 2 has not answered" in done.stderr
    assert_frame_equal(images(tmp_path), images(alone), check_exact=True)


def test_a_process_alone_deals_to_itself():
    assert (ranks().rank, ranks().size, is_launched()) == (0, 1, False)
    assert agreed(lambda: "said") == "said"
    assert list(deal([1, 2], lambda unit: [(unit, -unit), (10 * unit, None)])) == [
        (1, -1),
        (10, None),
        (2, -2),
        (20, None),
    ]
    assert local_device("cuda") == "cuda"


def test_a_value_of_any_length_passes_the_store():
    store = torch.distributed.HashStore()
    first, second = Ranks(0, 2, store), Ranks(1, 2, store)
    value = bytes(9 * 2**20)  # more than a store takes at once
    assert first.agreed(lambda: value) == value
    assert second.agreed(lambda: pytest.fail("asked the wrong process")) == value


def test_what_only_the_first_keeps_reaches_no_other():
    store = torch.distributed.HashStore()
    first, second = Ranks(0, 2, store), Ranks(1, 2, store)
    assert list(first.deal("ab", lambda unit: [(unit, unit.upper())])) == [("a", "A"), ("b", "B")]
    assert list(second.deal("ab", lambda unit: pytest.fail("was dealt twice"))) == [("a", None), ("b", None)]


def test_who_does_not_answer_is_named():
    second = Ranks(1, 2, torch.distributed.HashStore(), timeout=0.01)
    with pytest.raises(RuntimeError, match="process 0 of 2 has not answered"):
        second.agreed(lambda: None)


def test_most_images_are_right():
    model, data = model_and_data()
    with torch.no_grad():
        assert (model(data.as_floats()).argmax(1) == data.labels).double().mean() > 0.8
