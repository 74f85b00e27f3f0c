"""`torchrun -m guardians COMMAND ...`: torchrun reads what abbreviates an option of its own, also behind ours."""

import pytest
import typer
from torch.distributed.run import get_args_parser

from guardians.cli import app

COMMANDS = typer.main.get_command(app).commands
OPTIONS = [
    (command, tuple(names))
    for command, found in COMMANDS.items()
    for parameter in found.params
    if parameter.param_type_name == "option"
    for names in filter(None, (parameter.opts, parameter.secondary_opts))
]


def arrives(command, option):
    ours = ["guardians", command, option, "1"]
    try:
        arguments = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", *ours])
    except SystemExit:
        return False
    return [arguments.training_script, *arguments.training_script_args] == ours


@pytest.mark.parametrize(("command", "names"), OPTIONS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_each_option_has_a_name_that_arrives(command, names):
    assert any(arrives(command, name) for name in names), names


def test_the_short_name_of_the_number_of_images_does_not():
    assert not arrives("bench", "--n")
    assert arrives("bench", "--images")
