"""Data: `DataLoaders`, and `BatchLoader`, which slices whole batches out of tensors in memory."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from minitrain.batch import describe_batch


class DataLoaders:
    """The training and the validation loader of a run: any iterables of batches.

    Args:
        train: The training loader.
        valid: The validation loader, or None.

    Raises:
        TypeError: An argument is no loader (a dataset, a tensor, a class).

    Example:
        >>> x, y = torch.randn(6, 2), torch.zeros(6)
        >>> DataLoaders(BatchLoader(x, y, batch_size=3), valid=[(x, y)])
        DataLoaders(train=BatchLoader of 2 batches, valid=list of 1 batches)
    """

    def __init__(self, train: Iterable[Any], valid: Iterable[Any] | None = None) -> None:
        check_loader("train", train)
        if valid is not None:
            check_loader("valid", valid)
        self.train, self.valid = train, valid

    @classmethod
    def from_dataset(
        cls,
        train: Any,
        valid: Any = None,
        *,
        batch_size: int = 64,
        valid_batch_size: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        transform: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
        **loader_options: Any,
    ) -> DataLoaders:
        """Loaders from map-style datasets, by the fastest way that gives what the dataset gives.

        Where the tensors are at hand (a `TensorDataset`; an image dataset of torchvision that is held in memory and has no
        transform of its own; a `Subset` of these) they become `BatchLoader`s; all else becomes torch `DataLoader`s, with a
        generator of their own, so that shuffling leaves the global random state alone.

        The images of a torchvision dataset stay uint8 until a batch is made; then they are float32 in [0, 1] of shape
        (batch, channels, height, width), as its `ToTensor` makes them, and the targets are int64. The tensors of a
        `TensorDataset` are given as they are.

        Args:
            train: The training set.
            valid: The validation set, or None. It is never shuffled, and no batch of it is dropped.
            batch_size: Samples in a batch.
            valid_batch_size: The same for validation. None: as for training.
            shuffle: Draw the training samples in random order.
            drop_last: Leave out a last training batch that is smaller.
            seed: Of the random order.
            transform: Called with the tensors of a batch, returns the batch, in training and validation; it replaces the
                scaling of images. Only for datasets whose tensors are at hand.
            device: Where to keep those tensors.
            loader_options: For torch's `DataLoader` (`num_workers`, `collate_fn`, ...), which is then used in any case. A
                `sampler`, `batch_sampler` or `generator` is for the training samples only, and gives their order.

        Raises:
            TypeError: `train` or `valid` is no map-style dataset, or an argument of the wrong type.
            ValueError: A dataset is empty, or there would be no batch, or `transform` or `device` is given for a dataset
                whose tensors are not at hand.

        Example:
            >>> data = TensorDataset(torch.randn(10, 3), torch.zeros(10))
            >>> DataLoaders.from_dataset(data, batch_size=4)
            DataLoaders(train=BatchLoader of 3 batches, valid=None)
        """

        def build(name: str, dataset: Any, batch_size: int, shuffle: bool, drop_last: bool) -> Iterable[Any]:
            _check_dataset(name, dataset)
            _check_order(len(dataset), batch_size, shuffle, drop_last, seed)
            found = None if loader_options else _tensors_of(dataset)
            order: dict[str, Any] = {"batch_size": batch_size, "shuffle": shuffle, "drop_last": drop_last}
            own = {key: value for key, value in loader_options.items() if name == "train" or key not in _OF_TRAINING}
            if "sampler" in own or "batch_sampler" in own:  # the order is theirs
                order = {} if "batch_sampler" in own else order | {"shuffle": False}
            if found is not None:
                make = found[1] if transform is None else transform
                return BatchLoader(*found[0], seed=seed, transform=make, device=device, **order)
            for option, value in (("transform", transform), ("device", device)):
                if value is not None:
                    raise ValueError(
                        f"{option}=... is for batches made from tensors, but {name}={type(dataset).__name__} is read sample by "
                        f"sample by a DataLoader ({loader_options=}): leave it out, or use DataLoaders(BatchLoader(x, y))."
                    )
            return DataLoader(dataset, **{"generator": torch.Generator().manual_seed(_mix(seed, 0)), **order, **own})

        if valid_batch_size is None:
            valid_batch_size = batch_size
        _check_int("valid_batch_size", valid_batch_size, least=1)
        train = build("train", train, batch_size, shuffle, drop_last)
        return cls(train, None if valid is None else build("valid", valid, valid_batch_size, False, False))

    def __repr__(self) -> str:
        return f"DataLoaders(train={_describe_loader(self.train)}, valid={_describe_loader(self.valid)})"


class BatchLoader:
    """Whole batches, sliced out of tensors in memory; the order is a pure function of (seed, epoch).

    Iterating again without `set_epoch` (which the Learner calls) gives the same batches in the same order. The global random
    state is neither read nor moved, and a batch never shares memory with the tensors.

    Args:
        tensors: At least one; all with the same leading dimension. One tensor: batches are bare tensors. Several: tuples.
        batch_size: Samples in a batch.
        shuffle: Draw the samples in a random order, another one each epoch.
        drop_last: Leave out a last batch that is smaller.
        seed: Of the random order.
        transform: Called with the tensors of a batch, returns the batch: here uint8 images become floats.
        device: Where to keep the tensors; they are moved there once. None: where they are.

    Attributes:
        epoch: Whose order the next iteration has; set it by `set_epoch`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: The tensors are empty or of different lengths, or there would be no batch.

    Example:
        >>> loader = BatchLoader(torch.arange(5), torch.arange(5) * 10, batch_size=2)
        >>> len(loader), [len(y) for x, y in loader]
        (3, [2, 2, 1])
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int = 64,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        transform: Callable[..., Any] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not tensors:
            raise TypeError("BatchLoader() got no tensors, wanted BatchLoader(x, y, batch_size=64).")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"tensors[{i}] is a {type(tensor).__name__}, wanted a tensor: torch.as_tensor(...).")
            if tensor.dim() == 0:
                raise ValueError(f"tensors[{i}] has no dimension, wanted the samples along the first one.")
        if len({len(tensor) for tensor in tensors}) > 1:
            lengths = ", ".join(f"len(tensors[{i}])={len(tensor)}" for i, tensor in enumerate(tensors))
            raise ValueError(
                f"the tensors have different lengths: {lengths}. Each sample needs an entry in each of them."
            )
        if transform is not None and not callable(transform):
            raise TypeError(f"transform={transform!r} (type={type(transform).__name__}) is not callable.")
        if len(tensors[0]) == 0:
            raise ValueError(f"the tensors are empty: {describe_batch(tensors)}. Give at least one sample.")
        _check_order(len(tensors[0]), batch_size, shuffle, drop_last, seed)
        self.tensors = tensors if device is None else tuple(tensor.to(device) for tensor in tensors)
        self.batch_size, self.shuffle, self.drop_last, self.seed = batch_size, shuffle, drop_last, seed
        self.transform = transform
        self.epoch = 0

    def __len__(self) -> int:
        n = len(self.tensors[0])
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order: that of epoch `epoch`, counted from 0."""
        _check_int("epoch", epoch, least=0)
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def batches(self, start: int = 0) -> Iterator[Any]:
        """The batches of this epoch from number `start` on; those before it are skipped by index, never fetched.

        Args:
            start: From 0 to the number of batches, at which nothing is left.
        """
        _check_int("start", start, least=0)
        if start > len(self):
            raise ValueError(f"start={start!r}, but an epoch has {len(self)} batches.")
        if not self.shuffle:
            return self._make(start, None)
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        return self._make(start, torch.randperm(len(self.tensors[0]), generator=generator))

    def _make(self, start: int, order: Tensor | None) -> Iterator[Any]:
        if order is not None:  # moved once, not batch by batch
            orders = {device: order.to(device) for device in {tensor.device for tensor in self.tensors}}
        for i in range(start, len(self)):
            part = slice(i * self.batch_size, (i + 1) * self.batch_size)
            batch = tuple(
                t[part].clone() if order is None else t.index_select(0, orders[t.device][part]) for t in self.tensors
            )
            if self.transform is not None:
                yield self.transform(*batch)
            else:
                yield batch if len(batch) > 1 else batch[0]

    def __repr__(self) -> str:
        order = f"batch_size={self.batch_size}, shuffle={self.shuffle}, drop_last={self.drop_last}, seed={self.seed}"
        return f"BatchLoader({', '.join(map(describe_batch, self.tensors))}, {order})"


def _mix(seed: int, epoch: int) -> int:
    """A seed for (seed, epoch) that does not collide as seed + epoch does."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "big") >> 1


# -- datasets ---------------------------------------------------------------------------------------------------------

# The datasets of torchvision whose samples are (image of data[i], targets[i]) and nothing else, by the method that says so:
# it serves their subclasses too (FashionMNIST, CIFAR100), but not one that makes its samples in another way.
_IN_MEMORY = frozenset(f"{name}.__getitem__" for name in ("MNIST", "CIFAR10", "SVHN", "STL10", "USPS", "SEMEION"))


def _tensors_of(dataset: Any) -> tuple[tuple[Tensor, ...], Callable[..., Any] | None] | None:
    """The tensors behind a dataset and what makes a batch of them, or None where they are not at hand."""
    if type(dataset) is Subset:
        found = _tensors_of(dataset.dataset)
        indices = torch.as_tensor(dataset.indices, dtype=torch.int64)
        return None if found is None else (tuple(t[indices.to(t.device)] for t in found[0]), found[1])
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    getitem = getattr(type(dataset), "__getitem__", None)
    if not str(getattr(getitem, "__module__", "")).startswith("torchvision.datasets."):
        return None
    own = [getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms")]
    if getattr(getitem, "__qualname__", "") not in _IN_MEMORY or any(transform is not None for transform in own):
        return None
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if targets is None:
        return None
    images, targets = torch.as_tensor(dataset.data), torch.as_tensor(targets, dtype=torch.int64)
    if images.dtype != torch.uint8 or images.dim() not in (3, 4) or not len(images) == len(targets) == len(dataset):
        return None
    if images.dim() == 3:
        images = images.unsqueeze(1)  # (N, H, W) -> (N, 1, H, W)
    elif images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    return (images.contiguous(), targets), _scale_images


def _scale_images(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.float().div_(255), y


_OF_TRAINING = ("sampler", "batch_sampler", "generator")  # loader options that make no sense for two datasets


# -- arguments --------------------------------------------------------------------------------------------------------


def _describe_loader(loader: Any) -> str:
    try:
        return f"{type(loader).__name__} of {len(loader)} batches"
    except TypeError:  # a generator, or None
        return "None" if loader is None else type(loader).__name__


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted an integer >= {least}.")
    if value < least:
        raise ValueError(f"{name}={value!r}, wanted an integer >= {least}.")


def _check_order(n: int, batch_size: Any, shuffle: Any, drop_last: Any, seed: Any) -> None:
    """That `n` samples give at least one batch, in an order that can be made."""
    _check_int("batch_size", batch_size, least=1)
    _check_int("seed", seed, least=0)
    for name, value in (("shuffle", shuffle), ("drop_last", drop_last)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} (type={type(value).__name__}), wanted True or False.")
    if drop_last and n < batch_size:
        raise ValueError(
            f"drop_last=True with {n} samples gives no batch of batch_size={batch_size}. Use a smaller batch_size, or "
            "drop_last=False."
        )


def check_loader(name: str, loader: Any) -> None:
    """Raise `TypeError` unless `loader` is an iterable of batches."""
    got = describe_batch(loader)
    if inspect.isclass(loader):
        got, remedy = f"class {loader.__name__}", "did you forget ()?"
    elif isinstance(loader, IterableDataset):
        remedy = "make a torch DataLoader of this dataset."
    elif isinstance(loader, Dataset):
        remedy = "of a dataset make them by DataLoaders.from_dataset(...) or a torch DataLoader."
    elif isinstance(loader, (str, bytes, Mapping)) or hasattr(loader, "__array__") or not isinstance(loader, Iterable):
        remedy = "for example BatchLoader(x, y), or a torch DataLoader."
    else:
        return
    raise TypeError(f"{name}={got}, wanted an iterable of batches: {remedy}")


def _check_dataset(name: str, dataset: Any) -> None:
    got = describe_batch(dataset)
    is_map = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if inspect.isclass(dataset):
        got, remedy = f"class {dataset.__name__}", "did you forget ()?"
    elif isinstance(dataset, (DataLoader, BatchLoader)):
        remedy = "this is a loader already, use DataLoaders(train, valid)."
    elif isinstance(dataset, IterableDataset):
        remedy = "of an iterable one make a torch DataLoader, and use DataLoaders(train, valid)."
    elif not is_map or isinstance(dataset, (str, bytes, Mapping)) or hasattr(dataset, "__array__"):
        remedy = "of tensors make TensorDataset(x, y)."
    elif len(dataset) == 0:
        raise ValueError(f"{name}={type(dataset).__name__} is empty, wanted at least one sample.")
    else:
        return
    raise TypeError(f"{name}={got}, wanted a map-style dataset (with __getitem__ and __len__): {remedy}")
