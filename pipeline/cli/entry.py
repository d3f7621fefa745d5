"""Run the command line; turn a user's mistake into one line."""

from __future__ import annotations

import sys

from pipeline.cli import stages, tools
from pipeline.cli.app import app
from pipeline.errors import GattError

__all__ = ["app", "main", "stages", "tools"]

_EXTRAS = {
    "train": ("unsloth", "trl", "peft", "accelerate", "bitsandbytes"),
    "serve": ("fastapi", "uvicorn", "nicegui", "prometheus_client"),
}
"""Optional dependencies: the packages that each extra of pyproject.toml brings."""


def main() -> None:
    """Run the command line.

    A user's mistake is one line on stderr and exit status 1; anything else is a bug and keeps its
    traceback.
    """
    try:
        app()
    except GattError as error:
        sys.exit(f"gatt: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        extras = [extra for extra, names in _EXTRAS.items() if error.name in names]
        if not extras:
            raise
        sys.exit(f"gatt: {error.name} is not installed. `pip install 'gatt[{extras[0]}]'` adds it.")
    except MemoryError:
        sys.exit("gatt: Out of memory. Close other programs, or choose a smaller model.")
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            where = error.filename or "while writing"
            sys.exit(
                f"gatt: the disk is full ({where}). Free space and run the same command again."
            )
        raise
