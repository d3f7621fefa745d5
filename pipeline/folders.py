"""Folders that processes share: created with a clear error, and locked while one writes in them.

A lock is the operating system's, so that of a process that was killed is free at once. Beside it
stands who holds it, for the message to others.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.files import write_json

if TYPE_CHECKING:
    from filelock import BaseFileLock


def create_folder(folder: Path, option: str) -> None:
    """Create a folder for output, and check that it can be written.

    Raises:
        GattError: it cannot; the message names the `option` that chooses another.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise GattError(
            f"Cannot write in the folder {folder} ({error.strerror}). Choose another with {option}."
        ) from error


@contextmanager
def lock_folder(folder: Path, option: str) -> Iterator[None]:
    """Hold the lock of a folder for output, which is created, until the block ends.

    Raises:
        GattError: another process holds it, or the folder cannot be written.
    """
    import filelock

    create_folder(folder, option)
    lock, holder = filelock.FileLock(folder / ".lock"), folder / ".lock.json"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise GattError(
            f"{_describe(holder)} is working in {folder}. Wait for it, or choose another folder "
            f"with {option}."
        ) from error
    except OSError as error:
        raise GattError(
            f"Cannot write in the folder {folder} ({error.strerror}). Choose another with {option}."
        ) from error
    with _held(lock, holder):
        yield


@contextmanager
def lock_file(target: Path) -> Iterator[None]:
    """Hold the lock of a file, or folder, that any process may make; wait while another does.

    What the block needs to make may be there by then.
    """
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = (
        filelock.FileLock(target.with_name(f".{target.name}.lock")),
        target.with_name(f".{target.name}.lock.json"),
    )
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"{_describe(holder)} is making {target.name}; waiting for it.")
        lock.acquire()
    with _held(lock, holder):
        yield


@contextmanager
def _held(lock: BaseFileLock, holder: Path) -> Iterator[None]:
    """Record this process in the file `holder` until the block ends, then release the lock."""
    try:
        write_json(
            holder,
            {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")},
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe(holder: Path) -> str:
    """Return who holds a lock: "Another gatt (process 7 on host, since 2026-01-31 12:00:00)"."""
    try:
        process = json.loads(holder.read_text(encoding="utf-8"))
        return (
            f"Another gatt (process {process['pid']} on {process['host']}, since "
            f"{process['since']})"
        )
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or just ended
        return "Another gatt"
