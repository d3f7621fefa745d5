"""An importance matrix: the mean square of each input column of each weight matrix.

Quantizers round the columns that matter more carefully. Collected through llama.cpp's `cb_eval` and stored like
`llama-imatrix` does (source package of llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.files import whole_file
from pipeline.gguf import ggml
from pipeline.gguf.base import Array

TEXT_TOKENS = 512
"""Tokens of a text that are read; longer ones are cut."""


class _Node(ctypes.Structure):
    """`struct ggml_tensor`."""


_Node._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Node) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
]  # fmt: skip


@dataclass(slots=True)
class _Sums:
    """Of one matrix, for each of its experts: squares of what came in, by column, and how many rows came."""

    squares: npt.NDArray[np.float64]
    counts: npt.NDArray[np.float64]


class ImportanceMatrix:
    """Sums over all matrices of a model: an observer of llama.cpp's graph."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}
        self.tokens = 0

    @property
    def chunks(self) -> int:
        """Texts' worth of tokens that were read."""
        return -(-self.tokens // TEXT_TOKENS)

    def observe(self, address: int, ask: bool) -> bool:
        """`cb_eval`: whether a node is a product with a weight, and then the sum over what came in."""
        node = _Node.from_address(address)
        operation = ggml.operation(node.op)
        if operation not in ("MUL_MAT", "MUL_MAT_ID"):
            return not ask
        weight = node.src[0].contents
        name = weight.name.decode(errors="replace")
        if not name.startswith("blk.") or not name.endswith(
            ".weight"
        ):  # the cache's products, and the adapter's own
            return not ask
        if not ask:
            ids = _read(node.src[2].contents, np.int32) if operation == "MUL_MAT_ID" else None
            self._add(name, weight.ne[2], _read(node.src[1].contents, np.float32), ids)
        return True

    def _add(self, name: str, experts: int, rows: Any, ids: Any) -> None:
        """`rows`: (..., rows, columns) into the matrix; `ids`: (tokens, used experts), or None."""
        found = self._sums.get(name)
        if found is None:
            found = self._sums[name] = _Sums(np.zeros((experts, rows.shape[-1])), np.zeros(experts))
        if ids is None:
            flat = rows.reshape(-1, rows.shape[-1])
            found.squares += np.einsum("rc,rc->c", flat, flat)
            found.counts += len(flat)
            return
        rows = rows[0]  # (tokens, used or 1, columns)
        squares = np.broadcast_to(rows * rows, (len(rows), ids.shape[-1], rows.shape[-1])).reshape(
            -1, rows.shape[-1]
        )
        chosen = ids.reshape(-1)
        np.add.at(found.squares, chosen, squares)
        np.add.at(found.counts, chosen, 1)

    def by_tensor(self) -> dict[str, Array]:
        """(experts, columns) float32 means of squares; 1 where an expert was never asked."""
        means = {}
        for name, sums in self._sums.items():
            asked = sums.counts[:, None] > 0
            means[name] = np.where(
                asked, sums.squares / np.maximum(sums.counts[:, None], 1), 1
            ).astype(np.float32)
        return means

    def save(self, target: Path, dataset: str) -> None:
        """Write llama.cpp's imatrix GGUF: `NAME.in_sum2` and `NAME.counts` for each matrix."""
        import gguf

        with whole_file(target) as draft:
            writer = gguf.GGUFWriter(draft, "")
            writer.kv_data[0].pop("general.architecture", None)
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", [dataset])
            writer.add_uint32("imatrix.chunk_count", self.chunks)
            writer.add_uint32("imatrix.chunk_size", TEXT_TOKENS)
            for name, sums in sorted(self._sums.items()):
                writer.add_tensor(f"{name}.in_sum2", sums.squares.astype(np.float32))
                writer.add_tensor(f"{name}.counts", sums.counts.astype(np.float32)[:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()


def _read(node: Any, kind: Any) -> Any:
    """A node's values, wherever the backend keeps them, with its axes as NumPy has them."""
    shape = tuple(reversed(node.ne))
    raw = ggml.read_node(ctypes.addressof(node))
    return np.lib.stride_tricks.as_strided(raw.view(kind), shape, tuple(reversed(node.nb)))
