"""`Hooks`: forward and backward hooks on named modules, as a context manager."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitrain.errors import LoopError

HookFn = Callable[[str, nn.Module, tuple[Any, ...], Any], Any]
"""`fn(name, module, inputs, output)`."""

KINDS = ("forward", "forward_pre", "backward")


class Hooks:
    """Call a function whenever one of the selected modules is called, for as long as the `with` lasts.

    On exit every hook is removed, whatever happened inside, and only those that this object registered. Hooks run in the
    order of registration, so they see what earlier hooks have made of an output.

    Args:
        model: The model whose modules are hooked.
        fn: `fn(name, module, inputs, output)`. Its return value is ignored, unless `replace=True`.
        select: Which modules: a type or a tuple of types, a name, a glob such as `"features.*"`, a predicate
            `(name, module) -> bool`, or a list of these. None: every leaf module. A module that is registered under
            several names is hooked once, under its first name. A model that is itself selected goes by the name of its class.
        kind: When `fn` is called. `"forward"`: after the module, with its output. `"forward_pre"`: before it, `output` is
            None. `"backward"`: when the gradient with respect to its output is there, `output` is that gradient and `inputs`
            is `()`, since keeping them until then would cost memory; of an output with several tensors the first one counts.
            An activation that works in place behind the module does not disturb it.
        replace: A return value that is not None takes the place of the output (of the inputs, of the gradient).

    Attributes:
        names: The names of the hooked modules, in order of registration.
        calls: For each name, how often `fn` was called since the last entry.

    Raises:
        TypeError: `model`, `fn` or `select` is of a wrong type.
        ValueError: `kind` is unknown, or `select` matches no module.

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
    """

    def __init__(
        self, model: nn.Module, fn: HookFn, select: Any = None, kind: str = "forward", *, replace: bool = False
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn={fn!r} (type={type(fn).__name__}), wanted a function (name, module, inputs, output).")
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}, wanted one of {', '.join(map(repr, KINDS))}.")
        self._modules = select_modules(model, select)
        self._fn, self._kind, self._replace = fn, kind, replace
        self._open: ExitStack | None = None
        self._tensor_handles: deque[RemovableHandle] = deque()
        self.names = list(self._modules)
        self.calls = dict.fromkeys(self.names, 0)

    def __enter__(self) -> Hooks:
        if self._open is not None:
            raise LoopError(
                "these Hooks are on already: entering them twice would count everything twice. Make new ones."
            )
        self.calls.update(dict.fromkeys(self.names, 0))
        with ExitStack() as stack:  # if a registration fails, those before it are undone
            stack.callback(self._release_tensors)
            for name, module in self._modules.items():
                stack.callback(self._register(name, module).remove)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def uncalled(self) -> list[str]:
        """The names of the modules that have not been called since the last entry."""
        return [name for name, count in self.calls.items() if not count]

    def remove(self) -> None:
        """Remove every hook of this object; doing so twice is harmless."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def _call(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if self._open is None:  # a copy of the model, made while the hooks were on, has kept them
            return None
        self.calls[name] += 1
        result = self._fn(name, module, inputs, output)
        return result if self._replace else None

    # The hooks are closures: `deepcopy(model)` copies those by reference, a partial would be copied with all it holds.

    def _register(self, name: str, module: nn.Module) -> RemovableHandle:
        if self._kind == "forward":
            return module.register_forward_hook(lambda m, inputs, output: self._call(name, m, inputs, output))
        if self._kind == "forward_pre":
            return module.register_forward_pre_hook(lambda m, inputs: self._call(name, m, inputs, None))
        return module.register_forward_hook(lambda m, inputs, output: self._await_gradient(name, m, output))

    def _await_gradient(self, name: str, module: nn.Module, output: Any) -> None:
        # Not a full backward hook: that one breaks on activations that work in place (pytorch#61519).
        tensor = first_tensor(output)
        if self._open is None or tensor is None or not tensor.requires_grad:
            return
        while self._tensor_handles and self._tensor_handles[0].hooks_dict_ref() is None:  # its graph is gone
            self._tensor_handles.popleft()
        handle = tensor.register_hook(lambda grad: self._call(name, module, (), grad))  # type: ignore[no-untyped-call]
        self._tensor_handles.append(handle)

    def _release_tensors(self) -> None:
        while self._tensor_handles:
            self._tensor_handles.pop().remove()


def is_leaf(name: str, module: nn.Module) -> bool:
    """Whether a module has no modules inside (a parametrisation of its weight does not count)."""
    return not (set(module._modules) - {"parametrizations"})


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
    known = _names(model)
    chosen: set[nn.Module] = set()
    for part in parts:
        found = {module for module, names in known.items() if _matches(part, names, module, select)}
        if isinstance(part, str) and not found:
            raise ValueError(f"select={select!r}: there is no module {part!r}. {_hint(part, known)}")
        chosen |= found
    if not chosen:
        raise ValueError(f"select={select!r} matches no module of this {type(model).__name__}. {_hint('', known)}")
    return {names[0]: module for module, names in known.items() if module in chosen}


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor in an output: itself, or in a tuple, list or dict, however deep; None if there is none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, (tuple, list)):
        return None
    return next((tensor for item in output if (tensor := first_tensor(item)) is not None), None)


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all names under which it is registered; parametrisations are part of their module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" not in name.split("."):
            names.setdefault(module, []).append(name)
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


def _hint(part: str, known: Mapping[nn.Module, list[str]]) -> str:
    names = [own[0] for own in known.values()]
    near = difflib.get_close_matches(part, names, n=1)
    shown = ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"{f'Did you mean {near[0]!r}? ' if near else ''}There are {shown}."
