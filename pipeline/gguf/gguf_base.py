"""A GGUF file as the base of a merge; all of its keys, tokenizer and chat template among them, are
copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, Bytes, Metadata, Tensor
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.reader import open_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

_REPLACED = ("general.architecture", "general.file_type", "quantize.imatrix")
_REPLACED_METADATA = (
    "general.name",
    "general.finetune",
    "general.base_model",
    "general.dataset",
)


class GgufBase:
    """A base model in a GGUF file.

    Raises:
        GattError: the file is damaged, or its architecture is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._info = info = open_gguf(path)
        self.name, self.architecture, self.layers = path.name, info.architecture, info.layers
        family = next((f for f in FAMILIES.values() if f.architecture == info.architecture), None)
        if family is None:
            supported = ", ".join(sorted({f.architecture for f in FAMILIES.values()}))
            raise GattError(
                f"{path.name} is of architecture {info.architecture!r}; "
                f"this version can export {supported}."
            )
        self.interleaved = family.interleaved
        self.heads = int(info.field(f"{info.architecture}.attention.head_count"))
        self.key_heads = int(info.field(f"{info.architecture}.attention.head_count_kv", self.heads))

    def write_fields(self, writer: GGUFWriter, metadata: Metadata) -> None:
        """Copy the keys; `metadata` replaces what the base says about itself."""
        import gguf

        replaced = _REPLACED + (_REPLACED_METADATA if metadata else ())
        for name, value in self._info.fields.items():
            if not name.startswith(replaced):
                items = None if value.items is None else gguf.GGUFValueType(value.items)
                writer.add_key_value(name, value.value, gguf.GGUFValueType(value.kind), items)
        if metadata:
            base_name = self._info.field("general.name", self.name)
            gguf.Metadata(name=base_name, **metadata).set_gguf_meta_model(writer)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every weight, which is dequantized when it is loaded."""
        for name, shape, kind, data in self._info.tensors:
            yield Tensor(name, shape, partial(_dequantize, data, kind, shape[-1]))


def _dequantize(stored: Bytes, kind: int, columns: int, first: int, last: int) -> Array:
    return ggml.dequantize(stored[first:last], kind, columns)
