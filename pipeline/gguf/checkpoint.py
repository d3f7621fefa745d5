"""A Hugging Face checkpoint as llama.cpp's converter sees it: GGUF keys, vocabulary, tensors by GGUF name.

The llama architecture (Llama, SmolLM, Mistral without a sliding window) with a byte-level BPE tokenizer; another one gets
an error that names it. Weights are mapped, never loaded whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array, Tensor, permute
from pipeline.gguf.vocabulary import name_of_pre_tokenizer, token_types

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


class CheckpointBase:
    """A folder with `config.json`, `tokenizer.json` and safetensors, sharded or not.

    Raises:
        GattError: a file is missing, or the architecture or tokenizer is one that this version cannot write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _json(folder / "config.json")
        named = (self.config.get("architectures") or ["none"])[0]
        if named not in _ARCHITECTURES or self.config.get("sliding_window"):
            raise GattError(
                f"{folder} is a {named}; this version writes GGUF for {' and '.join(_ARCHITECTURES)} (no sliding window). "
                "Give the model's GGUF instead."
            )
        self.architecture = "llama"
        self.layers = int(self.config["num_hidden_layers"])
        self.heads = int(self.config["num_attention_heads"])
        self.key_heads = int(self.config.get("num_key_value_heads") or self.heads)
        self.name = folder.name
        self._tokenizer = _json(folder / "tokenizer.json")
        self._pre_tokenizer = name_of_pre_tokenizer(self._tokenizer, folder)
        self._head_size = int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)
        # transformers 5 keeps the rotary settings in one table; older checkpoints have two keys.
        self._rope = {
            "rope_theta": self.config.get("rope_theta", 10000.0),
            **(self.config.get("rope_scaling") or {}),
            **(self.config.get("rope_parameters") or {}),
        }

    def write_fields(self, writer: Any) -> None:
        """Hyperparameters, vocabulary, special tokens and chat template."""
        config = self.config
        writer.add_name(self.folder.name)
        writer.add_block_count(self.layers)
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_heads)
        writer.add_key_length(self._head_size)
        writer.add_value_length(self._head_size)
        writer.add_rope_dimension_count(self._head_size)
        writer.add_rope_freq_base(self._rope["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(config["vocab_size"])
        self._write_vocabulary(writer)

    def _write_vocabulary(self, writer: Any) -> None:
        import gguf

        tokens, types = token_types(self._tokenizer, int(self.config["vocab_size"]))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self._pre_tokenizer)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        special = gguf.SpecialVocab(self.folder, load_merges=True, n_vocab=len(tokens))
        special.add_special_token.setdefault("bos", False)  # else llama.cpp decides by the pre-tokenizer's name
        special.add_to_gguf(writer, quiet=True)

    def tensors(self) -> Iterator[Tensor]:
        """Every weight by its GGUF name; q and k with their rows in llama.cpp's rotary order."""
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.layers)
        factors = self._rope_factors()
        if factors is not None:
            yield Tensor("rope_freqs.weight", factors.shape, lambda: factors)
        for file in self._shards():
            for key, (dtype, shape, data) in _mapped(file).items():
                name = names.get_name(key, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise GattError(f"{file.name} holds {key}, which has no place in a llama GGUF.")
                heads = {"attn_q": self.heads, "attn_k": self.key_heads}.get(name.split(".")[-2], 0)
                yield Tensor(name, shape, partial(_weights, data, dtype, shape, heads))

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        names = sorted(set(_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            raise GattError(f"{self.folder} lacks {missing[0]}. Download the checkpoint again.")
        return [self.folder / name for name in names]

    def _rope_factors(self) -> Array | None:
        """Llama 3's frequency factors (Llama 3.1 model card; transformers' `rope_type = "llama3"`), or None.

        Raises:
            GattError: another kind of scaling.
        """
        kind = self._rope.get("rope_type", self._rope.get("type", "default"))
        if kind == "default":
            return None
        if kind != "llama3":
            raise GattError(f"{self.folder} scales its rotary embedding by {kind!r}; this version knows 'llama3' only.")
        rope = self._rope
        wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, self._head_size, 2) / self._head_size)
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        ratio = rope["original_max_position_embeddings"] / wavelengths
        smooth = np.clip((ratio - low) / (high - low), 0, 1)
        factors: Array = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
        return factors


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise GattError(f"{path.parent} lacks {path.name}. A Hugging Face folder holds it.") from error
    except ValueError as error:
        raise GattError(f"{path} is not JSON: {error}. Download the checkpoint again.") from error


def _mapped(file: Path) -> dict[str, tuple[str, tuple[int, ...], Any]]:
    """(dtype, shape, bytes) of every tensor of a safetensors file: a length, a JSON header, then the data.

    Raises:
        GattError: the file is damaged or cut short.
    """
    raw = np.memmap(file, np.uint8, "r")
    try:
        start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8:start].tobytes())
    except ValueError as error:
        raise GattError(f"{file} is not a safetensors file ({error}). Download the checkpoint again.") from error
    header.pop("__metadata__", None)
    end = start + max(entry["data_offsets"][1] for entry in header.values())
    if end > raw.size:
        raise GattError(f"{file} is cut short: {raw.size:,} bytes found, {end:,} expected. Download the checkpoint again.")
    return {
        key: (e["dtype"], tuple(e["shape"]), raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for key, e in header.items()
    }


def _weights(data: Any, dtype: str, shape: tuple[int, ...], heads: int) -> Array:
    """float32 from F32, F16 or BF16 bytes."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType[dtype]
    except KeyError as error:
        raise GattError(f"Weights of type {dtype} found; F32, F16 or BF16 expected.") from error
    plain = data if kind == gguf.GGMLQuantizationType.BF16 else data.view({"F32": "<f4", "F16": "<f2"}[dtype])
    weights: Array = gguf.quants.dequantize(plain, kind).reshape(shape)
    return permute(weights, heads) if heads else weights
