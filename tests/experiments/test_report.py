"""The report of the committed results: all rows, figures, numbers of the headline, and how it works in a browser."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from pages_for_tests import Read, open_all, opened, problems
from playwright.sync_api import expect

from guardians.experiments.audit import RULES
from guardians.experiments.commands import noted
from guardians.experiments.report import TABLES, report_page
from guardians.figures import plot_curve
from guardians.tables import read_csv, write_csv

RESULTS = Path(__file__).parents[2] / "results"
DRAWN = [SimpleNamespace(name="curve", title="A curve", caption="of something", command="guardians draw")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.sqlite*", ".*", "report.html"))
    plot_curve(pd.DataFrame({"gradients": [0, 1], "robust_accuracy": [1.0, 0.5]}), folder / "figures" / "curve.svg")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    report_page(folder, folder / "report.html", drawn=DRAWN)
    return folder / "report.html"


@pytest.fixture(scope="module")
def read(report):
    return Read(report)


@pytest.mark.parametrize("name", [name for name in TABLES if (RESULTS / name).exists()])
def test_every_row_of_a_table_is_there(name, read):
    frame = read_csv(RESULTS / name)
    heads, *rows = read.tables[TABLES[name].title]
    labels = [text.removesuffix(" (%)") for text, _ in heads]
    assert len(rows) == len(frame)
    for column in frame:
        at = labels.index(column.replace("_", " "))
        if pd.api.types.is_numeric_dtype(frame[column]):
            assert [float(row[at][1] or "nan") for row in rows] == pytest.approx(
                frame[column], rel=0, abs=0, nan_ok=True
            )
        elif column not in ("flags", "raised", "planted"):
            assert [row[at][0] for row in rows] == list(map(str, frame[column]))


def test_the_headline_is_computed_from_the_tables(read):
    verdicts = read_csv(RESULTS / "parity.csv")["verdict"]
    conformance = read_csv(RESULTS / "conformance.csv").query("implementation == 'native'")
    assert f"{len(verdicts)} cases" in read.text
    assert f"{(verdicts == 'exact').sum()} exact" in read.text
    assert f"{(conformance['outcome'] == 'failed').sum()} of {len(conformance)}" in read.text
    assert f"{(read_csv(RESULTS / 'audit.csv')['verdict'] == 'caught').sum()} caught" in read.text
    standard = read_csv(RESULTS / "evaluation.csv").query("contender == 'standard'")
    rows = read.tables["Robust accuracy"][1:]
    assert [float(row[3][1]) for row in rows] == list(standard["robust_accuracy"])


def test_commands_are_those_of_the_folder_and_versions_those_of_its_runs(folder, read):
    assert "at commit a4f5a2c python benchmarks/evaluation.py" in read.text or "benchmarks/evaluation.yaml" in read.text
    for command in ("guardians check --all --out results", "guardians study benchmarks/defences.yaml --n 500"):
        assert command in read.text
    row = read_csv(RESULTS / "benchmark.csv").iloc[0]
    assert row["commit"][:9] in read.text
    assert "torchattacks 3.5.1" in read.text


def test_commands_that_were_noted_come_with_their_versions(tmp_path):
    shutil.copy(RESULTS / "parity.csv", tmp_path)
    for command in ("guardians parity --n 200", "guardians parity --n 20"):
        with noted(tmp_path, "parity.csv", command):
            (tmp_path / "parity.csv").write_bytes((tmp_path / "parity.csv").read_bytes() + b"\n")
    report_page(tmp_path, tmp_path / "report.html")
    text = Read(tmp_path / "report.html").text
    assert "guardians parity --n 200; guardians parity --n 20" in text
    assert f"torch {torch.__version__}" in text
    assert "of 2 commands" in text


def test_flags_and_rules_are_explained(read):
    for rule in RULES:
        assert rule.advice.replace("`", "") in read.text
    assert "audit-vanishing-gradients" in read.ids
    assert "defences-flattering" in read.ids


def test_figures_of_the_folder_and_drawn_ones_are_part_of_the_page(read):
    images = [url for tag, url in read.urls if tag == "img"]
    assert sum(url.startswith("data:image/svg+xml;base64,") for url in images) == 1
    drawn_by_studies = [path for path in RESULTS.rglob("*.png") if path.parent.name != "figures"]
    assert sum(url.startswith("data:image/png;base64,") for url in images) == len(drawn_by_studies)
    assert "guardians draw" in read.text


def test_nothing_is_loaded_and_all_anchors_are_there(read):
    assert len(set(read.ids)) == len(read.ids)
    assert all(url.startswith("data:") or url[1:] in read.ids for _, url in read.urls)


def test_the_same_folder_gives_the_same_bytes(folder, report):
    report_page(folder, folder / "again.html", drawn=DRAWN)
    assert (folder / "again.html").read_bytes() == report.read_bytes()


def test_a_folder_may_have_few_tables_and_no_store(tmp_path):
    write_csv(read_csv(RESULTS / "audit.csv"), tmp_path / "audit.csv")
    report_page(tmp_path, tmp_path / "report.html")
    read = Read(tmp_path / "report.html")
    assert list(read.tables) == ["Audit"]
    assert TABLES["audit.csv"].command in read.text
    assert not list(tmp_path.glob("*.sqlite"))


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of the tables that a report shows"):
        report_page(tmp_path, tmp_path / "report.html")


# In a browser


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light")])
def test_the_report_is_sound_in_a_browser(chromium, report, width, scheme):
    with opened(chromium, report, width, scheme) as shown:
        assert problems(shown) == []
        open_all(shown)
        assert problems(shown) == []


def test_tables_filter_search_and_page(chromium, report):
    frame = read_csv(RESULTS / "conformance.csv")
    failed = frame[frame["outcome"] == "failed"]
    of_foolbox = failed[failed["implementation"] == "foolbox"]
    with opened(chromium, report) as shown:
        section = shown.locator("#conformance")
        rows, info = section.locator("tbody tr"), section.locator(".dt-info")
        expect(info).to_have_text(f"rows 1 to 15 of {len(frame):,}")
        section.get_by_label("next").click()
        expect(info).to_have_text(f"rows 16 to 30 of {len(frame):,}")
        section.get_by_label("outcome", exact=True).select_option("failed")
        expect(info).to_contain_text(f"of {len(failed)} ")
        section.get_by_label("implementation", exact=True).select_option("foolbox")
        section.get_by_label("a page").select_option("all")
        expect(rows).to_have_count(len(of_foolbox))
        name = of_foolbox["name"].iloc[0]
        section.get_by_label("Search").fill(name)
        expect(rows).to_have_count(int(of_foolbox["name"].str.contains(name, regex=False).sum()))


def test_a_column_sorts_as_numbers(chromium, report):
    with opened(chromium, report) as shown:
        section = shown.locator("#benchmark")
        head = section.get_by_role("columnheader", name="seconds").first
        head.click()
        at = head.evaluate("(one) => one.cellIndex")
        expected = read_csv(RESULTS / "benchmark.csv")["seconds"].sort_values().tolist()
        cells = section.locator(f"tbody td:nth-child({at + 1})")
        expect(cells.first).to_have_attribute("data-order", repr(expected[0]))
        assert [cell.get_attribute("data-order") for cell in cells.all()] == list(map(repr, expected))


def test_all_rows_of_small_tables_are_printed(chromium, report):
    with opened(chromium, report) as shown:
        rows = shown.locator("#parity tbody tr")
        expect(rows).to_have_count(15)
        shown.evaluate("dispatchEvent(new Event('beforeprint'))")
        expect(rows).to_have_count(len(read_csv(RESULTS / "parity.csv")))
        shown.evaluate("dispatchEvent(new Event('afterprint'))")
        expect(rows).to_have_count(15)
