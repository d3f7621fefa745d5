"""A Hugging Face checkpoint as llama.cpp's converter sees it: GGUF keys, vocabulary, tensors by GGUF name.

Weights are mapped, never loaded whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array, Tensor
from pipeline.gguf.families import extra_tensors, family_of, interleave
from pipeline.gguf.vocabulary import Vocabulary, read_object

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of a safetensors file: where it stands, and its bytes in the mapped file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: Any

    def load(self) -> Array:
        """float32 from F32, F16 or BF16 bytes.

        Raises:
            GattError: another type.
        """
        import gguf

        try:
            kind = gguf.GGMLQuantizationType[self.dtype]
        except KeyError as error:
            raise GattError(f"{self.file}: weights of type {self.dtype} found; F32, F16 or BF16 expected.") from error
        plain = self.data if kind == gguf.GGMLQuantizationType.BF16 else self.data.view({"F32": "<f4", "F16": "<f2"}[self.dtype])
        weights: Array = gguf.quants.dequantize(plain, kind).reshape(self.shape)
        return weights


class CheckpointBase:
    """A folder with `config.json`, a tokenizer and safetensors, sharded or not.

    Raises:
        GattError: a file is missing, or the architecture or tokenizer is one that this version cannot write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _json(folder / "config.json")
        self.family = family_of(config, str(folder))
        self.config = {**config, **config.get("text_config", {})}
        self.architecture, self.interleaved = self.family.architecture, self.family.interleaved
        self.layers = int(self.config["num_hidden_layers"])
        self.heads = int(self.config["num_attention_heads"])
        self.key_heads = int(self.config.get("num_key_value_heads") or self.heads)
        self.name = folder.name
        self._vocabulary = Vocabulary(folder, self.config, self.architecture)
        self._extra = extra_tensors(self.family, self.config)

    def write_fields(self, writer: Any) -> None:
        """What the model is, its hyperparameters, vocabulary, special tokens and chat template."""
        import gguf

        total, *sizes = writer.get_total_parameter_count()
        about = gguf.Metadata.load(None, self.folder, None, total)
        about.name = about.name or self.folder.name
        about.size_label = about.size_label or (gguf.size_label(total, *sizes) if total > 0 else None)
        writer.add_type(gguf.GGUFType.MODEL)
        about.set_gguf_meta_model(writer)
        for name, value in self.family.keys(self.config).items():
            if value is not None:
                getattr(writer, f"add_{name}")(value)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._vocabulary.write(writer)

    def tensors(self) -> Iterator[Tensor]:
        """Every weight by its GGUF name, as llama.cpp wants it."""
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.layers)
        for name, values in self._extra.items():
            yield Tensor(name, values.shape, partial(np.array, values))
        for key, parts in self._by_key().items():
            if self.family.without_head and key == "lm_head.weight":
                continue
            for source, first, rows in _split(key, parts[0].shape):
                gguf_name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if gguf_name is None:
                    raise GattError(f"{parts[0].file} holds {key}, which has no place in a {self.architecture} GGUF.")
                yield self._tensor(gguf_name, parts, first, rows)

    def _tensor(self, name: str, parts: list[_Stored], first: int, rows: int) -> Tensor:
        """`rows` rows from `first` on of the last but one axis; several parts are the experts of one matrix."""
        shape = parts[0].shape
        if name == "token_embd.weight" and self.architecture == "gemma3":
            rows = min(rows, self._vocabulary.size)  # rows that no token has
        shape = (*shape[:-2], rows, shape[-1]) if len(shape) > 1 else (rows,)
        if len(parts) > 1:
            shape = (len(parts), *shape)
        heads = {"attn_q": self.heads, "attn_k": self.key_heads}.get(name.split(".")[-2], 0) if self.family.interleaved else 0
        shift = self.family.norm_shift if name.endswith("norm.weight") else 0.0

        def load() -> Array:
            read = [part.load() for part in parts]
            cut = [w[..., first : first + rows, :] if w.ndim > 1 else w[first : first + rows] for w in read]
            weights = np.stack(cut) if len(cut) > 1 else cut[0]
            if shift:
                weights = weights + np.float32(shift)
            return interleave(weights, heads) if heads else weights

        return Tensor(name, shape, load)

    def _by_key(self) -> dict[str, list[_Stored]]:
        """Every stored tensor by its key; the experts of one matrix together, under the key without their numbers."""
        found: dict[str, list[_Stored]] = {}
        experts: dict[str, dict[int, _Stored]] = {}
        for file in self._shards():
            for key, stored in _mapped(file).items():
                if expert := _EXPERT.fullmatch(key):
                    experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = stored
                else:
                    found[key] = [stored]
        return found | {key: [numbered[n] for n in sorted(numbered)] for key, numbered in experts.items()}

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        names = sorted(set(_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        missing = [name for name in names if not (self.folder / name).exists()]
        if missing:
            pickled = next(self.folder.glob("pytorch_model*.bin"), None)
            advice = f"{pickled.name} is a pickle, which may run code: save it as safetensors." if pickled else "Download it again."
            raise GattError(f"{self.folder} lacks {missing[0]}. {advice}")
        return [self.folder / name for name in names]


def _split(key: str, shape: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """(key, first row, rows) of the matrices that a stored one holds: experts keep gate and up in one."""
    rows = shape[-2] if len(shape) > 1 else shape[0]
    plain = key if key.endswith((".weight", ".bias")) else f"{key}.weight"
    if ".experts." not in key or "gate_up_proj" not in key:
        return [(plain, 0, rows)]
    half = rows // 2
    return [(plain.replace("gate_up_proj", part), n * half, half) for n, part in enumerate(("gate_proj", "up_proj"))]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GattError(f"{path.parent} lacks {path.name}. A Hugging Face folder holds it.")
    return read_object(path)


def _mapped(file: Path) -> dict[str, _Stored]:
    """Every tensor of a safetensors file: a length, a JSON header, then the data.

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
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > raw.size:
        raise GattError(f"{file} is cut short: {raw.size:,} bytes found, {end:,} expected. Download the checkpoint again.")
    return {
        key: _Stored(file, e["dtype"], tuple(e["shape"]), raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for key, e in header.items()
    }
