"""What training takes in memory, from the sizes of a model. Constants of a CPU are fitted (scripts/bench/memory.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.recipe import Train

CARDS = (8, 12, 16, 24)
"""GB of graphics cards that people have; of these a twentieth is the screen's."""
STEP, DIALOGUE = 2000, 500
"""Tokens of a step of four dialogues, and of one, the least that is computed at a time."""
_FOUR_BITS = 0.516
"""Bytes of a weight in NF4: half a byte, and scales of blocks of 64, which are quantised themselves."""
_LOGITS = 0.25e9
"""Of the tokens whose logits are in memory at a time, and their gradients."""
_CUDA = 0.7e9
"""A CUDA context with the kernels of torch and bitsandbytes; not measured here."""
_WATCHED, _CELLS = 1.1, 6 * 1280
"""Bytes of a weight in Q8_0, as llama.cpp holds it, and cells of its cache for the dialogues of `dialogues.watched`."""
_DORA = 12
"""Bytes for each weight of the projections that a DoRA keeps for the way back: it computes whole matrices anew."""
_PROCESS, _KEPT = 0.7e9, 1.9
"""On a CPU: Python with torch and Unsloth, and how much more is kept than what autograd asks for: steps of many lengths leave
holes of many sizes."""


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


def training_memory(
    shape: Shape, settings: Train, tokens: int, gpu: bool = False, watched: bool = True
) -> float:
    """Bytes that a 4-bit QLoRA of `shape` takes at its peak, of a graphics card where `gpu`; `tokens` are computed at a time.
    Where checkpoints are `watched`, llama.cpp has the base beside it in the computer's memory.

    On a GPU Unsloth recomputes the layers and keeps what is between them in the computer's memory; there it is an estimate
    from the sizes alone.
    """
    weights = _FOUR_BITS * shape.projections + 2 * shape.embeddings
    # Weights, gradients and the two moments of AdamW in float32, and copies to compute with.
    trained = 26 * shape.adapter(settings) + (_DORA * shape.projections if settings.dora else 0)
    if gpu:
        whole = 2 * max(inputs * outputs for inputs, outputs in shape.matrices.values())
        return _CUDA + weights + trained + whole + _LOGITS + 2 * tokens * shape.kept
    llama = _WATCHED * shape.parameters + 4 * _CELLS * shape.layers * shape.keys if watched else 0
    return (
        _PROCESS + weights + trained + _LOGITS + llama + _KEPT * tokens * shape.layers * shape.kept
    )


def room(card: float) -> float:
    """Bytes that training has on a card of so many GB."""
    return 0.95 * card * 1e9


def tokens_that_fit(shape: Shape, settings: Train, memory: float, gpu: bool = False) -> int:
    """How many tokens can be computed at a time in so many bytes; 0 or less where not even the model fits."""
    fixed = training_memory(shape, settings, 0, gpu)
    return int((memory - fixed) / (training_memory(shape, settings, 1, gpu) - fixed))
