"""Base models in other forms: multimodal, quantized by bitsandbytes, split into several GGUFs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.gguf.base import JsonObject

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


def load_weights(folder: Path) -> Tensors:
    """Return the tensors of a folder by their keys."""
    from safetensors.torch import load_file

    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def copy_base(source: Path, target: Path, change: Callable[[Tensors], Tensors] = dict) -> Path:
    """Copy a folder, with its weights changed and in one file."""
    from safetensors.torch import save_file

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(change(load_weights(source)), target / "model.safetensors", {"format": "pt"})
    return target


def edit_json(file: Path, **values: object) -> None:
    """Change keys of a JSON object; None deletes one."""
    content: JsonObject = json.loads(file.read_text(encoding="utf-8"))
    for key, value in values.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    file.write_text(json.dumps(content), encoding="utf-8")


def make_multimodal(text_model: Path, target: Path, layout: str) -> Path:
    """Save a Gemma 3 with a vision tower whose text part is `text_model`.

    `layout` is what stands before the names of the text model: "language_model." on the Hub,
    "model.language_model" in transformers 5.
    """
    import torch

    def add_vision(weights: Tensors) -> Tensors:
        renamed = {
            (layout + k if layout.endswith(".") else k.replace("model", layout, 1)): v
            for k, v in weights.items()
        }
        outer = "model." if layout.startswith("model.") else ""
        vision = {
            f"{outer}vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(8, 8),
            f"{outer}multi_modal_projector.mm_input_projection_weight": torch.ones(8, 64),
        }
        return renamed | vision

    copy_base(text_model, target, add_vision)
    text: JsonObject = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": text.pop("dtype"),
        "text_config": {k: v for k, v in text.items() if k != "architectures"},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 8},
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


MULTIMODAL: dict[str, tuple[str, JsonObject]] = {
    "gemma 3": ("Gemma3", {"hidden_size": 16, "image_size": 32, "patch_size": 8}),
    "gemma 4": ("Gemma4", {"hidden_size": 16, "head_dim": 8}),
    "gemma 4 dense": ("Gemma4Unified", {"mm_embed_dim": 16}),
    "qwen3.5": ("Qwen3_5", {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64}),
    "ministral 3": ("Mistral3", {"hidden_size": 16, "image_size": 32, "patch_size": 8}),
    "mistral": ("Mistral3", {"hidden_size": 16, "image_size": 32, "patch_size": 8}),
    "smollm2": ("SmolVLM", {"hidden_size": 16, "image_size": 32, "patch_size": 8}),
}
"""Families of text models, the class that sees with one of them, and sizes of its eyes."""


_NOT_UNIFIED = frozenset(
    (
        *("model_type", "hidden_size_per_layer_input", "vocab_size_per_layer_input"),
        *("enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size"),
    )
)
"""Settings of Gemma 4 that its unified model has not, or otherwise."""


def save_multimodal(name: str, text_model: Path, target: Path) -> Path:
    """Save a random model of transformers' class whose text part is `text_model`."""
    import torch
    import transformers

    class_name, vision = MULTIMODAL[name]
    text = transformers.AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.bfloat16)
    vision = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **vision}
    settings = text.config.to_dict()
    del settings["architectures"]  # as published
    if class_name == "Gemma4Unified":
        settings = {key: settings[key] for key in settings if key not in _NOT_UNIFIED}
    if class_name == "SmolVLM":
        settings["architectures"] = ["VLlama3ForCausalLM"]
    config = getattr(transformers, f"{class_name}Config")(
        text_config=settings, vision_config=vision
    )
    config.tie_word_embeddings = text.config.tie_word_embeddings
    network = getattr(transformers, f"{class_name}ForConditionalGeneration")(config)
    network.to(torch.bfloat16)
    part = network.model.text_model if class_name == "SmolVLM" else network.model.language_model
    part.load_state_dict(text.model.state_dict())
    network.lm_head.load_state_dict(text.lm_head.state_dict())
    network.save_pretrained(target)
    for file in text_model.glob("tokenizer*"):
        shutil.copy(file, target)
    for file in text_model.glob("*.jinja"):
        shutil.copy(file, target)
    return target


def quantize_to_4_bits(
    source: Path, target: Path, quant_type: str = "nf4", *, nested: bool = True
) -> Path:
    """Save a folder as transformers does with `load_in_4bit`: linear layers by bitsandbytes."""
    from bitsandbytes import functional

    def quantize(weights: Tensors) -> Tensors:
        stored: Tensors = {}
        for key, weight in weights.items():
            stored[key] = weight.contiguous()
            if "_proj.weight" in key:
                packed, state = functional.quantize_4bit(
                    stored[key], blocksize=64, compress_statistics=nested, quant_type=quant_type
                )
                stored[key] = packed
                stored |= {f"{key}.{k}": v for k, v in state.as_dict(packed=True).items()}
        return stored

    copy_base(source, target, quantize)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(target / "config.json", quantization_config=settings)
    return target


def quantize_to_8_bits(source: Path, target: Path) -> Path:
    """Save a folder as transformers does with `load_in_8bit`."""
    import torch
    from bitsandbytes import functional

    def quantize(weights: Tensors) -> Tensors:
        stored: Tensors = {}
        for key, weight in weights.items():
            stored[key] = weight.contiguous()
            if "_proj.weight" in key:
                values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
                module = key.removesuffix(".weight")
                stored |= {key: values, f"{module}.SCB": scales}
                stored[f"{module}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        return stored

    copy_base(source, target, quantize)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit_json(target / "config.json", quantization_config=settings)
    return target


def split_gguf(source: Path, folder: Path, parts: int) -> list[Path]:
    """Split a GGUF as llama-gguf-split does, with all keys in the first part."""
    import gguf

    from pipeline.gguf.reader import read_gguf

    info = read_gguf(source)
    size = -(-len(info.tensors) // parts)
    files = []
    for number in range(parts):
        file = folder / f"{source.stem}-{number + 1:05}-of-{parts:05}.gguf"
        writer = gguf.GGUFWriter(file, info.architecture)
        writer.kv_data[0].clear()
        for key, field in info.fields.items() if number == 0 else ():
            items = None if field.items is None else gguf.GGUFValueType(field.items)
            writer.add_key_value(key, field.value, gguf.GGUFValueType(field.kind), items)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(info.tensors))
        for name, shape, kind, data in info.tensors[number * size : (number + 1) * size]:
            stored = data.reshape(*shape[:-1], -1)
            writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType(kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(file)
    return files
