"""A recording holds exactly the evenly spaced rows that fit into its memory, however it is written, read and restored."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitrain.recording import Recording

LAYERS, FIELDS = ["a", "b,c"], ["mean", "std", "max"]
ROW = 4 * len(LAYERS) * len(FIELDS) + 8


def row_of(step):
    row = torch.arange(6.0).reshape(2, 3) + step / 7
    row[1, 2] = (math.nan, math.inf, 1e-42)[step % 3]
    return row


def make(every, rows):
    return Recording(LAYERS, FIELDS, every=every, max_memory=ROW * rows + 5)


def check(recording, put, rows):
    """The table has the rows that it should, and takes the memory that it may."""
    recording.flush()
    assert recording.nbytes <= ROW * rows + 5
    assert recording.nbytes == sum(t.untyped_storage().nbytes() for t in (recording._table, recording._steps)) + ROW * (
        rows - recording.capacity
    )
    assert rows - recording.capacity in range(1, 65)
    wanted = [step for step in put if step % (recording.every * recording.stride) == 0]
    assert recording.steps == wanted
    assert len(wanted) <= recording.capacity
    table = torch.stack([row_of(step) for step in wanted]) if wanted else torch.empty(0, 2, 3)
    torch.testing.assert_close(recording.table(), table, rtol=0, atol=0, equal_nan=True)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 40)),
        st.tuples(st.just("put late"), st.integers(1, 3)),  # read between question and answer, which may thin the table
        st.tuples(st.sampled_from(["flush", "read", "save", "same"]), st.none()),
        st.tuples(st.just("restore"), st.integers(4, 60)),
    ),
    max_size=30,
)


@given(every=st.integers(1, 3), rows=st.integers(4, 60), start=st.integers(0, 5), operations=operations)
def test_the_kept_rows_are_the_evenly_spaced_ones_after_any_sequence_of_operations(every, rows, start, operations):
    recording, put, step = make(every, rows), [], start
    state, saved = recording.state_dict(), 0
    for name, argument in operations:
        stride = recording.stride
        if name == "put":
            for _ in range(argument):
                if recording.wants(step):
                    recording.put(step, row_of(step))
                    put.append(step)
                step += 1
        elif name == "put late":
            while not recording.wants(step):
                step += 1
            recording.flush()
            recording.put(step, row_of(step))
            put.append(step)
            step += 1
        elif name == "save":
            state, saved = recording.state_dict(), len(put)
        elif name == "same":  # back to what was saved
            recording = make(every, rows)
            recording.load_state_dict(state)
            stride, put = state["stride"], put[:saved]
            step = max(put, default=start) + 1
        elif name == "restore":
            state, saved = recording.state_dict(), len(put)
            stride, rows = state["stride"], argument
            recording = make(every, rows)
            recording.load_state_dict(state)
        if name == "flush":
            recording.flush()
        if name in ("read", "save", "same", "restore"):
            check(recording, put, rows)
        if recording.stride > stride:  # it had to be: with half of it they would not have fitted in
            assert sum(s % (every * recording.stride // 2) == 0 for s in put) > recording.capacity
    check(recording, put, rows)


@given(every=st.integers(1, 5), rows=st.integers(4, 400), n=st.integers(0, 1500))
def test_the_stride_is_the_smallest_power_of_two_with_which_the_rows_fit(every, rows, n):
    recording, put = make(every, rows), range(0, n, every)
    for step in range(n):
        if recording.wants(step):
            recording.put(step, row_of(step))
    check(recording, list(put), rows)
    stride = 1
    while len(range(0, n, every * stride)) > recording.capacity:
        stride *= 2
    assert recording.stride == stride
    assert len(recording.steps) > recording.capacity // 2 or stride == 1


@given(
    rows=st.integers(4, 30),
    n=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_every_read_agrees_with_the_table(rows, n, dtype):
    recording = make(1, rows)
    for step in range(n):
        recording.put(step, row_of(step).to(dtype))
    table, plain = recording.table().clone(), recording.to_dict()
    assert list(recording) == FIELDS
    assert plain["steps"] == recording.steps
    assert table.dtype == torch.float32
    for i, field in enumerate(FIELDS):
        torch.testing.assert_close(recording[field], table[:, :, i], rtol=0, atol=0, equal_nan=True)
        again = torch.tensor(plain[field]).reshape(-1, 2)
        torch.testing.assert_close(recording[field], again, rtol=0, atol=0, equal_nan=True)
    for read in (recording.table(), recording["mean"], recording.state_dict()["table"]):  # copies, all of them
        read.fill_(-1)
    torch.testing.assert_close(recording.table(), table, rtol=0, atol=0, equal_nan=True)


DAMAGE = {
    "another layer": lambda state: state.update(names=["a", "z"]),
    "fields in another order": lambda state: state.update(fields=FIELDS[::-1]),
    "other steps": lambda state: state.update(every=state["every"] + 1),
    "a row too few": lambda state: state.update(table=state["table"][1:]),
    "another width": lambda state: state.update(table=state["table"][:, :, 1:]),
    "no rows": lambda state: state.pop("table"),
    "no stride": lambda state: state.pop("stride"),
    "no steps": lambda state: state.pop("steps"),
    "no names": lambda state: state.pop("names"),
    "stride of zero": lambda state: state.update(stride=0),
    "a stride too large": lambda state: state.update(stride=state["stride"] * 1000),
    "steps in disorder": lambda state: state["steps"].reverse(),
    "steps that repeat": lambda state: state.update(steps=[0] * len(state["steps"])),
}


@given(damage=st.sampled_from(sorted(DAMAGE)), n=st.integers(2, 50), waiting=st.integers(0, 5))
def test_a_wrong_state_is_refused_and_changes_nothing(damage, n, waiting):
    other, recording = make(2, 20), make(2, 20)
    for step in range(2, 2 * n, 2):
        other.put(step, row_of(step + 1))
    for step in range(0, 10, 2):
        recording.put(step, row_of(step))
    recording.flush()
    steps = list(range(0, 2 * (5 + waiting), 2))
    for step in steps[5:]:
        recording.put(step, row_of(step))
    state = other.state_dict()
    before = dict(state)
    DAMAGE[damage](state)
    if len(before["steps"]) < 2 and damage in ("steps in disorder", "steps that repeat"):
        return
    with pytest.raises(ValueError, match="the state"):
        recording.load_state_dict(state)
    assert recording.stride == 1
    check(recording, steps, 20)
