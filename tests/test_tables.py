import csv
import math
import multiprocessing
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from guardians import tables
from guardians.tables import (
    BENCHMARK_COLUMNS,
    PARITY_COLUMNS,
    Table,
    as_written,
    file_name,
    print_table,
    read_csv,
    write_csv,
)

COLUMNS = ["model", "eps", "n", "value", "note"]
KEY = ["model", "eps"]


def row(model="a", eps=8 / 255, n=3, value=0.1, note=""):
    return {"model": model, "eps": eps, "n": n, "value": value, "note": note}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "table.csv"


def test_rows_are_on_disk_when_append_returns(path):
    table = Table(path, COLUMNS, KEY)
    for i in range(3):
        table.append(row(eps=i / 255))
        assert len(path.read_text().splitlines()) == i + 2
        assert len(table) == i + 1


def test_numbers_and_text_come_back_exactly(path):
    first = row(eps=0.1 + 0.2, n=np.int64(7), value=np.float32(0.1), note='a, "quoted"\nnote')
    table = Table(path, COLUMNS, KEY)
    table.append(first)
    table.append(row(model="nan", value=None, note="NA"))
    table.append(row(model="1", value=float("nan")))
    table.append(row(model="2", value=float("inf")))
    frame = table.frame()
    assert list(frame.columns) == COLUMNS
    assert frame["eps"][0] == 0.1 + 0.2
    assert frame["n"][0] == 7
    assert frame["value"][0] == float(np.float32(0.1))
    assert frame["note"].tolist() == ['a, "quoted" note', "NA", "", ""]
    assert frame["model"].tolist() == ["a", "nan", "1", "2"]
    assert math.isnan(frame["value"][1])
    assert math.isnan(frame["value"][2])
    assert frame["value"][3] == math.inf


@given(eps=st.floats(allow_nan=False), model=st.text(), value=st.floats(allow_nan=False))
def test_a_key_is_found_again_after_the_file_is_read(tmp_path_factory, eps, model, value):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    Table(path, COLUMNS, KEY).append(row(model=model, eps=eps, value=value))
    table = Table(path, COLUMNS, KEY)
    assert (model, eps) in table
    assert row(model=model, eps=eps) in table
    assert (model, np.float64(eps)) in table
    assert (model + "x", eps) not in table
    assert table.frame()["value"][0] == value


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "-1.5", "=", "'=1", "''-1"]


@pytest.mark.parametrize("text", FORMULAS)
def test_text_that_begins_as_a_formula_does_is_not_one_in_the_file(path, text):
    table = Table(path, COLUMNS, KEY)
    table.append(row(model=text, note=text))
    (line,) = list(csv.reader(path.read_text().splitlines()))[1:]
    assert line[0] == line[4] == "'" + text
    assert table.frame()[["model", "note"]].to_numpy().tolist() == [[text, text]]
    again = Table(path, COLUMNS, KEY)
    assert (text, 8 / 255) in again
    assert ("'" + text, 8 / 255) not in again
    assert again.select([row(model=text)])["model"].tolist() == [text]
    with pytest.raises(ValueError, match="already"):
        again.append(row(model=text))


def test_numbers_and_other_text_are_written_as_they_are(path):
    Table(path, COLUMNS, KEY).append(row(model="'a' - b", eps=-1.5, n=-3, value=float("-inf"), note="a=1"))
    assert path.read_text().splitlines()[1] == "'a' - b,-1.5,-3,-inf,a=1"
    assert read_csv(path)[["eps", "n", "value"]].to_numpy().tolist() == [[-1.5, -3, -math.inf]]


def test_tables_without_apostrophes_are_read_as_they_were(path):
    path.parent.mkdir()
    path.write_text("model,eps,n,value,note\n=1,0.5,-3,0.1,-\n")
    assert ("=1", 0.5) in Table(path, COLUMNS, KEY)
    assert read_csv(path)[["model", "note"]].to_numpy().tolist() == [["=1", "-"]]


@given(text=st.text(st.sampled_from("'=+-@\ta1"), max_size=5))
def test_any_text_comes_back(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    table = Table(path, COLUMNS, KEY)
    table.append(row(model=text, note=text))
    assert table.frame()[["model", "note"]].to_numpy().tolist() == [[text, text]]
    assert not re.match(r"[=+@\t-]", path.read_text().splitlines()[1])


def test_a_long_cell_is_read_back(path):
    limit = csv.field_size_limit()
    text = "x" * (limit + 1)
    Table(path, COLUMNS, KEY).append(row(model=text, note=text))
    table = Table(path, COLUMNS, KEY)
    assert (text, 8 / 255) in table
    assert table.frame()["note"].tolist() == [text]
    assert csv.field_size_limit() == limit


def test_a_row_is_never_written_twice(path):
    Table(path, COLUMNS, KEY).append(row())
    table = Table(path, COLUMNS, KEY)
    with pytest.raises(ValueError, match=r"model=a, eps=0\.0313.* already"):
        table.append(row(n=99))
    assert len(table) == len(table.frame()) == 1


def test_a_row_that_another_has_written_in_the_meantime_stays(path):
    first, second = Table(path, COLUMNS, KEY), Table(path, COLUMNS, KEY)
    assert first.append(row(n=1))
    assert not second.append(row(n=2))
    assert second.frame()["n"].tolist() == [1]


def test_what_another_has_written_is_seen(path):
    table = Table(path, COLUMNS, KEY)
    Table(path, COLUMNS, KEY).append(row("b"))
    assert ("b", 8 / 255) in table
    assert len(table) == 1
    assert table.select([row("b")])["model"].tolist() == ["b"]


def write_rows(path, name, barrier):
    """Of a process of its own: rows that are in its name, and in between those that all write; it opens often."""
    barrier.wait()
    for i in range(40):
        table = Table(path, COLUMNS, KEY)
        table.append(row(name, eps=i, note=name * 3000))
        if ("shared", i) not in table:
            table.append(row("shared", eps=i, note=name))


def test_processes_write_one_table(path):
    context = multiprocessing.get_context("spawn")
    barrier, names = context.Barrier(2), ["a", "b"]
    processes = [context.Process(target=write_rows, args=(path, name, barrier)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    frame = Table(path, COLUMNS, KEY).frame()
    for name in [*names, "shared"]:
        assert frame.loc[frame["model"] == name, "eps"].tolist() == list(range(40))
    assert len(frame) == 3 * 40
    assert (frame["note"][frame["model"] == "b"] == "b" * 3000).all()


def test_a_row_that_is_being_written_is_not_cut(path, monkeypatch):
    """Another process opens the table when half of the row is on disk."""
    table, context = Table(path, COLUMNS, KEY), multiprocessing.get_context("spawn")
    started, write = context.Event(), tables._write

    def slowly(file, cells):
        line = tables._line(cells)
        file.write(line[:5])
        file.flush()
        process.start()
        assert started.wait(60)
        process.join(0.5)  # as long as the row is not whole, it has to wait
        file.write(line[5:])

    process = context.Process(target=open_and_append, args=(path, started))
    monkeypatch.setattr(tables, "_write", slowly)
    table.append(row("a"))
    process.join()
    assert process.exitcode == 0
    monkeypatch.setattr(tables, "_write", write)
    assert table.frame()["model"].tolist() == ["a", "b"]


def open_and_append(path, started):
    started.set()
    Table(path, COLUMNS, KEY).append(row("b"))


def test_a_table_that_cannot_be_written_whole_leaves_what_was_there(path):
    write_csv(pd.DataFrame({"a": [0.1 + 0.2, 1.0], "b": ["x", 'y, "z"']}), path)
    whole = path.read_bytes()
    assert read_csv(path)["a"].tolist() == [0.1 + 0.2, 1.0]

    class Unprintable:
        def __str__(self):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_csv(pd.DataFrame({"a": ["x" * 100_000, Unprintable()]}), path)
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_a_cut_line_is_dropped_and_the_next_row_is_whole(path):
    table = Table(path, COLUMNS, KEY)
    table.append(row("a"))
    table.append(row("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    table = Table(path, COLUMNS, KEY)
    assert len(table) == 1
    assert ("b", 8 / 255) not in table
    table.append(row("b"))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [0, 5, -1])
def test_a_cut_header_is_written_anew(path, cut):
    Table(path, COLUMNS, KEY)
    header = path.read_bytes()
    path.write_bytes(header[:cut])
    Table(path, COLUMNS, KEY).append(row())
    assert path.read_bytes().startswith(header)
    assert len(read_csv(path)) == 1


@pytest.mark.parametrize(
    "content", ["model,eps,n,value,other\na,1,2,3,4\n", "model,eps,n,value\n", "not a table", "\n"]
)
def test_a_file_with_other_columns_is_refused_and_left_alone(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.csv.*missing: .*note"):
        Table(path, COLUMNS, KEY)
    assert path.read_text() == content


def test_other_mismatches_name_the_place(path):
    Table(path, COLUMNS, KEY)
    with pytest.raises(ValueError, match="another order"):
        Table(path, COLUMNS[::-1], KEY)
    path.write_text(path.read_text() + "a,1\n")
    with pytest.raises(ValueError, match=r"line 2: 2 cells for 5 columns"):
        Table(path, COLUMNS, KEY)


def test_a_row_with_other_columns_is_refused(path):
    table = Table(path, COLUMNS, KEY)
    with pytest.raises(ValueError, match="missing: note, columns unexpected: notes"):
        table.append({"notes" if name == "note" else name: value for name, value in row().items()})
    assert len(table.frame()) == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/table\.csv' cannot be written"):
        Table(tmp_path / "file" / "table.csv", COLUMNS, KEY)
    with pytest.raises(ValueError, match="cannot be written"):
        Table(tmp_path, COLUMNS, KEY)


def test_keys_are_checked(path):
    with pytest.raises(ValueError, match="key="):
        Table(path, COLUMNS, ["models"])
    with pytest.raises(ValueError, match="key="):
        Table(path, COLUMNS, [])
    with pytest.raises(ValueError, match="model, eps"):
        ("a",) in Table(path, COLUMNS, KEY)  # noqa: B015


def test_select(path):
    table = Table(path, COLUMNS, KEY)
    assert list(table.select([row()]).columns) == COLUMNS
    for model in "abc":
        table.append(row(model, eps=1))
    assert table.select([row("c", eps=1), row("a", eps=1), row("d", eps=1)])["model"].tolist() == ["a", "c"]
    assert len(table.select([])) == 0


def test_select_with_rows_that_are_not_written(path):
    table = Table(path, COLUMNS, KEY)
    extra = row("x", eps=0.1 + 0.2, note="NA", value=float("nan"))
    alone = table.select([], [extra])
    assert list(alone.columns) == COLUMNS
    assert alone["eps"].tolist() == [0.1 + 0.2]
    assert len(table) == len(table.frame()) == 0
    table.append(row("a"))
    both = table.select([row("a")], [extra])
    assert both["model"].tolist() == ["a", "x"]
    assert both["n"].dtype == np.int64
    table.append(extra)
    pd.testing.assert_frame_equal(both, table.frame())


def test_documented_columns_fit_the_table(tmp_path):
    for columns in (BENCHMARK_COLUMNS, PARITY_COLUMNS):
        assert all(meaning and "\n" not in meaning for meaning in columns.values())
        key = next(iter(columns))
        table = Table(tmp_path / f"{key}.csv", columns, [key])
        assert list(table.frame().columns) == list(columns)


def test_what_is_written_is_the_same_from_python_numpy_and_pandas():
    assert as_written(0.1) == as_written(np.float64(0.1)) == as_written(pd.Series([0.1])[0]) == "0.1"
    assert as_written(3) == as_written(np.int64(3)) == "3"
    assert as_written(float("inf")) == "inf"
    assert as_written(True) == "True"


def printed(frame, *arguments):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(frame, *arguments, console=console)
    return console.export_text()


def test_print_shows_rates_as_percentages_and_leaves_the_data_alone():
    frame = pd.DataFrame(
        {"model": ["[bold]a"], "robust_accuracy": [0.4567], "eps": [8 / 255], "seconds": [1.23456], "n": [1000]}
    )
    text = printed(frame, ["model", "robust_accuracy", "eps", "n"], "A title")
    assert "A title" in text
    assert "45.7" in text
    assert "%" in text
    assert "8/255" in text
    assert "1000" in text
    assert "[bold]a" in text
    assert "1.23" not in text
    assert frame["robust_accuracy"][0] == 0.4567


def test_print_empty_cells_and_unknown_columns():
    frame = pd.DataFrame({"max_abs_diff_float64": [float("nan")], "eps": [0.5]})
    text = printed(frame)
    assert "nan" not in text
    assert "0.5" in text
    with pytest.raises(ValueError, match=r"columns=\['missing'\].*eps"):
        print_table(frame, ["missing"])


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("resnet9-16", "native, as in the paper", "9 x 100", 200), "resnet9-16-native-as-in-the-paper-9-x-100-200"),
        (("iat+MI-OL", "EOT-PGD", 0, "a59d4eae"), "iat+MI-OL-EOT-PGD-0-a59d4eae"),
        (("my_model.v2", 1), "my_model.v2-1"),
    ],
)
def test_file_names_that_need_no_change_are_readable(parts, name):
    assert file_name(*parts) == name


@pytest.mark.parametrize(
    "part", ["../../x", "/etc/x", "..", "a\\b", "a:b", "C&W", "a\0b", "x" * 5000, "é", "a\nb", "-x"]
)
def test_file_names_are_safe_and_differ(tmp_path, part):
    name = file_name(part, 40)
    assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*", name)
    (tmp_path / f"{name}.csv").touch()
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.csv"]
    assert name == file_name(part, 40)
    assert name != file_name(f"{part}x", 40)
    assert name != file_name(re.sub(r"[^a-zA-Z0-9]+", "-", part).lstrip("-")[:200], 40)


@given(st.lists(st.text(), min_size=1, max_size=3))
def test_file_names_of_any_text(parts):
    assert re.fullmatch(r"[A-Za-z0-9._+-]{0,209}", file_name(*parts))
