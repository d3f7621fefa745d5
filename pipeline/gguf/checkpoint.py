"""A Hugging Face checkpoint as llama.cpp's converter writes it: GGUF keys, vocabulary, tensors by
GGUF name.

Weights are memory-mapped, never loaded as one. `safetensors.safe_open` cannot do this: with NumPy
it has no bfloat16, and with PyTorch its slices are copies in PyTorch's memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, Bytes, JsonObject, Metadata, RowOrder, Tensor, row_order
from pipeline.gguf.families import extra_tensors, family_of
from pipeline.gguf.vocabulary import Vocabulary, read_object

if TYPE_CHECKING:
    from gguf import GGUFWriter

_GGML_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
"""The supported types of safetensors, and ggml's numbers of them."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor of a safetensors file, with its bytes in the mapped file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    def load(self, rows: slice | RowOrder) -> Array:
        """Return (rows, columns) float32 of some rows; a vector is one row.

        Raises:
            GattError: a type other than F32, F16 or BF16.
        """
        if self.dtype not in _GGML_TYPES:
            raise GattError(
                f"{self.file}: weights of type {self.dtype} found; F32, F16 or BF16 expected."
            )
        kind, columns = _GGML_TYPES[self.dtype], self.shape[-1]
        stored = np.asarray(self.data).reshape(-1, ggml.row_bytes(kind, columns))
        return ggml.dequantize(stored[rows], kind, columns)


class _Part(NamedTuple):
    """A matrix within a stored tensor: `rows` rows of the second last axis, from `first` on."""

    key: str
    first: int
    rows: int


class CheckpointBase:
    """A folder with `config.json`, a tokenizer and safetensors, sharded or not.

    Raises:
        GattError: a file is missing, or the architecture or the tokenizer is not supported.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _require_json(folder / "config.json")
        self.family = family_of(config, str(folder))
        self.config = {**config, **config.get("text_config", {})}
        self.architecture, self.interleaved = self.family.architecture, self.family.interleaved
        self.layers = int(self.config["num_hidden_layers"])
        self.heads = int(self.config["num_attention_heads"])
        self.key_heads = int(self.config.get("num_key_value_heads") or self.heads)
        self.name = folder.name
        self._vocabulary = Vocabulary(folder, self.config, self.architecture)
        self._extra = extra_tensors(self.family, self.config)

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
        for name, value in self.family.keys(self.config).items():
            if value is not None:
                getattr(writer, f"add_{name}")(value)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self._vocabulary.write(writer)

    def tensors(self) -> Iterator[Tensor]:
        """Yield every weight by its GGUF name, in llama.cpp's layout."""
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.architecture.upper()], self.layers)
        for name, values in self._extra.items():
            yield Tensor(name, values.shape, partial(_slice_rows, values))
        for key, stored in self._by_key().items():
            if self.family.without_head and key == "lm_head.weight":
                continue
            for part in _split_gate_up(key, stored[0].shape):
                gguf_name = names.get_name(part.key, try_suffixes=(".weight", ".bias"))
                if gguf_name is None:
                    raise GattError(
                        f"{stored[0].file} holds {key}, which has no place in a "
                        f"{self.architecture} GGUF."
                    )
                yield self._tensor(gguf_name, stored, part)

    def _tensor(self, name: str, stored: list[SafetensorsTensor], part: _Part) -> Tensor:
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

    def _by_key(self) -> dict[str, list[SafetensorsTensor]]:
        """Return every stored tensor by its key.

        The experts of one matrix come together, under the key without their numbers.
        """
        by_key: dict[str, list[SafetensorsTensor]] = {}
        experts: dict[str, dict[int, SafetensorsTensor]] = {}
        for file in shards(self.folder):
            for key, stored in open_safetensors(file).items():
                if expert := _EXPERT.fullmatch(key):
                    experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = stored
                else:
                    by_key[key] = [stored]
        return by_key | {
            key: [numbered[n] for n in sorted(numbered)] for key, numbered in experts.items()
        }


def _load_rows(stored: SafetensorsTensor, start: int, shift: float, first: int, last: int) -> Array:
    """Load rows `first` to `last` of the matrix that begins in row `start` (a vector is one row).

    `shift` is added: Gemma multiplies by 1 + the stored weights of its norms.
    """
    return stored.load(slice(start + first, start + last)) + np.float32(shift)


def _load_reordered_rows(
    stored: SafetensorsTensor, order: RowOrder, first: int, last: int
) -> Array:
    """Load rows of q or k, which llama.cpp stores in another order."""
    return stored.load(order[first:last])


def _load_reordered_vector(
    stored: SafetensorsTensor, order: RowOrder, first: int, last: int
) -> Array:
    """Load the bias of q or k, whose entries are in the order of its matrix's rows."""
    return _load_rows(stored, 0, 0.0, first, last)[:, order]


def _load_expert_rows(
    stored: list[SafetensorsTensor], start: int, rows: int, first: int, last: int
) -> Array:
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


def shards(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    Raises:
        GattError: one is missing, or the weights are a pickle.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(_require_json(index)["weight_map"].values()))
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


def _require_json(path: Path) -> JsonObject:
    if not path.is_file():
        raise GattError(f"{path.parent} lacks {path.name}. A Hugging Face folder holds it.")
    return read_object(path)


def open_safetensors(file: Path) -> dict[str, SafetensorsTensor]:
    """Map every tensor of a safetensors file: a length, a JSON header, then the data.

    Raises:
        GattError: the file is damaged or truncated.
    """
    raw = np.memmap(file, np.uint8, "r")
    try:
        data_start = 8 + int(raw[:8].view("<u8")[0])
        header = json.loads(raw[8:data_start].tobytes())
    except ValueError as error:
        raise GattError(
            f"{file} is not a safetensors file ({error}). Download the checkpoint again."
        ) from error
    header.pop("__metadata__", None)
    size = data_start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size > raw.size:
        raise GattError(
            f"{file} is cut short: {raw.size:,} bytes found, {size:,} expected. "
            "Download the checkpoint again."
        )
    tensors = {}
    for key, entry in header.items():
        first, last = (data_start + offset for offset in entry["data_offsets"])
        tensors[key] = SafetensorsTensor(
            file, entry["dtype"], tuple(entry["shape"]), raw[first:last]
        )
    return tensors
