"""`Batches` of `ModelInputs`: what the model is called with, made from the forms of data that a user may pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from minitrain.batch import split_batch, to_device
from minitrain.errors import DataError, InitError
from minitrain.peek import peek

FORMS = "a tensor, a tuple of positional arguments, a dict of keyword arguments, or a loader (a list of batches)"


class ModelInputs(NamedTuple):
    """The positional and keyword arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, nested ones too."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def fresh(self) -> ModelInputs:
        """A copy: a model that begins with an in-place operation cannot spoil the original."""
        return ModelInputs(*tree_map_only(Tensor, torch.clone, (self.args, dict(self.kwargs))))

    def to(self, device: torch.device) -> ModelInputs:
        """The same on `device`."""
        return ModelInputs(tuple(to_device(arg, device) for arg in self.args), to_device(dict(self.kwargs), device))

    def __str__(self) -> str:
        return ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors) or "without tensors"

    def check(self) -> None:
        """Raise unless these are samples with values.

        Raises:
            DataError: There is no sample in them.
            InitError: They hold no values (meta tensors).
        """
        tensors = self.tensors
        if any(tensor.is_meta for tensor in tensors):
            raise InitError(f"the batch of shape {self} is on the meta device and has no values. Pass real data.")
        sized = [tensor for tensor in tensors if not tensor.is_nested and tensor.ndim]
        if sized and all(tensor.shape[0] == 0 for tensor in sized):
            raise DataError(f"the batch of shape {self} holds no sample. Pass a batch of one sample or more.")

    @property
    def varies(self) -> bool:
        """Not all values are equal, nor all samples; true where there is no tensor to tell by."""
        return not all(map(_is_dense, self.tensors)) or not self.tensors or any(map(_varies, self.tensors))

    @property
    def nbytes(self) -> int:
        """The memory of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Differs where the values differ, for all that data loaders do."""
        return tuple((tuple(t.shape), _total(t)) for t in self.tensors if _is_dense(t) and not t.is_complex())


class Batches:
    """The batches that statistics are taken over: the same ones each time this is iterated over.

    Args:
        source: Yields the model's inputs, from the beginning each time.
        wanted: How many of them; None: all.
        device: Where the model is.
        budget: How many bytes may be kept of what is drawn from a loader; beyond that it is drawn again each time.
        held: The batches lie in memory anyway.
        what: The name of the argument that they come from.

    Attributes:
        nbytes: The size of each batch.
        kept_bytes: What is kept of them beside what lay in memory anyway.
        shape: The shapes of the first batch, for reports.

    Raises:
        DataError: There are fewer batches than wanted, or no sample in one.
        InitError: They do not vary.
    """

    def __init__(
        self,
        source: Iterable[ModelInputs],
        wanted: int | None,
        device: torch.device,
        *,
        budget: int = 0,
        held: bool = False,
        what: str = "data",
    ) -> None:
        self._source, self._wanted, self._device = source, wanted, device
        self._kept: list[ModelInputs] | None = []
        self._fingerprints: list[tuple[Any, ...]] = []
        self.nbytes: list[int] = []
        self.kept_bytes = 0
        varies, first, seen = False, None, set[int]()
        for inputs in itertools.islice(source, wanted):
            inputs.check()
            first = first or inputs
            varies = varies or inputs.varies or not _equal(inputs, first)
            places = {tensor.data_ptr() for tensor in inputs.tensors if _is_dense(tensor) and tensor.numel()}
            if not held and places & seen:  # the loader fills the same memory anew
                self._kept = None
            seen |= places
            moved = inputs.to(device)
            self.nbytes.append(inputs.nbytes)
            copied = not held or any(a is not b for a, b in zip(moved.tensors, inputs.tensors, strict=True))
            self.kept_bytes += moved.nbytes if copied else 0
            if self._kept is not None:
                self._kept.append(moved)
                if wanted != 1 and self.kept_bytes > budget:
                    self._kept = None
            if wanted != 1 and not held:
                self._fingerprints.append(inputs.fingerprint)
        if first is None:
            raise DataError(f"{what} holds no batch, wanted one at least: drop_last with fewer samples than a batch?")
        if wanted is not None and len(self) < wanted:
            raise DataError(
                f"batches={wanted}, but {what} holds {_batches(len(self))} only. Pass batches={len(self)}, or batches='all'."
            )
        if self._kept is None:
            self.kept_bytes = 0
        self.shape = str(first)
        if not varies:
            raise InitError(
                f"the batch of shape {self} does not vary: all its samples, or all its values, are equal. What the layers "
                "make of it is the spread of their biases, not of the data. Pass real data."
            )

    def __len__(self) -> int:
        return len(self.nbytes)

    def __iter__(self) -> Iterator[ModelInputs]:
        if self._kept is not None:
            yield from self._kept
            return
        n = 0
        for n, inputs in enumerate(itertools.islice(self._source, len(self)), 1):
            if self._fingerprints and inputs.fingerprint != self._fingerprints[n - 1]:
                raise InitError(
                    f"batch {n - 1} is another one than before: the loader gives other data each time. Pass a loader without "
                    "random augmentation, fewer batches, or a larger max_memory, with which they are drawn once."
                )
            yield inputs.to(self._device)
        if n < len(self):
            raise InitError(
                f"the loader gave {len(self)} batches before, and now {n}: it cannot be gone through again. Pass a list, or a "
                "larger max_memory, with which the batches are drawn once."
            )

    def let_go(self) -> None:
        """Keep none of them: they are drawn again each time."""
        if self.kept_bytes:
            self._kept, self.kept_bytes = None, 0

    @property
    def first(self) -> ModelInputs:
        """The first batch."""
        return next(iter(self))

    def __str__(self) -> str:
        return self.shape if len(self) == 1 else f"{self.shape} and {_batches(len(self) - 1)} more"


def from_inputs(inputs: Any) -> ModelInputs:
    """The Learner's rule: a tuple holds the positional arguments, anything else is the only one."""
    return ModelInputs(inputs if type(inputs) is tuple else (inputs,))


def from_data(data: Any, inputs: Callable[[Any], Any] | None) -> tuple[Iterable[ModelInputs], bool]:
    """What the model is to be called with, batch by batch.

    Args:
        data: One of `FORMS`. A loader is left where it was.
        inputs: For loaders: picks the inputs (tensor, tuple or dict) out of a batch.

    Returns:
        The arguments of the model for each batch, and whether they lie in memory already.

    Raises:
        TypeError: `data` is none of `FORMS`, or `inputs` comes with something that is no loader.
    """
    if isinstance(data, (Tensor, tuple, Mapping)):
        if inputs is not None:
            raise TypeError(
                f"inputs= picks from the batches of a loader, but data is a {type(data).__name__}: leave it out."
            )
        return [_from_plain(data)], True
    if isinstance(data, list) and any(isinstance(item, Tensor) for item in data):
        raise TypeError(
            f"data is a list of {len(data)} whose items are tensors, as next(iter(dataloader)) gives it: is it one batch "
            "(x, y), or are they batches? Pass x, or [(x, y)]."
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)) or hasattr(data, "__array__"):
        raise TypeError(f"data={_short(data)} (type={type(data).__name__}), wanted {FORMS}.")

    def convert(batch: Any) -> ModelInputs:
        return from_inputs(split_batch(batch)[0]) if inputs is None else _from_plain(inputs(batch))

    return _Mapped(peek(data), convert), isinstance(data, list)


def from_stage(batches: Iterable[Any], wanted: int | None) -> Iterable[ModelInputs]:
    """The batches that a stage is called with; of what can be gone through once only, those that are wanted are kept."""
    if isinstance(batches, Iterator):
        batches = list(itertools.islice(batches, wanted))
    return _Mapped(batches, from_inputs)


class _Mapped:
    """A function of each item, anew in each iteration."""

    def __init__(self, items: Iterable[Any], function: Callable[[Any], ModelInputs]) -> None:
        self._items, self._function = items, function

    def __iter__(self) -> Iterator[ModelInputs]:
        return map(self._function, self._items)


def first(batches: Iterable[Any], what: str) -> Any:
    """The first batch.

    Raises:
        DataError: There is none.
    """
    for batch in batches:
        return batch
    raise DataError(f"{what} holds no batch, wanted one at least: drop_last with fewer samples than a batch?")


def _from_plain(data: Any) -> ModelInputs:
    return ModelInputs((), data) if isinstance(data, Mapping) else from_inputs(data)


def _varies(tensor: Tensor) -> bool:
    """Not all values are equal; for measured data (floating point), not all samples."""
    if tensor.numel() == 1:
        return bool(tensor.count_nonzero())
    if tensor.is_floating_point() and tensor.shape[0] > 2 and _varies(tensor[:2]):  # mostly seen by the first two
        return True
    if tensor.is_floating_point() and tensor.shape[0] > 1:
        return bool((tensor != tensor[:1]).any())
    return bool((tensor != tensor.flatten()[0]).any())


def _total(tensor: Tensor) -> float:
    """A sum in which each place counts differently: a flipped image has another one."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    values = tensor.detach().reshape(-1).to(wide).nan_to_num(0.1, 0.2, 0.3)
    return float(values.dot(torch.linspace(1, 2, values.numel(), dtype=wide, device=values.device)))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _equal(a: ModelInputs, b: ModelInputs) -> bool:
    """The same values; of nothing but tensors is there any telling."""
    return len(a.tensors) == len(b.tensors) and all(
        x.shape == y.shape and bool((x == y).all()) for x, y in zip(a.tensors, b.tensors, strict=True)
    )


def _batches(n: int) -> str:
    return f"{n} batch" if n == 1 else f"{n} batches"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
