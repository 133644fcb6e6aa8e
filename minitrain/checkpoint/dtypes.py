"""What a tensor in a checkpoint can be made of: the kinds of numbers, as `torch.save` names them."""

from __future__ import annotations

import torch

# The class of the storage tells the kind of number ...
STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

# ... but for the newer kinds, of which the storage is bytes, and the kind an argument.
_NEWER = (
    *("uint16", "uint32", "uint64", "complex32", "bcomplex32"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
)
NEWER: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NEWER if hasattr(torch, name)}

DTYPES = frozenset({*STORAGES.values(), *NEWER.values()})
