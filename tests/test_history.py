import csv
import math

import pytest

from minitrain.callbacks import History


def make_history():
    return History(
        [
            {
                "fit": 0,
                "epoch": 0,
                "train_loss": 0.1 + 0.2,
                "valid_loss": 1 / 3,
                "valid_acc": 0.5,
                "lr": 1e-3,
                "seconds": 2.0,
            },
            {"fit": 0, "epoch": 1, "train_loss": None, "lr": 1e-05, "seconds": 12345.6, "partial": True},
        ]
    )


def test_columns_come_in_the_documented_order_and_partial_last():
    assert make_history().columns == [
        *("fit", "epoch", "train_loss", "valid_loss", "valid_acc", "lr", "seconds", "partial"),
    ]


def test_partial_is_a_column_only_if_a_row_has_it():
    assert "partial" not in History(make_history()[:1]).columns
    assert History().columns == ["fit", "epoch", "train_loss", "valid_loss", "lr", "seconds"]


def test_what_a_callback_adds_to_a_row_stands_among_the_metrics():
    history = make_history()
    history[1]["perplexity"] = 3.0
    assert history.columns[4:6] == ["valid_acc", "perplexity"]


def test_to_dict_has_none_where_a_row_lacks_a_value():
    columns = make_history().to_dict()
    assert columns["valid_acc"] == [0.5, None]
    assert columns["partial"] == [None, True]
    assert list(columns) == make_history().columns


def test_csv_keeps_every_float_exactly_and_leaves_what_is_missing_empty(tmp_path):
    history = make_history()
    history.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == history.columns
    assert float(first["train_loss"]) == 0.1 + 0.2
    assert float(first["valid_loss"]) == 1 / 3
    assert (second["train_loss"], second["valid_loss"], second["partial"]) == ("", "", "True")


def test_csv_of_no_rows_is_a_header(tmp_path):
    History().to_csv(str(tmp_path / "run.csv"))
    assert (tmp_path / "run.csv").read_bytes() == b"fit,epoch,train_loss,valid_loss,lr,seconds\r\n"


def test_csv_replaces_a_file_at_once_and_leaves_no_other(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("old")
    with open(path) as reader:  # it goes on reading what it has opened
        make_history().to_csv(path)
        assert reader.read() == "old"
    assert path.read_text().startswith("fit,epoch")
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    class Bad:
        def __str__(self):
            raise OSError("no space left")

    path = tmp_path / "run.csv"
    path.write_text("old")
    history = make_history()
    history[1]["valid_acc"] = Bad()
    with pytest.raises(OSError, match="no space"):
        history.to_csv(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        make_history().to_csv(tmp_path / "nowhere" / "run.csv")


def test_print_shows_an_aligned_table_with_four_digits():
    lines = str(make_history()).splitlines()
    assert lines == [
        "fit  epoch  train_loss  valid_loss  valid_acc         lr    seconds  partial",
        "  0      0      0.3000      0.3333     0.5000   0.001000      2.000",
        "  0      1                                     1.000e-05  1.235e+04     True",
    ]


def test_a_column_that_nobody_has_is_not_shown():
    assert "valid_loss" not in str(History([{"fit": 0, "epoch": 0, "train_loss": 1234.0, "lr": 0.1, "seconds": 1.0}]))
    assert str(History()) == "no epochs yet"


def test_values_that_are_not_finite_are_shown():
    assert "nan" in str(History([{"fit": 0, "epoch": 0, "train_loss": math.nan}]))


def test_plot_gives_a_figure(tmp_path):
    figure = make_history().plot(save=tmp_path / "curves.png")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "metrics"]
    assert (tmp_path / "curves.png").stat().st_size > 1000
