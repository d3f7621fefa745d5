"""A Hugging Face checkpoint as llama.cpp's converter writes it: GGUF keys, vocabulary, tensors by
GGUF name.

Weights are memory-mapped, never loaded as one. `safetensors.safe_open` cannot do this: with NumPy
it has no bfloat16, and with PyTorch its slices are copies in PyTorch's memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gguf.base import CUT_TO_TOKENS, Array, Metadata, Tensor
from pipeline.gguf.families import read_config
from pipeline.gguf.huggingface.bitsandbytes import dequantized
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.huggingface.config import (
    original_model,
    quantization_method,
    refuse_quantized,
    require_object,
    with_defaults,
)
from pipeline.gguf.huggingface.hybrid_keys import linear_heads
from pipeline.gguf.huggingface.keys import (
    Part,
    is_multi_token,
    matrix_shape,
    parts_of,
    text_model_key,
)
from pipeline.gguf.huggingface.model_card import checkpoint_name, read_metadata
from pipeline.gguf.huggingface.rope_factors import extra_tensors
from pipeline.gguf.huggingface.safetensors import (
    GGML_TYPES,
    SafetensorsTensor,
    Weights,
    open_safetensors,
    shards,
)
from pipeline.gguf.huggingface.stored import gguf_rows
from pipeline.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


class CheckpointBase:
    """A folder with `config.json`, a tokenizer and safetensors, sharded or not.

    Of a multimodal model it is the text part. `class_name` is transformers' class of it.

    Raises:
        GattError: a file is missing, or the architecture, the tokenizer or the quantization is not
            supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, checkpoint_name(folder)
        config = require_object(folder / "config.json")
        self.quantization = quantization_method(folder, config)
        refuse_quantized(folder, self.quantization)
        read = read_config(config, f"{folder / 'config.json'}")
        self.family, self.class_name, self.config, self.multimodal = read
        self.architecture, self.interleaved = self.family.architecture, self.family.interleaved
        self.layers = int(self.config["num_hidden_layers"])
        self.heads = int(self.config["num_attention_heads"])
        self.key_heads = int(self.config.get("num_key_value_heads") or self.heads)
        self.linear_heads = linear_heads(self.config)
        self._vocabulary = Vocabulary(folder, self.config, self.architecture)
        try:
            self._extra = extra_tensors(self.architecture, self.config)
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
        merged = read_metadata(self.folder, total)
        merged.size_label = merged.size_label or (
            gguf.size_label(total, *sizes) if total > 0 else None
        )
        for key, value in metadata.items():
            setattr(merged, key, value)
        writer.add_type(gguf.GGUFType.MODEL)
        merged.set_gguf_meta_model(writer)
        for name, value in self._keys.items():
            if "." in name:
                writer.add_array(f"{self.architecture}.{name}", value)
            elif value is not None:
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
        kinds = self.family.kinds(self.config)
        self.family.require_tensors(names, kinds, str(self.folder), tied=tied)
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
        if any(map(is_multi_token, stored)):
            _log_once(f"{self.name}: without the layers that predict several tokens at once.")
            stored = {key: stored[key] for key in stored if not is_multi_token(key)}
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
            for part in parts_of(key, matrix_shape(key, stored[0].shape)):
                gguf_name = names.get_name(part.key, try_suffixes=(".weight", ".bias"))
                if gguf_name is None:
                    raise GattError(
                        f"{stored[0].file} holds {key}, which has no place in a "
                        f"{self.architecture} GGUF of {self.layers} layers."
                    )
                yield self._tensor(gguf_name, stored, part)

    def _tensor(self, name: str, stored: list[Weights], part: Part) -> Tensor:
        """Return one GGUF tensor; several stored tensors are the experts of one matrix."""
        rows, shape = part.rows, matrix_shape(part.key, stored[0].shape)
        if name == "token_embd.weight" and self.architecture in CUT_TO_TOKENS:
            rows = min(rows, self._vocabulary.size)  # without the rows that no token has
        shape = (*shape[:-2], rows, shape[-1]) if len(shape) > 1 else (rows,)
        if len(stored) > 1:
            shape = (len(stored), *shape)
        if len(shape) > 2:
            return Tensor(name, shape, partial(_load_expert_rows, stored, part.first, rows))
        return Tensor(name, shape, gguf_rows(self, name, shape, stored[0].load, start=part.first))

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


def _load_expert_rows(stored: list[Weights], start: int, rows: int, first: int, last: int) -> Array:
    """Load rows of one expert out of matrices of `rows` rows, which follow one another in the GGUF.

    Checkpoints store each expert as a tensor, or all in one (experts, stored rows, columns). Where
    a stored matrix holds both gate and up, the wanted one begins in its row `start`."""
    expert, first_in_matrix = divmod(first, rows)
    last_in_matrix = last - expert * rows
    if len(stored) == 1:
        start += expert * stored[0].shape[-2]
    weights = stored[expert] if len(stored) > 1 else stored[0]
    return weights.load(slice(start + first_in_matrix, start + last_in_matrix))


def _slice_rows(values: Array, first: int, last: int) -> Array:
    return values.reshape(-1, values.shape[-1])[first:last]
