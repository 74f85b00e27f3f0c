"""The report of the committed results: all rows, figures, numbers of the headline, and how it works in a browser."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from pages_for_tests import Read, becomes, opened, problems

from guardians.experiments.audit import RULES
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
        if name == "evaluation.csv" and column == "reference":
            continue  # of an earlier version of the table, under another name
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
    assert [float(row[5][1]) for row in rows] == list(standard["robust_accuracy"])


def test_commands_are_those_of_the_folder_and_versions_those_of_its_runs(folder, read):
    assert "at commit a4f5a2c python benchmarks/evaluation.py" in read.text or "benchmarks/evaluation.yaml" in read.text
    for command in ("guardians check --all --out results", "guardians study benchmarks/defences.yaml --n 500"):
        assert command in read.text
    row = read_csv(RESULTS / "benchmark.csv").iloc[0]
    assert row["commit"][:9] in read.text
    assert "torchattacks 3.5.1" in read.text


def test_flags_and_rules_are_explained(read):
    for rule in RULES:
        assert rule.advice.replace("`", "") in read.text
    assert "audit-vanishing-gradients" in read.ids
    assert "defences-flattering" in read.ids


def test_figures_of_the_folder_and_drawn_ones_are_part_of_the_page(read):
    images = [url for tag, url in read.urls if tag == "img"]
    assert sum(url.startswith("data:image/svg+xml;base64,") for url in images) == 1
    assert sum(url.startswith("data:image/png;base64,") for url in images) == len(list(RESULTS.glob("*.png")))
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


def table_of(chrome, key):
    return chrome.find_element("css selector", f"#{key} .dt-container")


def choose(box, label, value):
    """Of the drop-down list with this label."""
    for one in box.find_elements("css selector", ".tools > label"):
        if one.text.splitlines()[0] == label:
            one.find_element("css selector", f'option[value="{value}"]').click()
            return
    raise AssertionError(label)


def info(box):
    return box.find_element("css selector", ".dt-info").text


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1280, "light")])
def test_the_report_is_sound_in_a_browser(chromium, report, width, scheme):
    chrome = opened(chromium, report, width, scheme)
    assert problems(chrome) == []
    chrome.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    chrome.execute_script("document.querySelectorAll('.choices input').forEach((box) => box.checked || box.click())")
    assert problems(chrome) == []


def test_tables_filter_search_and_page(chromium, report):
    frame = read_csv(RESULTS / "conformance.csv")
    box = table_of(opened(chromium, report), "conformance")
    assert info(box) == f"rows 1 to 15 of {len(frame):,}"
    choose(box, "outcome", "failed")
    failed = frame[frame["outcome"] == "failed"]
    assert f"of {len(failed)} " in info(box)
    choose(box, "implementation", "foolbox")
    assert f"of {(failed['implementation'] == 'foolbox').sum()} " in info(box)
    box.find_element("css selector", ".dt-search input").send_keys("DDN")
    of_ddn = failed[(failed["implementation"] == "foolbox") & failed["name"].str.contains("DDN")]
    assert becomes(len(of_ddn), lambda: len(box.find_elements("css selector", "tbody tr:not(:has(.dt-empty))")))


def test_a_rate_sorts_as_a_number(chromium, report):
    box = table_of(opened(chromium, report), "benchmark")
    (head,) = [one for one in box.find_elements("css selector", "thead th") if one.text.startswith("seconds")]
    chromium.execute_script("arguments[0].scrollIntoView()", head)
    head.click()
    at = chromium.execute_script("return arguments[0].cellIndex", head)
    rows = "[...document.querySelectorAll('#benchmark tbody tr')]"
    orders = f"return {rows}.map((row) => row.cells[arguments[0]].dataset.order)"
    expected = read_csv(RESULTS / "benchmark.csv")["seconds"].sort_values()
    assert becomes(list(map(repr, expected)), lambda: chromium.execute_script(orders, at))


def test_all_rows_of_small_tables_are_printed(chromium, report):
    chrome = opened(chromium, report)
    rows = "return document.querySelectorAll('#parity tbody tr').length"
    assert chrome.execute_script(rows) == 15
    chrome.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert chrome.execute_script(rows) == len(read_csv(RESULTS / "parity.csv"))
    chrome.execute_script("dispatchEvent(new Event('afterprint'))")
    assert chrome.execute_script(rows) == 15
