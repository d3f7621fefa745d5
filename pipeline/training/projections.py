"""The linear layers of a model, read from its configuration alone."""

from __future__ import annotations

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.config import require_object, text_part
from pipeline.gguf.reader import open_gguf
from pipeline.hub.gguf_checkpoint import model_config
from pipeline.hub.models import find_model


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
