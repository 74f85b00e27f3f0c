"""What the processes of test_training_processes.py do, launched by torch's elastic agent."""

import os
import resource
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from guardians import training
from guardians.cli import app
from guardians.data import Dataset
from guardians.engine.ranks import is_launched
from guardians.training import RECIPES, Recipe, train

EPOCHS, STEPS = 2, 3
SMALL = {"epochs": EPOCHS, "batch_size": 16, "crop_padding": 1, "cutout": 2, "holdout": 9, "peak_lr": 0.1}
FULL = 64  # bytes that fit on the disk


def images(n: int, seed: int) -> Dataset:
    """Noisy 6 x 6 images whose strongest channel is their label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    found = torch.randint(0, 160, (n, 3, 6, 6), generator=generator)
    found[torch.arange(n), labels] += 60
    return Dataset(found.to(torch.uint8), labels, ("red", "green", "blue"), "synthetic")


def network() -> nn.Sequential:
    """With batch norm, whose statistics are of a part of the batch, and dropout, which draws from torch's generator."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(36, 3),
    )


def recipe_named(name: str, **changes: int) -> Recipe:
    return replace(Recipe(**RECIPES[name]), **{**SMALL, **changes})


def trained(out: Path, recipe: Recipe, **options: object) -> tuple[float, dict[str, torch.Tensor]]:
    """The accuracy and the state of the model; of the processes the first writes them down, too."""
    torch.set_num_threads(1)
    if is_launched() and os.environ["RANK"] != "0":
        torch.manual_seed(1)  # nothing may depend on it
    model = network()
    accuracy = train(model, images(60, 0), images(50, 1), recipe, out, verbose=False, **options)
    if os.environ.get("RANK", "0") == "0":
        torch.save((accuracy, model.state_dict()), out / "outcome.pt")
    return accuracy, model.state_dict()


def train_all(out: Path) -> None:
    """Every recipe; one also with more micro-batches than processes, in parts that are not equal."""
    for name in RECIPES:
        trained(out / name, recipe_named(name))
    trained(out / "uneven", recipe_named("standard"), micro_batches=3)


def command(out: Path, *options: str) -> None:
    """`guardians train`, on the sample images."""
    torch.set_num_threads(1)
    small = ["--recipe", "pgd-at", "--width", "2", "--epochs", "1", "--batch-size", "8", "--holdout", "4"]
    arguments = ["train", *small, *options, "--out", str(out)]
    with mock.patch.object(sys, "argv", ["guardians", *arguments]):
        app(arguments, standalone_mode=False)


def train_with(fault: str, out: Path) -> None:
    """What goes wrong, goes wrong in the second step of the second epoch, or when that is saved, and only once."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        break_down(fault, int(os.environ["RANK"]))
    try:
        trained(out, recipe_named("iat"), timeout=2.0 if fault == "hang" else 60.0)
    except (OSError, KeyboardInterrupt) as error:
        (out / f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)


def break_down(fault: str, rank: int) -> None:
    if fault in ("one", "all", "hang", "term"):
        augment, actions = training._augment, {"one": kill, "all": kill, "hang": hang, "term": terminate}
        if rank == 1 or fault == "all":
            training._augment = before_call(STEPS + 2, augment, actions[fault])
    elif rank == 0 and fault == "half":
        torch.save = before_call(2, torch.save, write_half)
    elif rank == 0 and fault == "full":
        torch.save = with_full_disk(torch.save)


def before_call(number, function, action):
    """`function`, with `action` before its call of this number, from 1 on."""
    calls = iter(range(1, 10**6))

    def wrapped(*arguments):
        if next(calls) == number:
            action(*arguments)
        return function(*arguments)

    return wrapped


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def hang(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that the agent, which ends it, need not wait
    time.sleep(600)


def write_half(state: dict, stream) -> None:
    stream.write(b"PK half of a checkpoint")
    stream.flush()
    kill()


def with_full_disk(function):
    """`function`, in whose second call no file can grow beyond a few bytes."""
    calls = iter(range(1, 10**6))

    def wrapped(*arguments):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if next(calls) == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, limits[1]))
        try:
            return function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return wrapped
