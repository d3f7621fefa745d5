"""A base model with an adapter, for llama.cpp: the adapter as a GGUF of its own, or merged.

Of a family that only llama.cpp's converter writes, its scripts make both.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.errors import GattError
from pipeline.gguf.adapter import missing_from_gguf, write_adapter
from pipeline.gguf.checkpoint_writer import write_checkpoint
from pipeline.gguf.formats import uniform_format
from pipeline.gguf.huggingface.config import require_object
from pipeline.gguf.huggingface.model_card import checkpoint_name
from pipeline.gguf.huggingface.safetensors import open_safetensors, shards
from pipeline.gguf.merge import open_base, plan_merge, write
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.llama_converter import convert, convert_adapter, converter_for
from pipeline.hub.models import Model
from pipeline.system import require_disk

_TRANSPOSED = frozenset({"gpt2", "gpt-sw3", "openai-gpt"})
"""Types of models with Conv1D of transformers in place of linear layers."""


def write_adapter_gguf(base: Path, adapter: Path, target: Path) -> None:
    """Write a PEFT folder as a GGUF that llama.cpp applies to a GGUF of the model at `base`.

    Raises:
        GattError: it is of another base, or more than llama.cpp can apply.
    """
    converter = converter_for(base)
    if converter is None:
        write_adapter(open_base(base), adapter, target)
        return
    if reason := missing_from_gguf(adapter):
        raise GattError(f"{adapter} {reason}. Merge it with `gatt export`.")
    convert_adapter(converter, cached_checkpoint(Model(base.name, base)), adapter, target)


def write_merged_gguf(base: Path, adapter: Path, target: Path) -> None:
    """Write the model at `base`, merged with a PEFT folder, as a GGUF in Q8_0.

    Raises:
        GattError: the adapter is of another base, too little disk, or the converter failed.
    """
    converter = converter_for(base)
    if converter is None:
        merged = plan_merge(base, adapter)
        write(merged, {target: uniform_format(merged.tensors, "Q8_0")})
        return
    text = cached_checkpoint(Model(base.name, base))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        checkpoint = write_merged_checkpoint(text, adapter, Path(scratch) / checkpoint_name(base))
        convert(converter, checkpoint, target, "Q8_0")


def write_merged_checkpoint(
    base: Path, adapter: Path | None, target: Path, on_file: Callable[[], object] = lambda: None
) -> Path:
    """Write the merge of a text model's folder with a PEFT folder in float32; return its folder.

    Raises:
        GattError: too little disk, or as `write_checkpoint`.
    """
    needed = sum(
        4 * math.prod(tensor.shape)
        for file in shards(base)
        for tensor in open_safetensors(file).values()
    )
    require_disk(target.parent, needed, "write the merged model in float32")
    names: dict[str, str] | None = None
    if adapter:
        family = str(require_object(base / "config.json").get("model_type"))
        if family in _TRANSPOSED:
            raise GattError(
                f"{base} is a {family}, whose layers store their matrices transposed (Conv1D), to "
                "which no adapter is added here. Merge it with PEFT's merge_and_unload."
            )
        names = stored_names(family, [name for f in shards(base) for name in open_safetensors(f)])
    write_checkpoint(base, adapter, target, on_file, names)
    return target


def stored_names(model_type: str, names: Iterable[str]) -> dict[str, str]:
    """Return what a checkpoint calls its weights, by what transformers calls them once loaded."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    changes = get_checkpoint_conversion_mapping(model_type) or []
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: name for name in names}
