"""`Watch`: sees every use of a weight layer in a forward pass, in order of execution.

A layer's module is watched by hooks. A model may also multiply with a weight without calling the module, as in
`F.linear(x, self.qkv.weight)`, or in attention, which does so within one function of torch. Such uses are seen by a function
mode of torch.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minitrain.errors import InitError
from minitrain.init.activations import ACTIVATIONS, ALIASES, QUESTIONS, is_question
from minitrain.init.attention import Projections, is_attention
from minitrain.init.calls import Call, OutOfStep
from minitrain.init.inputs import ModelInputs
from minitrain.init.layers import Layer, Part
from minitrain.init.sharing import Sharing

_FUNCTIONS: dict[Callable[..., Any], tuple[str, ...]] = {
    torch.nn.functional.linear: ("input", "weight", "bias"),
    torch.bilinear: ("input1", "input2", "weight", "bias"),
    **dict.fromkeys(
        (
            torch.conv1d,
            torch.conv2d,
            torch.conv3d,
            torch.conv_transpose1d,
            torch.conv_transpose2d,
            torch.conv_transpose3d,
        ),
        ("input", "weight", "bias"),
    ),
}
"""The functions that multiply with a weight, and the names of their first arguments."""


class Behind(NamedTuple):
    """The activation that is the first to use a layer's output.

    Attributes:
        name: The name of the function.
        before: The layer's output, as the activation gets it.
        apply: Applies the activation to a tensor, which stays as it is.
    """

    name: str
    before: Tensor
    apply: Callable[[Tensor], Tensor]


class Use(NamedTuple):
    """One call of a layer.

    Attributes:
        layer: The layer.
        call: How it was called.
        output: What it put out.
        bias: What can be shifted of its bias in this call.
        has_bias: There is a bias, even if it is computed.
        entered: The owners of shared parameters that have been called so far in this pass.
        batch_dim: The dimension of the samples.
        behind: The activation behind it, where that is asked for.
        note: What was noted of it when it was called, where it is looked at later.
    """

    layer: Layer
    call: Call
    output: Any
    bias: Part | None
    has_bias: bool
    entered: frozenset[str]
    batch_dim: int = 0
    behind: Behind | None = None
    note: Any = None


class NormUse(NamedTuple):
    """One call of a norm that takes its statistics from the batch.

    Attributes:
        name: The norm's name.
        module: The norm.
        nth: How often it has been called before in this pass.
        input: What it is called with.
    """

    name: str
    module: nn.Module
    nth: int
    input: Tensor


Visit = Callable[[Use], Tensor | None]
"""Called with each use of a layer; may return another output."""
VisitNorm = Callable[[NormUse], None]
"""Called before each call of a norm that takes its statistics from the batch."""


class Watch:
    """Watches a model's layers; one pass at a time in a thread.

    Args:
        model: The model.
        layers: The layers.
        norms: Norms that are watched, too: before each call.
        behind: Look at a layer's output behind its activation: at the first function that uses the output.
    """

    def __init__(
        self, model: nn.Module, layers: list[Layer], norms: dict[str, nn.Module] | None = None, behind: bool = False
    ) -> None:
        self._model, self._layers, self._norms, self.behind = model, layers, norms or {}, behind
        self.sharing = Sharing(model)
        self.affine = {layer.name for layer in layers if layer.is_affine}  # seen before our own hooks are on
        self._by_weight: defaultdict[int, list[Layer]] = defaultdict(list)
        for layer in layers:
            if layer.weight is not None:
                self._by_weight[id(layer.weight.parameter)].append(layer)
        self._local = threading.local()

    @property
    def current(self) -> Pass | None:
        """The pass that is going on in this thread, unless a layer is being looked at."""
        return getattr(self._local, "current", None)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on."""
        with ExitStack() as stack:
            for name in sorted(self.sharing.sharers):
                module = self._model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(self._enter(name), prepend=True).remove)
            for layer in self._layers:
                if layer.calls_module:
                    before, after = self._hooks(layer)
                    # In front, so that it sees the arguments before any other hook has touched them: calling the module
                    # with them repeats the call in full.
                    stack.callback(
                        layer.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove
                    )
                    stack.callback(layer.module.register_forward_hook(after, with_kwargs=True).remove)
            for name, module in self._norms.items():
                stack.callback(module.register_forward_pre_hook(self._norm(name)).remove)
            yield

    def run(
        self,
        run: Callable[[ModelInputs], None],
        inputs: ModelInputs,
        visit: Visit,
        visit_norm: VisitNorm | None = None,
        note: Callable[[Use], Any] | None = None,
    ) -> None:
        """One pass, with `visit` called after each use of a layer. Hooks must be on.

        Args:
            run: Runs the model.
            inputs: On what.
            visit: What is called, without gradients.
            visit_norm: What is called before each norm.
            note: Have `visit` wait until a layer's output is used: by then its input is mostly gone, and memory with it. What
                this makes of the use at once goes with it. Of a layer that need not be called again, the arguments are let
                go.

        Raises:
            InitError: `visit` raised it, even where the model swallowed it.
        """
        going = Pass(self, visit, visit_norm, note)
        modes = torch._C._len_torch_function_stack()
        self._local.current = going
        try:
            with _Uses(self, going):
                run(inputs)
            going.resolve_all()
        finally:
            self._local.current = None
            while torch._C._len_torch_function_stack() > modes:  # Ctrl-C between two lines of a context
                torch._C._pop_torch_function_stack()
        if going.error is not None:
            raise going.error

    def blind(self) -> _Blind:
        """A context: layers that run in it are not seen."""
        return _Blind(self._local)

    def used(self, weight: Any) -> list[Layer]:
        """The layers that this tensor is the weight of."""
        return self._by_weight.get(id(weight), [])

    def part(self, bias: Any, layer: Layer) -> Part | None:
        """What can be shifted of a bias that a function was called with."""
        if layer.bias is not None and bias is layer.bias.parameter:
            return layer.bias
        return Part(bias) if isinstance(bias, nn.Parameter) and self.sharing.knows(bias) else None

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if (going := self.current) is not None:
                going.entered.add(name)

        return enter

    def _hooks(self, layer: Layer) -> tuple[Callable[..., None], Callable[..., Tensor | None]]:
        affine, weight, replaced = layer.name in self.affine, layer.weight, dataclasses.replace(layer, weight=None)
        # With an activation in mind the layer may be run again later, when its input has been written to.
        keep = not affine or (self.behind and weight is not None and weight.parameter.itemsize < 4)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (going := self.current) is not None:
                going.resolve_sharers(layer)
                going.open[layer.name].append(Call(module, args, kwargs, keep))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            if (going := self.current) is None or not going.open[layer.name]:
                return None
            call, used = going.open[layer.name].pop(), layer
            if affine and weight is not None and module._parameters.get("weight") is not weight.parameter:
                used = replaced  # functional_call has put another weight in its place
            return going.see(Use(used, call, output, layer.bias, layer.has_bias, frozenset(going.entered)))

        return before, after

    def _norm(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if (going := self.current) is not None and args:
                going.see_norm(name, module, args[0])

        return before


class _Blind:
    """Takes the current pass away, and the mode if it is in front: it would see each of our own operations.

    Not a generator: it is entered at every layer.
    """

    def __init__(self, local: threading.local) -> None:
        self._local, self._current = local, getattr(local, "current", None)

    def __enter__(self) -> None:
        self._local.current = None
        self._mode = torch.overrides._get_current_function_mode()  # type: ignore[no-untyped-call]
        if isinstance(self._mode, _Uses):
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __exit__(self, *exc_info: object) -> None:
        if isinstance(self._mode, _Uses):
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        self._local.current = self._current


class Pass:
    """What is known of one pass while it goes on."""

    def __init__(
        self, watch: Watch, visit: Visit, visit_norm: VisitNorm | None, note: Callable[[Use], Any] | None
    ) -> None:
        self._watch, self._visit, self._visit_norm, self._note = watch, visit, visit_norm, note
        self.open: defaultdict[str, list[Call]] = defaultdict(list)  # stacks: a module may call itself
        self.entered: set[str] = set()
        self.error: InitError | OutOfStep | None = None
        self.pending: dict[int, tuple[Tensor, Use]] = {}  # outputs that nothing has used yet, views of them too
        self._norm_calls: defaultdict[str, int] = defaultdict(int)

    def see(self, use: Use, now: bool = False) -> Tensor | None:
        """A layer has been used: look at its output now, or when that is used."""
        waits = isinstance(use.output, Tensor) and not now
        if id(use.output) in self.pending:  # a layer around a layer, with the same output
            self._replace(self._take(use.output), None)
        if self._watch.behind and waits:
            self.pending[id(use.output)] = use.output, use
            return None
        if self._note is None:
            return self._look(use)
        self.entered.add(use.layer.owner)
        with self._watch.blind(), self._errors_kept():
            use = use._replace(note=self._note(use))
        if not waits:
            return self._look(use)
        if use.layer.name in self._watch.affine:
            use.call.forget()
        self.pending[id(use.output)] = use.output, use
        return None

    def see_norm(self, name: str, module: nn.Module, x: Any) -> None:
        """A norm is about to be used."""
        if self._visit_norm is None or not isinstance(x, Tensor):
            return
        if id(x) in self.pending:  # it is about to be used
            self._replace(self._take(x), None)
        index = self._norm_calls[name]
        self._norm_calls[name] += 1
        with self._watch.blind(), torch.no_grad():
            self._visit_norm(NormUse(name, module, index, x))

    def resolve(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A function is about to be called: look at the outputs among its arguments."""
        found = [a for a in _flat((*args, *kwargs.values())) if id(a) in self.pending]
        for tensor in found:
            if id(tensor) not in self.pending:  # an alias of one before it
                continue
            use = self._take(tensor)
            behind = None
            if self._watch.behind and function in ACTIVATIONS and args and args[0] is tensor:
                behind = _behind(function, args, kwargs)
            self._replace(use, behind)

    def resolve_sharers(self, layer: Layer) -> None:
        """This layer is about to be used, again or with a weight that another one has used, too."""
        if self.pending:
            sharers = self._watch.sharing.sharers
            for tensor, use in list(self.pending.values()):
                same = use.layer.owner == layer.owner or (use.layer.owner in sharers and layer.owner in sharers)
                if same and id(tensor) in self.pending:
                    self._replace(self._take(tensor), None)

    def resolve_all(self) -> None:
        """The pass is over: look at the outputs that nothing has used."""
        while self.pending:
            tensor, _ = next(iter(self.pending.values()))
            self._replace(self._take(tensor), None)

    def alias(self, tensors: Iterable[Any], result: Any) -> None:
        """`result` may show the values of one of these outputs in another shape."""
        for tensor in tensors:
            if id(tensor) in self.pending and isinstance(result, Tensor):
                _, use = self.pending[id(tensor)]
                same = result.numel() == tensor.numel() and (
                    result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                )
                if same:
                    self.pending[id(result)] = result, use

    def _take(self, tensor: Tensor) -> Use:
        _, use = self.pending[id(tensor)]
        self.pending = {key: value for key, value in self.pending.items() if value[1] is not use}
        return use

    def _replace(self, use: Use, behind: Behind | None) -> None:
        """Look, and write what comes of it into the output itself: it may have been handed on."""
        output = self._look(use._replace(behind=behind))
        if output is None or output is use.output:
            return
        own: Tensor = use.output
        if own.requires_grad or 0 in own.stride() or (own.is_inference() and not torch.is_inference_mode_enabled()):
            raise self._kept(OutOfStep(f"the output of layer {use.layer.name!r} cannot be written to"))
        with self._watch.blind(), torch.no_grad():
            own.copy_(output)

    def _look(self, use: Use) -> Tensor | None:
        self.entered.add(use.layer.owner)
        with self._watch.blind():
            with self._errors_kept():
                replaced = self._visit(use)
            if replaced is None or not torch.is_grad_enabled():
                return replaced
            # The model differentiates within its forward pass: it needs a graph of the new weights.
            if use.call.forgotten:
                raise self._kept(OutOfStep(f"the model differentiates behind layer {use.layer.name!r}"))
            again: Tensor = use.call.repeat()
            return again

    @contextmanager
    def _errors_kept(self) -> Iterator[None]:
        """Without gradients; our own errors surface even where the model swallows them."""
        try:
            with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
                yield
        except (InitError, OutOfStep) as error:
            raise self._kept(error) from None

    def _kept(self, error: InitError | OutOfStep) -> InitError | OutOfStep:
        self.error = error
        return error


class _Uses(TorchFunctionMode):
    """Sees the functions of torch that a model calls."""

    def __init__(self, watch: Watch, going: Pass) -> None:
        super().__init__()
        self._watch, self._pass = watch, going

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        going = self._pass
        if self._watch.current is not going:
            return func(*args, **kwargs)
        if going.pending and func not in QUESTIONS and not is_question(func):
            if func in ALIASES:
                output = func(*args, **kwargs)
                going.alias(args, output)
                if not (isinstance(output, Tensor) and id(output) in going.pending):
                    going.resolve(func, args, kwargs)  # it was a copy: too late for that one
                    return func(*args, **kwargs)
                return output
            going.resolve(func, args, kwargs)
        if (names := _FUNCTIONS.get(func)) is not None:
            return self._product(func, names, args, kwargs)
        if is_attention(func):
            return self._attention(func, args, kwargs)
        return func(*args, **kwargs)

    def _product(
        self, func: Callable[..., Any], names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        layers = self._watch.used(given.get("weight"))
        for layer in layers:
            self._pass.resolve_sharers(layer)
        output = func(*args, **kwargs)
        if layers and not any(self._pass.open[layer.name] for layer in layers):
            bias = given.get("bias")
            own = [layer for layer in layers if layer.bias is not None and layer.bias.parameter is bias]
            layer = (own or layers)[0]  # of those that share the weight
            replaced = self._pass.see(self._use(layer, Call(func, args, kwargs), output, bias))
            return output if replaced is None else replaced
        return output

    def _use(self, layer: Layer, call: Call, output: Any, bias: Any, batch_dim: int = 0) -> Use:
        """What a function has made of a layer's weight and of this bias."""
        part, entered = self._watch.part(bias, layer), frozenset(self._pass.entered)
        return Use(layer, call, output, part, bias is not None, entered, batch_dim)

    def _attention(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        projections = Projections(func, args, kwargs)
        for which in "qkv":
            weight, x, bias, rows = projections.of(which)
            for layer in self._watch.used(weight):
                if layer.weight is None or layer.weight.rows != rows:
                    continue
                call = projections.call(layer, x, bias, which)
                with self._watch.blind():
                    output = call.repeat()
                self._pass.see(self._use(layer, call, output, bias, batch_dim=1), now=True)
        output = func(*args, **kwargs)
        for layer in self._watch.used(projections.out_weight):
            call = Call(func, args, kwargs, pick=lambda result: result[0])
            use = self._use(layer, call, output[0], projections.out_bias, batch_dim=1)
            if (replaced := self._pass.see(use, now=True)) is not None:
                output = (replaced, *output[1:])
        return output


def _behind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Behind:
    def apply(x: Tensor) -> Tensor:
        result: Tensor = function(x.clone(), *args[1:], **kwargs)  # it may work in place
        return result

    return Behind(getattr(function, "__name__", str(function)), args[0], apply)


def _flat(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)
