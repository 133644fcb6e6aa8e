"""What the loop does with a batch, however nested it is: split, count, move, join, describe."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from minitrain.errors import DataError


def split_batch(batch: Any) -> tuple[Any, Any]:
    """`(xb, yb)`: all but the last element, and the last. One input stays bare, several are a tuple.

    A bare tensor is its own input, and `yb` is None.

    Raises:
        DataError: The batch is anything else.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) >= 2 and not isinstance(batch, PackedSequence):
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise DataError(
        f"a batch is {describe_batch(batch)}, wanted (x, y), (x1, ..., y) or a bare tensor. Make the loader yield that, or "
        "override Learner.split_batch."
    )


def n_samples(batch: Any) -> int:
    """The leading dimension of the first tensor in a batch.

    Raises:
        DataError: There is no tensor with a dimension in it.
    """
    first = batch[0] if type(batch) in (tuple, list) and batch else batch
    if not isinstance(first, Tensor):  # nested deeper
        first = next(tensors_in(batch), None)
    if first is None or first.dim() == 0:
        raise DataError(f"cannot tell how many samples are in {describe_batch(batch)}: override Learner.n_samples.")
    return len(first)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move every tensor of a nested batch: tuples, lists, mappings, named tuples, and objects with a `to` method.

    What is there already is returned as it is, the same object, and all else is left alone. Containers keep their type.

    Example:
        >>> batch = {"x": torch.zeros(2), "names": ["a", "b"]}
        >>> to_device(batch, "cpu") is batch
        True
    """
    if isinstance(batch, Tensor):
        if batch.device == device:
            return batch
        # Not towards the CPU: who reads there would not wait for the copy to arrive.
        return batch.to(device, non_blocking=torch.device(device).type != "cpu")
    to = getattr(batch, "to", None)
    if callable(to) and not inspect.isclass(
        batch
    ):  # asked first: a PackedSequence is also a tuple, a BatchEncoding a mapping
        return to(device)
    if isinstance(batch, (tuple, list, Mapping)):
        items = list(batch.values()) if isinstance(batch, Mapping) else batch
        moved = [to_device(item, device) for item in items]
        return batch if all(map(operator.is_, moved, items)) else _like(batch, moved)
    return batch


def concatenate(parts: Sequence[Any]) -> Any:
    """Batches of one form, as one: tensors along their first dimension (scalars are stacked), containers item by item.

    Example:
        >>> concatenate([(torch.zeros(2, 3), None), (torch.zeros(1, 3), None)])[0].shape
        torch.Size([3, 3])
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts)) if first.dim() else torch.stack(list(parts))
    if isinstance(first, Mapping):
        return _like(first, [concatenate([part[key] for part in parts]) for key in first])
    if isinstance(first, (tuple, list)):
        return _like(first, [concatenate(items) for items in zip(*parts, strict=True)])
    return None if first is None else list(parts)


def describe_batch(batch: Any) -> str:
    """Shapes, dtypes and devices of a nested batch, for error messages.

    Example:
        >>> describe_batch((torch.zeros(64, 1, 28, 28), {"y": torch.zeros(64, dtype=torch.int64)}))
        "(float32 (64, 1, 28, 28) cpu, {'y': int64 (64,) cpu})"
    """
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)} {batch.device}"
    if isinstance(batch, Mapping):
        return "{" + _few(f"{key!r:.40}: {describe_batch(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        fields = zip(batch._fields, batch, strict=True)
        return f"{type(batch).__name__}({_few(f'{name}={describe_batch(item)}' for name, item in fields)})"
    if isinstance(batch, (tuple, list)):
        inner = _few(map(describe_batch, batch))
        return f"[{inner}]" if isinstance(batch, list) else f"({inner}{',' if len(batch) == 1 else ''})"
    return f"{batch!r}"[:40] if batch is None or isinstance(batch, (bool, int, float, str)) else type(batch).__name__


def _few(texts: Iterable[str]) -> str:
    first = list(itertools.islice(texts, 9))
    return ", ".join([*first[:8], "..."] if len(first) > 8 else first)


def _like(container: Any, items: list[Any]) -> Any:
    """A container of the same type around other items."""
    if not isinstance(container, Mapping):
        return getattr(container, "_make", type(container))(items)  # a named tuple has _make
    values = dict(zip(container, items, strict=True))
    try:
        return type(container)(values)  # type: ignore[call-arg]
    except TypeError:  # a mapping that is not made from a dict
        return values


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a nested batch; not those of a `PackedSequence`, whose first dimension is time steps."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, PackedSequence):
        return
    elif isinstance(batch, (tuple, list, Mapping)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(item)
