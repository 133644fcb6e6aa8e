"""The callbacks that ship with minitrain, and the history that they read."""

from minitrain.callbacks.history import History
from minitrain.callbacks.progress import Progress
from minitrain.callbacks.schedule import OneCycle
from minitrain.callbacks.stats import ActivationStats

__all__ = ["ActivationStats", "History", "OneCycle", "Progress"]
