"""Which linear layers of a model are adapted; these are read from its configuration alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.config import require_object, text_part
from pipeline.gguf.reader import open_gguf
from pipeline.hub.gguf_checkpoint import model_config
from pipeline.hub.models import find_model
from pipeline.recipe import Train

_FUSED_PROJECTIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w1": ("gate_proj",),
    "w2": ("down_proj",),
    "w3": ("up_proj",),
}
"""What families have in place of a projection: several in one matrix (Phi), w1 to w3 (LFM2)."""
_OF_OTHER_LAYERS = {
    "in_proj": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkv": ("q_proj", "k_proj", "v_proj"),
    "in_proj_z": ("q_proj",),
    "out_proj": ("o_proj",),
}
"""The projections of layers without attention: short convolutions and state-space layers, linear
attention with its gate (Qwen3.5)."""
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Layers that choose among experts, and are not adapted."""


def own_projections(wanted: Sequence[str], linear_layers: Collection[str]) -> list[str]:
    """Return the names under which a model has the `wanted` projections of the recipe.

    `linear_layers` are the names of its linear layers, without the path. A model whose layers are
    of several kinds has the matching projections of all kinds adapted, and one that computes
    queries, keys and values with one matrix has them all adapted if one is wanted. If all are
    wanted, a model with other projections has an adapter on each of its own, but for routers.

    Raises:
        GattError: the model lacks a projection.
    """
    names = {name: _own_names(name, linear_layers) for name in wanted}
    missing = [name for name, own in names.items() if not own]
    own_layers = sorted({*linear_layers} - _ROUTERS)
    if missing and own_layers and {*wanted} >= {*Train().target_modules}:
        log(
            f"train: the model has no linear layer for {', '.join(missing)}; adapted are its own: "
            f"{', '.join(own_layers)}."
        )
        return own_layers
    if missing:
        raise GattError(
            f"train.target_modules: the model has no linear layer for {', '.join(missing)}. It has "
            f"{', '.join(sorted(linear_layers))}. Leave out what is missing."
        )
    return list(dict.fromkeys(name for own in names.values() for name in own))


def _own_names(wanted: str, linear_layers: Collection[str]) -> list[str]:
    """Return what a model calls a projection, in its layers of all kinds."""
    fused = [name for name, parts in _FUSED_PROJECTIONS.items() if wanted in parts]
    names = [wanted] if wanted in linear_layers else fused
    names += [name for name, parts in _OF_OTHER_LAYERS.items() if wanted in parts]
    return [name for name in names if name in linear_layers]


def linear_layers_of(name: str) -> set[str]:
    """Return the names of the linear layers in the blocks of the model called `name`.

    They are without their path. transformers builds the model without memory for its weights.

    Raises:
        GattError: no model of that name, or transformers cannot build it.
    """
    model = find_model(name, weights=False)
    config = (
        model_config(open_gguf(model.path))
        if model.is_gguf
        else text_part(require_object(model.path / "config.json"))
    )
    return _linear_layers(config, str(model.path))


def _linear_layers(config: JsonObject, source: str) -> set[str]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        settings = CONFIG_MAPPING[str(config.get("model_type"))].from_dict(config)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # each family checks its settings in a way of its own
        raise GattError(
            f"transformers cannot build the model of {source} ({type(error).__name__}: {error})."
        ) from error
    return {
        name.rpartition(".")[2]
        for name, module in network.base_model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
