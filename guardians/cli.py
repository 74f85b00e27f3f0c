"""The `guardians` command: thin wrappers that read arguments, call the library and print tables."""

from __future__ import annotations

import functools
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import nn

from guardians import __version__
from guardians.attacks.registry import usages
from guardians.data import ENVIRONMENT_VARIABLE, Dataset, LazyDataset, load_data, open_data
from guardians.engine.checks import check_choice, check_integer
from guardians.engine.process_group import TIMEOUT, process_group
from guardians.engine.ranks import agreed, is_launched, local_device, ranks, sharing
from guardians.engine.victim import Victim
from guardians.evaluation import BUDGETS
from guardians.evaluation import evaluate as run_evaluation
from guardians.experiments.audit import audit as run_audit
from guardians.experiments.bench import ATTACKS, run_benchmark
from guardians.experiments.commands import noted
from guardians.experiments.curves import draw_figures
from guardians.experiments.page import evaluation_page
from guardians.experiments.planted import audit_planted
from guardians.experiments.report import report_page
from guardians.experiments.store import Store
from guardians.experiments.study import find_studies, load_study, perform_study
from guardians.experiments.subject import DEFENCES
from guardians.models import (
    ARCHITECTURES,
    build_model,
    bundled_models,
    load_model,
    load_weights,
    model_card,
    save_model,
)
from guardians.parity.cases import REFERENCES, pieces
from guardians.parity.conformance import SECONDS, piece, run_conformance
from guardians.tables import file_name, print_table, write_csv
from guardians.toolkits.build import IMPLEMENTATIONS, TOOLKITS, is_installed
from guardians.training import ENSEMBLE, RECIPES, SCHEDULES, Recipe, robust_accuracy, train

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_SHARED = ("evaluate", "bench", "study", "train")
_IN_MEMORY = 10**9
"""Pixels that are read at once, 4 GB as floats."""
_SHARD = 1024


def _number(value: str | float) -> float:
    """A number, also as a fraction: papers write a radius as 8/255."""
    numerator, _, denominator = str(value).partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{value!r}; needed is a number such as 0.5 or 8/255") from None


def _of_recipe(text: str, *names: str, parser: Any = None) -> Any:
    """An option whose default is in the recipe."""
    metavar = "NUMBER" if parser else None
    return typer.Option(*names, help=text, parser=parser, metavar=metavar, show_default="the recipe's")


Data = Annotated[
    Path | None,
    typer.Option(
        envvar=ENVIRONMENT_VARIABLE,
        help="Folder of torchvision's CIFAR-10, CIFAR-100, SVHN, MNIST, FashionMNIST, KMNIST or USPS, an ImageFolder "
        "tree with train/ and test/ or val/, or what Hugging Face's datasets saved; where it holds "
        "several, mnist:FOLDER names one.",
        show_default="20 sample images",
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Let torchvision download CIFAR-10, or the KIND of --data KIND:FOLDER.")
]
Resize = Annotated[int | None, typer.Option(help="Pixels of the shorter side of each image.", show_default="as it is")]
Crop = Annotated[int | None, typer.Option(help="Side of the square cut out of the centre.", show_default="none")]
Count = Annotated[int | None, typer.Option("--n", "--images", help="Images, class-balanced.", show_default="all")]
Model = Annotated[
    str,
    typer.Option(
        help="A bundled model (`guardians models`), torchvision:NAME, timm:NAME, hf:ORG/NAME or hf:FOLDER, "
        "robustbench:NAME, or package.module:callable."
    ),
]
Weights = Annotated[Path | None, typer.Option(help=".safetensors or .pt file with the model's state dict.")]
Norm = Annotated[str, typer.Option(help="inf, 2 or 1.")]
Surrogates = Annotated[
    list[str], typer.Option("--surrogate", help="Model whose adversarial images are tried on this one, repeatable.")
]
Device = Annotated[str, typer.Option(help="For example cpu or cuda.")]
BatchSize = Annotated[int, typer.Option(help="Images in one forward pass.")]
Seed = Annotated[int, typer.Option(help="Of the random draws of the attacks.")]
DataSeed = Annotated[int, typer.Option(help="Of the class-balanced subset of images.")]
Out = Annotated[Path, typer.Option(help="Folder for tables; a run that was stopped goes on from what is there.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Adversarial attacks and defences for PyTorch: native, drop-in for ART, cross-checked against the toolkits.

    Example: guardians evaluate --model package.module:make_model --data folder --images 1000
    """
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif is_launched() and context.invoked_subcommand not in _SHARED:
        raise ValueError(f"{context.invoked_subcommand}: torchrun can share {', '.join(_SHARED)}")


def _shared(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose work the processes share that torchrun launched, of which the first prints and writes."""

    @functools.wraps(command)
    def together(**arguments: Any) -> None:
        if is_launched():  # torchrun ends all when one dies; what is finished is then written
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        arguments["device"] = local_device(arguments["device"])
        with ExitStack() as stack:
            if not stack.enter_context(sharing()).is_first:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            command(**arguments)

    return together


@app.command()
def models() -> None:
    """List the bundled models.

    Example: guardians models
    """
    names = bundled_models()
    for name in names:
        card = model_card(name)
        defence = f" as {card['defence']['name']}" if "defence" in card else ""
        typer.echo(f"{name}: {card['accuracy']:.2%}{defence} on {card['test_data']}")
    if not names:
        typer.echo("no models are bundled; name your own as package.module:callable")


@app.command()
@_shared
def evaluate(
    model: Model = "resnet9-16-pgd-at",
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    resize: Resize = None,
    crop: Crop = None,
    n: Count = None,
    norm: Norm = "inf",
    eps: Annotated[
        list[float],
        typer.Option(
            parser=_number,
            metavar="NUMBER",
            help="Radius, repeatable, in the unit of images in 0 to 1.",
            show_default="8/255",
        ),
    ] = [8 / 255],  # noqa: B006
    budget: Annotated[str, typer.Option(help=f"{', '.join(BUDGETS)}.")] = "standard",
    batch_size: Annotated[int | None, typer.Option(help="Images in one forward pass.", show_default="chosen")] = None,
    surrogate: Surrogates = [],  # noqa: B006
    save_images: Annotated[bool, typer.Option("--save-images", help="Write the adversarial images too.")] = False,
    shard: Annotated[
        int | None,
        typer.Option(
            help="Images in memory at once, decoded when they are needed.",
            show_default="all, or 1024 of more than 4 GB",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained page to this file.", metavar="FILE")
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    data_seed: DataSeed = 0,
    out: Out = Path("runs/evaluation"),
) -> None:
    """Say how robust a model is, as strictly as AutoAttack: evaluation.csv.

    Example: guardians evaluate --model package.module:make_model --data folder --n 1000
    """
    p = _checked_norm(norm)
    check_choice("budget", budget, BUDGETS)
    _check_run(1 if batch_size is None else batch_size, device, seed, data_seed)
    classifier = load_model(model, weights, device)
    images = _announced_data(data, n, data_seed, download, resize, crop, read=open_data)
    if shard is None and len(images) * math.prod(images.image_shape) > _IN_MEMORY:
        shard = _SHARD
    images = images if shard else images[:]
    _check_fit(model, classifier, images, device)
    if shard is not None and save_images:
        raise ValueError(f"--save-images: adversarial images of shards, here of {shard}, are not kept")
    surrogates = [load_model(name, device=device) for name in surrogate]
    found = run_evaluation(
        classifier,
        images,
        shard=shard,
        norm=p,
        eps=eps,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        surrogates=surrogates,
        out=out,
        verbose=ranks().is_first,
    )
    if not ranks().is_first:
        return
    assert isinstance(found, list)
    for evaluation in found:
        typer.echo(f"{_name_in_tables(model, weights)}\n{evaluation}")
        folder = out / file_name(model, f"norm-{norm}", f"eps-{evaluation.eps:.4g}", budget)
        evaluation.save(folder)
        evaluation.plot(folder / "evaluation_curve.png")
        if save_images:
            evaluation.save_images(folder / "images")
        typer.echo(f"tables and curve: {folder}")
    if html is not None:
        evaluation_page(
            found,
            html,
            images=None if shard else images.as_floats(),
            model=classifier,
            name=_name_in_tables(model, weights),
            data=images.identity,
            classes=images.classes,
            command=_command(),
        )
        typer.echo(f"page: {html}")


@app.command()
def audit(
    model: Model = "resnet9-16-pgd-at",
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    resize: Resize = None,
    crop: Crop = None,
    n: Annotated[int, typer.Option("--n", "--images", help="Images.")] = 100,
    norm: Norm = "inf",
    eps: Annotated[float, typer.Option(parser=_number, metavar="NUMBER", help="Radius.", show_default="8/255")] = 8
    / 255,
    eot_samples: Annotated[int, typer.Option(help="Draws of a random model for one gradient.")] = 1,
    surrogate: Surrogates = [],  # noqa: B006
    planted: Annotated[
        bool, typer.Option("--planted", help="Audit defences that only hide from gradients, and sound ones: audit.csv.")
    ] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    data_seed: DataSeed = 0,
    out: Out = Path("runs/audit"),
) -> None:
    """Say what would make an evaluation of a model by its gradients untrustworthy: audit.csv.

    Example: guardians audit --model package.module:make_model --data folder --eps 8/255
    """
    p = _checked_norm(norm)
    _check_run(1, device, seed, data_seed)
    images = _announced_data(data, n, data_seed, download, resize, crop)
    if planted:
        with noted(out, "audit.csv", _command()):
            frame = audit_planted(images, out, device=device, seed=seed)
        print_table(frame, ["defence", "model", "right", "planted", "raised", "verdict"], "Audit of planted defences")
        typer.echo(f"table: {out / 'audit.csv'}")
        if frame["verdict"].isin(["missed", "false alarm"]).any():
            raise typer.Exit(1)
        return
    classifier = load_model(model, weights, device)
    _check_fit(model, classifier, images, device)
    found = run_audit(
        classifier,
        images.as_floats().to(device),
        images.labels.to(device),
        norm=p,
        eps=eps,
        eot_samples=eot_samples,
        surrogates=[load_model(name, device=device) for name in surrogate],
        seed=seed,
    )
    typer.echo(str(found))
    write_csv(found.table, out / "audit.csv")
    typer.echo(f"table: {out / 'audit.csv'}")


@app.command()
def parity(
    model: Model = "resnet9-16-standard",
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    resize: Resize = None,
    crop: Crop = None,
    n: Count = None,
    attack: Annotated[list[str], typer.Option(help=f"Only this one, repeatable: {', '.join(pieces())}.")] = [],  # noqa: B006
    reference: Annotated[list[str], typer.Option(help=f"Only this one, repeatable: {', '.join(REFERENCES)}.")] = [],  # noqa: B006
    own_rules: Annotated[
        bool, typer.Option("--own-rules", help="Measure what the documented deviations change: deviations.csv.")
    ] = False,
    fuzz: Annotated[
        int | None,
        typer.Option(
            help="Instead, on this many random small networks and images; --attack, --reference and --seed apply.",
            metavar="PROBLEMS",
        ),
    ] = None,
    batch_size: BatchSize = 100,
    device: Device = "cpu",
    seed: Seed = 0,
    data_seed: DataSeed = 0,
    out: Out = Path("runs"),
) -> None:
    """Compare native attacks and defences with the toolkits' and the papers', case by case: parity.csv.

    Example: guardians parity --attack PGD-40 --reference foolbox --images 100
    """
    from guardians.parity import run_parity

    _check_run(batch_size, device, seed, data_seed)
    if fuzz is not None:
        _fuzz(fuzz, attack, reference, seed, own_rules)
        return
    classifier = load_model(model, weights, device)
    images = _announced_data(data, n, data_seed, download, resize, crop)
    _check_fit(model, classifier, images, device)
    with noted(out, "deviations.csv" if own_rules else "parity.csv", _command()):
        frame = run_parity(
            classifier,
            images,
            model_name=_name_in_tables(model, weights),
            out=out,
            attacks=attack,
            references=reference,
            own_rules=own_rules,
            batch_size=batch_size,
            seed=seed,
        )
    columns = ["case", "max_abs_diff", "pixel_mismatch", "unexplained", "max_abs_diff_float64", "label_agreement"]
    print_table(frame, [*columns, "native_success", "reference_success", "verdict", "note"], "Parity")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in frame["verdict"].value_counts().items())
    typer.echo(f"{len(frame)} cases: {counts or 'the toolkits have none of this kind'}")
    if frame["verdict"].isin(["different", "weaker"]).any():
        raise typer.Exit(1)


def _fuzz(n: int, attacks: list[str], references: list[str], seed: int, own_rules: bool) -> None:
    """Print what the fuzzer finds; exit status 1 where native and a toolkit differ."""
    from guardians.parity.fuzz import fuzz

    check_integer("fuzz", n, low=1)
    if own_rules:
        raise ValueError("--own-rules: --fuzz compares native with the toolkits' rules")
    found = fuzz(n, attacks=attacks, references=references, seed=seed)
    counts = ", ".join(f"{count} against {reference}" for reference, count in sorted(found.counts.items()))
    typer.echo(f"{found.counts.total()} problems: {counts}")
    if found.counterexample is not None:
        typer.echo(f"native differs: {found.difference}\nThe smallest counterexample found, to run again:\n")
        typer.echo(found.counterexample.code)
        raise typer.Exit(1)
    typer.echo("no difference")


@app.command()
def check(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="package.module:Attack, or a defence of the same form, called with a model; an attack that `bench` "
            f"knows, or a defence: {', '.join(DEFENCES)}. All also with (name=value, ...).",
        ),
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="Of attacks known by name: inf, 2 or 1.", show_default="the attack's, else inf")
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(parser=_number, metavar="NUMBER", help="Their radius.", show_default="0.03, 0.3 or 1 by norm"),
    ] = None,
    defence: Annotated[
        bool | None,
        typer.Option("--defence/--attack", help="What the NAME makes.", show_default="a module is a defence"),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="All attacks and defences that are known by name: conformance.csv; fails for native ones."
        ),
    ] = False,
    seconds: Annotated[float, typer.Option(help="With --all, CPU time for an attack of a toolkit.")] = SECONDS,
    out: Out = Path("runs"),
) -> None:
    """Check whether attacks and defences keep to the contract: batches, devices, bounds, seeds, the model left alone.

    Example: guardians check package.module:Attack "torchattacks:PGD(steps=10)"
    """
    if every == bool(names):
        raise ValueError(f"NAME={names or 'none'}: must be one or more names, or --all")
    p = None if norm is None else _checked_norm(norm)
    if every:
        with noted(out, "conformance.csv", _command()):
            frame, interrupted = run_conformance(out, seconds)
        counts = frame.groupby(["implementation", "outcome"]).size().unstack(fill_value=0).reset_index()
        print_table(counts, title=f"Checks: {frame['name'].nunique()} attacks and defences")
        typer.echo(f"table: {out / 'conformance.csv'}")
        if interrupted:
            sys.exit(130)
        failed = "failed" in set(frame.loc[frame["implementation"] == "native", "outcome"])
    else:
        failed = False
        for wanted in [piece(name, p, eps, defence) for name in names or ()]:
            found = pd.DataFrame([asdict(result) for result in wanted.results()])
            print_table(found, title=wanted.name)
            outcomes = found["outcome"].value_counts()
            typer.echo(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
            failed |= "failed" in outcomes
    if failed:
        raise typer.Exit(1)


@app.command()
def attacks() -> None:
    """List the attacks that `bench` knows: native ones, and those of the toolkits that are installed.

    Example: guardians attacks
    """
    for name in usages():
        typer.echo(name)
    for toolkit in filter(is_installed, TOOLKITS):
        for name in TOOLKITS[toolkit].attacks():
            typer.echo(f"{toolkit}:{name}")


@app.command()
@_shared
def bench(
    model: Model = "resnet9-16-standard",
    weights: Weights = None,
    data: Data = None,
    download: Download = False,
    resize: Resize = None,
    crop: Crop = None,
    n: Count = None,
    defence: Annotated[
        str, typer.Option(help=f"Around the model, as in rse(sigma_init=0.8, n=10): {', '.join(DEFENCES)}.")
    ] = "none",
    attack: Annotated[
        list[str],
        typer.Option(help=f"Repeatable: clean, {', '.join(usages())}, or TOOLKIT:NAME, also with (name=value, ...)."),
    ] = list(ATTACKS),  # noqa: B006
    implementation: Annotated[
        list[str], typer.Option(help=f"Only this one, repeatable: {', '.join(IMPLEMENTATIONS)}.")
    ] = [],  # noqa: B006
    norm: Norm = "inf",
    eps: Annotated[
        float,
        typer.Option(
            parser=_number, metavar="NUMBER", help="Radius, in the unit of images in 0 to 1.", show_default="8/255"
        ),
    ] = 8 / 255,
    eps_step: Annotated[
        float | None,
        typer.Option(parser=_number, metavar="NUMBER", help="Step size of PGD.", show_default="eps / 4"),
    ] = None,
    random_start: Annotated[bool, typer.Option("--random-start", help="Start at random in the ball.")] = False,
    early_stop: Annotated[
        bool, typer.Option("--early-stop/--no-early-stop", help="Native: let an image go as soon as it is fooled.")
    ] = True,
    precision: Annotated[
        str, typer.Option(help="Native: what the search computes in: auto, float32, bfloat16, float16.")
    ] = "auto",
    eot_samples: Annotated[
        int, typer.Option(help="Native: draws of a random defence whose mean gradient is followed.")
    ] = 1,
    pool: Annotated[int, typer.Option(help="Training images that Mixup Inference mixes with.")] = 1000,
    batch_size: BatchSize = 128,
    device: Device = "cpu",
    seed: Seed = 0,
    data_seed: DataSeed = 0,
    out: Out = Path("runs"),
) -> None:
    """Run attacks of every implementation on a model or a defence: benchmark.csv.

    Example: guardians bench --attack PGD-40 --attack "torchattacks:APGD(steps=20)" --defence "rse(sigma_init=0.8)"
    """

    if norm not in ("inf", "2", "1"):
        raise ValueError(f"norm={norm!r}: must be inf, 2 or 1")
    _check_run(batch_size, device, seed, data_seed)
    classifier = load_model(model, weights, device)
    images = _announced_data(data, n, data_seed, download, resize, crop)
    _check_fit(model, classifier, images, device)
    mixes = defence.casefold().startswith("mi")
    frame = run_benchmark(
        classifier,
        images,
        defence=defence,
        pool=load_data(data, "train", pool, seed=data_seed, resize=resize, crop=crop) if mixes else None,
        attacks=attack,
        implementations=implementation or IMPLEMENTATIONS,
        model_name=_name_in_tables(model, weights),
        out=out,
        norm=float(norm),
        eps=eps,
        eps_step=eps_step,
        random_start=random_start,
        batch_size=batch_size,
        seed=seed,
        device=device,
        early_stop=early_stop,
        precision=precision,
        eot_samples=eot_samples,
    )
    columns = ["attack", "implementation", "n", "clean_accuracy", "robust_accuracy", "success_rate", "l2_mean"]
    columns += ["linf_max", "forward_per_image", "backward_per_image", "judgement_per_image", "seconds", "flags"]
    print_table(frame, columns, f"Benchmark: {model}, norm {norm}, eps {eps:.4g}")
    if frame.attrs["interrupted"]:
        typer.echo(f"interrupted; the finished rows are in {out}, and the same command goes on from there", err=True)
        sys.exit(130)  # typer.Exit would let `run` say it again


@app.command()
@_shared
def study(
    file: Annotated[Path | None, typer.Argument(help="A YAML file, as those in benchmarks/.")] = None,
    list_studies: Annotated[bool, typer.Option("--list", help="List the studies in a folder.")] = False,
    folder: Annotated[Path, typer.Option(help="Of the studies to list.")] = Path("benchmarks"),
    data: Data = None,
    n: Annotated[int | None, typer.Option("--n", "--images", help="Images.", show_default="the study's")] = None,
    again: Annotated[
        list[str], typer.Option(help="Label of runs that are done anew though they are there, repeatable.")
    ] = [],  # noqa: B006
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the store, tables and figures.")] = Path("runs"),
) -> None:
    """Do what a study says, as far as it is not done yet, and write its tables and figures.

    Example: guardians study benchmarks/carlini_wagner.yaml --data folder --out results
    """
    if list_studies:
        for path, found in find_studies(folder).items():
            typer.echo(f"{path}: {found.title}")
        return
    if file is None:
        raise ValueError("FILE is missing: must be a YAML file, or --list")
    _check_run(1, device, 0)
    chosen = load_study(file)
    images = _announced_data(data, n or chosen.n, 0, False, None, None, chosen.split)
    frame, interrupted = perform_study(chosen, images, out, data=data, n=n, again=again, device=device)
    print_table(frame, title=chosen.title)
    typer.echo(f"tables and figures: {out}")
    if interrupted:
        typer.echo(f"interrupted; what is finished is in {out}, and the same command goes on from there", err=True)
        sys.exit(130)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of results; the page is report.html in it.")] = Path("results"),
) -> None:
    """Write the tables and figures of a folder of results as one self-contained page: report.html.

    Example: guardians report --out results
    """
    curves = (
        out / "curves" if (out / "curves").is_dir() else out
    )  # where `benchmarks/curves.yaml` has a store of its own
    has_store = any((curves / name).exists() for name in ("store.sqlite", "runs.csv"))
    report_page(out, out / "report.html", drawn=draw_figures(Store(curves), out) if has_store else [])
    typer.echo(f"page: {out / 'report.html'}")


@app.command("train")
@_shared
def train_command(
    architecture: Annotated[str, typer.Option(help=f"{', '.join(ARCHITECTURES)}.")] = "resnet9",
    width: Annotated[int | None, typer.Option(help="Base width of resnet9.", show_default="16")] = None,
    depth: Annotated[int | None, typer.Option(help="Depth of wide_resnet.", show_default="28")] = None,
    widen_factor: Annotated[int | None, typer.Option(help="Widen factor of wide_resnet.", show_default="10")] = None,
    weights: Annotated[Path | None, typer.Option(help="Start from these weights.", show_default="fresh ones")] = None,
    data: Data = None,
    download: Download = False,
    resize: Resize = None,
    crop: Crop = None,
    recipe: Annotated[str, typer.Option(help=f"{', '.join(RECIPES)}; the options below change it.")] = "standard",
    epochs: Annotated[int | None, _of_recipe("Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _of_recipe("Images in a training step.")] = None,
    schedule: Annotated[str | None, _of_recipe(f"{' or '.join(SCHEDULES)}; swa with --weights.")] = None,
    peak_lr: Annotated[float | None, _of_recipe("Highest rate of one-cycle, the rate of swa.")] = None,
    warmup: Annotated[float | None, _of_recipe("Fraction of the steps before that peak.")] = None,
    momentum: Annotated[float | None, _of_recipe("Nesterov momentum of SGD.")] = None,
    weight_decay: Annotated[float | None, _of_recipe("Of convolution and linear weights.")] = None,
    label_smoothing: Annotated[float | None, _of_recipe("0 turns it off.")] = None,
    crop_padding: Annotated[int | None, _of_recipe("Pixels of padding before the random crop.")] = None,
    cutout: Annotated[int | None, _of_recipe("Side of the square greyed out; 0 turns it off.")] = None,
    attack_steps: Annotated[int | None, _of_recipe("PGD steps on each image; 0 for none.")] = None,
    eps: Annotated[float | None, _of_recipe("Radius of their inf-norm ball.", parser=_number)] = None,
    eps_step: Annotated[float | None, _of_recipe("Their size.", parser=_number)] = None,
    random_start: Annotated[bool | None, _of_recipe("Where they start.", "--random-start/--from-image")] = None,
    ratio: Annotated[float | None, _of_recipe("Share of the images that is attacked.")] = None,
    holdout: Annotated[int | None, _of_recipe("Images kept to watch robustness; 0 for none.")] = None,
    mixup_alpha: Annotated[float | None, _of_recipe("Of the beta distribution of mixup; 0 turns it off.")] = None,
    sigma_init: Annotated[float | None, _of_recipe("Noise before the first convolution.")] = None,
    sigma_inner: Annotated[float | None, _of_recipe("Noise before the others.")] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            help="Parts of a batch, whose gradients add up: one after the other, or in several processes.",
            show_default="as many as processes",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a process that hangs is given up.")] = TIMEOUT,
    seed: Annotated[int, typer.Option(help="Of weights, data order and all draws.")] = Recipe.seed,
    device: Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for weights, card, log and checkpoint.")] = Path("runs"),
) -> None:
    """Train a classifier; run again with the same arguments to resume. Writes weights, a JSON card and a CSV log.

    Example: torchrun --nproc-per-node 2 -m guardians train --recipe pgd-at --data folder
    """
    check_choice("recipe", recipe, RECIPES)
    changes = {
        "epochs": epochs,
        "batch_size": batch_size,
        "schedule": schedule,
        "peak_lr": peak_lr,
        "warmup": warmup,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "crop_padding": crop_padding,
        "cutout": cutout,
        "attack_steps": attack_steps,
        "eps": eps,
        "eps_step": eps_step,
        "random_start": random_start,
        "ratio": ratio,
        "holdout": holdout,
        "mixup_alpha": mixup_alpha,
        "sigma_init": sigma_init,
        "sigma_inner": sigma_inner,
    }
    given = {key: value for key, value in changes.items() if value is not None}
    settings = Recipe(**{**RECIPES[recipe], **given, "seed": seed})
    _check_run(settings.batch_size, device, seed)
    defaults = {"resnet9": {"width": 16}, "wide_resnet": {"depth": 28, "widen_factor": 10}}
    options = {"width": width, "depth": depth, "widen_factor": widen_factor}
    # An option of another architecture is passed on as well, for build_model to refuse it.
    shape = defaults.get(architecture, {}) | {key: value for key, value in options.items() if value is not None}
    name = "-".join([architecture, *map(str, shape.values()), recipe])
    train_data, test_data = (
        _announced_data(data, None, seed, download, resize, crop, split) for split in ("train", "test")
    )
    torch.manual_seed(seed)
    model = build_model(architecture, **shape, num_classes=len(train_data.classes))
    if weights is not None:
        load_weights(model, weights)
    _check_fit(architecture, model.eval(), train_data, "cpu")
    with process_group(torch.device(device), timeout) as group, group.naming_the_missing():
        if not group.is_first:
            logging.getLogger("guardians").setLevel(logging.ERROR)
        accuracy = train(
            model,
            train_data,
            test_data,
            settings,
            out / name,
            device=device,
            micro_batches=micro_batches,
            timeout=timeout,
        )
        robust = math.nan
        if settings.is_adversarial:
            robust = robust_accuracy(model, test_data, 40, eps=settings.eps, group=group)
    if not group.is_first:
        return
    card = {
        "name": name,
        "architecture": {"name": architecture, **shape, "num_classes": len(train_data.classes)},
        "recipe": {"name": recipe, "initial_weights": weights and str(weights), **asdict(settings)},
        "train_data": f"{len(train_data)} images of {train_data.source}",
        "test_data": f"{len(test_data)} images of {test_data.source}",
        "accuracy": accuracy,
    }
    if settings.is_noisy:
        noise = {"sigma_init": settings.sigma_init, "sigma_inner": settings.sigma_inner, "n": ENSEMBLE}
        card["defence"] = {"name": "RandomSelfEnsemble", **noise}  # without which the accuracy is another one
    if settings.is_adversarial:
        card["robust_accuracy"] = robust
    card["command"] = _command()
    typer.echo(f"accuracy {accuracy:.2%}; wrote {save_model(model, card, out)}")


def _announced_data(
    data: Path | None,
    n: int | None,
    seed: int,
    download: bool,
    resize: int | None,
    crop: int | None,
    split: str = "test",
    read: Callable[..., Any] = load_data,
) -> Any:
    if download:  # one process at a time, and then it is there
        agreed(lambda: bool(open_data(data, split, download=True)))
    images = read(data, split, n, seed=seed, download=download, resize=resize, crop=crop)
    typer.echo(f"data: {len(images)} images, {images.source}" + (f", in {data}" if data else ""))
    if data is None and split == "test":
        note = f"note: without --data or {ENVIRONMENT_VARIABLE}, a sample stands in that is too small for conclusions"
        typer.secho(note, fg="yellow")
    return images


def _checked_norm(norm: str) -> float:
    check_choice("norm", norm, ("inf", "2", "1"))
    return float(norm)


def _check_run(batch_size: int, device: str, seed: int, data_seed: int = 0) -> None:
    """Raise before anything is read."""
    check_integer("batch_size", batch_size, low=1)
    for name, value in (("seed", seed), ("data_seed", data_seed)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name}={value}: must be at least 0 and below 2**63")
    try:
        torch.ones(1, device=device).add(1).item()  # meta has tensors, but no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"device={device!r}: must be a device of this machine that can compute, as cpu; {_first_line(error)}"
        ) from error


def _check_fit(name: str, model: nn.Module, images: Dataset | LazyDataset, device: str) -> None:
    """Raise unless the model, asked by one process, gives logits for such images, with a class for each label."""
    shape = images.image_shape
    try:
        with torch.no_grad():
            logits = Victim(model).logits(images[:1].as_floats().to(device))
    except Exception as error:  # the model is the user's, and may fail in any way
        raise ValueError(f"model={name!r}: fails on an image of shape {shape}: {_first_line(error)}") from error
    if logits.shape[1] < len(images.classes):
        raise ValueError(f"model={name!r}: has {logits.shape[1]} classes, the data {len(images.classes)}")


def _name_in_tables(model: str, weights: Path | None) -> str:
    """Other weights are another model: a run does not go on from their rows."""
    return model if weights is None else f"{model} ({weights})"


def _command() -> str:
    """What was typed."""
    launched = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m"] if is_launched() else []
    return shlex.join([*launched, "guardians", *sys.argv[1:]])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def run() -> None:
    """Entry point: user errors as one line, without a traceback."""
    code: Any
    try:
        code = app(prog_name="guardians", standalone_mode=False)
    except typer.Abort:  # what older versions of typer make of Ctrl-C; newer ones return 130
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a wrong option; typer has no public name for the base class
            message = error.format_message()
        elif isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            message = str(error)
        else:
            raise
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(" ".join(message.split()), err=True)
        code = 2
    if code == 130:
        typer.echo("stopped; the same command goes on from here", err=True)
    sys.exit(code)
