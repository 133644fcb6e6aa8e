"""`ModelInputs`: what the model is called with, made from the forms of data that a user may pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
        """Raise unless something can be learnt from these inputs.

        Raises:
            DataError: There is no sample in them.
            InitError: They do not vary, or hold no values (meta tensors).
        """
        tensors = self.tensors
        if any(tensor.is_meta for tensor in tensors):
            raise InitError(f"the batch of shape {self} is on the meta device and has no values. Pass real data.")
        if any(tensor.ndim and tensor.shape[0] == 0 for tensor in tensors):
            raise DataError(f"the batch of shape {self} holds no sample. Pass a batch of one sample or more.")
        if tensors and not any(map(_varies, tensors)):
            raise InitError(
                f"the batch of shape {self} does not vary: all its samples, or all its values, are equal. What the layers "
                "make of it is the spread of their biases, not of the data. Pass real data."
            )


def from_inputs(inputs: Any) -> ModelInputs:
    """The Learner's rule: a tuple holds the positional arguments, anything else is the only one."""
    return ModelInputs(inputs if type(inputs) is tuple else (inputs,))


def from_data(data: Any, inputs: Callable[[Any], Any] | None) -> ModelInputs:
    """What the model is to be called with.

    Args:
        data: One of `FORMS`. Of a loader the first batch is taken, and the loader is left where it was.
        inputs: For loaders: picks the inputs (tensor, tuple or dict) out of a batch.

    Returns:
        The arguments of the model.

    Raises:
        TypeError: `data` is none of `FORMS`, or `inputs` comes with something that is no loader.
        DataError: The loader is empty.
    """
    if isinstance(data, (Tensor, tuple, Mapping)):
        if inputs is not None:
            raise TypeError(
                f"inputs= picks from the batches of a loader, but data is a {type(data).__name__}: leave it out."
            )
        return _from_plain(data)
    if isinstance(data, list) and any(isinstance(item, Tensor) for item in data):
        raise TypeError(
            f"data is a list of {len(data)} whose items are tensors, as next(iter(dataloader)) gives it: is it one batch "
            "(x, y), or are they batches? Pass x, or [(x, y)]."
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)) or hasattr(data, "__array__"):
        raise TypeError(f"data={_short(data)} (type={type(data).__name__}), wanted {FORMS}.")
    batch = first(peek(data), "data")
    return from_inputs(split_batch(batch)[0]) if inputs is None else _from_plain(inputs(batch))


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
    if tensor.is_floating_point() and tensor.shape[0] > 1:
        return bool((tensor != tensor[:1]).any())
    return bool((tensor != tensor.flatten()[0]).any())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
