"""`Rollback`: if anything goes wrong, the model is as before, to the bit; lazy modules are lazy again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Rollback:
    """A snapshot of a model: every parameter and buffer, their values, storage and gradients, and all module attributes.

    Attributes are kept as they are referred to: a list that a module has appended to stays longer. Hooks, modes, a plain
    tensor that a module keeps on itself, and the class of a lazy module are attributes, too.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = [(module, type(module), dict(vars(module))) for module in modules]
        # torch's own tables (parameters, buffers, modules, hooks): plain dicts, of which handles hold on to the object. Most
        # are empty: a list of those, since thousands of new objects would set off the garbage collector.
        tables = [d for m in modules for name, d in vars(m).items() if _is_table(name, d)]
        self._tables, self._empty = [(d, d.copy()) for d in tables if d], [d for d in tables if not d]
        tensors = {id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
        self._lazy: list[tuple[Tensor, type]] = [(t, type(t)) for t in tensors.values() if is_lazy(t)]
        self._tensors = [(t, t.detach(), t.detach().clone()) for t in tensors.values() if not is_lazy(t)]
        self._grads = [(p, p.grad) for p in model.parameters() if not is_lazy(p)]

    def restore(self) -> None:
        """Put everything back: the same objects, in the same storage, with the same values. Values first."""
        for tensor, alias, value in self._tensors:
            with (
                torch.inference_mode(tensor.is_inference()),
                torch.no_grad(),
            ):  # in this order: the first one turns it on
                _put_back(tensor, alias, value)
        for parameter, grad in self._grads:
            parameter.grad = grad
        for tensor, kind in self._lazy:
            if not is_lazy(tensor):
                tensor.data = tensor.data.new_empty(0)
                tensor.__class__ = kind
        for module, cls, attributes in self._modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        for table, items in self._tables:  # refilled, not replaced
            table.clear()
            table.update(items)
        for table in self._empty:
            table.clear()


@contextmanager
def rolled_back_on_error(model: nn.Module) -> Iterator[None]:
    """If anything leaves this context, Ctrl-C included, the model is as it was."""
    rollback = Rollback(model)
    try:
        yield
    except BaseException:
        rollback.restore()
        raise


@contextmanager
def rolled_back(model: nn.Module) -> Iterator[None]:
    """However this context is left, the model is as it was."""
    rollback = Rollback(model)
    try:
        yield
    finally:
        rollback.restore()


def _is_table(name: str, value: object) -> bool:
    return isinstance(value, dict) and (name in ("_parameters", "_buffers", "_modules") or "_hooks" in name)


def _put_back(tensor: Tensor, alias: Tensor, value: Tensor) -> None:
    if tensor.layout != torch.strided:
        if not torch.equal(tensor.to_dense(), value.to_dense()):
            tensor.data = value
        return
    if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape:
        tensor.data = alias
    if not same_bits(tensor, value):
        if 0 in tensor.stride():  # expanded: each place in memory is written once
            first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
            tensor, value = tensor[first], value[first]
        tensor.copy_(value)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN equals itself, and 0.0 is not -0.0."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().view(bits))
