"""How far training has moved a model where no instruction was given: perplexity, and divergence from the base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.logits import log_softmax
from pipeline.records import Message


@dataclass(frozen=True, slots=True)
class Divergence:
    """Over so many `tokens`: the perplexity of the base and of the model, and KL(base‖model) in nats a token."""

    tokens: int
    base: float
    model: float
    kl: float


def measure_divergence(
    base: BatchEngine, model: BatchEngine, dialogues: Iterable[Sequence[Message]]
) -> Divergence:
    """Compare the two on the assistant's words in `dialogues`; both must have one vocabulary."""
    losses: list[tuple[float, float]] = []
    apart: list[float] = []
    for messages in dialogues:
        tokens, learned = _answers(base, messages)
        rows = zip(base.logits(tokens[:-1]), model.logits(tokens[:-1]), strict=True)
        for place, (ours, theirs) in enumerate(rows, 1):
            if place in learned:
                p, q = (log_softmax(row.astype(np.float64)) for row in (ours, theirs))
                losses.append((-p[tokens[place]], -q[tokens[place]]))
                apart.append(float(np.exp(p) @ (p - q)))
    means = np.mean(losses, axis=0)
    return Divergence(
        len(losses), float(np.exp(means[0])), float(np.exp(means[1])), float(np.mean(apart))
    )


def _answers(llama: BatchEngine, messages: Sequence[Message]) -> tuple[list[int], set[int]]:
    """The dialogue's tokens up to its last answer, and where in them the answers stand, the end of each not counted."""
    tokens: list[int] = []
    places: set[int] = set()
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = llama.tokenize(llama.template.render(messages[:n]))
            tokens = prompt + llama.tokenize(message["content"])
            places |= set(range(len(prompt), len(tokens)))
    return tokens, places
