"""The state of an optimiser by the names of its parameters, which torch keeps by their position.

Positions are not enough: where two parameters change places, their moments would be swapped in silence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitrain.wrappers import inner

_OF_OTHER_SHAPES = ("Adafactor", "LBFGS")  # whose state is not of the shape of the parameter


def parameter_names(model: nn.Module, loss_func: Any = None) -> dict[nn.Parameter, str]:
    """Every parameter of a model, and of a loss that has some, with its name."""
    names = {p: name for name, p in inner(model).named_parameters()}
    if isinstance(loss_func, nn.Module):
        for name, p in inner(loss_func).named_parameters():
            names.setdefault(p, f"loss_func.{name}")
    return names


def optimizer_state(opt: Any, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """What `opt.state_dict()` gives, with names in place of positions.

    Args:
        opt: A torch optimiser, or one that keeps its state in the same form. Of another form the state is kept as it is.
        names: The name of each parameter. One that has none is kept by its position.

    Returns:
        `{"class": ..., "defaults": {...}, "groups": [{"params": [names], ...}], "state": {name: ...}}`, with what else the
        optimiser keeps as "others" and "extra"; or `{"class": ..., "raw": ...}`.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer_state(opt, parameter_names(model))["groups"][0]["params"]
        ['weight', 'bias']
    """
    state, own = opt.state_dict(), type(opt).__name__
    if not _is_standard(state, opt):
        return {"class": own, "raw": state}
    named = _named(opt, names)
    groups = [
        {**{key: value for key, value in group.items() if key not in ("params", "param_names")}, "params": list(params)}
        for group, params in zip(state["param_groups"], named, strict=True)
    ]
    by_position = _positions(state, named)
    return {
        "class": own,
        "defaults": _defaults(opt),
        "groups": groups,
        "state": {by_position[key]: value for key, value in state["state"].items() if key in by_position},
        "others": {key: value for key, value in state["state"].items() if key not in by_position},
        "extra": {key: value for key, value in state.items() if key not in ("state", "param_groups")},
    }


def optimizer_differences(opt: Any, saved: Any, names: Mapping[nn.Parameter, str]) -> list[str]:
    """Why a saved state does not fit an optimiser, a sentence each; nothing where it does."""
    own = type(opt).__name__
    if saved["class"] != own:
        return [f"the optimiser was {saved['class']!r:.60}, now it is {own!r}"]
    if "raw" in saved:
        return [] if not _is_standard(opt.state_dict(), opt) else ["the optimiser has a state of another kind"]
    groups, here = saved["groups"], _named(opt, names)
    if len(groups) != len(here):
        return [f"the optimiser had {len(groups)} parameter groups, now it has {len(here)}"]
    found: list[str] = []
    for i, (group, present, params) in enumerate(zip(groups, opt.param_groups, here, strict=True)):
        there = group["params"]
        gone, new = [n for n in there if n not in params], [n for n in params if n not in there]
        if gone or new or len(there) != len(params):
            changes = [f"{what} {_listed(those)}" for what, those in (("without", gone), ("and with", new)) if those]
            found.append(f"group {i} of the optimiser now is {' '.join(changes) or 'of other parameters'}")
        for key, value in group.items():
            if key != "params" and not _is_own(present, key) and not alike(value, present.get(key, 0.0)):
                found.append(f"group {i} of the optimiser has {key!r:.40}={value!r:.40}, which cannot be")
        if missing := [key for key in present if not _is_own(present, key) and key not in group]:
            found.append(f"group {i} of the optimiser has no {_listed(missing)}")
    return found + _state_differences(opt, saved, here)


def _is_own(present: Mapping[str, Any], key: str) -> bool:
    """Whether a value of a group is the script's and not the file's: by which rule, and which kernel, and for what."""
    return key in ("params", "param_names") or (key in present and isinstance(present[key], (bool, str, type(None))))


def _state_differences(opt: Any, saved: Any, here: list[list[str]]) -> list[str]:
    """What torch would find out at the first step only: state of unknown parameters, or of another shape."""
    own = type(opt).__module__.startswith("torch.optim.") and type(opt).__name__ not in _OF_OTHER_SHAPES
    states = dict(saved["state"])
    found: list[str] = []
    for group, names in zip(opt.param_groups, here, strict=True):
        keys = set[frozenset[str]]()
        for name, p in zip(names, group["params"], strict=True):
            state = states.pop(name, None)
            if state is not None and own:
                keys.add(frozenset(state))
                wrong = [key for key, value in state.items() if not _is_like(value, p)]
                found += [f"the optimiser's {key!r:.40} of {name!r} is not of the parameter's shape" for key in wrong]
        if len(keys) > 1:
            found.append(f"the optimiser's state lacks something of some of {_listed(names)}")
    return found + [f"the optimiser has a state of {name!r:.60}, which is no parameter" for name in states]


def _is_like(value: Any, p: Tensor) -> bool:
    if isinstance(value, Tensor):
        return value.shape in (p.shape, torch.Size(), torch.Size([1]))
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def changed_defaults(opt: Any, saved: Any) -> list[str]:
    """The options with which an optimiser was made that are others than those of a saved state, such as `weight_decay`."""
    there, here = saved.get("defaults", {}), _defaults(opt)
    return [key for key in here if key in there and there[key] != here[key]]


def values_of_groups(opt: Any) -> list[dict[str, Any]]:
    """The values of every parameter group, without its parameters: a copy, that training does not change."""
    left_out = ("params", "param_names")
    groups = [{key: value for key, value in group.items() if key not in left_out} for group in opt.param_groups]
    return copy.deepcopy(groups)


def load_optimizer(
    opt: Any,
    saved: Any,
    names: Mapping[nn.Parameter, str],
    values: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Take back what `optimizer_state` gave, to the bit; `optimizer_differences` has found none.

    Args:
        opt: The optimiser.
        saved: The state.
        names: The name of each parameter.
        values: What the parameter groups get in place of the saved values. None: those.
    """
    if "raw" in saved:
        opt.load_state_dict(saved["raw"])
        return
    here = _named(opt, names)
    positions: dict[str, int] = {}
    for name in (name for params in here for name in params):
        positions.setdefault(name, len(positions))
    groups = []
    for i, (group, present, params) in enumerate(zip(saved["groups"], opt.param_groups, here, strict=True)):
        there = group if values is None else values[i]
        kept = {key: value for key, value in there.items() if not _is_own(present, key)}
        own = {key: value for key, value in present.items() if key in kept or _is_own(present, key)}
        groups.append({**own, **kept, "params": [positions[name] for name in params]})
    state = {positions[name]: value for name, value in saved["state"].items()} | saved["others"]
    opt.load_state_dict({**saved["extra"], "state": state, "param_groups": groups})
    for group, params in zip(opt.param_groups, here, strict=True):
        for p, name in zip(group["params"], params, strict=True):
            for key, value in saved["state"].get(name, {}).items():
                now = opt.state[p].get(key)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                    opt.state[p][key] = value.to(now.device)  # torch has made it of the parameter's dtype


def _defaults(opt: Any) -> dict[str, Any]:
    """What may change the bits, and is plain: not by which kernel they are computed."""
    kinds = (bool, int, float, str, tuple, type(None))
    kernels = ("foreach", "fused", "capturable", "differentiable")
    defaults = getattr(opt, "defaults", {})
    return {key: value for key, value in defaults.items() if key not in kernels and isinstance(value, kinds)}


def _is_standard(state: Any, opt: Any) -> bool:
    """Whether parameters go by their positions, counted over the groups."""
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        return False
    lengths = [len(group["params"]) for group in state["param_groups"]]
    return lengths == [len(group["params"]) for group in opt.param_groups]


def _named(opt: Any, names: Mapping[nn.Parameter, str]) -> list[list[str]]:
    """The names of the parameters of each group."""
    found: dict[Any, str] = {}
    for group in opt.param_groups:
        for p in group["params"]:
            found.setdefault(p, names.get(p, f"?{len(found)}"))
    return [[found[p] for p in group["params"]] for group in opt.param_groups]


def _positions(state: Any, named: list[list[str]]) -> dict[Any, str]:
    return {
        position: name
        for group, params in zip(state["param_groups"], named, strict=True)
        for position, name in zip(group["params"], params, strict=True)
    }


def alike(saved: Any, present: Any) -> bool:
    """Whether a value of a parameter group can stand for another: numbers for numbers, pairs for pairs."""
    if isinstance(present, (tuple, list)):
        return isinstance(saved, (tuple, list)) and len(saved) == len(present) and all(map(alike, saved, present))
    if isinstance(present, (int, float, Tensor)) and not isinstance(present, bool):
        if isinstance(saved, Tensor):
            return saved.numel() == 1 and bool(saved.isfinite().all())
        return isinstance(saved, (int, float)) and not isinstance(saved, bool) and math.isfinite(saved)
    return type(saved) is type(present)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
