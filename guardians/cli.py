"""The `guardians` command: thin wrappers that read arguments, call the library and print."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from guardians import __version__
from guardians.data import load_data
from guardians.models import build_model, save_model
from guardians.training import Recipe, train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Adversarial attacks, native and cross-checked."""


@app.command("train")
def train_command(
    architecture: Annotated[str, typer.Option(help="resnet9, resnet18 or wide_resnet")] = "resnet9",
    width: int = 16,
    data: Path | None = None,
    out: Path = Path("runs"),
    epochs: int = Recipe.epochs,
    batch_size: int = Recipe.batch_size,
    peak_lr: float = Recipe.peak_lr,
    label_smoothing: float = Recipe.label_smoothing,
    cutout: int = Recipe.cutout,
    seed: int = Recipe.seed,
) -> None:
    """Train a model."""
    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, peak_lr=peak_lr, label_smoothing=label_smoothing, cutout=cutout, seed=seed
    )
    import torch

    torch.manual_seed(seed)
    model = build_model(architecture, width=width)
    train_data, test_data = load_data(data, "train"), load_data(data, "test")
    name = f"{architecture}-{width}-standard"
    acc = train(model, train_data, test_data, recipe, out / name)
    save_model(
        model,
        {
            "name": name,
            "architecture": {"name": architecture, "width": width},
            "recipe": asdict(recipe),
            "test_accuracy": acc,
        },
        out,
    )
    print(acc)


if __name__ == "__main__":
    app()
