"""Disks that are full, folders that are closed, and loaders whose workers die: nothing is lost but what was under way."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_resume import X, learner, same
from torch import nn
from torch.utils.data import DataLoader, Dataset

from minitrain import BatchLoader, Callback, CheckpointError, DataLoaders, Learner, checkpoint, folder
from minitrain.callbacks import Checkpoint


def whole_files(path):
    """The checkpoints of a folder, each read; nothing else is there."""
    assert not [name for name in os.listdir(path) if name.endswith(".part")]
    return [checkpoint.read(file)["position"]["epoch"] for _, file in folder.numbered(path)]


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up(tmp_path, asynchronous):
    with small_disk(tmp_path / "disk", "100k") as disk:
        cb = Checkpoint(disk, keep_last=None, keep_best=None, async_write=asynchronous)
        with (
            pytest.warns(UserWarning, match="No space left on device"),
            pytest.raises(CheckpointError, match=r"cannot be written: No space left on device\. Free some space"),
        ):
            learner(cb).fit(20)
        there = whole_files(disk)
        assert there == list(range(1, len(there) + 1))
        assert 1 <= len(there) < 18
        # The run goes on where there is room again: that is, after the oldest files were deleted.
        for _, file in folder.numbered(disk)[:-1]:
            file.unlink()
        again, whole = learner(Checkpoint(disk, keep_last=1, keep_best=None)), learner()
        again.fit(20, resume="auto")
        whole.fit(20)
        same(whole, again)


def test_one_more_file_than_fits_deletes_none_before_it_is_written(tmp_path):
    """With keep_last=1 the disk must hold two for a moment; where it cannot, the last good one stays."""
    with small_disk(tmp_path / "disk", "30k") as disk:
        cb = Checkpoint(disk, keep_last=1, keep_best=None)
        with pytest.warns(UserWarning, match="No space left"), pytest.raises(CheckpointError, match="No space left"):
            learner(cb).fit(20)
        assert whole_files(disk) == [1]


def test_a_save_onto_a_full_disk_leaves_the_old_file(tmp_path):
    with small_disk(tmp_path / "disk", "40k") as disk:
        path = disk / "a.ckpt"
        first = learner()
        first.fit(1)
        first.save(path)
        (disk / "ballast").write_bytes(bytes(16_000))
        old = path.read_bytes()
        with pytest.raises(CheckpointError, match="No space left on device"):
            first.save(path)
        assert path.read_bytes() == old
        assert sorted(os.listdir(disk)) == ["a.ckpt", "ballast"]


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_folder_that_has_been_closed(tmp_path, monkeypatch, error):
    """For root, who may write everywhere, the refusal is put in by hand."""
    cb = Checkpoint(tmp_path, keep_last=None, async_write=False)
    opened = open

    def refuse(file, mode="r", *args, **kwargs):
        if str(file).endswith(".part"):
            raise OSError(error, os.strerror(error), str(file))
        return opened(file, mode, *args, **kwargs)

    class Close(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 1:
                monkeypatch.setattr("builtins.open", refuse)

    with pytest.warns(UserWarning, match=os.strerror(error)), pytest.raises(CheckpointError, match=os.strerror(error)):
        learner(Close(), cb).fit(5)
    monkeypatch.undo()
    assert whole_files(tmp_path) == [1]


def test_a_folder_that_is_not_ours_to_write_to(tmp_path):
    if os.geteuid() == 0:
        code = (
            "import os, sys\nfrom minitrain import CheckpointError, folder\nfrom pathlib import Path\n"
            "os.setgid(65534); os.setuid(65534)\ntry:\n    folder.locked(Path(sys.argv[1])).__enter__()\n"
            "except CheckpointError as error:\n    print(error)"
        )
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents:
            if parent.name.startswith("pytest"):
                parent.chmod(0o755)
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "new"], capture_output=True, text=True, env=environment
        )
        if "Permission denied" not in done.stdout and done.returncode:
            pytest.skip(f"nobody cannot run this Python: {done.stderr.splitlines()[-1]}")
        assert "cannot be made or written to (Permission denied)" in done.stdout
        return
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"cannot be made or written to \(Permission denied\)"):
        learner(Checkpoint(tmp_path / "new")).fit(1)


def test_a_folder_that_is_deleted_during_the_run(tmp_path):
    class Delete(Callback):
        def after_epoch(self, learn):
            if learn.epoch == 1:
                for name in os.listdir(tmp_path / "run"):
                    (tmp_path / "run" / name).unlink()
                (tmp_path / "run").rmdir()

    cb = Checkpoint(tmp_path / "run", async_write=False)
    with pytest.warns(UserWarning, match="run"), pytest.raises(CheckpointError, match="run"):
        learner(Delete(), cb).fit(5)


def test_two_processes_that_want_one_folder_do_not_both_get_it(tmp_path):
    """Started at the same moment; who comes second is told so, and the files of the first are whole."""
    code = (
        "import sys, time\nsys.path.insert(0, sys.argv[2])\nfrom test_resume import learner\n"
        "from minitrain import Callback, CheckpointError\nfrom minitrain.callbacks import Checkpoint\n"
        "class Slow(Callback):\n    def after_epoch(self, learn):\n        time.sleep(0.5)\n"
        "try:\n    learner(Slow(), Checkpoint(sys.argv[1], keep_last=None)).fit(6)\n    print('fit')\n"
        "except CheckpointError as error:\n    print('another process' in str(error))"
    )
    tests = Path(__file__).parents[1]
    start = [sys.executable, "-c", code, tmp_path / "run", tests]
    running = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in running)
    assert said == ["True", "fit"]
    assert whole_files(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


# -- loaders ----------------------------------------------------------------------------------------------------------


class Dying(Dataset):
    """Of which one sample kills the worker, or fails, as long as a file is there."""

    def __init__(self, mark, how):
        self.mark, self.how = mark, how

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        if i == 13 and self.mark.exists():
            if self.how == "die":
                os._exit(1)
            raise ZeroDivisionError("a bad sample")
        return X[i], 2 * X[i]


@pytest.mark.parametrize(
    ("how", "message"), [("die", "DataLoader worker .* exited unexpectedly"), ("raise", "a bad sample")]
)
def test_a_worker_that_dies_ends_the_run_which_then_goes_on(tmp_path, how, message):
    mark = tmp_path / "mark"

    def run():
        train = DataLoader(Dying(mark, how), batch_size=4, num_workers=1)
        return learner(Checkpoint(tmp_path / "run", every=1, keep_last=None), train=train)

    whole = learner(train=DataLoader(Dying(mark, how), batch_size=4, num_workers=1))
    whole.fit(2)
    mark.touch()
    broken = run()
    with pytest.raises((RuntimeError, ZeroDivisionError), match=message) as error:
        broken.fit(2)
    assert any(re.match(r"while drawing batch \d from the training loader", note) for note in error.value.__notes__)
    assert broken.batch is None
    mark.unlink()
    again = run()
    again.fit(2, resume="auto")
    assert again.resumed
    same(whole, again)


# -- exits ------------------------------------------------------------------------------------------------------------


class Resource(Callback):
    """A context that fails to close, or only says that it was closed."""

    def __init__(self, closed, fail=False):
        self.closed, self.fail = closed, fail
        self.state_key = f"Resource {id(self)}"

    @contextlib.contextmanager
    def during_fit(self, learn):
        try:
            yield
        finally:
            self.closed.append(self)
            if self.fail:
                raise ZeroDivisionError("a close")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_everything_is_closed_and_the_error_surfaces(tmp_path, error):
    class Fail(Callback):
        def after_backward(self, learn):
            if learn.step_idx == 8:
                raise error

    closed = []
    cbs = [Resource(closed), Checkpoint(tmp_path, every=1), Resource(closed, fail=True), Resource(closed)]
    learn = learner(Fail(), *cbs)
    with pytest.raises(ZeroDivisionError, match="a close") as raised:
        learn.fit(3)
    assert isinstance(raised.value.__context__, error)
    assert closed == [cbs[3], cbs[2], cbs[0]]
    assert learn.phase is None
    assert learn.save_points == []
    with folder.locked(tmp_path):  # nobody holds it any longer
        pass
    whole, again = learner(), learner(Checkpoint(tmp_path))
    whole.fit(3)
    again.fit(3, resume="auto")
    same(whole, again)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ],
)
def test_out_of_memory_says_how_large_the_batch_was_and_what_to_try(error):
    class Full(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x):
            raise error

    learn = Learner(Full(), DataLoaders(BatchLoader(X, X, batch_size=8)), nn.functional.mse_loss, progress=False)
    with pytest.raises(type(error)) as raised:
        learn.fit(1)
    note = "\n".join(raised.value.__notes__)
    assert "Out of memory on a batch of 8 samples. Try a smaller batch_size" in note


def test_a_real_allocation_that_fails_is_recognised():
    class Greedy(nn.Linear):
        def forward(self, x):
            return torch.empty(2**55) + super().forward(x)

    learn = Learner(Greedy(1, 1), DataLoaders(BatchLoader(X, X, batch_size=8)), nn.functional.mse_loss, progress=False)
    with warnings.catch_warnings(), pytest.raises(RuntimeError) as raised:
        learn.fit(1)
    assert "Out of memory on a batch of 8 samples" in "\n".join(raised.value.__notes__)


TERMINATED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_resume import X, learner
from torch.utils.data import DataLoader, TensorDataset
from minitrain import Callback
from minitrain.callbacks import Checkpoint

class Slow(Callback):
    def after_batch(self, learn):
        time.sleep(0.02)
        if learn.batch_idx == 1:
            print("go", flush=True)

train = DataLoader(TensorDataset(X.repeat(20, 1), X.repeat(20, 1)), batch_size=4, num_workers=2)
learner(Slow(), Checkpoint(sys.argv[1], every=1000, on_interrupt=True), train=train).fit(1)
"""


@pytest.mark.parametrize("delay", [0.0, 0.007, 0.013, 0.021])
@pytest.mark.skipif(sys.platform == "win32", reason="there are no groups of processes")
def test_a_signal_to_the_whole_group_kills_the_workers_and_leaves_a_checkpoint(tmp_path, delay):
    """As a scheduler sends it. torch would raise in the midst of the file that is being written."""
    start = [sys.executable, "-c", TERMINATED, tmp_path / "run", Path(__file__).parents[1]]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "go\n"
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert whole_files(tmp_path / "run") == [0]
