"""Read and check a GGUF file, because llama.cpp may abort the process on a damaged one.

Format: the GGUF specification of ggml (magic, version, key-values, tensor infos, aligned data).
`gguf.GGUFReader` takes seconds for a vocabulary, this reader a tenth of a second.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Bytes

_NUMBERS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", 10))
"""`struct` formats by the specification's numbers of value types; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""How llama.cpp names the parts of a split model (`llama_split_path`)."""
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
_NAMED_TEMPLATE = "tokenizer.chat_template."
_POINTER = b"version https://git-lfs"


class Field(NamedTuple):
    """A key's value, its type, and the type of an array's items (the specification's numbers)."""

    value: Any
    kind: int
    items: int | None = None


class StoredTensor(NamedTuple):
    """A tensor in the mapped file: `data` (rows, bytes) of the ggml type `kind`; `shape` as in
    PyTorch.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    data: Bytes


class _TensorInfo(NamedTuple):
    """A tensor's entry in the header; its data are the bytes from `first` to `last` behind it."""

    name: str
    shape: tuple[int, ...]
    kind: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """Keys and tensors of a model in one GGUF file, or in several `parts`, of `bytes` in all.

    `path` is the file that llama.cpp opens: of a split model the first.
    """

    fields: dict[str, Field]
    tensors: list[StoredTensor]
    path: Path
    bytes: int
    parts: tuple[Path, ...]

    def field(self, name: str, default: Any = None) -> Any:
        """Return a key's value, or `default`."""
        return self.fields[name].value if name in self.fields else default

    def hyperparameter(self, name: str, default: Any = None) -> Any:
        """Return a key of the model's architecture ("block_count"), or `default`."""
        return self.field(f"{self.architecture}.{name}", default)

    def token(self, name: str) -> str:
        """Return the text of the special token `name` ("bos", "eos", "eot"), or ""."""
        id = self.field(f"tokenizer.ggml.{name}_token_id")
        if id is None:
            return ""
        tokens = self.field("tokenizer.ggml.tokens", [])
        if not 0 <= id < len(tokens):
            raise GattError(
                f"{self.path}: the {name.upper()} token is number {id} of {len(tokens)} tokens. "
                "Take another GGUF of the model."
            )
        return str(tokens[id])

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.field("general.architecture", ""))

    @property
    def chat_template(self) -> str:
        """The source of the Jinja template, or ""."""
        return str(self.field("tokenizer.chat_template", ""))

    @property
    def bos(self) -> str:
        """The text of the BOS token, or ""."""
        return self.token("bos")

    @property
    def eos(self) -> str:
        """The text of the EOS token, or ""."""
        return self.token("eos")

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return int(self.hyperparameter("block_count", 0))

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for."""
        return int(self.hyperparameter("context_length", 2048))

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in F16; 0 for a model without attention."""
        heads = self.hyperparameter("attention.head_count", 1)
        if heads == 0:
            return 0
        key_heads = self.hyperparameter("attention.head_count_kv", heads)
        if isinstance(key_heads, list):  # one number per layer
            key_heads = max(key_heads)
        width = self.hyperparameter("embedding_length", 0)
        head_size = self.hyperparameter(
            "attention.key_length", width // heads if isinstance(heads, int) else 128
        )
        return int(2 * 2 * self.layers * key_heads * head_size)


def open_gguf(path: Path) -> GgufInfo:
    """Map a chat model's GGUF, all parts of a split one, and read its header.

    Raises:
        GattError: missing, not a GGUF, truncated, or without an architecture or chat template.
    """
    info = read_gguf(path)
    if not info.architecture:
        raise GattError(f"{path} lacks general.architecture. Take an instruct model's GGUF.")
    if not info.chat_template:
        named = [key for key in info.fields if key.startswith(_NAMED_TEMPLATE)]
        names = ", ".join(key.removeprefix(_NAMED_TEMPLATE) for key in named)
        only = f" (only templates named {names})" if named else ""
        raise GattError(
            f"{path} lacks a chat template{only}. Take an instruct model's GGUF, or give this one "
            "a template: gguf-new-metadata --chat-template-file chat_template.jinja "
            f"{path.name} with-template.gguf"
        )
    return info


def read_gguf(path: Path) -> GgufInfo:
    """Map any GGUF (a model, an adapter, an importance matrix) and read its header.

    Any part of a split model stands for all of them. Keys about the split are left out.

    Raises:
        GattError: missing, not a GGUF, truncated, or a part of a split model is missing.
    """
    info = _read_file(path)
    count = info.field("split.count", 1)
    if count == 1:
        return info
    parts = _part_paths(path, count)
    infos = [_read_file(part) for part in parts]
    numbers = [(info.field("split.no"), info.field("split.count")) for info in infos]
    tensors = [tensor for info in infos for tensor in info.tensors]
    expected = infos[0].field("split.tensors.count", len(tensors))
    if numbers != [(number, count) for number in range(count)] or len(tensors) != expected:
        raise GattError(
            f"The parts of {parts[0]} do not belong together: {len(tensors)} tensors in parts "
            f"{[number for number, _ in numbers]} found, {expected} in {count} parts expected. "
            "Download them again."
        )
    fields = {key: value for key, value in infos[0].fields.items() if key not in _SPLIT_KEYS}
    return GgufInfo(fields, tensors, parts[0], sum(info.bytes for info in infos), parts)


def part_paths(path: Path) -> tuple[Path, ...]:
    """Return all parts of the model in a GGUF file, by their names: one, if it is not split."""
    name = _PART_NAME.fullmatch(path.name)
    return _part_paths(path, int(name[3])) if name else (path,)


def _part_paths(path: Path, count: int) -> tuple[Path, ...]:
    """Return the `count` parts of a split model, of which `path` is one.

    Raises:
        GattError: one is missing, or `path` does not have the name of a part.
    """
    name = _PART_NAME.fullmatch(path.name)
    if not name or int(name[3]) != count:
        raise GattError(
            f"{path} is one of the {count} parts of a split model, whose name ends with "
            f"-0000N-of-{count:05}.gguf. Rename the parts as they were."
        )
    parts = [path.with_name(f"{name[1]}-{n + 1:05}-of-{count:05}.gguf") for n in range(count)]
    missing = [part for part in parts if not part.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise GattError(
            f"{missing[0]} is missing{more}: {path.name} is one of {count} parts of a model. "
            "Put all of them into one folder."
        )
    return tuple(parts)


def _read_file(path: Path) -> GgufInfo:
    """Map one GGUF file and read its header."""
    if not path.is_file():
        raise GattError(f"No file at {path}. Expected a GGUF model.")
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise GattError(f"{path} is a pointer of Git LFS, not the model. Run `git lfs pull`.")
    magic = start[:4]
    if magic != b"GGUF":
        raise GattError(f"{path} is not a GGUF file (it begins with {magic!r}, not b'GGUF').")
    raw = np.memmap(path, np.uint8, "r")
    try:
        fields, infos = _HeaderReader(raw.data).read()
    # Everything that damage leads to; UnicodeDecodeError is a ValueError.
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise GattError(
            f"{path} is a damaged GGUF file, perhaps cut short ({error}). "
            "Download or export it again."
        ) from error
    size = max((info.last for info in infos), default=0)
    # The first part of a split model may have no tensors.
    if size > raw.size or not (size or "split.count" in fields):
        raise GattError(
            f"{path} is cut short: {raw.size:,} bytes found, {size:,} expected. "
            "Download or export it again."
        )
    # Slices of a plain view are cheap, those of a memmap are not.
    view = np.asarray(raw)
    tensors = [
        StoredTensor(name, shape, kind, view[first:last].reshape(math.prod(shape[:-1]), -1))
        for name, shape, kind, first, last in infos
    ]
    return GgufInfo(fields, tensors, path, raw.size, (path,))


class _HeaderReader:
    """Reads the values of a header one after another."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._position = 4  # after the magic

    def read(self) -> tuple[dict[str, Field], list[_TensorInfo]]:
        """Return the keys, and the tensors with their bytes in the file."""
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} found, 2 or 3 expected")
        tensors, keys = self._number("Q"), self._number("Q")
        fields = {}
        for _ in range(keys):
            name = self._string()
            fields[name] = self._field(self._number("I"))
        infos = [self._tensor_info() for _ in range(tensors)]
        alignment = int(fields["general.alignment"].value) if "general.alignment" in fields else 32
        start = -(-self._position // alignment) * alignment
        return fields, [t._replace(first=start + t.first, last=start + t.last) for t in infos]

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._raw, self._position)
        self._position += struct.calcsize(f"<{kind}")
        return value

    def _string(self) -> str:
        end = self._number("Q") + self._position
        if end > len(self._raw):
            raise ValueError("a text goes beyond the end of the file")
        text = str(self._raw[self._position : end], "utf-8")
        self._position = end
        return text

    def _field(self, kind: int) -> Field:
        if kind == _STRING:
            return Field(self._string(), kind)
        if kind != _ARRAY:
            return Field(self._number(_NUMBERS[kind]), kind)
        items, count = self._number("I"), self._number("Q")
        if items == _STRING:
            return Field([self._string() for _ in range(count)], kind, items)
        numbers = f"<{count}{_NUMBERS[items]}"
        values = list(struct.unpack_from(numbers, self._raw, self._position))
        self._position += struct.calcsize(numbers)
        return Field(values, kind, items)

    def _tensor_info(self) -> _TensorInfo:
        name, axes = self._string(), self._number("I")
        if not 0 < axes <= 4:
            raise ValueError(f"{name} has {axes} axes")
        shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
        kind, offset = self._number("I"), self._number("Q")
        size = math.prod(shape[:-1]) * ggml.row_bytes(kind, shape[-1])
        return _TensorInfo(name, shape, kind, offset, offset + size)
