"""An importance matrix: the mean square of each input column of each weight matrix.

Quantizers round the more important columns more carefully. The sums are collected through
llama.cpp's `cb_eval` and stored as `llama-imatrix` does (source package of llama-cpp-python
0.3.36)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.files import whole_file
from pipeline.gguf import ggml
from pipeline.gguf.base import Array

CHUNK_TOKENS = 512
"""Tokens of a text that are read; longer texts are truncated."""
_Doubles = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _MatrixSums:
    """Sums of one matrix: `squares` (experts, columns) of its inputs, and `counts` (experts) of
    their rows.
    """

    squares: _Doubles
    counts: _Doubles


class ImportanceMatrix:
    """Sums over all matrices of a model, collected while llama.cpp evaluates its graph."""

    def __init__(self) -> None:
        self._sums: dict[str, _MatrixSums] = {}
        self.tokens = 0

    @property
    def chunks(self) -> int:
        """Chunks of `CHUNK_TOKENS` tokens that were read, rounded up."""
        return -(-self.tokens // CHUNK_TOKENS)

    def observe(self, address: int, ask: bool) -> bool:  # noqa: FBT001
        """Collect the inputs of a product with a weight; llama.cpp's callback `cb_eval`.

        It is called twice for each node: before it is computed, to `ask` whether the node is
        wanted, and afterwards. Returning True asks for the node, or continues."""
        node = ggml.Node.from_address(address)
        operation = ggml.operation(node.op)
        if operation not in ("MUL_MAT", "MUL_MAT_ID"):
            return not ask
        weight = node.src[0].contents
        name = weight.name.decode(errors="replace")
        # Other products are those of the KV cache and of the adapter.
        if not name.startswith("blk.") or not name.endswith(".weight"):
            return not ask
        if not ask:
            inputs = ggml.read_node(node.src[1].contents, np.float32)
            sums = self._sums_of(name, experts=weight.ne[2], columns=inputs.shape[-1])
            if operation == "MUL_MAT_ID":
                _add_experts(sums, inputs[0], ggml.read_node(node.src[2].contents, np.int32))
            else:
                _add(sums, inputs)
        return True

    def _sums_of(self, name: str, experts: int, columns: int) -> _MatrixSums:
        if name not in self._sums:
            self._sums[name] = _MatrixSums(np.zeros((experts, columns)), np.zeros(experts))
        return self._sums[name]

    def by_tensor(self) -> dict[str, Array]:
        """Return (experts, columns) float32 means of squares; 1 for an expert never used."""
        means = {}
        for name, sums in self._sums.items():
            counts = sums.counts[:, None]
            mean = np.where(counts > 0, sums.squares / np.maximum(counts, 1), 1)
            means[name] = mean.astype(np.float32)
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
            writer.add_uint32("imatrix.chunk_size", CHUNK_TOKENS)
            for name, sums in sorted(self._sums.items()):
                writer.add_tensor(f"{name}.in_sum2", sums.squares.astype(np.float32))
                writer.add_tensor(f"{name}.counts", sums.counts.astype(np.float32)[:, None])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()


def _add(sums: _MatrixSums, inputs: Array) -> None:
    """Add the inputs (..., rows, columns) of a plain matrix."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    sums.squares[:] += np.einsum("rc,rc->c", rows, rows)
    sums.counts[:] += len(rows)


def _add_experts(sums: _MatrixSums, inputs: Array, ids: _Ids) -> None:
    """Add inputs (tokens, experts used or 1, columns) to the experts `ids` (..., tokens, experts
    used).
    """
    tokens, _, columns = inputs.shape
    squares = np.broadcast_to(inputs * inputs, (tokens, ids.shape[-1], columns))
    experts = ids.reshape(-1)
    np.add.at(sums.squares, experts, squares.reshape(-1, columns))
    np.add.at(sums.counts, experts, 1)
