"""Kill a process at a random moment, again and again: the table of an evaluation must come out the same.

    python benchmarks/soak_processes.py --kills 20 --data path/to/images

`torchrun --nproc-per-node 2 -m guardians evaluate` runs until it is done. Meanwhile one of its two processes is killed
(SIGKILL) at random moments, which torchrun starts anew, or torchrun with both, after which the same command goes on.
What it wrote is held against one process' tables, byte for byte; then the next evaluation begins, until there were
enough kills.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TABLES = ("evaluation_images.csv", "evaluation_stages.csv", "evaluation_curve.csv")


def command(arguments: argparse.Namespace, out: Path, processes: int) -> list[str]:
    """The evaluation by one process, or by several that are started anew where one dies."""
    evaluate = ["-m", "guardians", "evaluate", "--budget", "standard", "--images", str(arguments.images)]
    evaluate += ["--batch-size", "8", "--out", str(out), "--data", str(arguments.data)]
    if processes == 1:
        return [sys.executable, *evaluate]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1000"]
    return [sys.executable, *torchrun, "--nproc-per-node", str(processes), *evaluate]


def workers(parent: int) -> list[int]:
    """The processes that torchrun has started and that are still there."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []


def kill(running: subprocess.Popen[bytes], whom: str) -> bool:
    """Kill the first or the second process, or all with torchrun; whether they were there."""
    alive = workers(running.pid)
    if running.poll() is not None or len(alive) < 2:
        return False
    for pid in [running.pid, *alive] if whom == "all" else [alive[whom == "second"]]:
        os.kill(pid, signal.SIGKILL)
    return True


def main() -> None:
    """Compare, and exit with 1 where a table differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills, evaluations, differing = dict.fromkeys(("first", "second", "all"), 0), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        one, started = Path(folder) / "one", time.monotonic()
        subprocess.run(command(arguments, one, 1), check=True, **quiet)
        longest = time.monotonic() - started
        while sum(kills.values()) < arguments.kills:
            evaluations += 1
            many, done = Path(folder) / str(evaluations), False
            while not done:
                running = subprocess.Popen(command(arguments, many, 2), **quiet)
                while running.poll() is None:
                    time.sleep(draw.uniform(0.2, 1.0) * longest)
                    whom = draw.choice(list(kills))
                    if sum(kills.values()) < arguments.kills and kill(running, whom):
                        kills[whom] += 1
                        print(f"kill {sum(kills.values())}: {whom}", flush=True)
                done = running.wait() == 0
            pairs = [[next(out.rglob(name)) for out in (one, many)] for name in TABLES]
            differing += not all(filecmp.cmp(*pair, shallow=False) for pair in pairs)
    count = f"{sum(kills.values())} kills {kills}, {evaluations} evaluations"
    print(f"{count}, {differing} with other tables than one process'")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
