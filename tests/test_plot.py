import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minitrain
from minitrain import plot

pytest.importorskip("matplotlib")

COLUMNS = {
    "fit": [0, 0, 1],
    "epoch": [0, 1, 0],
    "train_loss": [0.9, 0.5, 0.4],
    "valid_loss": [0.8, None, 0.5],
    "valid_accuracy": [0.5, None, 0.7],
    "lr": [0.1, 0.1, 0.1],
}


def rows(n, layers):
    return torch.rand(n, layers, generator=torch.Generator().manual_seed(0)) + 0.5


def render(figure):
    """The picture as PNG, and whether everything is inside of it."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 >= -0.05
    assert box.y0 >= -0.05
    assert box.x1 <= width + 0.05
    assert box.y1 <= height + 0.05


def test_curves_show_losses_and_metrics_by_epoch_over_all_fits():
    figure = plot.curves(COLUMNS)
    render(figure)
    loss, metrics = figure.axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3]
    assert [text.get_text() for text in metrics.get_legend().get_texts()] == ["accuracy"]


def test_curves_tell_metrics_of_training_from_those_of_validation():
    columns = {"train_loss": [1.0, 0.5], "train_accuracy": [0.6, 0.8], "valid_accuracy": [0.5, 0.7]}
    _, metrics = plot.curves(columns).axes
    assert [line.get_label() for line in metrics.lines] == ["training accuracy", "accuracy"]


def test_curves_without_metrics_have_one_panel_and_without_anything_none_fails():
    assert len(plot.curves({"train_loss": [0.1], "valid_loss": [None]}).axes) == 1
    render(plot.curves({"train_loss": [], "valid_loss": []}))
    render(plot.curves({}))


@pytest.mark.parametrize("layers", [1, 5, 12])
def test_stats_name_few_layers_in_a_legend(layers):
    figure = plot.stats([f"body.{i}" for i in range(layers)], range(50), rows(50, layers), rows(50, layers))
    render(figure)
    assert [len(axes.lines) for axes in figure.axes] == [layers, layers]
    assert len(figure.axes[1].get_legend().get_texts()) == layers


def test_stats_show_many_layers_by_a_colour_bar():
    figure = plot.stats([f"body.{i}" for i in range(100)], range(50), rows(50, 100), rows(50, 100))
    render(figure)
    mean, std, bar = figure.axes
    assert std.get_legend() is None
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert (labels[0], labels[-1]) == ("body.0", "body.99")
    assert len({line.get_color() for line in mean.lines}) == 100


def test_stats_of_very_different_size_are_drawn_on_a_logarithmic_axis():
    scales = torch.tensor([1.0, 1e-6])
    assert plot.stats(["a", "b"], range(9), rows(9, 2), rows(9, 2) * scales).axes[1].get_yscale() == "log"
    assert plot.stats(["a", "b"], range(9), rows(9, 2), rows(9, 2)).axes[1].get_yscale() == "linear"


def test_stats_take_nan_zeros_single_rows_and_nothing():
    nan = float("nan")
    render(plot.stats(["a", "b"], [0, 1], [[nan, 0.0], [nan, 0.0]], [[nan, 0.0], [nan, 0.0]]))
    render(plot.stats(["a"], [0], [[1.0]], [[1.0]]))
    render(plot.stats(["a"], [], torch.empty(0, 1), torch.empty(0, 1)))
    render(plot.stats([], [], torch.empty(0, 0), torch.empty(0, 0)))


def test_stats_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="3 steps and 2 layers"):
        plot.stats(["a", "b"], range(3), rows(4, 2), rows(4, 2))


@pytest.mark.parametrize("layers", [1, 10, 100])
def test_depth_is_logarithmic_and_labels_stay_legible(layers):
    names = [f"layer{i}" for i in range(layers)]
    figure = plot.depth(names, [0.5 * 0.6**i for i in range(layers)], [1.0] * layers)
    render(figure)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert len(axes.get_xticks()) <= 30


def test_depth_takes_zeros_and_leaves_out_what_was_not_measured():
    nan = float("nan")
    figure = plot.depth(["a", "b"], [0.0, 0.1], [nan, nan])
    render(figure)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["before"]
    with pytest.raises(ValueError, match="2 names, 1 values before"):
        plot.depth(["a", "b"], [1.0], [1.0, 1.0])


def test_ax_and_save_are_used(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots(1, 2)
    assert plot.stats(["a"], [0, 1], rows(2, 1), rows(2, 1), ax=axes) is figure
    assert plot.curves(COLUMNS, ax=Figure().subplots()).axes[0].get_title() == "loss"
    file = io.BytesIO()
    plot.depth(["a"], [1.0], [1.0], save=file)
    assert file.getvalue().startswith(b"\x89PNG")
    plot.curves(COLUMNS, save=tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("ax", ["axes", [1, 2]])
def test_ax_that_is_none_is_refused(ax):
    with pytest.raises(ValueError, match="wanted matplotlib axes"):
        plot.curves(COLUMNS, ax=ax)
    with pytest.raises(ValueError, match="2 of them"):
        plot.stats(["a"], [0], rows(1, 1), rows(1, 1), ax=plot.curves({}).axes[0])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"minitrain\[plot\]"):
        plot.curves(COLUMNS)


def test_pyplot_is_not_used_and_matplotlib_only_when_drawing():
    code = (
        "import sys; from minitrain import plot; import minitrain.callbacks\n"
        "assert 'matplotlib' not in sys.modules and 'fastprogress' not in sys.modules\n"
        "plot.curves({'train_loss': [1.0]}); plot.stats(['a'], [0], [[1.0]], [[1.0]]); plot.depth(['a'], [1.0], [1.0])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(minitrain.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
