"""One forward pass, run so that nothing of it remains, and what its layers put out."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from minitrain.errors import InitError
from minitrain.init.inputs import ModelInputs
from minitrain.init.layers import Layer
from minitrain.moments import Moments, moments
from minitrain.preserve import (
    Buffers,
    RandomState,
    preserve_attributes,
    preserve_grads,
    preserve_modes,
    preserve_rng,
)


class Call:
    """The arguments that a layer was called with.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        keep: Copy them, and the state of the random generators: the layer may write to the one and draw from the other.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: bool) -> None:
        self.args, self.kwargs = args, kwargs
        self._kept = (*_copied(args, kwargs), RandomState()) if keep else None

    def repeat(self, module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """Call `module` in the same way; with `dtype`, floating-point arguments are converted."""
        args, kwargs = self.args, self.kwargs
        if self._kept is not None:
            args, kwargs = _copied(*self._kept[:2])
            self._kept[2].restore()
        if dtype is not None:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
        output: Tensor = module(*args, **kwargs)
        return output


def _copied(args: Any, kwargs: Any) -> tuple[Any, Any]:
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
    return args, kwargs


Visit = Callable[[Layer, Call, Any], Tensor | None]
"""Called with a layer, how it was called, and its output; may return another output."""


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, nothing fused or compiled; afterwards everything as before.

    Modes are set on each module directly: a model's own `eval()` may do more than that.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(any(not is_lazy(p) and p.is_inference() for p in model.parameters())))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(p.device.type for p in model.parameters())}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and this would import the compiler
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer calls none of its layers
        stack.enter_context(preserve_rng())
        stack.enter_context(preserve_modes(model))
        stack.enter_context(preserve_grads(model))
        for module in model.modules():
            module.training = False
        yield


class Forward:
    """The model and its inputs: each call is one forward pass that begins in the same state; buffers are put back.

    Attributes:
        count: The number of passes so far.
    """

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        self._model, self._inputs = model, inputs
        self.count = 0
        # A module with hooks in front may have attributes that they make: a weight that is computed, say.
        self._plain = [module for module in model.modules() if not module._forward_pre_hooks]

    def __call__(self) -> None:
        """Run the model once.

        Raises:
            Exception: Whatever the model raises, with a note that says on what.
        """
        inputs, buffers = self._inputs.fresh(), Buffers(self._model)
        self.count += 1
        try:
            lazy = any(is_lazy(tensor) for tensor in (*self._model.parameters(), *self._model.buffers()))
            with preserve_rng(), preserve_attributes([] if lazy else self._plain):  # a first pass shapes lazy modules
                self._model(*inputs.args, **inputs.kwargs)
        except Exception as error:
            error.add_note(f"in a forward pass of the initialisation, over a batch of shape {self._inputs}")
            raise
        finally:
            buffers.restore()


def run_watched(
    forward: Forward, layers: Iterable[Layer], visit: Visit, repeatable: Callable[[str], bool] = lambda name: True
) -> None:
    """One forward pass with `visit` called after each call of a layer, behind all hooks that are there already.

    Args:
        forward: The pass.
        layers: The layers.
        visit: What is called, without gradients.
        repeatable: Whether the layer of this name can be called again on the same arguments without harm.

    Raises:
        InitError: `visit` raised it, even where the model swallowed it.
    """
    errors: list[InitError] = []
    repeating: list[Layer] = []

    def guarded(layer: Layer, call: Call, output: Any) -> Tensor | None:
        if repeating:
            return None
        try:
            with torch.no_grad():
                replaced = visit(layer, call, output)
        except InitError as error:
            errors.append(error)
            raise
        if replaced is None or not torch.is_grad_enabled():
            return replaced
        repeating.append(layer)  # the model differentiates within its forward pass: it needs a graph of the new weights
        try:
            return call.repeat(layer.module)
        finally:
            repeating.clear()

    with ExitStack() as stack:
        for layer in layers:
            for handle in _hook(layer, guarded, keep=not repeatable(layer.name)):
                stack.callback(handle.remove)
        forward()
    if errors:
        raise errors[0]


def _hook(layer: Layer, visit: Visit, keep: bool) -> Iterator[torch.utils.hooks.RemovableHandle]:
    calls: list[Call] = []  # a stack: a module may call itself, and is called again while it is visited

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs, keep))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        return visit(layer, calls.pop(), output)

    # Registered in front, so that it sees the arguments before any other hook has touched them: calling the module with
    # them repeats the call in full.
    yield layer.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
    yield layer.module.register_forward_hook(after, with_kwargs=True)


def measure(forward: Forward, layers: Iterable[Layer]) -> dict[str, list[Moments]]:
    """One forward pass that changes nothing.

    Returns:
        For each layer that was called, in order of execution, the moments of its output at every call.

    Raises:
        InitError: A layer puts out NaN or infinite values.
    """
    found: defaultdict[str, list[Moments]] = defaultdict(list)

    def visit(layer: Layer, call: Call, output: Any) -> None:
        stats = output_moments(layer, call, output)
        if stats is not None:
            found[layer.name].append(stats)

    run_watched(forward, layers, visit)
    return found


def output_moments(layer: Layer, call: Call, output: Any) -> Moments | None:
    """The moments of a layer's output; None where that is no dense tensor of real numbers, or empty.

    Raises:
        InitError: There are NaN or infinite values in it.
    """
    if not is_measurable(output):
        return None
    stats = moments(output)
    if math.isfinite(stats.mean) and math.isfinite(stats.m2):
        return stats
    given = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    if not all(t.isfinite().all() for t in given):
        cause = "So does its input: look at the data, and at what comes before this layer."
    elif not all(p.isfinite().all() for p in layer.module.parameters()):
        cause = "So do its parameters: initialise them first."
    else:
        cause = f"Its input and its parameters do not: the values are too large for {output.dtype}."
    raise InitError(f"layer {layer.name!r} ({layer.kind}): its output holds NaN or infinite values. {cause}")


def is_measurable(output: Any) -> bool:
    """A dense tensor of real floating-point numbers with something in it."""
    return (
        isinstance(output, Tensor)
        and output.layout == torch.strided
        and not output.is_nested
        and output.is_floating_point()
        and output.numel() > 0
    )
