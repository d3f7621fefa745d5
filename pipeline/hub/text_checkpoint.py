"""A plain 16-bit checkpoint of a text model: what transformers and Unsloth load for training.

It is made of checkpoints that they would load as something else: the text part of a multimodal
model, and weights in 4 or 8 bits.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.files import whole_file, write_json
from pipeline.gguf import ggml
from pipeline.gguf.base import Bytes
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.huggingface.safetensors import GGML_TYPES, SafetensorsTensor, Weights

_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
_LEFT_OUT = ("quantization_config", "compression_config", "auto_map")
_BLOCK = 1 << 22
"""Weights in memory at a time."""


def write_text_checkpoint(base: CheckpointBase, target: Path) -> None:
    """Write the text model of `base` to the folder `target`, with its tokenizer.

    Raises:
        GattError: weights are missing or damaged.
    """
    weights = base.weights()
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, target / "model.safetensors")
    for pattern in _COPIED:
        for file in base.folder.glob(pattern):
            copy = target / file.relative_to(base.folder)
            copy.parent.mkdir(exist_ok=True)
            if not file.name.endswith("safetensors.index.json"):
                shutil.copyfile(file, copy)
    settings = {key: value for key, value in base.config.items() if key not in _LEFT_OUT}
    write_json(target / "config.json", {**settings, "architectures": [base.class_name]})


def write_safetensors(weights: dict[str, Weights], target: Path) -> None:
    """Write one safetensors file: a length, a JSON header, then the data in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, tensor in weights.items():
        columns = tensor.shape[-1]
        rows = math.prod(tensor.shape) // columns
        end = start + rows * ggml.row_bytes(GGML_TYPES[tensor.dtype], columns)
        header[key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(target) as draft, draft.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in weights.values():
            for block in _blocks(tensor):
                out.write(block.data)


def _blocks(tensor: Weights) -> Iterator[Bytes]:
    """Yield the bytes of a tensor some rows at a time."""
    if isinstance(tensor, SafetensorsTensor):
        yield np.asarray(tensor.data)
        return
    columns = tensor.shape[-1]
    rows, step = math.prod(tensor.shape) // columns, max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        values = tensor.load(slice(first, min(first + step, rows)))
        yield ggml.quantize(values, GGML_TYPES[tensor.dtype])
