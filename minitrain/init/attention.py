"""`Projections`: what torch's attention function multiplies with which weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from minitrain.init.calls import Call
from minitrain.init.layers import Layer

_signature = inspect.signature(F.multi_head_attention_forward)


def is_attention(function: Callable[..., Any]) -> bool:
    """Whether this is the function that `nn.MultiheadAttention` calls."""
    return function is F.multi_head_attention_forward


class Projections:
    """The arguments of one call of `F.multi_head_attention_forward`."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = _signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self._given = bound.arguments
        self.out_weight, self.out_bias = self._given["out_proj_weight"], self._given["out_proj_bias"]

    def of(self, which: str) -> tuple[Any, Any, Any, slice | None]:
        """Weight, input, bias, and the rows of the weight, of the projection `which`: q, k or v."""
        x = self._given[{"q": "query", "k": "key", "v": "value"}[which]]
        given = {"k": self._given["static_k"], "v": self._given["static_v"]}.get(which)
        if given is not None:  # it is not projected
            return None, x, None, None
        if self._given["use_separate_proj_weight"]:
            return self._given[f"{which}_proj_weight"], x, self._given["in_proj_bias"], None
        return self._given["in_proj_weight"], x, self._given["in_proj_bias"], self._rows(which)

    def call(self, layer: Layer, x: Tensor, bias: Any, which: str) -> Call:
        """The projection alone; its bias is read when it is called."""
        rows = self._rows(which)

        def project(x: Tensor) -> Tensor:
            assert layer.weight is not None
            b = None if bias is None else bias.detach()[rows].to(x.dtype)
            return F.linear(x, layer.weight.tensor.to(x.dtype), b)

        return Call(project, (x,), {})

    def _rows(self, which: str) -> slice:
        size = self._given["embed_dim_to_check"]
        i = "qkv".index(which)
        return slice(i * size, (i + 1) * size)
