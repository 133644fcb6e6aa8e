"""`Sharing`: which parameters live in the same memory: tied ones, and views of one another."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Sharing:
    """Who shares a parameter with whom.

    Args:
        model: The model, without lazy parameters that will be used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._extents: list[tuple[str, int, int, str]] = []  # device, first byte, the one behind the last, owner
        self._of: dict[int, tuple[str, int, int]] = {}
        for name, module in model.named_modules():
            owner = name.split(".parametrizations.")[0].removesuffix(".parametrizations")
            for parameter in module._parameters.values():
                if parameter is not None and not is_lazy(parameter) and parameter.numel():
                    place = (str(parameter.device), *_extent(parameter))
                    self._of[id(parameter)] = place
                    self._extents.append((*place, owner))

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether this is a parameter of the model."""
        return id(parameter) in self._of

    def partners(self, parameter: nn.Parameter, owner: str) -> list[str]:
        """The names of the other modules that hold (part of) this parameter of the module `owner`; no parents of it."""
        if owner not in self.sharers:
            return []
        device, start, end = self._of.get(id(parameter), ("", 0, 0))
        owners = dict.fromkeys(o for d, s, e, o in self._extents if d == device and s < end and start < e)
        return [o for o in owners if o != owner and o and not owner.startswith(f"{o}.")]

    @cached_property
    def sharers(self) -> set[str]:
        """The names of all modules that share a parameter with another one."""
        found: set[str] = set()
        last: tuple[str, int, int, str] | None = None
        for extent in sorted(self._extents):
            if last is not None and extent[0] == last[0] and extent[1] < last[2]:
                found |= {last[3], extent[3]}
            if last is None or extent[0] != last[0] or extent[2] > last[2]:
                last = extent
        return found


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte, and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
