"""Pages: what they hold, and in headless Chromium what they do."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import torch
from models_for_tests import small_net, some_images, some_labels
from pages_for_tests import Read, open_all, opened, problems
from playwright.sync_api import expect
from torch import nn

import guardians
from guardians.attacks.sequence import Ledger
from guardians.evaluation import FLAGS, evaluate
from guardians.experiments.page import Claim, Section, data_uri, evaluation_page, write_page

NASTY = """</script><script>window.broken = 1</script><img src=x onerror="window.broken = 1"> & 'so' "on" """
FRAME = pd.DataFrame(
    {
        "model": [NASTY, "b", "c", "d"],
        "robust_accuracy": [0.5, 0.091, 0.1, np.nan],
        "eps": [8 / 255, 0.5, np.inf, 0.0],
        "n": [9, 10, 100, 2],
        "flags": ["nan;zero_gradient", "", "", "nan"],
    }
)
MEANINGS = {"model": "its name", "n": "number of `images`"}
ABOUT = {"name": "a <b>", "data": "some", "classes": "pqrst", "command": "guardians x"}
TABLE_FLAGS = {"nan": "a pixel is not a number", "zero_gradient": "the gradient is zero", "outside": "never here"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "folder" / "page.html"
    section = Section(
        "first", NASTY, [NASTY], NASTY, {"Seed": NASTY}, FRAME, MEANINGS, FRAME.columns[:4], (), TABLE_FLAGS
    )
    write_page(path, NASTY, [section], lede=[NASTY], claims=[Claim("9", NASTY, "first")])
    return path


@pytest.fixture(scope="module")
def found():
    model = nn.Sequential(small_net(), nn.Softmax(1))
    x, y = some_images(16), some_labels(16)
    y[:8] = model(x[:8]).argmax(1)
    return evaluate(model, x, y, eps=[0.02, 0.1], budget="fast", verbose=False), model, x


@pytest.fixture(scope="module")
def evaluated(found, tmp_path_factory):
    evaluations, model, x = found
    path = tmp_path_factory.mktemp("evaluated") / "page.html"
    evaluation_page(evaluations, path, images=x, model=model, **ABOUT)
    return path


# What it holds


def test_a_table_has_all_cells_rates_as_percentages_and_numbers_to_sort_by(page):
    heads, *rows = Read(page).tables[NASTY]
    assert [text for text, _ in heads] == ["model", "robust accuracy (%)", "eps", "n", "flags"]
    assert rows[0] == [
        (NASTY, None),
        ("50.0", "0.5"),
        ("8/255", repr(8 / 255)),
        ("9", "9"),
        ("nan; zero_gradient", None),
    ]
    assert [row[1] for row in rows] == [("50.0", "0.5"), ("9.1", "0.091"), ("10.0", "0.1"), ("", "")]
    assert [float(row[2][1]) for row in rows] == [8 / 255, 0.5, np.inf, 0.0]


def test_flags_are_explained_where_they_stand(page):
    read = Read(page)
    links = {url for tag, url in read.urls if tag == "a" and url.startswith("#first-")}
    assert links == {"#first-nan", "#first-zero-gradient"}
    assert {link[1:] for link in links} <= set(read.ids)
    assert all(text in read.text for text in TABLE_FLAGS.values())
    assert "number of images" in read.text


def test_all_anchors_are_there_and_nothing_is_loaded(page, evaluated):
    for path in (page, evaluated):
        read = Read(path)
        assert len(set(read.ids)) == len(read.ids)
        assert all(url.startswith("data:") or url[1:] in read.ids for _, url in read.urls), read.urls
        source = path.read_text()
        assert not re.search(r"@import|url\(", source[source.index("<style>") : source.index("</style>")])
        assert "default-src 'none'" in source


def test_the_same_input_gives_the_same_bytes(found, evaluated, tmp_path):
    evaluations, model, x = found
    evaluation_page(evaluations, tmp_path / "again.html", images=x, model=model, **ABOUT)
    assert (tmp_path / "again.html").read_bytes() == evaluated.read_bytes()


def test_keys_are_distinct(tmp_path):
    with pytest.raises(ValueError, match="distinct"):
        write_page(tmp_path / "page.html", "a", [Section("a", "a"), Section("a", "b")])


def test_only_images_that_browsers_know(tmp_path):
    with pytest.raises(ValueError, match=r"figure\.pdf.*must end in \.png or \.svg"):
        data_uri(tmp_path / "figure.pdf")


# Of an evaluation


def test_an_evaluation_page_says_what_was_found_and_how(found, evaluated):
    evaluations, _, _ = found
    read = Read(evaluated)
    for one in evaluations:
        low, high = one.interval
        assert f"keeps {100 * one.robust_accuracy:.1f} % of 16 images right" in read.text
        assert f"{100 * low:.1f} % to {100 * high:.1f} %" in read.text
    assert "guardians x" in read.text
    assert evaluations[0].model_digest in read.text
    for package, version in evaluations[0].versions.items():
        assert f"{package} {version}" in read.text
    assert evaluations[0].flags == ["probabilities"]
    assert FLAGS["probabilities"] in read.text
    assert "result-probabilities" in read.ids


def test_an_evaluation_page_has_every_stage_and_image(found, evaluated):
    tables = Read(evaluated).tables
    for one, where in zip(found[0], ("eps 0.02", "eps 0.1"), strict=True):
        stages = tables[f"Attacks in their order, {where}"][1:]
        assert [(row[0][0], int(row[1][1])) for row in stages] == list(
            one.by_stage()[["stage", "felled"]].itertuples(index=False, name=None)
        )
        rows = tables[f"Image by image, {where}"][1:]
        by_image = one.by_image()
        assert [row[1][0] for row in rows] == ["pqrst"[label] for label in one.labels]
        assert [row[2][0] for row in rows] == list(by_image["stage"])
        assert [float(row[3][1] or "nan") for row in rows] == pytest.approx(by_image["distance"], nan_ok=True)
        assert [int(row[5][1]) for row in rows] == list(one.backward)


def test_examples_say_what_the_model_takes_the_images_for(found, evaluated):
    evaluations, model, _ = found
    one = evaluations[1]
    felled = (one.stage > 0).nonzero()[0]
    assert len(felled)
    taken = ["pqrst"[label] for label in model(one.x_adv[felled]).argmax(1)]
    assert re.findall("taken for (.)", Read(evaluated).text)[-len(taken[:8]) :] == taken[:8]


def test_without_images_there_are_no_examples(found, tmp_path):
    guardians.evaluation_page(found[0][0], tmp_path / "page.html")
    read = Read(tmp_path / "page.html")
    assert "Adversarial images" not in read.text
    assert [tag for tag, url in read.urls if tag == "img"] == ["img"]  # the curve


def test_of_very_many_images_the_first_are_listed(found, tmp_path):
    one = dataclasses.replace(
        found[0][0],
        labels=np.zeros(10_002, dtype=int),
        distance=np.zeros(10_002),
        ledger=Ledger.of(torch.zeros(10_002, 1, 1, 1)),
    )
    guardians.evaluation_page(one, tmp_path / "page.html")
    read = Read(tmp_path / "page.html")
    assert len(read.tables["Image by image"]) == 1 + 10_000
    assert "The first 10,000 of 10,002 images" in read.text


def test_an_evaluation_page_refuses_other_images(found, tmp_path):
    with pytest.raises(ValueError, match=r"images of shape \(3, 3, 8, 8\): must be those evaluated, \(16, 3, 8, 8\)"):
        evaluation_page(found[0], tmp_path / "page.html", images=found[2][:3])
    with pytest.raises(ValueError, match="evaluations is empty"):
        evaluation_page([], tmp_path / "page.html")


# In a browser


def column(shown, number):
    """The texts of the rows that are shown."""
    return shown.locator(f"table.data tbody td:nth-child({number})")


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1280, "dark")])
def test_pages_are_sound_in_a_browser(chromium, page, evaluated, width, scheme):
    for path in (page, evaluated):
        with opened(chromium, path, width, scheme) as shown:
            open_all(shown)
            assert problems(shown) == []
            ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", ground))) < 300) == (scheme == "dark")


def test_names_stay_text(chromium, page):
    with opened(chromium, page) as shown:
        assert shown.evaluate("[window.broken, document.scripts.length]") == [None, 2]
        assert shown.title() == " ".join(NASTY.split())


def test_a_column_sorts_as_numbers_by_mouse_and_keyboard(chromium, page):
    with opened(chromium, page) as shown:
        heads = shown.locator("thead th")
        heads.nth(3).click()
        expect(column(shown, 4)).to_have_text(["2", "9", "10", "100"])
        heads.nth(3).locator("[tabindex='0']").press("Enter")
        expect(column(shown, 4)).to_have_text(["100", "10", "9", "2"])
        expect(heads.nth(3)).to_have_attribute("aria-sort", "descending")
        heads.nth(2).click()
        expect(column(shown, 3)).to_have_text(["0", "8/255", "0.5", "inf"])


def test_hidden_columns_can_be_shown_and_a_flag_leads_to_what_it_means(chromium, page):
    with opened(chromium, page) as shown:
        expect(shown.get_by_role("columnheader")).to_have_count(4)
        shown.get_by_text("Columns (1 more)").click()
        shown.get_by_label("flags").check()
        expect(column(shown, 5)).to_have_text(["nan; zero_gradient", "", "", "nan"])
        shown.get_by_role("link", name="zero_gradient").click()
        expect(shown.locator("dt:target + dd")).to_have_text(TABLE_FLAGS["zero_gradient"])
        expect(shown.locator("dt:target")).to_be_in_viewport()


def test_the_first_stop_of_the_tab_key_skips_to_the_content(chromium, page):
    with opened(chromium, page) as shown:
        shown.keyboard.press("Tab")
        expect(shown.locator(":focus")).to_have_text("Skip to the content")
        shown.keyboard.press("Enter")
        expect(shown.locator(":focus")).to_have_id("content")
