"""`capture`: copies of what named layers put out in one forward pass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from minitrain.hooks import Hooks, _Hook, layer_names, near_names


class Captured(Mapping[str, Any]):
    """What `capture` yields: for each layer that was called its output, in the order of the calls.

    Attributes:
        names: The names of the selected layers, called or not.
        calls: For each layer that was called the list of its outputs.
    """

    names: list[str]
    calls: dict[str, list[Any]]

    def __init__(self, names: dict[str, str]) -> None:
        self._first = names  # every name of a layer, with the one that it goes by here
        self.names = list(dict.fromkeys(names.values()))
        self.calls = {}

    def __getitem__(self, name: str) -> Any:
        """The output of a layer's first call."""
        first = self._first.get(name)
        if first is None:
            raise KeyError(f"{name!r} was not selected. {near_names(name, self.names)}")
        if first not in self.calls:
            raise KeyError(f"{name!r} was selected, but was not called in this forward pass.")
        return self.calls[first][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __repr__(self) -> str:
        return f"<Captured: {', '.join(self) or 'nothing yet'}>"


def capture(model: nn.Module, names: Any = None) -> AbstractContextManager[Captured]:
    """Copy the outputs of named layers during a forward pass.

    The copies are detached: they keep no graph alive, and nothing that works in place later changes them. Tuples, lists,
    dicts, named tuples, dataclasses (those of Hugging Face too) and packed sequences are rebuilt around the copies; whatever
    is neither of these nor a tensor is handed on as it is. A copy takes as much memory as the output, at every call.

    Each call of `model` begins anew, so that there is always one forward pass, the last one. Only calls of layers past
    the model itself (`model.encoder(x)`, or the second run that activation checkpointing makes) add up until then. What was
    captured stays readable after the `with` and after an exception.

    Args:
        model: The model.
        names: Which layers, as `select` of `Hooks`: names, globs, types, a predicate, or a list of these. None: every leaf
            module.

    Returns:
        A context manager that yields a mapping: `outputs[name]` is the output of the layer, of its first call where there
        were several; `outputs.calls[name]` is the list of all.

    Raises:
        TypeError: `model` or `names` is of a wrong type.
        ValueError: `names` matches no module.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        >>> with capture(model, ["0", "2"]) as outputs:
        ...     y = model(torch.ones(5, 4))
        >>> outputs["0"].shape, torch.equal(outputs["2"], y), outputs["2"].requires_grad
        (torch.Size([5, 3]), True, False)
    """
    return _Capture(model, names)


class _Capture(AbstractContextManager[Captured]):
    def __init__(self, model: nn.Module, names: Any) -> None:
        try:
            self._recorder = _Recorder(model, names)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("select=", "names=")) from None

    def __enter__(self) -> Captured:
        self._recorder.__enter__()
        self._recorder.captured = Captured(self._recorder.first)  # a new one: that of an earlier entry stays as it is
        return self._recorder.captured

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._recorder.__exit__(kind, error, traceback)


class _Recorder(Hooks):
    _stacklevel = 3

    def __init__(self, model: nn.Module, names: Any) -> None:
        super().__init__(model, lambda *args: None, names)
        self.first = {other: own[0] for own in layer_names(model).values() if own[0] in self._modules for other in own}
        self.captured = Captured(self.first)

    def _register(self) -> None:
        super()._register()
        self._model.register_forward_pre_hook(_Hook(self, self._begin))

    def _begin(self, *args: Any) -> None:
        self.captured.calls.clear()

    def _called(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        self.captured.calls.setdefault(name, []).append(_copied(output, {}))
        return super()._called(name, module, inputs, output)


def _copied(output: Any, done: dict[int, Any]) -> Any:
    """The same containers around detached copies of the tensors; `done` has what was copied already, by its id."""
    copied: Any
    if id(output) in done:  # twice in the output, or around itself
        return done[id(output)]
    if isinstance(output, Tensor):
        done[id(output)] = output.detach().clone()
    elif isinstance(output, Mapping):  # before dataclasses: a ModelOutput is both
        _copy_mapping(output, done)
    elif isinstance(output, tuple):
        items = [_copied(item, done) for item in output]
        done[id(output)] = getattr(output, "_make", type(output))(
            items
        )  # a named tuple has _make, a PackedSequence too
    elif isinstance(output, list):
        done[id(output)] = copied = copy.copy(output)
        copied[:] = [_copied(item, done) for item in output]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        done[id(output)] = copied = copy.copy(output)
        for field in dataclasses.fields(output):
            if hasattr(output, field.name):
                object.__setattr__(copied, field.name, _copied(getattr(output, field.name), done))  # it may be frozen
    else:
        return output
    return done[id(output)]


def _copy_mapping(output: Mapping[Any, Any], done: dict[int, Any]) -> None:
    copied: Any = copy.copy(output) if isinstance(output, MutableMapping) else {}
    done[id(output)] = copied
    for key, value in output.items():
        copied[key] = _copied(value, done)
