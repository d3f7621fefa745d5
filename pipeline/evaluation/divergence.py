"""How far training has moved a model where no instruction is given.

Measured as perplexity, and as divergence from the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.console import progress
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.scores import Degradation
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.logits import kl_divergence, log_softmax
from pipeline.records import Message


@dataclass(frozen=True, slots=True)
class Divergence:
    """Perplexity of base and model over `tokens`, and KL(base‖model) in nats per token."""

    tokens: int
    base_perplexity: float
    model_perplexity: float
    kl: float


def measure_degradation(
    arms: Sequence[Arm], chats: Sequence[Sequence[Message]], context: int
) -> Degradation:
    """Return the perplexity of each arm on `chats` and its divergence from the first, the base.

    The chats have the base's own answers. Servers are left out, and models with another vocabulary,
    whose probabilities cannot be compared.
    """
    base_arm, *tuned_arms = [arm for arm in arms if arm.in_all_suites and arm.path]
    perplexity: dict[str, float] = {}
    kl, tokens = {base_arm.name: 0.0}, 0
    with (
        _open(base_arm, context) as base,
        progress("evaluate: degradation", len(tuned_arms)) as bar,
    ):
        for arm in tuned_arms:
            with _open(arm, context) as model:
                if base.vocab_size == model.vocab_size:
                    result = measure_divergence(base, model, chats)
                    perplexity[base_arm.name] = result.base_perplexity
                    perplexity[arm.name] = result.model_perplexity
                    kl[arm.name], tokens = result.kl, result.tokens
            bar.advance()
    return Degradation(tokens, perplexity, kl)


def _open(arm: Arm, context: int) -> BatchEngine:
    assert arm.path
    return BatchEngine(arm.path, 1, context, adapter=arm.adapter)


def measure_divergence(
    base: BatchEngine, model: BatchEngine, chats: Iterable[Sequence[Message]]
) -> Divergence:
    """Compare two models of one vocabulary on the assistant's words in `chats`."""
    losses: list[tuple[float, float]] = []
    divergences: list[float] = []
    for messages in chats:
        tokens, answer_positions = _tokenize(base, messages)
        rows = zip(base.logits(tokens[:-1]), model.logits(tokens[:-1]), strict=True)
        for position, (base_logits, model_logits) in enumerate(rows, 1):
            if position in answer_positions:
                p = log_softmax(base_logits)
                q = log_softmax(model_logits)
                losses.append((-p[tokens[position]], -q[tokens[position]]))
                divergences.append(kl_divergence(p, q))
    base_loss, model_loss = np.mean(losses, axis=0)
    return Divergence(
        len(losses),
        base_perplexity=float(np.exp(base_loss)),
        model_perplexity=float(np.exp(model_loss)),
        kl=float(np.mean(divergences)),
    )


def _tokenize(engine: BatchEngine, messages: Sequence[Message]) -> tuple[list[int], set[int]]:
    """Return the tokens up to the last answer, and the positions of the answers' text."""
    tokens: list[int] = []
    positions: set[int] = set()
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = engine.tokenize(engine.template.render(messages[:turn]))
            tokens = prompt + engine.tokenize(message["content"])
            positions |= set(range(len(prompt), len(tokens)))
    return tokens, positions
