"""Reminder fidelity out of divergences: overall, by turn and by instruction, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.evaluation.scores import Fidelity, FidelityRow

K = TypeVar("K", int, str)
Sums = npt.NDArray[np.float64]
"""Divergences in nats, summed over answers: (dialogues, 2), of base and model."""
_RESAMPLES = 2000


class AnswerKl(NamedTuple):
    """KL(reminded base‖model told once) of an answer: the sum over its tokens, in nats."""

    dialogue: str
    instruction: str
    turn: int
    tokens: int
    kl: float


def summarize(base: Sequence[AnswerKl], models: Mapping[str, Sequence[AnswerKl]]) -> Fidelity:
    """Return the fidelity of each model: overall, by turn and by instruction.

    `base` and each of `models` have the same answers in the same order.
    """

    def rows(key: Callable[[AnswerKl], K]) -> tuple[FidelityRow, ...]:
        return tuple(
            _row(arm, at, [pair for pair in zip(base, model, strict=True) if key(pair[0]) == at])
            for arm, model in models.items()
            for at in sorted({key(answer) for answer in base})
        )

    turns = {answer.turn for answer in base}
    all_turns = f"turns {min(turns)} to {max(turns)}"
    return Fidelity(
        overall=rows(lambda answer: all_turns),
        by_turn=rows(lambda answer: answer.turn),
        by_instruction=rows(lambda answer: answer.instruction),
    )


def _row(arm: str, at: int | str, pairs: Sequence[tuple[AnswerKl, AnswerKl]]) -> FidelityRow:
    """Return the fidelity over pairs of the base's and the model's divergence."""
    by_dialogue: dict[str, Sums] = {}
    for base, model in pairs:
        by_dialogue.setdefault(base.dialogue, np.zeros(2))[:] += base.kl, model.kl
    sums = np.array(list(by_dialogue.values()))
    tokens = sum(base.tokens for base, _ in pairs)
    base_kl, kl = sums.sum(axis=0) / tokens
    low, high = _interval(sums)
    return FidelityRow(
        arm=arm,
        at=at,
        kl=float(kl),
        base_kl=float(base_kl),
        value=float(_fidelity(sums)),
        low=low,
        high=high,
        tokens=tokens,
        dialogues=len(sums),
    )


def _fidelity(sums: Sums) -> Sums:
    """Return the fidelity of (..., dialogues, 2) sums; nan where those of the base are 0."""
    base, model = np.moveaxis(sums.sum(axis=-2), -1, 0)
    return np.where(base > 0, 1 - model / np.where(base > 0, base, 1), math.nan)


def _interval(sums: Sums) -> tuple[float, float]:
    """Return the 95 % percentile interval (Efron 1979) over the dialogues of (dialogues, 2) sums.

    Dialogues are drawn with replacement: the answers of one follow from one another. It is nan for
    less than two of them.
    """
    if len(sums) < 2 or not sums[:, 0].all():
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLES, len(sums)))
    low, high = np.nanpercentile(_fidelity(sums[drawn]), (2.5, 97.5))
    return float(low), float(high)
