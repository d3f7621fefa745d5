"""Base GGUF plus LoRA adapter → F16 GGUF, one tensor in memory at a time.

The sum `W + alpha / rank * B @ A` is taken in float32 and rounded once. Every key of the base file, its tokenizer and
chat template among them, is copied as it stands. Only the llama architecture for now.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf.read import GgufInfo, open_gguf

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one matrix: `scale * b @ a`, with `a` (rank, inputs) and `b` (outputs, rank)."""

    a: Array
    b: Array
    scale: float

    def matrix(self) -> Array:
        """The change, (outputs, inputs), float32."""
        return np.float32(self.scale) * (self.b @ self.a)


def merge(base: Path, adapter: Path | None, target: Path) -> None:
    """Write `base` with `adapter` (a PEFT folder, or None) to `target` as F16; norms and other vectors stay F32.

    Raises:
        GattError: another architecture than llama, or an adapter that does not fit the base.
    """
    import gguf

    info = open_gguf(base)
    if info.architecture != "llama":
        raise GattError(f"{base.name} is of architecture {info.architecture!r}; this version can export 'llama' only.")
    deltas = read_adapter(adapter, info) if adapter else {}
    unknown = deltas.keys() - {t.name for t in info.reader.tensors}
    if unknown:
        raise GattError(f"The adapter changes {sorted(unknown)[0]}, which {base.name} does not have: it is of another base.")
    with whole_file(target) as draft:
        writer = gguf.GGUFWriter(draft, info.architecture)
        _copy_fields(info, writer)
        for tensor in info.reader.tensors:
            shape, dtype = [int(n) for n in reversed(tensor.shape)], np.float16 if len(tensor.shape) > 1 else np.float32
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), count)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in info.reader.tensors:
            weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if tensor.name in deltas:
                weights = weights + _fitting(deltas[tensor.name], weights, tensor.name)
            writer.write_tensor_data(weights.astype(np.float16 if weights.ndim > 1 else np.float32))
        writer.close()


def _fitting(delta: Delta, weights: Array, name: str) -> Array:
    change = delta.matrix()
    if change.shape != weights.shape:
        raise GattError(f"{name}: the adapter is for {change.shape}, the base has {weights.shape}: it is of another base.")
    if not np.isfinite(change).all():
        raise GattError(f"{name}: the adapter holds NaN or infinity. Train again with a lower train.learning_rate.")
    return change


def _copy_fields(info: GgufInfo, writer: Any) -> None:
    import gguf

    for name, field in info.reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def read_adapter(folder: Path, info: GgufInfo) -> dict[str, Delta]:
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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, info.layers)
    heads = int(info.field("llama.attention.head_count"))
    key_heads = int(info.field("llama.attention.head_count_kv", heads))
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
            b = permute(b, heads)
        elif name.endswith("attn_k"):
            b = permute(b, key_heads)
        deltas[f"{name}.weight"] = Delta(a.astype(np.float32), b, settings["lora_alpha"] / settings["r"])
    return deltas


def permute(rows: Array, heads: int) -> Array:
    """Reorder the rows of a q or k matrix from halves (Hugging Face) to interleaved pairs (llama.cpp's rotary order)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
