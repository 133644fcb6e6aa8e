"""minitrain: a small training framework for PyTorch.

The names that a training script needs are here; `minitrain.callbacks`, `minitrain.metrics` and `minitrain.plot` hold the
rest.
"""

from minitrain.callback import EVENTS, Callback
from minitrain.captured import capture
from minitrain.data import BatchLoader, DataLoaders
from minitrain.errors import (
    CancelBatch,
    CancelEpoch,
    CancelFit,
    CancelStep,
    CancelTrain,
    CancelValidate,
    CheckpointError,
    DataError,
    InitError,
    LoopError,
    MinitrainError,
)
from minitrain.hooks import Hooks
from minitrain.init import (
    LSUV,
    InitReport,
    InitStage,
    KaimingNormal,
    LSUVReport,
    Orthogonal,
    XavierNormal,
    Zero,
    layer_stats,
    lsuv_,
)
from minitrain.learner import Learner
from minitrain.version import __version__ as __version__

__all__ = [
    "EVENTS",
    "LSUV",
    "BatchLoader",
    "Callback",
    "CancelBatch",
    "CancelEpoch",
    "CancelFit",
    "CancelStep",
    "CancelTrain",
    "CancelValidate",
    "CheckpointError",
    "DataError",
    "DataLoaders",
    "Hooks",
    "InitError",
    "InitReport",
    "InitStage",
    "KaimingNormal",
    "LSUVReport",
    "Learner",
    "LoopError",
    "MinitrainError",
    "Orthogonal",
    "XavierNormal",
    "Zero",
    "capture",
    "layer_stats",
    "lsuv_",
]
