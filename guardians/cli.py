"""The `guardians` command: thin wrappers that read arguments, call the library and print tables."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from guardians import __version__
from guardians.data import ENVIRONMENT_VARIABLE, Dataset, load_data
from guardians.models import ARCHITECTURES, build_model, bundled_models, load_model, model_card, save_model
from guardians.tables import print_table
from guardians.training import Recipe, train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()

Data = Annotated[
    Path | None,
    typer.Option(
        envvar=ENVIRONMENT_VARIABLE,
        help="Folder of torchvision's CIFAR-10, or of an ImageFolder tree with train/ and test/.",
        show_default="20 sample images",
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision download CIFAR-10 into the data folder.")]
Count = Annotated[int | None, typer.Option(help="Images, class-balanced.", show_default="all")]
Model = Annotated[str, typer.Option(help="A bundled model (`guardians models`), or package.module:callable.")]
Weights = Annotated[Path | None, typer.Option(help=".safetensors or .pt file with the model's state dict.")]
Device = Annotated[str, typer.Option(help="For example cpu or cuda.")]
BatchSize = Annotated[int, typer.Option(help="Images in one forward pass.")]
Seed = Annotated[int, typer.Option(help="Of the subset of images and of all random draws.")]
Out = Annotated[Path, typer.Option(help="Folder for tables; a run that was stopped goes on from what is there.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Adversarial attacks for PyTorch: native, drop-in for ART, cross-checked against the toolkits."""
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command()
def models() -> None:
    """List the bundled models."""
    for name in bundled_models():
        card = model_card(name)
        console.print(f"{name}: {card['accuracy']:.2%} on {card['test_data']}", highlight=False)


@app.command()
def parity(
    model: Model = "resnet9-16-standard",
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    n: Count = None,
    attack: Annotated[list[str], typer.Option(help="Only this one, repeatable: FGSM, PGD-10, PGD-40.")] = [],  # noqa: B006
    reference: Annotated[list[str], typer.Option(help="Only this one, repeatable: ART, torchattacks, foolbox.")] = [],  # noqa: B006
    own_rules: Annotated[
        bool, typer.Option("--own-rules", help="Measure what the documented deviations change: deviations.csv.")
    ] = False,
    batch_size: BatchSize = 100,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("runs"),
) -> None:
    """Compare the native attacks with the toolkits' own, case by case: parity.csv."""
    from guardians.parity import run_parity

    images = _announced_data(data, n, seed, download)
    frame = run_parity(
        load_model(model, weights, device),
        images,
        model_name=model,
        out=out,
        attacks=attack,
        references=reference,
        own_rules=own_rules,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    columns = ["case", "max_abs_diff", "pixel_mismatch", "unexplained", "max_abs_diff_float64", "label_agreement"]
    print_table(frame, [*columns, "native_success", "reference_success", "verdict", "note"], "Parity")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in frame["verdict"].value_counts().items())
    console.print(f"{len(frame)} cases: {counts}", highlight=False)
    if (frame["verdict"] == "different").any():
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model = "resnet9-16-standard",
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    n: Count = None,
    attack: Annotated[list[str], typer.Option(help="Only this one, repeatable: clean, FGSM, PGD-<steps>.")] = [],  # noqa: B006
    implementation: Annotated[
        list[str], typer.Option(help="Only this one, repeatable: native, ART, torchattacks, foolbox.")
    ] = [],  # noqa: B006
    norm: Annotated[str, typer.Option(help="inf, 2 or 1.")] = "inf",
    eps: Annotated[float, typer.Option(help="Radius, in the unit of images in [0, 1].")] = 8 / 255,
    eps_step: Annotated[float | None, typer.Option(help="Step size of PGD.", show_default="eps / 4")] = None,
    random_start: Annotated[bool, typer.Option("--random-start", help="Start at random in the ball.")] = False,
    batch_size: BatchSize = 128,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = Path("runs"),
) -> None:
    """Run the same attacks through every implementation: benchmark.csv."""
    from guardians.benchmark.runner import run_benchmark

    images = _announced_data(data, n, seed, download)
    options: dict[str, Any] = {"attacks": attack} if attack else {}
    if implementation:
        options["implementations"] = implementation
    frame = run_benchmark(
        load_model(model, weights, device),
        images,
        model_name=model,
        out=out,
        norm="inf" if norm == "inf" else float(norm),
        eps=eps,
        eps_step=eps_step,
        random_start=random_start,
        batch_size=batch_size,
        device=device,
        seed=seed,
        **options,
    )
    columns = ["attack", "implementation", "n", "clean_accuracy", "robust_accuracy", "success_rate", "l2_mean"]
    print_table(frame, [*columns, "linf_max", "backward_per_image", "seconds", "flags"], f"Benchmark: {model}")


@app.command("train")
def train_command(
    architecture: Annotated[str, typer.Option(help=f"{', '.join(ARCHITECTURES)}.")] = "resnet9",
    width: Annotated[int, typer.Option(help="Base width of resnet9.")] = 16,
    depth: Annotated[int, typer.Option(help="Depth of wide_resnet.")] = 28,
    widen_factor: Annotated[int, typer.Option(help="Widen factor of wide_resnet.")] = 10,
    data: Data = None,
    download: Download = False,
    epochs: int = Recipe.epochs,
    batch_size: int = Recipe.batch_size,
    peak_lr: float = Recipe.peak_lr,
    warmup: float = Recipe.warmup,
    momentum: float = Recipe.momentum,
    weight_decay: float = Recipe.weight_decay,
    label_smoothing: float = Recipe.label_smoothing,
    crop_padding: int = Recipe.crop_padding,
    cutout: int = Recipe.cutout,
    seed: int = Recipe.seed,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for weights, card, log and checkpoint.")] = Path("runs"),
) -> None:
    """Train a classifier; run again with the same arguments to resume. Writes weights, a JSON card and a CSV log."""
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        peak_lr=peak_lr,
        warmup=warmup,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        crop_padding=crop_padding,
        cutout=cutout,
        seed=seed,
    )
    shapes = {"resnet9": {"width": width}, "wide_resnet": {"depth": depth, "widen_factor": widen_factor}}
    shape = shapes.get(architecture, {})
    name = "-".join([architecture, *map(str, shape.values()), "standard"])
    train_data, test_data = (_announced_data(data, None, seed, download, split) for split in ("train", "test"))
    torch.manual_seed(seed)
    model = build_model(architecture, **shape, num_classes=len(train_data.classes))
    accuracy = train(model, train_data, test_data, recipe, out / name, device=device)
    card = {
        "name": name,
        "architecture": {"name": architecture, **shape, "num_classes": len(train_data.classes)},
        "recipe": {"name": "standard", **asdict(recipe)},
        "train_data": f"{len(train_data)} images of {train_data.source}",
        "test_data": f"{len(test_data)} images of {test_data.source}",
        "accuracy": accuracy,
        "command": " ".join(["guardians", *sys.argv[1:]]),
    }
    console.print(f"accuracy {accuracy:.2%}; wrote {save_model(model, card, out)}", highlight=False)


def _announced_data(data: Path | None, n: int | None, seed: int, download: bool, split: str = "test") -> Dataset:
    images = load_data(data, split, n, seed=seed, download=download)
    console.print(f"data: {len(images)} images, {images.source}", highlight=False)
    return images


def run() -> None:
    """Entry point: user errors as one line, without a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    run()
