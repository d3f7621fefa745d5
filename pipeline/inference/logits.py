"""Logits of a model, and what is computed from them: log-softmax, KL divergence, negative log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.files import whole_file
from pipeline.gguf.base import Array


def mean_kl(trained: Array, other: Array) -> float:
    """The mean Kullback-Leibler divergence, in nats a token, of `other` from `trained`, both (tokens, vocabulary) logits.

    A file may leave out rows of the vocabulary that no token has: what both have counts.
    """
    width = min(trained.shape[1], other.shape[1])
    total = 0.0
    for one, two in zip(trained, other, strict=True):
        first, second = (log_softmax(row[:width].astype(np.float64)) for row in (one, two))
        total += float((np.exp(first) * (first - second)).sum())
    return total / len(trained)


def mean_nll(sequences: Sequence[Sequence[int]], logits: Array) -> float:
    """The mean negative log-likelihood of the sequences, nats a token, under (all their tokens, vocabulary) logits."""
    losses: list[float] = []
    rows = iter(logits)
    for sequence in sequences:
        mine = [next(rows) for _ in sequence]
        losses += [
            -log_softmax(row.astype(np.float64))[token]
            for row, token in zip(mine, sequence[1:], strict=False)
        ]
    return float(np.mean(losses))


def log_softmax(row: Any) -> Any:
    """The logarithms of the probabilities that logits stand for."""
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


class Logits(NamedTuple):
    """What a model predicts: sequences of token ids, and (all their tokens, vocabulary) logits of what follows each."""

    sequences: list[list[int]]
    logits: Any

    def save(self, path: Path) -> None:
        """Keep it as NumPy arrays; the logits in half precision."""
        import numpy as np

        with whole_file(path) as draft, draft.open("wb") as file:
            lengths = [len(s) for s in self.sequences]
            np.savez(
                file,
                ids=np.concatenate(self.sequences),
                lengths=lengths,
                logits=self.logits.astype(np.float16),
            )

    @classmethod
    def load(cls, path: Path) -> Logits:
        """As saved."""
        import numpy as np

        with np.load(path) as found:
            ends = np.cumsum(found["lengths"])[:-1]
            return cls(
                [part.tolist() for part in np.split(found["ids"], ends)],
                found["logits"].astype(np.float32),
            )
