"""`peek`: the batches that training would see first, drawn without moving its stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.sampler import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from minitrain.data import BatchLoader
from minitrain.errors import DataError, InitError
from minitrain.preserve import loader_generators
from minitrain.random_states import RandomState


def shuffles(loader: Any) -> bool:
    """Whether a loader is known to give its samples in random order."""
    if isinstance(loader, BatchLoader):
        return loader.shuffle
    if not isinstance(loader, DataLoader):
        return False
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
    return any(isinstance(s, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)) for s in samplers)


def peek(loader: Any) -> Iterable[Any]:
    """The batches that training would see first, drawn without moving its stream.

    They are taken in this process, whatever the loader's number of workers, by its batch sampler, dataset and collate
    function. All random states lie where they were after each draw, and other random numbers may be drawn in between.

    Args:
        loader: A sequence of batches, a `BatchLoader`, or a `DataLoader` over a map-style dataset.

    Returns:
        An iterable that begins anew each time; it raises `DataError` if the loader has no batch.

    Raises:
        InitError: The loader cannot be drawn from without moving it.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=4, shuffle=True)
        >>> seen = [next(iter(peek(loader))) for _ in range(2)]
        >>> seen[0][0].equal(seen[1][0]) and seen[0][0].equal(next(iter(loader))[0])
        True
    """
    if isinstance(loader, DataLoader):
        stateless = not any(isinstance(s, Iterator) for s in (loader.sampler, loader.batch_sampler))
        untouched = type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)
        if stateless and untouched:
            return _Peek(loader, _in_this_process)
    elif isinstance(loader, (BatchLoader, Sequence)):
        return _Peek(loader, _in_order)
    raise InitError(
        f"cannot draw a batch for initialisation from {type(loader).__name__} without moving its stream; pass the data: "
        "LSUV(data=...)."
    )


class _Peek:
    """The batches of `begin(loader)`, drawn on a timeline of random states of their own."""

    def __init__(self, loader: Any, begin: Callable[[Any], Iterator[Any]]) -> None:
        self._loader, self._begin = loader, begin

    def __iter__(self) -> Iterator[Any]:
        generators = loader_generators(self._loader)
        return self._draw(generators, RandomState(generators))

    def _draw(self, generators: list[Any], timeline: RandomState) -> Iterator[Any]:
        batches, n_drawn = self._begin(self._loader), 0
        while True:
            present = RandomState(generators)
            timeline.restore()
            try:
                batch = next(batches)
            except StopIteration:
                break
            finally:
                timeline = RandomState(generators)
                present.restore()
            n_drawn += 1
            yield batch
        if n_drawn == 0:
            name = type(self._loader).__name__
            raise DataError(f"the loader ({name}) has no batch. drop_last=True with fewer samples than a batch?")


def _in_order(loader: Iterable[Any]) -> Iterator[Any]:
    yield from loader  # a generator: its iter() too is drawn on the timeline


def _in_this_process(loader: DataLoader[Any]) -> Iterator[Any]:
    """What iterating a map-style DataLoader gives, in the same order under the same random state."""
    dataset: Any = loader.dataset
    indices = iter(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)  # the workers' seed, which iter() draws here
    for index in indices:
        if loader.batch_sampler is None:
            yield loader.collate_fn(dataset[index])
        elif getattr(dataset, "__getitems__", None):
            yield loader.collate_fn(dataset.__getitems__(index))
        else:
            yield loader.collate_fn([dataset[i] for i in index])
