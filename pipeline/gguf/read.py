"""Open a GGUF file without trusting it: a broken one can abort the process inside llama.cpp, so it is checked first.

Format: the GGUF specification of ggml (magic, version 3, key-values, tensor infos, aligned data).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import GattError


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """What a GGUF says about its model. `reader` is the memory-mapped `gguf.GGUFReader`; sizes are in bytes."""

    reader: Any
    path: Path
    bytes: int
    architecture: str
    chat_template: str
    bos: str
    eos: str
    cache_bytes_per_token: int
    context_length: int
    layers: int

    def field(self, name: str, default: Any = None) -> Any:
        """A key's value, or `default`."""
        found = self.reader.fields.get(name)
        return default if found is None else found.contents()


def open_gguf(path: Path) -> GgufInfo:
    """Map a GGUF and read its header.

    Raises:
        GattError: missing, not a GGUF, cut short, or without an architecture or chat template.
    """
    import gguf

    if not path.is_file():
        raise GattError(f"No file at {path}. Expected a GGUF model.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise GattError(f"{path} is not a GGUF file (it begins with {magic!r}, not b'GGUF').")
    try:
        reader = gguf.GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except MemoryError:
        raise
    except Exception as error:  # the reader raises ValueError, IndexError, KeyError or UnicodeDecodeError on damage
        raise GattError(f"{path} is a damaged GGUF file, perhaps cut short ({error}). Download or export it again.") from error
    size = path.stat().st_size
    if not end or end > size:
        raise GattError(f"{path} is cut short: {size:,} bytes found, {end:,} expected. Download or export it again.")
    return _info(reader, path, size)


def _info(reader: Any, path: Path, size: int) -> GgufInfo:
    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(name)
        return default if found is None else found.contents()

    architecture = field("general.architecture")
    template = field("tokenizer.chat_template")
    if not architecture or not template:
        missing = "a chat template: only chat models can be taught" if architecture else "general.architecture"
        raise GattError(f"{path} lacks {missing}. Take an instruct model's GGUF.")
    heads = field(f"{architecture}.attention.head_count", 1)
    width = field(f"{architecture}.embedding_length", 0)
    key_value_heads = field(f"{architecture}.attention.head_count_kv", heads)
    head = field(f"{architecture}.attention.key_length", width // heads if isinstance(heads, int) else 128)
    most = max(key_value_heads) if isinstance(key_value_heads, list) else key_value_heads
    layers = field(f"{architecture}.block_count", 0)
    return GgufInfo(
        reader, path, size, architecture, template, _token(reader, "bos"), _token(reader, "eos"),
        2 * 2 * layers * most * head, field(f"{architecture}.context_length", 2048), layers,
    )  # fmt: skip


def _token(reader: Any, name: str) -> str:
    """The text of the BOS or EOS token, or ""."""
    found = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
    return str(reader.fields["tokenizer.ggml.tokens"].contents(found.contents())) if found else ""
