"""What README and the documentation show runs, and is what the command line knows."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from guardians.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def name(page):
    return page.name


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_examples_of_a_page_run_one_after_the_other(page, monkeypatch, capsys):
    monkeypatch.delenv("GUARDIANS_DATA", raising=False)
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    printed = capsys.readouterr().out
    if "found" in names:
        assert 0 <= names["found"].robust_accuracy < names["found"].clean_accuracy
    if page.name in ("README.md", "torchattacks.md", "defences.md"):  # accuracies on 20 images of attacked models
        accuracies = [float(number) for number in re.findall(r"^\d\.\d+$", printed, flags=re.MULTILINE)]
        assert accuracies
        assert max(accuracies) < 0.25


def commands():
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"\bguardians (\w.*?)(?: {2,}#.*|$)", line)
                if found:
                    yield page.name, found.group(1)
    for command, known in COMMANDS.items():
        yield command, re.split(r"Example: .*?guardians ", known.help)[-1] if "Example: " in known.help else ""


@pytest.mark.parametrize(("where", "command"), list(commands()))
def test_the_commands_that_are_shown_are_known(where, command):
    assert command, f"{where} has no example"
    first, *arguments = shlex.split(command)
    COMMANDS[first].make_context(first, arguments, resilient_parsing=False)


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS)], ids=lambda command: " ".join(command) or "all"
)
def test_each_command_has_help_with_an_example(command):
    shown = CliRunner().invoke(app, [*command, "--help"])
    assert shown.exit_code == 0
    assert "Example: " in shown.output


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 150
