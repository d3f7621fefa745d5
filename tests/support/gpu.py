"""A graphics card that is not there, and models of which only the sizes exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.gguf import ggml
from pipeline.gguf.reader import Field, GgufInfo, StoredTensor
from pipeline.hub.shape import ModelShape
from pipeline.inference.llama import gpu
from pipeline.inference.llama.gpu import GpuDevice

_UINT32, _STRING = 4, 8
_GGML_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 8}


def install_fake_gpu(monkeypatch: pytest.MonkeyPatch, free_gb: float) -> None:
    """Let llama.cpp's devices be one with `free_gb`; what is placed there runs on the CPU."""
    devices = [GpuDevice("Fake RTX", int(free_gb * 1e9))]
    monkeypatch.setattr(gpu, "_read_devices", lambda: devices)


def sizes_of(shape: ModelShape, format_name: str) -> GgufInfo:
    """Return the header of a GGUF of a Llama of these sizes, whose data takes no memory."""
    kind = _GGML_TYPES[format_name]
    layers, hidden, kv_heads = shape.num_hidden_layers, shape.hidden_size, 8
    numbers = {
        "block_count": layers,
        "context_length": 8192,
        "embedding_length": hidden,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": kv_heads * shape.q_size // shape.kv_size,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": shape.kv_size // kv_heads,
    }
    fields = {f"llama.{name}": Field(value, _UINT32) for name, value in numbers.items()}
    fields["general.architecture"] = Field("llama", _STRING)
    shapes = {"token_embd.weight": (shape.vocab_size, hidden)}
    if not shape.tie_word_embeddings:
        shapes["output.weight"] = shapes["token_embd.weight"]
    for layer in range(layers):
        for name, (inputs, outputs) in shape.projection_shapes.items():
            shapes[f"blk.{layer}.{name}.weight"] = (outputs, inputs)
    tensors = []
    for name, (rows, columns) in shapes.items():
        data = np.broadcast_to(np.uint8(0), (rows, ggml.row_bytes(kind, columns)))
        tensors.append(StoredTensor(name, (rows, columns), kind, data))
    size = sum(tensor.data.nbytes for tensor in tensors)
    path = Path(f"model-{format_name}.gguf")
    return GgufInfo(fields, tensors, path, size, (path,))
