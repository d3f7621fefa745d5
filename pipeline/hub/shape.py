"""The sizes of a decoder, and the parameter counts that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import GattError
from pipeline.recipe import Train

_LEARNING_RATE, _LEARNING_RATE_WIDTH, _WIDTH_EXPONENT = 8e-4, 576, 0.781
"""SmolLM2-135M's learning rate and hidden size, and how fast the rate falls with it."""


_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder, called as in Hugging Face configurations.

    `q_size` and `kv_size` are the output widths of `q_proj` and of `k_proj` and `v_proj`, over all
    heads. `per_layer_embedding` are the parameters of the embedding that Gemma 4's small models
    have for each layer.
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
        """Read the sizes from a Hugging Face `config.json`.

        Raises:
            KeyError: a size is missing.
        """
        text_config = {**config, **config.get("text_config", {})}
        heads, hidden_size = text_config["num_attention_heads"], text_config["hidden_size"]
        head_dim = text_config.get("head_dim") or hidden_size // heads
        return cls(
            num_hidden_layers=text_config["num_hidden_layers"],
            hidden_size=hidden_size,
            intermediate_size=text_config["intermediate_size"],
            q_size=heads * head_dim,
            kv_size=(text_config.get("num_key_value_heads") or heads) * head_dim,
            vocab_size=text_config["vocab_size"],
            tie_word_embeddings=text_config.get("tie_word_embeddings", True),
            per_layer_embedding=text_config["num_hidden_layers"]
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

    @property
    def activation_bytes_per_token(self) -> int:
        """Return the bytes that one layer saves of a token for the backward pass.

        Norms are in float32. Queries, keys and values of all heads, attention's output, and the
        inputs and outputs of the feed-forward network are in bfloat16.
        """
        return 12 * self.hidden_size + 8 * self.q_size + 8 * self.intermediate_size


def sizes_of_any_family(folder: Path) -> dict[str, Any]:
    """Return the sizes in the `config.json` of any family that transformers knows.

    Some families call them otherwise (`n_embd`), or leave out what they compute from the others.
    Where a model has no attention or no feed-forward network, what is returned only serves to
    estimate memory.

    Raises:
        GattError: transformers does not know the model, or cannot read its configuration.
    """
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        sizes = {name: getattr(settings, name, None) for name in _SIZES}
        hidden = int(sizes["hidden_size"] or 0)
        if not (hidden and sizes["num_hidden_layers"] and sizes["vocab_size"]):
            raise ValueError("without layers, width or vocabulary")
    except Exception as error:  # each family checks its settings in a way of its own
        raise GattError(
            f"{folder / 'config.json'}: transformers cannot read it ({type(error).__name__}: "
            f"{error}). Download the checkpoint again."
        ) from error
    heads = sizes["num_attention_heads"] or 1
    return sizes | {
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["num_key_value_heads"] or heads,
        "intermediate_size": sizes["intermediate_size"] or 4 * hidden,
    }
