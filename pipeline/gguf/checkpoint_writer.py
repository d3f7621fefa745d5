"""A merged Hugging Face checkpoint in float32, written file by file and some rows at a time.

`gatt export` does not need it. It is for transformers, and for the user's own GGUF converter.
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
"""Weights in memory at a time."""
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.py")
_INDEX = "model.safetensors.index.json"


def write_checkpoint(
    source: Path, adapter: Path | None, target: Path, on_file: Callable[[], object] = lambda: None
) -> None:
    """Merge the checkpoint in `source` with `adapter`, a PEFT folder, into the folder `target`.

    Raises:
        GattError: `target` holds a checkpoint, a shard is missing or damaged, or the adapter is of
            another base.
    """
    require_new(target)
    files = shards(source)
    tensors = {file: open_safetensors(file) for file in files}
    shapes = {key: tensor.shape for by_key in tensors.values() for key, tensor in by_key.items()}
    deltas = _read_deltas(adapter, shapes, source.name) if adapter else {}
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        _write_file(tensors[file], deltas, target / file.name)
        on_file()
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in ("config.json", _INDEX):
                shutil.copyfile(file, target / file.name)
    if len(files) > 1:
        total_size = sum(4 * math.prod(shape) for shape in shapes.values())
        index = read_object(source / _INDEX)
        write_json(target / _INDEX, {**index, "metadata": {"total_size": total_size}})
    config = read_object(source / "config.json")
    config.pop("torch_dtype", None)
    # Written last: its presence means that the folder is complete.
    write_json(target / "config.json", {**config, "dtype": "float32"})


def require_new(target: Path) -> None:
    """Check that `target` is free before any work is done.

    Raises:
        GattError: `target` holds a checkpoint.
    """
    if (target / "config.json").exists():
        raise GattError(
            f"{target} holds a model already, which is not overwritten. Name another folder."
        )


def _read_deltas(adapter: Path, shapes: dict[str, tuple[int, ...]], base: str) -> dict[str, Delta]:
    """Return the adapter's changes by the keys of the checkpoint."""
    deltas = {f"{module}.weight": delta for module, delta in read_adapter(adapter).items()}
    for key, delta in deltas.items():
        if shapes.get(key) != delta.shape:
            raise GattError(
                f"{key}: the adapter is for {delta.shape}, {base} has "
                f"{shapes.get(key, 'nothing')}: it is of another base."
            )
    return deltas


def _write_file(
    tensors: dict[str, SafetensorsTensor], deltas: dict[str, Delta], target: Path
) -> None:
    """Write one safetensors file: a length, a JSON header, then the data in its order."""
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
                        f"{key} of {tensor.file.name} holds NaN or infinity. "
                        "Download the model again."
                    )
                if key in deltas:
                    weights += deltas[key].change(weights, first, last)
                out.write(weights.tobytes())
