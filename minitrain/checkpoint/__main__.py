"""`python -m minitrain.checkpoint inspect FILE [FILE ...]`: what is inside a checkpoint, without building a model."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from minitrain.checkpoint import describe
from minitrain.errors import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the files hold.

    Returns:
        0, or 1 where a file could not be read: then the others are printed still.
    """
    parser = argparse.ArgumentParser(prog="python -m minitrain.checkpoint", description="Look into checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print what is inside, without building a model")
    inspect.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may know fewer letters than a file has
        sys.stdout.reconfigure(errors="backslashreplace")
    failed = 0
    for path in parser.parse_args(arguments).files:
        try:
            sys.stdout.write(describe(path) + "\n")
        except CheckpointError as error:
            sys.stderr.write(f"{error}\n")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
