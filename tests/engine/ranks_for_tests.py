"""What the processes of test_ranks.py do, launched by torchrun: `ranks_for_tests.py FAULT OUT`."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

import guardians.attacks.sequence as sequence
from guardians import evaluate
from guardians.data import Dataset
from guardians.engine.ranks import ranks, sharing
from guardians.experiments.bench import run_benchmark
from guardians.models import build_model

ATTACKS = ["clean", "FGSM", "PGD-3", "FMN-5", "AutoAttack(steps=3, n_queries=20)", "evaluate(budget='fast')"]


def model_and_data() -> tuple[torch.nn.Module, Dataset]:
    """A small network, and images of which it gets most right."""
    torch.manual_seed(0)
    model = build_model("resnet9", num_classes=4, width=4).eval()
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(1)
    labels[::9] = (labels[::9] + 1) % 4
    return model, Dataset(images, labels, tuple("abcd"), "random")


def evaluated(out: Path) -> None:
    """An evaluation as a table."""
    model, data = model_and_data()
    found = evaluate(
        model, data.as_floats(), data.labels, eps=1 / 255, budget="standard", batch_size=2, out=out, verbose=False
    )
    if ranks().is_first:
        found.by_image().to_csv(out / "images.csv")
    options = {"eps": 1 / 255, "budget": "fast", "batch_size": 2, "out": out, "verbose": False}
    found = evaluate(model, data, shard=7, **options)
    if ranks().is_first:
        found.by_image().to_csv(out / "shards.csv")


def benchmarked(out: Path) -> None:
    """A benchmark of native attacks and others, also of a random defence."""
    model, data = model_and_data()
    for defence in ("none", "rse(n=2, sigma_init=0.05, sigma_inner=0.05)"):
        attacks = ATTACKS if defence == "none" else ATTACKS[:3]
        options = {"eps": 1 / 255, "batch_size": 2, "defence": defence, "verbose": False}
        run_benchmark(model, data, model_name="small", attacks=attacks, out=out, **options)


def break_down(fault: str, out: Path) -> None:
    """Let the second process, or with "all" also the first, die or stop in a unit, unless that has happened before."""
    attacked, begun, units = sequence._attacked, out / "begun", 0

    def attacked_until(*arguments):
        nonlocal units
        units += 1
        is_second, first_time = ranks().rank == 1, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_second:
            begun.touch()
        while not begun.exists():
            time.sleep(0.01)
        if first_time and (is_second or (fault == "all" and units == 2)):
            os.kill(os.getpid(), signal.SIGSTOP if fault == "hang" else signal.SIGKILL)
        yield from attacked(*arguments)

    if fault != "none":
        sequence._attacked = attacked_until


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    break_down(sys.argv[1], folder)
    with sharing(patience=2.0):
        evaluated(folder / "evaluation")
        if sys.argv[1] == "none":
            benchmarked(folder / "benchmark")
