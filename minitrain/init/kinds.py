"""Which classes are weight layers, and where they keep weight and bias: torch's own, and what users register."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import nn

WEIGHT_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""torch's weight layers; their lazy forms and subclasses belong to them."""


class Kind(NamedTuple):
    """Under which names a class keeps its parameters.

    Attributes:
        weight: What scales the output.
        bias: What shifts it.
        channel_dim: Of the output, the dimension of the channels.
        weight_dim: Of the weight, the dimension of the output's channels.
    """

    weight: str = "weight"
    bias: str = "bias"
    channel_dim: int = -1
    weight_dim: int = 0


_Class = TypeVar("_Class", bound=type[nn.Module])
_TORCH: dict[type[nn.Module], Kind] = {
    cls: Kind(channel_dim=-1 if cls in (nn.Linear, nn.Bilinear) else 1) for cls in WEIGHT_LAYERS
}
_registered: dict[type[nn.Module], Kind] = {}


def register_layer(
    cls: _Class, *, weight: str = "weight", bias: str = "bias", channel_dim: int = -1, weight_dim: int = 0
) -> _Class:
    """Teach LSUV, `layer_stats` and the random initialisers another class of weight layers, its subclasses included.

    The output should follow the weight: twice the weight and bias, twice the output. How far it does is not taken on trust:
    LSUV runs the layer again on its own input, and claims only what it has measured.

    Args:
        cls: The class. Registered again, the new names replace the old ones.
        weight: The name of the parameter that scales the output.
        bias: The name of the parameter that shifts it; an instance may have none.
        channel_dim: The dimension of the channels in the output, for `scope="channel"`.
        weight_dim: The dimension of the weight that belongs to the output's channels, for the same.

    Returns:
        The class, so that this serves as a decorator.

    Raises:
        TypeError: `cls` is no module class, or a name is no string.

    Example:
        The `Conv1D` of Hugging Face's GPT-2 multiplies with a weight of shape (inputs, outputs):

        >>> import torch
        >>> from torch import nn
        >>> from minitrain.init import lsuv_, register_layer
        >>> class Conv1D(nn.Module):
        ...     def __init__(self, n_out, n_in):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.randn(n_in, n_out) * 0.02)
        ...         self.bias = nn.Parameter(torch.zeros(n_out))
        ...     def forward(self, x):
        ...         return torch.addmm(self.bias, x, self.weight)
        >>> _ = register_layer(Conv1D, weight_dim=1)
        >>> lsuv_(nn.Sequential(Conv1D(16, 8)), torch.randn(32, 8))["0"].status
        'normalized'
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls={cls!r}, wanted a class derived from torch.nn.Module.")
    for name, value in {"weight": weight, "bias": bias}.items():
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted the name of a parameter.")
    _registered[cls] = Kind(weight, bias, channel_dim, weight_dim)
    return cls


def kind_of(module: nn.Module) -> Kind | None:
    """Where a weight layer keeps its parameters; None where this is no weight layer. The nearest class decides."""
    for cls in type(module).__mro__:
        found = _registered.get(cls) or _TORCH.get(cls)
        if found is not None:
            return found
    return None
