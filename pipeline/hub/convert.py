"""A base in the form that a stage needs: a GGUF format for llama.cpp, a Hugging Face folder for training.

Each is made once and kept in the user's cache folder, under the hash of what it was made from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs

from pipeline.files import sha256, whole_file, write_json
from pipeline.gguf.formats import file_type, query_tensor_types
from pipeline.gguf.imatrix import ImportanceMatrix
from pipeline.gguf.merge import (
    UNIFORM_FORMATS,
    Format,
    MergePlan,
    plan_merge,
    uniform_format,
    write,
    write_skeleton,
)
from pipeline.gguf.reader import open_gguf
from pipeline.gguf.vocabulary import PRE_TOKENIZERS
from pipeline.hub.models import Model
from pipeline.system import require_disk

_CONVERSION = 5
"""Part of the name of whatever is converted: raised with every change of the conversion."""


def _cached(model: Model, form: str) -> Path:
    return (
        Path(platformdirs.user_cache_dir("gatt"))
        / f"{sha256(model.path)[:16]}-{_CONVERSION}-{form}"
    )


def cached_gguf(model: Model, format_name: str) -> Path:
    """The base as a GGUF in llama.cpp's format `format_name`.

    Raises:
        GattError: no such format, too little disk, or a Hugging Face folder that this version cannot write.
    """
    target = _cached(model, f"{format_name}.gguf")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        require_disk(target.parent, 4 * model.bytes, f"convert {model.name}")
        with whole_file(target) as draft:
            write_formats(model, None, {format_name: draft})
    return target


def write_formats(model: Model, adapter: Path | None, targets: dict[str, Path]) -> None:
    """Write the base with `adapter` (or none) to one GGUF for each format."""
    whole = plan_merge(model.path, adapter)
    with TemporaryDirectory(dir=next(iter(targets.values())).parent) as scratch:
        formats = {path: plan_format(whole, name, Path(scratch)) for name, path in targets.items()}
    write(whole, formats)


def plan_format(
    whole: MergePlan, name: str, scratch: Path, importance: ImportanceMatrix | None = None
) -> Format:
    """How llama.cpp would store the tensors of `whole` in the format `name`, with an importance matrix or without one.

    Raises:
        GattError: no such format.
    """
    if name in UNIFORM_FORMATS:
        return uniform_format(whole.tensors, name)
    skeleton = scratch / "skeleton.gguf"
    if not skeleton.exists():
        write_skeleton(whole, skeleton)
    types = query_tensor_types(skeleton, name, importance is not None)
    if importance is None:
        return Format(file_type(name), types)
    by_tensor = importance.by_tensor()
    keys = {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "the run's dialogues",
        "quantize.imatrix.entries_count": len(by_tensor),
        "quantize.imatrix.chunks_count": importance.chunks,
    }
    return Format(file_type(name), types, by_tensor, keys)


def cached_checkpoint(model: Model) -> Path:
    """The base as transformers and Unsloth load it; a GGUF is converted once and kept in the user's cache folder.

    Special tokens and chat template come from the GGUF's own fields: transformers guesses them wrong.
    """
    if not model.is_gguf:
        return model.path
    folder = _cached(model, "hf")
    if (folder / "done.json").exists():
        return folder
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    info = open_gguf(model.path)
    draft = folder.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    source = {"pretrained_model_name_or_path": str(model.path.parent), "gguf_file": model.path.name}
    network = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Dequantized by now, but still labeled as quantized, which transformers refuses to save.
    network.hf_quantizer = None
    network.config.__dict__.pop("quantization_config", None)
    network.to(torch.bfloat16).save_pretrained(draft)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    tokenizer.bos_token, tokenizer.eos_token = info.bos or None, info.eos
    tokenizer.pad_token = tokenizer.pad_token or info.eos
    tokenizer.chat_template = info.chat_template
    tokenizer.save_pretrained(draft)
    _split_as_llama_cpp(draft / "tokenizer.json", info.field("tokenizer.ggml.pre"))
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    ids = {f"{n}_token_id": info.field(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos")}
    write_json(draft / "config.json", {**config, **ids})
    write_json(draft / "done.json", {"source": model.path.name})
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def _split_as_llama_cpp(file: Path, name: str | None) -> None:
    """Give a converted tokenizer the pre-tokenizer that the GGUF names: transformers takes GPT-2's for all of them."""
    if name in PRE_TOKENIZERS:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        write_json(
            file,
            {
                **tokenizer,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name]},
            },
        )
