"""What the pickle in a checkpoint says, found out without unpickling it.

`torch.load` with `weights_only` runs no code of a file, but it believes what a file says of sizes, and it knows more than a
checkpoint needs. Here the few instructions that `torch.save` makes of plain data and tensors are followed on a stack of
stand-ins: nothing is imported, called or allocated, whatever they say.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

from minitrain.checkpoint.dtypes import NEWER, STORAGES

MAX_BYTES = 32 * 2**20  # of the pickle: tensors are not in it
MAX_STEPS = 4_000_000
MAX_CONTAINERS = 1_000_000  # an instruction of one byte makes an object of a hundred
MAX_KEY = 2**63  # of a dict; greater integers could be chosen so that all hashes collide
_MAX_NDIM = 64  # as in torch
_DEVICE = re.compile(r"[a-z]{1,16}(:\d{1,4})?")


class Refused(Exception):  # noqa: N818 - caught by those who know the file's name
    """Why a file is not what a checkpoint may be."""


class _Kind(Enum):
    """What stands on the stack for things that are not looked into."""

    LIST = auto()
    DICT = auto()
    TENSOR = auto()
    HOOKS = auto()


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    type_name: str
    n_bytes: int


_GLOBALS = {
    **{f"torch {name}": _Global(name) for name in (*STORAGES, *NEWER)},
    "torch.storage UntypedStorage": _Global("UntypedStorage"),
    "torch._utils _rebuild_tensor_v2": _Global("_rebuild_tensor_v2"),
    "torch._utils _rebuild_tensor_v3": _Global("_rebuild_tensor_v3"),
    "collections OrderedDict": _Global("OrderedDict"),
}


def check_pickle(data: bytes, storages: Mapping[str, int]) -> None:
    """Check that a pickle makes one dict of plain data and tensors, and that its tensors fit their storages.

    Args:
        data: The pickle.
        storages: The storages of the archive by key, and the number of bytes of each.

    Raises:
        Refused: It does not; with the reason.

    Example:
        >>> import pickle
        >>> check_pickle(pickle.dumps({"epoch": 3}, protocol=2), {})
        >>> check_pickle(pickle.dumps({"f": print}, protocol=2), {})
        Traceback (most recent call last):
            ...
        minitrain.checkpoint.pickles.Refused: it names '__builtin__ print', which is neither plain data nor a tensor
    """
    if len(data) > MAX_BYTES:
        raise Refused(f"its structure takes {len(data)} bytes, and at most {MAX_BYTES} are read")
    machine, end = _Machine(storages), 0
    try:
        for n, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if n >= MAX_STEPS:
                raise Refused(f"its structure takes more than {MAX_STEPS} steps to build")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise Refused(f"its structure uses the instruction {opcode.name}, which no checkpoint needs")
            step(machine, argument)
            end = (position or 0) + 1
    except (ValueError, LookupError, TypeError) as error:
        raise Refused(f"its structure is malformed ({type(error).__name__})") from error
    if end != len(data) or machine.below or len(machine.stack) != 1 or machine.stack[0] is not _Kind.DICT:
        raise Refused("its structure is not one dict")
    if machine.used != storages.keys():
        raise Refused("its archive has storages that belong to no tensor")


class _Machine:
    """The stack, the stacks below the marks, and the memory of a pickle."""

    def __init__(self, storages: Mapping[str, int]) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memory: dict[int, Any] = {}
        self._storages, self.used = storages, set[str]()
        self._n_made = 0

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def make(self, value: Any) -> None:
        self._n_made += 1
        if self._n_made > MAX_CONTAINERS:
            raise Refused(f"its structure has more than {MAX_CONTAINERS} lists, tuples and dicts")
        self.stack.append(value)

    def protocol(self, version: int) -> None:
        if version != 2:
            raise Refused(f"its structure is of pickle protocol {version}, not 2")

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def put(self, index: int) -> None:
        self.memory[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memory[index])

    def last(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise IndexError
        items = self.stack[-n:]
        del self.stack[-n:]
        return items

    def add_to_list(self, items: list[Any]) -> None:
        if self.stack[-1] is not _Kind.LIST:
            raise Refused("its structure appends to what is no list")

    def add_to_dict(self, items: list[Any]) -> None:
        if self.stack[-1] is not _Kind.DICT or len(items) % 2:
            raise Refused("its structure puts a key into what is no dict")
        for key in items[::2]:
            if not (key is None or isinstance(key, str) or (isinstance(key, int) and abs(key) <= MAX_KEY)):
                raise Refused("a dict has a key that is neither a string nor an integer of 64 bits")

    def name(self, name: str) -> None:
        if name not in _GLOBALS:
            raise Refused(f"it names {name[:100]!r}, which is neither plain data nor a tensor")
        self.push(_GLOBALS[name])

    def storage(self, _: Any) -> None:
        """A persistent id, which is a storage: it must be there, be as large as it says, and belong to one tensor."""
        match self.stack.pop():
            case ("storage", _Global(type_name), str(key), str(device), int(numel)) if _DEVICE.fullmatch(device):
                dtype = STORAGES.get(type_name)
                if dtype is None and type_name != "UntypedStorage":
                    raise Refused("a storage is of no known type")
                n_bytes = numel * (1 if dtype is None else dtype.itemsize)
            case _:
                raise Refused("it refers to something that is no storage of a tensor")
        if key not in self._storages:
            raise Refused(f"the storage {key[:20]!r} of a tensor is missing")
        if n_bytes != self._storages[key]:
            raise Refused(f"a tensor claims {n_bytes} bytes, and its storage has {self._storages[key]}")
        if key in self.used:
            raise Refused("two tensors claim one storage")
        self.used.add(key)
        self.push(_Storage(type_name, n_bytes))

    def call(self, _: Any) -> None:
        function, arguments = self.last(2)
        if function == _Global("OrderedDict") and arguments == ():
            self.make(_Kind.HOOKS)
        elif function in (_Global("_rebuild_tensor_v2"), _Global("_rebuild_tensor_v3")):
            _check_tensor(arguments, with_dtype=function.name == "_rebuild_tensor_v3")
            self.push(_Kind.TENSOR)
        else:
            raise Refused("it calls something that makes no tensor")


def _check_tensor(arguments: Any, *, with_dtype: bool) -> None:
    match arguments:
        case (_Storage() as storage, int(offset), tuple(size), tuple(stride), False, _Kind.HOOKS) if not with_dtype:
            dtype = STORAGES.get(storage.type_name)
        case (_Storage() as storage, int(offset), tuple(size), tuple(stride), False, _Kind.HOOKS, _Global(name)) if (
            with_dtype and storage.type_name == "UntypedStorage"
        ):
            dtype = NEWER.get(name)
        case _:
            raise Refused("a tensor is made of unusual parts")
    if dtype is None:
        raise Refused("a tensor is of no known dtype")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > _MAX_NDIM or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise Refused("a tensor has an impossible shape")
    numel, extent = 1, 1 + offset
    for n, step in zip(size, stride, strict=True):
        numel *= n
        extent += (n - 1) * step
    if numel and max(numel, extent) * dtype.itemsize > storage.n_bytes:
        raise Refused(f"a tensor of shape {size} is larger than its storage of {storage.n_bytes} bytes")


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "STOP": lambda m, _: None,
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), _Machine.push),
    "EMPTY_DICT": lambda m, _: m.make(_Kind.DICT),
    "EMPTY_LIST": lambda m, _: m.make(_Kind.LIST),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.make(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.make(tuple(m.last(1))),
    "TUPLE2": lambda m, _: m.make(tuple(m.last(2))),
    "TUPLE3": lambda m, _: m.make(tuple(m.last(3))),
    "APPEND": lambda m, _: m.add_to_list(m.last(1)),
    "APPENDS": lambda m, _: m.add_to_list(m.since_mark()),
    "SETITEM": lambda m, _: m.add_to_dict(m.last(2)),
    "SETITEMS": lambda m, _: m.add_to_dict(m.since_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
}
