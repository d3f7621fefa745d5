"""Files that survive a cut: JSON Lines that are appended to, files that appear whole or not at all, hashes.

Not for paths of a run (`run_dir`) nor for the formats of single stages.
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
from typing import IO, Any

from pipeline.errors import GattError


def json_line(record: Any) -> str:
    """`record` (a dataclass or plain data) as one line of JSON with its newline."""
    plain = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    return json.dumps(plain, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of a JSON Lines file; blank lines are passed over.

    Raises:
        GattError: a line is not JSON; the message names file and line.
    """
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                yield number, json.loads(raw)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                raise GattError(
                    f"{path}, line {number}: not a line of JSON ({error}). Correct or delete it."
                ) from error


class JsonlLog:
    """A JSON Lines file that grows by one flushed record at a time; what was read back is whole.

    A process killed in the middle of a write leaves half a line at the end. Opening the log cuts it off, so at most
    the record in hand is lost.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[Any] = []
        self._file: IO[bytes] = path.open("a+b")
        self._file.seek(0)
        whole = 0
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            self.records.append(json.loads(raw))
            whole += len(raw)
        self._file.truncate(whole)

    def append(self, record: Any) -> None:
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
    """Give a temporary name beside `path`; on leaving without an error it becomes `path`, else it is removed."""
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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; a number that is none (nan) as null."""
    write_text(path, json.dumps(_without_nan(value), indent=2, ensure_ascii=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write `records` as JSON Lines, whole or not at all."""
    write_text(path, "".join(map(json_line, records)))


def sha256(path: Path) -> str:
    """The hash of a file's content, or of a folder's files with their relative names."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    state = path.stat()
    return _file_hash(path, state.st_size, state.st_mtime_ns)


@cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once per state of it: a base may have gigabytes, and every stage asks for it."""
    digest = hashlib.sha256()
    with path.open("rb") as content:  # `hashlib.file_digest` exists from Python 3.11 on
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
