"""Base model (GGUF or Hugging Face folder) plus LoRA adapter → GGUF in any formats, some rows in memory at a time.

The sum `W + scale * B @ A` is taken in float32 and rounded once, by ggml, to the type that is stored.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf import ggml
from pipeline.gguf.adapter import Delta, read_adapter, to_gguf_names
from pipeline.gguf.base import Array, Base, Tensor, row_order
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.reader import open_gguf

UNIFORM_FORMATS = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
}
"""The formats whose types follow from the tensor alone, and their names as file types; of others llama.cpp decides."""
_BLOCK = 1 << 18
"""Weights that are summed and rounded at a time by each thread: as float32 they stay in its cache."""
_FLUSH = 1 << 26
"""Bytes after which a file is sent to the disk."""
_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))\.weight")


@dataclass(frozen=True, slots=True)
class Format:
    """How a file stores its tensors: llama.cpp's number of the file type, and the ggml type of each tensor.

    `importance` is that of the columns of a matrix (one row for each expert), and `keys` say in the file what it came from.
    """

    file_type: int
    types: dict[str, int]
    importance: dict[str, Array] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A base with an adapter on it, or none.

    `four_bits` rounds a matrix to 4 bits and back, as the base was when the adapter was trained on it; without it, the
    adapter is laid on the weights as they are. `about` is what the file says of itself, by the fields of `gguf.Metadata`;
    `keys` replace others of the base's keys.
    """

    base: Base
    tensors: list[Tensor]
    deltas: dict[str, Delta]
    nf4_round_trip: Callable[[Array], Array] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


def open_base(path: Path) -> Base:
    """The base in a GGUF file or in a Hugging Face folder.

    Raises:
        GattError: broken, or of an architecture that is not known here.
    """
    return CheckpointBase(path) if path.is_dir() else GgufBase(path)


class GgufBase:
    """A GGUF file; every key of it, its tokenizer and chat template among them, is copied as it stands."""

    def __init__(self, path: Path) -> None:
        self._info = info = open_gguf(path)
        self.name, self.architecture, self.layers = path.name, info.architecture, info.layers
        family = next((f for f in FAMILIES.values() if f.architecture == info.architecture), None)
        if family is None:
            known = ", ".join(sorted({f.architecture for f in FAMILIES.values()}))
            raise GattError(
                f"{path.name} is of architecture {info.architecture!r}; this version can export {known}."
            )
        self.interleaved = family.interleaved
        self.heads = int(info.field(f"{info.architecture}.attention.head_count"))
        self.key_heads = int(info.field(f"{info.architecture}.attention.head_count_kv", self.heads))

    def write_fields(self, writer: Any, about: dict[str, Any]) -> None:
        """Copy them."""
        import gguf

        told = (
            ("general.name", "general.finetune", "general.base_model", "general.dataset")
            if about
            else ()
        )
        replaced = ("general.architecture", "general.file_type", "quantize.imatrix", *told)
        for name, held in self._info.fields.items():
            if not name.startswith(replaced):
                items = None if held.items is None else gguf.GGUFValueType(held.items)
                writer.add_key_value(name, held.value, gguf.GGUFValueType(held.kind), items)
        if about:
            gguf.Metadata(
                name=self._info.field("general.name", self.name), **about
            ).set_gguf_meta_model(writer)

    def tensors(self) -> Iterator[Tensor]:
        """Every weight, dequantized when it is loaded."""
        for name, shape, kind, data in self._info.tensors:
            yield Tensor(name, shape, partial(_dequantized, data, kind, shape[-1]))


def _dequantized(stored: Any, kind: int, columns: int, first: int, last: int) -> Array:
    return ggml.dequantize(stored[first:last], kind, columns)


def plan_merge(
    source: Path,
    adapter: Path | None,
    four_bits: Callable[[Array], Array] | None = None,
    about: dict[str, Any] | None = None,
    keys: dict[str, Any] | None = None,
) -> MergePlan:
    """`source` with `adapter` (a PEFT folder, or None), yet to be written.

    Raises:
        GattError: an architecture that is not known here, or an adapter of another base.
    """
    base = open_base(source)
    tensors = list(base.tensors())
    deltas = to_gguf_names(read_adapter(adapter), base, tensors) if adapter else {}
    return MergePlan(base, tensors, deltas, four_bits, about or {}, keys or {})


def uniform_format(tensors: list[Tensor], format_name: str) -> Format:
    """A format of `UNIFORM_FORMATS` for these tensors, in the types of llama.cpp's converter: vectors, norms and routers stay F32."""
    import gguf

    types = {}
    for tensor in tensors:
        small = (
            len(tensor.shape) < 2
            or tensor.name.endswith("_norm.weight")
            or ".ffn_gate_inp." in tensor.name
        )
        plain = "F16" if format_name == "Q8_0" and tensor.columns % 32 else format_name
        types[tensor.name] = int(
            gguf.GGMLQuantizationType[
                "F32" if small or not tensor.name.endswith(".weight") else plain
            ]
        )
    return Format(int(gguf.LlamaFileType[UNIFORM_FORMATS[format_name]]), types)


def write(
    whole: MergePlan, targets: dict[Path, Format], on_tensor: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """Write one file for each format, in one pass over the weights; nothing stands under a name before all are whole.

    Returns:
        For each file, by kind of matrix ("attn_q"), how much of the adapter's change it holds:
        `<stored - base, delta> / <delta, delta>`.

    Raises:
        GattError: weights that are no numbers.
    """
    kept: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0.0]) for _ in targets]
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1, "blas"))  # the pool has all cores already
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        flusher = stack.enter_context(ThreadPoolExecutor(1))
        files = [
            _begin(whole, stack.enter_context(whole_file(path)), how, flusher)
            for path, how in targets.items()
        ]
        for file in files:
            stack.callback(file.close)
        ready = pool.submit(_as_trained, whole, whole.tensors[0])
        for tensor, following in zip(whole.tensors, [*whole.tensors[1:], None], strict=True):
            source = ready.result()
            ready = pool.submit(_as_trained, whole, following or tensor)
            blocks = pool.map(
                partial(_merge_rows, whole, source, list(targets.values())), *_ranges(tensor)
            )
            for block in blocks:
                for file, sums, (stored, shares) in zip(files, kept, block, strict=True):
                    file.append(stored)
                    for n, share in enumerate(shares):
                        sums[tensor.name.split(".")[-2]][n] += share
            for file in files:
                file.pad()
            on_tensor()
    return [
        {kind: held / wanted for kind, (held, wanted) in sums.items() if wanted} for sums in kept
    ]


def file_size(whole: MergePlan, how: Format) -> int:
    """Bytes of the data of a file in the format `how`."""
    return sum(
        tensor.rows * ggml.row_bytes(how.types[tensor.name], tensor.columns)
        for tensor in whole.tensors
    )


def write_skeleton(whole: MergePlan, path: Path) -> None:
    """A file of the keys and tensors of `whole` in F32, with a hole for the data: what llama.cpp needs to choose types."""
    file = _begin(whole, path, uniform_format(whole.tensors, "F32"))
    file.close()
    sizes = (-(-4 * tensor.rows * tensor.columns // 32) * 32 for tensor in whole.tensors)
    os.truncate(path, path.stat().st_size + sum(sizes))


class _File:
    """A GGUF whose keys and list of tensors are written, and whose data come piece by piece.

    They go to the disk meanwhile (`flusher`), not all at the end.
    """

    def __init__(self, writer: Any, flusher: Executor | None) -> None:
        self._writer, self._out, self._flusher = writer, writer.fout[0], flusher
        self._flushed: Future[None] | None = None
        self._waiting = 0
        writer.write_padding(self._out, self._out.tell())
        self._bytes = 0

    def append(self, stored: Any) -> None:
        """Some rows of the tensor in hand."""
        self._out.write(stored)
        self._bytes += stored.nbytes

    def pad(self) -> None:
        """End of a tensor."""
        self._writer.write_padding(self._out, self._bytes)
        self._waiting += self._bytes
        self._bytes = 0
        if (
            self._flusher
            and self._waiting > _FLUSH
            and (self._flushed is None or self._flushed.done())
        ):
            self._flushed, self._waiting = self._flusher.submit(os.fsync, self._out.fileno()), 0

    def close(self) -> None:
        """Flush and close."""
        try:
            if self._flushed:
                self._flushed.result()
        finally:
            self._writer.close()


def _begin(whole: MergePlan, draft: Path, how: Format, flusher: Executor | None = None) -> _File:
    import gguf

    writer = gguf.GGUFWriter(draft, whole.base.architecture)
    for tensor in whole.tensors:
        kind = gguf.GGMLQuantizationType(how.types[tensor.name])
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    whole.base.write_fields(writer, whole.about)
    writer.add_uint32(gguf.Keys.General.FILE_TYPE, how.file_type)
    for name, value in {**whole.keys, **how.keys}.items():
        writer.kv_data[0].pop(name, None)
        plan_merge = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}[
            type(value)
        ]
        plan_merge(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return _File(writer, flusher)


def _ranges(tensor: Tensor) -> tuple[list[int], list[int]]:
    """First and last rows of the blocks that a tensor is done in; none crosses the bound between two experts."""
    matrix = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, _BLOCK // tensor.columns)
    firsts = [
        first
        for start in range(0, tensor.rows, matrix)
        for first in range(start, start + matrix, step)
    ]
    return firsts, [min(first + step, (first // matrix + 1) * matrix) for first in firsts]


def _as_trained(whole: MergePlan, tensor: Tensor) -> Tensor:
    """The tensor as training had it: a linear projection in 4 bits, in Hugging Face's order of rows."""
    if whole.nf4_round_trip is None or not _LINEAR.fullmatch(tensor.name):
        return tensor
    if len(tensor.shape) > 2:
        raise GattError(
            f'{tensor.name}: experts are not rounded to 4 bits as training does it. Take merge_onto = "fp16".'
        )
    order = row_order(whole.base, tensor.name, tensor.rows)
    rows = tensor.load(0, tensor.rows)
    if order is not None:
        there = np.empty_like(rows)
        there[order] = rows
        rows = there
    rounded = whole.nf4_round_trip(rows)
    rounded = rounded if order is None else rounded[order]
    return Tensor(tensor.name, tensor.shape, lambda first, last: rounded[first:last])


def _merge_rows(
    whole: MergePlan, tensor: Tensor, formats: list[Format], first: int, last: int
) -> list[tuple[Any, tuple[float, float]]]:
    """Some rows of the sum in each format, with the two products that tell how much of the change they hold."""
    weights = tensor.load(first, last)
    if not np.isfinite(weights.sum()):
        raise GattError(
            f"{tensor.name} of the base holds NaN or infinity. Download the model again."
        )
    delta = whole.deltas.get(tensor.name)
    change = delta.change(weights, first, last) if delta else None
    total = weights if change is None else weights + change
    done = []
    for how in formats:
        kind, importance = how.types[tensor.name], how.importance.get(tensor.name)
        columns = None if importance is None else importance[first // tensor.shape[-2]]
        stored = ggml.quantize(total, kind, columns)
        shares = (0.0, 0.0)
        if change is not None:
            held = ggml.dequantize(stored, kind, tensor.columns) - weights
            shares = (float(np.vdot(held, change)), float(np.vdot(change, change)))
        done.append((stored, shares))
    return done
