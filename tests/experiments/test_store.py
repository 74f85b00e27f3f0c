import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from guardians.experiments.store import OUTCOME_COLUMNS, Store
from guardians.tables import read_csv

TESTS = Path(__file__).parents[1]


def outcomes(n=3, prediction=1):
    columns = dict.fromkeys(OUTCOME_COLUMNS, np.arange(n))
    columns |= {"adversarial_prediction": np.full(n, prediction), "l2": np.linspace(0.1, 1 / 3, n)}
    frame = pd.DataFrame(columns).astype({"forward": float})
    return frame.assign(forward=np.nan, stage=["a"] * (n - 1) + [""])


def test_a_run_comes_back_as_it_was_written(tmp_path):
    store = Store(tmp_path)
    known, figures = {"model": "a", "eps": 1 / 3, "flags": ["b"], "none": None}, {"seconds": 0.1, "norm": np.inf}
    store.write("1e5", known, figures, outcomes())
    for again in (store, Store(tmp_path)):
        assert again.runs() == [{"key": "1e5", **known, **figures, "is_complete": True}]
        pd.testing.assert_frame_equal(again.outcomes("1e5"), outcomes(), check_dtype=False)
        assert "1e5" in again
        assert "other" not in again
        assert again.outcomes("other").empty


def test_a_complete_run_stays_and_another_is_replaced(tmp_path):
    store = Store(tmp_path)
    store.write("a", {"n": 1}, {}, outcomes(1), is_complete=False)
    assert "a" not in store
    assert store.runs() == []
    assert [run["n"] for run in store.runs(unfinished=True)] == [1]
    store.write("a", {"n": 2}, {}, outcomes(2))
    store.write("a", {"n": 3}, {}, outcomes(3))
    assert [run["n"] for run in store.runs()] == [2]
    assert len(store.outcomes("a")) == 2


def test_what_is_forgotten_can_be_written_anew(tmp_path):
    store = Store(tmp_path)
    for key in ("a", "b"):
        store.write(key, {"attack": "FGSM"}, {"seconds": 1.0}, outcomes())
    store.forget(["a", "unknown"])
    assert "a" not in store
    assert [run["key"] for run in store.runs()] == ["b"]
    assert store.outcomes("a").empty
    assert len(store.outcomes("b")) == 3
    store.write("a", {"attack": "FGSM"}, {"seconds": 2.0}, outcomes(2))
    assert [run["seconds"] for run in store.runs(["a", "b"])] == [2.0, 1.0]
    assert len(store.outcomes("a")) == 2


def test_runs_come_in_the_order_that_is_asked_for(tmp_path):
    store = Store(tmp_path)
    for key in "cab":
        store.write(key, {}, {}, outcomes())
    assert [run["key"] for run in store.runs()] == ["c", "a", "b"]
    assert [run["key"] for run in store.runs(["b", "none", "c", "b"])] == ["b", "c"]


def test_what_is_exported_is_read_by_a_new_store(tmp_path):
    store = Store(tmp_path / "first")
    store.write("0123", {"model": "=a"}, {"seconds": 0.1}, outcomes())
    store.write("45e6", {"model": "b"}, {}, outcomes(2))
    store.write("unfinished", {}, {}, outcomes(1), is_complete=False)
    store.export(tmp_path / "second")
    again = Store(tmp_path / "second")
    assert again.runs() == store.runs()
    for key in ("0123", "45e6"):
        pd.testing.assert_frame_equal(again.outcomes(key), store.outcomes(key), check_dtype=False)
    before = [(tmp_path / "second" / name).read_bytes() for name in ("runs.csv", "outcomes.csv.xz")]
    again.export(tmp_path / "second")
    assert before == [(tmp_path / "second" / name).read_bytes() for name in ("runs.csv", "outcomes.csv.xz")]


def test_an_empty_store_is_exported_and_read(tmp_path):
    Store(tmp_path / "a").export(tmp_path / "b")
    assert Store(tmp_path / "b").runs() == []


def test_a_store_that_cannot_be_written_or_is_another(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/store\.sqlite' cannot be written"):
        Store(tmp_path / "file")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "store.sqlite").write_text("no database, " * 100)
    with pytest.raises(ValueError, match="cannot be written: file is not a database"):
        Store(tmp_path / "text")
    Store(tmp_path / "newer")
    with sqlite3.connect(tmp_path / "newer" / "store.sqlite") as database:
        database.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match="is of version 7: must be 1"):
        Store(tmp_path / "newer")


def start(script, *arguments):
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], env=environment)


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_a_claim_is_one_process_s_until_it_dies(tmp_path):
    script = """
        import sys, time
        from guardians.experiments.store import Store
        with Store(sys.argv[1]).claim("a") as is_mine:
            assert is_mine
            open(sys.argv[2], "w").close()
            time.sleep(60)
    """
    store, process = Store(tmp_path), start(script, tmp_path, tmp_path / "claimed")
    wait_for((tmp_path / "claimed").exists)
    with store.claim("a") as is_mine, store.claim("b") as other:
        assert (is_mine, other) == (False, True)
    process.kill()
    process.wait()
    with store.claim("a", wait=True) as is_mine:
        assert is_mine


def test_a_kill_leaves_runs_whole(tmp_path):
    script = """
        import sys, numpy as np, pandas as pd
        from guardians.experiments.store import OUTCOME_COLUMNS, Store
        store = Store(sys.argv[1])
        for number in range(10 ** 6):
            store.write(str(number), {"n": 200}, {}, pd.DataFrame(dict.fromkeys(OUTCOME_COLUMNS, np.arange(200))))
    """
    for _ in range(3):
        process = start(script, tmp_path)
        store = Store(tmp_path)
        seen = len(store.runs())
        wait_for(lambda: len(store.runs()) > seen + 3)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        for run in Store(tmp_path).runs():
            assert len(store.outcomes(run["key"])) == run["n"]


OPEN = """
    import pathlib
    import sys
    import time
    from guardians.experiments.store import Store

    folder, own, other = map(pathlib.Path, sys.argv[1:])
    for number in range(40):
        (folder / f"{own.name}{number}").touch()
        until = time.monotonic() + 30
        while not (folder / f"{other.name}{number}").exists():
            assert time.monotonic() < until, "the other process is gone"
        store = Store(folder / str(number))
        store.export(folder / str(number))
"""


def test_two_processes_open_a_new_store_at_once(tmp_path):
    processes = [start(OPEN, tmp_path, *names) for names in (("a", "b"), ("b", "a"))]
    assert [process.wait() for process in processes] == [0, 0]


BENCH = """
    import pathlib
    import sys
    import time
    import models_for_tests
    import torch
    from guardians.data import Dataset
    from guardians.experiments.bench import run_benchmark

    class Logged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models_for_tests.small_net()

        def forward(self, x):
            with open(sys.argv[2], "a") as file:
                file.write(f"{len(x)}\\n")
            return self.net(x)

    images = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = Dataset(images, torch.arange(12) % 5, tuple("abcde"), "noise")
    attacks = ["clean", "FGSM", *(f"PGD-{steps}" for steps in range(1, int(sys.argv[3])))]
    if len(sys.argv) > 4:
        own, other = map(pathlib.Path, sys.argv[4:])
        own.touch()
        while not other.exists():
            time.sleep(0.01)
    frame = run_benchmark(Logged(), data, model_name="logged", out=sys.argv[1], attacks=attacks,
                          implementations=["native", "ART"], verbose=False, batch_size=4)
    assert not frame.attrs["interrupted"]
"""
FIGURES = ["attack", "implementation", "n", "robust_accuracy", "forward_per_image", "backward_per_image", "l2_mean"]


def test_a_killed_benchmark_ends_as_one_that_was_not(tmp_path):
    whole = start(BENCH, tmp_path / "whole", tmp_path / "log", 30)
    killed = 0
    while True:
        process = start(BENCH, tmp_path / "killed", tmp_path / "killed.log", 30)
        found = tmp_path / "killed" / "store.sqlite"
        try:
            wait_for(lambda: found.exists() or process.poll() is not None)  # noqa: B023
            seen = len(Store(found.parent).runs())
            wait_for(lambda: len(Store(found.parent).runs()) > seen + 6 or process.poll() is not None)  # noqa: B023
        finally:
            process.kill()
        if process.wait() == 0:
            break
        killed += 1
    assert whole.wait() == 0
    assert killed >= 2
    first, second = (read_csv(tmp_path / name / "benchmark.csv") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(first[FIGURES], second[FIGURES])


def test_two_processes_do_the_work_once(tmp_path):
    ready = [tmp_path / "first", tmp_path / "second"]  # so that neither finds all done
    processes = [
        start(BENCH, tmp_path / "shared", tmp_path / f"{number}.log", 6, *order)
        for number, order in ((1, ready), (2, ready[::-1]))
    ]
    assert [process.wait() for process in processes] == [0, 0]
    store = Store(tmp_path / "shared")
    assert len(store.runs()) == 2 * 7
    alone = start(BENCH, tmp_path / "alone", tmp_path / "alone.log", 6)
    assert alone.wait() == 0
    passes = [(tmp_path / f"{name}.log").read_text().count("\n") for name in ("1", "2", "alone")]
    assert passes[2] <= passes[0] + passes[1] < 1.5 * passes[2]  # each process predicts the clean images
    first, second = (
        read_csv(tmp_path / name / "benchmark.csv").sort_values(["attack", "implementation"], ignore_index=True)
        for name in ("alone", "shared")
    )
    pd.testing.assert_frame_equal(first[FIGURES], second[FIGURES])
