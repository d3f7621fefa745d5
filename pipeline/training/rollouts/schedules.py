"""Which turns of a training dialogue the model in training answers itself."""

from __future__ import annotations

import random
from typing import Literal

Schedule = Literal["none", "prefix", "mixed", "own"]
"""The values of `train.rollouts`."""


def own_turns(schedule: Schedule, turns: int, progress: float, rng: random.Random) -> list[int]:
    """Return the turns (from 0) of a dialogue of `turns` answers that the student answers.

    "prefix": one of them, after the teacher's history (prefix replay, ReOPD). "own": all. "mixed":
    each with the probability `progress`, the part of training that is done, so that the teacher's
    share falls to zero (Guided-OPD).
    """
    if schedule == "prefix":
        return [rng.randrange(turns)]
    if schedule == "mixed":
        return [turn for turn in range(turns) if rng.random() < progress]
    return list(range(turns)) if schedule == "own" else []


def turn_weight(turn: int, turns: int) -> float:
    """Return the weight of the own answer of `turn` (from 0): it rises with the turn, mean 1.

    Late turns are what a model forgets in, and few of the tokens are theirs (TurnOPD).
    """
    return 2 * (turn + 1) / (turns + 1)
