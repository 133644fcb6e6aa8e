"""`plain`: a nested state as plain types and tensors, which is all that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from minitrain.checkpoint.dtypes import DTYPES
from minitrain.errors import CheckpointError

MAX_DEPTH = 64  # containers within one another
_MAX_NODES = 4_000_000  # more cannot be read back
_MAX_BITS = 2032  # of an int, which a pickle of protocol 2 holds in 255 bytes
_MAX_KEY = 2**63
SCALARS = frozenset({str, int, float, bool, type(None)})
_CONTAINERS = (dict, list, tuple)
BYTES = None  # the only key of a dict that stands for bytes in a file: no plain dict can have it
_REMEDIES = {
    "set": "a sorted list",
    "frozenset": "a sorted list",
    "bytearray": "bytes(...)",
    "complex": "torch.tensor(...)",
    "ndarray": "torch.as_tensor(...)",
    "bool_": "bool(...)",
    "bool": "bool(...)",
    "datetime": "its isoformat()",
    "PosixPath": "str(...)",
    "WindowsPath": "str(...)",
    "dtype": "str(...)",
    "device": "str(...)",
    "Generator": "its get_state()",
}

Path = tuple[Any, ...]  # of keys and indices, from the top


def plain(
    state: Any, *, where: str = "state", copy: bool = False, buffers: MutableMapping[Any, Tensor] | None = None
) -> Any:
    """A nested state in plain types: dict, list, tuple, str, bytes, int, float, bool, None and tensors.

    Subclasses become the plain type: an OrderedDict a dict, a namedtuple a tuple, a numpy.float64 a float, a parameter a
    detached tensor. Containers are always new ones. A tensor that is there twice is there twice as one and the same.

    Args:
        state: The state. Keys are strings or integers.
        where: What it is called in messages.
        copy: Copy every tensor into CPU memory, so that training cannot change it any more. Otherwise only those are copied
            that share memory with something else: views of a larger tensor, expanded tensors.
        buffers: Copies of an earlier call, which are written over where shape, strides and dtype are the same still, as new
            memory is slow. What the earlier call gave then has the new values. The caller owns the dict and passes it again;
            tensors that are gone are dropped from it.

    Returns:
        The plain state. Tensors that are dense keep their strides, others become contiguous.

    Raises:
        CheckpointError: Something in it is of another type, or is nested too deep or in itself; names the place.

    Example:
        >>> from collections import OrderedDict
        >>> plain(OrderedDict(lr=0.1, shape=torch.Size([2, 3])))
        {'lr': 0.1, 'shape': (2, 3)}
        >>> plain({"seen": {3, 1}})
        Traceback (most recent call last):
            ...
        minitrain.errors.CheckpointError: state.seen is a set, which a checkpoint cannot hold. Give it a sorted list instead.
    """
    with torch.no_grad(), torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        walk = _Walk(where, copy, buffers, escape=False)
        result = walk(state, ())
    walk.drop_unused()
    return result


def escaped(state: Any) -> Any:
    """The plain state as it goes into a file: bytes are tensors under the key None, as `weights_only` has no bytes."""
    with torch.no_grad(), torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
        return _Walk("state", copy=False, buffers=None, escape=True)(state, ())


class _Walk:
    """One walk through a state."""

    def __init__(self, where: str, copy: bool, buffers: MutableMapping[Any, Tensor] | None, *, escape: bool) -> None:
        self._where, self._copy, self._buffers, self._escape = where, copy, buffers, escape
        self._tensors: dict[
            int, list[tuple[Tensor, Tensor]]
        ] = {}  # by memory: those given, which lives on, and the result
        self._memory: set[int] = set()  # where a tensor begins that has been kept uncopied
        self._open: set[int] = set()  # the containers around the present place
        self._used: set[Path] = set()
        self._nodes = 0

    def __call__(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if kind in SCALARS:
            if kind is int and value.bit_length() > _MAX_BITS:
                raise self._error(path, f"an int of {value.bit_length()} bits", "str(...)")
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, _CONTAINERS):
            return self._container(value, path)
        if isinstance(value, bytes):
            return _to_bytes(value) if not self._escape else {BYTES: _as_tensor(_to_bytes(value))}
        for base, convert in _CONVERSIONS:
            if isinstance(value, base):
                return self(convert(value), path)
        raise self._error(path, _a(_name(kind)), _remedy(value))

    def drop_unused(self) -> None:
        """Forget the buffers of tensors that are gone."""
        if self._buffers is not None:
            for path in [path for path in self._buffers if path not in self._used]:
                del self._buffers[path]

    def _container(self, value: Any, path: Path) -> Any:
        if id(value) in self._open:
            raise CheckpointError(f"{self._name(path)} is contained in itself. Save a copy without the circle.")
        if len(path) >= MAX_DEPTH:
            raise CheckpointError(
                f"{self._name(path[:3])}... is nested more than {MAX_DEPTH} deep, which a checkpoint cannot hold. Flatten it."
            )
        self._nodes += len(value) + 1
        if self._nodes > _MAX_NODES:
            raise CheckpointError(
                f"{self._where} has more than {_MAX_NODES} values, at {self._name(path)}. Keep long rows of numbers in tensors."
            )
        self._open.add(id(value))
        result: Any
        if isinstance(value, dict):
            result = {self._key(k, path): v if type(v) in _FAST else self(v, (*path, k)) for k, v in value.items()}
            if len(result) != len(value):
                raise CheckpointError(f"{self._name(path)} has keys that are equal as plain types. Rename them.")
        else:
            result = [v if type(v) in _FAST else self(v, (*path, i)) for i, v in enumerate(value)]
            if isinstance(value, tuple):
                result = tuple(result)
        self._open.discard(id(value))
        return result

    def _key(self, key: Any, path: Path) -> Any:
        if type(key) is str:
            return key
        if isinstance(key, str):
            return str.__str__(key)
        if isinstance(key, int) and abs(key) <= _MAX_KEY:
            return key if type(key) is bool else int.__int__(key)
        raise CheckpointError(
            f"{self._name(path)} has the key {key!r:.100}, {_a(_name(type(key)))}. Keys must be str, or int of 64 bits."
        )

    def _tensor(self, tensor: Tensor, path: Path) -> Tensor:
        if type(tensor) not in _COMMON:
            self._check_kind(tensor, path)
        if tensor.is_meta:
            raise self._error(path, "a tensor on the meta device, without values", "a tensor with values")
        if tensor.layout is not torch.strided:
            raise self._error(path, f"a tensor of layout {tensor.layout}", "to_dense(), or its indices and values")
        if tensor.dtype not in DTYPES:
            raise self._error(path, f"a tensor of dtype {tensor.dtype}", "one of a common dtype: dequantize(), to(...)")
        there = self._tensors.setdefault(tensor.data_ptr() or id(tensor), [])
        for other, result in there:
            if _is_same(other, tensor):
                return result
        result = self._copied(tensor, path) if self._copy else self._kept(tensor)
        there.append((tensor, result))
        return result

    def _check_kind(self, tensor: Tensor, path: Path) -> None:
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise self._error(path, _a(_name(type(tensor))), "a plain tensor, as full_tensor() or to_local() make")
        if is_lazy(tensor):
            raise self._error(
                path, "an uninitialised parameter", "the model after its first batch, which gives it a shape"
            )

    def _copied(self, source: Tensor, path: Path) -> Tensor:
        target = None
        if self._buffers is not None:
            self._used.add(path)
            target = self._buffers.get(path)
        if (
            target is None
            or target.dtype != source.dtype
            or target.shape != source.shape
            or not _dense_alike(target, source)
        ):
            target = _empty_like(source, "cpu")
            if self._buffers is not None:
                self._buffers[path] = target
        return target.copy_(source)

    def _kept(self, source: Tensor) -> Tensor:
        """The tensor, or a copy of one that is not alone in its memory."""
        source = source.detach()
        if type(source) is not Tensor:
            source = source.as_subclass(Tensor)
        if source.is_conj() or source.is_neg():  # views that are computed when they are read
            source = source.resolve_conj().resolve_neg()
        start = source.data_ptr()
        alone = source.untyped_storage().nbytes() == source.numel() * source.itemsize and start not in self._memory
        if alone and _is_dense(source) and not source.is_inference():
            if start:
                self._memory.add(start)
            return source
        return _empty_like(source, source.device).copy_(source)

    def _error(self, path: Path, what: str, remedy: str) -> CheckpointError:
        return CheckpointError(
            f"{self._name(path)} is {what}, which a checkpoint cannot hold. Give it {remedy} instead."
        )

    def _name(self, path: Path) -> str:
        return self._where + "".join(
            f".{key}" if isinstance(key, str) and key.isprintable() and key else f"[{key!r:.100}]" for key in path
        )


_FAST = SCALARS - {int}
_COMMON = frozenset({Tensor, torch.nn.Parameter})
_CONVERSIONS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors at one place are the same one: of one form, and read in the same way."""
    form = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and a.device == b.device
    return form and a.is_conj() == b.is_conj() and a.is_neg() == b.is_neg()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, each in a place of its own, in whatever order."""
    expected = 1
    for step, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n != 1:
            if step != expected:
                return False
            expected *= n
    return True


def _empty_like(tensor: Tensor, device: torch.device | str) -> Tensor:
    memory_format = torch.preserve_format if _is_dense(tensor) else torch.contiguous_format
    return torch.empty_like(tensor, device=device, memory_format=memory_format)


def _dense_alike(target: Tensor, source: Tensor) -> bool:
    """Whether `target`, which is dense, has the strides that a copy of `source` has."""
    return target.stride() == source.stride() or (target.is_contiguous() and not _is_dense(source))


def _to_bytes(value: bytes) -> bytes:
    return bytes(memoryview(value))


def _as_tensor(value: bytes) -> Tensor:
    if not value:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(value), dtype=torch.uint8)


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _a(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _remedy(value: Any) -> str:
    kind = type(value)
    if isinstance(value, torch.nn.Module):
        return "module.state_dict()"
    if kind.__name__ in _REMEDIES:
        return _REMEDIES[kind.__name__]
    if kind.__module__ == "numpy":  # the floats among them are floats
        return "float(...)" if "float" in kind.__name__ else "int(...)" if hasattr(kind, "__index__") else "str(...)"
    if not isinstance(value, type) and callable(getattr(value, "state_dict", None)):
        return "its state_dict()"
    return "numbers, strings, lists, dicts and tensors"
