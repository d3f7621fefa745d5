"""A base model in the form that a stage needs: a GGUF for llama.cpp, a folder for transformers.

Conversions are made once and cached in the user's cache folder, by the hash of their source.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs

from pipeline.files import sha256, whole_file, write_json
from pipeline.gguf.formats import (
    UNIFORM_FORMATS,
    Format,
    KeyValue,
    file_type,
    query_tensor_types,
    uniform_format,
)
from pipeline.gguf.imatrix import ImportanceMatrix
from pipeline.gguf.merge import MergePlan, plan_merge, write, write_skeleton
from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.gguf.vocabulary import PRE_TOKENIZERS
from pipeline.hub.models import Model
from pipeline.system import require_disk

_CONVERSION = 5
"""Version of the conversion, part of the names in the cache: raise it with every change."""


def _cache_path(model: Model, suffix: str) -> Path:
    cache = Path(platformdirs.user_cache_dir("gatt"))
    return cache / f"{sha256(model.path)[:16]}-{_CONVERSION}-{suffix}"


def runnable_gguf(model: Model, format_name: str = "") -> Path:
    """Return a GGUF of `model` in llama.cpp's format `format_name`, converted if need be.

    "" takes a GGUF file unchanged, and converts a Hugging Face folder to Q8_0.

    Raises:
        GattError: as for `cached_gguf`.
    """
    if model.is_gguf and not format_name:
        return model.path
    return cached_gguf(model, format_name or "Q8_0")


def cached_gguf(model: Model, format_name: str) -> Path:
    """Return the cached GGUF of `model` in llama.cpp's format `format_name`, made if missing.

    Raises:
        GattError: no such format, too little disk, or a model that cannot be converted.
    """
    target = _cache_path(model, f"{format_name}.gguf")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        require_disk(target.parent, 4 * model.bytes, f"convert {model.name}")
        with whole_file(target) as draft:
            write_formats(model, None, {format_name: draft})
    return target


def write_formats(model: Model, adapter: Path | None, targets: dict[str, Path]) -> None:
    """Write `model`, merged with `adapter` if there is one, to one GGUF per format name."""
    plan = plan_merge(model.path, adapter)
    with TemporaryDirectory(dir=next(iter(targets.values())).parent) as scratch:
        formats = {path: plan_format(plan, name, Path(scratch)) for name, path in targets.items()}
    write(plan, formats)


def plan_format(
    plan: MergePlan, name: str, scratch: Path, importance: ImportanceMatrix | None = None
) -> Format:
    """Return how llama.cpp would store the tensors of `plan` in the format `name`.

    llama.cpp decides this from the tensors' shapes, for which `scratch` receives a GGUF without
    weights, and from whether there is an importance matrix.

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
        "quantize.imatrix.dataset": "the run's dialogues",
        "quantize.imatrix.entries_count": len(by_tensor),
        "quantize.imatrix.chunks_count": importance.chunks,
    }
    return Format(file_type(name), types, by_tensor, keys)


def cached_checkpoint(model: Model) -> Path:
    """Return `model` as a folder that transformers and Unsloth load; a GGUF is converted once."""
    if not model.is_gguf:
        return model.path
    folder = _cache_path(model, "hf")
    if (folder / "done.json").exists():
        return folder
    import transformers

    transformers.utils.logging.disable_progress_bar()
    info = open_gguf(model.path)
    draft = folder.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    _save_weights(model.path, draft)
    _save_tokenizer(model.path, info, draft)
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    ids = {f"{n}_token_id": info.field(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos")}
    write_json(draft / "config.json", {**config, **ids})
    write_json(draft / "done.json", {"source": model.path.name})
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def _save_weights(gguf: Path, folder: Path) -> None:
    """Save the weights of a GGUF file, dequantized to bfloat16, and the configuration."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # Dequantized by now, but still labeled as quantized, which transformers refuses to save.
    network.hf_quantizer = None
    network.config.__dict__.pop("quantization_config", None)
    network.to(torch.bfloat16).save_pretrained(folder)


def _save_tokenizer(gguf: Path, info: GgufInfo, folder: Path) -> None:
    """Save the tokenizer of a GGUF file.

    Special tokens, chat template and pre-tokenizer come from the file's own keys: transformers
    guesses them wrong, and takes GPT-2's pre-tokenizer for every model.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.bos_token, tokenizer.eos_token = info.bos or None, info.eos
    tokenizer.pad_token = tokenizer.pad_token or info.eos
    tokenizer.chat_template = info.chat_template
    tokenizer.save_pretrained(folder)
    pre_tokenizers = PRE_TOKENIZERS.get(info.field("tokenizer.ggml.pre"))
    if pre_tokenizers:
        file = folder / "tokenizer.json"
        written = json.loads(file.read_text(encoding="utf-8"))
        written["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers}
        write_json(file, written)
