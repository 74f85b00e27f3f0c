"""Commands are noted where they wrote something."""

import json

import guardians
from guardians.experiments.commands import COMMAND_COLUMNS, noted
from guardians.tables import read_csv


def test_a_command_is_noted_where_the_table_is_another_one_afterwards(tmp_path):
    for text in ("a", "a", "b"):
        with noted(tmp_path, "table.csv", "guardians '=write' it"):
            (tmp_path / "table.csv").write_text(text)
    with noted(tmp_path, "other.csv", "guardians nothing"):
        pass
    frame = read_csv(tmp_path / "commands.csv")
    assert list(frame) == list(COMMAND_COLUMNS)
    assert frame[["file", "command"]].to_numpy().tolist() == [["table.csv", "guardians '=write' it"]]
    assert json.loads(frame["versions"][0])["guardians"] == guardians.__version__


def test_what_an_interrupted_command_wrote_is_noted(tmp_path):
    try:
        with noted(tmp_path, "table.csv", "guardians x"):
            (tmp_path / "table.csv").write_text("half")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert read_csv(tmp_path / "commands.csv")["command"].tolist() == ["guardians x"]
