"""The callbacks that ship with minitrain, and the history that they read."""

from minitrain.callbacks.checkpoint import Checkpoint
from minitrain.callbacks.diagnose import Diagnose
from minitrain.callbacks.findings import Finding
from minitrain.callbacks.history import History
from minitrain.callbacks.parameters import ParameterStats
from minitrain.callbacks.progress import Progress
from minitrain.callbacks.schedule import OneCycle
from minitrain.callbacks.stats import ActivationStats, GradientStats

__all__ = [
    "ActivationStats",
    "Checkpoint",
    "Diagnose",
    "Finding",
    "GradientStats",
    "History",
    "OneCycle",
    "ParameterStats",
    "Progress",
]
