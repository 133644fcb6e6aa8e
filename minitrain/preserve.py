"""Leave things as found: contexts and snapshots of random states, module modes, buffers and gradients."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from minitrain.random_states import RandomState


@contextmanager
def preserve_rng(generators: Iterable[Any] = ()) -> Iterator[None]:
    """Put all random states back on exit, whatever happens inside."""
    state = RandomState(generators)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own `training` flag back on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:  # to set it takes ten times as long as to look
                module.training = training


class Buffers:
    """A snapshot of every buffer of a model, non-persistent ones too: the same tensor objects with the same values.

    Left alone are lazy buffers that have no shape yet, and those that are views of a parameter: they follow it. Of sparse ones
    and of those that overlap themselves (expanded) the object comes back, which nothing can have written to in place.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [(module, *item) for module in model.modules() if module._buffers for item in module._buffers.items()]
        parameters = {storage for p in model.parameters() if (storage := _storage(p))} if found else set()
        self._saved = [
            (module, name, buffer, None if buffer is None or not _is_plain(buffer) else buffer.detach().clone())
            for module, name, buffer in found
            if buffer is None or not (is_lazy(buffer) or _storage(buffer) in parameters)
        ]

    def restore(self) -> None:
        """Put every buffer back."""
        for module, name, buffer, value in self._saved:
            module._buffers[name] = buffer
            if buffer is None or value is None:
                continue
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if buffer.shape != value.shape:
                    buffer.set_(value)  # type: ignore[call-overload]
                else:
                    buffer.copy_(value)  # not only where it differs: to compare would be to wait for the device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The buffers themselves."""
        return tuple(buffer for _, _, buffer, _ in self._saved if buffer is not None)


def _storage(tensor: torch.Tensor) -> int:
    """Where the memory of a tensor begins; 0 where it has none of its own."""
    return tensor.untyped_storage().data_ptr() if not is_lazy(tensor) and tensor.layout == torch.strided else 0


def _is_plain(tensor: torch.Tensor) -> bool:
    """Dense, and every element in a place of its own: it can be copied into."""
    if tensor.layout != torch.strided:
        return False
    expanded = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return not expanded


@contextmanager
def preserve_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the plain attributes of modules back on exit: counters, caches, hidden states that a forward pass keeps.

    Let alone is what a hook computes from a parameter `<name>_g` or `<name>_orig`, as the older weight norm does. Likewise a
    module that has got another parameter, buffer or module meanwhile: it builds itself on its first call, and its attributes
    say that it has.
    """
    saved = [(module, _plain(module), _contents(module)) for module in modules]
    try:
        yield
    finally:
        for module, before, contents in saved:
            if _contents(module) == contents:
                for name in [name for name in _plain(module) if name not in before]:
                    del vars(module)[name]
                vars(module).update(before)


def _plain(module: nn.Module) -> dict[str, Any]:
    attributes = dict(vars(module))
    for name in module._parameters if module._forward_pre_hooks else ():
        for suffix in ("_g", "_orig"):
            if name.endswith(suffix):
                attributes.pop(name.removesuffix(suffix), None)
    return attributes


def _contents(module: nn.Module) -> tuple[int, ...]:
    tables = module._parameters, module._buffers, module._modules
    return (*(len(table) for table in tables), *(id(thing) for table in tables for thing in table.values()))


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer back on exit, so that even a graph that waits for its backward pass does not notice."""
    buffers = Buffers(model)
    counted = tuple(buffer for buffer in buffers.tensors if not buffer.is_inference())
    # Autograd refuses a saved tensor that has been written to since: but it will have its old values again.
    with torch.autograd.grad_mode._unsafe_preserve_version_counter(counted):
        try:
            yield
        finally:
            buffers.restore()


@contextmanager
def preserve_grads(model: nn.Module) -> Iterator[None]:
    """Hide every gradient inside, and put the same tensors back on exit: nothing is copied."""
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad


@contextmanager
def preserve_training(model: nn.Module, generators: Iterable[Any] = ()) -> Iterator[None]:
    """All of the above at once: whatever runs inside, training does not notice it."""
    with preserve_rng(generators), preserve_modes(model), preserve_buffers(model), preserve_grads(model):
        yield


@contextmanager
def parameters_unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If an error leaves, put the values of all parameters back (those that have a shape by now)."""
    saved = [(p, p.detach().clone()) for p in model.parameters() if not is_lazy(p)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for p, value in saved:
                p.copy_(value)
        raise


def with_samplers(loader: Any) -> list[Any]:
    """A loader, its samplers and datasets, and those that they are made of: each once.

    Followed are `sampler`, `batch_sampler` and `dataset` (also of a `Subset`), and the `datasets` of a `ConcatDataset`.
    """
    found: list[Any] = []
    todo, seen = [loader], set()
    while todo:
        thing = todo.pop(0)
        if thing is not None and id(thing) not in seen:
            seen.add(id(thing))
            found.append(thing)
            todo += [_attribute(thing, name) for name in ("sampler", "batch_sampler", "dataset")]
            parts = _attribute(thing, "datasets")
            todo += parts if isinstance(parts, (list, tuple)) else ()
    return found


def _attribute(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001 - a property of the user's that means something else, and cannot be had now
        return None


def loader_generators(loader: Any) -> list[Any]:
    """Every random number generator that iterating `loader` may advance: its own, those of its samplers and datasets."""
    numpy: Any = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random)
    kinds += (numpy.random.Generator, numpy.random.RandomState) if numpy else ()
    found: list[Any] = []
    for thing in with_samplers(loader):
        for value in (getattr(thing, "generator", None), *getattr(thing, "__dict__", {}).values()):
            has_state = isinstance(value, kinds) and not isinstance(value, random.SystemRandom)
            if has_state and all(value is not generator for generator in found):
                found.append(value)
    return found


@contextmanager
def preserve_iterator(loader: Any) -> Iterator[None]:
    """Leave a pass over `loader` where it stands: a DataLoader with persistent workers has one iterator for all passes."""
    standing = getattr(loader, "_iterator", None)
    if standing is not None:
        loader._iterator = None
    try:
        yield
    finally:
        if standing is not None:
            loader._iterator = standing
