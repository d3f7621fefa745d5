"""Which linear layers of a model are adapted; these are read from its configuration alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.config import require_object, text_part
from pipeline.gguf.reader import open_gguf
from pipeline.hub.adapted import stored_names
from pipeline.hub.gguf_checkpoint import model_config
from pipeline.hub.llama_converter import converter_for
from pipeline.hub.models import Model, find_model
from pipeline.hub.text_checkpoint import read_text_model, transformers_config
from pipeline.recipe import Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})
"""Layers that choose among experts, and are not adapted."""
_CHOOSING = frozenset({"router", "indexer"})
"""Parts of a model that choose experts or tokens, with layers of names of their own."""
_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Types of models in which PEFT 0.21 adapts no `out_proj`, and `dt_proj` without effect."""


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


def adaptable_layers(network: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the (outputs, inputs) of each linear layer in a model's blocks, by its path there.

    Without the output and the step of Mamba's layers, whose kernels read the weights past an
    adapter, and without layers whose names PEFT takes for those of experts.
    """
    from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
    from torch.nn import Linear
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    family = network.config.model_type
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(family, "")
    refused = {*_MOE_TARGET_MODULE_MAPPING.get(pattern, {})}
    refused |= {"out_proj", "dt_proj"} if family in _MAMBA else set()
    return {
        path: (module.out_features, module.in_features)
        for path, module in network.base_model.named_modules()
        if isinstance(module, Linear) and _name(path) not in refused
    }


def linear_layers_of(name: str) -> set[str]:
    """Return the names of the linear layers in the blocks of the model called `name`.

    They are without their path. transformers builds the model without memory for its weights.

    Raises:
        GattError: no model of that name, transformers cannot build it, or it has no such layers.
    """
    model = find_model(name, weights=False)
    return layer_names(_require_layers(_build(model), model.name))


def layer_names(paths: Iterable[str]) -> set[str]:
    """Return the names of these layers without their path; without those that only choose."""
    return {_name(path) for path in paths if _CHOOSING.isdisjoint(path.split("."))}


def require_projections(model: Model, settings: Train) -> None:
    """Check that an adapter can be trained on a model and merged, before any work is done.

    The families that this version writes have all projections of the recipe.

    Raises:
        GattError: the model has no linear layers, or lacks those that the recipe names, or its
            checkpoint stores them in a form to which no adapter's change can be added.
    """
    converted = not model.is_gguf and converter_for(model.path)
    if not converted and {*settings.target_modules} >= {*Train().target_modules}:
        return
    network = _build(model)
    layers = _require_layers(network, model.name)
    targets = own_projections(settings.target_modules, layer_names(layers))
    if converted:
        adapted = {path: layers[path] for path in layers if _name(path) in targets}
        _require_weights(network, adapted, model.path)


def _require_layers(network: PreTrainedModel, name: str) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a model called `name`, or refuse one without."""
    if layers := adaptable_layers(network):
        return layers
    raise GattError(
        f"{name} ({type(network).__name__}) has no linear layers, which an adapter is trained on. "
        "Take a model of another family."
    )


def _name(path: str) -> str:
    """Return the name of a module without its path."""
    return path.rpartition(".")[2]


def _build(model: Model) -> PreTrainedModel:
    """Return transformers' network of a text model, without memory for its weights."""
    config = (
        model_config(open_gguf(model.path))
        if model.is_gguf
        else text_part(require_object(model.path / "config.json"))
    )
    return _network(config, str(model.path))


def _network(config: JsonObject, source: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        settings = transformers_config(config)
        with torch.device("meta"):
            network: PreTrainedModel = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # each family checks its settings in a way of its own
        raise GattError(
            f"transformers cannot build the model of {source} ({type(error).__name__}: {error})."
        ) from error
    return network


def _require_weights(
    network: PreTrainedModel, layers: dict[str, tuple[int, int]], folder: Path
) -> None:
    """Check that a checkpoint has the weight of each of these layers as a tensor of its own."""
    weights = read_text_model(folder).weights
    names = stored_names(str(network.config.model_type), weights)
    prefix = "" if network.base_model is network else f"{network.base_model_prefix}."
    for path, shape in layers.items():
        key = f"{prefix}{path}.weight"
        stored = weights.get(names.get(key, key))
        if stored is None or stored.shape != shape:
            state = "no such weight" if stored is None else f"one of {stored.shape}"
            raise GattError(
                f"An adapter would be trained on {key} of {shape}, and {folder} has {state}, to "
                "which the adapter's change cannot be added. Take a model of another family."
            )
