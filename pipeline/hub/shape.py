"""The sizes of a model, from a preset, a config.json or a GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.recipe import Train


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder: numbers of layers and tokens, and widths; `queries` and `keys` are those of all heads together."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    q_size: int
    kv_size: int
    vocab_size: int
    tie_word_embeddings: bool

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From a Hugging Face `config.json`."""
        config = {**config, **config.get("text_config", {})}
        heads, width = config["num_attention_heads"], config["hidden_size"]
        head = config.get("head_dim") or width // heads
        keys = (config.get("num_key_value_heads") or heads) * head
        return cls(
            config["num_hidden_layers"],
            width,
            config["intermediate_size"],
            heads * head,
            keys,
            config["vocab_size"],
            config.get("tie_word_embeddings", True),
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's projections."""
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
    def projections(self) -> int:
        """Weights of all layers' projections, those that are held in 4 bits."""
        return self.num_hidden_layers * sum(
            inputs * outputs for inputs, outputs in self.matrices.values()
        )

    @property
    def embeddings(self) -> int:
        """Weights of the embedding, and of the output where that has its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def parameters(self) -> int:
        """Weights of the model; norms are left out."""
        return self.projections + self.embeddings

    def adapter(self, settings: Train) -> int:
        """Weights of the recipe's adapter."""
        return (
            self.num_hidden_layers
            * settings.rank
            * sum(sum(self.matrices[name]) for name in settings.target_modules)
        )

    @property
    def activation_bytes_per_token(self) -> int:
        """Bytes that one layer keeps of a token for the way back: norms in float32; queries, keys and values for all heads,
        attention's output, and the inputs and outputs of the feed-forward in bfloat16.
        """
        return 12 * self.hidden_size + 8 * self.q_size + 8 * self.intermediate_size
