"""The `guardians` command, in process: what it prints, what it writes, and how it fails."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import small_net
from PIL import Image
from safetensors.torch import save_file

import guardians
from guardians.attacks import PGD
from guardians.cli import run
from guardians.data import load_data
from guardians.models import build_model, load_model, save_model
from guardians.tables import BENCHMARK_COLUMNS, PARITY_COLUMNS, read_csv
from guardians.training import LOG_COLUMNS, RECIPES, Recipe

SMALL = ("--model", "models_for_tests:small_net")
TINY = ("--width", "2", "--epochs", "1", "--batch-size", "8", "--crop-padding", "1")


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def lines(self):
        return self.out.splitlines()

    @property
    def error(self):
        """The one line of an error."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line]
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("GUARDIANS_DATA", raising=False)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "40")  # what is piped is not to be wrapped, whatever the terminal


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["guardians", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            run()
        return Result(exit_.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def tree(tmp_path):
    """An ImageFolder tree: 3 classes of 4 images for training and 2 for testing, 8 x 8."""
    return image_folder(tmp_path / "tree")


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A folder of bundled weights with one model in it, of 10 classes."""
    folder = tmp_path / "weights"
    monkeypatch.setattr("guardians.models.registry._WEIGHTS", folder)
    torch.manual_seed(0)
    model = build_model("resnet9", width=2)
    card = {
        "name": "resnet9-2-standard",
        "architecture": {"name": "resnet9", "width": 2},
        "accuracy": 0.875,
        "test_data": "10 images",
    }
    save_model(model, card, folder)
    return folder


def image_folder(folder, seed=0):
    rng = np.random.default_rng(seed)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee", "cow"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


# Checks


def test_check_says_of_each_check_whether_it_passed(command):
    result = command("check", "fgsm", "--norm", "2", "--eps", "1/2")
    assert result.code == 0
    assert "norm_ball" in result.out
    assert re.search(r"\d+ passed", result.lines[-1])
    assert "failed" not in result.lines[-1]


def test_check_fails_with_an_attack_or_a_defence_of_ones_own(command):
    Path("my_own_pieces.py").write_text(
        "import torch\n"
        "def attack(model, eps=0.1):\n"
        "    return lambda x, y: x + eps\n"
        "class Defence(torch.nn.Module):\n"
        "    def __init__(self, model):\n"
        "        super().__init__()\n"
        "        self.model = model\n"
        "    def forward(self, x):\n"
        "        return self.model(x - x.mean(0))\n"
    )
    result = command("check", "my_own_pieces:attack(eps=0.2)", "my_own_pieces:Defence")
    assert result.code == 1
    assert re.search(r"images_are_finite_and_in_range +failed +returns pixels from .* to 1\.2", result.out)
    assert re.search(r"images_are_answered_alone +failed +answers about an image depend on the others", result.out)


def test_check_names_a_wrong_argument(command):
    assert command("check").error == "NAME=none: must be one or more names, or --all"
    assert command("check", "PGD-5", "--norm", "3").error.startswith("norm='3': ")
    assert command("check", "no.such:thing").error.startswith("name='no.such:thing': 'thing' cannot be imported")


# Evaluation


def test_evaluate_says_how_robust_a_model_is_and_goes_on_from_what_is_there(command, tree, tmp_path):
    arguments = (
        "evaluate",
        *SMALL,
        "--data",
        tree,
        "--eps",
        "2/255",
        "--eps",
        "0.1",
        "--surrogate",
        "models_for_tests:small_net",
        "--save-images",
        "--out",
        tmp_path,
    )
    first = command(*arguments)
    assert first.code == 0
    folders = sorted(path for path in tmp_path.iterdir() if (path / "evaluation.csv").exists())
    assert len(folders) == 2
    tables = [read_csv(folder / "evaluation.csv") for folder in folders]
    assert [table["eps"].item() for table in tables] == pytest.approx([2 / 255, 0.1])
    assert tables[0]["robust_accuracy"].item() >= tables[1]["robust_accuracy"].item()
    for table, folder in zip(tables, folders, strict=True):
        assert f"robust accuracy {table['robust_accuracy'].item():.1%}" in first.out
        assert "transfer-1" in read_csv(folder / "evaluation_stages.csv")["stage"].tolist()
        assert (folder / "evaluation_curve.png").exists()
        assert np.load(folder / "images" / "x_adv.npy").shape == (6, 3, 8, 8)
    again = command(*arguments)
    stages = [line for line in first.lines if "felled" not in line and "gradients an image" not in line]
    assert all(line in again.lines for line in stages)


def test_evaluate_writes_a_page_of_all_radii(command, tree, tmp_path):
    page = tmp_path / "pages" / "page.html"
    radii = ("--eps", "2/255", "--eps", "0.1")
    result = command("evaluate", *SMALL, "--data", tree, *radii, "--budget", "fast", "--out", tmp_path, "--html", page)
    assert f"page: {page}" in result.lines
    text = page.read_text()
    assert "Robustness of models_for_tests:small_net" in text
    for eps in ("2/255", "0.1"):
        assert f"Result, eps {eps}" in text
    for name in load_data(tree).classes:
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--norm", "3"), "norm='3': must be one of inf, 2, 1"),
        (("--budget", "endless"), "budget='endless': must be one of fast, standard, thorough"),
        (("--eps", "0"), "eps=0.0: must be above 0"),
        (("--surrogate", "resnet9-99"), "resnet9-99"),
    ],
)
def test_evaluate_refuses_what_is_not_allowed(command, tree, arguments, message):
    assert message in command("evaluate", *SMALL, "--data", tree, *arguments).error


# Listing


def test_version(command):
    assert command("--version") == Result(0, f"{guardians.__version__}\n", "")


def test_module_is_runnable():
    done = subprocess.run([sys.executable, "-m", "guardians", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{guardians.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_commands(command, arguments):
    result = command(*arguments)
    assert result.code == 0
    for name in ("evaluate", "train", "parity", "bench", "report", "models", "--version"):
        assert name in result.out


def test_report_writes_a_page_of_what_lies_in_a_folder(command, tmp_path):
    assert "has none of the tables that a report shows" in command("report", "--out", tmp_path).error
    shutil.copy(Path(__file__).parents[1] / "results" / "parity.csv", tmp_path)
    assert f"page: {tmp_path / 'report.html'}" in command("report", "--out", tmp_path).lines
    assert f"{len(read_csv(tmp_path / 'parity.csv'))} cases" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["evaluate", "train", "parity", "bench", "models"])
def test_help_of_a_command(command, name):
    result = command(name, "--help")
    assert result.code == 0
    assert f"guardians {name}" in result.out


def test_models_with_their_accuracy(command, bundled):
    assert command("models").lines == ["resnet9-2-standard: 87.50% on 10 images"]


def test_models_says_when_there_are_none(command, tmp_path, monkeypatch):
    monkeypatch.setattr("guardians.models.registry._WEIGHTS", tmp_path / "nothing")
    assert "package.module:callable" in command("models").out


# Data


def test_the_sample_is_announced(command):
    result = command("bench", *SMALL, "--attack", "clean")  # the model is for smaller images: the run ends there
    assert result.lines[0] == "data: 20 images, offline sample: 20 CIFAR-10 test images from the foolbox package"
    assert result.lines[1].startswith("note: without --data or GUARDIANS_DATA, a sample stands in")


def test_data_from_the_environment_and_the_option_that_beats_it(command, tree, tmp_path, monkeypatch):
    other = image_folder(tmp_path / "other", seed=1)
    monkeypatch.setenv("GUARDIANS_DATA", str(other))
    arguments = ("bench", *SMALL, "--attack", "clean", "--implementation", "native")
    assert command(*arguments).lines[0] == f"data: 6 images, other (test), in {other}"
    result = command(*arguments, "--data", tree)
    assert result.lines[0] == f"data: 6 images, tree (test), in {tree}"
    assert "note:" not in result.out


@pytest.mark.parametrize("option", ["--n", "--images"])
def test_n_images(command, tree, option):
    result = command("bench", *SMALL, "--attack", "clean", "--implementation", "native", "--data", tree, option, 3)
    assert result.lines[0].startswith("data: 3 images, ")
    assert read_csv("runs/benchmark.csv")["n"].tolist() == [3]


@pytest.mark.parametrize(
    ("chosen", "table"),
    [
        (("bench", "--attack", "clean", "--implementation", "native"), "benchmark.csv"),
        (("parity", "--attack", "FGSM", "--reference", "foolbox"), "parity.csv"),
    ],
)
def test_data_seed_chooses_the_images_and_seed_does_not(command, tree, chosen, table):
    arguments = (*chosen, *SMALL, "--data", tree, "--images", 3)
    for out, options in (
        ("first", ()),
        ("draws", ("--seed", 1)),
        ("images", ("--data-seed", 1)),
        ("both", ("--data-seed", 1, "--seed", 2)),
    ):
        assert command(*arguments, "--out", out, *options).code == 0
    frames = {out: read_csv(f"{out}/{table}") for out in ("first", "draws", "images", "both")}
    data = {out: frame["data"].unique().tolist() for out, frame in frames.items()}
    assert data["first"] == data["draws"] == [load_data(tree, n=3, seed=0).identity]
    assert data["images"] == data["both"] == [load_data(tree, n=3, seed=1).identity]
    assert data["first"] != data["images"]
    seeds = [frame["seed"].unique().tolist() for frame in frames.values()]
    assert seeds == [[0], [1], [0], [2]]


def test_greyscale_images_reach_the_model_with_one_channel(command, tree):
    for file in tree.rglob("*.png"):
        with Image.open(file) as image:
            image.convert("L").save(file)
    chosen = ("bench", "--data", tree, "--attack", "clean", "--attack", "FGSM", "--implementation", "native")
    assert "(1, 8, 8)" in command(*chosen, *SMALL).error
    Path("a_grey_net.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n"
    )
    assert command(*chosen, "--model", "a_grey_net:build").code == 0
    assert read_csv("runs/benchmark.csv")["attack"].tolist() == ["clean", "FGSM"]
    assert command("train", "--data", tree, *TINY).code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", *SMALL, "--budget", "fast"),
        ("bench", "--model", "a_net:build", "--attack", "clean", "--defence", "mi-ol(num_samples=1)", "--pool", 3),
        ("parity", *SMALL, "--attack", "FGSM", "--reference", "foolbox"),
        ("train", *TINY),
    ],
    ids=lambda arguments: arguments[0],
)
def test_images_of_several_shapes_are_brought_to_one(command, tree, arguments):
    Path("a_net.py").write_text(  # Mixup Inference needs training images of every class
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))\n"
    )
    for i, file in enumerate(sorted(tree.rglob("*.png"))):
        Image.fromarray(np.random.default_rng(i).integers(256, size=(12, 10 + i, 3), dtype=np.uint8)).save(file)
    assert "all must agree: resize and crop (--resize, --crop)" in command(*arguments, "--data", tree).error
    result = command(*arguments, "--data", tree, "--resize", 9, "--crop", 8)
    assert result.code == 0
    assert f"data: 6 images, tree (test), resize=9, crop=8, in {tree}" in result.lines


@pytest.mark.parametrize("name", ["parity", "bench"])
def test_greyscale_beside_colours(command, tree, name):
    Image.new("L", (8, 8)).save(tree / "test" / "bee" / "1.png")
    error = command(name, *SMALL, "--data", tree).error
    assert f"{tree / 'test' / 'bee' / '1.png'}: greyscale" in error


# parity


def test_parity(command, tree, tmp_path):
    result = command("parity", *SMALL, "--data", tree, "--attack", "FGSM", "--out", tmp_path / "out")
    frame = read_csv(tmp_path / "out" / "parity.csv")
    assert result.code == 0
    assert list(frame.columns) == list(PARITY_COLUMNS)
    assert (frame["verdict"] == "exact").all()
    for case in frame["case"]:
        (line,) = [line for line in result.lines if case in line]
        assert "exact" in line
    assert result.lines[-1] == f"{len(frame)} cases: {len(frame)} exact"
    (noted,) = read_csv(tmp_path / "out" / "commands.csv").itertuples()
    assert noted.file == "parity.csv"
    assert noted.command.startswith("guardians parity --model models_for_tests:small_net --data ")
    assert json.loads(noted.versions)["torch"] == torch.__version__


def test_parity_on_a_bundled_model_and_the_sample(command, bundled):
    result = command("parity", "--model", "resnet9-2-standard", "--n", 2, "--attack", "FGSM", "--reference", "foolbox")
    assert result.code == 0
    assert result.lines[-1] == "6 cases: 6 exact"


def test_parity_of_several_attacks_and_references(command, tree):
    arguments = ("--attack", "PGD-10", "--attack", "FGSM", "--reference", "torchattacks", "--reference", "foolbox")
    result = command("parity", *SMALL, "--data", tree, "--n", 2, *arguments)
    frame = read_csv("runs/parity.csv")
    assert result.code == 0
    assert set(frame["attack"]) == {"PGD-10", "FGSM"}
    assert set(frame["reference"]) == {"torchattacks", "foolbox"}


def test_parity_of_names_in_any_case(command, tree):
    chosen = ("--attack", "fgsm", "--attack", "Fgsm", "--attack", "c&w", "--reference", "Torchattacks")
    assert command("parity", *SMALL, "--data", tree, *chosen).code == 0
    frame = read_csv("runs/parity.csv")
    assert set(frame["attack"]) == {"FGSM", "C&W"}
    assert set(frame["reference"]) == {"torchattacks"}
    assert frame["case"].is_unique


def test_parity_goes_on_from_the_table(command, tree, monkeypatch):
    arguments = ("parity", *SMALL, "--data", tree, "--n", 2, "--attack", "FGSM", "--reference", "foolbox")
    first = command(*arguments)

    def never(*_, **__):
        raise AssertionError("compared again")

    monkeypatch.setattr("guardians.parity.harness.compare", never)
    assert command(*arguments).out == first.out


def test_parity_with_native_rules(command, tree):
    result = command(
        "parity", *SMALL, "--data", tree, "--n", 2, "--attack", "FGSM", "--reference", "ART", "--own-rules"
    )
    frame = read_csv("runs/deviations.csv")
    assert result.code == 0
    assert result.lines[-1] == f"{len(frame)} cases: {len(frame)} own rule"


def test_parity_without_cases(command, tree):
    chosen = ("--attack", "FGSM", "--reference", "torchattacks", "--own-rules")
    result = command("parity", *SMALL, "--data", tree, *chosen)
    assert result.code == 0
    assert result.lines[-1].startswith("0 cases: ")


def test_parity_fails_when_a_case_is_different(command, tree, monkeypatch):
    row = dict.fromkeys(PARITY_COLUMNS, 0.5)
    rows = [row | {"case": f"case {verdict}", "verdict": verdict} for verdict in ("exact", "different", "exact")]
    monkeypatch.setattr("guardians.parity.run_parity", lambda *_, **__: pd.DataFrame(rows))
    result = command("parity", *SMALL, "--data", tree)
    assert result.code == 1
    assert result.lines[-1] == "3 cases: 2 exact, 1 different"


# bench


def test_bench(command, tree, tmp_path):
    attacks = ("--attack", "PGD-3", "--attack", "FGSM", "--attack", "clean")
    result = command("bench", *SMALL, "--data", tree, *attacks, "--out", tmp_path / "out")
    frame = read_csv(tmp_path / "out" / "benchmark.csv")
    assert result.code == 0
    assert list(frame.columns) == list(BENCHMARK_COLUMNS)
    assert frame["attack"].tolist() == [attack for attack in ("clean", "FGSM", "PGD-3") for _ in range(4)] + ["union"]
    printed = [tuple(line.split()[:2]) for line in result.lines]
    for pair in zip(frame["attack"], frame["implementation"], strict=True):
        assert printed.count(pair) == 1


def test_bench_of_names_in_any_case(command, tree):
    attacks = ("--attack", "Clean", "--attack", "fgsm", "--attack", "pgd-3", "--attack", "PGD-3")
    implementations = ("--implementation", "Native", "--implementation", "art", "--implementation", "NATIVE")
    arguments = ("bench", *SMALL, "--data", tree, *attacks, *implementations)
    first = command(*arguments)
    assert first.code == 0
    frame = read_csv("runs/benchmark.csv")
    pairs = list(frame[["attack", "implementation"]].itertuples(index=False, name=None))
    runs = [(attack, name) for attack in ("clean", "FGSM", "PGD-3") for name in ("native", "ART")]
    assert pairs == [*runs, ("union", "all")]
    assert command(*arguments).out == first.out
    assert len(read_csv("runs/benchmark.csv")) == 7


def test_bench_of_a_model_whose_name_is_a_path(command, tree, tmp_path):
    weights = tmp_path / ("deep" * 50) / ("path" * 50) / "w.pt"
    weights.parent.mkdir(parents=True)
    torch.save(small_net().state_dict(), weights)
    result = command("bench", *SMALL, "--data", tree, "--attack", "clean", "--weights", weights)
    assert result.code == 0
    assert read_csv("runs/benchmark.csv")["model"].unique().tolist() == [f"{SMALL[1]} ({weights})"]


def test_bench_goes_on_from_the_table(command, tree, monkeypatch):
    arguments = ("bench", *SMALL, "--data", tree, "--implementation", "native", "--implementation", "ART")
    command(*arguments, "--attack", "FGSM")
    before = read_csv("runs/benchmark.csv")
    command(*arguments, "--attack", "FGSM", "--attack", "PGD-2")
    after = read_csv("runs/benchmark.csv")
    pd.testing.assert_frame_equal(after.head(2), before.head(2))
    assert after["attack"].tolist() == ["FGSM", "FGSM", "PGD-2", "PGD-2", "union"]


def test_bench_of_one_attack_in_the_l2_ball(command, tree):
    threat = ("--norm", 2, "--eps", 0.5, "--eps-step", 0.1, "--random-start", "--seed", 3, "--batch-size", 4)
    result = command("bench", *SMALL, "--data", tree, "--attack", "PGD-3", "--implementation", "native", *threat)
    (row,) = read_csv("runs/benchmark.csv").to_dict("records")
    assert result.code == 0
    assert (row["attack"], row["implementation"]) == ("PGD-3", "native")
    assert (row["norm"], row["eps"], row["seed"]) == (2, 0.5, 3)
    assert json.loads(row["params"]) == {
        "batch_size": 4,
        "early_stop": True,
        "eps_step": 0.1,
        "random_start": True,
    }
    assert row["l2_mean"] <= 0.5


@pytest.mark.parametrize(
    ("options", "early_stop", "precision"),
    [
        ((), True, "auto"),
        (("--early-stop",), True, "auto"),
        (("--no-early-stop", "--precision", "float32"), False, "float32"),
    ],
)
def test_bench_of_native_settings(command, tree, options, early_stop, precision):
    command("bench", *SMALL, "--data", tree, "--attack", "PGD-3", "--implementation", "native", *options)
    (row,) = read_csv("runs/benchmark.csv").to_dict("records")
    assert (json.loads(row["params"])["early_stop"], row["precision"]) == (early_stop, precision)
    assert (row["judgement_per_image"] > 0) == early_stop


@pytest.mark.parametrize(("options", "eps"), [((), 8 / 255), (("--eps", "4/255"), 4 / 255), (("--eps", "0"), 0.0)])
def test_bench_takes_a_radius_as_a_fraction(command, tree, options, eps):
    command("bench", *SMALL, "--data", tree, "--attack", "FGSM", "--implementation", "native", *options)
    assert read_csv("runs/benchmark.csv")["eps"].tolist() == [eps]


def test_bench_with_other_weights_is_another_model(command, tree, tmp_path):
    torch.save(small_net(seed=1).state_dict(), tmp_path / "other.pt")
    arguments = ("bench", *SMALL, "--data", tree, "--attack", "FGSM", "--implementation", "native")
    command(*arguments)
    result = command(*arguments, "--weights", tmp_path / "other.pt")
    first, second = read_csv("runs/benchmark.csv").to_dict("records")
    assert result.code == 0
    assert second["model"] == f"models_for_tests:small_net ({tmp_path / 'other.pt'})"
    assert first["l2_mean"] != second["l2_mean"] or first["robust_accuracy"] != second["robust_accuracy"]


# train


def test_train(command, tree, tmp_path, monkeypatch):
    out = tmp_path / "a b"
    arguments = ("train", "--data", tree, "--architecture", "resnet9", *TINY, "--seed", 1, "--out", out)
    result = command(*arguments)
    assert result.code == 0
    assert f"data: 12 images, tree (train), in {tree}" in result.lines
    assert f"data: 6 images, tree (test), in {tree}" in result.lines

    card = json.loads((out / "resnet9-2-standard.json").read_text())
    assert card["architecture"] == {"name": "resnet9", "width": 2, "num_classes": 3}
    assert card["recipe"]["name"] == "standard"
    assert (card["recipe"]["epochs"], card["recipe"]["batch_size"], card["recipe"]["seed"]) == (1, 8, 1)
    assert card["train_data"] == "12 images of tree (train)"
    assert card["test_data"] == "6 images of tree (test)"
    assert shlex.split(card["command"]) == ["guardians", *map(str, arguments)]
    weights = out / "resnet9-2-standard.safetensors"
    assert result.lines[-1] == f"accuracy {card['accuracy']:.2%}; wrote {weights}"

    log = pd.read_csv(out / "resnet9-2-standard" / "log.csv")
    assert list(log.columns) == list(LOG_COLUMNS)
    assert log["test_accuracy"].tolist() == pytest.approx([card["accuracy"]])

    monkeypatch.setattr("guardians.models.registry._WEIGHTS", out)
    model = load_model("resnet9-2-standard")
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    assert command("models").lines == [f"resnet9-2-standard: {card['accuracy']:.2%} on {card['test_data']}"]
    arguments = ("--model", "resnet9-2-standard", "--attack", "clean", "--implementation", "native")
    assert command("bench", *arguments, "--data", tree).code == 0
    assert read_csv("runs/benchmark.csv")["clean_accuracy"].tolist() == pytest.approx([card["accuracy"]])


def test_train_again_does_not_train_again(command, tree, monkeypatch):
    arguments = ("train", "--data", tree, *TINY)
    first = command(*arguments)
    files = (Path("runs/resnet9-2-standard/log.csv"), Path("runs/resnet9-2-standard.safetensors"))
    before = [file.read_bytes() for file in files]

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr("guardians.training.cross_entropy", never)
    assert command(*arguments).lines[-1] == first.lines[-1]
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    ("options", "name", "architecture"),
    [
        (("resnet18",), "resnet18-standard", {"name": "resnet18"}),
        (
            ("wide_resnet", "--depth", "10", "--widen-factor", "1"),
            "wide_resnet-10-1-standard",
            {"name": "wide_resnet", "depth": 10, "widen_factor": 1},
        ),
    ],
)
def test_train_another_architecture(command, tree, monkeypatch, options, name, architecture):
    result = command("train", "--data", tree, "--architecture", *options, *TINY[2:])
    assert result.code == 0
    card = json.loads(Path(f"runs/{name}.json").read_text())
    assert card["architecture"] == architecture | {"num_classes": 3}
    monkeypatch.setattr("guardians.models.registry._WEIGHTS", Path("runs"))
    assert load_model(name)(torch.rand(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_train_a_recipe(command, tree, monkeypatch, recipe):
    """Its name is that of the files; options change it."""
    result = command("train", "--data", tree, "--recipe", recipe, *TINY, "--holdout", 3, "--seed", 5)
    name = f"resnet9-2-{recipe}"
    assert result.lines[-1].endswith(f"; wrote runs/{name}.safetensors"), result
    card = json.loads(Path(f"runs/{name}.json").read_text())
    changes = {"epochs": 1, "batch_size": 8, "crop_padding": 1, "holdout": 3, "seed": 5}
    settings = Recipe(**{**RECIPES[recipe], **changes})
    assert card["name"] == name
    assert card["recipe"] == {"name": recipe, "initial_weights": None, **asdict(settings)}
    assert ("robust_accuracy" in card) == (recipe in ("fgsm-at", "pgd-at", "iat"))
    log = pd.read_csv(f"runs/{name}/log.csv")
    assert log["epoch"].tolist() == [1]
    assert log["robust_accuracy"].notna().tolist() == [recipe in ("fgsm-at", "pgd-at", "iat")]
    monkeypatch.setattr("guardians.models.registry._WEIGHTS", Path("runs"))
    assert load_model(name)(torch.rand(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        (("--epochs", "3"), "epochs", 3),
        (("--batch-size", "4"), "batch_size", 4),
        (("--schedule", "swa"), "schedule", "swa"),
        (("--peak-lr", "0.3"), "peak_lr", 0.3),
        (("--warmup", "0"), "warmup", 0),
        (("--momentum", "0.5"), "momentum", 0.5),
        (("--weight-decay", "0"), "weight_decay", 0),
        (("--label-smoothing", "0.25"), "label_smoothing", 0.25),
        (("--crop-padding", "0"), "crop_padding", 0),
        (("--cutout", "3"), "cutout", 3),
        (("--attack-steps", "0"), "attack_steps", 0),
        (("--eps", "4/255"), "eps", 4 / 255),
        (("--eps-step", "2/255"), "eps_step", 2 / 255),
        (("--from-image",), "random_start", False),
        (("--random-start",), "random_start", True),
        (("--ratio", "0"), "ratio", 0),
        (("--holdout", "0"), "holdout", 0),
        (("--mixup-alpha", "0"), "mixup_alpha", 0),
        (("--sigma-init", "0.5"), "sigma_init", 0.5),
        (("--sigma-inner", "0.25"), "sigma_inner", 0.25),
        (("--seed", "9"), "seed", 9),
    ],
)
def test_train_option_changes_the_recipe(command, tree, monkeypatch, option, name, value):
    """That alone."""
    given = []
    monkeypatch.setattr(
        "guardians.cli.train", lambda model, train_data, test_data, recipe, *_, **__: given.append(recipe) or 0.5
    )
    monkeypatch.setattr("guardians.cli.robust_accuracy", lambda *_, **__: 0.25)
    assert command("train", "--data", tree, "--width", 2, "--recipe", "iat", *option).code == 0
    assert given == [Recipe(**{**RECIPES["iat"], name: value})]


def test_train_recipes_side_by_side(command, tree):
    for recipe in ("standard", "mixup"):
        assert command("train", "--data", tree, "--recipe", recipe, *TINY).code == 0
    assert sorted(file.name for file in Path("runs").iterdir()) == [
        f"resnet9-2-{recipe}{suffix}" for recipe in ("mixup", "standard") for suffix in ("", ".json", ".safetensors")
    ]


def test_train_says_that_robustness_collapsed(command, tree, monkeypatch, caplog):
    """And writes the model of the best epoch."""
    standings = iter([0.5, 0.6, 0.1])
    monkeypatch.setattr("guardians.training.robust_accuracy", lambda *_, **__: next(standings))
    monkeypatch.setattr("guardians.cli.robust_accuracy", lambda *_, **__: 0.25)
    arguments = ("train", "--data", tree, "--recipe", "fgsm-at", *TINY, "--epochs", 6, "--holdout", 3)
    result = command(*arguments)
    card = json.loads(Path("runs/resnet9-2-fgsm-at.json").read_text())
    log = pd.read_csv("runs/resnet9-2-fgsm-at/log.csv")
    assert result.code == 0
    assert log["robust_accuracy"].tolist() == [0.5, 0.6, 0.1]
    assert card["accuracy"] == pytest.approx(log["test_accuracy"][1])
    assert card["robust_accuracy"] == 0.25
    assert "catastrophic overfitting" in caplog.text
    assert command(*arguments).lines[-1] == result.lines[-1]  # with no fourth epoch


def test_train_another_recipe_in_the_same_folder(command, tree):
    command("train", "--data", tree, *TINY)
    error = command("train", "--data", tree, *TINY, "--peak-lr", "0.1").error
    assert "peak_lr" in error
    assert "delete it to start over" in error


# Errors


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--n", "0"), ["n=0", "at least 1"]),
        (("--n", "many"), ["--n", "integer"]),
        (("--n", "7"), ["n=7", "6 images"]),
        (("--resize", "0"), ["resize=0", "at least 1"]),
        (("--crop", "9"), ["8 x 8 pixels", "crop=9"]),
        (("--batch-size", "0"), ["batch_size=0", "at least 1"]),
        (("--seed", "-1"), ["seed=-1", "at least 0"]),
        (("--seed", str(2**63)), [f"seed={2**63}", "2**63"]),
        (("--data-seed", "-1"), ["data_seed=-1", "at least 0"]),
        (("--device", "nonsense"), ["device='nonsense'", "cpu"]),
        (("--device", "meta"), ["device='meta'", "can compute", "cpu"]),
        (("--device", "hpu"), ["device='hpu'", "cpu"]),
        (("--device", "cuda:99"), ["device='cuda:99'", "cpu"]),
        (("--model", "resnet99"), ["model='resnet99'", "resnet9-2-standard", "package.module:callable"]),
        (("--model", "models_for_tests:missing"), ["model='models_for_tests:missing'", "'missing'"]),
        (("--model", "no_module:missing"), ["model='no_module:missing'", "no_module"]),
        (("--model", "models_for_tests:some_images"), ["model='models_for_tests:some_images'", "without arguments"]),
        (("--model", "models_for_tests:linear_model"), ["model='models_for_tests:linear_model'", "(3, 8, 8)"]),
        (("--weights", "missing.pt"), ["weights", "'missing.pt'", "does not exist"]),
        (("--attack", "PGD"), ["'PGD'", "FGSM", "PGD-"]),
        (("--data", "missing"), ["'missing'", "does not exist"]),
        (("--data", ""), ["neither", "'test'"]),
        (("--colour", "red"), ["--colour"]),
    ],
)
@pytest.mark.parametrize("name", ["parity", "bench"])
def test_error(command, tree, bundled, name, arguments, named):
    error = command(name, *SMALL, "--data", tree, *arguments).error
    for part in named:
        assert part in error
    assert not list(Path().iterdir())  # nothing was begun


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("parity", "--reference", "cleverhans"), ["'cleverhans'", "ART, torchattacks, foolbox"]),
        (("parity", "--attack", "PGD-3"), ["'PGD-3'", "FGSM", "PGD-10, PGD-40"]),
        (("bench", "--implementation", "cleverhans"), ["'cleverhans'", "native, ART, torchattacks, foolbox"]),
        (("bench", "--attack", "PGD-99999999999999999999"), ["'PGD-99999999999999999999'", "1,000,000 steps"]),
        (("bench", "--attack", "pgd-1000001"), ["'pgd-1000001'", "1,000,000 steps"]),
        (("bench", "--attack", "PGD-" + "9" * 5000), ["'PGD-9", "1,000,000 steps"]),
        (("bench", "--attack", "PGD-\u0661"), ["'PGD-\u0661' is unknown"]),
        (("bench", "--norm", "l2"), ["norm='l2'", "inf, 2 or 1"]),
        (("bench", "--norm", "3"), ["norm='3'", "inf, 2 or 1"]),
        (("bench", "--eps", "-1"), ["eps=-1", "at least 0"]),
        (("bench", "--eps", "nan"), ["eps=nan", "finite"]),
        (("bench", "--eps", "8/0"), ["--eps", "'8/0'", "8/255"]),
        (("bench", "--eps", "small"), ["--eps", "'small'", "8/255"]),
        (("bench", "--precision", "float64"), ["precision='float64'", "auto, float32, bfloat16, float16"]),
        (("bench", "--eps-step", "0"), ["eps_step=0", "above 0"]),
    ],
)
def test_error_of_one_command(command, tree, arguments, named):
    error = command(*arguments, *SMALL, "--data", tree).error
    for part in named:
        assert part in error
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--architecture", "vgg"), ["architecture='vgg'", "resnet9, resnet18, wide_resnet"]),
        (("--architecture", "resnet18", "--width", "4"), ["architecture='resnet18'", "width"]),
        (("--architecture", "wide_resnet", "--depth", "11"), ["depth=11", "10, 16"]),
        (("--width", "0"), ["width=0", "at least 1"]),
        (("--epochs", "0"), ["epochs=0", "above 0"]),
        (("--batch-size", "13"), ["batch_size=13", "12 images"]),
        (("--batch-size", "0"), ["batch_size=0", "above 0"]),
        (("--warmup", "1"), ["warmup=1", "[0, 1)"]),
        (("--recipe", "pgd"), ["recipe='pgd'", "standard, fgsm-at, pgd-at, rse, mixup, iat"]),
        (("--recipe", ""), ["recipe=''", "standard, fgsm-at, pgd-at, rse, mixup, iat"]),
        (("--recipe", "iat", "--ratio", "1.5"), ["ratio=1.5", "[0, 1]"]),
        (("--recipe", "fgsm-at", "--holdout", "12"), ["holdout=12", "12 images"]),
        (("--recipe", "fgsm-at", "--holdout", "5"), ["batch_size=8", "7 images"]),
        (("--recipe", "pgd-at", "--eps", "8/0"), ["--eps", "'8/0'", "8/255"]),
        (("--sigma-init", "-1"), ["sigma_init=-1", "at least 0"]),
        (("--mixup-alpha", "nan"), ["mixup_alpha=nan", "finite"]),
        (("--seed", "-1"), ["seed=-1", "at least 0"]),
        (("--device", "nonsense"), ["device='nonsense'"]),
        (("--device", "meta"), ["device='meta'", "can compute"]),
        (("--data", "missing"), ["'missing'", "does not exist"]),
        (("--data", "mnist:missing"), ["'missing'", "does not exist"]),
        (("--resize", "4", "--crop", "5"), ["crop=5", "resize=4"]),
    ],
)
def test_error_of_train(command, tree, options, named):
    error = command("train", "--data", tree, *TINY[2:], *options).error
    for part in named:
        assert part in error
    assert not list(Path().iterdir())


@pytest.mark.parametrize("arguments", [("parity", *SMALL), ("bench", *SMALL), ("train", *TINY)])
def test_out_that_cannot_be_written(command, tree, tmp_path, arguments):
    (tmp_path / "file").write_text("")
    error = command(*arguments, "--data", tree, "--out", tmp_path / "file" / "out").error
    assert str(tmp_path / "file" / "out") in error
    assert "cannot be" in error


def test_data_without_images(command, tmp_path):
    (tmp_path / "empty" / "test" / "ant").mkdir(parents=True)
    error = command("bench", *SMALL, "--data", tmp_path / "empty").error
    assert f"{str(tmp_path / 'empty' / 'test')!r} has no images" in error


@pytest.mark.parametrize("name", ["parity", "bench"])
def test_weights_of_another_model(command, tree, tmp_path, name):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    error = command(name, *SMALL, "--data", tree, "--weights", tmp_path / "other.safetensors").error
    assert "other.safetensors' does not fit the model" in error
    assert "head.weight" in error


def test_weights_that_are_none(command, tree, tmp_path):
    (tmp_path / "text.pt").write_text("text")
    assert (
        "text.pt' cannot be read" in command("bench", *SMALL, "--data", tree, "--weights", tmp_path / "text.pt").error
    )


@pytest.mark.parametrize("name", ["parity", "bench"])
def test_model_with_too_few_classes(command, tree, tmp_path, name):
    for split in ("train", "test"):
        for extra in ("dog", "eel", "fox"):
            (tree / split / extra).mkdir()
            Image.new("RGB", (8, 8)).save(tree / split / extra / "0.png")
    error = command(name, *SMALL, "--data", tree).error
    assert "has 5 classes, the data 6" in error


@pytest.mark.parametrize("name", ["[bold]name[/bold]", "x[/]", "a" * 200, ":smile:"])
def test_error_is_printed_as_it_is(command, name):
    assert f"data path {name!r} does not exist" in command("bench", *SMALL, "--data", name).error


def test_toolkit_that_is_not_installed(command, tree, monkeypatch):
    def absent(*_, **__):
        raise ImportError("foolbox is not installed: pip install guardians[parity]")

    monkeypatch.setattr("guardians.parity.run_parity", absent)
    error = command("parity", *SMALL, "--data", tree).error
    assert error == "foolbox is not installed: pip install guardians[parity]"


def test_errors_of_ours_keep_their_traceback(command, tree, monkeypatch):
    monkeypatch.setattr("guardians.parity.run_parity", lambda *_, **__: {}["nothing"])
    with pytest.raises(KeyError):
        command("parity", *SMALL, "--data", tree)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (("parity", *SMALL), "guardians.parity.run_parity"),
        (("bench", *SMALL), "guardians.cli.run_benchmark"),
        (("train", *TINY), "guardians.cli.train"),
    ],
)
def test_control_c(command, tree, monkeypatch, name, function):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    result = command(*name, "--data", tree)
    assert result.code == 130
    assert result.err.strip() == "stopped; the same command goes on from here"


def test_control_c_in_a_native_attack_prints_what_is_finished(command, tree, monkeypatch):
    search = PGD._search

    def until_interrupted(self, batches, *arguments, **options):
        for count, part in enumerate(search(self, batches, *arguments, **options)):
            if count and type(self) is PGD:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(PGD, "_search", until_interrupted)
    arguments = ("bench", *SMALL, "--data", tree, "--attack", "FGSM", "--attack", "PGD-2", "--batch-size", 2)
    arguments += ("--implementation", "native", "--no-early-stop")
    stopped = command(*arguments, "--out", "other")  # the warm-up batch is one result
    assert stopped.code == 130
    cells = [line.split() for line in stopped.lines]
    assert [row[:3] for row in cells if row and row[0] in ("FGSM", "PGD-2")] == [
        ["FGSM", "native", "6"],
        ["PGD-2", "native", "2"],
    ]
    assert "interrupted" in stopped.out
    message = "interrupted; the finished rows are in other, and the same command goes on from there"
    assert stopped.err.splitlines()[-1] == message
    assert "stopped" not in stopped.err
    assert read_csv("other/benchmark.csv")["attack"].tolist() == ["FGSM"]

    monkeypatch.setattr(PGD, "_search", search)
    resumed = command(*arguments, "--out", "other")
    assert resumed.code == 0
    assert "interrupted" not in resumed.out + resumed.err
    frame = read_csv("other/benchmark.csv")
    assert frame[["attack", "n"]].to_numpy().tolist() == [["FGSM", 6], ["PGD-2", 6], ["union", 6]]


def test_control_c_before_the_first_row(command, tree, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("guardians.experiments.run.build_prediction", interrupted)
    result = command("bench", *SMALL, "--data", tree, "--attack", "clean")
    assert result.code == 130
    assert result.err.splitlines()[-1].startswith("interrupted; the finished rows are in runs")
