import errno
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitrain.atomic import atomic_file, is_part


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    return path


def untouched(path):
    return path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("durable", [False, True])
def test_the_new_content_is_there_after_the_block_and_not_before(path, durable):
    with atomic_file(path, durable=durable) as file:
        file.write(b"new content")
        file.flush()
        assert path.read_bytes() == b"old"
        names = {p.name for p in path.parent.iterdir()} - {path.name}
        assert all(map(is_part, names))
        assert len(names) == 1
    assert path.read_bytes() == b"new content"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_whatever_ends_the_block_leaves_the_old_file_and_no_other(path, error):
    with pytest.raises(error):  # noqa: PT012, SIM117 - the block is what fails
        with atomic_file(path) as file:
            file.write(b"half")
            raise error
    assert untouched(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_sync_or_move_that_fails_leaves_the_old_file_and_no_other(path, monkeypatch, function, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)), atomic_file(path, durable=True) as file:
        file.write(b"new")
    assert untouched(path)


def test_durable_syncs_the_file_before_the_move_and_the_folder_after(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def record_replace(*args):
        calls.append("move")
        replace(*args)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with atomic_file(path, durable=True) as file:
        file.write(b"new")
    expected = ["file", "move", "folder"]
    assert [name for name in calls if name == "move" or os.path.exists("/proc/self/fd")] == (
        expected if os.path.exists("/proc/self/fd") else ["move"]
    )
    calls.clear()
    with atomic_file(path) as file:
        file.write(b"newer")
    assert calls == ["move"]


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_is_no_error_but_a_broken_one_is(path, monkeypatch, number, raises):
    fsync, done = os.fsync, []

    def fsync_file_only(handle):
        if done:
            raise OSError(number, os.strerror(number))
        done.append(fsync(handle))

    monkeypatch.setattr(os, "fsync", fsync_file_only)
    try:
        with atomic_file(path, durable=True) as file:
            file.write(b"new")
    except OSError:
        assert raises
    else:
        assert not raises
    assert path.read_bytes() == b"new"  # whole, whatever became of the name


@given(at=st.integers(0, 20))
def test_a_write_that_fails_at_any_byte_leaves_the_old_file(tmp_path_factory, at):
    path = tmp_path_factory.mktemp("atomic") / "file.bin"
    path.write_bytes(b"old")

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):  # noqa: PT012, SIM117 - the block is what fails
        with atomic_file(path) as file:
            file.write(b"x" * at)
            full()
    assert untouched(path)


def test_a_link_stays_a_link(path):
    link = path.parent / "link"
    link.symlink_to(path)
    with atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FileExistsError, match=r"is no file. Give the name of a file"), atomic_file(tmp_path):
        pass
    with pytest.raises(FileExistsError, match="is no file"), atomic_file("/dev/null"):
        pass
    with (
        pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'. Make it first"),
        atomic_file(tmp_path / "nowhere" / "x"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_meet(path):
    with atomic_file(path) as one, atomic_file(path) as two:
        one.write(b"one" * 1000)
        two.write(b"two")
    assert path.read_bytes() == b"one" * 1000
    assert list(path.parent.iterdir()) == [path]


def test_text_takes_the_options_of_open(path):
    with atomic_file(path, "w", encoding="utf-16", newline="") as file:
        file.write("é\n")
    assert path.read_bytes().decode("utf-16") == "é\n"


def test_the_temporary_file_of_a_killed_process_is_known_by_its_name(path):
    script = (
        "import os, sys\nfrom minitrain.atomic import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n    file.write(b'half'); file.flush(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == 9
    (part,) = (p for p in path.parent.iterdir() if p != path)
    assert is_part(part.name)
    assert path.read_bytes() == b"old"
    assert not any(
        map(is_part, ["file.bin", ".hidden.part", "file.bin.12.0a1b2c3d.part", ".a.1.0a1b2c3d.part.ckpt", ""])
    )
