"""How each family of models is stored in GGUF: architecture, weights, and what it needs.

Source: llama.cpp's converter in llama-cpp-python 0.3.36; the tests compare with it byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.config import text_part, with_defaults
from pipeline.gguf.huggingface.hybrid_keys import (
    gemma4_keys,
    gemma4_kinds,
    gemma4_settings,
    lfm2_keys,
    lfm2_settings,
    qwen35_keys,
    qwen35_settings,
)
from pipeline.gguf.huggingface.hyperparameters import (
    Keys,
    common_keys,
    gemma2_keys,
    gemma3_keys,
    granite_keys,
    llama_keys,
    ministral3_keys,
    olmo2_keys,
    phi3_keys,
    qwen3_moe_keys,
    smollm3_keys,
)
from pipeline.gguf.huggingface.stored import require_tensors

_NEEDED = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
"""Keys of every family's configuration; transformers has defaults of them."""
_SIZES = ("model_type", "hidden_size", "num_hidden_layers")
"""Keys that every published configuration has."""
_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
_DENSE = (*_ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
_EXPERTS = (*_ATTENTION, "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_POST_NORMS = ("post_attention_norm", "post_ffw_norm")
_OWN_KEYS = ("attn_k", "attn_k_norm")
_FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def _one_kind(config: JsonObject) -> list[str]:
    return [""] * int(config["num_hidden_layers"])


def _layer_types(config: JsonObject) -> list[str]:
    return list(config["layer_types"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of llama.cpp.

    `keys` returns its hyperparameters. Where it is `interleaved`, the rows of q and k stand in
    pairs (llama.cpp's rotary order), not in halves. `norm_shift` is added to the weights of norms,
    because Gemma multiplies by 1 + w. Where it is `without_head`, a stored output matrix repeats
    the embedding and is skipped. `text_model` is the `model_type` in the `text_config` of a
    multimodal model whose text part is of this family. `needs` are keys of the configuration that
    `_NEEDED` does not have, `matrices` the names of the weights that each layer has, and `by_kind`
    those that its layers of a kind have besides. `kinds` returns the kind of every layer.
    `settings` gives a configuration the names that the other families have."""

    architecture: str
    keys: Callable[[JsonObject], Keys]
    text_model: str
    needs: tuple[str, ...] = ()
    matrices: tuple[str, ...] = _DENSE
    by_kind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    kinds: Callable[[JsonObject], list[str]] = _one_kind
    settings: Callable[[JsonObject], JsonObject] = lambda config: config
    norm: str = "output_norm"

    def require_tensors(
        self, names: Collection[str], kinds: Sequence[str], source: str, *, tied: bool
    ) -> None:
        """Check that a model has all weights of the family, by llama.cpp's names.

        `kinds` are those of its layers. Where the output matrix is not `tied` to the embedding, it
        is needed too.

        Raises:
            GattError: one is missing.
        """
        parts = {kind: (*self.matrices, *self.by_kind.get(kind, ())) for kind in kinds}
        needed = {"token_embd.weight": "the embedding", f"{self.norm}.weight": "the last norm"}
        if not tied:
            needed["output.weight"] = "the output matrix (lm_head)"
        require_tensors(parts, kinds, names, needed, source)

    interleaved: bool = False
    norm_shift: float = 0.0
    without_head: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(
        architecture="llama", keys=llama_keys, text_model="llama", interleaved=True
    ),
    "MistralForCausalLM": Family(
        architecture="llama", keys=llama_keys, text_model="mistral", interleaved=True
    ),
    "Qwen2ForCausalLM": Family(architecture="qwen2", keys=common_keys, text_model="qwen2"),
    "Qwen3ForCausalLM": Family(
        architecture="qwen3",
        keys=common_keys,
        text_model="qwen3",
        needs=("head_dim",),
        matrices=(*_DENSE, *_QK_NORMS),
    ),
    "Qwen3MoeForCausalLM": Family(
        architecture="qwen3moe",
        keys=qwen3_moe_keys,
        text_model="qwen3_moe",
        needs=(
            "head_dim",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
        ),
        matrices=(*_EXPERTS, *_QK_NORMS),
    ),
    "Gemma2ForCausalLM": Family(
        architecture="gemma2",
        keys=gemma2_keys,
        text_model="gemma2",
        needs=(
            "head_dim",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "sliding_window",
        ),
        matrices=(*_DENSE, *_POST_NORMS),
        norm_shift=1.0,
        without_head=True,
    ),
    "Gemma3ForCausalLM": Family(
        architecture="gemma3",
        keys=gemma3_keys,
        text_model="gemma3_text",
        needs=("head_dim", "sliding_window"),
        matrices=(*_DENSE, *_QK_NORMS, *_POST_NORMS),
        norm_shift=1.0,
    ),
    "Phi3ForCausalLM": Family(
        architecture="phi3",
        keys=phi3_keys,
        text_model="phi3",
        matrices=("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
    ),
    "SmolLM3ForCausalLM": Family(
        architecture="smollm3", keys=smollm3_keys, text_model="smollm3", interleaved=True
    ),
    "Olmo2ForCausalLM": Family(
        architecture="olmo2",
        keys=olmo2_keys,
        text_model="olmo2",
        needs=("tie_word_embeddings",),
        matrices=(*_MATRICES, *_QK_NORMS, *_POST_NORMS),
    ),
    "Olmo3ForCausalLM": Family(
        architecture="olmo2",
        keys=olmo2_keys,
        text_model="olmo3",
        needs=("tie_word_embeddings", "sliding_window"),
        matrices=(*_MATRICES, *_QK_NORMS, *_POST_NORMS),
    ),
    "GraniteForCausalLM": Family(
        architecture="granite",
        keys=granite_keys,
        text_model="granite",
        needs=(
            "attention_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        interleaved=True,
    ),
    "Ministral3ForCausalLM": Family(
        architecture="mistral3",
        keys=ministral3_keys,
        text_model="ministral3",
        needs=("head_dim", "rope_parameters"),
        interleaved=True,
    ),
    "Lfm2ForCausalLM": Family(
        architecture="lfm2",
        keys=lfm2_keys,
        text_model="lfm2",
        needs=(
            *("conv_L_cache", "norm_eps", "tie_word_embeddings"),
            *("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"),
        ),
        matrices=("attn_norm", "ffn_norm", *_FEED_FORWARD),
        by_kind={
            "conv": ("shortconv.conv", "shortconv.in_proj", "shortconv.out_proj"),
            "full_attention": ("attn_q", "attn_k", "attn_v", "attn_output", *_QK_NORMS),
        },
        kinds=_layer_types,
        settings=lfm2_settings,
        norm="token_embd_norm",
    ),
    "Qwen3_5ForCausalLM": Family(
        architecture="qwen35",
        keys=qwen35_keys,
        text_model="qwen3_5_text",
        needs=(
            *("head_dim", "linear_conv_kernel_dim", "tie_word_embeddings"),
            *("linear_num_key_heads", "linear_num_value_heads"),
            *("linear_key_head_dim", "linear_value_head_dim"),
        ),
        matrices=("attn_norm", "post_attention_norm", *_FEED_FORWARD),
        by_kind={
            "linear_attention": (
                *("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_a", "ssm_dt"),
                *("ssm_norm", "ssm_alpha", "ssm_beta", "ssm_out"),
            ),
            "full_attention": ("attn_q", "attn_k", "attn_v", "attn_output", *_QK_NORMS),
        },
        kinds=_layer_types,
        settings=qwen35_settings,
        norm_shift=1.0,
    ),
    "Gemma4ForCausalLM": Family(
        architecture="gemma4",
        keys=gemma4_keys,
        text_model="gemma4_text",
        needs=(
            *("head_dim", "sliding_window", "rope_parameters", "num_kv_shared_layers"),
            *("hidden_size_per_layer_input", "use_double_wide_mlp", "attention_k_eq_v"),
        ),
        matrices=(
            *("attn_norm", "attn_q", "attn_q_norm", "attn_output", "ffn_norm"),
            *(*_FEED_FORWARD, *_POST_NORMS, "layer_output_scale"),
        ),
        by_kind={"sliding_attention": ("attn_v", *_OWN_KEYS), "full_attention": _OWN_KEYS},
        kinds=gemma4_kinds,
        settings=gemma4_settings,
    ),
}
"""By the first of `architectures` in `config.json`."""
_MISTRAL_SMALL = ("Mistral3ForConditionalGeneration", "MistralForCausalLM")
"""Mistral Small 3.1 and its text model, which llama.cpp stores as it does Ministral 3 unless the
configuration of the text model names its class."""
_TEXT_MODELS = {family.text_model: name for name, family in FAMILIES.items()}
DRAFTS = ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")
"""Classes with the `text_config` of a model that they draft for."""


class ModelConfig(NamedTuple):
    """What a checkpoint is: its family, transformers' class of its text part, and its settings.

    Where it is `multimodal`, its other parts are left out."""

    family: Family
    class_name: str
    settings: JsonObject
    multimodal: bool


def is_supported(config: JsonObject) -> bool:
    """Return whether a configuration names a family that this version writes."""
    return _class_name(config) in FAMILIES and not text_part(config).get("enable_moe_block")


def _class_name(config: JsonObject) -> str:
    """Return transformers' class of a model, or of the text part of a multimodal one."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    text = config.get("text_config")
    if name in FAMILIES or not isinstance(text, dict):
        return name
    return _TEXT_MODELS.get(str(text_part(config).get("model_type")), "")


def read_config(config: JsonObject, source: str) -> ModelConfig:
    """Return the family that a configuration names, and its settings with transformers' defaults.

    `source` is what error messages call the file.

    Raises:
        GattError: a family that is not supported, or a key that it needs is missing.
    """
    names, text = config.get("architectures"), config.get("text_config")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    if name in DRAFTS:
        raise GattError(
            f"{source} is a {name}, a draft model, which reads the hidden states of another one. "
            "Take that one."
        )
    multimodal = name not in FAMILIES and isinstance(text, dict)
    class_name = _class_name(config)
    if class_name not in FAMILIES:
        model_type = text.get("model_type") if isinstance(text, dict) else ""
        part = f" with the text model {str(model_type)!r}" if multimodal else ""
        raise GattError(
            f"{source} is a {name}{part}; this version trains and evaluates {', '.join(FAMILIES)}, "
            "text models that both transformers and llama.cpp's own converter know, and models "
            "with one of these as their text model. Give a GGUF of the model instead, if it is one "
            "of these, or export it with your own convert_hf_to_gguf.py: `gatt export --model "
            "FOLDER --adapter LORA --converter PATH`."
        )
    family, settings = FAMILIES[class_name], text_part(config)
    named = isinstance(text, dict) and text.get("architectures")
    if (name, class_name) == _MISTRAL_SMALL and not named:
        family = replace(family, architecture="mistral3")
    for key in _SIZES:
        if not settings.get(key):
            raise GattError(f"{source} lacks {key}. Download the checkpoint again.")
    epsilon = () if "norm_eps" in family.needs else ("rms_norm_eps",)
    settings = with_defaults(settings, (*_NEEDED, *epsilon, *family.needs), source)
    settings = _with_kinds(family, settings, source)
    for key in (*_SIZES[1:], *_NEEDED, "rms_norm_eps"):
        value = settings[key]
        if key != "num_key_value_heads" and not (isinstance(value, int | float) and value > 0):
            raise GattError(f"{source}: {key} = {value!r} found, a positive number expected.")
    return ModelConfig(family, class_name, settings, multimodal)


def _with_kinds(family: Family, settings: JsonObject, source: str) -> JsonObject:
    """Return a configuration by the names of the other families, with the kind of every layer.

    Raises:
        GattError: a setting of a wrong type, or a kind of layer that the family does not have.
    """
    try:
        settings = family.settings(settings)
        kinds = family.kinds(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise GattError(
            f"{source}: {error} is missing or of a wrong type. Download the checkpoint again."
        ) from error
    known = {"", "shared", *family.by_kind}
    if len(kinds) != settings["num_hidden_layers"] or not known >= {*kinds}:
        raise GattError(
            f"{source}: layer_types = {kinds} found; for each of the "
            f"{settings['num_hidden_layers']} layers one of {', '.join(family.by_kind)} expected."
        )
    return settings
