"""A base model in the form that a stage needs: a GGUF for llama.cpp, a folder for transformers.

Conversions are made once and cached in the user's cache folder, by the hash of their source.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.console import log
from pipeline.files import sha256, whole_file, write_json
from pipeline.folders import lock_file
from pipeline.gguf.base import Metadata
from pipeline.gguf.checkpoint import CheckpointBase, needs_text_checkpoint
from pipeline.gguf.formats import (
    UNIFORM_FORMATS,
    Format,
    KeyValue,
    file_type,
    quantize,
    query_tensor_types,
    uniform_format,
)
from pipeline.gguf.gguf_base import GgufBase
from pipeline.gguf.huggingface.model_card import checkpoint_name
from pipeline.gguf.imatrix import ImportanceMatrix
from pipeline.gguf.merge import MergePlan, file_size, plan_merge, write, write_skeleton
from pipeline.gguf.reader import open_gguf
from pipeline.hub.gguf_checkpoint import write_gguf_checkpoint
from pipeline.hub.llama_converter import convert, converter_for
from pipeline.hub.models import Model, require_chat_template
from pipeline.hub.text_checkpoint import TextModel, read_text_model, write_text_checkpoint
from pipeline.system import cache_path, require_disk

_CONVERSION = 10
"""Version of the conversion, part of the names in the cache: raise it with every change."""


def _cache_path(model: Model, suffix: str) -> Path:
    return cache_path(f"{sha256(model.path)[:16]}-{_CONVERSION}-{suffix}")


def runnable_gguf(model: Model, format_name: str = "") -> Path:
    """Return a GGUF of `model` in llama.cpp's format `format_name`, converted if need be.

    "" takes a GGUF file unchanged, and converts a Hugging Face folder to Q8_0.

    Raises:
        GattError: as for `cached_gguf`.
    """
    if model.is_gguf and not format_name:
        return model.path
    require_chat_template(model)
    return cached_gguf(model, format_name or "Q8_0")


def cached_gguf(model: Model, format_name: str) -> Path:
    """Return the cached GGUF of `model` in llama.cpp's format `format_name`, made if missing.

    Raises:
        GattError: no such format, too little disk, or a model that cannot be converted.
    """
    target = _cache_path(model, f"{format_name}.gguf")
    if target.exists():
        return target
    with lock_file(target):
        if not target.exists():  # another process may have made it in the meantime
            with whole_file(target) as draft:
                if converter := converter_for(model.path):
                    _convert_folder(converter, model, format_name, draft)
                else:
                    write_formats(model, None, {format_name: draft})
    return target


def _convert_folder(converter: Path, model: Model, format_name: str, target: Path) -> None:
    """Convert a folder by llama.cpp's own converter, once; other formats are made of its F16."""
    if format_name == "F16":
        require_disk(target.parent, model.bytes, f"convert {model.name}")
        log(f"{model.name}: converted by llama.cpp's own converter, once.")
        about: Metadata = {"name": checkpoint_name(model.path)}
        convert(converter, cached_checkpoint(model), target, "F16", about)
    else:
        quantize(cached_gguf(model, "F16"), target, format_name)


def write_formats(model: Model, adapter: Path | None, targets: dict[str, Path]) -> None:
    """Write `model`, merged with `adapter` if there is one, to one GGUF per format name.

    Raises:
        GattError: too little disk, or a model that cannot be converted.
    """
    plan = plan_merge(model.path, adapter)
    with TemporaryDirectory(dir=next(iter(targets.values())).parent) as scratch:
        formats = {path: plan_format(plan, name, Path(scratch)) for name, path in targets.items()}
        sizes = [file_size(plan, file_format) for file_format in formats.values()]
        require_disk(Path(scratch), sum(sizes), f"convert {model.name}")
    write(plan, formats)


def plan_format(
    plan: MergePlan,
    name: str,
    scratch: Path,
    importance: ImportanceMatrix | None = None,
    dataset: str = "",
) -> Format:
    """Return how llama.cpp would store the tensors of `plan` in the format `name`.

    llama.cpp decides this from the tensors' shapes, for which `scratch` receives a GGUF without
    weights, and from whether there is an importance matrix, which was measured on `dataset`.

    Raises:
        GattError: no such format.
    """
    if name in UNIFORM_FORMATS:
        return uniform_format(plan.tensors, name)
    skeleton = scratch / "skeleton.gguf"
    if not skeleton.exists():
        write_skeleton(plan, skeleton)
    types = query_tensor_types(skeleton, name, importance=importance is not None)
    if importance is None:
        return Format(file_type(name), types)
    by_tensor = importance.by_tensor()
    keys: dict[str, KeyValue] = {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": dataset,
        "quantize.imatrix.entries_count": len(by_tensor),
        "quantize.imatrix.chunks_count": importance.chunks,
    }
    return Format(file_type(name), types, by_tensor, keys)


def cached_checkpoint(model: Model) -> Path:
    """Return `model` as a folder of a text model in 16 bits, which transformers, Unsloth and
    llama.cpp's converter load.

    A GGUF is converted once, as is a folder with a multimodal model or with weights in 4 or 8 bits.

    Raises:
        GattError: too little disk, or a GGUF that lacks weights.
    """
    if not (model.is_gguf or needs_text_checkpoint(model.path)):
        return model.path
    folder = _cache_path(model, "hf")
    if not (folder / "done.json").exists():
        with lock_file(folder):
            if not (folder / "done.json").exists():
                _write_checkpoint(model, folder)
    return folder


def _write_checkpoint(model: Model, folder: Path) -> None:
    """Convert a GGUF, or a folder of another kind, to a folder, whole or not at all."""
    write_to: Callable[[Path], object]
    if model.is_gguf:
        base = GgufBase(model.path)
        sizes = [tensor.rows * tensor.columns for tensor in base.tensors()]
        write_to = partial(write_gguf_checkpoint, base, open_gguf(model.path))
    else:
        text = _text_model(model.path)
        sizes = [math.prod(tensor.shape) for tensor in text.weights.values()]
        write_to = partial(write_text_checkpoint, text)
    require_disk(folder.parent, 2 * sum(sizes), f"convert {model.name}")
    draft = folder.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    write_to(draft)
    write_json(draft / "done.json", {"source": model.path.name})
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _text_model(folder: Path) -> TextModel:
    """Return the text model in a folder, complete."""
    if converter_for(folder):
        return read_text_model(folder)
    base = CheckpointBase(folder)
    list(base.tensors())
    settings = {**base.config, "architectures": [base.class_name]}
    return TextModel(folder, settings, base.weights())
