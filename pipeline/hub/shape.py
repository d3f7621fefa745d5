"""The sizes of a decoder, and the parameter counts that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.hybrid_keys import (
    global_head_size,
    linear_heads,
    of_full_attention,
)
from pipeline.hub.text_checkpoint import transformers_config
from pipeline.recipe import Train

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_LEARNING_RATE, _LEARNING_RATE_WIDTH, _WIDTH_EXPONENT = 8e-4, 576, 0.781
"""SmolLM2-135M's learning rate and hidden size, and how fast the rate falls with it."""


_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("hidden_size_per_layer_input", "vocab_size_per_layer_input"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder, called as in Hugging Face configurations.

    `q_size` and `kv_size` are the output widths of `q_proj` and of `k_proj` and `v_proj`, over all
    heads. Where layers differ, these two and `intermediate_size` are means over the layers, so that
    the parameters are right. `per_layer_embedding` are the parameters of the embedding that Gemma
    3n and the small models of Gemma 4 have for each layer.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    q_size: int
    kv_size: int
    vocab_size: int
    tie_word_embeddings: bool
    per_layer_embedding: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the sizes from a Hugging Face `config.json`, which `read_config` may have completed.

        Raises:
            KeyError: a size is missing.
        """
        text_config = {**config, **config.get("text_config", {})}
        layers = _layer_sizes(text_config)
        q, kv, width = (round(sum(sizes) / len(layers)) for sizes in zip(*layers, strict=True))
        return cls(
            num_hidden_layers=len(layers),
            hidden_size=text_config["hidden_size"],
            intermediate_size=width,
            q_size=q,
            kv_size=kv,
            vocab_size=text_config["vocab_size"],
            tie_word_embeddings=text_config.get("tie_word_embeddings", True),
            per_layer_embedding=len(layers)
            * (text_config.get("hidden_size_per_layer_input") or 0)
            * text_config.get("vocab_size_per_layer_input", text_config["vocab_size"]),
        )

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (input features, output features) of each projection of a layer."""
        return {
            "q_proj": (self.hidden_size, self.q_size),
            "k_proj": (self.hidden_size, self.kv_size),
            "v_proj": (self.hidden_size, self.kv_size),
            "o_proj": (self.q_size, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }

    @property
    def projection_parameters(self) -> int:
        """Return the parameters of all layers' projections, which QLoRA holds in 4 bits."""
        return self.num_hidden_layers * sum(
            inputs * outputs for inputs, outputs in self.projection_shapes.values()
        )

    @property
    def embedding_parameters(self) -> int:
        """Return the parameters of embeddings, and of the output layer if it is not tied."""
        matrices = 1 if self.tie_word_embeddings else 2
        return self.vocab_size * self.hidden_size * matrices + self.per_layer_embedding

    @property
    def parameters(self) -> int:
        """Return the parameters of the model, norms left out."""
        return self.projection_parameters + self.embedding_parameters

    def adapter_parameters(self, settings: Train) -> int:
        """Return the parameters of the recipe's LoRA adapter."""
        features = sum(sum(self.projection_shapes[name]) for name in settings.target_modules)
        return self.num_hidden_layers * settings.rank * features

    @property
    def learning_rate(self) -> float:
        """Return a peak learning rate for a LoRA of this width.

        It falls with the hidden size as Thinking Machines measured it for Llama ("LoRA Without
        Regret", 2025: hidden_size to the power of -0.781). SmolLM2-135M is what it was tried with
        here; at 8B it is near the 2e-4 of Unsloth's notebooks.
        """
        narrower: float = (_LEARNING_RATE_WIDTH / self.hidden_size) ** _WIDTH_EXPONENT
        return _LEARNING_RATE * narrower

    def activation_bytes_per_token(self, value_bytes: int) -> int:
        """Return the bytes that one layer saves of a token for the backward pass.

        Of norms, float32 copies. Of `value_bytes` each: the outputs of norms; queries, keys and
        values of all heads, and attention's output; and the inputs and outputs of the feed-forward
        network.
        """
        values = 2 * self.hidden_size + 4 * self.q_size + 4 * self.intermediate_size
        return 8 * self.hidden_size + value_bytes * values


class _LayerSizes(NamedTuple):
    """The widths of one layer, as `ModelShape` has them."""

    q: float
    kv: float
    intermediate: float


def _layer_sizes(config: JsonObject) -> list[_LayerSizes]:
    """Return the widths of every layer.

    A layer that is no plain attention has the widths of one with as many parameters. As norms are,
    small projections of Qwen3.5 (decay and beta) and of Gemma 4 (each layer's own input) are left
    out.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    plain = _LayerSizes(
        q=heads * head_dim,
        kv=(config.get("num_key_value_heads") or heads) * head_dim,
        intermediate=config["intermediate_size"],
    )
    if linear := linear_heads(config):  # Qwen3.5
        keys, values = linear.keys * linear.key_size, linear.values * linear.value_size
        # Queries, keys, values, a gate and the output; in full attention, the gate is one more q.
        recurrent = plain._replace(q=(2 * keys + 3 * values) / 2 - plain.kv)
        gated = plain._replace(q=1.5 * plain.q)
        return [gated if kind == "full_attention" else recurrent for kind in config["layer_types"]]
    if "conv_L_cache" in config:  # LFM2: three inputs and an output, all as wide as the model
        conv = plain._replace(q=2 * hidden, kv=0)
        return [conv if kind == "conv" else plain for kind in config["layer_types"]]
    if "num_kv_shared_layers" in config:
        return _gemma4_layers(config, plain)
    return [plain] * config["num_hidden_layers"]


def _gemma4_layers(config: JsonObject, sliding: _LayerSizes) -> list[_LayerSizes]:
    """Return the widths of Gemma 4's layers, given those of one with a sliding window."""
    size = global_head_size(config)
    heads = of_full_attention(config, "num_key_value_heads") or config["num_key_value_heads"]
    full = sliding._replace(
        q=config["num_attention_heads"] * size,
        kv=heads * size / (2 if config["attention_k_eq_v"] else 1),  # keys may be the values too
    )
    layers = [sliding if kind == "sliding_attention" else full for kind in config["layer_types"]]
    own = len(layers) - config["num_kv_shared_layers"]
    width = sliding.intermediate * (2 if config["use_double_wide_mlp"] else 1)
    return [*layers[:own], *(layer._replace(kv=0, intermediate=width) for layer in layers[own:])]


def sizes_of_any_family(config: JsonObject, source: str) -> dict[str, Any]:
    """Return the sizes in the `config.json` of any text model that transformers knows.

    Some families call them otherwise (`n_embd`), leave out what they compute from the others, or
    have one for each layer, of which the mean is returned. Where a model has no attention or no
    feed-forward network, what is returned only serves to estimate memory. `source` is what error
    messages call the file.

    Raises:
        GattError: transformers does not know the model, or cannot read its configuration.
    """
    try:
        settings = transformers_config(config)
        values = {name: _size(settings, name) for name in _SIZES}
        sizes = {name: value for name, value in values.items() if value is not None}
        hidden = int(sizes.get("hidden_size", 0))
        if not (hidden and sizes.get("num_hidden_layers") and sizes.get("vocab_size")):
            raise ValueError("without layers, width or vocabulary")
    except Exception as error:  # each family checks its settings in a way of its own
        raise GattError(
            f"{source}: transformers cannot read it ({type(error).__name__}: {error}). Download "
            "the checkpoint again."
        ) from error
    heads = sizes.get("num_attention_heads") or 1
    return sizes | {
        "num_attention_heads": heads,
        "num_key_value_heads": sizes.get("num_key_value_heads") or heads,
        "intermediate_size": sizes.get("intermediate_size") or 4 * hidden,
    }


def _size(settings: PreTrainedConfig, name: str) -> int | None:
    """Return a size, or its mean over the layers; None where a family has none."""
    try:
        value = getattr(settings, name, None)
    except RuntimeError:  # transformers refuses one for all where layers differ
        value = [getattr(layer, name) for layer in settings.per_layer_config]
    return -(-sum(value) // len(value)) if isinstance(value, list | tuple) else value
