"""The functions of torch that are activations, and those that only ask about a tensor or show it in another shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NAMES = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 rrelu selu sigmoid "
    "silu softplus softshrink softsign tanh tanhshrink threshold celu_ elu_ hardtanh_ leaky_relu_ relu_ rrelu_ selu_ "
    "sigmoid_ tanh_ threshold_ clamp clamp_ clamp_min clamp_min_"
)

ACTIVATIONS = frozenset(
    function
    for home in (F, torch, Tensor)
    for name in _NAMES.split()
    if (function := getattr(home, name, None)) is not None
)
"""Every form in which an activation may be called: of `torch`, of `torch.nn.functional`, as a method, in place."""

_ASKING = (
    "dim ndimension size stride numel nelement is_contiguous is_floating_point is_complex get_device storage_offset __len__ "
    "data_ptr element_size untyped_storage"
)
_SHOWING = "view reshape flatten unflatten permute transpose movedim squeeze unsqueeze contiguous"

QUESTIONS = frozenset(getattr(Tensor, name) for name in _ASKING.split())
"""Methods that do not look at a tensor's values."""

ALIASES = frozenset(
    function
    for home in (torch, Tensor)
    for name in [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "movedim",
        "squeeze",
        "unsqueeze",
        "contiguous",
    ]
    if (function := getattr(home, name, None)) is not None
)
"""What shows all values of a tensor in another shape, mostly without copying them."""

_VIEWS = frozenset(getattr(Tensor, name) for name in ["T", "mT", "H", "mH", "data", "real", "imag"])


def is_question(function: Any) -> bool:
    """Reading a property, such as the shape, that shows none of the values."""
    return getattr(function, "__name__", "") == "__get__" and getattr(function, "__self__", None) not in _VIEWS
