"""Units: where a layer's output has its channels or features, and which of them have been silent for how long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_FEATURES_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)
_TRANSFORMERS = (
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_COMPARABLE = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_FIRST = 32  # samples: in a healthy net every unit has been active within so many


def unit_dims(model: nn.Module) -> dict[nn.Module, int]:
    """For each module the dimension of its output that holds the units: 1 for channels, -1 for features.

    Known by type, or by the weight: two dimensions make features, more of them channels. Activations, dropout and other
    modules without a weight are like the last one before them that is known, in order of registration; those that hold others
    are like the last of these.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2), nn.ReLU())
        >>> list(unit_dims(model).values())[1:]
        [1, 1, 1, -1, -1]
    """
    dims: dict[nn.Module, int] = {}
    known = 1

    def visit(module: nn.Module) -> None:
        nonlocal known
        if module in dims:
            return
        own = _known(module)
        dims[module] = known = own or known
        for child in module.children():
            visit(child)
        dims[module] = known = own or known

    visit(model)
    return dims


def batch_dim(module: nn.Module) -> int:
    """The dimension of the samples in a module's output: 0, but where recurrent nets and attention have the time first."""
    if isinstance(module, _TRANSFORMERS):  # which leave it to their attention
        module = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), module)
    return 0 if getattr(module, "batch_first", True) else 1


def active_units(x: Tensor, dim: int, positive: bool) -> Tensor:
    """Which units show a value above zero (`positive`), or one other than zero, anywhere. NaN is such a value.

    Args:
        x: A dense tensor of real numbers.
        dim: The dimension of the units; of a tensor that has no such dimension it is the last one.
        positive: Values must be above zero.

    Returns:
        Bools, of shape (units,), on the device of `x`.

    Example:
        >>> active_units(torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.0, -2.0]]), 1, positive=True).tolist()
        [False, True, False]
    """
    x = x.detach()
    if x.ndim == 0:
        x = x[None]
    dim = dim % x.ndim if -x.ndim <= dim < x.ndim else x.ndim - 1
    if x.device.type == "cpu" and dim != 0 and len(x) > 2 * _FIRST:  # where a look at the outcome is free
        found = _any(x[:_FIRST], dim, positive)
        return found if found.all() else found | _any(x[_FIRST:], dim, positive)
    return _any(x, dim, positive)


class Activity:
    """How long each unit of each layer has been silent, in rows: units that are silent for a whole window are dead.

    Everything is kept on the device.

    Args:
        window: The number of rows.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._silent: dict[str, Tensor] = {}  # for each unit the number of rows since it was last active
        self._rows: dict[str, int] = {}

    def add(self, name: str, active: Tensor) -> Tensor:
        """Take in one row of a layer.

        Args:
            name: The layer.
            active: Which of its units were active, of shape (units,).

        Returns:
            The fraction of units that were silent in the last `window` rows, this one included, or in all rows where they
            are fewer; float32, without dimensions. NaN for a layer without units.
        """
        silent = self._silent.get(name)
        if silent is None or silent.shape != active.shape:
            silent, self._rows[name] = torch.zeros_like(active, dtype=torch.int32), 0
        silent = silent.to(active.device)  # after a resume it comes from the CPU
        self._silent[name] = silent = torch.where(active, 0, silent + 1)
        self._rows[name] += 1
        return (silent >= min(self.window, self._rows[name])).float().mean()

    def state_dict(self) -> dict[str, Any]:
        """The silence of every unit, on the CPU."""
        return {"silent": {name: t.cpu() for name, t in self._silent.items()}, "rows": dict(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: It is none.
        """
        silent, rows = dict(state["silent"]), dict(state["rows"])
        fits = all(isinstance(t, Tensor) and t.dtype == torch.int32 and t.ndim == 1 for t in silent.values())
        if not fits or set(silent) != set(rows) or not all(type(n) is int and n >= 0 for n in rows.values()):
            raise ValueError("the silence of the units is not given in rows.")
        self._silent, self._rows = silent, rows


def _any(x: Tensor, dim: int, positive: bool) -> Tensor:
    others = [d for d in range(x.ndim) if d != dim]
    if not x.numel():
        return torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device)
    if x.dtype not in _COMPARABLE and x.dtype != torch.bool:
        x = x.float()
    if positive and x.dtype != torch.bool:
        return ~((x.amax(others) if others else x) <= 0)
    return (x != 0).any(others) if others else x != 0


def _known(module: nn.Module) -> int | None:
    if isinstance(module, _FEATURES_LAST):
        return -1
    if isinstance(module, _CHANNELS_SECOND):
        return 1
    if parametrize.is_parametrized(module, "weight"):  # to compute it may change its state, as a spectral norm's does
        shapes = [p.shape for p in module.parametrizations["weight"].parameters(recurse=False)]  # type: ignore[index, union-attr]
        ndim = max(map(len, shapes), default=0)
        return None if ndim < 2 else -1 if ndim == 2 else 1
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and type(weight) is not nn.UninitializedParameter and weight.ndim >= 2:
        return -1 if weight.ndim == 2 else 1
    return None
