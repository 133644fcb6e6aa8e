"""`Rollback`: if anything goes wrong, the model is as before, to the bit; lazy modules are lazy again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Rollback:
    """A snapshot of a model: every parameter and buffer, their values and storage, and the attributes of every module.

    Attributes are kept as they are referred to: a list that a module has appended to stays longer. Hooks, modes, a plain
    tensor that a module keeps on itself, and the class of a lazy module are attributes, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module, type(module), dict(vars(module))) for module in model.modules()]
        self._tables = [(d, d.copy()) for m in model.modules() for d in vars(m).values() if isinstance(d, dict)]
        tensors = {id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())}
        self._tensors = [
            (t, type(t), None, None) if is_lazy(t) else (t, type(t), t.detach(), t.detach().clone())
            for t in tensors.values()
            if t is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back: the same objects, in the same storage, with the same values."""
        for table, items in self._tables:  # refilled, not replaced: the handles of users' hooks hold on to their table
            table.clear()
            table.update(items)
        for module, cls, attributes in self._modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        for tensor, kind, alias, value in self._tensors:
            if alias is None or value is None:
                if not is_lazy(tensor):
                    tensor.data = tensor.data.new_empty(0)
                    tensor.__class__ = kind
                continue
            if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape:
                tensor.data = alias
            if not same_bits(tensor, value):
                tensor.copy_(value)


@contextmanager
def rolled_back_on_error(model: nn.Module) -> Iterator[None]:
    """If anything leaves this context, Ctrl-C included, the model is as it was."""
    rollback = Rollback(model)
    try:
        yield
    except BaseException:
        rollback.restore()
        raise


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN equals itself, and 0.0 is not -0.0."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().view(bits))
