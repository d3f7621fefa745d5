"""What a GGUF stores of a checkpoint: which weights a model needs, and in what order and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array, Base, RowOrder, column_order, row_order

Load = Callable[[slice | RowOrder], Array]
"""Loads some rows of a stored tensor, (rows, columns) float32; a vector is one row."""

_ENDINGS = {"ssm_a": "", "ssm_dt": ".bias"}
"""Of parts that have another ending than ".weight"; the decay of linear attention has none."""


def require_tensors(
    parts: Mapping[str, Collection[str]],
    kinds: Sequence[str],
    names: Collection[str],
    needed: Mapping[str, str],
    source: str,
) -> None:
    """Check that a model has all weights that it needs, by llama.cpp's names.

    `parts` are those of a layer by its kind, and `kinds` those of all layers. `needed` are the
    other names, with what error messages call them.

    Raises:
        GattError: one is missing.
    """
    # A layer has what its family needs, and whatever another layer of its kind has.
    of_kind = {
        kind: {f"{part}{_ENDINGS.get(part, '.weight')}" for part in parts[kind]} for kind in kinds
    }
    for name in names:
        head, number, part = (*name.split(".", 2), "", "")[:3]
        if head == "blk" and number.isdecimal() and int(number) < len(kinds):
            of_kind[kinds[int(number)]].add(part)
    texts = dict(needed)
    for layer, kind in enumerate(kinds):
        for part in sorted(of_kind[kind]):
            texts[f"blk.{layer}.{part}"] = f"{part.rpartition('.')[0] or part} of layer {layer}"
    missing = [text for name, text in texts.items() if name not in names]
    if missing:
        more = f" and {len(missing) - 1} others are" if len(missing) > 1 else " is"
        raise GattError(
            f"{source} is incomplete: {missing[0]}{more} missing. Download the model again."
        )


def gguf_rows(
    base: Base, name: str, shape: tuple[int, ...], load: Load, *, start: int = 0
) -> Callable[[int, int], Array]:
    """Return what loads some rows of the GGUF tensor `name`, of `shape`, from a stored one.

    The values begin in the stored row `start`. Rows, columns and values come as llama.cpp has them.
    """
    order = row_order(base, name, shape[-2] if len(shape) > 1 else shape[0])
    columns = column_order(base, name, shape[-1])
    if order is not None and len(shape) == 1:
        order, columns = None, order
    change = to_gguf(name, base.family.norm_shift)
    return partial(_load_rows, load, start if order is None else order, columns, change)


def _load_rows(
    load: Load,
    start: int | RowOrder,
    columns: RowOrder | None,
    change: Callable[[Array], Array] | None,
    first: int,
    last: int,
) -> Array:
    """Load rows `first` to `last` of those from `start` on, or of those that it lists."""
    rows = slice(start + first, start + last) if isinstance(start, int) else start[first:last]
    values = load(rows)
    if columns is not None:
        values = values[:, columns]
    return change(values) if change else values


def to_gguf(name: str, norm_shift: float) -> Callable[[Array], Array] | None:
    """Return what makes a GGUF's values under `name` of those in a checkpoint; None for the same.

    Where `norm_shift` is 1, norms multiply by 1 + w. The decay of linear attention is stored as a
    negative number, not as its logarithm.
    """
    if name.endswith(".ssm_a"):
        return _negative_exponential
    shift = _shift(name, norm_shift)
    return (lambda values: values + shift) if shift else None


def from_gguf(name: str, norm_shift: float) -> Callable[[Array], Array] | None:
    """Return the inverse of `to_gguf`."""
    if name.endswith(".ssm_a"):
        return lambda values: np.log(-values)
    shift = _shift(name, norm_shift)
    return (lambda values: values - shift) if shift else None


def _shift(name: str, norm_shift: float) -> np.float32:
    shifted = name.endswith("norm.weight") and ".ssm_norm." not in name
    return np.float32(norm_shift if shifted else 0.0)


def _negative_exponential(values: Array) -> Array:
    import torch  # NumPy's exponential differs from the converter's in the last bit

    negative: Array = (-torch.exp(torch.from_numpy(values))).numpy()
    return negative
