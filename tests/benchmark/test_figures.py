import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from guardians.benchmark.figures import plot_cost
from guardians.benchmark.throughput import COST_COLUMNS


@pytest.fixture
def frame():
    rows = []
    for model in ("standard", "trained"):
        for implementation, precision in (("native", "auto"), ("native", "float32"), ("torchattacks", "float32")):
            for n in (1000, 100):
                rows.append(row("images", model, implementation, precision, n, None, 0.01 * n))
    for implementation, precision in (("native", "auto"), ("torchattacks", "float32")):
        for share in (0.0, 0.5, 1.0):
            rows.append(row("robustness", "trained", implementation, precision, 50, share, 1 + share))
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


def row(study, model, implementation, precision, n, share, seconds):
    is_native = implementation == "native"
    values = [study, model, implementation, is_native, precision, 40, 8 / 255, n, share, 3, seconds, seconds / n]
    return dict(zip(COST_COLUMNS, values, strict=True))


def test_the_same_table_gives_the_same_file(frame, tmp_path):
    for name in ("a.png", "b.png"):
        plot_cost(frame, tmp_path / "new" / name)
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "new" / "b.png").read_bytes()
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.format == "PNG"
        assert image.size == (1650, 750)


def test_what_is_drawn(frame, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_cost(frame, tmp_path / "a.png")
    left, right = figures[0].axes
    assert "PGD-40" in figures[0].get_suptitle()
    assert "8/255" in figures[0].get_suptitle()
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert left.get_xlabel() == "number of images"
    assert left.get_ylabel() == "time (s)"
    assert right.get_ylabel() == "time per image (ms)"
    assert "trained" in right.get_title()
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == [text.get_text() for text in left.get_legend().get_texts()]
    assert len(lines) == 6
    assert list(lines["native, auto: standard"].get_xdata()) == [100, 1000]
    assert list(lines["native, auto: standard"].get_ydata()) == [1, 10]
    assert lines["torchattacks: standard"].get_linestyle() == "--"
    assert lines["native, auto: standard"].get_marker() != lines["native, auto: trained"].get_marker()
    native, toolkit = right.lines
    assert list(native.get_xdata()) == [0, 50, 100]
    assert list(toolkit.get_ydata()) == pytest.approx([20, 30, 40])


def test_one_threat_model_in_a_figure(frame, tmp_path):
    with pytest.raises(ValueError, match="2 combinations"):
        plot_cost(pd.concat([frame, frame.assign(steps=10)]), tmp_path / "a.png")
    with pytest.raises(ValueError, match="0 combinations"):
        plot_cost(frame[:0], tmp_path / "a.png")
