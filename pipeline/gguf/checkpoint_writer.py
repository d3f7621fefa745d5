"""A merged Hugging Face checkpoint in float32, written file by file and some rows at a time.

`gatt export` does not need it. It is for transformers, and for the user's own GGUF converter.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file, write_json
from pipeline.gguf.base import Array
from pipeline.gguf.huggingface.config import read_object
from pipeline.gguf.huggingface.safetensors import (
    INTEGERS,
    SafetensorsTensor,
    open_safetensors,
    shards,
)
from pipeline.gguf.lora.delta import Delta, Replacement
from pipeline.gguf.lora.weights import LoraAdapter, read_adapter

_BLOCK = 1 << 22
"""Weights in memory at a time."""
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.py")
_INDEX = "model.safetensors.index.json"
_OUTPUT = "lm_head.weight"


class _Source(NamedTuple):
    """A tensor of the merged checkpoint before the low-rank change is added: `load(first, last)`
    reads some rows.

    `integers` are copied as they are.
    """

    shape: tuple[int, ...]
    load: Callable[[int, int], Array]
    integers: SafetensorsTensor | None = None


def write_checkpoint(
    source: Path,
    adapter: Path | None,
    target: Path,
    on_file: Callable[[], object] = lambda: None,
    names: Mapping[str, str] | None = None,
) -> None:
    """Merge the checkpoint in `source` with `adapter`, a PEFT folder, into the folder `target`.

    `names` are those of the checkpoint's weights by the adapter's, where they differ.

    Raises:
        GattError: `target` holds a checkpoint, a shard is missing or damaged, or the adapter is of
            another base.
    """
    require_new(target)
    files = {
        file.name: {key: _stored(key, tensor) for key, tensor in open_safetensors(file).items()}
        for file in shards(source)
    }
    config = read_object(source / "config.json")
    lora = read_adapter(adapter).renamed(names or {}) if adapter else None
    if lora and _replace(lora, files, source.name):
        config["tie_word_embeddings"] = False
    target.mkdir(parents=True, exist_ok=True)
    for name, sources in files.items():
        _write_file(sources, lora.deltas if lora else {}, target / name)
        on_file()
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name not in ("config.json", _INDEX):
                shutil.copyfile(file, target / file.name)
    if len(files) > 1:
        shapes = (source.shape for sources in files.values() for source in sources.values())
        index = {
            "metadata": {"total_size": sum(4 * math.prod(shape) for shape in shapes)},
            "weight_map": {key: name for name, sources in files.items() for key in sources},
        }
        write_json(target / _INDEX, index)
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


def _stored(key: str, tensor: SafetensorsTensor) -> _Source:
    """Return a tensor of the base; loading it fails where it holds NaN or infinity."""

    def load(first: int, last: int) -> Array:
        weights = tensor.load(slice(first, last))
        if not np.isfinite(weights.sum()):
            raise GattError(
                f"{key} of {tensor.file.name} holds NaN or infinity. Download the model again."
            )
        return weights

    return _Source(tensor.shape, load, tensor if tensor.dtype in INTEGERS else None)


def _replace(lora: LoraAdapter, files: dict[str, dict[str, _Source]], base: str) -> bool:
    """Put the adapter's own tensors into `files`, and return whether the output was untied.

    Raises:
        GattError: the adapter is of another base.
    """
    file_of = {key: name for name, sources in files.items() for key in sources}
    embedding = next((key for key in file_of if key.endswith("embed_tokens.weight")), "")
    changed = {*lora.replacements, *(f"{module}.weight" for module in lora.deltas)}
    by_token = {embedding, _OUTPUT} & changed
    patched = {key for key, value in lora.replacements.items() if value.indices}
    untied = _OUTPUT not in file_of and bool(by_token) and by_token != {embedding} & patched
    if untied:
        file_of[_OUTPUT] = file_of[embedding]
        files[file_of[_OUTPUT]][_OUTPUT] = files[file_of[embedding]][embedding]
    for key in changed:
        if key not in file_of:
            raise _wrong_base(key, "a change", base, "nothing")
    for key, replacement in lora.replacements.items():
        sources, shape = files[file_of[key]], replacement.values.shape
        by_row = key in by_token and shape[1:] == sources[key].shape[1:]
        if not by_row and shape != sources[key].shape:
            raise _wrong_base(key, shape, base, sources[key].shape)
        if by_row:
            replacement = replacement.for_rows(sources[key].shape[0])
        if replacement.indices:
            load = partial(_load_patched, sources[key], replacement)
            sources[key] = _Source(sources[key].shape, load)
        else:
            sources[key] = _Source(shape, partial(_load_replaced, replacement))
    for module, delta in lora.deltas.items():
        key = f"{module}.weight"
        expected = files[file_of[key]][key].shape
        if delta.shape != expected:
            raise _wrong_base(key, delta.shape, base, expected)
    return untied


def _load_replaced(replacement: Replacement, first: int, last: int) -> Array:
    return replacement.load(slice(first, last))


def _load_patched(source: _Source, replacement: Replacement, first: int, last: int) -> Array:
    return replacement.patch(source.load(first, last), first)


def _wrong_base(key: str, actual: object, base: str, expected: object) -> GattError:
    return GattError(
        f"{key}: the adapter is for {actual}, {base} has {expected}: it is of another base."
    )


def _write_file(sources: dict[str, _Source], deltas: dict[str, Delta], target: Path) -> None:
    """Write one safetensors file: a length, a JSON header, then the data in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key, source in sources.items():
        integers, shape = source.integers, list(source.shape)
        end = start + (integers.data.nbytes if integers else 4 * math.prod(shape))
        dtype = integers.dtype if integers else "F32"
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(target) as draft, draft.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for key, source in sources.items():
            if source.integers:
                out.write(np.asarray(source.integers.data).data)
                continue
            delta = deltas.get(key.removesuffix(".weight"))
            for weights in _merged_blocks(source, delta):
                out.write(weights.tobytes())


def _merged_blocks(source: _Source, delta: Delta | None) -> Iterator[Array]:
    """Yield a merged tensor some rows at a time."""
    rows, load = math.prod(source.shape[:-1]), source.load
    if delta and delta.init != "plain":
        residual = delta.residual(source.load(0, rows))

        def load(first: int, last: int) -> Array:
            return residual[first:last]

    step = max(1, _BLOCK // (source.shape[-1] if source.shape else 1))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weights = load(first, last)
        yield weights + delta.change(weights, first, last) if delta else weights
