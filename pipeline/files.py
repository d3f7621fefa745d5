"""Files that survive an interruption: JSON Lines logs, files written whole or not at all, hashes.

The paths of a run are in `run_dir`; the formats of single files are in their stages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import GattError
from pipeline.system import cache_path

T = TypeVar("T")

_READ_BYTES = 1 << 20
_LARGE_BYTES = 1 << 26
"""Size from which a file's hash is kept in the cache folder."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPLIT_GGUF = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def json_line(record: object) -> str:
    """Return `record`, a dataclass or JSON data, as one line of JSON with its newline.

    An empty field of a dataclass whose metadata are `records.OMIT_EMPTY` is left out.
    """
    plain = record
    if is_dataclass(record) and not isinstance(record, type):
        optional = {field.name for field in fields(record) if field.metadata.get("omit_empty")}
        plain = {k: v for k, v in asdict(record).items() if v or k not in optional}
    line = json.dumps(plain, ensure_ascii=False, separators=(", ", ": ")) + "\n"
    return without_surrogates(line)


def without_surrogates(text: str) -> str:
    """Return `text` with U+FFFD for halves of surrogate pairs, which UTF-8 cannot hold.

    They come out of JSON such as "\\ud83d", where somebody has cut an emoji in two.
    """
    return _SURROGATE.sub("\ufffd", text)


def decode_text(content: bytes, path: Path) -> str:
    """Decode a text that a user has written: UTF-8, or UTF-16 or 32, with or without a BOM.

    Raises:
        GattError: it is in another encoding; the message names the file and the line.
    """
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise not_utf8(path, line) from error


def not_utf8(path: Path, line: int) -> GattError:
    """Return the error about a file in another encoding."""
    return GattError(
        f"{path}, line {line}: not UTF-8. Save the file as UTF-8; if it is Latin-1, with `iconv -f "
        "latin1 -t utf-8`."
    )


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
            except (ValueError, RecursionError) as error:  # ValueError: UnicodeDecodeError, too
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
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                self.records.append(json.loads(line))
            except ValueError as error:
                raise GattError(
                    f"{path}, line {number}: not a line of JSON ({error}). Delete it, and what it "
                    "held is made again."
                ) from error
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
        with draft.open("r+b") as written:  # fsync needs it on Windows
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as draft:
        draft.write_text(without_surrogates(text), encoding="utf-8", newline="\n")


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
    """Return the SHA-256 of a file's content, or of a folder's files and their relative paths.

    Hidden files do not count: file managers and download tools leave them. The first part of a
    split GGUF stands for all of its parts.
    """
    if path.is_dir():
        paths = {p.relative_to(path): p for p in sorted(path.rglob("*")) if p.is_file()}
        files = {
            relative: file
            for relative, file in paths.items()
            if not any(part.startswith(".") for part in relative.parts)
        }
    else:
        files = {part.relative_to(path.parent): part for part in _parts(path)}
        if len(files) == 1:
            return _file_sha256(path)
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(os.fsencode(name.as_posix()) + f"\0{_file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _parts(path: Path) -> list[Path]:
    """Return the parts of a split GGUF that are there, or the file itself."""
    match = _SPLIT_GGUF.fullmatch(path.name)
    if not match:
        return [path]
    stem, count = match["stem"], int(match["count"])
    names = [f"{stem}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    return [part for part in map(path.with_name, names) if part.is_file()]


def _file_sha256(path: Path) -> str:
    """Hash a file; a large one only once while its size and times of change stay the same.

    Every stage asks for the hash of the base model, which may have gigabytes.
    """
    status = path.stat()
    if status.st_size < _LARGE_BYTES:
        return _computed_sha256(path)
    identity = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()
    return _cached_sha256(path, cache_path(f"hashes/{key}"))


@cache
def _cached_sha256(path: Path, cached: Path) -> str:
    with contextlib.suppress(OSError):
        if len(digest := cached.read_text(encoding="ascii")) == hashlib.sha256().digest_size * 2:
            return digest
    digest = _computed_sha256(path)
    with contextlib.suppress(OSError):  # it is only slower without
        write_text(cached, digest)
    return digest


def _computed_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as content:  # `hashlib.file_digest` needs Python 3.11
        while block := content.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
