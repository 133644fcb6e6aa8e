import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minitrain
from minitrain import plot
from minitrain.init import InitReport, LayerRow

np = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

NAN, INF = float("nan"), float("inf")

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


def named(layers):
    """Names as long as those of a transformer."""
    return [f"encoder.layers.{i}.self_attention.out_proj" for i in range(layers)]


def labels(texts):
    return [text.get_text() for text in texts]


def mesh_of(axes):
    (mesh,) = axes.collections
    return mesh


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
    with pytest.raises(ValueError, match=r"std: shape \(2, 4\), wanted \(4, 2\)"):
        plot.stats(["a", "b"], range(4), rows(4, 2), rows(2, 4))


def test_stats_name_layers_that_begin_with_an_underscore_or_hold_a_dollar():
    figure = plot.stats(["_stem", "", "a$b$"], [0, 1], rows(2, 3), rows(2, 3))
    render(figure)
    assert labels(figure.axes[1].get_legend().get_texts()) == ["_stem", "(model)", r"a\$b\$"]


def test_stats_cut_a_very_long_name_in_its_middle():
    figure = plot.stats([f"{'very_' * 20}long.out_proj"], [0], rows(1, 1), rows(1, 1))
    render(figure)
    (label,) = labels(figure.axes[1].get_legend().get_texts())
    assert len(label) == 48
    assert label.startswith("very_very_")
    assert label.endswith("_long.out_proj")


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


@pytest.mark.parametrize("layers", [1, 10, 100])
def test_depth_draws_the_means_below_where_they_are_given(layers):
    before, after = rows(2, layers)
    figure = plot.depth(named(layers), before, after, mean_before=before - 1, mean_after=0 * after)
    render(figure)
    std, mean = figure.axes
    assert std.get_position().y0 > mean.get_position().y1
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    assert labels(std.get_legend().get_texts()) == ["before", "after"]
    zero, *lines = mean.lines
    assert zero.get_ydata() == [0, 0]
    assert [line.get_ydata().tolist() for line in lines] == [(before - 1).tolist(), [0] * layers]
    assert len(mean.get_xticks()) == -(-layers // -(-layers // 30))
    assert not std.xaxis.get_tick_params()["labelbottom"]  # the names stand below the means


def test_depth_of_means_of_very_different_size_is_logarithmic_on_both_sides():
    exploding = [(-4.0) ** i for i in range(12)]
    figure = plot.depth(named(12), [1.0] * 12, [1.0] * 12, mean_before=exploding, mean_after=[1e-9] * 12)
    render(figure)
    assert figure.axes[1].get_yscale() == "symlog"
    low, high = figure.axes[1].get_ylim()
    assert low < min(exploding) < max(exploding) < high


def test_depth_has_one_panel_without_means_and_on_one_axes():
    from matplotlib.figure import Figure

    assert len(plot.depth(["a"], [1.0], [1.0], mean_before=[NAN]).axes) == 1
    means = {"mean_before": [0.1], "mean_after": [0.0]}
    assert len(plot.depth(["a"], [1.0], [1.0], **means, ax=Figure().subplots()).axes) == 1
    assert [len(axes.lines) for axes in plot.depth(["a"], [1.0], [1.0], **means, ax=Figure().subplots(1, 2)).axes] == [
        3,
        3,
    ]
    with pytest.raises(ValueError, match=r"mean_after: shape \(2,\), wanted \(1,\)"):
        plot.depth(["a"], [1.0], [1.0], mean_after=[0.0, 0.0])


def test_a_report_of_an_initialisation_draws_mean_and_standard_deviation():
    from matplotlib.figure import Figure

    first = LayerRow("0", "Linear", "normalized", mean_before=0.2, std_before=0.5, mean_after=0.0, std_after=1.0)
    unmeasured = LayerRow("1", "Linear", "dead", mean_before=0.1, std_before=0.3)
    report = InitReport("Mine", (first, unmeasured, LayerRow("2", "Linear", "not called")))
    figure = report.plot()
    render(figure)
    values = [line.get_ydata().tolist() for axes in figure.axes for line in axes.lines[1:]]
    np.testing.assert_array_equal(values, [[0.5, 0.3], [1.0, NAN], [0.2, 0.1], [0.0, NAN]])
    assert [axes.get_title() for axes in report.plot(ax=Figure().subplots()).axes] == ["standard deviation by depth"]


@pytest.mark.parametrize("layers", [1, 10, 100])
def test_heatmap_shows_the_table_with_the_first_layer_on_top(layers):
    values = rows(50, layers)
    figure = plot.heatmap(named(layers), range(50), values, label="standard deviation")
    render(figure)
    axes, bar = figure.axes
    np.testing.assert_array_equal(mesh_of(axes).get_array(), values.T.double())
    low, high = axes.get_ylim()
    assert low > high
    ticks = labels(axes.get_yticklabels())
    assert ticks[0] == named(1)[0]
    assert ticks == named(layers)[:: -(-layers // 30)]
    assert bar.get_ylabel() == "standard deviation"
    assert (mesh_of(axes).cmap.name, type(mesh_of(axes).norm).__name__) == ("viridis", "Normalize")


def test_heatmap_puts_irregular_steps_where_they_belong():
    figure = plot.heatmap(["a"], torch.tensor([0, 2, 10]), [[1.0], [2.0], [3.0]])
    corners = mesh_of(figure.axes[0]).get_coordinates()
    assert corners[0, :, 0].tolist() == [-1, 1, 6, 14]
    assert corners[:, 0, 1].tolist() == [-0.5, 0.5]


def test_heatmap_chooses_the_scale_of_colours_by_the_values():
    def scale(*values, **options):
        mesh = mesh_of(plot.heatmap(["a"], range(len(values)), [[v] for v in values], **options).axes[0])
        return mesh.cmap.name, type(mesh.norm).__name__, mesh.norm.vmin, mesh.norm.vmax

    assert scale(1.0, 50.0) == ("viridis", "Normalize", 1, 50)
    assert scale(1.0, 51.0) == ("viridis", "LogNorm", 1, 51)
    assert scale(0.0, 1.0, 51.0) == ("viridis", "LogNorm", 1, 51)
    assert scale(1.0, 51.0, log=False) == ("viridis", "Normalize", 1, 51)
    assert scale(1.0, 2.0, log=True) == ("viridis", "LogNorm", 1, 2)
    assert scale(-1.0, 100.0) == ("PuOr", "TwoSlopeNorm", -100, 100)
    assert scale(-100.0, 1.0) == ("PuOr", "TwoSlopeNorm", -100, 100)
    assert scale(1.0, 100.0, limits=(0, 20)) == ("viridis", "Normalize", 0, 20)
    assert scale(-2.0, -1.0) == ("viridis", "Normalize", -2, -1)
    assert scale(1.0, 2.0, limits=(0, 4)) == ("viridis", "Normalize", 0, 4)
    assert scale(1.0, 2.0, limits=(-1, 4)) == ("PuOr", "TwoSlopeNorm", -1, 4)
    assert scale(1.0, 100.0, limits=(10, 20)) == ("viridis", "LogNorm", 10, 20)


def test_heatmap_leaves_gaps_where_there_is_no_value_and_on_a_logarithmic_scale_no_positive_one():
    values = [[1.0, NAN], [INF, 0.0], [100.0, -INF]]
    for log, gaps in ((None, [[0, 1, 0], [1, 1, 1]]), (False, [[0, 1, 0], [1, 0, 1]])):
        mesh = mesh_of(plot.heatmap(["a", "b"], range(3), values, log=log).axes[0])
        assert np.ma.getmaskarray(mesh.get_array()).astype(int).tolist() == gaps
    assert mesh.cmap(np.ma.masked_all(1))[0] == pytest.approx((0.86, 0.86, 0.86, 1), abs=0.02)


def test_heatmap_is_not_washed_out_by_a_few_values_and_says_so_at_the_colour_bar():
    values = rows(500, 2)
    values[7, 1] = 30
    mesh = mesh_of(plot.heatmap(["a", "b"], range(500), values).axes[0])
    assert mesh.norm.vmax < 1.6
    assert mesh.colorbar.extend in ("max", "both")
    assert (
        mesh_of(plot.heatmap(["a", "b"], range(50), values[:50, :1].repeat(1, 2)).axes[0]).colorbar.extend == "neither"
    )


def counts_of(layers, n_steps=20, bins=8):
    return torch.randint(0, 50, (n_steps, layers, bins + 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("layers", "panels"), [(1, 1), (10, 10), (24, 24), (100, 24)])
def test_histograms_have_a_panel_a_layer_up_to_24(layers, panels):
    names, counts, edges = named(layers), counts_of(layers), torch.linspace(-2, 2, 9)
    figure = plot.histograms(names, range(20), counts, edges)
    render(figure)
    *axes, bar = figure.axes
    assert len(axes) == panels
    assert figure.get_suptitle() == ("24 of 100 layers" if layers == 100 else "")
    titles = [panel.get_title().replace("\n", "") for panel in axes]
    assert (titles[0], titles[-1]) == (names[0], names[-1])
    assert bar.get_ylabel() == "fraction of the values"
    fractions = counts / counts.sum(-1, keepdim=True)
    for panel, title in zip(axes, titles, strict=True):
        below, inside, above = (mesh.get_array() for mesh in panel.collections)
        wanted = fractions[:, names.index(title)].T
        np.testing.assert_allclose(np.concatenate([below, inside, above]), wanted, rtol=1e-6)
        assert panel.collections[1].get_coordinates()[:, 0, 1].tolist() == edges.tolist()
        assert type(panel.collections[1].norm).__name__ == "LogNorm"
    assert len({panel.collections[0].norm for panel in axes}) == 1


def test_histograms_set_what_lies_outside_apart():
    axes = plot.histograms(["a"], range(3), counts_of(1, 3, 4), [0.0, 1.0, 2.0, 3.0, 4.0]).axes[0]
    below, inside, above = (mesh.get_coordinates()[:, 0, 1] for mesh in axes.collections)
    assert below.max() < inside.min() < inside.max() < above.min()
    ticks = labels(axes.get_yticklabels())
    assert (ticks[0], ticks[-1]) == ("< 0", "≥ 4")
    assert below.min() < axes.get_yticks()[0] < below.max()
    assert above.min() < axes.get_yticks()[-1] < above.max()


def test_histograms_of_absolute_values_have_a_logarithmic_axis():
    edges = torch.logspace(-8, 1, 9)
    figure = plot.histograms(["a", "b"], range(20), counts_of(2), edges, log_values=True)
    render(figure)
    axes = figure.axes[0]
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "|x|")
    heights = [np.ptp(np.log10(mesh.get_coordinates()[:, 0, 1])) for mesh in axes.collections]
    assert heights == pytest.approx([0.63, 9, 0.63], rel=1e-3)  # in paper's units: 7 % of the bins' decades
    with pytest.raises(ValueError, match="wanted positive ones"):
        plot.histograms(["a"], range(20), counts_of(1), range(9), log_values=True)


def test_histograms_of_very_different_widths_are_logarithmic_on_both_sides():
    far = torch.logspace(-4, 0, 5)
    figure = plot.histograms(["a"], range(20), counts_of(1, bins=9), [*-far.flip(0).double(), *far.double()])
    render(figure)
    assert figure.axes[0].get_yscale() == "symlog"


def test_histograms_leave_a_gap_for_a_step_without_values_and_none_for_an_empty_bin():
    figure = plot.histograms(["a"], [0, 1], [[[0, 0, 0, 0]], [[0, 3, 1, 0]]], [0.0, 1.0, 2.0])
    mesh = figure.axes[0].collections[1]
    assert np.ma.getmaskarray(mesh.get_array()).tolist() == [[True, False], [True, False]]
    below = figure.axes[0].collections[0]
    colours = below.to_rgba(below.get_array())[0]
    assert colours[1].tolist() == list(below.cmap(0.0))


def test_histograms_add_up_neighbours_of_very_many_steps():
    counts = counts_of(2, 1001, 4)
    figure = plot.histograms(["a", "b"], range(0, 2002, 2), counts, [0, 1, 2, 3, 4])
    mesh = figure.axes[1].collections[1]
    edges = mesh.get_coordinates()[0, :, 0]
    assert len(edges) == 335  # of 334 columns: three steps each
    assert edges[[0, 1, 2, -2, -1]].tolist() == [-1, 5, 11, 1997, 2001]
    first = counts[:3, 1].sum(0)
    np.testing.assert_allclose(mesh.get_array()[:, 0], (first / first.sum())[1:-1], rtol=1e-6)


@pytest.mark.parametrize("layers", [1, 10, 12])
def test_dead_draws_a_line_a_layer_up_to_twelve(layers):
    fraction = rows(50, layers) - 0.5
    figure = plot.dead(named(layers), range(50), fraction)
    render(figure)
    (axes,) = figure.axes
    assert (axes.get_title(), axes.get_ylim()) == ("dead units", (0, 1))
    assert labels(axes.get_legend().get_texts()) == named(layers)
    for i, line in enumerate(axes.lines):
        np.testing.assert_array_equal(line.get_ydata(), fraction[:, i].double())
    figure.draw_without_rendering()
    assert {"0 %", "100 %"} <= set(labels(axes.get_yticklabels()))


@pytest.mark.parametrize("layers", [13, 100])
def test_dead_draws_a_map_of_more_layers(layers):
    fraction = (rows(50, layers) - 0.5) / 2
    figure = plot.dead(named(layers), range(50), fraction)
    render(figure)
    axes, bar = figure.axes
    assert axes.get_title() == "dead units"
    assert (mesh_of(axes).norm.vmin, mesh_of(axes).norm.vmax) == (0, 1)
    np.testing.assert_array_equal(mesh_of(axes).get_array(), fraction.T.double())
    assert {"0 %", "100 %"} <= set(labels(bar.get_yticklabels()))


@pytest.mark.parametrize("layers", [1, 10, 100])
def test_gradient_flow_shows_median_band_first_and_last_step_by_depth(layers):
    norm = rows(41, layers) * 10.0 ** -torch.arange(layers).div(10)
    figure = plot.gradient_flow(named(layers), norm)
    render(figure)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    median, first, last = axes.lines
    np.testing.assert_allclose(median.get_ydata(), norm.median(0).values, rtol=1e-6)
    np.testing.assert_array_equal(first.get_ydata(), norm[0].double())
    np.testing.assert_array_equal(last.get_ydata(), norm[-1].double())
    bounds = [segment[:, 1] for segment in axes.collections[1].get_segments()]
    np.testing.assert_allclose(bounds, norm.quantile(torch.tensor([0.1, 0.9]), dim=0).T, rtol=1e-5)
    assert labels(axes.get_legend().get_texts()) == ["median", "10 to 90 % of the steps", "first step", "last step"]
    assert len(axes.get_xticks()) == -(-layers // -(-layers // 30))


def test_gradient_flow_leaves_out_what_is_no_positive_number():
    norm = [[1.0, NAN, 4.0], [INF, NAN, 0.0], [3.0, NAN, 4.0]]
    figure = plot.gradient_flow(["a", "b", "c"], norm)
    render(figure)
    median, _, _ = figure.axes[0].lines
    np.testing.assert_array_equal(median.get_ydata(), [2, NAN, 4])
    assert len(figure.axes[0].collections[1].get_segments()) == 2


def test_schedule_draws_rates_and_momenta_by_step():
    figure = plot.schedule({"lr": [0.1, 0.2, 0.1], "lr 1": [0.2, None, 0.2], "momentum": [0.9, 0.8, 0.9], "loss": [9]})
    render(figure)
    lr, momentum = figure.axes
    assert (lr.get_title(), momentum.get_title(), lr.get_xlabel()) == ("learning rate", "momentum", "optimiser step")
    assert [line.get_ydata().tolist() for line in momentum.lines] == [[0.9, 0.8, 0.9]]
    np.testing.assert_array_equal(lr.lines[1].get_ydata(), [0.2, NAN, 0.2])
    assert lr.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert labels(lr.get_legend().get_texts()) == ["lr", "lr 1"]
    assert momentum.get_legend() is None
    assert (lr.get_yscale(), lr.get_ylim()[0]) == ("linear", 0)


def test_schedule_has_one_panel_where_there_is_no_momentum():
    from matplotlib.figure import Figure

    assert len(plot.schedule({"lr": [0.1, 0.1], "momentum": [NAN, NAN]}).axes) == 1
    assert len(plot.schedule({"lr": [0.1], "momentum": [0.9]}, ax=Figure().subplots()).axes) == 1
    render(plot.schedule({}))
    with pytest.raises(ValueError, match=r"columns\['lr'\]: shape \(1, 2\), wanted one dimension"):
        plot.schedule({"lr": [[0.1, 0.2]]})


def test_schedule_of_very_different_rates_is_logarithmic():
    figure = plot.schedule({f"lr {i}": [1e-3 / (i + 1) ** 2, 1e-1 / (i + 1) ** 2, 1e-12] for i in range(12)})
    render(figure)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] > 1e-9  # a last rate of almost nothing does not squash the others
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_lr_find_keeps_a_tail_that_explodes_from_squashing_the_rest():
    rates = torch.logspace(-6, 1, 100)
    losses = 2.3 - 1.5 / (1 + 3e-3 / rates)
    losses[0], losses[80:], losses[-5:] = 50.0, 1e9, NAN
    figure = plot.lr_find(rates, losses, suggestions={"steepest": 3e-3, "valley": 1e-2, "none": None, "nan": NAN})
    render(figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    low, high = axes.get_ylim()
    assert low < losses[1:80].min() < losses[1:80].max() < high < 4
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), rates.double())
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), losses.double())
    assert labels(axes.get_legend().get_texts()) == ["steepest: 0.003", "valley: 0.01"]
    steepest, point, *_ = axes.lines[1:]
    assert steepest.get_xdata() == [3e-3, 3e-3]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (3e-3, pytest.approx(1.55, rel=1e-2))


def test_lr_find_marks_a_rate_between_two_steps_on_the_curve_as_it_is_drawn():
    point = plot.lr_find([1e-4, 1e-2], [2.0, 1.0], suggestions={"here": 1e-3}).axes[0].lines[2]
    assert point.get_ydata()[0] == pytest.approx(1.5)


@pytest.mark.parametrize("losses", [[], [1.0], [NAN, INF], [1.0, 1.0], [1.0, 1e6, 1e9], [-3.0, -2.0], [0.0, 0.0, INF]])
def test_lr_find_takes_few_losses_and_those_that_diverge_at_once(losses):
    rates = [10.0 ** (i - 4) for i in range(len(losses))]
    figure = plot.lr_find(rates, losses, suggestions={"steepest": 1e-3})
    render(figure)
    low, high = figure.axes[0].get_ylim()
    assert all(low <= loss for loss in losses if loss == loss)
    assert not losses or losses[0] != losses[0] or high < 4


def clipped(table):
    return np.where(np.isfinite(table), np.clip(table, 0, 1), table)


DRAW = {  # each function, given a table of shape (steps, layers)
    "stats": lambda names, steps, table: plot.stats(names, steps, table, table),
    "heatmap": plot.heatmap,
    "heatmap, log": lambda *args: plot.heatmap(*args, log=True),
    "heatmap, limits": lambda *args: plot.heatmap(*args, limits=(-1, 2)),
    "dead": lambda names, steps, table: plot.dead(names, steps, clipped(table)),
    "gradient_flow": lambda names, steps, table: plot.gradient_flow(names, table),
    "histograms": lambda names, steps, table: plot.histograms(
        names, steps, abs(table)[..., None].repeat(4, -1), [0, 1, 2]
    ),
    "schedule": lambda names, steps, table: plot.schedule({"lr": table[:, 0], "momentum": table[:, -1]}),
    "lr_find": lambda names, steps, table: plot.lr_find([10.0**-i for i in steps], table[:, 0]),
}


@pytest.mark.parametrize("values", [[NAN], [INF], [0.0], [-1.0], [NAN, INF, -INF, 0.0, 1.0, -1.0, 3e38, 1e-45]])
@pytest.mark.parametrize("draw", DRAW)
def test_nothing_fails_or_warns_on_values_that_cannot_be_drawn(draw, values):
    for n_steps, layers in ((0, 1), (1, 1), (3, 13)):
        names, table = [f"layer{i}" for i in range(layers)], np.resize(values, (n_steps, layers))
        DRAW[draw](names, range(n_steps), table).savefig(io.BytesIO(), dpi=20)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 1.0, -1.0, 3e38, 1e-45])
def test_depth_takes_any_value(value):
    values = [value, 0.5, value]
    render(plot.depth(["a", "b", "c"], values, values, mean_before=values, mean_after=[value] * 3))


BAD = {
    "steps.*shape": lambda: plot.heatmap(["a"], [[0, 1]], [[1.0], [1.0]]),
    r"steps\[2\]=1, wanted a finite number above": lambda: plot.heatmap(["a"], [0, 1, 1], [[1.0]] * 3),
    r"steps\[0\]=nan": lambda: plot.dead(["a"], [NAN], [[1.0]]),
    r"values: shape \(3, 2\), wanted \(2, 3\): 2 steps and 3 layers": lambda: plot.heatmap("abc", [0, 1], rows(3, 2)),
    "values: wanted numbers": lambda: plot.heatmap(["a"], [0, 1], [["x"], ["y"]]),
    r"values: wanted numbers.*inhomogeneous": lambda: plot.heatmap(["a"], [0, 1], [[1.0], [1.0, 2.0]]),
    r"limits=\(1, 1\), wanted two finite numbers": lambda: plot.heatmap(["a"], [0], [[1.0]], limits=(1, 1)),
    r"limits=\(0, 1\), wanted two positive": lambda: plot.heatmap(["a"], [0], [[1.0]], log=True, limits=(0, 1)),
    r"limits: shape \(1,\), wanted \(2,\)": lambda: plot.heatmap(["a"], [0], [[1.0]], limits=(0,)),
    r"counts: shape \(3, 1, 10\), wanted \(3, 1, 9\).*one a bin": lambda: plot.histograms(
        ["a"], range(3), counts_of(1, 3), range(8)
    ),
    "counts: the lowest is -1": lambda: plot.histograms(["a"], [0], [[[0, -1, 0]]], [0, 1]),
    r"edges\[2\]=0.5": lambda: plot.histograms(["a"], [0], [[[0, 1, 0, 0]]], [0, 1, 0.5]),
    r"edges=\[0\], wanted two or more": lambda: plot.histograms(["a"], [0], [[[0, 1]]], [0]),
    r"fraction\[0, 1\]=40, wanted fractions in \[0, 1\]": lambda: plot.dead(["a", "b"], [0], [[0.4, 40.0]]),
    r"fraction: shape \(1, 2\)": lambda: plot.dead(["a"], [0], [[0.4, 0.4]]),
    r"norm: shape \(2,\), wanted \(2, 3\)": lambda: plot.gradient_flow(["a", "b", "c"], [1.0, 1.0]),
    r"rates\[1\]=0.0, wanted a positive": lambda: plot.lr_find([0.1, 0.0], [1.0, 1.0]),
    r"losses: shape \(1,\), wanted \(2,\)": lambda: plot.lr_find([0.1, 0.2], [1.0]),
    r"suggestions\['valley'\]=-1.0": lambda: plot.lr_find([0.1], [1.0], suggestions={"valley": -1}),
    r"names=\[\], wanted at least one": lambda: plot.heatmap([], [0], [[]]),
    r"ax=\[.*wanted matplotlib axes, 2 of them": lambda: plot.histograms(
        ["a", "b"], range(3), counts_of(2, 3), range(9), ax=plot.curves({}).axes
    ),
    "wanted matplotlib axes, 1 of them": lambda: plot.gradient_flow(["a"], [[1.0]], ax=3),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_tensors_of_any_kind_are_taken():
    values = rows(3, 2).bfloat16().requires_grad_()
    mesh = mesh_of(plot.heatmap(["a", "b"], torch.arange(3), values).axes[0])
    np.testing.assert_array_equal(mesh.get_array(), values.detach().double().T)


@pytest.mark.parametrize("draw", DRAW)
def test_every_function_draws_on_given_axes_and_saves(draw, tmp_path):
    name, table = draw.split(",")[0], np.full((3, 2), 0.5)
    arguments = {
        "stats": (["a", "b"], range(3), table, table),
        "gradient_flow": (["a", "b"], table),
        "histograms": (["a", "b"], range(3), np.ones((3, 2, 4)), [0, 1, 2]),
        "schedule": ({"lr": [0.1], "momentum": [0.9]},),
        "lr_find": ([0.1, 0.2], [1.0, 0.9]),
        "depth": (["a", "b"], [1.0, 1.0], [1.0, 1.0]),
    }.get(name, (["a", "b"], range(3), table))
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    part = figure.subfigures(1, 2)[1]
    axes = part.subplots(1, 2)
    several = name in ("stats", "histograms", "schedule")
    ax = axes if several else axes[1]
    assert getattr(plot, name)(*arguments, ax=ax, save=tmp_path / "x.png") is figure
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert [axes[0].has_data(), axes[1].has_data()] == [several, True]


def test_a_map_of_many_cells_is_small_in_a_vector_file(tmp_path):
    plot.heatmap(named(100), range(500), rows(500, 100), save=tmp_path / "map.pdf")
    assert (tmp_path / "map.pdf").stat().st_size < 1_000_000


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


def test_the_public_names_are_sorted_and_drawn_here():
    assert plot.__all__ == sorted(plot.__all__)
    assert all(getattr(plot, name).__module__.startswith("minitrain.plot.") for name in plot.__all__)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "numpy", None)  # it comes with matplotlib, not with torch
    n_arguments = {"curves": 1, "schedule": 1, "lr_find": 2, "gradient_flow": 2, "histograms": 4, "stats": 4}
    for name in plot.__all__:
        with pytest.raises(ImportError, match=r"minitrain\[plot\]"):
            getattr(plot, name)(*[{}] * n_arguments.get(name, 3))


def test_pyplot_is_not_used_and_matplotlib_only_when_drawing():
    code = (
        "import sys; from minitrain import plot; import minitrain.callbacks\n"
        "assert 'matplotlib' not in sys.modules and 'fastprogress' not in sys.modules\n"
        "plot.curves({'train_loss': [1.0]}); plot.schedule({'lr': [0.1]}); plot.lr_find([0.1], [1.0])\n"
        "plot.stats(['a'], [0], [[1.0]], [[1.0]]); plot.dead(['a'], [0], [[0.5]]); plot.heatmap(['a'], [0], [[1.0]])\n"
        "plot.histograms(['a'], [0], [[[0, 1, 0]]], [0, 1]); plot.gradient_flow(['a'], [[1.0]])\n"
        "plot.depth(['a'], [1.0], [1.0])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(minitrain.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
