"""Files that every node needs, models above all: found on the node, or shipped to it once.

A node looks in the same path, and then in the same place of its own cache of gatt, packages and
cache of the Hub. Only a file with the same hash counts.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import GattError
from pipeline.files import sha256, whole_file
from pipeline.folders import lock_file
from pipeline.gguf.reader import part_paths
from pipeline.system import cache_path, require_disk

CHUNK_BYTES = 1 << 26
"""Bytes of a file in one object of Ray's object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFile:
    """A file on the driver's disk, with the other parts of a split GGUF.

    `places` are pairs of a folder that nodes have, too, and the path in it. `sizes` are the bytes
    of each part, by name.
    """

    path: Path
    sha256: str
    places: tuple[tuple[str, str], ...]
    sizes: dict[str, int]

    @property
    def size(self) -> int:
        """Return the bytes of all parts."""
        return sum(self.sizes.values())

    def locate(self) -> Path | None:
        """Return where this machine has the file; None if it does not."""
        folders = _common_folders()
        candidates = [self.path, *(folders[name] / inside for name, inside in self.places)]
        for path in [*candidates, self._received]:
            if path.is_file() and sha256(path) == self.sha256:
                return path
        return None

    @property
    def _received(self) -> Path:
        return cache_path(f"cluster/{self.sha256[:16]}") / self.path.name

    def chunks(self) -> Iterator[bytes]:
        """Yield the contents of all parts, in pieces."""
        for name in self.sizes:
            with self.path.with_name(name).open("rb") as content:
                while chunk := content.read(CHUNK_BYTES):
                    yield chunk

    def receive(self, chunks: Iterable[bytes]) -> Path:
        """Write what `chunks` has yielded elsewhere to this machine's cache, once.

        Raises:
            GattError: too little disk space, or the file has changed while it was sent.
        """
        with lock_file(self._received.parent):
            if path := self.locate():  # another process may have received it in the meantime
                return path
            self._received.parent.mkdir(parents=True, exist_ok=True)
            require_disk(self._received.parent, self.size, f"receive {self.path.name}")
            content = iter(chunks)
            for name, size in self.sizes.items():
                with whole_file(self._received.with_name(name)) as draft, draft.open("wb") as file:
                    while file.tell() < size and (chunk := next(content, b"")):
                        file.write(chunk)
            if sha256(self._received) != self.sha256:
                self._received.unlink()
                raise GattError(
                    f"{self.path.name} has changed on the driver's disk while it was sent. Run the "
                    "same command again."
                )
        return self._received


def shared_file(path: Path) -> SharedFile:
    """Return a GGUF file as one that all nodes need."""
    path = path.absolute()
    return SharedFile(
        path=path,
        sha256=sha256(path),
        places=tuple(
            (name, path.relative_to(folder).as_posix())
            for name, folder in _common_folders().items()
            if path.is_relative_to(folder)
        ),
        sizes={part.name: part.stat().st_size for part in part_paths(path)},
    )


def _common_folders() -> dict[str, Path]:
    """Return the folders that machines have in common, whatever their paths are."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    return {
        "cache": cache_path("."),
        "packages": Path(sysconfig.get_path("purelib")),
        "hub": Path(os.environ.get("HF_HUB_CACHE") or home / "hub"),
    }
