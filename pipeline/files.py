"""Files that survive an interruption: JSON Lines logs, files written whole or not at all, hashes.

The paths of a run are in `run_dir`; the formats of single files are in their stages.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import GattError

T = TypeVar("T")

_READ_BYTES = 1 << 20


def json_line(record: object) -> str:
    """Return `record`, a dataclass or JSON data, as one line of JSON with its newline."""
    plain = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    return json.dumps(plain, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of a JSON Lines file; blank lines are skipped.

    Raises:
        GattError: a line is not JSON; the message names the file and the line.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise GattError(
                    f"{path}, line {number}: not a line of JSON ({error}). Correct or delete it."
                ) from error


class JsonlLog:
    """A JSON Lines file that grows by one flushed record at a time; `records` were read back.

    A process killed in the middle of a write leaves an incomplete line at the end. Opening the log
    cuts it off, so that at most this one record is lost.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[Any] = []
        self._file: BinaryIO = path.open("a+b")
        self._file.seek(0)
        complete_bytes = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self.records.append(json.loads(line))
            complete_bytes += len(line)
        self._file.truncate(complete_bytes)

    def append(self, record: object) -> None:
        """Write `record` and hand it to the operating system before returning."""
        self._file.write(json_line(record).encode())
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, renamed to `path` at the end.

    After an error the temporary file is removed instead, and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Write `value`, dataclasses or JSON data, as indented JSON; NaN becomes null."""
    write_text(path, json.dumps(_without_nan(value), indent=2, ensure_ascii=False) + "\n")


def _without_nan(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def read_json(path: Path, type_: type[T], stage: str) -> T:
    """Read JSON as a dataclass, or as a container of dataclasses.

    Raises:
        GattError: fields are missing, as in a file of another version; the message names the
            `stage` that writes the file.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(type_).validate_json(path.read_bytes())
    except ValidationError as error:
        raise GattError(
            f"{path} does not have the fields that this version of gatt reads "
            f"({error.error_count()} differ). Run `gatt {stage}` again."
        ) from error


def write_jsonl(path: Path, records: Iterable[object]) -> None:
    """Write `records` as JSON Lines, whole or not at all."""
    write_text(path, "".join(map(json_line, records)))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, or of a folder's files and their relative paths."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    status = path.stat()
    return _file_sha256(path, status.st_size, status.st_mtime_ns)


@cache
def _file_sha256(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Hash a file, once while its size and time of change stay the same.

    Every stage asks for the hash of the base model, which may have gigabytes.
    """
    digest = hashlib.sha256()
    with path.open("rb") as content:  # `hashlib.file_digest` needs Python 3.11
        while block := content.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
