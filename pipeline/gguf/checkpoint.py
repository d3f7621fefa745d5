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
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, Tensor, row_order
from pipeline.gguf.families import extra_tensors, family_of
from pipeline.gguf.vocabulary import Vocabulary, read_object

_KINDS = {"F32": 0, "F16": 1, "BF16": 30}
"""The types of safetensors that are read, as ggml numbers them."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor of a safetensors file: where it stands, and its bytes in the mapped file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: Any

    def load(self, rows: Any) -> Array:
        """(rows, columns) float32 of a slice or list of rows; a vector is one row.

        Raises:
            GattError: a type other than F32, F16 or BF16.
        """
        if self.dtype not in _KINDS:
            raise GattError(
                f"{self.file}: weights of type {self.dtype} found; F32, F16 or BF16 expected."
            )
        kind, columns = _KINDS[self.dtype], self.shape[-1]
        return ggml.dequantize(
            np.asarray(self.data).reshape(-1, ggml.row_bytes(kind, columns))[rows], kind, columns
        )


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

    def write_fields(self, writer: Any, about: dict[str, Any]) -> None:
        """What the model is, its hyperparameters, vocabulary, special tokens and chat template."""
        import gguf

        total, *sizes = writer.get_total_parameter_count()
        known = gguf.Metadata.load(None, self.folder, None, total)
        known.name = known.name or self.folder.name
        known.size_label = known.size_label or (
            gguf.size_label(total, *sizes) if total > 0 else None
        )
        for key, value in about.items():
            setattr(known, key, value)
        writer.add_type(gguf.GGUFType.MODEL)
        known.set_gguf_meta_model(writer)
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
            yield Tensor(name, values.shape, partial(_rows_of, values))
        for key, parts in self._by_key().items():
            if self.family.without_head and key == "lm_head.weight":
                continue
            for source, first, rows in _split(key, parts[0].shape):
                gguf_name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if gguf_name is None:
                    raise GattError(
                        f"{parts[0].file} holds {key}, which has no place in a {self.architecture} GGUF."
                    )
                yield self._tensor(gguf_name, parts, first, rows)

    def _tensor(self, name: str, parts: list[SafetensorsTensor], first: int, rows: int) -> Tensor:
        """`rows` rows from `first` on of the last but one axis; several parts are the experts of one matrix."""
        shape = parts[0].shape
        if name == "token_embd.weight" and self.architecture == "gemma3":
            rows = min(rows, self._vocabulary.size)  # rows that no token has
        shape = (*shape[:-2], rows, shape[-1]) if len(shape) > 1 else (rows,)
        if len(parts) > 1:
            shape = (len(parts), *shape)
        order = row_order(self, name, rows)
        shift = np.float32(self.family.norm_shift if name.endswith("norm.weight") else 0)

        def load(begin: int, end: int) -> Array:
            expert, begin = divmod(begin, rows)
            end -= expert * rows
            source, before = (
                (parts[expert], 0) if len(parts) > 1 else (parts[0], expert * parts[0].shape[-2])
            )
            if order is None:
                return source.load(slice(before + first + begin, before + first + end)) + shift
            return source.load(order[begin:end])

        def load_vector(begin: int, end: int) -> Array:
            vector = parts[0].load(slice(0, 1)) + shift
            return vector if order is None else vector[:, order]

        return Tensor(name, shape, load if len(shape) > 1 else load_vector)

    def _by_key(self) -> dict[str, list[SafetensorsTensor]]:
        """Every stored tensor by its key; the experts of one matrix together, under the key without their numbers."""
        found: dict[str, list[SafetensorsTensor]] = {}
        experts: dict[str, dict[int, SafetensorsTensor]] = {}
        for file in shards(self.folder):
            for key, stored in open_safetensors(file).items():
                if expert := _EXPERT.fullmatch(key):
                    experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = stored
                else:
                    found[key] = [stored]
        return found | {
            key: [numbered[n] for n in sorted(numbered)] for key, numbered in experts.items()
        }


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        GattError: one is missing, or the weights are a pickle.
    """
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(_json(index)["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        pickled = next(folder.glob("pytorch_model*.bin"), None)
        advice = (
            f"{pickled.name} is a pickle, which may run code: save it as safetensors."
            if pickled
            else "Download it again."
        )
        raise GattError(f"{folder} lacks {missing[0]}. {advice}")
    return [folder / name for name in names]


def _rows_of(values: Array, begin: int, end: int) -> Array:
    return values.reshape(-1, values.shape[-1])[begin:end]


def _split(key: str, shape: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """(key, first row, rows) of the matrices that a stored one holds: experts keep gate and up in one."""
    rows = shape[-2] if len(shape) > 1 else shape[0]
    plain = key if key.endswith((".weight", ".bias")) else f"{key}.weight"
    if ".experts." not in key or "gate_up_proj" not in key:
        return [(plain, 0, rows)]
    half = rows // 2
    return [
        (plain.replace("gate_up_proj", part), n * half, half)
        for n, part in enumerate(("gate_proj", "up_proj"))
    ]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise GattError(f"{path.parent} lacks {path.name}. A Hugging Face folder holds it.")
    return read_object(path)


def open_safetensors(file: Path) -> dict[str, SafetensorsTensor]:
    """Every tensor of a safetensors file: a length, a JSON header, then the data.

    Raises:
        GattError: the file is damaged or cut short.
    """
    raw = np.memmap(file, np.uint8, "r")
    try:
        start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8:start].tobytes())
    except ValueError as error:
        raise GattError(
            f"{file} is not a safetensors file ({error}). Download the checkpoint again."
        ) from error
    header.pop("__metadata__", None)
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end > raw.size:
        raise GattError(
            f"{file} is cut short: {raw.size:,} bytes found, {end:,} expected. Download the checkpoint again."
        )
    return {
        key: SafetensorsTensor(
            file,
            e["dtype"],
            tuple(e["shape"]),
            raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]],
        )
        for key, e in header.items()
    }
