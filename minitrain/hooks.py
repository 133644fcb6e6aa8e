"""`Hooks`: forward and backward hooks on named modules, as a context manager."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitrain.errors import LoopError
from minitrain.gradients import on_gradient
from minitrain.traced import runs_without_new_hooks

HookFn = Callable[[str, nn.Module, tuple[Any, ...], Any], Any]
"""`fn(name, module, inputs, output)`."""

KINDS = ("forward", "forward_pre", "backward")


class Hooks:
    """Call a function whenever one of the selected modules is called, for as long as the `with` lasts.

    On exit every hook is removed, whatever happened inside, and only those that this object registered. Hooks run in the
    order of registration, so they see what earlier hooks have made of an output. A copy of the model that is made inside
    (`deepcopy`, `torch.save`) takes no live hook along, and a module that is added inside gets none.

    A layer that is called several times is counted each time; so is the second run of what activation checkpointing
    (`torch.utils.checkpoint`) runs again in the backward pass. A layer that `select` names outright and that was not
    called although the model was is warned about on a regular exit; what only a type, a glob or a predicate has picked is
    not, since some modules are never called by design (`nn.MultiheadAttention.out_proj`): see `uncalled`.

    Under `torch.compile` the hooks run between the compiled pieces, uncompiled, so that `fullgraph=True` refuses them.
    Code that was traced before the hooks came runs on without them: if there is such code, entering warns.

    Args:
        model: The model whose modules are hooked.
        fn: `fn(name, module, inputs, output)`, `inputs` being the tuple of positional arguments. Its return value is ignored,
            unless `replace=True`.
        select: Which modules: a type or a tuple of types, a name, a glob such as `"features.*"`, a predicate
            `(name, module) -> bool`, or a list of these. None: every leaf module. A module that is registered under
            several names is hooked once, under its first name. A model that is itself selected goes by the name of its class.
        kind: When `fn` is called. `"forward"`: after the module, with its output. `"forward_pre"`: before it, `output` is
            None. `"backward"`: when the gradient with respect to its output is there, `output` is that gradient and `inputs`
            is `()`, since keeping them until then would cost memory; of an output with several tensors the first one that
            requires a gradient counts. An operation that works in place behind the module does not disturb it: the gradient
            is that of the value that the module returned.
        replace: A return value that is not None takes the place of the output (of the inputs, of the gradient).

    Attributes:
        names: The names of the hooked modules, in order of registration.
        calls: For each name, how often `fn` was called since the last entry.

    Raises:
        TypeError: `model`, `fn` or `select` is of a wrong type, or a selected module is a script of `torch.jit`.
        ValueError: `kind` is unknown, or `select` matches no module.
        LoopError: The hooks are entered while they are on.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> shapes = {}
        >>> def note(name, module, inputs, output):
        ...     shapes[name] = tuple(output.shape)
        >>> with Hooks(model, note, select=nn.Linear) as hooks:
        ...     _ = model(torch.zeros(5, 4))
        >>> shapes, hooks.calls
        ({'0': (5, 3), '2': (5, 2)}, {'0': 1, '2': 1})
        >>> hooks
        <Hooks: kind='forward', off, 2 modules, 2 calls>
    """

    _stacklevel = 2  # from __enter__ and __exit__ to the `with`

    def __init__(
        self, model: nn.Module, fn: HookFn, select: Any = None, kind: str = "forward", *, replace: bool = False
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn={fn!r} (type={type(fn).__name__}), wanted a function (name, module, inputs, output).")
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}, wanted one of {', '.join(map(repr, KINDS))}.")
        self._modules = select_modules(model, select)
        for name, module in self._modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"layer {name!r} ({type(module).__name__}) is a script of torch.jit, which runs without Python's hooks. "
                    "Hook the model that it was made from, or leave it out by select=."
                )
        self._model, self._fn, self._kind, self._replace = model, fn, kind, replace
        self._named = _named_outright(model, select)
        self._on = False
        self._reached: set[str] = set()  # for "backward" that is more than what has got a gradient
        self._model_returned = False  # noted only where a layer is named outright
        self._tensor_handles: list[tuple[str, RemovableHandle]] = []
        self._many = 50  # handles
        self.names = list(self._modules)
        self.calls = dict.fromkeys(self.names, 0)

    def __enter__(self) -> Hooks:
        if self._on:
            raise LoopError(
                "these Hooks are on already: entering them twice would count everything twice. Make new ones."
            )
        self.calls.update(dict.fromkeys(self.names, 0))
        self._reached.clear()
        self._model_returned = False
        try:  # if a registration fails, those before it are undone
            self._on = True
            self._register()
            if runs_without_new_hooks(self._model, self._modules.values()):
                warnings.warn(_TRACED, stacklevel=self._stacklevel)
            return self
        except BaseException:
            self.remove()
            raise

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.remove()
        missed = [name for name, first in self._named.items() if first not in self._reached]
        if kind is None and missed and self._model_returned:
            warnings.warn(
                f"no hook fired on {_shown(missed)}, named outright: the model was called, but not "
                f"{'this module' if len(missed) == 1 else 'these modules'}. Leave it out, or see whether forward calls it as "
                "a module, self.layer(x).",
                stacklevel=self._stacklevel,
            )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        idle = f", not called: {_shown(self.uncalled)}" if self.uncalled else ""
        counts = f"{_counted(len(self.names), 'module')}, {_counted(sum(self.calls.values()), 'call')}"
        return f"<Hooks: kind={self._kind!r}, {'on' if self._on else 'off'}, {counts}{idle}>"

    @property
    def uncalled(self) -> list[str]:
        """The names of the modules that have not been called since the last entry (for `"backward"`: have got no gradient)."""
        return [name for name, count in self.calls.items() if not count]

    def remove(self) -> None:
        """Remove every hook of this object; doing so twice is harmless."""
        try:
            self._on = False
            self._sweep()
        except BaseException:  # Ctrl-C in its midst
            self._sweep()
            raise

    def _register(self) -> None:
        for name, module in self._modules.items():
            if self._kind == "forward_pre":
                module.register_forward_pre_hook(self._hook(name))
            else:
                module.register_forward_hook(self._hook(name))
        if self._named:
            self._model.register_forward_hook(_Hook(self, self._note_return))

    def _hook(self, name: str) -> _Hook:
        return _Hook(self, lambda module, inputs, output=None: self._called(name, module, inputs, output))

    def _note_return(self, *args: Any) -> None:
        self._model_returned = True

    def _sweep(self) -> None:
        # By what stands in the tables, not by handles: a Ctrl-C between a registration and the note of it leaves a hook.
        for module in (*self._modules.values(), self._model):
            for table in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in list(table.items()):
                    if isinstance(hook, _Hook) and hook.owner is self:
                        table.pop(key, None)
        while self._tensor_handles:
            self._tensor_handles[-1][1].remove()
            self._tensor_handles.pop()

    def _called(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        self._reached.add(name)
        if self._kind == "backward":
            return self._await_gradient(name, module, output)
        return self._call(name, module, inputs, output)

    def _call(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not self._on:  # a gradient that comes too late: a Ctrl-C has cost us the handle
            return None
        self.calls[name] += 1
        result = self._fn(name, module, inputs, output)
        return result if self._replace else None

    def _await_gradient(self, name: str, module: nn.Module, output: Any) -> None:
        # Not a full backward hook: that one breaks on activations that work in place (pytorch#61519).
        tensor = next((tensor for tensor in tensors_in(output) if tensor.requires_grad), None)
        if tensor is None:
            return
        if len(self._tensor_handles) > self._many:  # let go of those whose graph is gone
            self._tensor_handles = [item for item in self._tensor_handles if item[1].hooks_dict_ref() is not None]
            self._many = 2 * len(self._tensor_handles) + 50
        if tensor.is_leaf and tensor._backward_hooks is not None:  # a parameter, an input: it outlives its graph
            for own, handle in self._tensor_handles:
                if own == name and handle.hooks_dict_ref() is tensor._backward_hooks:
                    return
        handles = on_gradient(tensor, lambda grad: self._call(name, module, (), grad))
        self._tensor_handles += [(name, handle) for handle in handles]


class _Hook:
    """What stands in a module's table. A copy of it, with a copy of the model, does nothing."""

    def __init__(self, owner: Hooks, fn: Callable[..., Any]) -> None:
        self.owner, self._fn = owner, fn
        if "torch._dynamo" in sys.modules:
            # Traced, the count alone would make it compile anew at every call.
            self._fn = torch.compiler.disable(fn)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any) -> Any:
        return self._fn(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _copy_of_hook, ()


def _nothing(*args: Any) -> None:
    return None


def _copy_of_hook() -> Any:
    return _nothing


_TRACED = (
    "torch.compile has traced this model already, and what it has compiled runs on without hooks that come later. Enter "
    "before the first call, or call torch.compiler.reset(), after which it compiles anew, or run the model uncompiled."
)


def is_leaf(name: str, module: nn.Module) -> bool:
    """Whether a module has no modules inside (a parametrisation of its weight does not count)."""
    return not ({name for name, _ in module.named_children()} - {"parametrizations"})


def select_modules(
    model: nn.Module, select: Any = None, default: Callable[[str, nn.Module], bool] = is_leaf
) -> dict[str, nn.Module]:
    """The modules that `select` picks, by name, in order of registration.

    Args:
        model: The model whose modules are looked at.
        select: A type or a tuple of types, a name or a glob, a predicate `(name, module) -> bool`, or a list of these.
        default: The predicate that stands in where `select` is None.

    Returns:
        `{name: module}`, each module once, under its first name; the model itself goes by the name of its class.

    Raises:
        TypeError: `model` is no module, or `select` is none of the above.
        ValueError: Nothing matches, or a name or glob matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> list(select_modules(model, nn.Linear)), list(select_modules(model, ["1", "2"]))
        (['0', '2'], ['1', '2'])
    """
    if isinstance(model, type) or not isinstance(model, nn.Module):
        hint = ": did you forget ()?" if isinstance(model, type) else "."
        raise TypeError(f"model={model!r} (type={type(model).__name__}), wanted a torch.nn.Module{hint}")
    wanted = default if select is None else select
    parts = list(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]
    known = layer_names(model)
    all_names = [own[0] for own in known.values()]
    chosen: set[nn.Module] = set()
    for part in parts:
        found = {module for module, names in known.items() if _matches(part, names, module, select)}
        if isinstance(part, str) and not found:
            raise ValueError(f"select={select!r}: there is no module {part!r}. {near_names(part, all_names)}")
        chosen |= found
    if not chosen:
        raise ValueError(
            f"select={select!r} matches no module of this {type(model).__name__}. {near_names('', all_names)}"
        )
    return {names[0]: module for module, names in known.items() if module in chosen}


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor in an output: itself, or the first of `tensors_in`; None if there is none."""
    return output if isinstance(output, Tensor) else next(tensors_in(output), None)


def tensors_in(output: Any, _above: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """Every tensor in an output, however deep in tuples, lists, dicts and dataclasses, those of Hugging Face included.

    Example:
        >>> import torch
        >>> [tuple(tensor.shape) for tensor in tensors_in((torch.zeros(2), {"state": [None, torch.zeros(3, 1)]}))]
        [(2,), (3, 1)]
    """
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, Mapping):  # before dataclasses: a ModelOutput is both, and leaves out what is None
        items: Iterable[Any] = output.values()
    elif isinstance(output, (tuple, list)):  # a PackedSequence too: its data come first
        items = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    else:
        return
    if id(output) not in _above:  # else it contains itself
        for item in items:
            yield from tensors_in(item, (*_above, id(output)))


def layer_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all names under which it is registered; parametrisations are part of their module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in name.split("."):
            own = names.setdefault(module, [])
            own.append(name)
            if (
                "_orig_mod." in name
            ):  # inside of what torch.compile has made, a layer is known by its plain name as well
                own.append(name.replace("_orig_mod.", ""))
    root = type(model).__name__
    if not any(root in own for own in names.values()):  # a child may bear that name
        names[model].insert(0, root)
    return names


def _matches(part: Any, names: list[str], module: nn.Module, select: Any) -> bool:
    if isinstance(part, str):
        return part in names or any(fnmatchcase(name, part) for name in names if name)
    if isinstance(part, type):
        return isinstance(module, part)
    if callable(part):
        return bool(part(names[0], module))
    raise TypeError(
        f"select={select!r} holds {part!r} (type={type(part).__name__}), wanted a module type, a name, a glob, or a "
        "predicate (name, module) -> bool."
    )


def _named_outright(model: nn.Module, select: Any) -> dict[str, str]:
    """Of the parts of `select` those that are names, no globs; for each the name under which its module is hooked."""
    parts = list(select) if isinstance(select, (list, tuple, set, frozenset)) else [select]
    wanted = [part for part in parts if isinstance(part, str)]
    return {part: own[0] for own in layer_names(model).values() for part in wanted if part in own} if wanted else {}


def near_names(part: str, names: list[str]) -> str:
    """For an error message: the name that `part` is a misspelling of, and all that there are."""
    near = difflib.get_close_matches(part, names, n=1)
    return f"{f'Did you mean {near[0]!r}? ' if near else ''}There are {_shown(names)}."


def _shown(names: list[str], most: int = 20) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
