"""`orthonormal`: a weight with orthonormal rows or columns, whatever its precision."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minitrain.init.layers import Layer
from minitrain.init.meeting import is_zero


@torch.no_grad()
def orthonormal_(weight: Tensor, gain: float = 1.0) -> None:
    """Fill a tensor of two or more dimensions by `torch.nn.init.orthogonal_`, in any precision and memory format."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32  # it knows no half precision
    drawn = torch.empty_like(weight, dtype=wide, memory_format=torch.contiguous_format)
    weight.copy_(nn.init.orthogonal_(drawn, gain))


def make_orthonormal(layers: Iterable[Layer], include_frozen: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Step I of LSUV: replace the weights of these layers by orthonormal matrices, drawn from the global generator.

    Left alone are weights that are frozen, all zeros, shared and drawn already, or computed from something else than a
    direction.

    Returns:
        By the layer's name, the tensor that was changed, and its values before.
    """
    before: dict[str, tuple[Tensor, Tensor]] = {}
    drawn: set[tuple[int, int]] = set()
    for layer in layers:
        matrix = layer.matrix
        if matrix is None or not matrix.parameter.is_floating_point():
            continue
        weight = matrix.tensor
        place = weight.data_ptr(), weight.numel()
        if place in drawn or not (matrix.parameter.requires_grad or include_frozen) or is_zero(weight):
            continue
        drawn.add(place)
        before[layer.name] = weight, weight.detach().clone()
        orthonormal_(weight)
    return before
