"""The sizes of a model, from a preset, a config.json or a GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.recipe import Train


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder: numbers of layers and tokens, and widths; `queries` and `keys` are those of all heads together."""

    layers: int
    width: int
    feed_forward: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Shape:
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
            "q_proj": (self.width, self.queries),
            "k_proj": (self.width, self.keys),
            "v_proj": (self.width, self.keys),
            "o_proj": (self.queries, self.width),
            "gate_proj": (self.width, self.feed_forward),
            "up_proj": (self.width, self.feed_forward),
            "down_proj": (self.feed_forward, self.width),
        }

    @property
    def projections(self) -> int:
        """Weights of all layers' projections, those that are held in 4 bits."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def embeddings(self) -> int:
        """Weights of the embedding, and of the output where that has its own."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Weights of the model; norms are left out."""
        return self.projections + self.embeddings

    def adapter(self, settings: Train) -> int:
        """Weights of the recipe's adapter."""
        return (
            self.layers * settings.rank * sum(sum(self.matrices[name]) for name in settings.targets)
        )

    @property
    def kept(self) -> int:
        """Bytes that one layer keeps of a token for the way back: norms in float32; queries, keys and values for all heads,
        attention's output, and the inputs and outputs of the feed-forward in bfloat16.
        """
        return 12 * self.width + 8 * self.queries + 8 * self.feed_forward
