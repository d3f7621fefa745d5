"""Base model (GGUF or Hugging Face folder) plus LoRA adapter → F16 GGUF, one tensor in memory at a time.

The sum `W + alpha / rank * B @ A` is taken in float32 and rounded once. Only the llama architecture for now.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf.base import Array, Base, Tensor, permute
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.read import open_gguf


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one matrix: `scale * b @ a`, with `a` (rank, inputs) and `b` (outputs, rank)."""

    a: Array
    b: Array
    scale: float

    def matrix(self) -> Array:
        """The change, (outputs, inputs), float32."""
        return np.float32(self.scale) * (self.b @ self.a)


def open_base(path: Path) -> Base:
    """The base in a GGUF file or in a Hugging Face folder.

    Raises:
        GattError: broken, or of an architecture other than llama.
    """
    return CheckpointBase(path) if path.is_dir() else GgufBase(path)


class GgufBase:
    """A GGUF file; every key of it, its tokenizer and chat template among them, is copied as it stands."""

    def __init__(self, path: Path) -> None:
        self._info = info = open_gguf(path)
        self.name, self.architecture, self.layers = path.name, info.architecture, info.layers
        if info.architecture != "llama":
            raise GattError(f"{path.name} is of architecture {info.architecture!r}; this version can export 'llama' only.")
        self.heads = int(info.field("llama.attention.head_count"))
        self.key_heads = int(info.field("llama.attention.head_count_kv", self.heads))

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


def merge(source: Path, adapter: Path | None, target: Path) -> None:
    """Write `source` with `adapter` (a PEFT folder, or None) to `target` as F16; norms and other vectors stay F32.

    Raises:
        GattError: another architecture than llama, or an adapter that does not fit the base.
    """
    import gguf

    base = open_base(source)
    deltas = read_adapter(adapter, base) if adapter else {}
    tensors = list(base.tensors())
    unknown = deltas.keys() - {t.name for t in tensors}
    if unknown:
        raise GattError(f"The adapter changes {sorted(unknown)[0]}, which {base.name} does not have: it is of another base.")
    with whole_file(target) as draft:
        writer = gguf.GGUFWriter(draft, base.architecture)
        base.write_fields(writer)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        for tensor in tensors:
            dtype = _stored(tensor)
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, math.prod(tensor.shape) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            weights = tensor.load()
            if tensor.name in deltas:
                weights = weights + _fitting(deltas[tensor.name], weights, tensor.name)
            writer.write_tensor_data(weights.astype(_stored(tensor)))
        writer.close()


def _stored(tensor: Tensor) -> np.dtype[Any]:
    """Matrices as F16, vectors as F32."""
    return np.dtype(np.float16 if len(tensor.shape) > 1 else np.float32)


def _fitting(delta: Delta, weights: Array, name: str) -> Array:
    change = delta.matrix()
    if change.shape != weights.shape:
        raise GattError(f"{name}: the adapter is for {change.shape}, the base has {weights.shape}: it is of another base.")
    if not np.isfinite(change).all():
        raise GattError(f"{name}: the adapter holds NaN or infinity. Train again with a lower train.learning_rate.")
    return change


def read_adapter(folder: Path, base: Base) -> dict[str, Delta]:
    """A PEFT LoRA adapter by GGUF tensor name; the rows of q and k are permuted as llama.cpp stores them.

    Raises:
        GattError: no adapter there, or a matrix that has no place in a llama GGUF.
    """
    import gguf
    from safetensors.numpy import load_file

    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except OSError as error:
        raise GattError(f"No adapter in {folder} ({error}). `gatt train` writes one.") from error
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.layers)
    deltas = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        name = names.get_name(module)
        if name is None:
            raise GattError(f"The adapter changes {module}, which has no place in a llama GGUF.")
        b = tensors[key.replace("lora_A", "lora_B")].astype(np.float32)
        if name.endswith("attn_q"):
            b = permute(b, base.heads)
        elif name.endswith("attn_k"):
            b = permute(b, base.key_heads)
        deltas[f"{name}.weight"] = Delta(a.astype(np.float32), b, settings["lora_alpha"] / settings["r"])
    return deltas
