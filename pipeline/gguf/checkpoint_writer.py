"""A merged Hugging Face checkpoint in float32, file by file and some rows at a time: what transformers loads.

`gatt export` needs none; it is for those who ask for it, and for a converter of their own.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file, write_json
from pipeline.gguf.adapter import Delta, read_adapter
from pipeline.gguf.checkpoint import SafetensorsTensor, open_safetensors, shards
from pipeline.gguf.vocabulary import read_object

_BLOCK = 1 << 22
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.py")


def write_checkpoint(
    source: Path, adapter: Path | None, target: Path, on_file: Callable[[], object] = lambda: None
) -> None:
    """Write the checkpoint in `source` with `adapter` (a PEFT folder, or None) to the folder `target`.

    Raises:
        GattError: the target holds a checkpoint already, a shard is missing or broken, or the adapter is of another base.
    """
    require_new(target)
    files = shards(source)
    stored = {file: open_safetensors(file) for file in files}
    shapes = {key: tensor.shape for tensors in stored.values() for key, tensor in tensors.items()}
    deltas = {
        f"{module}.weight": delta
        for module, delta in (read_adapter(adapter) if adapter else {}).items()
    }
    for key, delta in deltas.items():
        if shapes.get(key) != delta.shape:
            found = shapes.get(key, "nothing")
            raise GattError(
                f"{key}: the adapter is for {delta.shape}, {source.name} has {found}: it is of another base."
            )
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        _write_file(stored[file], deltas, target / file.name)
        on_file()
    for pattern in _COPIED:
        for other in source.glob(pattern):
            if other.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copyfile(other, target / other.name)
    if len(files) > 1:
        index = read_object(source / "model.safetensors.index.json")
        total = sum(4 * math.prod(shape) for shape in shapes.values())
        write_json(
            target / "model.safetensors.index.json", {**index, "metadata": {"total_size": total}}
        )
    config = {
        name: value
        for name, value in read_object(source / "config.json").items()
        if name != "torch_dtype"
    }
    write_json(
        target / "config.json", {**config, "dtype": "float32"}
    )  # last: with it the folder is whole


def require_new(target: Path) -> None:
    """Stop before work that could not be written.

    Raises:
        GattError: `target` holds a checkpoint.
    """
    if (target / "config.json").exists():
        raise GattError(
            f"{target} holds a model already; it is left as it is. Name another folder."
        )


def _write_file(
    tensors: dict[str, SafetensorsTensor], deltas: dict[str, Delta], target: Path
) -> None:
    """One safetensors file: a length, a JSON header, then the data in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, tensor in tensors.items():
        end = start + 4 * math.prod(tensor.shape)
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(target) as draft, draft.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in tensors.items():
            rows = math.prod(tensor.shape[:-1])
            step = max(1, _BLOCK // tensor.shape[-1])
            for first in range(0, rows, step):
                last = min(first + step, rows)
                weights = tensor.load(slice(first, last))
                if not np.isfinite(weights.sum()):
                    raise GattError(
                        f"{key} of {tensor.file.name} holds NaN or infinity. Download the model again."
                    )
                if key in deltas:
                    weights += deltas[key].change(weights, first, last)
                out.write(weights.tobytes())
