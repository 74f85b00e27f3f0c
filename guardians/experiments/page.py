"""One self-contained HTML page: tables that sort and filter, figures, flags, and the command of each number."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from art.estimators.classification import PyTorchClassifier
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor, nn

import guardians
from guardians.engine.rng import ForkedGenerators
from guardians.engine.victim import Victim, isolated, undisturbed
from guardians.evaluation import FLAGS, Evaluation
from guardians.figures import plot_curve
from guardians.tables import BENCHMARK_COLUMNS, RATES, printed

__all__ = ["Claim", "Example", "Figure", "Section", "evaluation_page", "write_page"]

_FLAG_COLUMNS = ("flags", "raised", "planted")
_WORD, _LONG = 26, 40
"""Characters up to which a cell is one line, and from which it is wide."""
_EXAMPLES = 8
_MOST_ROWS = 10_000
"""Images that are listed; browsers are slow beyond."""
_SUMMARY_COLUMNS = ("norm", "eps", "n", "clean_accuracy", "robust_accuracy", "robust_accuracy_low")
_STAGE_COLUMNS = {
    "stage": "the attack, in the order in which they are run, each on the images that still stand; clean is none",
    "felled": "images that it made wrong; of clean those that are wrong as they are",
    "robust_accuracy": "share of all images that is left",
}
_IMAGE_COLUMNS = {
    "index": "position in the data",
    "label": "true label",
    "stage": "attack that felled it; empty where it stands",
    "distance": "norm of the perturbation that felled it, in the norm of the threat model; empty where it stands",
    "forward": "how often the search evaluated the model for this image",
    "backward": "how often it evaluated its gradient",
}


class Claim(NamedTuple):
    """A number of the headline, what it is, and the key of the section that has it."""

    value: str
    text: str
    section: str = ""


@dataclass(frozen=True)
class Figure:
    """An image within the page.

    Attributes:
        title: a line.
        caption: what it shows.
        uri: the image as a data URI, see `data_uri`.
        command: that drew it.
    """

    title: str
    caption: str
    uri: str
    command: str = ""


class Part(NamedTuple):
    """A picture of an example."""

    uri: str
    alt: str
    caption: str


class Example(NamedTuple):
    """Pictures side by side, and what is said of them."""

    parts: Sequence[Part]
    text: str


class Head(NamedTuple):
    """Of a column."""

    name: str
    label: str
    meaning: str
    numeric: bool
    rate: bool
    hidden: bool


class Cell(NamedTuple):
    """Of a table: its text, what it is sorted by where that is another, and flags with the anchors of their meaning."""

    text: str
    order: str | None
    kind: str
    flags: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        key: of its anchor, unique on the page.
        title: a line.
        text: paragraphs; what is between backticks is set as code.
        command: that made what is shown.
        facts: a term and what it is: versions, commit, seed.
        table: a row a row; columns of `guardians.tables.RATES` are shown as percentages.
        columns: what the columns mean.
        shown: columns that are visible at first, in this order before all others; empty for all.
        rates: more columns of fractions.
        flags: all that may be raised and what each means; those in the table's columns flags, raised and planted are
            explained below it.
        known_raised: flags that were raised; None takes them from the table.
        figures, examples: below the table.
    """

    key: str
    title: str
    text: Sequence[str] = ()
    command: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    table: pd.DataFrame | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    shown: Sequence[str] = ()
    rates: Sequence[str] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    known_raised: Sequence[str] | None = None
    figures: Sequence[Figure] = ()
    examples: Sequence[Example] = ()

    @property
    def raised(self) -> list[str]:
        """Flags that were raised, in the order of `flags`."""
        found = set(self.known_raised or ())
        if self.known_raised is None and self.table is not None:
            for name in set(_FLAG_COLUMNS) & set(self.table):
                found |= {flag for text in self.table[name] for flag in _parts(text)}
        return [flag for flag in self.flags if flag in found]

    @property
    def unraised(self) -> list[str]:
        """The others."""
        raised = self.raised
        return [flag for flag in self.flags if flag not in raised]

    def anchor(self, flag: str) -> str:
        """Where a flag is explained."""
        return f"{self.key}-{_slug(flag)}"

    def heads(self) -> list[Head]:
        """Of the columns, in the order in which they are shown."""
        assert self.table is not None
        first = [name for name in self.shown if name in self.table]
        heads = []
        for name in [*first, *(str(name) for name in self.table if name not in first)]:
            numeric = _is_numeric(self.table[name])
            rate = numeric and name in (*RATES, *self.rates)
            label = name.replace("_", " ") + (" (%)" if rate else "")
            hidden = bool(first) and name not in first
            heads.append(Head(name, label, self.columns.get(name, ""), numeric, rate, hidden))
        return heads

    def rows(self) -> Iterator[list[Cell]]:
        """The cells of the table."""
        assert self.table is not None
        heads = self.heads()
        for row in self.table[[head.name for head in heads]].itertuples(index=False, name=None):
            yield [self._cell(head, value) for head, value in zip(heads, row, strict=True)]

    def _cell(self, head: Head, value: Any) -> Cell:
        if head.numeric:
            missing = value != value
            text = "" if missing else f"{100 * value:.1f}" if head.rate else printed(head.name, value)
            return Cell(text, "" if missing else _as_order(value), "number", ())
        text = printed(head.name, value)
        known = head.name in _FLAG_COLUMNS and all(flag in self.flags for flag in _parts(text))
        flags = [(flag, self.anchor(flag)) for flag in _parts(text)] if known else []
        kind = "word" if len(text) <= _WORD and not flags else "long" if len(text) > _LONG else "text"
        return Cell(text, None, kind, flags)


def write_page(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    lede: Sequence[str] = (),
    claims: Sequence[Claim] = (),
    footer: str = "",
) -> None:
    """Write sections as one HTML file that loads nothing; the same input gives the same bytes.

    Tables sort, filter and page with DataTables (https://datatables.net, MIT), which is part of the file.

    Args:
        path: of the file; its folder is created where it does not exist.
        title: of the page.
        sections: in their order.
        lede: paragraphs below the title.
        claims: the numbers of the headline.
        footer: the last line.

    Raises:
        ValueError: two sections have the same key.
    """
    keys = [section.key for section in sections]
    if len(set(keys)) < len(keys):
        raise ValueError(f"sections have the keys {keys}: must be distinct")
    environment = Environment(
        loader=PackageLoader("guardians.experiments"), autoescape=True, trim_blocks=False, keep_trailing_newline=True
    )
    environment.filters["prose"] = _prose

    def text_of(name: str) -> str:
        assert environment.loader is not None
        return environment.loader.get_source(environment, name)[0]

    scripts = text_of("dataTables.min.js"), text_of("page.js")
    page = environment.get_template("page.html.j2").render(
        title=title,
        lede=lede,
        claims=claims,
        sections=sections,
        footer=footer or f"Written by Guardians {guardians.__version__}. The tables are DataTables 3 (MIT licence).",
        css=text_of("page.css"),
        library=scripts[0],
        script=scripts[1],
        # So that no script runs but these two, whatever a name in the data holds.
        script_hashes=Markup(" ".join(f"'sha256-{_sha256(script)}'" for script in scripts)),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def data_uri(path: str | os.PathLike[str]) -> str:
    """A PNG or SVG file as a URI that holds it."""
    path = Path(path)
    kinds = {".png": "image/png", ".svg": "image/svg+xml"}
    if path.suffix not in kinds:
        raise ValueError(f"path={str(path)!r}: must end in {' or '.join(kinds)}")
    return _uri(kinds[path.suffix], path.read_bytes())


def evaluation_page(
    evaluations: Evaluation | Sequence[Evaluation],
    path: str | os.PathLike[str],
    *,
    images: Tensor | None = None,
    model: nn.Module | PyTorchClassifier | None = None,
    name: str = "The model",
    data: str = "",
    classes: Sequence[str] = (),
    command: str = "",
) -> None:
    """What `guardians.evaluate` found, as one self-contained HTML file.

    Args:
        evaluations: one, or those of several radii.
        path: of the file.
        images: that were evaluated, (N, C, H, W) in [0, 1] with 1 or 3 channels, in their order; a few of them are
            shown beside the adversarial ones. None shows none.
        model: that was evaluated, to say what it takes the adversarial images for; None says nothing.
        name: of the model.
        data: where the images came from.
        classes: names of the classes, in the order of the labels; empty for their numbers.
        command: that made the evaluation.

    Raises:
        ValueError: there are no evaluations, or not as many images as were evaluated.
    """
    found = [evaluations] if isinstance(evaluations, Evaluation) else list(evaluations)
    if not found:
        raise ValueError("evaluations is empty: must hold at least one")
    for one in found:
        if images is not None and images.shape != one.x_adv.shape:
            raise ValueError(
                f"images of shape {tuple(images.shape)}: must be those evaluated, {tuple(one.x_adv.shape)}"
            )
    names = [str(label) for label in classes]
    sections: list[Section] = []
    if len(found) > 1:
        summary = pd.concat([one.summary() for one in found], ignore_index=True)
        shown = [*_SUMMARY_COLUMNS, "robust_accuracy_high", "backward_per_image", "seconds", "flags"]
        meanings = {**BENCHMARK_COLUMNS, "budget": "of the evaluation", "norm": "of the ball", "eps": "its radius"}
        meanings |= {"flags": "what makes the number doubtful", "seconds": "wall-clock time of the evaluation"}
        sections.append(Section("radii", "All radii", table=summary, columns=meanings, shown=shown, flags=FLAGS))
    for number, one in enumerate(found):
        after = f"-{number + 1}" if number else ""
        where = f", eps {printed('eps', one.eps)}" if len(found) > 1 else ""
        sections += _sections_of(
            one, after, where, images=images, model=model, data=data, classes=names, command=command
        )
    first = found[0]
    spent = Claim(
        f"{first.backward.mean():.1f}", f"gradients an image, {first.seconds:.1f} s in all, seed {first.seed}"
    )
    raised = list(dict.fromkeys(flag for one in found for flag in one.flags))
    text = f"raised: {', '.join(raised)}" if raised else "raised: nothing that was looked for makes the number doubtful"
    claims = [
        Claim(_percent(first.clean_accuracy), f"clean accuracy on {len(first.labels)} images"),
        *(Claim(_percent(one.robust_accuracy), f"robust accuracy, {_ball(one)}; {_interval(one)}") for one in found),
        spent,
        Claim(f"{len(raised)} flag{'s' if len(raised) != 1 else ''}", text, "result"),
    ]
    write_page(path, f"Robustness of {name}", sections, lede=[_sentence(one, name) for one in found], claims=claims)


def _sections_of(
    one: Evaluation,
    after: str,
    where: str,
    *,
    images: Tensor | None,
    model: Any,
    data: str,
    classes: Sequence[str],
    command: str,
) -> list[Section]:
    """Of an evaluation; `after` ends their keys and `where` their titles."""
    facts = {
        "Threat model": f"perturbations of {_ball(one)}, for images in [0, 1]",
        "Budget": one.budget,
        "Images": f"{len(one.labels)}" + (f", {data}" if data else ""),
        "Model digest": f"`{one.model_digest}`",
        "Seed": str(one.seed),
        "Time": f"{one.seconds:.1f} s",
        "Versions": ", ".join(f"{package} {version}" for package, version in one.versions.items()),
    }
    by_image = one.by_image()
    if classes:
        by_image["label"] = [classes[label] for label in one.labels]
    result = Section(
        f"result{after}",
        f"Result{where}",
        ["A number is worth what stands behind it: the command, the versions, and the flags that were raised."],
        command,
        facts,
        flags=FLAGS,
        known_raised=one.flags,
    )
    stages = Section(
        f"attacks{after}",
        f"Attacks in their order{where}",
        ["Each attack is run on the images that the ones before it left."],
        table=one.by_stage(),
        columns=_STAGE_COLUMNS,
    )
    curve = Section(
        f"curve{after}",
        f"Accuracy against gradients spent{where}",
        ["Where the curve is flat, more of the same attacks would not change the number."],
        figures=[_curve(one)],
    )
    text = ["Which attack felled each image, at what norm, and what the search cost."]
    if len(by_image) > _MOST_ROWS:
        text.append(f"The first {_MOST_ROWS:,} of {len(by_image):,} images; `evaluation_images.csv` has all.")
    table = Section(
        f"images{after}",
        f"Image by image{where}",
        text,
        table=by_image[:_MOST_ROWS],
        columns=_IMAGE_COLUMNS,
    )
    sections = [result, stages, curve, table]
    examples = [] if images is None else _examples(one, images, model, classes)
    if examples:
        shown = (
            "The first images that an attack felled: as they are, attacked, and the perturbation alone, magnified "
            "around grey until its largest change is black or white."
        )
        sections.insert(3, Section(f"examples{after}", f"Adversarial images{where}", [shown], examples=examples))
    return sections


def _curve(one: Evaluation) -> Figure:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.svg"
        plot_curve(one.curve(), path)
        caption = (
            f"Share of the {len(one.labels)} images that stand after so many gradients spent on each, {_ball(one)}"
        )
        return Figure("Robust accuracy against gradients", caption, data_uri(path))


def _examples(one: Evaluation, images: Tensor, model: Any, classes: Sequence[str]) -> list[Example]:
    """The first images that an attack felled; none where they have other than 1 or 3 channels."""
    rows = (one.stage > 0).nonzero()[0][:_EXAMPLES]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(rows):
        return []
    chosen = torch.from_numpy(rows)
    clean, attacked = (batch[chosen.to(batch.device)] for batch in (images, one.x_adv))
    taken_for = (
        [""] * len(rows) if model is None else [_called(k, classes) for k in _predicted(model, attacked, one.seed)]
    )
    examples = []
    for row, before, after, wrong in zip(rows, clean.float().cpu(), attacked.float().cpu(), taken_for, strict=True):
        label = _called(int(one.labels[row]), classes)
        delta = after - before
        factor = 0.5 / max(float(delta.abs().max()), 1e-12)
        parts = [
            Part(_png(before), f"image {row}, {label}", label),
            Part(_png(after), f"image {row}, attacked", f"taken for {wrong}" if wrong else "attacked"),
            Part(_png(0.5 + factor * delta), f"perturbation of image {row}", f"perturbation times {factor:.3g}"),
        ]
        distance = printed("eps", float(one.distance[row]))
        cost = f"{one.forward[row]} evaluations of the model, {one.backward[row]} of its gradient"
        text = f"Image {row}: {one.stages[one.stage[row]]}, norm {distance}; {cost}"
        examples.append(Example(parts, text))
    return examples


def _predicted(model: Any, x: Tensor, seed: int) -> list[int]:
    """What a model takes images for; a random one by draws of the seed."""
    victim = Victim(model)
    device = victim.device or x.device
    with undisturbed(victim.module), isolated(device), ForkedGenerators(seed, device):
        labels: list[int] = victim.predict(x.to(device)).tolist()
    return labels


def _sentence(one: Evaluation, name: str) -> str:
    low, high = (_percent(end) for end in one.interval)
    return (
        f"{name} keeps {_percent(one.robust_accuracy)} of {len(one.labels)} images right (95 % interval {low} to "
        f"{high}) under perturbations of {_ball(one)}, against the attacks of the budget {one.budget}; "
        f"{_percent(one.clean_accuracy)} as they are."
    )


def _ball(one: Evaluation) -> str:
    return f"{'infinity' if np.isinf(one.norm) else f'{one.norm:g}'}-norm at most {printed('eps', float(one.eps))}"


def _interval(one: Evaluation) -> str:
    low, high = (_percent(end) for end in one.interval)
    return f"95 % interval {low} to {high}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _called(label: int, classes: Sequence[str]) -> str:
    return classes[label] if label < len(classes) else str(label)


def _is_numeric(column: pd.Series) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column))


def _as_order(value: Any) -> str:
    """A number as JavaScript reads it."""
    return repr(int(value)) if float(value).is_integer() else repr(float(value)).replace("inf", "1e999")


def _parts(flags: Any) -> list[str]:
    """Of a cell of flags."""
    return [flag for flag in re.split(r";\s*", flags) if flag] if isinstance(flags, str) else []


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")


def _prose(text: str) -> Markup:
    """Escaped, with what is between backticks as code."""
    pieces = str(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if number % 2 else escape(piece) for number, piece in enumerate(pieces)
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _png(image: Tensor) -> str:
    """An image (C, H, W), clipped to [0, 1], as the URI of a PNG file."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
    return _uri("image/png", file.getvalue())
