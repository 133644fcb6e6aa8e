"""`enter`: a loader from batch k of an epoch on; what comes before it is skipped by index, never fetched."""

from __future__ import annotations

import inspect
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from minitrain.errors import DataError
from minitrain.passes import loader_length
from minitrain.preserve import loader_generators, preserve_rng
from minitrain.random_states import RandomState


def enter(loader: Any, start: int, state: Any = None) -> Iterator[Any]:
    """The batches of an epoch from number `start` on, as the pass would have given them that was broken off there.

    It is used in two phases. Call it under the random states that were in force when the epoch began: all that the pass drew
    on its way to batch `start` other than for samples (seed of the workers, permutation) is drawn here, in the same order.
    Then put back the random states of the moment when it was broken off, and draw. A pass that was not begun yet is not
    entered at 0 but begun; one that has come to its end has drawn what its sampler draws at the end, and is not entered.

    - A loader with its own state is given it back.
    - One with a method `batches(start)`, as `BatchLoader` has, is asked for them; a sequence is sliced.
    - Of a `DataLoader` over a map-style dataset, `start` batches of indices are drawn and dropped. No sample is fetched here
      (workers, if there are any, begin to fetch ahead, as they always do).
    - All else has no index to enter by: `start` batches are drawn here and dropped. What follows is right if the stream is a
      function of the random states alone.

    Args:
        loader: Any iterable of batches.
        start: How many batches to skip. At the number of batches nothing is left.
        state: What `loader_state` gave when the pass was broken off.

    Raises:
        DataError: The loader has fewer batches than `start`, or cannot take `state` back.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=4, shuffle=True)
        >>> began = RandomState()
        >>> passing = iter(loader)
        >>> seen = [next(passing)[0] for _ in range(3)]
        >>> broken_off = RandomState()
        >>> rest = [x for x, in passing]
        >>> began.restore()
        >>> entered = enter(loader, 3)
        >>> broken_off.restore()
        >>> all(x.equal(y) for (x,), y in zip(entered, rest, strict=True))
        True
    """
    n = _known_length(loader)
    if n is not None and start > n:
        raise _too_short(loader, start, n)
    if state is not None:
        if not _keeps_state(loader):
            raise DataError(
                f"there is a saved state for the loader, but {type(loader).__name__} has no load_state_dict to take it back."
            )
        loader.load_state_dict(state)
        return iter(loader)
    if _by_number(loader):
        batches: Iterator[Any] = loader.batches(start=start)
        return batches
    if _is_sequence(loader):
        return (loader[i] for i in range(start, len(loader)))
    if _by_index(loader):
        return _twin(loader, start)
    batches = iter(loader)
    if (n_drawn := sum(1 for _ in islice(batches, start))) < start:
        raise _too_short(loader, start, n_drawn)
    return batches


def loader_state(loader: Any) -> Any:
    """What a loader says of itself between two batches, for `enter`; None if it keeps no state of its own.

    Such are loaders with `state_dict` and `load_state_dict`, as torchdata's `StatefulDataLoader`.

    Example:
        >>> loader_state([1, 2, 3]) is None
        True
    """
    return loader.state_dict() if _keeps_state(loader) else None


def _keeps_state(loader: Any) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def _by_number(loader: Any) -> bool:
    """Whether the loader has a method `batches(start)`."""
    batches = getattr(loader, "batches", None)
    try:
        return callable(batches) and "start" in inspect.signature(batches).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False


def _is_sequence(loader: Any) -> bool:
    """Whether iterating it means to take its items by number; a class of one's own may shuffle in its `__iter__`."""
    kept = [kind.__iter__ for kind in (list, tuple, range, deque, Sequence)]
    return isinstance(loader, Sequence) and type(loader).__iter__ in kept


def _by_index(loader: Any) -> bool:
    """Whether it is a DataLoader that does nothing but fetch from a map-style dataset what its sampler says."""
    if not _is_map_style(loader):
        return False
    kept = ("__iter__", "_get_iterator")
    return all(getattr(type(loader), name, None) is getattr(DataLoader, name, None) for name in kept)


def _is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _known_length(loader: Any) -> int | None:
    """How many batches there are; None where nobody knows, or it is an estimate."""
    estimated = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
    return None if estimated else loader_length(loader)


def _too_short(loader: Any, start: int, n: int) -> DataError:
    return DataError(
        f"cannot go on at batch {start}: the loader ({type(loader).__name__}) has only {n} batches. Is it over the same data, "
        "with the same batch size?"
    )


# -- a DataLoader that begins later -----------------------------------------------------------------------------------


def _twin(loader: DataLoader[Any], start: int) -> Iterator[Any]:
    """A pass over a DataLoader of the same arguments, whose sampler begins at batch `start`."""
    indices = _Later(loader.sampler if loader.batch_sampler is None else loader.batch_sampler, start)
    order: dict[str, Any] = {"batch_sampler": indices}
    if loader.batch_sampler is None:
        order = {"sampler": indices, "batch_size": None}
    if loader.pin_memory_device:  # it is deprecated, and must not be named in vain
        order["pin_memory_device"] = loader.pin_memory_device
    twin: DataLoader[Any] = DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        in_order=loader.in_order,
        **order,
    )
    batches = iter(twin)
    if (n_skipped := indices.skip()) < start:
        raise _too_short(loader, start, n_skipped)
    return batches


class _Later:
    """The indices of a sampler from number `start` on.

    They are skipped at the first draw and not when iteration begins: in between the DataLoader draws the seed of its workers,
    and most samplers draw their permutation at their first index.
    """

    def __init__(self, sampler: Iterable[Any], start: int) -> None:
        self._sampler, self._start = sampler, start
        self._indices: Iterator[Any] = iter(())
        self._n_skipped: int | None = None

    def __len__(self) -> int:
        return len(self._sampler) - self._start  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self._indices, self._n_skipped = iter(self._sampler), None
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        self.skip()
        yield from self._indices

    def skip(self) -> int:
        """Skip now, if it has not been done yet, and say how many have been."""
        if self._n_skipped is None:
            self._n_skipped = sum(1 for _ in islice(self._indices, self._start))
        return self._n_skipped


# -- what cannot be entered exactly -----------------------------------------------------------------------------------


def inexact(loader: Any) -> str | None:
    """Why to go on in the middle of an epoch of this loader could differ from never having stopped, and what to do about it.

    Worker processes have random states of their own, which nobody can read. So two samples are drawn in this process, under
    several random states: if they come out different, what a worker gives depends on what it has given before. All random
    states are put back.

    Returns:
        One sentence, or None where it is exact. None as well if the samples cannot be drawn: training will tell.

    Example:
        >>> inexact([1, 2, 3]) is None
        True
        >>> print(inexact(x for x in range(3)))  # doctest: +ELLIPSIS
        generator has no batch numbers to enter by: its batches are drawn again and dropped, which is exact only if ...
    """
    name = type(loader).__name__
    if _keeps_state(loader):
        # torchdata saves how far each worker is, and what its dataset says of itself, but not the worker's random states.
        return _random_in_workers(loader) if _is_map_style(loader) else None
    if _by_number(loader) or _is_sequence(loader):
        return None
    if not _by_index(loader):
        own = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
        name = f"{name} over {type(loader.dataset).__name__}" if own else name
        return (
            f"{name} has no batch numbers to enter by: its batches are drawn again and dropped, which is exact only if they "
            "are a function of the random states; use torchdata's StatefulDataLoader, or give it a method batches(start)."
        )
    for sampler in (loader.sampler, loader.batch_sampler):
        if isinstance(sampler, Iterator):
            return (
                f"the sampler of {name} is an iterator ({type(sampler).__name__}), which another process cannot rewind to the "
                "beginning of an epoch; pass an object whose __iter__ begins anew."
            )
    if loader.num_workers == 0:
        return None
    workers = f"num_workers={loader.num_workers}"
    if not loader.in_order:
        return f"{workers} with in_order=False gives batches in the order in which workers finish; use in_order=True."
    if reason := _random_in_workers(loader):
        return reason
    if loader.persistent_workers:
        return (
            f"{workers} with persistent_workers=True draws the seed of its workers in its first epoch only, so that a new "
            "process draws one random number more; use persistent_workers=False."
        )
    return None


def _random_in_workers(loader: DataLoader[Any]) -> str | None:
    if loader.num_workers == 0 or (_keeps_state(loader) and _keeps_state(loader.dataset)) or not _draws_differ(loader):
        return None
    later = ", and that persistent_workers=True carries into later epochs" if loader.persistent_workers else ""
    return (
        f"num_workers={loader.num_workers} and the samples of {type(loader.dataset).__name__} are random, drawn from random "
        f"states of the workers that are not saved{later}; use num_workers=0, or make __getitem__ (and collate_fn) a function "
        "of the index, or use torchdata's StatefulDataLoader over a dataset whose state_dict holds a generator of its own."
    )


def _draws_differ(loader: DataLoader[Any]) -> bool:
    """Whether the same samples come out different under other random states, each of which is put back."""
    generators = loader_generators(loader)
    with preserve_rng(generators):
        try:
            draws = []
            for seed in range(8):
                _seed_all(seed, generators)
                before = RandomState(generators).state_dict()
                draws.append(_draw(loader))
                if not _equal(draws[0], draws[-1]):
                    return True
                # A flip of a coin may come out the same twice: more draws if there was one.
                if seed == 1 and _equal(before, RandomState(generators).state_dict()):
                    break
        except Exception:  # noqa: BLE001 - the dataset is the user's: what is wrong with it is seen where it is drawn in earnest
            return False
    return False


def _draw(loader: DataLoader[Any]) -> Any:
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:
        return loader.collate_fn(dataset[0])
    indices = list(range(min(2, len(dataset))))
    many = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(many(indices) if many else [dataset[i] for i in indices])


def _seed_all(seed: int, generators: list[Any]) -> None:
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds CUDA too, even later
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed)
    for generator in generators:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif hasattr(generator, "bit_generator"):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        else:
            generator.seed(seed)


def _equal(a: Any, b: Any) -> bool:
    """Equal bit by bit as far as one can look inside: not a number equals itself. What cannot be compared counts as equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.dtype, a.shape, a.layout) != (b.dtype, b.shape, b.layout):
            return False
        if a.layout != torch.strided:
            a, b = a.to_dense(), b.to_dense()
        return _equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in (a, b)))
    if hasattr(a, "tobytes") and hasattr(b, "tobytes"):  # arrays, images
        if getattr(getattr(a, "dtype", None), "hasobject", False):  # an array of addresses
            return _equal(a.tolist(), b.tolist())
        return type(a) is type(b) and bool(a.tobytes() == b.tobytes())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    by_address = not any("__eq__" in vars(kind) for kind in type(a).__mro__[:-1])  # `object` is the last
    if by_address and hasattr(a, "__dict__") and type(a) is type(b):
        return _equal(vars(a), vars(b))
    return by_address or bool(a != a and b != b) or not bool(a != b)
