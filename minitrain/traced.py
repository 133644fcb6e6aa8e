"""Whether code that `torch.compile` has made of a model would run on without the hooks that the model has now.

A module is compiled together with the hooks that it has at the time, and torch puts no guard on a table of hooks that is
empty then (`torch._dynamo.config.skip_nnmodule_hook_guards`): one that comes later is never called. Nothing public tells.
But the guards of the compiled code can be asked whether they accept the model as it is, hooks and all; their text has a line
for each module whose call is part of that code; and every parameter that was traced bears a mark.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

_PART = re.compile(r"___dict_contains\('forward', (.*)\.__dict__\)")  # that nobody has replaced its `forward` since
_STEP = re.compile(r"_modules\['([^']*)'\]")


def runs_without_new_hooks(model: nn.Module, hooked: Iterable[nn.Module]) -> bool:
    """Whether a compiled call of `model`, or of a model that it is part of, passes over hooks just registered on `hooked`.

    True as well for a new model of the same class and shapes as one that was traced: torch takes the code of that one.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and to look would import the compiler
        return False
    marked = any(hasattr(tensor, "_dynamo_static_input_type") for tensor in (*model.parameters(), *model.buffers()))
    if not marked and not any(map(_is_compiled, model.modules())):
        return False
    wanted = set(hooked)
    holders = [m for m in model.modules() if "_orig_mod" not in m._modules and not wanted.isdisjoint(m.modules())]
    try:
        return any(_passes_over(guards, model, wanted, holders, marked) for guards in _guards())
    except (ImportError, AttributeError, TypeError, RuntimeError):  # another torch has it otherwise
        return marked


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _named(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(module.named_modules(remove_duplicate=False))


def _guards() -> Iterator[Any]:
    """Of each piece of compiled code the guards on its inputs."""
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    for reference in list(input_codes.seen):
        code = reference()
        if code is not None:
            for entry in _debug_get_cache_entry_list(code):
                yield entry.guard_manager


def _passes_over(guards: Any, model: nn.Module, hooked: set[nn.Module], holders: list[nn.Module], marked: bool) -> bool:
    """Whether this code accepts a module of ours as it is now, and the call of a hooked one is part of it."""
    accepted, answered = [], False
    for manager in guards.root.get_child_managers():
        source, kind = manager.get_source(), manager.get_type_of_guarded_value()
        for module in holders if source.startswith("L['") else ():  # a local variable: `self`, mostly
            for value in (module, module._call_impl, MethodType(type(module).forward, module)):
                if type(value) is kind:
                    verdict = _accepts(guards.root, source, value)
                    answered |= verdict is not None
                    accepted += [module] if verdict else []
    if not accepted and not marked:
        return False
    text = str(guards)
    parts = {".".join(_STEP.findall(source)) for source in _PART.findall(text)}
    if accepted:
        return any(name in parts and part in hooked for module in accepted for name, part in _named(module))
    # As part of a larger model, or under another autocast: it cannot be asked. Did it look at the tables of these hooks?
    names = [name for name, module in _named(model) if name and module in hooked]
    prefixes = (
        {part.removesuffix(names[0]) for part in parts if f".{part}".endswith(f".{names[0]}")} if names else set()
    )
    return f"type={type(model)!r}" in text and any(
        parts.issuperset(prefix + name for name in names)
        and not any(f"{_steps(prefix + name)}._forward" in text for name in names)
        for prefix in prefixes
        if prefix or not answered
    )


def _steps(name: str) -> str:
    return "".join(f"._modules[{part!r}]" for part in name.split("."))


def _accepts(root: Any, source: str, value: Any) -> bool | None:
    """Whether the guards on one local variable accept `value`; None where those on global state fail first."""
    # A clone: a check leaves traces in what it checks. `L` holds the local variables.
    clone = root.clone_manager(lambda node: node.get_source() == "L" or node.get_source().startswith(source))
    answered = False
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            verdict = clone.check_verbose({source[3:-2]: value})
        if verdict.result:
            return True
        answered |= "GLOBAL_STATE" not in str(verdict.verbose_code_parts)
    return False if answered else None
