"""Random models that see or hear, and whose text part only llama.cpp's own converter writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.files import write_json
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.config import read_object
from support.bases import Tensors, copy_base
from support.converter_families import save_config, save_miniature, save_random

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TextPart(NamedTuple):
    """A class of the converter, `model_type` in the `text_config` of its published checkpoints, and
    transformers' class of that text model: "" where it is refused.
    """

    class_name: str
    model_type: str
    text_class: str = ""


TEXT_PARTS = (
    TextPart("AudioFlamingo3ForConditionalGeneration", "qwen2", "Qwen2ForCausalLM"),
    TextPart("AyaVisionForConditionalGeneration", "cohere2", "Cohere2ForCausalLM"),
    TextPart("BailingMoeV3VLForConditionalGeneration", "bailing_moe_v3"),
    TextPart("ChameleonForConditionalGeneration", ""),
    TextPart("ChatGLMForConditionalGeneration", ""),
    TextPart("Dots3NoteForConditionalGeneration", "dots3_note_text"),
    TextPart("Exaone4_5_ForConditionalGeneration", "exaone4", "Exaone4ForCausalLM"),
    TextPart("Gemma3ForConditionalGeneration", "gemma3_text", "Gemma3ForCausalLM"),
    TextPart("Gemma3nForConditionalGeneration", "gemma3n_text", "Gemma3nForCausalLM"),
    TextPart("Gemma4ForConditionalGeneration", "gemma4_text", "Gemma4ForCausalLM"),
    TextPart("Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text", "Gemma4ForCausalLM"),
    TextPart("Glm4vForConditionalGeneration", "glm4v_text"),
    TextPart("Glm4vMoeForConditionalGeneration", "glm4v_moe_text"),
    TextPart("Glm5NextForConditionalGeneration", "glm5_next_text"),
    TextPart("GlmOcrForConditionalGeneration", "glm_ocr_text"),
    TextPart("Granite4VisionForConditionalGeneration", "granite4_vision_text"),
    TextPart("GraniteSpeechForConditionalGeneration", "granite", "GraniteForCausalLM"),
    TextPart("GraniteSpeechPlusForConditionalGeneration", "granite", "GraniteForCausalLM"),
    TextPart("HunYuanVLForConditionalGeneration", "hunyuan_vl_text"),
    TextPart("Idefics3ForConditionalGeneration", "llama", "LlamaForCausalLM"),
    TextPart("InternVLForConditionalGeneration", "gpt_oss", "GptOssForCausalLM"),
    TextPart("InternVLForConditionalGeneration", "qwen3", "Qwen3ForCausalLM"),
    TextPart("JanusForConditionalGeneration", "llama", "LlamaForCausalLM"),
    TextPart("KimiK25ForConditionalGeneration", "kimi_k2"),
    TextPart("KimiK3ForConditionalGeneration", "kimi_k3"),
    TextPart("KimiVLForConditionalGeneration", "deepseek_v3", "DeepseekV3ForCausalLM"),
    TextPart("Lfm2VlForConditionalGeneration", "lfm2", "Lfm2ForCausalLM"),
    TextPart("Lfm2VlForConditionalGeneration", "lfm2_moe", "Lfm2MoeForCausalLM"),
    TextPart("LightOnOCRForConditionalGeneration", "qwen3", "Qwen3ForCausalLM"),
    TextPart("Llama4ForConditionalGeneration", "llama4_text", "Llama4ForCausalLM"),
    TextPart("LlavaForConditionalGeneration", "mistral", "MistralForCausalLM"),
    TextPart("MT5ForConditionalGeneration", ""),
    TextPart("MiniCPMV4_6ForConditionalGeneration", "qwen3_5_text", "Qwen3_5ForCausalLM"),
    TextPart("MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl_text"),
    TextPart("Mistral3ForConditionalGeneration", "ministral3", "Ministral3ForCausalLM"),
    TextPart("Mistral3ForConditionalGeneration", "mistral4"),
    TextPart("MuseGlimmerForConditionalGeneration", "muse_glimmer_text"),
    TextPart("PaddleOCRVLForConditionalGeneration", ""),
    TextPart("Qwen2AudioForConditionalGeneration", "qwen2", "Qwen2ForCausalLM"),
    TextPart("Qwen2VLForConditionalGeneration", ""),
    TextPart("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text"),
    TextPart("Qwen3ASRForConditionalGeneration", ""),
    TextPart("Qwen3OmniMoeForConditionalGeneration", ""),
    TextPart("Qwen3TTSForConditionalGeneration", ""),
    TextPart("Qwen3VLForConditionalGeneration", "qwen3_vl_text"),
    TextPart("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe_text"),
    TextPart("Qwen3_5ForConditionalGeneration", "qwen3_5_text", "Qwen3_5ForCausalLM"),
    TextPart("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM"),
    TextPart("Qwen4ExpForConditionalGeneration", "qwen4_exp_text", "Qwen4ExpForCausalLM"),
    TextPart("SmolVLMForConditionalGeneration", "llama", "LlamaForCausalLM"),
    TextPart("Step3p7ForConditionalGeneration", "step3p7_text"),
    TextPart("StepVLForConditionalGeneration", ""),
    TextPart("T5ForConditionalGeneration", ""),
    TextPart("UMT5ForConditionalGeneration", ""),
    TextPart("VoxtralForConditionalGeneration", "llama", "LlamaForCausalLM"),
    TextPart("YoutuVLForConditionalGeneration", ""),
)
_EYES: JsonObject = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIZES: JsonObject = {"hidden_size": 16, "image_size": 32, "patch_size": 8}
SEEING: dict[str, tuple[str, JsonObject]] = {
    "Gemma3n": ("Gemma3n", {}),
    "Gemma4 moe": ("Gemma4", {"hidden_size": 16, "head_dim": 8}),
    "Llama4": (
        "Llama4",
        {**_SIZES, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "Olmo": ("Llava", _SIZES),
    "Qwen3_5Moe": (
        "Qwen3_5Moe",
        {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 64},
    ),
}
"""Miniatures of text models, the class that sees with one of them, and sizes of its eyes."""


def save_seeing(name: str, folder: Path, **changes: object) -> PreTrainedModel:
    """Save a random model that sees, and return a model in float32 that reads its text alike.

    It is transformers' class of the whole, or for Gemma 3n, whose eyes need another package, that
    of the text. `changes` are of the configuration of its text part.
    """
    import torch
    import transformers

    network: PreTrainedModel
    if name == "Gemma3n":
        text = folder.with_name(f"{folder.name} text")
        save_miniature(name, text, **changes)
        _add_eyes_and_ears(text, folder)
        network = transformers.AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
        return network
    class_name, vision = SEEING[name]
    settings = save_config(name, folder, **changes).to_dict()
    settings.pop("architectures", None)  # as published
    config = getattr(transformers, f"{class_name}Config")(
        text_config=settings, vision_config={**_EYES, **vision}
    )
    config.tie_word_embeddings = settings["tie_word_embeddings"]
    class_name = f"{class_name}ForConditionalGeneration"
    save_random(class_name, config, folder)
    network = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32)
    return network


def _add_eyes_and_ears(text: Path, folder: Path) -> None:
    """Copy a Gemma 3n's text model as google/gemma-3n-E2B-it stores it."""
    import torch

    def rename(weights: Tensors) -> Tensors:
        inner = {k.replace("model.", "model.language_model.", 1): v for k, v in weights.items()}
        return inner | {
            "model.vision_tower.timm_model.conv_stem.conv.weight": torch.ones(4, 3, 3, 3),
            "model.audio_tower.conformer.0.norm.weight": torch.ones(4),
            "model.embed_vision.embedding.weight": torch.ones(8, 16),
            "model.embed_audio.embedding_projection.weight": torch.ones(64, 16),
        }

    copy_base(text, folder, rename)
    settings = read_object(folder / "config.json")
    del settings["architectures"]
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "eos_token_id": [2, 106],
        "text_config": settings,
        "vision_config": {
            "model_type": "gemma3n_vision",
            "architecture": "mobilenetv5_300m_enc",
            "label_names": ["LABEL_0", "LABEL_1"],
        },
        "audio_config": {"model_type": "gemma3n_audio", "hidden_size": 16},
    }
    write_json(folder / "config.json", config)
