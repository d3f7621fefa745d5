"""Open a GGUF file without trusting it: a broken one can abort the process inside llama.cpp, so it is checked first.

Format: the GGUF specification of ggml (magic, version, key-values, tensor infos, aligned data). The reader of the package
`gguf` takes seconds for a vocabulary; this one takes a tenth of one.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf import ggml

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""The specification's numbers of value types, as `struct` writes them; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9


class Field(NamedTuple):
    """A key's value, its type, and the type of an array's items (numbers of the specification)."""

    value: Any
    kind: int
    items: int | None = None


class StoredTensor(NamedTuple):
    """A tensor as it stands in the mapped file: (rows, bytes) uint8 of the ggml type `kind`; `shape` as in PyTorch."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: Any


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """What a GGUF says about its model; sizes are in bytes."""

    fields: dict[str, Field]
    tensors: list[StoredTensor]
    path: Path
    bytes: int

    def field(self, name: str, default: Any = None) -> Any:
        """A key's value, or `default`."""
        found = self.fields.get(name)
        return default if found is None else found.value

    def hyperparameter(self, name: str, default: Any = None) -> Any:
        """A key of the model's architecture ("block_count"), or `default`."""
        return self.field(f"{self.architecture}.{name}", default)

    def token(self, name: str) -> str:
        """The text of the special token `name` ("bos", "eos", "eot"), or ""."""
        id = self.field(f"tokenizer.ggml.{name}_token_id")
        return "" if id is None else str(self.field("tokenizer.ggml.tokens")[id])

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the family of models."""
        return str(self.field("general.architecture", ""))

    @property
    def chat_template(self) -> str:
        """Its Jinja text."""
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
        """Tokens that the model was made for."""
        return int(self.hyperparameter("context_length", 2048))

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in F16."""
        heads = self.hyperparameter("attention.head_count", 1)
        of_keys = self.hyperparameter("attention.head_count_kv", heads)
        width = self.hyperparameter("embedding_length", 0)
        head = self.hyperparameter(
            "attention.key_length", width // heads if isinstance(heads, int) else 128
        )
        return int(
            2 * 2 * self.layers * (max(of_keys) if isinstance(of_keys, list) else of_keys) * head
        )


def open_gguf(path: Path) -> GgufInfo:
    """Map a chat model's GGUF and read its header.

    Raises:
        GattError: missing, not a GGUF, cut short, or without an architecture or chat template.
    """
    info = read_gguf(path)
    if not info.architecture or not info.chat_template:
        missing = (
            "a chat template: only chat models can be taught"
            if info.architecture
            else "general.architecture"
        )
        raise GattError(f"{path} lacks {missing}. Take an instruct model's GGUF.")
    return info


def read_gguf(path: Path) -> GgufInfo:
    """Map any GGUF (a model, an adapter, an importance matrix) and read its header.

    Raises:
        GattError: missing, not a GGUF, or cut short.
    """
    if not path.is_file():
        raise GattError(f"No file at {path}. Expected a GGUF model.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise GattError(f"{path} is not a GGUF file (it begins with {magic!r}, not b'GGUF').")
    raw = np.memmap(path, np.uint8, "r")
    try:
        fields, tensors = _Header(raw).read()
    except (
        struct.error,
        ValueError,
        KeyError,
        OverflowError,
    ) as error:  # what damage leads to (a bad UTF-8 is a ValueError)
        raise GattError(
            f"{path} is a damaged GGUF file, perhaps cut short ({error}). Download or export it again."
        ) from error
    end = max((t.data for t in tensors), default=(0, 0), key=lambda span: span[1])[1]
    if not end or end > raw.size:
        raise GattError(
            f"{path} is cut short: {raw.size:,} bytes found, {end:,} expected. Download or export it again."
        )
    plain = np.asarray(raw)  # slices of a plain view of the map are cheap
    mapped = [
        t._replace(data=plain[t.data[0] : t.data[1]].reshape(math.prod(t.shape[:-1]), -1))
        for t in tensors
    ]
    return GgufInfo(fields, mapped, path, raw.size)


class _Header:
    """Reads one thing after another."""

    def __init__(self, raw: Any) -> None:
        self._raw = memoryview(raw)
        self._at = 4

    def read(self) -> tuple[dict[str, Field], list[StoredTensor]]:
        """The keys, and the tensors with (first, last) byte for their data."""
        version = self._number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} found, 2 or 3 expected")
        count, keys = self._number("Q"), self._number("Q")
        fields = {}
        for _ in range(keys):
            name = self._string()
            fields[name] = self._field(self._number("I"))
        infos = [self._info() for _ in range(count)]
        alignment = int(fields["general.alignment"].value) if "general.alignment" in fields else 32
        start = -(-self._at // alignment) * alignment
        return fields, [t._replace(data=(start + t.data[0], start + t.data[1])) for t in infos]

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._raw, self._at)
        self._at += struct.calcsize(f"<{kind}")
        return value

    def _string(self) -> str:
        end = self._number("Q") + self._at
        if end > len(self._raw):
            raise ValueError("a text goes beyond the end of the file")
        text = str(self._raw[self._at : end], "utf-8")
        self._at = end
        return text

    def _field(self, kind: int) -> Field:
        if kind == _STRING:
            return Field(self._string(), kind)
        if kind != _ARRAY:
            return Field(self._number(_NUMBERS[kind]), kind)
        items, count = self._number("I"), self._number("Q")
        if items == _STRING:
            return Field([self._string() for _ in range(count)], kind, items)
        form = f"<{count}{_NUMBERS[items]}"
        values = list(struct.unpack_from(form, self._raw, self._at))
        self._at += struct.calcsize(form)
        return Field(values, kind, items)

    def _info(self) -> StoredTensor:
        name, axes = self._string(), self._number("I")
        if not 0 < axes <= 4:
            raise ValueError(f"{name} has {axes} axes")
        shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
        kind, offset = self._number("I"), self._number("Q")
        size = math.prod(shape[:-1]) * ggml.row_bytes(kind, shape[-1])
        return StoredTensor(name, shape, kind, (offset, offset + size))
