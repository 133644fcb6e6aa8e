"""Memory: how much the tensors hold that are made (on every device), and giving back what was freed."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that is made within, until it is freed.

    Attributes:
        now: The bytes that live at this moment.
        peak: The most that have lived at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._ignored: set[int] = set()

    def ignore(self, tensors: list[Tensor]) -> None:
        """These were there before: a module that returns its input does not make it anew."""
        self._before = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
        self._ignored = {id(storage) for storage in self._before}  # which are held, so that no id is given anew

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return output

    def _add(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # it has none of its own: a sparse tensor, or a class of somebody's
            return
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in self._ignored:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def give_back_freed_memory() -> None:
    """Have glibc return to the system what was freed.

    It keeps freed blocks of up to 32 MiB in a heap for every few threads; with a thread for each batch that comes to as much
    again as is in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
