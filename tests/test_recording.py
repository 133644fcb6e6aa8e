import copy
import csv
import math
import os
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minitrain.csvfile import write_csv
from minitrain.recording import Recording


def make(names=("a", "b"), fields=("mean", "std"), *, every=1, max_memory=2**20):
    return Recording(list(names), list(fields), every=every, max_memory=max_memory)


def fill(recording, n, start=0):
    for step in range(start, start + n):
        if recording.wants(step):
            recording.put(step, torch.full((len(recording.names), len(recording.fields)), float(step)))
    return recording


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_put():
    recording = make(every=3)
    for step in (0, 3, 6):
        recording.put(step, torch.tensor([[step, 1.0], [math.nan, -math.inf]]))
    assert recording.steps == [0, 3, 6]
    assert recording["mean"][:, 0].tolist() == [0.0, 3.0, 6.0]
    assert recording["mean"][:, 1].isnan().all()
    assert recording["std"].tolist() == [[1.0, -math.inf]] * 3
    assert recording.table().shape == (3, 2, 2)


def test_an_empty_recording_can_be_read():
    recording = make()
    assert (recording.steps, recording["mean"].shape, recording.table().shape) == ([], (0, 2), (0, 2, 2))
    assert recording.to_dict() == {"names": ["a", "b"], "steps": [], "mean": [], "std": []}
    assert repr(recording) == "Recording(0 steps, 2 layers: mean, std)"


def test_a_recording_of_no_layers_keeps_its_steps():
    recording = fill(make(names=[]), 3)
    assert (recording.steps, recording["mean"].shape) == ([0, 1, 2], (3, 0))


def test_it_is_a_mapping_of_its_fields():
    recording = fill(make(), 2)
    assert (list(recording), len(recording), "std" in recording, "max" in recording) == (
        ["mean", "std"],
        2,
        True,
        False,
    )
    assert {key: value.tolist() for key, value in recording.items()} == {
        "mean": [[0.0, 0.0], [1.0, 1.0]],
        "std": [[0.0, 0.0], [1.0, 1.0]],
    }


def test_an_unknown_field_is_named_beside_those_there_are():
    with pytest.raises(KeyError, match=r"'max': recorded are mean, std\."):
        make()["max"]


def test_rows_of_another_shape_are_refused_even_where_they_would_broadcast():
    recording = make()
    for shape in [(2,), (1, 2), (2, 1), (2, 3), ()]:
        with pytest.raises(ValueError, match=r"row of shape=.*wanted \(layers, fields\)=\(2, 2\)"):
            recording.put(0, torch.zeros(shape))
    assert recording.steps == []


def test_what_is_put_is_a_copy_without_a_graph():
    recording, row = make(), torch.ones(2, 2, requires_grad=True)
    recording.put(0, row * 1)
    with torch.no_grad():
        row.fill_(7)
    recording.put(1, row)
    with torch.no_grad():
        row.fill_(9)
    assert recording["mean"].tolist() == [[1.0, 1.0], [7.0, 7.0]]
    assert not recording.table().requires_grad


def test_numbers_are_float32_and_what_lies_beyond_is_infinite_or_zero():
    recording = make()
    recording.put(0, torch.tensor([[1e300, -1e300], [1e-300, 0.1]], dtype=torch.float64))
    assert recording.table().tolist() == [[[math.inf, -math.inf], [0.0, torch.tensor(0.1).item()]]]


def test_a_row_that_was_wanted_but_is_no_longer_is_left_out():
    recording = fill(make(max_memory=24 * 20), 17)
    assert recording.wants(17)
    assert len(recording.steps) == 9  # read in between, which thins the table
    recording.put(17, torch.zeros(2, 2))
    fill(recording, 3, start=18)
    assert recording.steps == list(range(0, 21, 2))


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_long_run_of_many_layers_stays_within_the_stated_memory():
    fields = ["mean", "std", "min", "max", "nonfinite", "near_zero", "signal_share", "dead"]
    recording = make([str(i) for i in range(50)], fields, max_memory=100_000)
    tensors = {id(recording._table), id(recording._steps)}
    row = torch.rand(50, 8)
    for step in range(3000):
        if recording.wants(step):
            recording.put(step, row)
        assert recording.nbytes <= 100_000
    assert {id(recording._table), id(recording._steps)} == tensors  # allocated once
    held = [value for value in vars(recording).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 3
    assert sum(t.untyped_storage().nbytes() for t in held) <= 100_000
    assert recording.stride == 64
    assert recording.steps == list(range(0, 3000, 64))


def test_the_bound_holds_whatever_torch_s_defaults_are():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            recording = make(max_memory=40 * 20)
        fill(recording, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    assert recording.nbytes <= 40 * 20
    assert recording._block.dtype == recording.table().dtype == torch.float32
    assert recording["mean"][-1, 0] == recording.steps[-1]


def test_memory_for_less_than_four_rows_is_an_error_that_says_what_to_do():
    assert make(max_memory=4 * 24).capacity == 3
    with pytest.raises(
        ValueError, match=r"max_memory=95 bytes: a row of 2 layers takes 24, .* Give more, or select fewer"
    ):
        make(max_memory=4 * 24 - 1)


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that is made anew."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            inputs = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("rows", [8, 100, 2000])
def test_thinning_makes_no_copy_larger_than_a_block(rows):
    recording = make([str(i) for i in range(20)], max_memory=rows * 168)
    block = rows - recording.capacity
    row = torch.zeros(20, 2)
    with Allocations() as allocations:
        for step in range(recording.capacity + 1):
            recording.put(step, row)
        recording.flush()
    assert recording.stride == 2
    assert 0 < allocations.largest <= block * 168


def test_a_block_comes_from_an_accelerator_in_one_copy_and_nothing_else_waits():
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            if out is tensors[-1] and out.device.type == "cpu" and any(t.device.type == "cuda" for t in tensors):
                copies.append(tuple(out.shape))
            return out

    with FakeTensorMode(), Copies():  # in which `.item()` would be an error
        recording = make()
        row = torch.zeros(2, 2, device="cuda")
        for step in range(63):
            recording.put(step, row)
        assert copies == []
        recording.put(63, row)
        assert copies == [(64, 2, 2)]
        for step in range(64, 70):
            recording.put(step, row)
        recording.flush()
        recording.flush()
        assert copies == [(64, 2, 2), (6, 2, 2)]


def test_a_model_that_moves_to_another_device_loses_no_row():
    with FakeTensorMode():
        recording = make()
        for step, device in enumerate(["cpu", "cuda", "cuda", "cpu"]):
            recording.put(step, torch.zeros(2, 2, device=device))
        assert recording._n == 3
        recording.flush()
        assert recording._n == 4


def test_a_row_that_a_change_of_devices_makes_unwanted_is_left_out():
    recording = fill(make(max_memory=24 * 20), 16)
    recording.put(17, torch.empty(2, 2, device="meta"))  # which brings the others into the table, and thins it
    assert recording.steps == list(range(0, 16, 2))


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_state_taken_while_rows_wait_has_the_stride_of_its_rows():
    recording = fill(make(max_memory=24 * 20), 16)
    assert recording.stride == 1  # one more than fit into the table
    state = recording.state_dict()
    assert (state["stride"], state["steps"]) == (2, list(range(0, 16, 2)))
    other = make(max_memory=24 * 20)
    other.load_state_dict(state)
    fill(other, 4, start=16)
    assert other.steps == list(range(0, 20, 2))


def test_a_state_loads_into_less_memory_thinned_and_into_more_as_it_is():
    state = fill(make(max_memory=24 * 200), 100).state_dict()
    small, large = make(max_memory=24 * 20), make(max_memory=24 * 2000)
    small.load_state_dict(state)
    large.load_state_dict(state)
    assert (small.stride, small.steps) == (8, list(range(0, 100, 8)))
    assert small["mean"][:, 0].tolist() == [float(step) for step in small.steps]
    assert large.steps == list(range(100))
    assert small.nbytes <= 24 * 20


def test_a_state_replaces_what_was_there_and_waited():
    recording = fill(make(), 70)  # of which six wait
    recording.load_state_dict(make().state_dict())
    assert recording.steps == []
    recording.put(0, torch.zeros(2, 2))
    assert recording.steps == [0]


def test_a_state_is_plain_enough_to_be_saved_without_pickled_objects(tmp_path):
    recording = fill(make(), 70)
    torch.save(recording.state_dict(), tmp_path / "state.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.to_dict() == recording.to_dict()


def test_a_refused_state_says_what_differs_and_what_to_do():
    state = make().state_dict()
    with pytest.raises(
        ValueError, match=r"the state has names=\['a', 'b'\], this recording has names=\['a'\].*Make it with"
    ):
        make(names=["a"]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state has every=1, this recording has every=2"):
        make(every=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"the state lacks \['stride', 'table'\]"):
        make().load_state_dict({key: value for key, value in state.items() if key not in ("stride", "table")})
    with pytest.raises(ValueError, match=r"table of shape=\(0, 2, 2\), wanted \(1, 2, 2\)"):
        make().load_state_dict({**state, "steps": [0]})
    with pytest.raises(ValueError, match=r"stride=1 and steps=\[9, 8, 7, 6, 5, 4, 3, 2, \.\.\.\], wanted"):
        make().load_state_dict({**state, "steps": list(range(9, -1, -1)), "table": torch.zeros(10, 2, 2)})


# -- files ------------------------------------------------------------------------------------------------------------


def lines(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_csv_has_a_line_for_each_step_and_layer_and_every_digit(tmp_path):
    recording = make(["0.conv", 'x,"y"\nµ'], every=5)
    row = torch.tensor([[0.1, 1e-42], [math.nan, -math.inf]])
    recording.put(0, row)
    recording.put(5, row / 3)
    recording.to_csv(tmp_path / "stats.csv")
    header, *cells = lines(tmp_path / "stats.csv")
    assert header == ["step", "layer", "mean", "std"]
    assert [line[:2] for line in cells] == [["0", "0.conv"], ["0", 'x,"y"\nµ'], ["5", "0.conv"], ["5", 'x,"y"\nµ']]
    again = torch.tensor([[float(cell) for cell in line[2:]] for line in cells]).reshape(2, 2, 2)
    torch.testing.assert_close(again, recording.table(), rtol=0, atol=0, equal_nan=True)


def test_csv_of_no_rows_is_a_header(tmp_path):
    make().to_csv(str(tmp_path / "stats.csv"))
    assert (tmp_path / "stats.csv").read_bytes() == b"step,layer,mean,std\r\n"


def test_what_is_none_is_left_empty_and_floats_are_exact(tmp_path):
    write_csv(tmp_path / "a.csv", ["x", "y", "z"], [[None, 0.1 + 0.2, True], [1, 1e-308, "ü"]])
    assert lines(tmp_path / "a.csv") == [["x", "y", "z"], ["", "0.30000000000000004", "True"], ["1", "1e-308", "ü"]]


def test_a_file_is_replaced_at_once_and_leaves_no_other(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def rows():
        yield [1]
        assert path.read_text() == "old"  # until all is there
        yield [2]

    with open(path) as reader:  # it goes on reading what it has opened
        write_csv(path, ["x"], rows())
        assert reader.read() == "old"
    assert lines(path) == [["x"], ["1"], ["2"]]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_leaves_the_old_file_or_none(tmp_path, error, there):
    path = tmp_path / "a.csv"
    if there:
        path.write_text("old")

    def rows():
        yield [1]
        raise error

    with pytest.raises(type(error)):
        write_csv(path, ["x"], rows())
    assert list(tmp_path.iterdir()) == [path] * there
    assert not there or path.read_text() == "old"


def test_a_move_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail(*args):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        write_csv(path, ["x"], [[1]])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_stays_a_link(tmp_path, dangling):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "a.csv", tmp_path / "a.csv"
    if not dangling:
        target.write_text("old")
    link.symlink_to(target)
    write_csv(link, ["x"], [[1]])
    assert link.is_symlink()
    assert lines(target) == [["x"], ["1"]]
    assert sorted(tmp_path.rglob("*")) == [link, target.parent, target]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path='.*a\.csv': there is no folder '.*nowhere'\. Make it first\."):
        make().to_csv(tmp_path / "nowhere" / "a.csv")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FileExistsError, match=r"path='.*' is there, and is no file\. Give the name of a file\."):
            write_csv(path, ["x"], [[1]])
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_copy_takes_its_rows_along_and_not_the_room_for_more():
    recording = Recording(["a", "b"], ["mean"], every=1, max_memory=2**22)
    for step in range(3):
        recording.put(step, torch.full((2, 1), float(step)))
    packed = pickle.dumps(recording)
    assert len(packed) < 10_000
    for other in (pickle.loads(packed), copy.deepcopy(recording)):
        assert (other.steps, other.nbytes, other.capacity) == (recording.steps, recording.nbytes, recording.capacity)
        for step in range(3, 200):
            other.put(step, torch.full((2, 1), float(step)))
        assert other["mean"][:, 1].tolist() == list(range(200))
    assert recording["mean"][:, 0].tolist() == [0, 1, 2]


def test_a_recording_equals_only_itself():
    one, other = (Recording(["a"], ["mean"], every=1, max_memory=1024) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other}) == 2
