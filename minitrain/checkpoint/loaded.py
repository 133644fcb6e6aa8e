"""What `torch.load` has made of a file, checked once more."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from minitrain.checkpoint.dtypes import DTYPES
from minitrain.checkpoint.pickles import Refused
from minitrain.checkpoint.plain import BYTES, MAX_DEPTH, SCALARS

_KEYS = frozenset({str, int, bool})


def checked(state: Any, size: int) -> dict[Any, Any]:
    """The state, with bytes where a tensor stood for them.

    Args:
        state: What `torch.load` gave.
        size: Of the file, in bytes: its tensors cannot have more.

    Raises:
        Refused: It is not a dict of plain types and tensors, or a container is at two places or nested too deep.
    """
    if type(state) is not dict:
        raise Refused("it does not hold a dict")
    result: dict[Any, Any] = _Check(size)(state, 0)
    return result


class _Check:
    def __init__(self, size: int) -> None:
        self._left = size
        self._seen: set[int] = set()
        self._tensors: dict[int, Tensor] = {}

    def __call__(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is Tensor:
            return self._tensor(value)
        if kind not in (dict, list, tuple):
            raise Refused(f"it holds {kind.__module__}.{kind.__name__}, which is neither plain data nor a tensor")
        if id(value) in self._seen and value != ():  # the empty tuple is everywhere the same
            raise Refused("it holds a list, tuple or dict at two places, which could be endless to walk through")
        if depth > MAX_DEPTH:
            raise Refused(f"it is nested more than {MAX_DEPTH} deep")
        self._seen.add(id(value))
        if kind is not dict:
            return kind([self(v, depth + 1) for v in value])
        if value.keys() == {BYTES}:
            return self._bytes(value[BYTES])
        if not all(type(key) in _KEYS for key in value):
            raise Refused("it holds a dict with a key that is neither a string nor an integer")
        return {key: self(v, depth + 1) for key, v in value.items()}

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._tensors:  # tied
            return tensor
        self._tensors[id(tensor)] = tensor
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise Refused("it holds a tensor of an unusual layout, dtype or device")
        if tensor.requires_grad or tensor.grad_fn is not None or vars(tensor):
            raise Refused("it holds a tensor with more than its values")
        n_bytes = tensor.numel() * tensor.itemsize
        if n_bytes != tensor.untyped_storage().nbytes():
            raise Refused("it holds a tensor that is not as large as its storage")
        self._left -= n_bytes
        if self._left < 0:
            raise Refused("its tensors are larger than the file")
        return tensor

    def _bytes(self, tensor: Any) -> bytes:
        if type(tensor) is not Tensor or self._tensor(tensor).dtype != torch.uint8 or tensor.ndim != 1:
            raise Refused("it holds bytes that are none")
        return ctypes.string_at(tensor.contiguous().data_ptr(), tensor.numel())  # numpy may be missing
