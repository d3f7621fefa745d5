"""A Hugging Face checkpoint as llama.cpp's converter writes it: GGUF keys, vocabulary, tensors by
GGUF name.

Weights are memory-mapped, never loaded as one. `safetensors.safe_open` cannot do this: with NumPy
it has no bfloat16, and with PyTorch its slices are copies in PyTorch's memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gguf.base import Array, Metadata, RowOrder, Tensor, row_order
from pipeline.gguf.families import extra_tensors, read_config, require_tensors
from pipeline.gguf.huggingface.bitsandbytes import dequantized
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.huggingface.config import (
    original_model,
    quantization_method,
    refuse_quantized,
    require_object,
    with_defaults,
)
from pipeline.gguf.huggingface.safetensors import (
    GGML_TYPES,
    SafetensorsTensor,
    Weights,
    open_safetensors,
    shards,
)
from pipeline.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


class _Part(NamedTuple):
    """A matrix within a stored tensor: `rows` rows of the second last axis, from `first` on."""

    key: str
    first: int
    rows: int


class CheckpointBase:
    """A folder with `config.json`, a tokenizer and safetensors, sharded or not.

    Of a multimodal model it is the text part. `class_name` is transformers' class of it.

    Raises:
        GattError: a file is missing, or the architecture, the tokenizer or the quantization is not
            supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        config = require_object(folder / "config.json")
        self.quantization = quantization_method(folder, config)
        refuse_quantized(folder, self.quantization)
        read = read_config(config, f"{folder / 'config.json'}")
        self.family, self.class_name, self.config, self.multimodal = read
        self.architecture, self.interleaved = self.family.architecture, self.family.interleaved
        self.layers = int(self.config["num_hidden_layers"])
        self.heads = int(self.config["num_attention_heads"])
        self.key_heads = int(self.config.get("num_key_value_heads") or self.heads)
        self._vocabulary = Vocabulary(folder, self.config, self.architecture)
        try:
            self._extra = extra_tensors(self.family, self.config)
            self._keys = self.family.keys(self.config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GattError(
                f"{folder / 'config.json'}: {error} is missing or of a wrong type. "
                "Download the checkpoint again."
            ) from error
        if self.multimodal:
            _log_once(f"{self.name}: a multimodal model; only its text part is used.")
        if self.quantization:
            _log_once(
                f"{self.name}: weights that bitsandbytes has rounded to 4 or 8 bits are used as "
                f"they are. The 16-bit model{original_model(folder)} would be more exact."
            )

    @property
    def chat_template(self) -> str:
        """The source of the Jinja template, or ""."""
        return read_chat_template(self.folder)

    def write_fields(self, writer: GGUFWriter, metadata: Metadata) -> None:
        """Write metadata, hyperparameters, vocabulary, special tokens and chat template."""
        import gguf

        total, *sizes = writer.get_total_parameter_count()
        merged = gguf.Metadata.load(None, self.folder, None, total)
        merged.name = merged.name or self.folder.name
        merged.size_label = merged.size_label or (
            gguf.size_label(total, *sizes) if total > 0 else None
        )
        for key, value in metadata.items():
            setattr(merged, key, value)
        writer.add_type(gguf.GGUFType.MODEL)
        merged.set_gguf_meta_model(writer)
        for name, value in self._keys.items():
            if value is not None:
                getattr(writer, f"add_{name}")(value)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._vocabulary.write(writer)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every weight by its GGUF name, in llama.cpp's layout.

        Raises:
            GattError: weights are missing, damaged, unknown, or of another shape than `config.json`
                says.
        """
        tensors = list(self._tensors())
        names = {tensor.name: tensor.shape for tensor in tensors}
        tied = self.family.without_head or "output.weight" in names or self._is_tied()
        require_tensors(self.family, names, self.layers, str(self.folder), tied=tied)
        hidden, vocabulary = int(self.config["hidden_size"]), int(self.config["vocab_size"])
        rows, columns = names["token_embd.weight"]
        if columns != hidden or rows > vocabulary:
            raise GattError(
                f"{self.folder}: the embedding is {rows} x {columns}, and config.json says "
                f"vocab_size = {vocabulary} and hidden_size = {hidden}. "
                "Download the checkpoint again."
            )
        yield from tensors

    def weights(self) -> dict[str, Weights]:
        """Return the stored weights by their keys in a text model of transformers.

        Raises:
            GattError: a file is missing or damaged.
        """
        stored: dict[str, SafetensorsTensor] = {}
        for file in shards(self.folder):
            for key, tensor in open_safetensors(file).items():
                if text_key := text_model_key(key) if self.multimodal else key:
                    stored[text_key] = tensor
        if not self.quantization:
            return dict(stored)
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")
        return dequantized(stored, dtype)

    def _is_tied(self) -> bool:
        settings = with_defaults(self.config, ("tie_word_embeddings",), str(self.folder))
        return bool(settings["tie_word_embeddings"])

    def _tensors(self) -> Iterator[Tensor]:
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.layers)
        for name, values in self._extra.items():
            yield Tensor(name, values.shape, partial(_slice_rows, values))
        for key, stored in self._by_key().items():
            if self.family.without_head and key == "lm_head.weight":
                continue
            if stored[0].dtype not in GGML_TYPES:
                raise GattError(
                    f"{stored[0].file}: {key} is of type {stored[0].dtype}; "
                    "F32, F16 or BF16 expected. Take the 16-bit model."
                )
            for part in _split_gate_up(key, stored[0].shape):
                gguf_name = names.get_name(part.key, try_suffixes=(".weight", ".bias"))
                if gguf_name is None:
                    raise GattError(
                        f"{stored[0].file} holds {key}, which has no place in a "
                        f"{self.architecture} GGUF of {self.layers} layers."
                    )
                yield self._tensor(gguf_name, stored, part)

    def _tensor(self, name: str, stored: list[Weights], part: _Part) -> Tensor:
        """Return one GGUF tensor; several stored tensors are the experts of one matrix."""
        rows, shape = part.rows, stored[0].shape
        if name == "token_embd.weight" and self.architecture == "gemma3":
            rows = min(rows, self._vocabulary.size)  # without the rows that no token has
        shape = (*shape[:-2], rows, shape[-1]) if len(shape) > 1 else (rows,)
        if len(stored) > 1:
            shape = (len(stored), *shape)
        order = row_order(self, name, rows)
        shift = self.family.norm_shift if name.endswith("norm.weight") else 0.0
        if order is not None:
            load = _load_reordered_vector if len(shape) == 1 else _load_reordered_rows
            return Tensor(name, shape, partial(load, stored[0], order))
        if len(shape) > 2:
            return Tensor(name, shape, partial(_load_expert_rows, stored, part.first, rows))
        return Tensor(name, shape, partial(_load_rows, stored[0], part.first, shift))

    def _by_key(self) -> dict[str, list[Weights]]:
        """Return every stored tensor by its key.

        The experts of one matrix come together, under the key without their numbers.
        """
        by_key: dict[str, list[Weights]] = {}
        experts: dict[str, dict[int, Weights]] = {}
        for key, stored in self.weights().items():
            if expert := _EXPERT.fullmatch(key):
                experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = stored
            else:
                by_key[key] = [stored]
        return by_key | {
            key: [numbered[n] for n in sorted(numbered)] for key, numbered in experts.items()
        }


_log_once = cache(log)


def needs_text_checkpoint(folder: Path) -> bool:
    """Return whether transformers would load a folder as more than a text model in 16 bits.

    Raises:
        GattError: weights that are quantized in a way that cannot be read.
    """
    config = require_object(folder / "config.json")
    method = quantization_method(folder, config)
    refuse_quantized(folder, method)
    return bool(method) or isinstance(config.get("text_config"), dict)


def text_model_key(key: str) -> str:
    """Return the key of a multimodal model's weight in its text model alone, "" for other parts.

    Checkpoints call the text model `language_model.model`, `model.language_model` (transformers 5
    in memory, and adapters) or `model.language_model.model`; LLaVA's and Mistral's have `lm_head`
    within `language_model`.
    """
    if "language_model." not in key:
        return key if key.startswith(("lm_head.", "model.layers.", "model.embed_tokens.")) else ""
    part = key.rpartition("language_model.")[2]
    return part if part.startswith(("model.", "lm_head.")) else f"model.{part}"


def _load_rows(stored: Weights, start: int, shift: float, first: int, last: int) -> Array:
    """Load rows `first` to `last` of the matrix that begins in row `start` (a vector is one row).

    `shift` is added: Gemma multiplies by 1 + the stored weights of its norms.
    """
    return stored.load(slice(start + first, start + last)) + np.float32(shift)


def _load_reordered_rows(stored: Weights, order: RowOrder, first: int, last: int) -> Array:
    """Load rows of q or k, which llama.cpp stores in another order."""
    return stored.load(order[first:last])


def _load_reordered_vector(stored: Weights, order: RowOrder, first: int, last: int) -> Array:
    """Load the bias of q or k, whose entries are in the order of its matrix's rows."""
    return _load_rows(stored, 0, 0.0, first, last)[:, order]


def _load_expert_rows(stored: list[Weights], start: int, rows: int, first: int, last: int) -> Array:
    """Load rows of one expert out of matrices of `rows` rows, which follow one another in the GGUF.

    Checkpoints store each expert as a tensor, or all in one (experts, stored rows, columns). Where
    a stored matrix holds both gate and up, the wanted one begins in its row `start`."""
    expert, first_in_matrix = divmod(first, rows)
    last_in_matrix = last - expert * rows
    if len(stored) > 1:
        return _load_rows(stored[expert], start, 0.0, first_in_matrix, last_in_matrix)
    start += expert * stored[0].shape[-2]
    return _load_rows(stored[0], start, 0.0, first_in_matrix, last_in_matrix)


def _slice_rows(values: Array, first: int, last: int) -> Array:
    return values.reshape(-1, values.shape[-1])[first:last]


def _split_gate_up(key: str, shape: tuple[int, ...]) -> list[_Part]:
    """Return the matrices in a stored tensor: experts may store gate and up as one."""
    rows = shape[-2] if len(shape) > 1 else shape[0]
    full_key = key if key.endswith((".weight", ".bias")) else f"{key}.weight"
    if ".experts." not in key or "gate_up_proj" not in key:
        return [_Part(full_key, 0, rows)]
    half = rows // 2
    return [
        _Part(full_key.replace("gate_up_proj", "gate_proj"), 0, half),
        _Part(full_key.replace("gate_up_proj", "up_proj"), half, half),
    ]
