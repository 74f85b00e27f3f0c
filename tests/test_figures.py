import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from guardians.figures import (
    _PALETTE,
    _accuracy_figure,
    _frontier_figure,
    _perturbations_figure,
    plot_accuracy_by_const,
    plot_cost,
    plot_frontier,
    plot_perturbations,
)


@pytest.fixture
def frame():
    kinds = (("native", "auto"), ("native", "float32"), ("torchattacks", "float32"))
    keys = [(model, *kind, n) for model in ("standard", "trained") for kind in kinds for n in (1000, 100)]
    frame = pd.DataFrame(keys, columns=["model", "implementation", "precision", "n"])
    return frame.assign(steps=40, eps=8 / 255, seconds=0.01 * frame["n"])


def test_the_same_table_gives_the_same_file(frame, tmp_path):
    for name in ("a.png", "b.png"):
        plot_cost(frame, tmp_path / "new" / name)
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "new" / "b.png").read_bytes()
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.format == "PNG"
        assert image.size == (1050, 750)


def test_what_is_drawn(frame, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_cost(frame, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert "PGD-40" in axes.get_title()
    assert "8/255" in axes.get_title()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "number of images"
    assert axes.get_ylabel() == "time (s)"
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(lines) == 6
    assert list(lines["native, auto: standard"].get_xdata()) == [100, 1000]
    assert list(lines["native, auto: standard"].get_ydata()) == [1, 10]
    assert lines["torchattacks: standard"].get_linestyle() == "--"
    assert lines["native, auto: standard"].get_marker() != lines["native, auto: trained"].get_marker()


def test_one_threat_model_in_a_figure(frame, tmp_path):
    with pytest.raises(ValueError, match="2 combinations"):
        plot_cost(pd.concat([frame, frame.assign(steps=10)]), tmp_path / "a.png")
    with pytest.raises(ValueError, match="0 combinations"):
        plot_cost(frame[:0], tmp_path / "a.png")


KNOWN = ("native", "ART", "torchattacks", "foolbox", "foolbox DDN", "native, as in the paper")


@pytest.fixture
def frontier():
    columns = ["model", "implementation", "setting", "backward_per_image", "l2_penalised", "success_rate", "l2_best"]
    rows = [
        ("standard", "native", "10 x 10", 100.0, 0.2, 1.0, 0.15),
        ("standard", "native", "2 x 10", 20.0, 0.3, 0.9, 0.15),
        ("standard", "native", "9 x 1000", 9000.0, 0.16, 1.0, 0.15),
        ("standard", "ART", "5 x 5", 40.0, 0.5, 0.5, 0.15),
        ("trained", "native", "10 x 10", 100.0, 0.8, 1.0, 0.7),
        ("trained", "someone's", "1 x 50", 50.0, 0.9, 0.99, 0.7),
    ]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture
def consts():
    rows = [
        ("standard", 10.0, 0.0, 0.3),
        ("standard", 0.01, 1.0, float("nan")),
        ("standard", 1.0, 0.25, 0.2),
        ("trained", 0.01, 0.9, 0.1),
        ("trained", 10.0, 0.5, 0.7),
    ]
    return pd.DataFrame(rows, columns=["model", "const", "accuracy", "l2_mean"])


def perturbed(n=2, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, channels, 8, 6, generator=generator)
    adversarial = {
        key: (images + size * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        for key, size in (("c = 0.1", 0.01), ("c = 100", 0.1))
    }
    labels = [f"class {i}" for i in range(n)]
    predictions = {key: [f"{key}: {label}" for label in labels] for key in adversarial}
    return images, adversarial, {"labels": labels, "predictions": predictions}


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def hollow_of(axes):
    """Points of the markers with a white face, with their colour."""
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    return {(*point, line.get_color()) for line in hollow for point in zip(*line.get_data(), strict=True)}


def check_files(plot, folder, size):
    """The same bytes twice, in a folder that is made, as a PNG file of that size."""
    paths = [folder / "new" / name for name in ("a.png", "b.png")]
    for path in paths:
        plot(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as image:
        assert image.format == "PNG"
        assert image.size == size
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 10


def test_the_same_input_gives_the_same_frontier(frontier, tmp_path):
    check_files(lambda path: plot_frontier(frontier, path), tmp_path, (1500, 750))


def test_the_same_input_gives_the_same_perturbations(tmp_path):
    images, adversarial, names = perturbed()
    check_files(lambda path: plot_perturbations(images, adversarial, path, **names), tmp_path, (1350, 570))


def test_the_same_input_gives_the_same_accuracy(consts, tmp_path):
    check_files(lambda path: plot_accuracy_by_const(consts, path), tmp_path, (1500, 675))


def test_frontier_has_a_panel_for_each_model_and_a_sorted_line_for_each_implementation(frontier):
    left, right = _frontier_figure(frontier).axes
    assert (left.get_title(), right.get_title()) == ("standard", "trained")
    assert (left.get_xscale(), left.get_yscale()) == ("log", "linear")
    assert left.get_xlabel() == "gradient evaluations per image"
    assert left.get_ylabel() == r"mean $\ell_2$ norm"
    *names, best = lines_of(left)
    assert names == ["native", "ART"]
    native = lines_of(left)["native"]
    assert list(native.get_xdata()) == [20, 100, 9000]
    assert list(native.get_ydata()) == [0.3, 0.2, 0.16]
    assert list(lines_of(right)) == ["native", "someone's", best]
    assert list(lines_of(right)["someone's"].get_ydata()) == [0.9]
    assert {(text.get_text(), text.xy) for text in right.texts} == {("10 x 10", (100, 0.8)), ("1 x 50", (50, 0.9))}
    for axes, norm in ((left, 0.15), (right, 0.7)):
        assert lines_of(axes)[best].get_linestyle() == ":"
        assert set(lines_of(axes)[best].get_ydata()) == {norm}
        assert 0 <= axes.get_ylim()[0] < norm


def test_frontier_has_hollow_markers_exactly_where_images_withstand(frontier):
    figure = _frontier_figure(frontier)
    for axes in figure.axes:
        colours = {name: line.get_color() for name, line in lines_of(axes).items()}
        rows = frontier[(frontier["model"] == axes.get_title()) & (frontier["success_rate"] < 1)]
        columns = ["backward_per_image", "l2_penalised", "implementation"]
        assert hollow_of(axes) == {(x, y, colours[name]) for x, y, name in rows[columns].itertuples(index=False)}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == ["native", "ART", "someone's"]
    assert labels[-1] == "hollow: does not fool all images"

    figure = _frontier_figure(frontier.assign(success_rate=1.0))
    assert not any(hollow_of(axes) for axes in figure.axes)
    assert not any("hollow" in text.get_text() for text in figure.legends[0].get_texts())


def test_frontier_has_a_colour_of_the_palette_for_each_implementation(frontier):
    names = [*KNOWN, "one", "another"]
    rows = pd.concat([frontier[:1].assign(implementation=name) for name in names])
    (axes,) = _frontier_figure(rows).axes
    colours = [to_hex(lines_of(axes)[name].get_color()).upper() for name in names]
    assert sorted(colours) == sorted(_PALETTE)
    more = pd.concat([rows, frontier[:1].assign(implementation="a third")])
    (axes,) = _frontier_figure(more).axes
    assert lines_of(axes)["a third"].get_color() in _PALETTE


def test_frontier_has_the_same_colours_and_markers_in_all_panels(frontier):
    left, right = _frontier_figure(frontier[::-1]).axes
    for kind in ("color", "marker"):
        assert lines_of(left)["native"].properties()[kind] == lines_of(right)["native"].properties()[kind]


@pytest.mark.parametrize(("norms", "best", "bottom"), [([0.2, 1.2], 0.1, 0), ([1, 1.4], 0.9, 0.85), ([2, 2], 2, 1.8)])
def test_frontier_starts_just_below_the_smallest_norm_or_at_zero(frontier, norms, best, bottom):
    (axes,) = _frontier_figure(frontier[:2].assign(l2_penalised=norms, l2_best=best)).axes
    assert axes.get_ylim()[0] == pytest.approx(bottom)


def test_frontier_where_no_norm_is_finite(frontier):
    (axes,) = _frontier_figure(frontier[:2].assign(l2_penalised=np.nan, l2_best=np.nan)).axes
    assert axes.get_ylim()[0] == 0


def test_frontier_of_a_table_it_cannot_draw(frontier, tmp_path):
    with pytest.raises(ValueError, match="frame is empty"):
        plot_frontier(frontier[:0], tmp_path / "a.png")
    with pytest.raises(ValueError, match="backward_per_image must be positive"):
        plot_frontier(frontier.assign(backward_per_image=0.0), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"l2_best has 2 values for the model 'standard'"):
        plot_frontier(frontier.assign(model="standard"), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_perturbations_are_shown_around_mid_grey(channels):
    images, adversarial, names = perturbed(channels=channels)
    figure = _perturbations_figure(images, adversarial, **names, magnify=4)
    panels = np.array(figure.axes).reshape(2, 6)
    clipped = False
    for j in range(2):
        for i, attacked in enumerate(adversarial.values()):
            change = 0.5 + 4 * (attacked[j] - images[j])
            clipped |= bool((change > 1).any() and (change < 0).any())
            shown = zip(panels[j, 3 * i : 3 * i + 3], (images[j], attacked[j], change.clamp(0, 1)), strict=True)
            for axes, image in shown:
                (drawn,) = axes.images
                expected = image.permute(1, 2, 0).numpy() if channels == 3 else image[0].numpy()
                np.testing.assert_allclose(drawn.get_array(), expected, rtol=0, atol=1e-6)
                assert drawn.get_interpolation() == "nearest"
                assert (drawn.get_cmap().name, drawn.get_clim()) == ("gray", (0, 1))
                assert not len(axes.get_xticks())
                assert not len(axes.get_yticks())
    assert clipped


def test_texts_of_perturbations():
    images, adversarial, names = perturbed()
    adversarial["c = 0.1"] = images.clone()
    adversarial["c = 0.1"][1, 0, 0, 0] += 0.3
    adversarial["c = 0.1"][1, 2, 1, 1] -= 0.4
    figure = _perturbations_figure(images, adversarial, **names, magnify=10)
    panels = np.array(figure.axes).reshape(2, 6)
    assert [axes.get_title() for axes in panels[0]] == [
        f"{key}\n{name}" for key in adversarial for name in ("clean", "adversarial", "perturbation x 10")
    ]
    assert not any(axes.get_title() for axes in panels[1])
    captions = [axes.get_xlabel() for axes in panels[1]]
    norm = float((adversarial["c = 100"][1] - images[1]).norm())
    assert captions[:3] == ["class 1", "c = 0.1: class 1", "L2 0.50"]
    assert captions[3:] == ["class 1", "c = 100: class 1", f"L2 {norm:.2f}"]
    assert panels[0, 2].get_xlabel() == "L2 0.00"


def test_perturbations_of_inputs_that_do_not_fit(tmp_path):
    images, adversarial, names = perturbed()
    path = tmp_path / "a.png"
    for wrong in (images[0], images[:, :2], images[:0]):
        with pytest.raises(ValueError, match="images has the shape"):
            plot_perturbations(wrong, adversarial, path, **names)
    with pytest.raises(ValueError, match="adversarial is empty"):
        plot_perturbations(images, {}, path, **names)
    for wrong in (images[:1], images[..., :-1], images[:, :1]):
        with pytest.raises(
            ValueError, match=r"adversarial\['c = 100'\] has the shape .* that of images, \(2, 3, 8, 6\)"
        ):
            plot_perturbations(images, adversarial | {"c = 100": wrong}, path, **names)
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        plot_perturbations(images, adversarial, path, **names | {"labels": ["one"]})
    with pytest.raises(ValueError, match=r"0 predictions for 'c = 0.1', for 2 images"):
        plot_perturbations(images, adversarial, path, **names | {"predictions": {"c = 100": ["one", "two"]}})
    assert not path.exists()


def test_accuracy_and_norm_by_const(consts):
    left, right = _accuracy_figure(consts).axes
    assert (left.get_xscale(), right.get_xscale()) == ("log", "log")
    assert (left.get_xlabel(), right.get_xlabel()) == ("c", "c")
    assert left.get_ylabel() == "robust accuracy (%)"
    assert right.get_ylabel() == r"mean $\ell_2$ norm where fooled"
    assert (left.get_ylim()[0], right.get_ylim()[0]) == (0, 0)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["standard", "trained"]
    for axes, column, scale in ((left, "accuracy", 100), (right, "l2_mean", 1)):
        assert set(lines_of(axes)) == {"standard", "trained"}
        for model, line in lines_of(axes).items():
            rows = consts[consts["model"] == model].sort_values("const")
            assert list(line.get_xdata()) == list(rows["const"])
            assert line.get_ydata() == pytest.approx(scale * rows[column].to_numpy(), nan_ok=True)
    for model in ("standard", "trained"):
        assert lines_of(left)[model].get_color() == lines_of(right)[model].get_color()
    assert len({line.get_color() for line in left.lines}) == 2


def test_accuracy_by_const_of_a_table_it_cannot_draw(consts, tmp_path):
    with pytest.raises(ValueError, match="frame is empty"):
        plot_accuracy_by_const(consts[:0], tmp_path / "a.png")
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="const must be positive and finite"):
            plot_accuracy_by_const(consts.assign(const=wrong), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
