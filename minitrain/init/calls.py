"""`Call`: how a layer was called, so that it can be called again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from minitrain.random_states import RandomState


class OutOfStep(BaseException):
    """The passes cannot go on as they are held: the message says why. Not an Exception: a model may catch those."""


class Call:
    """A function or module, and the arguments that it was called with.

    Args:
        function: What was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keep: Copy them, and the state of the random generators: the layer may write to the one and draw from the other.
        pick: Picks the layer's output out of what the function returns.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        keep: bool = False,
        pick: Callable[[Any], Any] | None = None,
    ) -> None:
        self.function, self.args, self.kwargs, self._pick = function, args, kwargs, pick
        self._kept = (*_copied(args, kwargs), RandomState()) if keep else None
        self.forgotten = False
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]

    def forget(self) -> None:
        """Let go of the arguments, which take memory."""
        self.args, self.kwargs, self._kept, self.forgotten = (), {}, None, True

    @property
    def inputs(self) -> list[Tensor]:
        """The floating-point tensors that it got, parameters not among them."""
        if len(self.args) == 1 and type(self.args[0]) is Tensor and not self.kwargs:  # as most are
            return [self.args[0]] if self.args[0].is_floating_point() else []
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return [
            t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and not isinstance(t, nn.Parameter)
        ]

    def repeat(self) -> Any:
        """Call again in the same way, with the parameters as they are now."""
        return self._repeat(self.function, lambda t: t)

    def in_float64(self) -> Any:
        """Call again in float64: a copy of the module, and every floating-point tensor.

        Raises:
            Exception: A layer of one's own that cannot be copied, or works in one precision only.
        """
        function = self.function
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).double()
        return self._repeat(function, lambda t: t.double() if t.is_floating_point() else t)

    def _repeat(self, function: Callable[..., Any], convert: Callable[[Tensor], Tensor]) -> Any:
        args, kwargs = self.args, self.kwargs
        if self._kept is not None:
            args, kwargs = _copied(*self._kept[:2])
            self._kept[2].restore()
        args, kwargs = tree_map_only(Tensor, convert, (args, dict(kwargs)))
        with ExitStack() as stack:
            for kind, dtype in self._autocast:  # the model may have left it by now
                stack.enter_context(torch.autocast(kind, dtype))
            output = function(*args, **kwargs)
        return output if self._pick is None else self._pick(output)


def _copied(args: Any, kwargs: Any) -> tuple[Any, Any]:
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    return args, kwargs
