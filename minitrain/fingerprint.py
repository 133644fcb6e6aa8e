"""`fingerprint`: by what a run is told from another one, so that none is resumed with other data or another seed unnoticed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from minitrain.batch import tensors_in
from minitrain.data import BatchLoader
from minitrain.passes import loader_length
from minitrain.peek import shuffles
from minitrain.version import __version__

if TYPE_CHECKING:
    from minitrain.learner import Learner

_ROWS, _BYTES = 1000, 2**22  # of a tensor, that are compared at most


def fingerprint(learn: Learner, lr: float | None) -> dict[str, Any]:
    """What must not change between a run and its continuation, beside the names and shapes of its tensors.

    Args:
        learn: The Learner.
        lr: What its fit was given.

    Returns:
        A nested dict of plain values: the loaders (kind, batches, samples, batch size, order, a checksum of the content where
        the tensors are at hand), seed, the learning rate of the fit.
    """
    return {
        "train": loader_facts(learn.dls.train),
        "valid": None if learn.dls.valid is None else loader_facts(learn.dls.valid),
        "seed": None if learn._seed is None else int(learn._seed),
        "lr": None if lr is None else float(lr),
    }


def versions(device: torch.device) -> dict[str, str]:
    """On what else the bits of a run depend, though it may go on elsewhere."""
    return {
        "minitrain": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device.type,
    }


def differences(saved: Any, present: Any, where: str = "") -> list[str]:
    """What differs between two fingerprints, a sentence each.

    Example:
        >>> differences({"seed": 1, "train": {"samples": 10}}, {"seed": 1, "train": {"samples": 12}})
        ['train.samples was 10, now it is 12']
    """
    if isinstance(saved, dict) and isinstance(present, dict):
        found: list[str] = []
        for key in [*saved, *(key for key in present if key not in saved)]:
            path = f"{where}.{key}" if where else str(key)
            found += differences(saved.get(key), present.get(key), path)
        return found
    if _same(saved, present):
        return []
    if where.endswith("content"):
        return [
            f"{where} has changed: the tensors are others. Are they drawn or shuffled without a seed, before the Learner?"
        ]
    return [f"{where} was {_brief(saved)}, now it is {_brief(present)}"]


def loader_facts(loader: Any) -> dict[str, Any]:
    """What can be told of a loader without drawing from it."""
    facts: dict[str, Any] = {"loader": type(loader).__name__, "batches": loader_length(loader)}
    if isinstance(loader, BatchLoader):
        facts |= {"samples": len(loader.tensors[0]), "seed": loader.seed, "content": checksum(loader.tensors)}
    elif isinstance(loader, DataLoader):
        dataset = loader.dataset
        facts |= {"dataset": type(dataset).__name__, "samples": loader_length(dataset)}
        if isinstance(dataset, TensorDataset):
            facts["content"] = checksum(dataset.tensors)
    elif isinstance(loader, Sequence) and len(loader):
        facts["content"] = checksum([*tensors_in(loader[0]), *tensors_in(loader[-1])])
    for name in ("batch_size", "drop_last"):
        value = getattr(loader, name, None)
        if value is None:
            value = getattr(getattr(loader, "batch_sampler", None), name, None)
        if isinstance(value, (bool, int)):
            facts[name] = int(value)
    return facts | {"shuffle": shuffles(loader)}


def checksum(tensors: Sequence[Tensor]) -> int:
    """A number that changes, in all likelihood, when one of up to 1000 evenly spaced rows of a tensor changes.

    Example:
        >>> x = torch.arange(6.0)
        >>> checksum([x]) == checksum([x.clone()]), checksum([x]) == checksum([x + 1])
        (True, False)
    """
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.numel() == 0:
            continue
        rows = tensor.detach().reshape(len(tensor), -1) if tensor.ndim else tensor.detach().reshape(1, 1)
        n = min(len(rows), _ROWS, max(2, _BYTES // (rows.shape[1] * rows.element_size())))
        picked = torch.linspace(0, len(rows) - 1, n, dtype=torch.float64).round().long()
        values = rows[picked.to(rows.device)].contiguous().cpu().view(torch.uint8).reshape(-1).long()
        # Whole numbers that wrap around: the same on every machine. Odd factors, so that no byte is lost.
        factors = torch.arange(values.numel()) * 2_654_435_761 * 2 + 1
        total = total * 6_364_136_223_846_793_005 + (values * factors).sum() + tensor.numel()
    return int(total)


def _same(a: Any, b: Any) -> bool:
    return bool(type(a) is type(b) and a == b)


def _brief(value: Any) -> str:
    return f"{value!r:.80}"
