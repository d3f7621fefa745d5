"""Where training in a cluster keeps its checkpoints: a place that all machines see."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GattError
from pipeline.files import write_json

if TYPE_CHECKING:
    import pyarrow.fs

_RECORD = "ray.json"
_DEFAULT = "ray"
"""The record and the default place, both in the folder of a run's checkpoints."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A folder on a file system of pyarrow, and the name of a run in it."""

    filesystem: pyarrow.fs.FileSystem
    folder: str
    name: str

    @property
    def path(self) -> str:
        """Return the path of the run's checkpoints on the file system."""
        return f"{self.folder}/{self.name}"


def open_storage(place: str, name: str) -> Storage:
    """Return the storage at a path or a URL, such as s3://bucket/folder, of pyarrow or fsspec.

    Raises:
        GattError: no such kind of storage, or a package for it is missing.
    """
    import pyarrow
    import pyarrow.fs

    if "://" not in place:
        return Storage(pyarrow.fs.LocalFileSystem(), _absolute(place), name)
    try:
        filesystem, folder = pyarrow.fs.FileSystem.from_uri(place)
        return Storage(filesystem, folder, name)
    except (pyarrow.ArrowException, OSError):  # not one of pyarrow's own
        import fsspec

        try:
            other, folder = fsspec.core.url_to_fs(place)
        except (ValueError, ImportError) as error:
            raise GattError(
                f"--storage {place}: {error}. Expected a folder that all nodes see, or a URL of "
                "pyarrow or fsspec such as s3://bucket/folder."
            ) from error
        wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(other))
        return Storage(wrapped, folder, name)


def choose_storage(checkpoints: Path, place: str) -> Storage:
    """Return the storage of a run: what it began with, or else `place`; "" is its own folder.

    Args:
        checkpoints: the folder of the run's checkpoints, which keeps the record.
        place: what the user has named, if anything.

    Raises:
        GattError: it began with another one, nothing can be written there, or as `open_storage`.
    """
    record = checkpoints / _RECORD
    place = _absolute(place)
    if record.is_file():
        saved: dict[str, str] = json.loads(record.read_text(encoding="utf-8"))
        if place and place != _absolute(saved["place"]):
            present = saved["place"] or str(checkpoints / _DEFAULT)
            raise GattError(
                f"--storage {place}: this training keeps its checkpoints in {present}. Leave"
                " --storage out to continue from there, or start over with `gatt train --restart`."
            )
        return open_storage(saved["place"] or str(checkpoints / _DEFAULT), saved["name"])
    name = f"gatt-{uuid.uuid4().hex[:12]}"
    storage = open_storage(place or str(checkpoints / _DEFAULT), name)
    try:
        storage.filesystem.create_dir(storage.path, recursive=True)
    except OSError as error:
        raise unusable(storage, error) from error
    write_json(record, {"place": place, "name": name})
    return storage


def _absolute(place: str) -> str:
    """Return a place as it is named from any folder; "" and URLs stay."""
    if not place or "://" in place:
        return place
    return str(Path(place).expanduser().absolute())


def unusable(storage: Storage, error: OSError) -> GattError:
    """Return what a user is told about storage that cannot be written."""
    return GattError(
        f"Checkpoints cannot be written to {storage.folder} ({error}). Name another place with "
        "--storage: a folder that all nodes see, or a URL such as s3://bucket/folder."
    )


def is_used(checkpoints: Path) -> bool:
    """Return whether training began in a cluster, where its checkpoints may be elsewhere."""
    return (checkpoints / _RECORD).is_file()
