"""`on_gradient`: be told the gradient of a tensor's present value, even if something is written into it afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def on_gradient(tensor: Tensor, fn: Callable[[Tensor], Tensor | None]) -> list[RemovableHandle]:
    """Call `fn` with the gradient with respect to the value that `tensor` has now; what it returns replaces the gradient.

    For most tensors that is what `register_hook` does. But a view loses its place in the graph when it, or what it is a view
    of, is written into, and its hook is silent; and views are common: a linear layer returns one for inputs of three
    dimensions. Then the gradient is read off that of the base, in which the view is the same memory.

    Example:
        >>> layer, x, grads = torch.nn.Linear(2, 2), torch.ones(1, 1, 2), []
        >>> y = layer(x)
        >>> handles = on_gradient(y, grads.append)
        >>> y.zero_().sum().backward()
        >>> grads
        [tensor([[[0., 0.]]])]
    """
    base = tensor._base
    if base is None or base.is_leaf or base.dtype != tensor.dtype or base.layout != torch.strided:
        return [tensor.register_hook(fn)]  # type: ignore[no-untyped-call]
    # No reference to the tensors: it would close a circle through the graph, which nothing collects.
    alive, version, told = weakref.ref(tensor), tensor._version, False
    of_base = base.size(), base.stride()
    of_view = tensor.size(), tensor.stride(), tensor.storage_offset() - base.storage_offset()

    def from_view(grad: Tensor) -> Tensor | None:
        nonlocal told
        view = alive()
        if view is not None and view._version != version:  # here is only what was made of it before
            return None
        told = True
        return fn(grad)

    def from_base(grad: Tensor) -> Tensor | None:
        nonlocal told
        view = alive()
        if told or (view is not None and view._version == version):
            told = False
            return None
        whole = torch.empty_strided(*of_base, dtype=grad.dtype, device=grad.device).copy_(grad)
        result = fn(whole.as_strided(*of_view))
        if result is None:
            return None
        whole.as_strided(*of_view).copy_(result)
        return whole

    return [tensor.register_hook(from_view), base.register_hook(from_base)]  # type: ignore[no-untyped-call]
