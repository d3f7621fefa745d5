"""Merge a base model (GGUF or Hugging Face folder) and a LoRA adapter into GGUF files of any
formats.

Only some rows are in memory at a time. The sum `W + scale * B @ A` is computed in float32 and
rounded once, by ggml, to the type that is stored.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf import ggml
from pipeline.gguf.adapter import apply_adapter
from pipeline.gguf.base import (
    Array,
    Base,
    Bytes,
    Metadata,
    RowOrder,
    Tensor,
    column_order,
    row_order,
)
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.formats import Format, KeyValue, uniform_format
from pipeline.gguf.gguf_base import GgufBase
from pipeline.gguf.lora.delta import Delta
from pipeline.gguf.lora.weights import read_adapter
from pipeline.system import core_count

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BLOCK = 1 << 18
"""Weights that each thread merges and rounds at a time; as float32 they fit in its cache."""
_FLUSH_BYTES = 1 << 26
"""Bytes after which a file is sent to the disk."""
_LINEAR = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|qkv|gate|output)|ffn_(gate|up|down)|inp_gate|proj|ssm_(alpha|beta|out)"
    r"|shortconv\.(in|out)_proj)\.weight|per_layer_model_proj\.weight"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """A base with an adapter, or without one, ready to be written.

    `nf4_round_trip` rounds a matrix to 4 bits and back, as the base was when the adapter was
    trained. Without it the adapter is merged into the original weights. `keys` replace keys of the
    base."""

    base: Base
    tensors: list[Tensor]
    deltas: dict[str, Delta]
    nf4_round_trip: Callable[[Array], Array] | None = None
    metadata: Metadata = field(default_factory=dict)
    keys: dict[str, KeyValue] = field(default_factory=dict)


class _MergedBlock(NamedTuple):
    """Some rows in one format, and two products of changes that tell how much of the adapter they
    hold.
    """

    stored: Bytes
    stored_change: float
    change: float


def open_base(path: Path) -> Base:
    """Open the base model in a GGUF file or in a Hugging Face folder.

    Raises:
        GattError: damaged, or of an architecture that is not supported.
    """
    return CheckpointBase(path) if path.is_dir() else GgufBase(path)


def plan_merge(
    source: Path,
    adapter: Path | None = None,
    *,
    nf4_round_trip: Callable[[Array], Array] | None = None,
    metadata: Metadata | None = None,
    keys: dict[str, KeyValue] | None = None,
) -> MergePlan:
    """Plan the merge of `source` with `adapter`, a PEFT folder.

    Raises:
        GattError: an architecture that is not supported, or an adapter of another base.
    """
    base = open_base(source)
    tensors = list(base.tensors())
    deltas: dict[str, Delta] = {}
    if adapter:
        lora = read_adapter(adapter)
        if lora.settings.init != "plain" and (nf4_round_trip or not source.is_dir()):
            raise GattError(
                f"{adapter} was trained on what {lora.settings.init} left of the base, which only "
                "its original weights tell. Give the base as a Hugging Face folder, with "
                'merge_base = "fp16".'
            )
        tensors, deltas = apply_adapter(lora, base, tensors)
    return MergePlan(
        base=base,
        tensors=tensors,
        deltas=deltas,
        nf4_round_trip=nf4_round_trip,
        metadata=metadata or {},
        keys=keys or {},
    )


def write(
    plan: MergePlan, targets: dict[Path, Format], on_tensor: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """Write one file per format, in one pass over the weights; all take their names at the end.

    Returns:
        For each file, by kind of matrix ("attn_q"), how much of the adapter's change it holds:
        `<stored - base, delta> / <delta, delta>`.

    Raises:
        GattError: weights that are NaN or infinite.
    """
    # By file and kind of matrix: the two products that `retained` divides.
    sums: list[dict[str, list[float]]] = [defaultdict(lambda: [0.0, 0.0]) for _ in targets]
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1, "blas"))  # the pool uses all cores already
        pool = stack.enter_context(ThreadPoolExecutor(core_count()))
        flusher = stack.enter_context(ThreadPoolExecutor(1))
        files = [
            _begin(plan, stack.enter_context(whole_file(path)), file_format, flusher)
            for path, file_format in targets.items()
        ]
        for file in files:
            stack.callback(file.close)
        # The next tensor is rounded to 4 bits while this one is merged.
        ready = pool.submit(_as_trained, plan, plan.tensors[0])
        for tensor, following in zip(plan.tensors, [*plan.tensors[1:], None], strict=True):
            source = ready.result()
            ready = pool.submit(_as_trained, plan, following or tensor)
            merge_rows = partial(_merge_rows, plan, source, list(targets.values()))
            for blocks in pool.map(merge_rows, *_row_ranges(tensor)):
                for file, by_kind, block in zip(files, sums, blocks, strict=True):
                    file.append(block.stored)
                    products = by_kind[tensor.name.split(".")[-2]]
                    products[0] += block.stored_change
                    products[1] += block.change
            for file in files:
                file.end_tensor()
            on_tensor()
    return [
        {kind: stored / change for kind, (stored, change) in by_kind.items() if change}
        for by_kind in sums
    ]


def file_size(plan: MergePlan, file_format: Format) -> int:
    """Return the bytes of the weights in a file of this format."""
    return sum(
        tensor.rows * ggml.row_bytes(file_format.types[tensor.name], tensor.columns)
        for tensor in plan.tensors
    )


def write_skeleton(plan: MergePlan, path: Path) -> None:
    """Write the keys and the list of tensors in F32, with a hole for the weights.

    llama.cpp chooses types from it, or reads its vocabulary.
    """
    file = _begin(plan, path, uniform_format(plan.tensors, "F32"))
    file.close()
    sizes = (-(-4 * tensor.rows * tensor.columns // 32) * 32 for tensor in plan.tensors)
    os.truncate(path, path.stat().st_size + sum(sizes))


class _GgufFile:
    """A GGUF file whose keys and tensor list are written, and to which weights are appended.

    `flusher` sends them to the disk meanwhile, instead of all at the end.
    """

    def __init__(self, writer: GGUFWriter, flusher: Executor | None) -> None:
        self._writer, self._out, self._flusher = writer, writer.fout[0], flusher
        self._flushed: Future[None] | None = None
        self._unflushed_bytes = 0
        writer.write_padding(self._out, self._out.tell())
        self._tensor_bytes = 0

    def append(self, stored: Bytes) -> None:
        """Append some rows of the current tensor."""
        self._out.write(stored)
        self._tensor_bytes += stored.nbytes

    def end_tensor(self) -> None:
        """Pad the current tensor, and flush from time to time."""
        self._writer.write_padding(self._out, self._tensor_bytes)
        self._unflushed_bytes += self._tensor_bytes
        self._tensor_bytes = 0
        idle = self._flushed is None or self._flushed.done()
        if self._flusher and idle and self._unflushed_bytes > _FLUSH_BYTES:
            self._flushed = self._flusher.submit(os.fsync, self._out.fileno())
            self._unflushed_bytes = 0

    def close(self) -> None:
        """Wait for the last flush, and close the file."""
        try:
            if self._flushed:
                self._flushed.result()
        finally:
            self._writer.close()


def _begin(
    plan: MergePlan, path: Path, file_format: Format, flusher: Executor | None = None
) -> _GgufFile:
    """Write everything of a file but the weights."""
    import gguf

    writer = gguf.GGUFWriter(path, plan.base.architecture)
    for tensor in plan.tensors:
        kind = gguf.GGMLQuantizationType(file_format.types[tensor.name])
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    plan.base.write_fields(writer, plan.metadata)
    writer.add_uint32(gguf.Keys.General.FILE_TYPE, file_format.file_type)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    for name, value in {**plan.keys, **file_format.keys}.items():
        writer.kv_data[0].pop(name, None)
        add[type(value)](name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return _GgufFile(writer, flusher)


def _row_ranges(tensor: Tensor) -> tuple[list[int], list[int]]:
    """Return first and last rows of the blocks to merge; none spans two experts."""
    rows_per_matrix = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    step = max(1, _BLOCK // tensor.columns)
    firsts = [
        first
        for start in range(0, tensor.rows, rows_per_matrix)
        for first in range(start, start + rows_per_matrix, step)
    ]
    ends = [(first // rows_per_matrix + 1) * rows_per_matrix for first in firsts]
    return firsts, [min(first + step, end) for first, end in zip(firsts, ends, strict=True)]


def _as_trained(plan: MergePlan, tensor: Tensor) -> Tensor:
    """Return the tensor as in training: linear projections are rounded to 4 bits, or are what the
    adapter's initialization left of them.

    The blocks of the rounding follow Hugging Face's order of rows.
    """
    delta, base = plan.deltas.get(tensor.name), plan.base
    columns = column_order(base, tensor.name, tensor.columns)
    if delta and delta.init != "plain":
        residual = _in_order(tensor.load(0, tensor.rows), None, columns, delta.residual)
        return Tensor(tensor.name, tensor.shape, lambda first, last: residual[first:last])
    if plan.nf4_round_trip is None or not _LINEAR.fullmatch(tensor.name):
        return tensor
    order = row_order(base, tensor.name, tensor.rows)
    rounded = _in_order(_as_read(base, tensor), order, columns, plan.nf4_round_trip)
    return Tensor(tensor.name, tensor.shape, lambda first, last: rounded[first:last])


def _as_read(base: Base, tensor: Tensor) -> Array:
    """Return a matrix as training reads it: a checkpoint made of a GGUF is in bfloat16."""
    from gguf import GGMLQuantizationType, quants

    weights, bfloat16 = tensor.load(0, tensor.rows), GGMLQuantizationType.BF16
    if isinstance(base, GgufBase):
        weights = quants.dequantize(quants.quantize(weights, bfloat16), bfloat16)
    return weights


def _in_order(
    weights: Array,
    order: RowOrder | None,
    columns: RowOrder | None,
    change: Callable[[Array], Array],
) -> Array:
    """Return what `change` makes of a matrix whose rows and columns are in these orders."""
    if columns is not None:
        inverse = np.argsort(columns)
        return _in_order(weights[:, inverse], order, None, change)[:, columns]
    if order is None:
        return change(weights)
    return change(weights[np.argsort(order)])[order]


def _merge_rows(
    plan: MergePlan, tensor: Tensor, formats: Sequence[Format], first: int, last: int
) -> list[_MergedBlock]:
    """Return some rows of the sum in each format."""
    weights = tensor.load(first, last)
    if not np.isfinite(weights.sum()):
        raise GattError(
            f"{tensor.name} of the base holds NaN or infinity. Download the model again."
        )
    delta = plan.deltas.get(tensor.name)
    change = delta.change(weights, first, last) if delta else None
    merged = weights if change is None else weights + change
    blocks = []
    for file_format in formats:
        kind, importance = file_format.types[tensor.name], file_format.importance.get(tensor.name)
        columns = None if importance is None else importance[first // tensor.shape[-2]]
        stored = ggml.quantize(merged, kind, columns)
        if change is None:
            blocks.append(_MergedBlock(stored, 0.0, 0.0))
            continue
        stored_change = ggml.dequantize(stored, kind, tensor.columns) - weights
        products = float(np.vdot(stored_change, change)), float(np.vdot(change, change))
        blocks.append(_MergedBlock(stored, *products))
    return blocks
