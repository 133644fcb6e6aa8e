"""`Checkpoint`: files by the epoch, the step or the clock, which of them stay, and what happens when writing fails."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from test_resume import X, learner, same

from minitrain import BatchLoader, Callback, CancelEpoch, CheckpointError, DataLoaders, Learner, checkpoint, folder
from minitrain.callbacks import Checkpoint
from minitrain.metrics import Mean, accuracy


def keeping(path, **options):
    return Checkpoint(path, **dict(async_write=False, keep_last=None) | options)


def names(path):
    return sorted(p.name for p in path.iterdir() if p.name != ".lock")


def numbers(path):
    return [(n, p.name.split("-", 1)[1]) for n, p in folder.numbered(path)]


class FailWrites:
    """Make the given writes fail, counted from 0."""

    def __init__(self, monkeypatch, *failing, error=None):
        self.n = -1
        error = error or OSError(errno.ENOSPC, "No space left on device")

        def fsync(fd):
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)  # and not the folder
            self.n += is_file
            if is_file and self.n in failing:
                raise error

        monkeypatch.setattr(os, "fsync", fsync)


# -- when -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_epoch(tmp_path, asynchronous):
    learner(keeping(tmp_path, async_write=asynchronous)).fit(3)
    assert names(tmp_path) == [f"00000{n}-epoch{n}-batch0.ckpt" for n in (1, 2, 3)]


def test_every_few_steps_and_at_the_end(tmp_path):
    learner(keeping(tmp_path, every=4)).fit(2)
    assert numbers(tmp_path) == [
        (1, "epoch0-batch4.ckpt"),
        (2, "epoch1-batch2.ckpt"),
        (3, "epoch1-batch6.ckpt"),
        (4, "epoch2-batch0.ckpt"),
    ]


def test_steps_are_those_of_the_optimiser(tmp_path):
    from faults.victim import Accumulate

    learner(Accumulate(3), keeping(tmp_path, every=1)).fit(1)
    assert numbers(tmp_path) == [(1, "epoch0-batch3.ckpt"), (2, "epoch0-batch6.ckpt"), (3, "epoch1-batch0.ckpt")]


def test_batches_are_counted_where_an_overridden_train_batch_counts_no_steps(tmp_path):
    class Own(Learner):
        def train_batch(self):
            self.loss = self.loss_func(self.model(self.xb), self.yb)

    dls = DataLoaders(BatchLoader(X, X, batch_size=4))
    Own(torch.nn.Linear(1, 1), dls, torch.nn.MSELoss(), cbs=[keeping(tmp_path, every=4)], progress=False).fit(1)
    assert numbers(tmp_path) == [(1, "epoch0-batch4.ckpt"), (2, "epoch1-batch0.ckpt")]


def test_by_the_clock_that_only_goes_forward(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("minitrain.callbacks.checkpoint.time.monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -1e9)  # the clock on the wall, which is not asked

    class Tick(Callback):
        def after_batch(self, learn):
            now[0] += 4

    learner(Tick(), keeping(tmp_path, every=timedelta(seconds=10))).fit(1)
    assert numbers(tmp_path) == [(1, "epoch0-batch3.ckpt"), (2, "epoch0-batch6.ckpt"), (3, "epoch1-batch0.ckpt")]


def test_the_last_epoch_of_a_stopped_fit_is_kept(tmp_path):
    class Stop(Callback):
        def after_batch(self, learn):
            learn.stop("enough")

    learner(Stop(), keeping(tmp_path, every=100)).fit(5)
    assert numbers(tmp_path) == [(1, "epoch1-batch0.ckpt")]


def test_what_falls_due_while_a_file_is_being_written_is_taken_up_later(tmp_path, monkeypatch):
    go, write = threading.Event(), checkpoint.write

    def slow(*args, **kwargs):
        go.wait(10)
        write(*args, **kwargs)

    class Release(Callback):
        order = -1

        def after_batch(self, learn):
            if learn.step_idx == 4:
                go.set()
                cb = next(cb for cb in learn.cbs if isinstance(cb, Checkpoint))
                cb._writing.result(10)

    monkeypatch.setattr(checkpoint, "write", slow)
    learner(Release(), keeping(tmp_path, every=1, async_write=True)).fit(1)
    assert numbers(tmp_path)[:2] == [(1, "epoch0-batch1.ckpt"), (2, "epoch0-batch4.ckpt")]


def test_what_is_written_is_the_state_of_its_moment_whatever_training_does_meanwhile(tmp_path, monkeypatch):
    """Every file of a run that writes beside training equals that of a run that waits."""
    write = checkpoint.write

    def slow(*args, **kwargs):
        time.sleep(0.01)
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write", slow)
    learner(keeping(tmp_path / "a", every="epoch", async_write=True)).fit(3)
    learner(keeping(tmp_path / "b", every="epoch")).fit(3)
    for a, b in zip(sorted((tmp_path / "a").glob("0*")), sorted((tmp_path / "b").glob("0*")), strict=True):
        a, b = checkpoint.read(a), checkpoint.read(b)
        assert all(a["model"][name].equal(b["model"][name]) for name in b["model"])
        assert str(a["optimizers"]) == str(b["optimizers"])


# -- which stay -------------------------------------------------------------------------------------------------------


def test_the_newest_files_stay(tmp_path):
    learner(keeping(tmp_path, keep_last=2)).fit(5)
    assert names(tmp_path) == ["000004-epoch4-batch0.ckpt", "000005-epoch5-batch0.ckpt"]


def test_the_numbers_go_on_over_runs_so_that_the_newest_file_is_the_last_written(tmp_path):
    learner(keeping(tmp_path)).fit(2)
    first = tmp_path / "000001-epoch1-batch0.ckpt"
    os.utime(first, (2e9, 2e9))
    learner(keeping(tmp_path)).fit(2, resume=first)
    assert [n for n, _ in numbers(tmp_path)] == [1, 2, 3]
    path, state = folder.newest(tmp_path)
    assert path.name == "000003-epoch2-batch0.ckpt"
    assert state["position"]["epoch"] == 2


class Losses(Callback):
    """Put given values into the rows of the history, before anybody reads them."""

    def __init__(self, *values, name="valid_loss"):
        self.values, self.name = values, name

    def after_epoch(self, learn):
        learn.history[-1][self.name] = self.values[learn.epoch]


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [(None, [3.0, 1.0, 2.0, 1.0], 2), ("max", [3.0, 1.0, 4.0, 4.0], 3), (None, [float("nan"), 5.0, 7.0, None], 2)],
)
def test_the_best_epoch_is_kept(tmp_path, mode, values, best):
    cb = keeping(tmp_path, keep_last=1, mode=mode)
    learner(Losses(*values), cb, valid=True).fit(4)
    assert names(tmp_path) == ["000004-epoch4-batch0.ckpt", "best.ckpt"]
    assert checkpoint.read(tmp_path / "best.ckpt")["position"]["epoch"] == best
    assert cb.best == values[best - 1]
    loaded = learner(valid=True)
    loaded.load(tmp_path / "best.ckpt")
    assert len(loaded.history) == best


def test_the_best_value_survives_a_resume(tmp_path):
    learner(Losses(1.0, 5.0), keeping(tmp_path), valid=True).fit(2)
    cb = keeping(tmp_path)
    learner(Losses(1.0, 5.0, 2.0), cb, valid=True).fit(3, resume="auto")
    assert cb.best == 1.0
    assert checkpoint.read(tmp_path / "best.ckpt")["position"]["epoch"] == 1


def test_a_new_fit_has_its_own_best(tmp_path):
    cb = keeping(tmp_path)
    learn = learner(Losses(1.0, 1.0), cb, valid=True)
    learn.fit(1)
    learn.cbs = [Losses(3.0), cb]
    learn.fit(1)
    assert cb.best == 3.0


def test_the_best_file_is_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    learner(keeping(tmp_path), valid=True).fit(1)
    assert checkpoint.read(tmp_path / "best.ckpt")["position"]["epoch"] == 1


def test_a_metric_says_which_way_is_better(tmp_path):
    def run(metric, **options):
        y = (X[:, 0] > 0).long()
        dls = DataLoaders(BatchLoader(X, y, batch_size=4), BatchLoader(X, y, batch_size=4))
        cb = keeping(tmp_path, **options)
        learn = Learner(
            torch.nn.Linear(1, 2),
            dls,
            torch.nn.functional.cross_entropy,
            cbs=[cb],
            metrics=[metric],
            progress=False,
            seed=0,
        )
        learn.fit(1)
        return cb

    def error(preds, targets):
        return (preds.argmax(1) != targets).float().mean()

    assert run(accuracy, keep_best="valid_accuracy")._monitor.mode == "max"
    assert run(error, keep_best="valid_error", mode="min")._monitor.mode == "min"
    with pytest.raises(ValueError, match=r"keep_best='valid_error': whether a high or a low value is better"):
        run(error, keep_best="valid_error")
    with pytest.raises(ValueError, match=r"keep_best='valid_acc': .* train_loss, valid_loss, valid_accuracy"):
        run(accuracy, keep_best="valid_acc")
    better = Mean(error)
    better.func.higher_is_better = False
    assert run(better, keep_best="valid_error")._monitor.mode == "min"


def test_without_a_validation_there_is_no_best(tmp_path):
    learner(keeping(tmp_path)).fit(1)
    assert not (tmp_path / "best.ckpt").exists()
    with pytest.raises(ValueError, match="keep_best='valid_accuracy'"):
        learner(keeping(tmp_path, keep_best="valid_accuracy")).fit(1)
    learner(keeping(tmp_path, keep_best="train_loss")).fit(1)
    assert (tmp_path / "best.ckpt").exists()


def test_a_cancelled_epoch_is_not_taken_for_the_one_before(tmp_path):
    class Cancel(Callback):
        def before_epoch(self, learn):
            if learn.epoch == 1:
                raise CancelEpoch

    cb = keeping(tmp_path, keep_best="train_loss")
    learner(Cancel(), Losses(1.0, 0.0, 3.0, name="train_loss"), cb).fit(3)
    assert cb.best == 1.0
    assert numbers(tmp_path)[1] == (2, "epoch2-batch0.ckpt")


# -- when writing fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_failed_write_warns_and_keeps_what_there_was(tmp_path, monkeypatch, asynchronous):
    FailWrites(monkeypatch, 1)
    with pytest.warns(UserWarning, match=r"No space left.*The checkpoints from before are kept"):
        learner(keeping(tmp_path, keep_last=1, async_write=asynchronous)).fit(2)
    assert names(tmp_path) == ["000001-epoch1-batch0.ckpt"]
    checkpoint.read(tmp_path / "000001-epoch1-batch0.ckpt")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_failed_writes_in_a_row_raise(tmp_path, monkeypatch, asynchronous):
    FailWrites(monkeypatch, 1, 2)
    with (
        pytest.warns(UserWarning, match="No space left"),
        pytest.raises(CheckpointError, match="No space left") as error,
    ):
        learner(keeping(tmp_path, async_write=asynchronous)).fit(6)
    assert isinstance(error.value.__cause__, OSError)
    assert names(tmp_path) == ["000001-epoch1-batch0.ckpt"]


def test_failures_that_are_not_in_a_row_do_not_raise(tmp_path, monkeypatch):
    FailWrites(monkeypatch, 0, 2, 4)
    with pytest.warns(UserWarning, match="No space left"):
        learner(keeping(tmp_path)).fit(6)
    assert len(names(tmp_path)) == 3


def test_a_state_that_cannot_be_kept_raises_at_once(tmp_path):
    class Bad(Callback):
        def state_dict(self):
            return {"net": torch.nn.Linear(1, 1)}

        def load_state_dict(self, state):
            raise NotImplementedError

    with pytest.raises(CheckpointError, match=r"callbacks\.Bad\.net"):
        learner(Bad(), keeping(tmp_path, async_write=True)).fit(2)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"folder=.*cannot be made or written to"):
        learner(keeping(tmp_path / "file" / "below")).fit(1)


def test_a_damaged_newest_file_is_passed_over_and_the_one_before_is_taken(tmp_path):
    whole = learner()
    whole.fit(3)
    learner(keeping(tmp_path)).fit(2)
    newest = tmp_path / "000002-epoch2-batch0.ckpt"
    newest.write_bytes(newest.read_bytes()[:-10])
    again = learner(keeping(tmp_path))
    with pytest.warns(UserWarning, match="passed over for 000001"):
        again.fit(3, resume="auto")
    same(whole, again)


def test_where_all_are_damaged_nothing_begins_anew_in_silence(tmp_path):
    learner(keeping(tmp_path)).fit(2)
    for path in tmp_path.glob("0*"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints can be read"):
        learner(keeping(tmp_path)).fit(2, resume="auto")


def test_what_a_killed_process_has_left_half_written_is_cleared_away(tmp_path):
    learner(keeping(tmp_path)).fit(1)
    part = tmp_path / ".000002-epoch2-batch0.ckpt.4711.0a1b2c3d.part"
    part.write_bytes(b"half")
    mine = tmp_path / "notes.part"
    mine.write_text("")
    learner(keeping(tmp_path)).fit(2, resume="auto")
    assert not part.exists()
    assert mine.exists()


def test_a_second_process_is_kept_out_of_the_folder(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom minitrain.folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match="another process writes its checkpoints there"):
            learner(keeping(tmp_path)).fit(1)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    learner(keeping(tmp_path)).fit(1)  # the lock has gone with the process


def test_a_clean_exit_leaves_no_thread_and_no_save_point(tmp_path):
    cb = keeping(tmp_path, async_write=True)
    learn = learner(cb)
    learn.fit(2)
    assert learn.save_points == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]

    class Fail(Callback):
        def after_batch(self, learn):
            raise ZeroDivisionError

    learn = learner(Fail(), cb)
    with pytest.raises(ZeroDivisionError):
        learn.fit(2)
    assert learn.save_points == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


@pytest.fixture(autouse=True)
def interruptible():
    """A job in the background of a shell ignores Ctrl-C, and so do the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# -- interrupts -------------------------------------------------------------------------------------------------------


class Signal(Callback):
    """Send a signal to this process in a batch."""

    order = -9

    def __init__(self, number, at=2, times=1, training=True):
        self.number, self.at, self.times, self.training = number, at, times, training

    def after_pred(self, learn):
        if learn.batch_idx == self.at and learn.training == self.training and learn.epoch == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_first_interrupt_leaves_a_checkpoint_and_goes_on(tmp_path, number, training, asynchronous):
    whole = learner(valid=True)
    whole.fit(3)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    cb = keeping(tmp_path, every=1000, on_interrupt=True, async_write=asynchronous, keep_best=None)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as error:
        learner(Signal(number, training=training), cb, valid=True).fit(3)
    assert number == signal.SIGINT or error.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert numbers(tmp_path) == [(1, f"epoch1-batch{3 if training else 6}.ckpt")]
    again = learner(keeping(tmp_path), valid=True)
    again.fit(3, resume="auto")
    same(whole, again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_interrupt_acts_at_once_and_writes_nothing(tmp_path, number):
    seen = []

    class After(Callback):
        def after_loss(self, learn):
            seen.append((learn.epoch, learn.batch_idx))

    cb = keeping(tmp_path, every=1000, on_interrupt=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        learner(Signal(number, times=2), After(), cb).fit(3)
    assert seen[-1] == (1, 1)
    assert names(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_handler_from_before_is_what_the_interrupt_goes_on_to(tmp_path):
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        learner(Signal(signal.SIGTERM), keeping(tmp_path, every=1000, on_interrupt=True)).fit(3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]
    assert [name for _, name in numbers(tmp_path)] == ["epoch1-batch3.ckpt", "epoch3-batch0.ckpt"]


def test_without_on_interrupt_nothing_is_listened_to(tmp_path):
    before = signal.getsignal(signal.SIGINT)

    class Look(Callback):
        def after_batch(self, learn):
            assert signal.getsignal(signal.SIGINT) is before

    learner(Look(), keeping(tmp_path)).fit(1)


def test_outside_of_the_main_thread_on_interrupt_warns(tmp_path):
    caught = []

    def run():
        with pytest.warns(UserWarning, match="no effect outside of the main thread"):
            learner(keeping(tmp_path, on_interrupt=True)).fit(1)
        caught.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(folder=3), TypeError, "folder=3"),
        (dict(folder=""), TypeError, "folder=''"),
        (dict(every=0), ValueError, "every=0"),
        (dict(every=-3), ValueError, "every=-3"),
        (dict(every=True), TypeError, "every=True"),
        (
            dict(every=2.5),
            TypeError,
            "every=2.5, wanted 'epoch', a number of optimiser steps, or a datetime.timedelta: seconds",
        ),
        (dict(every="step"), ValueError, "every='step'"),
        (dict(every=timedelta(0)), ValueError, "every=datetime.timedelta(0)"),
        (dict(keep_last=0), ValueError, "keep_last=0"),
        (dict(keep_last=1.5), TypeError, "keep_last=1.5"),
        (dict(keep_last=True), TypeError, "keep_last=True"),
        (dict(keep_best=3), TypeError, "keep_best=3"),
        (dict(mode="high"), ValueError, "mode='high'"),
        (dict(async_write=1), TypeError, "async_write=1"),
        (dict(on_interrupt="yes"), TypeError, "on_interrupt='yes'"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Checkpoint(**dict(folder="runs") | options)


def test_its_state_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"best='os\.system'"):
        Checkpoint(tmp_path).load_state_dict({"best": "os.system"})


def test_constructing_it_touches_nothing(tmp_path):
    Checkpoint(tmp_path / "new")
    assert not (tmp_path / "new").exists()
