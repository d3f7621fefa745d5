"""Base model (GGUF or Hugging Face folder) plus LoRA adapter → GGUF, one tensor in memory at a time.

The sum `W + scale * B @ A` is taken in float32 and rounded once, to the type that is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf.adapter import Delta, read_adapter
from pipeline.gguf.base import Array, Base, Tensor
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.read import open_gguf

DIRECT = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
"""The formats that are written in one pass, and their names as file types; llama.cpp makes all others from one of these."""


def open_base(path: Path) -> Base:
    """The base in a GGUF file or in a Hugging Face folder.

    Raises:
        GattError: broken, or of an architecture that is not known here.
    """
    return CheckpointBase(path) if path.is_dir() else GgufBase(path)


class GgufBase:
    """A GGUF file; every key of it, its tokenizer and chat template among them, is copied as it stands."""

    def __init__(self, path: Path) -> None:
        self._info = info = open_gguf(path)
        self.name, self.architecture, self.layers = path.name, info.architecture, info.layers
        family = next((f for f in FAMILIES.values() if f.architecture == info.architecture), None)
        if family is None:
            known = ", ".join(sorted({f.architecture for f in FAMILIES.values()}))
            raise GattError(f"{path.name} is of architecture {info.architecture!r}; this version can export {known}.")
        self.interleaved = family.interleaved
        self.heads = int(info.field(f"{info.architecture}.attention.head_count"))
        self.key_heads = int(info.field(f"{info.architecture}.attention.head_count_kv", self.heads))

    def write_fields(self, writer: Any) -> None:
        """Copy them."""
        import gguf

        for name, field in self._info.reader.fields.items():
            if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
                continue
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)

    def tensors(self) -> Iterator[Tensor]:
        """Every weight, dequantised when it is loaded."""
        import gguf

        for tensor in self._info.reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            yield Tensor(tensor.name, shape, partial(gguf.quants.dequantize, tensor.data, tensor.tensor_type))


def merge(source: Path, adapter: Path | None, targets: dict[str, Path]) -> None:
    """Write `source` with `adapter` (a PEFT folder, or None) to one file for each format of `DIRECT`, in one pass.

    Raises:
        GattError: an architecture that is not known here, weights that are no numbers, or an adapter of another base.
    """
    base = open_base(source)
    deltas = read_adapter(adapter, base) if adapter else {}
    tensors = list(base.tensors())
    unknown = deltas.keys() - {t.name for t in tensors}
    if unknown:
        raise GattError(f"The adapter changes {sorted(unknown)[0]}, which {base.name} does not have: it is of another base.")
    with ExitStack() as stack:
        drafts = {name: stack.enter_context(whole_file(target)) for name, target in targets.items()}
        writers = {name: _begin(base, tensors, draft, name) for name, draft in drafts.items()}
        for tensor in tensors:
            weights = _sum(tensor, deltas.get(tensor.name))
            for name, writer in writers.items():
                writer.write_tensor_data(_rounded(weights, _stored(tensor, name)))
        for writer in writers.values():
            writer.close()


def _begin(base: Base, tensors: list[Tensor], draft: Path, format_name: str) -> Any:
    """A GGUF with its keys and the list of its tensors, whose data come next."""
    import gguf

    writer = gguf.GGUFWriter(draft, base.architecture)
    for tensor in tensors:
        kind = _stored(tensor, format_name)
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    base.write_fields(writer)
    writer.add_file_type(gguf.LlamaFileType[DIRECT[format_name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _stored(tensor: Tensor, format_name: str) -> Any:
    """The type that llama.cpp's converter gives a tensor: vectors, norms and routers stay F32."""
    import gguf

    small = len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight") or ".ffn_gate_inp." in tensor.name
    if small or not tensor.name.endswith(".weight"):
        return gguf.GGMLQuantizationType.F32
    if format_name == "Q8_0" and tensor.shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[format_name]


def _rounded(weights: Array, kind: Any) -> Any:
    """The bytes of a tensor in its stored type."""
    import gguf

    stored = gguf.quants.quantize(weights, kind)
    return np.ascontiguousarray(stored).view(np.uint8)


def _sum(tensor: Tensor, delta: Delta | None) -> Array:
    """The weights with what the adapter adds."""
    weights = tensor.load()
    if not np.isfinite(weights).all():
        raise GattError(f"{tensor.name} of the base holds NaN or infinity. Download the model again.")
    if delta is None:
        return weights
    change = delta.matrix()
    if change.shape != weights.shape:
        raise GattError(f"{tensor.name}: the adapter is for {change.shape}, the base has {weights.shape}: it is of another base.")
    if not np.isfinite(change).all():
        raise GattError(f"{tensor.name}: the adapter holds NaN or infinity. Train again with a lower train.learning_rate.")
    return weights + change
