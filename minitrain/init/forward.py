"""`Forward`: forward passes of a model, run so that nothing of them remains."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from minitrain.init.inputs import ModelInputs
from minitrain.preserve import Buffers, preserve_attributes, preserve_grads, preserve_modes, preserve_rng


def has_lazy(model: nn.Module) -> bool:
    """Some parameters or buffers have no shape yet."""
    return any(
        tensor is not None and is_lazy(tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for tensor in table.values()
    )


@contextmanager
def at_rest(model: nn.Module, norms_in_training: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, nothing fused or compiled; afterwards everything as before.

    Modes are set on each module directly: a model's own `eval()` may do more than that.

    Args:
        model: The model.
        norms_in_training: Leave instance norms in training mode: they do not mix samples.
    """
    with ExitStack() as stack:
        stack.enter_context(thread_at_rest(model))
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled, and this would import the compiler
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer calls none of its layers
        stack.enter_context(preserve_rng())
        stack.enter_context(preserve_modes(model))
        stack.enter_context(preserve_grads(model))
        for module in model.modules():
            training = norms_in_training and isinstance(module, nn.modules.instancenorm._InstanceNorm)
            if module.training != training:
                module.training = training
        yield


@contextmanager
def thread_at_rest(model: nn.Module) -> Iterator[None]:
    """What of `at_rest` each thread has for itself."""
    with ExitStack() as stack:
        parameters = list(model.parameters())
        stack.enter_context(torch.inference_mode(any(not is_lazy(p) and p.is_inference() for p in parameters)))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(p.device.type for p in parameters)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class Forward:
    """The model, called plainly or as a user's function does it.

    Attributes:
        count: The number of passes that were begun so far.

    Args:
        model: The model.
        function: Called as `function(model, *inputs)` instead of `model(*inputs)`.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any] | None = None) -> None:
        self.model, self._function = model, function
        self.count = 0
        self._modules = list(model.modules())

    def __call__(self, inputs: ModelInputs) -> None:
        """Run the model once, from the state that it is in, and put that back: buffers, attributes, random generators.

        Raises:
            Exception: Whatever the model raises, with a note that says on what.
        """
        with self.state_kept():
            self.run(inputs)

    def run(self, inputs: ModelInputs) -> None:
        """Run the model once on a copy; the caller keeps its state."""
        self.run_on(inputs.fresh())

    def run_on(self, inputs: ModelInputs) -> None:
        """Run the model once on these very tensors, which it may write to; the caller keeps its state."""
        self.count += 1
        try:
            if self._function is None:
                self.model(*inputs.args, **inputs.kwargs)
            else:
                self._function(self.model, *inputs.args, **inputs.kwargs)
        except Exception as error:
            error.add_note(f"in a forward pass of the initialisation, over a batch of shape {inputs}")
            raise

    @contextmanager
    def state_kept(self) -> Iterator[Callable[[], None]]:
        """Put buffers, attributes and random generators back on exit, and when the function that this yields is called."""
        buffers = Buffers(self.model)
        lazy = has_lazy(self.model)
        try:
            with preserve_rng(), preserve_attributes([] if lazy else self._modules):  # a first pass shapes lazy modules
                yield buffers.restore
        finally:
            buffers.restore()
