"""Run the command line; turn a user's mistake into one line."""

from __future__ import annotations

import errno
import os
import sys
import warnings

from pipeline.cli import stages, tools
from pipeline.cli.app import app
from pipeline.console import tolerate_encodings
from pipeline.errors import GattError
from pipeline.gpu import allocator_settings
from pipeline.system import use_writable_cache

__all__ = ["app", "main", "stages", "tools"]

_EXTRAS = {
    "train": ("trl", "peft", "accelerate", "bitsandbytes"),
    "serve": ("fastapi", "uvicorn", "nicegui", "prometheus_client"),
    "cluster": ("ray",),
    "inspect": ("inspect_ai",),
}
"""Optional dependencies: the packages that each extra of pyproject.toml brings."""
_OF_THE_USER = {
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EIO, errno.ENOTEMPTY),
}
"""Errors that name a path which the user has chosen."""


def main() -> None:
    """Run the command line.

    A user's mistake is one line on stderr and exit status 1; anything else is a bug and keeps its
    traceback.
    """
    os.environ.update(allocator_settings())  # has to be there before PyTorch is imported
    # `pytorch_problem` says it in one line, with what to do.
    warnings.filterwarnings("ignore", message="CUDA initialization")
    tolerate_encodings()
    try:
        use_writable_cache()  # before the Hub's libraries are imported
        app()
    except GattError as error:
        sys.exit(f"gatt: {' '.join(str(error).split())}")
    except ModuleNotFoundError as error:
        if error.name == "unsloth":  # no extra brings it to a machine without a GPU
            sys.exit("gatt: unsloth is not installed. `python3 scripts/demo.py` installs it.")
        extras = [extra for extra, names in _EXTRAS.items() if error.name in names]
        if not extras:
            raise
        sys.exit(f"gatt: {error.name} is not installed. `pip install 'gatt[{extras[0]}]'` adds it.")
    except MemoryError:
        sys.exit("gatt: Out of memory. Close other programs, or choose a smaller model.")
    except Exception as error:
        if message := _explain(error):
            sys.exit(f"gatt: {message}")
        raise


def _explain(error: BaseException) -> str:
    """Return what a failed access to a file means to the user; "" if the error is a bug.

    Libraries raise errors of their own about a full disk.
    """
    cause: BaseException | None = error
    while cause:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(cause):
            where = getattr(cause, "filename", None) or "while writing"
            return f"the disk is full ({where}). Free space and run the same command again."
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_USER:
        return (
            f"Cannot use {error.filename}: {error.strerror}. Check the path and its "
            "permissions, or choose another."
        )
    return ""
