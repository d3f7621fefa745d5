"""`config.json` of a Hugging Face folder, as transformers understands it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject

_NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "mlx": "MLX",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
}
"""What users call the methods of `quantization_config`."""
_PARTS = ("text_config", "vision_config", "audio_config")
_UNIFIED = "gemma4_unified_text"
_UNIFIED_DEFAULTS = {
    "sliding_window": 1024,
    "max_position_embeddings": 262_144,
    "use_bidirectional_attention": "vision",
}
_AS_GEMMA4 = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
"""The text model of Gemma 4 12B has a type of its own, and computes what Gemma 4 does without the
embeddings of single layers; it has other defaults."""
_BASE_MODEL = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)
"""The model that a model card names as its origin."""


def read_object(path: Path) -> JsonObject:
    """Return a JSON object, or an empty one where there is no such file.

    Raises:
        GattError: the file is not JSON, or JSON of another kind.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise GattError(f"{path} is not JSON: {error}. Download the checkpoint again.") from error
    if not isinstance(value, dict):
        raise GattError(
            f"{path} holds a JSON {type(value).__name__}; an object is expected. "
            "Download the checkpoint again."
        )
    return value


def require_object(path: Path) -> JsonObject:
    """Return a JSON object of a file that every checkpoint has.

    Raises:
        GattError: as `read_object`, or there is no such file.
    """
    if not path.is_file():
        raise GattError(f"{path.parent} lacks {path.name}. A Hugging Face folder holds it.")
    return read_object(path)


def text_part(config: JsonObject) -> JsonObject:
    """Return the configuration of the language model in a multimodal model; others as they are."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    shared = {key: value for key, value in config.items() if key not in _PARTS}
    if text.get("model_type") == _UNIFIED:
        return {**shared, **_UNIFIED_DEFAULTS, **text, **_AS_GEMMA4}
    return {**shared, **text}


def with_defaults(config: JsonObject, keys: Sequence[str], source: str) -> JsonObject:
    """Return `config` with transformers' defaults for those of `keys` that it does not have.

    Configurations may leave out what equals the default: google/gemma-3-4b-it has no vocab_size.

    Raises:
        GattError: transformers has no default for a key.
    """
    missing = [key for key in keys if key not in config]
    if not missing:
        return config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = {
        key: config[key]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        if key in config
    }
    try:
        defaults = CONFIG_MAPPING[config.get("model_type", "")](**known).to_dict()
    except KeyError:
        defaults = {}
    for key in missing:
        if key not in defaults:
            raise GattError(
                f"{source} lacks {key}, and transformers has no default of it for model_type "
                f"{config.get('model_type')!r}. Download the checkpoint again."
            )
    return {**config, **{key: defaults[key] for key in missing}}


def quantization_method(folder: Path, config: JsonObject) -> str:
    """Return how the weights of a checkpoint are quantized, as `quant_method` names it, or "".

    A multimodal model may say so of its text part alone.
    """
    config = text_part(config)
    settings = config.get("quantization_config") or config.get("compression_config")
    if isinstance(settings, dict):
        older = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & settings.keys() else ""
        method = str(settings.get("quant_method") or older)
        if method == "bitsandbytes" and not (
            settings.get("load_in_4bit") or settings.get("load_in_8bit")
        ):
            return ""
        return method or "an unknown method"
    if isinstance(config.get("quantization"), dict):  # mlx-lm's key
        return "mlx"
    return "modelopt" if (folder / "hf_quant_config.json").is_file() else ""


def refuse_quantized(folder: Path, method: str) -> None:
    """Refuse a checkpoint whose quantized weights cannot be read.

    Raises:
        GattError: the weights are quantized by another method than bitsandbytes.
    """
    if method not in ("", "bitsandbytes"):
        raise GattError(
            f"{folder} holds quantized weights ({_NAMES.get(method, method)}), which cannot be "
            f"trained on or converted. Take the 16-bit model{original_model(folder)}."
        )


def original_model(folder: Path) -> str:
    """Return the model that a quantized one was made from as ": NAME", or "" if no card tells."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    base = _BASE_MODEL.search(text.partition("\n---")[0])
    return f": {base[1]}" if base else ""
