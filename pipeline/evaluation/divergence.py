"""How far training has moved a model where no instruction is given.

Measured as perplexity, and as divergence from the base. One model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.console import progress
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.scores import Degradation
from pipeline.gguf.base import Array
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.logits import kl_divergence, log_softmax
from pipeline.records import Message
from pipeline.system import available_memory

_MAX_LOGITS_BYTES = 1e9
"""Logits of the base that are kept at a time: for a vocabulary of 128,256, 1,900 tokens."""
_MAX_MEMORY_FRACTION = 0.25
"""Fraction of the free memory that they may take."""


class BaseLogits(NamedTuple):
    """What the base predicts in one chat.

    `values` has the shape (positions, vocab_size): a row in float32 for the token at each of the
    `positions` in `tokens`, those of the answers.
    """

    tokens: list[int]
    positions: list[int]
    values: Array


class TokenScore(NamedTuple):
    """NLL of a token under base and model, and KL(base‖model) of the distributions, in nats."""

    base_nll: float
    model_nll: float
    kl: float


def measure_degradation(
    arms: Sequence[Arm], chats: Sequence[Sequence[Message]], context: int
) -> Degradation:
    """Return the perplexity of each arm on `chats` and its divergence from the first, the base.

    The chats have the base's own answers. Servers are left out, and models with another vocabulary,
    whose probabilities cannot be compared.
    """
    base, *tuned = [arm for arm in arms if arm.in_all_suites and arm.path]
    scores: dict[str, list[TokenScore]] = {}
    waiting = list(chats)
    with progress("evaluate: degradation", len(chats) * len(tuned)) as bar:
        while waiting:
            logits = _base_logits(base, waiting, context)
            waiting = waiting[len(logits) :]
            for arm in tuned:
                with _open(arm, context) as model:
                    if model.vocab_size == logits[0].values.shape[1]:
                        scores.setdefault(arm.name, []).extend(compare_to_base(model, logits))
                bar.advance(len(logits))
    perplexity: dict[str, float] = {}
    kl, tokens = {base.name: 0.0}, 0
    for name, rows in scores.items():
        base_nll, model_nll, divergence = np.mean(rows, axis=0)
        perplexity[base.name], perplexity[name] = float(np.exp(base_nll)), float(np.exp(model_nll))
        kl[name], tokens = float(divergence), len(rows)
    return Degradation(tokens, perplexity, kl)


def _open(arm: Arm, context: int) -> BatchEngine:
    assert arm.path
    return BatchEngine(arm.path, 1, context, adapter=arm.adapter)


def _base_logits(base: Arm, chats: Sequence[Sequence[Message]], context: int) -> list[BaseLogits]:
    """Return the base's logits in the first of the `chats`: at least one, and as many as fit."""
    limit = min(_MAX_LOGITS_BYTES, _MAX_MEMORY_FRACTION * available_memory())
    logits: list[BaseLogits] = []
    with _open(base, context) as engine:
        for messages in chats:
            tokens, positions = _tokenize(engine, messages)
            logits.append(BaseLogits(tokens, positions, _rows(engine, tokens, positions)))
            if sum(chat.values.nbytes for chat in logits) >= limit:
                break
    return logits


def compare_to_base(model: BatchEngine, base: Sequence[BaseLogits]) -> Iterator[TokenScore]:
    """Yield the scores of a model of the base's vocabulary, for each row of the base's logits."""
    for tokens, positions, values in base:
        rows = zip(positions, values, _rows(model, tokens, positions), strict=True)
        for position, base_row, model_row in rows:
            p, q = log_softmax(base_row), log_softmax(model_row)
            token = tokens[position]
            yield TokenScore(-float(p[token]), -float(q[token]), kl_divergence(p, q))


def _rows(engine: BatchEngine, tokens: Sequence[int], positions: Sequence[int]) -> Array:
    """Return the logits (positions, vocab_size) for the tokens at these positions."""
    wanted = set(positions)
    rows = np.empty((len(positions), engine.vocab_size), np.float32)
    n = 0
    for position, row in enumerate(engine.logits(tokens[:-1]), 1):
        if position in wanted:
            rows[n] = row
            n += 1
    return rows


def _tokenize(engine: BatchEngine, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return the tokens up to the last answer, and the positions of the answers' text."""
    tokens: list[int] = []
    positions: list[int] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = engine.tokenize(engine.template.render(messages[:turn]))
            tokens = prompt + engine.tokenize(message["content"])
            positions += range(len(prompt), len(tokens))
    return tokens, positions
