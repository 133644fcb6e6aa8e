"""Files of a stranger, with a correct checksum: nothing in them runs, and they take no more memory than they have bytes."""

import collections
import contextlib
import hashlib
import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from minitrain import CheckpointError
from minitrain.checkpoint import describe, plain, read, write
from minitrain.checkpoint.loaded import checked
from minitrain.checkpoint.pickles import Refused, check_pickle

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:.*support is experimental")


def wrapped(payload):
    """A payload behind a header that is right."""
    numbers = struct.pack("<IQ", 1, len(payload))
    return b"\x89MINIT\r\n" + numbers + hashlib.sha256(payload + numbers).digest() + payload


def archive(data, storages=(), *, order=None, extra=(), compression=zipfile.ZIP_STORED):
    """An archive as torch makes them, around a pickle and the bytes of some storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", (order or sys.byteorder).encode())
        file.writestr("archive/version", b"3\n")
        for key, content in enumerate(storages):
            file.writestr(f"archive/data/{key}", content)
        for name, content in extra:
            file.writestr(name, content)
    return buffer.getvalue()


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def tensor_pickle(n_bytes=16, *, kind="FloatStorage", numel=4, size=(4,), stride=(1,), offset=0, key="0", **parts):
    """The pickle of {"x": tensor}, with parts that may contradict each other."""
    parts = {
        "grad": b"\x89",
        "hooks": b"ccollections\nOrderedDict\n)R",
        "tail": b"",
        "rebuild": "_rebuild_tensor_v2",
        **parts,
    }

    def number(n):
        return pickle.dumps(n, protocol=2)[2:-1]

    def numbers(ns):
        return b"(" + b"".join(map(number, ns)) + b"t"

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    identity = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    tensor = (
        f"ctorch._utils\n{parts['rebuild']}\n(".encode() + identity + number(offset) + numbers(size) + numbers(stride)
    )
    tensor += parts["grad"] + parts["hooks"] + parts["tail"] + b"tR"
    return b"\x80\x02}" + text("x") + tensor + b"s."


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Read a payload, which must fail, and neither run anything nor take long."""
    marker = tmp_path / "marker"
    path = tmp_path / "hostile.ckpt"

    def called(*args, **kwargs):
        marker.touch()

    def refuse(payload, match="hostile.ckpt"):
        path.write_bytes(wrapped(payload))
        start = time.process_time()
        with monkeypatch.context() as patch:
            for module in (os, sys.modules[os.system.__module__]):
                for name in ("system", "execv", "fork"):
                    patch.setattr(module, name, called)
            for function in (read, describe):
                with pytest.raises(CheckpointError, match=match) as info:
                    function(path)
                assert "hostile.ckpt" in str(info.value)
                assert len(str(info.value)) < 2000
        assert time.process_time() - start < 30
        assert not marker.exists()

    return refuse


def test_the_helpers_make_files_that_are_read_when_nothing_is_wrong(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(wrapped(archive(tensor_pickle(), [struct.pack("<4f", 1, 2, 3, 4)])))
    assert read(path)["x"].tolist() == [1, 2, 3, 4]
    path.write_bytes(wrapped(saved({"a": 1})))
    assert read(path) == {"a": 1}
    path.write_bytes(wrapped(archive(pickle.dumps({"a": [1, (2, "x")]}, protocol=2))))
    assert read(path) == {"a": [1, (2, "x")]}


# Code.


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def bombs(marker):
    touch = f"touch {marker}"
    return [
        Runs(os.system, touch),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(exec, f"open({str(marker)!r}, 'w')"),
        Runs(subprocess.call, ["touch", str(marker)]),
        Runs(open, str(marker), "w"),
        Runs(__import__, "antigravity"),
    ]


@pytest.mark.parametrize("protocol", range(6))
def test_code_in_no_protocol_runs(refuse, tmp_path, protocol):
    for bomb in bombs(tmp_path / "marker"):
        for state in ({"a": bomb}, [bomb], {"a": torch.ones(2), "b": {"c": (1, bomb)}}):
            raw = pickle.dumps(state, protocol=protocol)
            refuse(raw)
            refuse(archive(raw), match="is whole, but")
            refuse(saved(state, pickle_protocol=protocol), match="is whole, but")


@pytest.mark.parametrize(
    "function", ["posix\nsystem", "os\nsystem", "nt\nsystem", "builtins\neval", "__builtin__\neval"]
)
def test_code_by_name_does_not_run(refuse, tmp_path, function):
    command = f"touch {tmp_path / 'marker'}"
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    call = b"c" + function.encode() + b"\n" + text + b"\x85R"
    for data in (b"\x80\x02}X\1\0\0\0a" + call + b"s.", b"\x80\x02" + call + b".", call + b"."):
        refuse(data)
        refuse(archive(data), match="which is neither plain data nor a tensor")
    stacked = b"\x80\x04}\x8c\x01a\x8c\x02os\x8c\x06system\x93" + text + b"\x85Rs."
    refuse(archive(stacked), match="protocol 4")
    refuse(archive(b"\x80\x02" + stacked[2:]), match="SHORT_BINUNICODE")
    refuse(archive(b"\x80\x02}X\1\0\0\0a(ios\nsystem\ns."), match="INST")


UNNEEDED = [
    collections.Counter("aab"),
    collections.OrderedDict(a=1),
    {1, 2},
    bytearray(b"abc"),
    b"abc",  # `_codecs.encode`
    1j,
    torch.Size([2]),
    torch.device("cpu"),
    torch.float32,
    torch.uint16,
    nn.Parameter(torch.ones(2)),
    torch.ones(2, requires_grad=True),
    torch.ones(2).to_sparse(),
    torch.zeros(2, device="meta"),
    torch.ones(2, dtype=torch.complex64).conj(),
    nn.Linear(1, 1),
    torch.ones(2).untyped_storage(),
]


@pytest.mark.parametrize("value", UNNEEDED, ids=lambda v: type(v).__name__)
@pytest.mark.filterwarnings("ignore")
def test_what_torch_would_load_and_no_checkpoint_needs_is_refused(refuse, value):
    refuse(saved({"a": value}), match="is whole, but")


def test_globals_that_the_user_has_allowed_to_torch_are_refused_still(refuse):
    with torch.serialization.safe_globals([nn.Linear, os.path.join]):
        refuse(saved({"a": Runs(os.path.join, "a", "b")}), match="'posixpath join'")


@pytest.mark.parametrize(
    "name", ["os.system", "torch.hub.load", "posix\nsystem", "builtins.eval", "../../etc/passwd", "__reduce__"]
)
def test_a_string_that_names_a_function_is_a_string_in_every_field(tmp_path, monkeypatch, name):
    def poison(value):
        if isinstance(value, dict):
            return {(k if isinstance(k, int) else f"{k}{name}"): poison(v) for k, v in value.items()} | {name: name}
        if isinstance(value, list | tuple):
            return type(value)([*(poison(v) for v in value), name])
        return name if isinstance(value, str) else value

    model = nn.Linear(2, 2)
    opt = torch.optim.Adam(model.parameters())
    state = {
        "loss_func": "CrossEntropyLoss",
        "optimizers": [opt.state_dict()],
        "history": [{"a": "b"}],
        "versions": {"t": "1"},
    }
    state = poison(plain(state | {"model": dict(model.state_dict()), "rng": {"numpy": ("MT19937", [1], "x")}}))

    def called(*_):
        raise AssertionError("something was called")

    for module, function in ((os, "system"), (torch.hub, "load"), (os, "popen")):
        monkeypatch.setattr(module, function, called)
    write(tmp_path / "x.ckpt", state)
    got = read(tmp_path / "x.ckpt")
    assert describe(tmp_path / "x.ckpt").count(name.replace("\n", "\\n")) > 20
    assert str(got) == str(state)


# Other archives.


def test_the_old_formats_of_torch_are_refused(refuse):
    refuse(
        saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False), match="does not end as those of torch.save"
    )
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({"a": Runs(eval, "1/0")}, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    refuse(buffer.getvalue(), match="does not end as those of torch.save")


def test_torchscript_is_refused(refuse):
    good = archive(
        pickle.dumps({"a": 1}, protocol=2), extra=[("archive/constants.pkl", b"\x80\x02)."), ("archive/code/x.py", b"")]
    )
    refuse(good, match="constants.pkl")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../evil",
            "archive/../../evil",
            "/etc/passwd",
            "archive/data/../0",
            "archive/data\\0",
            "C:\\evil",
            "archive/data/0\1x",
        ),
        *(
            "archive/DATA.PKL",
            "archive/data/00",
            "archive/data/x",
            "archive/data/",
            "archive/",
            "other/data.pkl",
            "data.pkl",
        ),
        *("archive/Data/0", "archive/data/-1", "archive/data/٣", "archive/.data/0"),
    ],
)
def test_names_of_entries_are_those_of_torch_and_no_others(refuse, name):
    payload = archive(pickle.dumps({"a": 1}, protocol=2), extra=[(name, b"x")])
    refuse(
        payload.replace(b"\1x", b"\0x") if "\1x" in name else payload,
        match=r"has an entry|belong to no tensor|malformed",
    )


def test_a_storage_that_belongs_to_no_tensor_is_refused(refuse):
    refuse(archive(tensor_pickle(), [bytes(16), b"a message"]), match="belong to no tensor")


def test_an_entry_that_is_there_twice_is_refused(refuse):
    good, evil = pickle.dumps({"a": 1}, protocol=2), pickle.dumps({"a": Runs(eval, "1")}, protocol=2)
    refuse(archive(good, extra=[("archive/data.pkl", evil)]), match="two entries")
    refuse(archive(evil, extra=[("archive/data.pkl", good)]), match="two entries")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_refused(refuse, method):
    n = 100_000_000
    payload = archive(tensor_pickle(numel=n // 4, size=(n // 4,)), [bytes(n)], compression=method)
    assert len(payload) < n // 100
    refuse(payload, match="compressed")


def patched(payload, pattern, replacement):
    assert payload.count(pattern) >= 1
    return payload.replace(pattern, replacement)


def test_a_size_of_10_gb_in_the_directory_of_the_archive_is_refused(refuse):
    n = 10 * 2**30
    small = archive(tensor_pickle(numel=n // 4, size=(n // 4,)), [bytes(16)])
    sizes = struct.pack("<2L", 16, 16)
    refuse(patched(small, sizes, struct.pack("<2L", 2**32 - 2, 2**32 - 2)), match="too short for it")
    start = small.rindex(b"PK\1\2")  # the entry of the storage, with sizes of 64 bits behind its name
    head, name, end = small[: start + 46], b"archive/data/0", small[start + 46 + 14 :]
    extra = struct.pack("<2H2Q", 1, 16, n, n)
    head = head[: start + 20] + struct.pack("<2L", 2**32 - 1, 2**32 - 1) + head[start + 28 :]
    head = head[: start + 30] + struct.pack("<H", len(extra)) + head[start + 32 :]
    length, offset = struct.unpack("<2L", end[12:20])
    end = end[:12] + struct.pack("<2L", length + len(extra), offset) + end[20:]
    refuse(head + name + extra + end, match="claims 10737418240 bytes, and the file is too short for it")


def test_archives_that_two_readers_could_understand_differently_are_refused(refuse):
    good, evil = archive(pickle.dumps({"a": 1}, protocol=2)), archive(pickle.dumps({"a": Runs(eval, "1")}, protocol=2))
    torch_made = saved({"a": 1})
    for payload in (evil + good, good + evil, torch_made + good, good + torch_made, b"junk" + good, good + b"junk"):
        refuse(payload, match="archive")
    refuse(good[:-2] + b"\4\0junk", match="does not end")
    refuse(good[:-18] + b"\1\0" + good[-16:], match="does not end")  # of several disks
    locator = torch_made.rindex(b"PK\6\7")
    refuse(torch_made[: locator + 8] + struct.pack("<Q", 5) + torch_made[locator + 16 :], match="two ends")
    end64 = torch_made.rindex(b"PK\6\6")
    for position in range(24, 56, 8):
        refuse(
            torch_made[: end64 + position] + struct.pack("<Q", 3) + torch_made[end64 + position + 8 :],
            match="two directories",
        )
    local = good.index(b"PK\3\4")
    refuse(good[: local + 30] + b"archive/DATA" + good[local + 42 :], match="another name in its place")
    directory = good.index(b"PK\1\2")
    refuse(good[: directory + 8] + b"\1\0" + good[directory + 10 :], match="unusual flags|malformed")  # encrypted
    refuse(good[: directory + 42] + struct.pack("<L", 2**31) + good[directory + 46 :], match="begins outside|malformed")
    refuse(b"", match="no archive")
    refuse(b"PK\5\6" + bytes(18), match="malformed")


def test_entries_that_overlap_are_refused(refuse):
    payload = archive(tensor_pickle(), [bytes(1000)] * 3)
    first = payload.index(b"PK\3\4", payload.index(b"version"))
    out = bytearray(payload)
    place = out.index(b"PK\1\2")
    while place >= 0:  # all storages are the first one
        n = struct.unpack("<H", out[place + 28 : place + 30])[0]
        name = bytes(out[place + 46 : place + 46 + n])
        if name.startswith(b"archive/data/"):
            out[place + 42 : place + 46] = struct.pack("<L", first)
        place = out.find(b"PK\1\2", place + 1)
    refuse(bytes(out), match="another name in its place|overlap")


def test_another_order_of_bytes_is_refused(refuse):
    other = "big" if sys.byteorder == "little" else "little"
    refuse(archive(pickle.dumps({"a": 1}, protocol=2), order=other), match="order of bytes")


# Sizes that are not what they claim.


TENSORS = [
    (dict(numel=10 * 2**30 // 4, size=(10 * 2**30 // 4,)), "claims 10737418240 bytes, and its storage has 16"),
    (dict(size=(10 * 2**30 // 4,), stride=(0,)), "larger than its storage"),
    (dict(size=(2**31, 2**31), stride=(0, 0)), "larger than its storage"),
    (dict(size=(5,)), "larger than its storage"),
    (dict(size=(2,), stride=(4,)), "larger than its storage"),
    (dict(offset=1), "larger than its storage"),
    (dict(offset=-1), "impossible shape"),
    (dict(size=(-4,), stride=(-1,)), "impossible shape"),
    (dict(size=(2,), stride=(-1,), offset=3), "impossible shape"),
    (dict(size=(4,), stride=()), "impossible shape"),
    (dict(size=(1,) * 70, stride=(1,) * 70), "impossible shape"),
    (dict(size=(2**70, 0), stride=(1, 1)), "impossible shape"),
    (dict(numel=3, size=(3,)), "claims 12 bytes, and its storage has 16"),
    (dict(numel=-4), "claims -16 bytes"),
    (dict(key="7"), "is missing"),
    (dict(key="../../etc/passwd"), "is missing"),
    (dict(kind="DoubleStorage"), "claims 32 bytes"),
    (dict(kind="QInt8Storage"), "'torch QInt8Storage'"),
    (dict(kind="uint16"), "no known type"),
    (dict(kind="UntypedStorage"), "'torch UntypedStorage'"),
    (dict(grad=b"\x88"), "unusual parts"),
    (dict(hooks=b"N"), "unusual parts"),
    (dict(hooks=b"}"), "unusual parts"),
    (dict(tail=b"}"), "unusual parts"),
    (dict(tail=b"ctorch\nuint16\n"), "unusual parts"),
    (dict(rebuild="_rebuild_tensor_v3", tail=b"ctorch\nuint16\n"), "unusual parts"),
    (dict(rebuild="_rebuild_meta_tensor_no_storage"), "_rebuild_meta_tensor_no_storage"),
    (dict(rebuild="_rebuild_parameter"), "_rebuild_parameter"),
]


@pytest.mark.parametrize(("options", "message"), TENSORS)
def test_a_tensor_that_is_not_what_it_claims_is_refused(refuse, options, message):
    refuse(archive(tensor_pickle(**options), [bytes(16)]), match=message)


def test_the_newer_kind_of_tensor_is_checked_as_well(refuse, tmp_path):
    payload = saved({"x": torch.arange(8).to(torch.uint16)})
    (tmp_path / "x.ckpt").write_bytes(wrapped(payload))
    assert read(tmp_path / "x.ckpt")["x"].tolist() == list(range(8))
    with zipfile.ZipFile(io.BytesIO(payload)) as file:
        data = file.read("archive/data.pkl")
    refuse(archive(data.replace(b"K\x08\x85", b"K\x09\x85"), [bytes(16)]), match="larger than its storage")
    refuse(archive(data.replace(b"ctorch\nuint16", b"ctorch\nuint64"), [bytes(16)]), match="larger than its storage")
    refuse(archive(data.replace(b"ctorch\nuint16", b"ctorch\nquint8"), [bytes(16)]), match="quint8")


def test_one_storage_has_one_tensor(refuse):
    one = tensor_pickle()
    two = one[:-2] + b"s" + one[3:]
    refuse(archive(two, [bytes(16)]), match="two tensors claim one storage")


# Structures that are too much.


def billion_laughs():
    data = b"\x80\x02}X\1\0\0\0a](]q\0"
    for i in range(40):
        data += b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
    return data + b"es."


STRUCTURES = {
    "billion laughs in lists": (billion_laughs(), "two places"),
    "billion laughs in tuples": (b"\x80\x02}X\1\0\0\0aK\1\x85" + b"q\0h\0\x86" * 60 + b"s.", "two places"),
    "a list in itself": (b"\x80\x02}X\1\0\0\0a]q\0h\0as.", "two places"),
    "a dict in itself": (b"\x80\x02}q\0X\1\0\0\0ah\0s.", "two places"),
    "deep lists": (b"\x80\x02}X\1\0\0\0a" + b"]" * 100_000 + b"a" * 99_999 + b"s.", "more than 64 deep"),
    "deep tuples": (b"\x80\x02}X\1\0\0\0a)" + b"\x85" * 100_000 + b"s.", "more than 64 deep"),
    "deep marks": (b"\x80\x02}X\1\0\0\0a" + b"(" * 100_000 + b"t" * 100_000 + b"s.", "more than 64 deep"),
    "many bytes": (
        b"\x80\x02}X\1\0\0\0aX" + struct.pack("<I", 2**25) + b"a" * 2**25 + b"s.",
        "more than 33554432 bytes",
    ),
    "a string longer than the file": (b"\x80\x02}X\1\0\0\0aX\xff\xff\xff\xffabc", "malformed"),
    "an int longer than the file": (b"\x80\x02}X\1\0\0\0a\x8b\xff\xff\xff\x7fabc", "malformed"),
    "an int in decimals": (b"\x80\x02}X\1\0\0\0aL" + b"9" * 1_000_000 + b"L\ns.", "malformed"),
    "a large frame": (b"\x80\x02\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "FRAME"),
    "a large bytearray": (b"\x80\x02\x96\xff\xff\xff\xff\xff\xff\xff\x7f}.", "malformed"),
    "keys with one hash": (
        b"\x80\x02}X\1\0\0\0a}("
        + b"".join(
            b"\x8a" + bytes([17]) + (i * (2**61 - 1)).to_bytes(17, "little") + b"N" for i in range(10**4, 10**4 + 9)
        )
        + b"us.",
        "64 bits",
    ),
    "a key that cannot be one": (b"\x80\x02}X\1\0\0\0a}]Nss.", "a key"),
    "a key of a float": (b"\x80\x02}X\1\0\0\0a}G" + bytes(8) + b"Nss.", "a key"),
    "no value of a key": (b"\x80\x02}(X\1\0\0\0au.", "malformed|no dict"),
    "two objects": (b"\x80\x02}}.", "one dict"),
    "an open mark": (b"\x80\x02(}.", "one dict"),
    "something after the end": (b"\x80\x02}.}", "one dict"),
    "no end": (b"\x80\x02}", "malformed"),
    "nothing": (b"", "malformed"),
    "an empty stack": (b"\x80\x02.", "one dict"),
    "memory that is not there": (b"\x80\x02h\5.", "malformed"),
    "a list": (b"\x80\x02].", "one dict"),
    "a pop too many": (b"\x80\x02}ss.", "malformed"),
    "append to a number": (b"\x80\x02}X\1\0\0\0aK\1K\1as.", "no list"),
    "a function as a value": (b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\ns.", "neither plain"),
    "a type as a value": (b"\x80\x02}X\1\0\0\0actorch\nFloatStorage\ns.", "plain"),
    "hooks as a value": (b"\x80\x02}X\1\0\0\0accollections\nOrderedDict\n)Rs.", "OrderedDict"),
    "hooks with content": (b"\x80\x02}X\1\0\0\0accollections\nOrderedDict\n)RNNss.", "no dict"),
    "a call with a state": (b"\x80\x02}X\1\0\0\0accollections\nOrderedDict\n)R}bs.", "BUILD"),
    "a new object": (b"\x80\x02}X\1\0\0\0accollections\nOrderedDict\n)\x81s.", "NEWOBJ"),
    "a set": (b"\x80\x02}X\1\0\0\0a\x8fs.", "EMPTY_SET"),
    "an extension": (b"\x80\x02}X\1\0\0\0a\x82\1s.", "EXT1"),
    "a persistent id of text": (b"\x80\x02}X\1\0\0\0aPevil\ns.", "PERSID"),
    "a persistent id of another kind": (b"\x80\x02}X\1\0\0\0aX\4\0\0\0evilQs.", "no storage"),
    "bytes that are none": (b"\x80\x02}X\1\0\0\0a}NK\1ss.", "bytes that are none"),
    "a protocol that is not there": (b"\x80\x09}.", "protocol 9"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_that_is_too_much_or_malformed_is_refused(refuse, name):
    data, message = STRUCTURES[name]
    refuse(archive(data), match=message)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"N" * 4_000_000, "more than 4000000 steps"), (b"}" * 1_000_001, "more than 1000000 lists, tuples")],
)
def test_a_structure_of_too_many_steps_or_containers_is_refused_before_it_is_built(data, message):
    with pytest.raises(Refused, match=message):
        check_pickle(b"\x80\x02}X\1\0\0\0a](" + data + b"es.", {})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_garbled_pickle_raises_anything_else_or_gives_anything_but_plain_data(tmp_path, data):
    state = {"a": [1, (2.5, "x", None)], "m": {"w": torch.ones(3), "v": torch.ones(2, dtype=torch.uint16)}, "b": b"abc"}
    write(tmp_path / "good.ckpt", state)
    with zipfile.ZipFile(io.BytesIO((tmp_path / "good.ckpt").read_bytes()[52:])) as file:
        pickled = bytearray(file.read("archive/data.pkl"))
        storages = [file.read(f"archive/data/{i}") for i in range(3)]
    codes = [ord(opcode.code) for opcode in pickletools.opcodes]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(pickled) - 1))
        pickled[place : place + data.draw(st.integers(0, 1))] = bytes(
            data.draw(st.lists(st.sampled_from(codes) | st.integers(0, 255), max_size=2))
        )
    path = tmp_path / "x.ckpt"
    path.write_bytes(wrapped(archive(bytes(pickled), storages)))
    try:
        got = read(path)
    except CheckpointError:
        return
    plain(got)
    describe(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_garbled_archive_raises_anything_else_or_gives_anything_but_plain_data(tmp_path, data):
    payload = bytearray(saved({"a": [1, 2.5], "w": torch.ones(3), "x": torch.ones(2, dtype=torch.uint16)}))
    places = [i for i in range(len(payload)) if payload[i]] or [0]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(places))
        payload[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.ckpt"
    path.write_bytes(wrapped(bytes(payload)))
    try:
        got = read(path)
    except CheckpointError:
        return
    plain(got)


@given(data=st.binary(max_size=200))
def test_the_scan_of_any_bytes_ends_in_refusal_or_peace(data):
    with contextlib.suppress(Refused):
        check_pickle(b"\x80\x02" + data, {})


def test_what_torch_gives_is_checked_even_if_the_scan_has_let_it_through():
    shared = [1]
    grown = torch.zeros(1).expand(100)
    sticky = torch.ones(1)
    sticky.evil = 1
    for value, message in [
        (nn.Parameter(torch.ones(1)), "Parameter"),
        (torch.ones(1, requires_grad=True), "more than its values"),
        (sticky, "more than its values"),
        (torch.ones(2, requires_grad=True) * 2, "more than its values"),
        (grown, "as large as its storage"),
        (torch.zeros(4)[:2], "as large as its storage"),
        (torch.zeros(10_000), "larger than the file"),
        (torch.zeros(1, device="meta"), "unusual"),
        ([shared, shared], "two places"),
        ({1.5: 0}, "a key"),
        (collections.OrderedDict(), "OrderedDict"),
        (print, "neither plain"),
        (torch.float32, "neither plain"),
    ]:
        with pytest.raises(Refused, match=message):
            checked({"a": value}, 1000)
    with pytest.raises(Refused, match="dict"):
        checked([], 1000)


MEMORY = """
import os, resource, sys, time
import torch
from minitrain.checkpoint import describe, read
from minitrain import CheckpointError
torch.load(sys.argv[1] + "/warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
for name in sorted(os.listdir(sys.argv[1])):
    if name != "warm":
        try:
            read(os.path.join(sys.argv[1], name))
        except CheckpointError as error:
            assert "MemoryError" not in str(error), (name, error)
            print("refused", name)
print("KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_hostile_files_take_no_memory_to_speak_of(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    torch.save({"a": torch.ones(3)}, folder / "warm")
    n = 10 * 2**30
    payloads = {
        "bomb": archive(
            tensor_pickle(numel=10**8, size=(10**8,)), [bytes(4 * 10**8)], compression=zipfile.ZIP_DEFLATED
        ),
        "claim": archive(tensor_pickle(numel=n // 4, size=(n // 4,)), [bytes(16)]),
        "expanded": archive(tensor_pickle(size=(n // 4,), stride=(0,)), [bytes(16)]),
        "bytearray": archive(
            b"\x80\x02}X\1\0\0\0ac__builtin__\nbytearray\n\x8a\x05" + n.to_bytes(5, "little") + b"\x85Rs."
        ),
        **{name: archive(data) for name, (data, _) in STRUCTURES.items() if name != "many bytes"},
    }
    for name, payload in payloads.items():
        (folder / name.replace(" ", "_")).write_bytes(wrapped(payload))
    done = subprocess.run([sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(payloads) + 1
    assert int(lines[-1].split()[1]) < 150_000  # a million steps of one byte make lists and tuples of a hundred bytes


def test_the_largest_structure_that_is_read_takes_bounded_memory(tmp_path):
    (tmp_path / "warm").write_bytes(saved({"a": torch.ones(3)}))
    (tmp_path / "most").write_bytes(wrapped(archive(b"\x80\x02}X\1\0\0\0a](" + b"}" * 999_000 + b"es.")))
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 300_000
