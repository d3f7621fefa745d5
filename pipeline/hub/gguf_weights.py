"""The weights of a GGUF by the names, in the order and with the values that transformers has."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Array, RowOrder, column_order, row_order
from pipeline.gguf.gguf_base import GgufBase, layer_kinds
from pipeline.gguf.huggingface.keys import full_key, stored_shape
from pipeline.gguf.huggingface.safetensors import Weights
from pipeline.gguf.huggingface.stored import from_gguf
from pipeline.gguf.reader import GgufInfo, StoredTensor

_MODULES = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")),
    *("self_attn.q_norm", "self_attn.k_norm", "mlp.gate"),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
)
"""The modules of a layer in most families, as transformers calls them."""
_OWN_MODULES = {
    "lfm2": (
        *("operator_norm", "ffn_norm", "conv.conv", "conv.in_proj", "conv.out_proj"),
        *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *("self_attn.q_layernorm", "self_attn.k_layernorm"),
        *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
    ),
    "qwen35": (
        *(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "a", "b")),
        *(f"linear_attn.{name}" for name in ("conv1d", "norm", "out_proj")),
        *_MODULES,
    ),
    "gemma4": (
        *_MODULES,
        *("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm"),
    ),
}
_OUTSIDE = (
    *("model.embed_tokens", "model.norm", "model.embedding_norm", "lm_head"),
    *("model.embed_tokens_per_layer", "model.per_layer_model_projection"),
    "model.per_layer_projection_norm",
)
"""The modules outside of layers."""
_PARAMETERS = ("linear_attn.A_log", "linear_attn.dt_bias", "layer_scalar")
"""Tensors of a layer that no module of their own has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _GgufWeights:
    """A tensor of a GGUF, or an expert of one, as transformers stores it, in bfloat16.

    `order` has the stored row of each row, `columns` the stored column of each column, and `change`
    makes the values of what is stored."""

    file: Path
    shape: tuple[int, ...]
    stored: StoredTensor
    first_row: int = 0
    order: RowOrder | None = None
    columns: RowOrder | None = None
    change: Callable[[Array], Array] | None = None
    dtype: str = "BF16"

    def load(self, rows: slice | RowOrder) -> Array:
        """Return (rows, columns) float32 of some rows; a vector is one row."""
        count = math.prod(self.shape[:-1])
        chosen = np.arange(count)[rows] + self.first_row
        if self.order is not None:
            chosen = self.order[chosen]
        values = ggml.dequantize(self.stored.data[chosen], self.stored.kind, self.shape[-1])
        if self.columns is not None:
            values = values[:, self.columns]
        return self.change(values) if self.change else values


def gguf_weights(base: GgufBase, info: GgufInfo) -> dict[str, Weights]:
    """Return the weights of a GGUF by transformers' names.

    Raises:
        GattError: a tensor that has no name there.
    """
    import gguf

    layers = len(layer_kinds(info))  # without those that predict several tokens at once
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[info.architecture.upper()], info.layers)
    stored = {tensor.name: tensor for tensor in info.tensors}
    modules, parameters = list(_OUTSIDE), []
    fused = base.architecture == "phi3"  # Phi-3 stores gate and up as one
    for n in range(layers):
        modules += [
            f"model.layers.{n}.{module.replace('up_proj', 'gate_up_proj') if fused else module}"
            for module in _OWN_MODULES.get(base.architecture, _MODULES)
        ]
        parameters += [f"model.layers.{n}.{name}" for name in _PARAMETERS]
    weights: dict[str, Weights] = {}
    used = {name for name in stored if name.startswith("rope_") or _layer(name) >= layers}
    for key in (*(f"{m}.{end}" for m in modules for end in ("weight", "bias")), *parameters):
        name = names.get_name(full_key(key), try_suffixes=(".weight", ".bias"))
        if name in stored and name not in used:
            used.add(name)
            weights |= _by_key(base, key, stored[name], info.path)
    if unknown := stored.keys() - used:
        raise GattError(
            f"{info.path} holds {min(unknown)}, which has no place in transformers. Take the "
            "model's Hugging Face folder."
        )
    return weights


def _layer(name: str) -> int:
    """Return the number of the layer that a tensor belongs to, or -1."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else -1


def _by_key(base: GgufBase, key: str, tensor: StoredTensor, file: Path) -> dict[str, Weights]:
    """Return a tensor by its key, or each of its experts."""
    *experts, rows, columns = (1, *tensor.shape)
    if len(tensor.shape) == 3:
        return {
            key.replace(".experts.", f".experts.{n}."): _GgufWeights(
                file=file, shape=(rows, columns), stored=tensor, first_row=n * rows
            )
            for n in range(experts[-1])
        }
    order = row_order(base, tensor.name, tensor.shape[0])
    by_column = column_order(base, tensor.name, tensor.shape[-1])
    if len(tensor.shape) == 1:
        order, by_column = None, order  # a vector is one row
    return {
        key: _GgufWeights(
            file=file,
            shape=stored_shape(key, tensor.shape),
            stored=tensor,
            order=None if order is None else np.argsort(order),
            columns=None if by_column is None else np.argsort(by_column),
            change=from_gguf(tensor.name, base.family.norm_shift),
        )
    }
