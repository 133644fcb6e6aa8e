import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import minitrain
from minitrain import BatchLoader, Callback, DataLoaders, Learner
from minitrain.callbacks import Progress, progress
from minitrain.errors import CancelEpoch, CancelFit
from minitrain.metrics import Mean, accuracy

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class NoLength:
    def __iter__(self):
        return iter(BatchLoader(X, Y, batch_size=10))


class Act(Callback):
    """Call `act(learn)` in the second batch of the second epoch."""

    def __init__(self, act):
        self.act = act

    def after_batch(self, learn):
        if learn.training and (learn.epoch, learn.batch_idx) == (1, 1):
            self.act(learn)


def raiser(error):
    def act(learn):
        raise error

    return act


def make_learner(*cbs, train=None, valid=True, **kwargs):
    train = BatchLoader(X, Y, batch_size=10) if train is None else train
    dls = DataLoaders(train, BatchLoader(X, Y, batch_size=20) if valid else None)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return Learner(model, dls, nn.functional.cross_entropy, lr=0.00321, metrics=[accuracy], cbs=cbs, **kwargs)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("CI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


# -- one plain line an epoch ------------------------------------------------------------------------------------------

LINE = r"epoch {}/2  train_loss \d\.\d+  valid_loss \d\.\d+  valid_accuracy \d\.\d+  lr 0\.00321  \d+\.\d s"


def test_without_a_terminal_there_is_one_line_an_epoch(capsys):
    make_learner().fit(2)
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(LINE.format(1), first)
    assert re.fullmatch(LINE.format(2), second)


def test_progress_false_says_nothing(capsys):
    make_learner(progress=False).fit(1)
    assert capsys.readouterr().out == ""


def test_a_progress_among_the_callbacks_replaces_the_default_one(capsys):
    make_learner(Progress()).fit(1)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_validate_and_predict_by_themselves_are_quiet(capsys):
    learn = make_learner(Progress())
    learn.validate()
    learn.get_preds()
    learn.predict((X, Y))
    assert capsys.readouterr().out == ""


def test_an_early_stop_is_marked_with_its_reason(capsys):
    make_learner(Act(lambda learn: learn.stop("good enough"))).fit(2)
    assert re.fullmatch(LINE.format(2) + "  partial  stopped: good enough", capsys.readouterr().out.splitlines()[1])


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (ValueError("x"), "failed"),
        (CancelFit(), "cancelled"),
        (CancelEpoch(), "cancelled"),
    ],
)
def test_an_epoch_that_does_not_come_to_its_end_is_marked_once(capsys, error, how):
    learn = make_learner(Act(raiser(error)))
    with contextlib.suppress(KeyboardInterrupt, SystemExit, ValueError):
        learn.fit(2)
    assert capsys.readouterr().out.splitlines()[1:] == [f"epoch 2/2  {how}"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_the_exception_goes_on(error):
    with pytest.raises(type(error)) as info:
        make_learner(Act(raiser(error))).fit(2)
    assert info.value is error


def test_every_cancelled_epoch_is_marked(capsys):
    class Cancel(Callback):
        def before_epoch(self, learn):
            raise CancelEpoch

    make_learner(Cancel()).fit(2)
    assert capsys.readouterr().out.splitlines() == ["epoch 1/2  cancelled", "epoch 2/2  cancelled"]


def test_without_validation_its_columns_are_left_out(capsys):
    make_learner(valid=False).fit(1)
    assert "valid" not in capsys.readouterr().out


def test_another_rank_says_which_one_it_is(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    make_learner().fit(1)
    assert capsys.readouterr().out.startswith("[rank 1] epoch 1/1  train_loss")


def test_the_rank_of_a_process_group_counts(capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    assert progress._choose_display()._prefix == "[rank 3] "


def test_nothing_of_the_fit_is_kept(capsys):
    shown = Progress()
    make_learner(shown).fit(1)
    assert not any(isinstance(value, (Learner, progress._Lines)) for value in vars(shown).values())


# -- bars on a terminal: a real one, of which sys.stdout is the other end ---------------------------------------------


def on_terminal(action):
    """What `action()` writes to a terminal."""
    master, slave = pty.openpty()
    chunks = []

    def read():
        with contextlib.suppress(OSError):
            while chunk := os.read(master, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with open(slave, "w") as out, contextlib.redirect_stdout(out):
            action()
    finally:
        reader.join()
        os.close(master)
    return b"".join(chunks).decode()


def screen(text):
    """What stays to be seen after all carriage returns."""
    lines, column = [[]], 0
    for c in text:
        if c == "\n":
            lines.append([])
        elif c == "\r":
            column = 0
        else:
            line = lines[-1]
            line.extend(" " * (column - len(line)))
            line[column : column + 1] = c
            column += 1
    return ["".join(line).rstrip() for line in lines]


def slowly(monkeypatch, seconds):
    """A clock by which every look at it takes `seconds`."""
    now = [0.0]

    def clock():
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(progress.time, "perf_counter", clock)


def test_a_terminal_gets_bars_with_the_running_loss_and_a_table(monkeypatch):
    slowly(monkeypatch, 1.0)
    text = on_terminal(lambda: make_learner().fit(2))
    assert re.search(r"Epoch 1/2 : \|█+-+\| 50\.00% \[2/4 .*train loss \d\.\d+\]", text)
    assert re.search(r"Epoch 2/2 : \|█+-+\| 50\.00% \[1/2 .*valid loss 0\.\d+\]", text)
    head, first, second, *rest = screen(text)
    assert head.split() == ["epoch", "train_loss", "valid_loss", "valid_accuracy", "lr", "seconds"]
    assert re.fullmatch(r"1 +0\.\d+ +0\.\d+ +\d\.\d+ +0\.00321 +\d+\.\d", first)
    assert second.startswith("2 ")
    assert rest == [""]
    assert [m.start() for m in re.finditer(r"\S+", head)] == [m.start() for m in re.finditer(r"\S+", first)]


def test_every_bar_fills_the_terminal_so_that_nothing_of_a_longer_one_stays(monkeypatch):
    slowly(monkeypatch, 1.0)
    text = on_terminal(lambda: make_learner(train=[(X, Y)] * 20).fit(1))
    widths = {len(part) for part in re.split(r"[\r\n]", text) if part.endswith("]")}
    assert widths == {100}


def test_bars_are_redrawn_by_the_clock_and_the_loss_is_read_only_then(monkeypatch):
    read = [0]
    compute = Mean.compute

    def counting(self):
        read[0] += 1
        return compute(self)

    monkeypatch.setattr(Mean, "compute", counting)
    slowly(monkeypatch, 0.03)
    train = [(X, Y)] * 40
    drawn = on_terminal(lambda: make_learner(train=train, valid=False).fit(1)).count("train loss")
    assert 8 <= drawn <= 13  # 40 batches at 0.03 s are 1.2 s
    assert read[0] == drawn + 1  # and once for the history


def test_a_loader_without_a_length_has_a_bar_without_an_end(monkeypatch):
    slowly(monkeypatch, 1.0)
    text = on_terminal(lambda: make_learner(train=NoLength()).fit(1))
    assert "[3/? " in text
    assert screen(text)[1].startswith("1 ")


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(143), "interrupted"),
        (ValueError("x"), "failed"),
        (CancelFit(), "cancelled"),
        (CancelEpoch(), "cancelled"),
    ],
)
def test_a_bar_that_does_not_come_to_its_end_is_marked_and_closed(monkeypatch, error, how):
    slowly(monkeypatch, 1.0)

    def fit():
        with contextlib.suppress(KeyboardInterrupt, SystemExit, ValueError):
            make_learner(Act(raiser(error))).fit(2)

    text = on_terminal(fit)
    assert re.fullmatch(
        rf"Epoch 2/2 : \|█+-+\| (25\.00% \[1|50\.00% \[2)/4 .*train loss \d\.\d+ {how}\]", screen(text)[2]
    )
    assert text.endswith("\n")
    assert text.count(how) == 1


def test_an_error_between_two_bars_is_marked_too():
    class Fail(Callback):
        def before_train(self, learn):
            raise KeyboardInterrupt

    def fit():
        with pytest.raises(KeyboardInterrupt):
            make_learner(Fail()).fit(1)

    assert screen(on_terminal(fit)) == ["epoch 1/1  interrupted", ""]


def test_an_error_before_the_first_epoch_is_not_hidden():
    class Fail(Callback):
        def before_fit(self, learn):
            raise ValueError("mine")

    def fit():
        with pytest.raises(ValueError, match="mine"):
            make_learner(Fail()).fit(1)

    assert on_terminal(fit) == ""


def test_a_stop_is_said_below_the_table():
    lines = screen(on_terminal(lambda: make_learner(Act(lambda learn: learn.stop("good enough"))).fit(3)))
    assert lines[2].endswith(" partial")
    assert lines[3:] == ["stopped: good enough", ""]


def test_a_validation_by_a_callback_does_not_disturb_the_bar(monkeypatch):
    slowly(monkeypatch, 1.0)
    text = on_terminal(lambda: make_learner(Act(lambda learn: learn.validate())).fit(2))
    assert re.search(r"Epoch 2/2 : \|█+-+\| 75\.00% \[3/4 .*train loss", text)
    assert len(screen(text)) == 4


@pytest.mark.parametrize(
    ("name", "value", "bars"),
    [("CI", "true", False), ("CI", "false", True), ("CI", "0", True), ("TERM", "dumb", False), ("RANK", "0", True)],
)
def test_the_environment_may_ask_for_plain_lines(monkeypatch, name, value, bars):
    monkeypatch.setenv(name, value)
    text = on_terminal(lambda: make_learner().fit(1))
    assert ("\r" in text.replace("\r\n", "\n")) == bars


def test_without_fastprogress_there_are_plain_lines(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastprogress", None)
    assert on_terminal(lambda: make_learner().fit(1)).startswith("epoch 1/1  train_loss")


SCRIPT = """
import signal, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started deaf to it
from torch import nn
from minitrain import Callback, DataLoaders, Learner

class Slow(Callback):
    def after_batch(self, learn):
        time.sleep(0.02)

x = torch.zeros(4, 1)
learn = Learner(nn.Linear(1, 1), DataLoaders([(x, x)] * 500), nn.MSELoss(), cbs=[Slow()])
try:
    learn.fit(1)
except KeyboardInterrupt:
    print("caught")
"""


def test_a_real_interrupt_leaves_a_closed_and_marked_bar():
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(minitrain.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=slave, env=environment)
    os.close(slave)
    text, sent = b"", False
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 65536):
            text += chunk
            if not sent and b"train loss" in text:
                process.send_signal(signal.SIGINT)
                sent = True
    os.close(master)
    assert process.wait() == 0
    *_, marked, caught, end = screen(text.decode())
    assert marked.endswith("interrupted]")
    assert (caught, end) == ("caught", "")


# -- a notebook -------------------------------------------------------------------------------------------------------


class Shown:
    """Stands in for what IPython shows in one place of the output."""

    def __init__(self, thing):
        self.things = [thing]

    def update(self, thing):
        self.things.append(thing)


class Wrapped:
    def __init__(self, data, format=None):
        self.data, self.format = data, format

    def __str__(self):
        return str(self.data)


@pytest.fixture
def notebook(monkeypatch):
    """The places of the output, as a notebook would have them."""
    from fastprogress import fastprogress

    places = []

    def display(thing, display_id=False):
        places.append(Shown(thing))
        return places[-1]

    shown = types.ModuleType("IPython.display")
    shown.display, shown.HTML, shown.Image = display, Wrapped, Wrapped
    ipython = types.ModuleType("IPython")
    ipython.display, ipython.version_info = shown, (9, 0)  # matplotlib asks for the version
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    for name, value in {
        "IN_NOTEBOOK": True,
        "display": display,
        "HTML": Wrapped,
    }.items():  # 1.0.x imports them at the top
        monkeypatch.setattr(fastprogress, name, value, raising=False)
    return places


def html(thing):
    return thing._repr_html_() if hasattr(thing, "_repr_html_") else str(thing)


def all_html(places):
    return [
        html(thing) for place in places for thing in place.things if not isinstance(getattr(thing, "data", None), bytes)
    ]


def pictures(places):
    return [thing.data for place in places for thing in place.things if isinstance(getattr(thing, "data", None), bytes)]


def test_a_notebook_gets_two_bars_a_table_and_a_picture_of_the_losses(notebook, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    slowly(monkeypatch, 1.0)
    make_learner().fit(2)
    pages = all_html(notebook)
    assert any(page.count("<progress") == 2 and "train loss" in page for page in pages)
    final = next(html(place.things[-1]) for place in notebook if "train_loss" in html(place.things[-1]))
    assert final.count("<tr") == 3
    assert "<progress" not in final
    shown = pictures(notebook)
    assert len(shown) == 2
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
    assert sum(bool(pictures([place])) for place in notebook) == 1  # both in one place
    assert capsys.readouterr().out == ""


def test_without_matplotlib_a_notebook_has_no_picture_and_no_error(notebook, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    make_learner().fit(2)
    assert pictures(notebook) == []
    final = next(html(place.things[-1]) for place in notebook if "train_loss" in html(place.things[-1]))
    assert final.count("<tr") == 3
    assert "50.00%" not in final


@pytest.mark.parametrize(("error", "how"), [(KeyboardInterrupt(), "interrupted"), (CancelFit(), "cancelled")])
def test_a_bar_of_a_notebook_is_marked(notebook, error, how):
    learn = make_learner(Act(raiser(error)))
    with contextlib.suppress(KeyboardInterrupt):
        learn.fit(2)
    final = next(html(place.things[-1]) for place in notebook if "train_loss" in html(place.things[-1]))
    assert final.count("progress-bar-interrupted") == 2
    assert f"epoch 2/2 {how}" in final


def test_a_notebook_says_why_a_fit_was_stopped(notebook):
    make_learner(Act(lambda learn: learn.stop("good enough"))).fit(3)
    assert any("stopped: good enough" in html(place.things[-1]) for place in notebook)
