"""The file of a checkpoint: written whole and durably or not at all, verified before it is read, free of code.

`python -m minitrain.checkpoint inspect FILE` prints what is inside one.
"""

from minitrain.checkpoint.describe import describe
from minitrain.checkpoint.format import FORMAT_VERSION, read, write
from minitrain.checkpoint.plain import plain

__all__ = ["FORMAT_VERSION", "describe", "plain", "read", "write"]
