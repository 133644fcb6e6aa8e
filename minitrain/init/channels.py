"""Normalise a layer channel by channel: each one gets mean 0 and a standard deviation of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minitrain.init.calls import Call
from minitrain.init.layers import Layer

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PRODUCTS = (nn.functional.linear, torch.bilinear)


@dataclass(frozen=True)
class Channels:
    """Count, mean and squared deviations of every channel; those of several batches merge, as in `Moments`.

    Attributes:
        count: The number of values of one channel.
        mean: float64, one value a channel.
        m2: Likewise: the sum of the squared deviations.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def std(self) -> Tensor:
        """With `count - 1` in the denominator."""
        return (self.m2 / max(self.count - 1, 1)).sqrt()

    def merge(self, other: Channels) -> Channels:
        """As if the values of both were one batch."""
        count = self.count + other.count
        delta, share = other.mean - self.mean, other.count / count
        m2 = self.m2 + other.m2 + delta * delta * (self.count * share)
        return Channels(count, self.mean + delta * share, m2)


def channels_of(y: Tensor, dim: int) -> Channels:
    """The channels of a tensor, of which `dim` is their dimension."""
    rows = y.detach().movedim(dim, 0).reshape(y.shape[dim], -1)
    if rows.device.type == "mps":
        rows = rows.cpu()
    found = [_row(row) for row in torch.split(rows, max(1, 2**17 // max(1, rows.shape[1])))]
    return Channels(rows.shape[1], torch.cat([mean for mean, _ in found]), torch.cat([m2 for _, m2 in found]))


def _row(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = rows.double()
    mean = wide.mean(1)
    return mean, (wide - mean[:, None]).square_().sum(1)


def channel_dim(layer: Layer, call: Call, y: Tensor) -> int:
    """The dimension of the channels in a layer's output."""
    if call.function in _PRODUCTS or layer.parent is not None:
        return y.ndim - 1
    dim = layer.kind.channel_dim if layer.kind else 1
    if (
        dim == 1 and layer.weight is not None and y.ndim < layer.weight.parameter.ndim
    ):  # a convolution of a single sample
        return 0
    return dim % y.ndim


def over_weight(layer: Layer, values: Tensor) -> Tensor | None:
    """One value a channel, in the shape of the weight to multiply with; None where that has other channels."""
    assert layer.weight is not None
    weight, n = layer.weight.tensor, len(values)
    if isinstance(layer.module, _TRANSPOSED):  # (in, out / groups, ...)
        groups = layer.module.groups
        if weight.ndim < 2 or weight.shape[1] * groups != n or weight.shape[0] % groups:
            return None
        table = values.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
        return table.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))
    dim = layer.kind.weight_dim if layer.kind else 0
    if not weight.ndim or weight.shape[dim] != n:
        return None
    shape = [1] * weight.ndim
    shape[dim] = n
    return values.view(shape)


def over_output(values: Tensor, y: Tensor, dim: int) -> Tensor:
    """One value a channel, in the shape of the output to multiply with."""
    shape = [1] * y.ndim
    shape[dim] = len(values)
    return values.view(shape).to(y.device, y.dtype)


class ChannelBench:
    """A layer whose channels are set, relative to what they were.

    Args:
        layer: The layer.
        bias: Its bias; None: it may not be changed.
    """

    def __init__(self, layer: Layer, bias: Tensor | None) -> None:
        assert layer.weight is not None
        self._layer, self._weight, self._bias = layer, layer.weight.tensor, bias
        self._weight0 = self._weight.detach().clone()
        self._bias0 = None if bias is None else bias.detach().clone()

    def put(self, scale: Tensor, shift: Tensor) -> bool:
        """`W = scale * W0` and `b = scale * b0 + shift`, channel by channel; False where the weight has other channels."""
        factors = over_weight(self._layer, scale.to(self._weight.device))
        if factors is None or (self._bias is not None and self._bias.shape != scale.shape):
            return False
        wide = torch.float32 if self._weight.device.type == "mps" else torch.float64
        self._weight.copy_(self._weight0.to(wide) * factors.to(wide))
        torch.clear_autocast_cache()  # as for `Bench`
        if self._bias is not None and self._bias0 is not None:
            device = self._bias.device
            self._bias.copy_(self._bias0.to(wide) * scale.to(device, wide) + shift.to(device, wide))
        return True

    def restore(self) -> None:
        """As it was, to the bit."""
        self._weight.copy_(self._weight0)
        if self._bias is not None and self._bias0 is not None:
            self._bias.copy_(self._bias0)
