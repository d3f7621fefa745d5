"""Logits of a model, and what is computed from them: log-softmax, KL divergence, NLL.

Logits are stored in float32 or less; everything computed from them is in float64 and in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.files import whole_file
from pipeline.gguf.base import Array

LogProbs = npt.NDArray[np.float64]


class TokenLogprob(NamedTuple):
    """A token of an answer, its log-probability, and the most likely tokens in its place.

    Tokens are bytes: one may be a part of a character. Log-probabilities are those of the model,
    before a sampler changes them.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


class Logits(NamedTuple):
    """What a model predicts after each token of some sequences of token ids.

    `values` has the shape (tokens of all sequences, vocab_size).
    """

    sequences: list[list[int]]
    values: Array

    def save(self, path: Path) -> None:
        """Write an .npz file, with the values in float16."""
        with whole_file(path) as draft, draft.open("wb") as file:
            np.savez(
                file,
                ids=np.concatenate(self.sequences),
                lengths=[len(sequence) for sequence in self.sequences],
                logits=self.values.astype(np.float16),
            )

    @classmethod
    def load(cls, path: Path) -> Logits:
        """Return what `save` wrote, with the values in float32."""
        with np.load(path) as arrays:
            ends = np.cumsum(arrays["lengths"])[:-1]
            sequences = [ids.tolist() for ids in np.split(arrays["ids"], ends)]
            return cls(sequences, arrays["logits"].astype(np.float32))

    def next_tokens(self) -> Iterator[tuple[Array, int]]:
        """Yield each row that has a next token in its sequence, with that token."""
        start = 0
        for sequence in self.sequences:
            rows = self.values[start : start + len(sequence)]
            yield from zip(rows[:-1], sequence[1:], strict=True)
            start += len(sequence)


def log_softmax(logits: Array) -> LogProbs:
    """Return the log-probabilities of a row of logits (vocab_size)."""
    exact = logits.astype(np.float64)
    shifted = exact - exact.max()  # exp of the largest is 1: nothing overflows
    log_probs: LogProbs = shifted - np.log(np.exp(shifted).sum())
    return log_probs


def nll(logits: Array, token: int) -> float:
    """Return the negative log-likelihood of a token under a row of logits."""
    return -float(log_softmax(logits)[token])


def kl_divergence(p: LogProbs, q: LogProbs) -> float:
    """Return KL(p‖q) of two rows of log-probabilities."""
    return float((np.exp(p) * (p - q)).sum())


def mean_kl(reference: Array, values: Array) -> float:
    """Return the mean KL(reference‖model) of two (tokens, vocab_size) arrays of logits.

    A model file may lack vocabulary rows that no token uses: only the common ones count.
    """
    width = min(reference.shape[1], values.shape[1])
    pairs = zip(reference[:, :width], values[:, :width], strict=True)
    return sum(kl_divergence(log_softmax(p), log_softmax(q)) for p, q in pairs) / len(reference)


def mean_nll(logits: Logits) -> float:
    """Return the mean NLL of the sequences' tokens, without the first token of each."""
    return float(np.mean([nll(row, token) for row, token in logits.next_tokens()]))
