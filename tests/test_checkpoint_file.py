import collections
import enum
import errno
import hashlib
import os
import random
import re
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from minitrain import CheckpointError
from minitrain.checkpoint import FORMAT_VERSION, describe, format, plain, read, write
from minitrain.checkpoint.dtypes import DTYPES, NEWER

HEADER = 52
pytestmark = pytest.mark.filterwarnings("ignore:.*support is experimental")  # of two dtypes


def bits(value):
    """A value in a form that compares equal only if types and all bits are."""
    if isinstance(value, torch.Tensor):
        assert type(value) is torch.Tensor
        flat = torch.empty(value.numel(), dtype=value.dtype).copy_(
            value.flatten()
        )  # with the stride of 1 that `view` wants
        data = flat.view(torch.uint8).tolist() if flat.numel() else []
        return "tensor", value.dtype, tuple(value.shape), data
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, dict):
        return [(bits(k), bits(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [bits(v) for v in value]
    return type(value), value


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES - {torch.bool}, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    n = 2
    for size in shape:
        n *= size
    data = torch.tensor(draw(st.lists(st.integers(0, 255), min_size=16, max_size=16)), dtype=torch.uint8)
    whole = data.repeat(n).view(dtype)[:n]
    form = draw(
        st.sampled_from(["whole", "first half", "second half", "transposed", "every other", "expanded", "parameter"])
    )
    x = whole[: n // 2].clone().reshape(shape)
    match form:
        case "first half":
            x = whole[: n // 2].reshape(shape)
        case "second half":
            x = whole[n // 2 :].reshape(shape)
        case "transposed":
            x = x.permute(tuple(reversed(range(x.ndim))))
        case "every other":
            x = whole[::2].reshape(shape) if len(shape) == 1 else x
        case "expanded":
            x = x.expand(2, *x.shape)
        case "parameter" if dtype.is_floating_point and dtype.itemsize >= 2:
            x = nn.Parameter(x)
    return x


def letters():
    return st.text(st.characters(exclude_categories=()), max_size=8)  # those that are half a letter included


def states():
    keys = letters() | st.integers(-(2**63), 2**63)
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-(2**1000), 2**1000),
        st.floats(),
        letters(),
        st.binary(max_size=40),
        tensors(),
    )
    values = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(keys, inner, max_size=4)
        ),
        max_leaves=12,
    )
    return st.dictionaries(keys, values, max_size=4)


def training_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4))
    opt = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 20)).sum().backward()
    opt.step()
    return {
        "versions": {"minitrain": "0.1", "torch": torch.__version__},
        "position": {"epoch": 3, "batch": 17, "step": 317},
        "fingerprint": {"n": 50000, "batch_size": 64, "names": list(model.state_dict())},
        "model": model.state_dict(),
        "loss_func": {},
        "optimizers": [opt.state_dict()],
        "scaler": None,
        "callbacks": {"EMA": {"decay": 0.999, "shadow": list(model.parameters())}},
        "history": [{"epoch": i, "train_loss": 1 / (i + 1), "seconds": None} for i in range(30)],
        "rng": {"python": random.Random(0).getstate(), "torch": torch.get_rng_state(), "key": b"\0\xff"},
        "grads": [p.grad for p in model.parameters()],
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "real.ckpt"
    write(path, training_state())
    return path.read_bytes()


# What goes in comes out.


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(state=states())
def test_what_is_read_is_what_was_written_to_the_bit(tmp_path, state):
    path = tmp_path / "x.ckpt"
    write(path, state)
    expected = bits(plain(state))
    assert bits(read(path)) == expected
    assert bits(plain(state, copy=True)) == expected
    assert isinstance(describe(path), str)


def test_plain_changes_no_value_only_types():
    state = {"x": nn.Parameter(torch.arange(3.0)), "t": torch.Size([2]), "f": np.float64(0.1), "b": [True]}
    assert bits(plain(state)) == bits({"x": torch.arange(3.0), "t": (2,), "f": 0.1, "b": [True]})


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_tensors_of_every_dtype_and_shape(tmp_path, dtype, shape):
    n = int(np.prod(shape))
    x = (
        (torch.arange(n * dtype.itemsize) % (2 if dtype is torch.bool else 256))
        .to(torch.uint8)
        .view(dtype)
        .reshape(shape)
    )
    write(tmp_path / "x.ckpt", {"x": x})
    y = read(tmp_path / "x.ckpt")["x"]
    assert bits(y) == bits(x) == bits(plain(x, copy=True))
    assert str(dtype).removeprefix("torch.") in describe(tmp_path / "x.ckpt")
    assert y.dtype == dtype


def test_the_dtypes_of_this_torch_are_known():
    every = {x for x in vars(torch).values() if isinstance(x, torch.dtype)}
    strange = {d for d in every if re.search(r"q?u?int[1-7]$|quint|qint|bits|int[1-7]$", str(d))}
    assert every - strange == DTYPES
    assert {"uint16", "float8_e5m2"} <= set(NEWER)


def test_numbers_that_are_special_keep_every_bit(tmp_path):
    nan = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]
    state = {
        "f": [nan, float("inf"), -float("inf"), -0.0, 5e-324],
        "t": torch.tensor([-0.0, float("nan"), float("inf")]),
    }
    state |= {"i": [0, -1, 2**31, -(2**31) - 1, 2**63, 2**2000, -(2**2000)]}
    write(tmp_path / "x.ckpt", state)
    assert bits(read(tmp_path / "x.ckpt")) == bits(state)


def test_a_view_takes_the_room_of_its_own_values(tmp_path):
    big = torch.arange(1e6)
    state = {
        "one": big[5:6],
        "slice": big.view(1000, 1000)[:, 3],
        "expanded": torch.ones(1).expand(3),
        "conj": (1j * big[:2]).conj(),
    }
    write(tmp_path / "x.ckpt", state)
    assert (tmp_path / "x.ckpt").stat().st_size < 20_000
    got = read(tmp_path / "x.ckpt")
    assert all(torch.equal(got[name], state[name]) for name in state)


def test_tied_tensors_stay_tied_and_equal_ones_stay_two(tmp_path):
    w = torch.randn(1000)
    state = {"a": w, "b": [w.detach()], "c": w.clone(), "half": w[:500], "again": w[:500], "bits": w.view(torch.int32)}
    write(tmp_path / "x.ckpt", state)
    for got in (read(tmp_path / "x.ckpt"), plain(state, copy=True), plain(state)):
        assert got["a"] is got["b"][0]
        assert got["half"] is got["again"]
        memory = [got[k].untyped_storage().data_ptr() for k in ("a", "c", "half", "bits")]
        assert len(set(memory)) == 4
        assert all(torch.equal(got[k], state[k]) for k in ("a", "c", "half", "bits"))


def test_strides_of_dense_tensors_are_kept(tmp_path):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    write(tmp_path / "x.ckpt", {"x": x})
    for got in (read(tmp_path / "x.ckpt")["x"], plain(x), plain(x, copy=True)):
        assert got.stride() == x.stride()
        assert torch.equal(got, x)


def test_bytes_are_bytes_and_no_dict_looks_like_them(tmp_path):
    state = {
        "empty": b"",
        "some": bytes(range(256)) * 10,
        "in": [{"k": (b"x",)}],
        "tensor": torch.zeros(3, dtype=torch.uint8),
    }
    write(tmp_path / "x.ckpt", state)
    assert bits(read(tmp_path / "x.ckpt")) == bits(state)
    with pytest.raises(CheckpointError, match="key None"):
        plain({"x": {None: torch.zeros(3, dtype=torch.uint8)}})


def test_inference_tensors_and_modes_leave_no_trace(tmp_path):
    with torch.inference_mode():
        state = {"x": torch.ones(3), "view": torch.ones(4)[:2], "b": b"abc"}
        write(tmp_path / "x.ckpt", state)
        for got in (plain(state), plain(state, copy=True), read(tmp_path / "x.ckpt")):
            assert not any(got[k].is_inference() or got[k].requires_grad for k in ("x", "view"))
    x = nn.Parameter(torch.ones(2))
    assert plain(x).requires_grad is False
    assert x.requires_grad


def test_a_default_device_or_dtype_changes_nothing(tmp_path):
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        write(tmp_path / "x.ckpt", {"b": b"abc", "x": torch.ones(2, device="cpu", dtype=torch.float32)})
        got = read(tmp_path / "x.ckpt")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert bits(got) == bits({"b": b"abc", "x": torch.ones(2)})


# A snapshot.


def test_a_copy_has_no_memory_in_common_and_reuses_what_the_caller_keeps():
    buffers = {}
    state = {"a": torch.arange(4.0), "b": [torch.ones(2, 2).t(), torch.arange(6)[::2]], "n": 3}
    first = plain(state, copy=True, buffers=buffers)
    memory = [t.data_ptr() for t in (first["a"], *first["b"])]
    assert not {state["a"].data_ptr(), state["b"][0].data_ptr()} & set(memory)
    state["a"].add_(1)
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = plain(state, copy=True, buffers=buffers)
    assert [t.data_ptr() for t in (second["a"], *second["b"])] == memory
    assert second["a"].tolist() == [1, 2, 3, 4]
    assert second["b"][1].tolist() == [0, 2, 4]
    third = plain({"a": torch.ones(5), "b": [torch.ones(2, 2, dtype=torch.int32)]}, copy=True, buffers=buffers)
    assert bits(third) == bits({"a": torch.ones(5), "b": [torch.ones(2, 2, dtype=torch.int32)]})
    assert len(buffers) == 2


def test_buffers_of_places_with_the_same_dotted_name_are_two():
    state = {
        "a": {"b.c": torch.zeros(2)},
        "a.b": {"c": torch.ones(2)},
        1: [torch.full((2,), 2.0)],
        "1": [torch.full((2,), 3.0)],
    }
    buffers = {}
    for _ in range(2):
        assert bits(plain(state, copy=True, buffers=buffers)) == bits(state)


@given(state=states(), other=states())
def test_buffers_never_change_what_a_snapshot_says(state, other):
    buffers = {}
    for s in (state, other, state, state):
        assert bits(plain(s, copy=True, buffers=buffers)) == bits(plain(s))


# What a file may not hold.


class Colour(enum.IntEnum):
    RED = 3


class Word(enum.StrEnum):
    YES = "yes"


Point = collections.namedtuple("Point", "x y")


def test_subclasses_become_the_plain_type():
    state = {
        Word.YES: Colour.RED,
        Colour.RED: Word.YES,
        "p": Point(1, 2),
        "n": [np.float64(2.5), np.str_("s"), np.bytes_(b"b")],
    }
    state["o"] = collections.OrderedDict(a=collections.defaultdict(list, b=[1]), c=collections.Counter("aa"))
    got = plain(state)
    assert bits(got) == bits(
        {"yes": 3, 3: "yes", "p": (1, 2), "n": [2.5, "s", b"b"], "o": {"a": {"b": [1]}, "c": {"a": 2}}},
    )


def circle():
    a = []
    a.append({"a": a})
    return a


def nest(n):
    x = 1
    for _ in range(n):
        x = [x]
    return x


def billions():
    x = []
    for _ in range(60):
        x = [x, x]
    return x


class Tagged(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


REFUSED = [
    ({"callbacks": {"EMA": {"shadow": [0, 1, 2, {1}]}}}, r"state.callbacks.EMA.shadow\[3\] is a set, .* a sorted list"),
    ({"a": np.zeros(2)}, r"state.a is a numpy.ndarray, .*torch.as_tensor"),
    ({"a": np.int64(2)}, r"a numpy.int64, .* int\(\.\.\.\)"),
    ({"a": np.float32(2)}, r"a numpy.float32, .* float\(\.\.\.\)"),
    ({"a": np.bool_(True)}, r"a numpy.bool.*, .* bool\(\.\.\.\)"),
    ({"m": nn.Linear(1, 1)}, r"state.m is .*Linear, .* module.state_dict\(\)"),
    ({"o": torch.optim.SGD([torch.zeros(1)])}, r"SGD, .* its state_dict\(\)"),
    ({"a": object()}, "an object, .* numbers, strings"),
    ({"a": 1 + 2j}, "complex"),
    ({"a": torch.float32}, r"torch.dtype.* str\(\.\.\.\)"),
    ({"a": print}, "builtin_function"),
    ({"a": nn.Linear}, "a type"),
    ({"a": torch.Generator()}, r"get_state\(\)"),
    ({(1, 2): 3}, r"the key \(1, 2\), a tuple"),
    ({"x": {1.5: 3}}, r"state.x has the key 1.5, a float"),
    ({2**64: 0}, "64 bits"),
    ({"a": 2**3000}, "an int of 3001 bits"),
    ({"a": torch.zeros(2, device="meta")}, "meta"),
    ({"a": nn.LazyLinear(2).weight}, "uninitialised"),
    ({"a": torch.zeros(2).to_sparse()}, r"sparse_coo.*to_dense"),
    ({"a": torch.zeros(2, 2).to_sparse_csr}, "builtin"),
    ({"a": torch.zeros(2).as_subclass(Tagged)}, "Tagged"),
    ({"a": torch.empty(2, dtype=torch.bits8)}, "bits8"),
    ({"a": circle()}, r"state.a\[0\].a is contained in itself"),
    ({"a": nest(100)}, "more than 64 deep"),
    ({"a": billions()}, "more than 4000000 values"),
    ({"\x1b[31m": {"\n": object()}}, r"state\['\\x1b\[31m'\]\['\\n'\] is an object"),
    (["a"], "no dict"),
    (None, "no dict"),
]


@pytest.mark.parametrize(("state", "message"), REFUSED)
def test_what_a_file_cannot_hold_is_named_with_a_remedy_and_nothing_is_written(tmp_path, state, message):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"old")
    with pytest.raises(CheckpointError, match=message):
        write(path, state)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_place_is_told_from_the_name_that_the_caller_gives():
    with pytest.raises(CheckpointError, match=r"^callbacks.EMA.shadow\[0\] is a set"):
        plain({"shadow": [set()]}, where="callbacks.EMA")


def test_a_container_that_is_there_twice_is_written_twice(tmp_path):
    shared = (0.9, [1, 2])
    write(tmp_path / "x.ckpt", {"a": shared, "b": [shared, shared]})
    got = read(tmp_path / "x.ckpt")
    assert got == {"a": shared, "b": [shared, shared]}
    assert got["a"][1] is not got["b"][0][1]


def test_nesting_up_to_the_bound_is_read_back(tmp_path):
    x = b"deep"
    for _ in range(63):
        x = [x]
    write(tmp_path / "x.ckpt", {"a": x})
    assert read(tmp_path / "x.ckpt") == {"a": x}


# Damage.


def test_the_header_is_as_documented(file):
    magic, version, length, digest = struct.unpack("<8sIQ32s", file[:HEADER])
    assert magic == b"\x89MINIT\r\n"
    assert version == FORMAT_VERSION == 1
    assert length == len(file) - HEADER
    assert digest == hashlib.sha256(file[HEADER:] + file[8:20]).digest()


def test_of_500_flips_of_one_bit_every_one_is_detected(file, tmp_path):
    path, rng = tmp_path / "x.ckpt", random.Random(0)
    places = [8 * i + rng.randrange(8) for i in range(HEADER)]  # each byte of the header, then anywhere, then the end
    places += [rng.randrange(8 * HEADER, 8 * len(file)) for _ in range(400)]
    places += [8 * (len(file) - 1 - i) + rng.randrange(8) for i in range(48)]
    assert len(places) == 500
    detected = 0
    for place in places:
        data = bytearray(file)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.ckpt"):
            read(path)
        detected += 1
    assert detected == 500
    path.write_bytes(file)
    read(path)


def test_every_truncation_is_detected(file, tmp_path):
    path = tmp_path / "x.ckpt"
    lengths = {*range(0, len(file), 1024), *range(200), *range(len(file) - 200, len(file))}
    for length in sorted(lengths):
        path.write_bytes(file[:length])
        with pytest.raises(CheckpointError, match=r"truncated|empty"):
            read(path)


@pytest.mark.parametrize("extra", [b"\0", b"\n", b"x" * 5000])
def test_bytes_too_many_are_detected(file, tmp_path, extra):
    (tmp_path / "x.ckpt").write_bytes(file + extra)
    with pytest.raises(CheckpointError, match=f"damaged: {len(extra)} bytes too many"):
        read(tmp_path / "x.ckpt")


def test_a_newer_format_asks_for_an_upgrade(file, tmp_path):
    path = tmp_path / "x.ckpt"
    numbers = struct.pack("<IQ", 2, len(file) - HEADER)
    path.write_bytes(file[:8] + numbers + hashlib.sha256(file[HEADER:] + numbers).digest() + file[HEADER:])
    with pytest.raises(CheckpointError, match=r"by a newer minitrain \(format 2, this one reads 1\): upgrade"):
        read(path)
    path.write_bytes(file[:8] + struct.pack("<I", 2) + file[12:])  # damaged, or its header has another form
    with pytest.raises(CheckpointError, match=r"damaged.*newer minitrain \(format 2"):
        read(path)


def save_safetensors(path):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


FOREIGN = [
    (lambda p: torch.save({"a": torch.ones(2)}, p), "torch.save file: use torch.load"),
    (lambda p: torch.save({"a": 1}, p, _use_new_zipfile_serialization=False), "torch.save file of the old kind"),
    (save_safetensors, "safetensors file"),
    (lambda p: np.savez(p.open("wb"), a=np.zeros(2)), "a zip archive"),
    (lambda p: np.save(p.open("wb"), np.zeros(2)), "NumPy array"),
    (lambda p: p.write_bytes(b"\x80\x04K\x01."), "a pickle, which may run any code"),
    (lambda p: p.write_bytes(b"hello world, this is a text"), r"no checkpoint of minitrain\."),
    (lambda p: p.write_bytes(b"\x1f\x8b\x08abc"), "gzip"),
    (lambda p: p.write_bytes(b"<html><body>404"), "a web page"),
    (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\nxx"), "HDF5"),
    (lambda p: p.write_bytes(b"\x89MINIT\n" + bytes(100)), "transferred as text"),
    (lambda p: p.write_bytes(bytes(1000)), "no checkpoint"),
    (lambda p: p.write_bytes(b""), "is empty"),
    (lambda p: p.mkdir(), "is a folder"),
    (lambda p: os.mkfifo(p), "is no file"),
]


@pytest.mark.parametrize(("make", "message"), FOREIGN)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_foreign_file_is_told_by_its_kind(tmp_path, make, message):
    path = tmp_path / "x.ckpt"
    make(path)
    with pytest.raises(CheckpointError, match=message) as info:
        read(path)
    assert repr(str(path)) in str(info.value)


def test_a_missing_file_names_those_that_are_there(tmp_path):
    for i in range(12):
        (tmp_path / f"step_{i:02}.ckpt").touch()
    with pytest.raises(
        CheckpointError, match=r"no such file. The folder has 'step_04.ckpt', .*'step_11.ckpt' and 4 more"
    ):
        read(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="Nor is there such a folder"):
        read(tmp_path / "no" / "none.ckpt")


def test_a_file_that_may_not_be_read_is_no_traceback_of_open(file, tmp_path, monkeypatch):
    (tmp_path / "x.ckpt").write_bytes(file)

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read(tmp_path / "x.ckpt")


# Faults while writing.


class Faulty:
    """`open` for writing, where the file fails when a certain byte is reached."""

    def __init__(self, monkeypatch, at, error):
        self.left, self.error, self.open = at, error, open
        monkeypatch.setattr("builtins.open", self)

    def __call__(self, name, mode="r", **options):
        file = self.open(name, mode, **options)
        if "w" in mode:
            write, outer = file.write, self

            class Wrapped:
                def __enter__(self):
                    return self

                def __exit__(self, *args):
                    file.close()

                def __getattr__(self, name):
                    return getattr(file, name)

                def write(self, data):
                    outer.left -= len(data)
                    if outer.left < 0:
                        raise outer.error
                    return write(data)

            return Wrapped()
        return file


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=st.floats(0, 1),
    error=st.sampled_from(
        [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError(), SystemExit(3)]
    ),
)
def test_a_write_that_fails_at_any_byte_leaves_the_old_file_and_no_other(file, tmp_path, part, error):
    path = tmp_path / "x.ckpt"
    path.write_bytes(file)
    with pytest.MonkeyPatch.context() as patch:
        Faulty(patch, int(part * len(file)), error)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)) as info:
            write(path, training_state())
    if isinstance(error, OSError):
        assert "x.ckpt' cannot be written: No space left on device. Free some space" in str(info.value)
    assert path.read_bytes() == file
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", [0, 3, 20, 50])
def test_an_interrupt_between_two_lines_of_ours_surfaces_as_one(file, tmp_path, monkeypatch, call):
    path = tmp_path / "x.ckpt"
    path.write_bytes(file)
    calls, original = [], format._Sink.write

    def interrupted(self, data):
        calls.append(data)
        if len(calls) == call + 1:
            raise KeyboardInterrupt  # into torch's writer, which makes another error of it
        return original(self, data)

    monkeypatch.setattr(format._Sink, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, training_state())
    assert path.read_bytes() == file
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error. Is the disk in order"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "Permission denied. Choose a folder that you may write to",
        ),
    ],
)
def test_a_failing_sync_or_move_is_a_checkpoint_error(file, tmp_path, monkeypatch, function, error, message):
    path = tmp_path / "x.ckpt"
    path.write_bytes(file)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(CheckpointError, match=message):
            write(path, training_state())
    assert path.read_bytes() == file
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_or_a_folder_in_its_place_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder '.*nowhere'. Make it first"):
        write(tmp_path / "nowhere" / "x.ckpt", {})
    with pytest.raises(CheckpointError, match="is no file"):
        write(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() == 0:  # whom no folder keeps out

        def denied(name, mode="r", *args, **kwargs):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

        monkeypatch.setattr("builtins.open", denied)
    else:
        folder.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"x.ckpt' cannot be written: Permission denied. Choose a folder"):
        write(folder / "x.ckpt", {"a": torch.ones(3)})
    folder.chmod(0o700)
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; writes that fail are tested above")
    try:
        write(disk / "x.ckpt", {"a": torch.ones(1000)})
        old = (disk / "x.ckpt").read_bytes()
        with pytest.raises(CheckpointError, match=r"No space left on device. Free some space"):
            write(disk / "x.ckpt", {"a": torch.ones(1_000_000)})
        assert (disk / "x.ckpt").read_bytes() == old
        assert [p.name for p in disk.iterdir()] == ["x.ckpt"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_cancelled_write_is_abandoned_at_once_or_in_the_midst(file, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(file)
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(CheckpointError, match="abandoned"):
        write(path, training_state(), cancelled=cancelled)
    assert path.read_bytes() == file
    cancelled.clear()
    state = {"a": torch.zeros(50_000_000)}
    errors = []

    def work():
        try:
            write(path, state, cancelled=cancelled)
        except CheckpointError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    while not any(p.stat().st_size > 2**22 for p in tmp_path.iterdir() if p != path) and thread.is_alive():
        time.sleep(0.001)
    cancelled.set()
    thread.join()
    assert "abandoned" in errors[0]
    assert path.read_bytes() == file
    assert list(tmp_path.iterdir()) == [path]


def test_what_this_torch_writes_and_read_would_refuse_is_not_written(file, tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    path.write_bytes(file)
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, f, **_: save({"x": {1, 2}}, f))
    with pytest.raises(CheckpointError, match="was not written, as it could not be read back"):
        write(path, {"a": 1})
    assert path.read_bytes() == file
    assert list(tmp_path.iterdir()) == [path]


def test_writing_needs_no_second_copy_in_memory(tmp_path):
    script = """
import resource, sys, torch
from minitrain.checkpoint import read, write
state = {"a": torch.ones(30_000_000), "b": torch.ones(30_000_000)}
write(sys.argv[1], {"a": torch.ones(10)})
read(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write(sys.argv[1], state)
middle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del state
read(sys.argv[1])
print(middle - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "x.ckpt"], capture_output=True, text=True, check=True
    )
    writing, both = map(int, done.stdout.split())  # KiB, of a state of 234,375
    assert writing < 60_000
    assert both < 60_000


# For people.


def test_describe_shows_the_model_as_a_table_and_the_rest_as_an_outline(file, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(file)
    text = describe(path)
    assert f"'x.ckpt': {len(file):,} bytes, format 1, checksum right" in text
    assert "model: 9 tensors, 875 parameters and buffers, 3,504 bytes" in text
    assert re.search(r"  0\.weight +float32 +\(30, 20\)\n", text)
    assert "history: list of 30\n" in text
    assert "... and 22 more" in text
    assert "    epoch: 3" in text or "  epoch: 3" in text
    assert "key: 2 bytes" in text
    assert "scaler: None" in text


def test_describe_caps_what_is_long(tmp_path):
    state = {
        "model": {f"layer{i}": torch.ones(1) for i in range(300)},
        "rows": {f"k{i}": [{"a": 1}] for i in range(900)},
    }
    state["text"] = "x" * 10_000
    state["deep"] = nest(60)
    write(tmp_path / "x.ckpt", state)
    text = describe(tmp_path / "x.ckpt")
    assert "... and 100 more" in text
    assert "(10,000 letters)" in text
    assert len(text.splitlines()) < 900
    assert max(map(len, text.splitlines())) < 200


@given(text=st.text(st.characters(exclude_categories=()), min_size=1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_string_of_a_file_can_speak_to_the_terminal(tmp_path, text):
    text = "\x1b]0;title\x07\x1b[2J\r\u202e" + text
    state = {text: text, "model": {text: torch.ones(1)}, "list": [text, [text]], "inner": {text: {text: 1}}}
    write(tmp_path / "x.ckpt", state)
    assert all(line.isprintable() for line in describe(tmp_path / "x.ckpt").split("\n"))


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "minitrain.checkpoint", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_the_command_prints_what_is_inside_and_fails_in_one_line(file, tmp_path):
    good, bad = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    good.write_bytes(file)
    bad.write_bytes(file[:-1])
    done = run("inspect", good)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == describe(good) + "\n"
    done = run("inspect", bad, good, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1
    assert "good.ckpt" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "bad.ckpt' is truncated" in done.stderr
    assert run().returncode == 2
    assert "inspect" in run("--help").stdout


def test_the_module_of_the_format_uses_one_descriptor(file, tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    path.write_bytes(file)
    verify = format._verify

    def swapped(*args):
        result = verify(*args)
        os.replace(tmp_path / "other.ckpt", path)  # after the check somebody puts another file there
        return result

    write(tmp_path / "other.ckpt", {"other": 1})
    monkeypatch.setattr(format, "_verify", swapped)
    assert "model" in read(path)


@pytest.mark.parametrize("copy", [False, True])
def test_a_tensor_and_its_conjugate_at_one_place_stay_two(copy):
    x = torch.tensor([1 + 2j, 3 - 4j])
    kept = plain({"x": x, "conjugate": x.conj(), "again": x, "minus": x.conj().imag}, copy=copy)
    assert kept["x"].tolist() == [1 + 2j, 3 - 4j]
    assert kept["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert kept["minus"].tolist() == [-2, 4]
    assert kept["again"] is kept["x"]
