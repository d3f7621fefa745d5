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


class ChatPass(NamedTuple):
    """Tokens that one pass evaluates, and the positions of the answers in them."""

    tokens: list[int]
    answers: list[range]


class AnswerLogits(NamedTuple):
    """What a model predicts for an answer: a row (vocab_size) of `values` for each token."""

    tokens: list[int]
    values: Array


class BaseLogits(NamedTuple):
    """What the base predicts for the answers of one chat."""

    passes: list[ChatPass]
    answers: list[AnswerLogits]

    @property
    def bytes(self) -> int:
        """Return the size of the logits."""
        return sum(answer.values.nbytes for answer in self.answers)


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
            logits, vocabulary = _base_logits(base, waiting, context)
            waiting = waiting[len(logits) :]
            for arm in tuned:
                with _open(arm, context) as model:
                    if model.vocabulary == vocabulary:
                        scores.setdefault(arm.name, []).extend(compare_to_base(model, logits))
                bar.advance(len(logits))
    perplexity: dict[str, float] = {}
    kl, tokens = {base.name: 0.0}, 0
    for name, rows in scores.items():
        if not rows:  # the base has no answer
            continue
        base_nll, model_nll, divergence = np.mean(rows, axis=0)
        perplexity[base.name], perplexity[name] = float(np.exp(base_nll)), float(np.exp(model_nll))
        kl[name], tokens = float(divergence), len(rows)
    return Degradation(tokens, perplexity, kl)


def _open(arm: Arm, context: int) -> BatchEngine:
    assert arm.path
    return BatchEngine(arm.path, 1, context, adapter=arm.adapter)


def _base_logits(
    base: Arm, chats: Sequence[Sequence[Message]], context: int
) -> tuple[list[BaseLogits], list[str]]:
    """Return the base's logits in the first of the `chats`, at least one, and its vocabulary."""
    limit = max_logits_bytes()
    logits: list[BaseLogits] = []
    with _open(base, context) as engine:
        for messages in chats:
            passes = answer_passes(engine, messages)
            logits.append(BaseLogits(passes, list(answer_logits(engine, passes))))
            if sum(chat.bytes for chat in logits) >= limit:
                break
        return logits, engine.vocabulary


def max_logits_bytes() -> float:
    """Return how many bytes of logits are kept at a time."""
    return min(_MAX_LOGITS_BYTES, _MAX_MEMORY_FRACTION * available_memory())


def compare_to_base(model: BatchEngine, base: Sequence[BaseLogits]) -> Iterator[TokenScore]:
    """Yield the scores of a model of the base's vocabulary, for each row of the base's logits."""
    for passes, answers in base:
        for (tokens, base_rows), (_, rows) in zip(
            answers, answer_logits(model, passes), strict=True
        ):
            for token, base_row, row in zip(tokens, base_rows, rows, strict=True):
                p, q = log_softmax(base_row), log_softmax(row)
                yield TokenScore(-float(p[token]), -float(q[token]), kl_divergence(p, q))


def answer_passes(engine: BatchEngine, messages: Sequence[Message]) -> list[ChatPass]:
    """Return the chat up to its last answer as passes that contain each answer once, in order.

    A pass goes on as long as the template renders an earlier answer as the model has generated it.
    Where it does not (some leave thoughts out), each answer has a pass with its own prompt.
    """
    passes: list[ChatPass] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = engine.tokenize(engine.template.render(messages[:turn]))
        tokens = prompt + engine.tokenize(message["content"])
        earlier = passes.pop() if passes else ChatPass([], [])
        if prompt[: len(earlier.tokens)] != earlier.tokens:
            passes.append(earlier)
            earlier = ChatPass([], [])
        passes.append(ChatPass(tokens, [*earlier.answers, range(len(prompt), len(tokens))]))
    return passes


def answer_logits(engine: BatchEngine, passes: Sequence[ChatPass]) -> Iterator[AnswerLogits]:
    """Yield what a model predicts for each answer, in order."""
    for tokens, answers in passes:
        first = answers[0].start
        rows = enumerate(engine.logits(tokens[:-1], first - 1), first)
        for answer in answers:
            values = np.empty((len(answer), engine.vocab_size), np.float32)
            for n, expected in enumerate(answer):
                values[n] = next(row for position, row in rows if position == expected)
            yield AnswerLogits(tokens[answer.start : answer.stop], values)
