"""`export_weights`: a model's weights as a safetensors file."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from minitrain.atomic import atomic_file
from minitrain.errors import CheckpointError
from minitrain.wrappers import inner


def export_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and persistent buffers of a model; tied weights are written once, as safetensors wants them.

    Args:
        model: The model; of a wrapped one (compiled, `DataParallel`) the model inside.
        path: Where to. A file that is there is replaced, whole or not at all.

    Raises:
        ImportError: `safetensors` is not installed.
        CheckpointError: The file cannot be written; what was there is left intact.
    """
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ImportError(
            "export_weights needs safetensors: python -m pip install 'minitrain[safetensors]'."
        ) from error
    tensors: dict[str, Any] = {}
    metadata = {"format": "pt"}
    seen: dict[Any, str] = {}
    for name, tensor in inner(model).state_dict().items():
        if not hasattr(tensor, "untyped_storage"):
            raise CheckpointError(
                f"path={str(path)!r}: {name!r} is a {type(tensor).__name__}, and such a file holds tensors only."
            )
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            metadata[name] = seen[place]  # as safetensors.torch.save_model does, so that its load_model finds it
        else:
            seen[place] = name
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    try:
        with atomic_file(path, durable=True) as file:
            file.write(safetensors.save(tensors, metadata))
    except OSError as error:
        raise CheckpointError(f"path={str(path)!r} cannot be written ({error.strerror or error})") from error
