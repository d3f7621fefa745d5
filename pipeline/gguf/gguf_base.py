"""A GGUF file as the base of a merge; all of its keys, tokenizer and chat template among them, are
copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, Bytes, LinearHeads, Metadata, Tensor
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.reader import GgufInfo, read_gguf

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NEEDED = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
"""Keys of an architecture without which llama.cpp refuses a file."""
_REPLACED = ("general.architecture", "general.file_type", "quantize.imatrix")
_REPLACED_METADATA = (
    "general.name",
    "general.finetune",
    "general.base_model",
    "general.dataset",
)


class GgufBase:
    """A base model in a GGUF file.

    Raises:
        GattError: the file is damaged, or its architecture is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._info = info = read_gguf(path)
        self.name, self.architecture, self.layers = path.name, info.architecture, info.layers
        self.chat_template = info.chat_template
        family = next((f for f in FAMILIES.values() if f.architecture == info.architecture), None)
        if family is None:
            supported = ", ".join(sorted({f.architecture for f in FAMILIES.values()}))
            raise GattError(
                f"{path.name} is of architecture {info.architecture!r}; "
                f"this version can export {supported}."
            )
        self.family, self.interleaved = family, family.interleaved
        for key in _NEEDED:
            if not isinstance(info.hyperparameter(key), int | float):
                raise GattError(
                    f"{path} lacks {info.architecture}.{key}, or has none for all layers. "
                    "Take another GGUF of the model."
                )
        if not info.field("tokenizer.ggml.tokens"):
            raise GattError(f"{path} has no vocabulary. Take another GGUF of the model.")
        self.heads = int(info.hyperparameter("attention.head_count"))
        key_heads = info.hyperparameter("attention.head_count_kv", self.heads)
        self.key_heads = max(key_heads) if isinstance(key_heads, list) else int(key_heads)
        self.linear_heads = linear_heads(info)

    def write_fields(self, writer: GGUFWriter, metadata: Metadata) -> None:
        """Copy the keys; `metadata` replaces what the base says about itself."""
        import gguf

        replaced = _REPLACED + (_REPLACED_METADATA if metadata else ())
        _add_fields(writer, self._info, replaced)
        if metadata:
            base_name = self._info.field("general.name", self.name)
            gguf.Metadata(name=base_name, **metadata).set_gguf_meta_model(writer)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every weight, which is dequantized when it is loaded.

        Raises:
            GattError: weights are missing.
        """
        names = {tensor.name for tensor in self._info.tensors}
        kinds = layer_kinds(self._info)
        self.family.require_tensors(names, kinds, str(self._info.path), tied=True)
        for name, shape, kind, data in self._info.tensors:
            yield Tensor(name, shape, partial(_dequantize, data, kind, shape[-1]))


def linear_heads(info: GgufInfo) -> LinearHeads | None:
    """Return the heads of a file's layers with linear attention; None for a model without."""
    values = info.hyperparameter("ssm.time_step_rank")
    if info.architecture != "qwen35" or not values:
        return None
    size = info.hyperparameter("ssm.inner_size") // values
    keys, key_size = (info.hyperparameter(f"ssm.{k}") for k in ("group_count", "state_size"))
    return LinearHeads(keys, values, key_size, size)


def layer_kinds(info: GgufInfo) -> list[str]:
    """Return the kind of every layer, as a configuration's `layer_types` call them.

    Layers that predict several tokens at once are left out; they are the last ones.
    """
    get, layers = info.hyperparameter, info.layers
    if info.architecture == "lfm2":
        heads = get("attention.head_count_kv")
        heads = heads if isinstance(heads, list) else [heads] * layers
        return ["full_attention" if count else "conv" for count in heads]
    if info.architecture == "qwen35":
        layers -= get("nextn_predict_layers", 0)
        interval = get("full_attention_interval", 4)
        recurrent = get("attention.recurrent_layers") or [
            bool((n + 1) % interval) for n in range(layers)
        ]
        return ["linear_attention" if is_so else "full_attention" for is_so in recurrent[:layers]]
    if info.architecture == "gemma4":
        slides = get("attention.sliding_window_pattern")
        own = layers - get("attention.shared_kv_layers", 0)
        return [
            "shared" if n >= own else "sliding_attention" if slides[n] else "full_attention"
            for n in range(layers)
        ]
    return [""] * layers


def _dequantize(stored: Bytes, kind: int, columns: int, first: int, last: int) -> Array:
    return ggml.dequantize(stored[first:last], kind, columns)


def _add_fields(writer: GGUFWriter, info: GgufInfo, left_out: tuple[str, ...]) -> None:
    """Copy the keys of a GGUF, but for those that begin like `left_out`."""
    import gguf

    for name, value in info.fields.items():
        if not name.startswith(left_out):
            items = None if value.items is None else gguf.GGUFValueType(value.items)
            writer.add_key_value(name, value.value, gguf.GGUFValueType(value.kind), items)
