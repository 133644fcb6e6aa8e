"""Numbers as they come in (arrays, tensors, nested lists), checked and made into arrays of float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def array(argument: str, values: Any) -> Array:
    """The values as float64, on the CPU, None as NaN; `argument` is the name that an error gives them."""
    import numpy as np

    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}: wanted numbers, as an array, a tensor or nested lists: {error}") from None


def vector(argument: str, values: Any, n: int | None = None) -> Array:
    """A list of numbers, `n` of them if that is given."""
    found = array(argument, values)
    if found.ndim != 1 or (n is not None and len(found) != n):
        wanted = "one dimension" if n is None else f"({n},)"
        raise ValueError(f"{argument}: shape {found.shape}, wanted {wanted}.")
    return found


def by_step(argument: str, values: Any, n_steps: int, names: Sequence[str], *more: int) -> Array:
    """A table of shape (steps, layers), or (steps, layers, *more)."""
    found = array(argument, values)
    wanted = (n_steps, len(names), *more)
    if found.size == 0 and 0 in wanted:  # an empty list has no second dimension
        return found.reshape(wanted)
    if found.shape == wanted[:1] and wanted[1:] == (1,):
        return found.reshape(wanted)
    if found.shape != wanted:
        layers = f"{n_steps} steps and {len(names)} layers"
        raise ValueError(f"{argument}: shape {found.shape}, wanted {wanted}: {layers}{_and(more)}.")
    return found


def increasing(argument: str, values: Any) -> Array:
    """A list of numbers, each above the one before."""
    import numpy as np

    found = vector(argument, values)
    wrong = np.flatnonzero(~np.isfinite(found) | np.append(False, ~(found[1:] > found[:-1])))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"{argument}[{i}]={found[i]:g}, wanted a finite number above the one before it.")
    return found


def some(names: Sequence[str]) -> None:
    """Refuse a picture of no layers."""
    if not len(names):
        raise ValueError(f"names={names!r}, wanted at least one layer.")


def levels(table: Array) -> list[float]:
    """The middle value of each layer's column, of those that have a positive one."""
    import numpy as np

    return [float(np.median(positive)) for column in table.T if len(positive := column[column > 0])]


def far_apart(values: Sequence[float]) -> bool:
    """Positive values so different that on a linear axis the small ones would all lie at 0."""
    return len(values) > 0 and max(values) > 50 * min(values)


def _and(more: tuple[int, ...]) -> str:
    return f", and {more[0]} entries: one a bin, one for what is below and one for what is above" if more else ""
