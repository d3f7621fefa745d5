"""The chats that the GPU bench trains on: random token ids in turns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.training.examples import IGNORE_INDEX, TrainingExample

SEED = 1
_FIRST_ID, _END_ID = 10, 250
"""Token ids of the chats: any tokens will do, and every model of the bench has these."""


@dataclass(frozen=True, slots=True)
class Workload:
    """`lengths` in tokens, each trained `repeats` times; the first counts as warm-up."""

    lengths: tuple[int, ...]
    repeats: int
    dialogues: int


FULL = Workload((512, 1024, 2048, 4096, 8192), 3, 24)
QUICK = Workload((64, 160), 2, 8)


class Case(NamedTuple):
    """What a step of "lengths" trains: `name` is the loss."""

    name: str
    tokens: int


def make_chat(rng: random.Random, turns: Sequence[tuple[int, int]]) -> TrainingExample:
    """Return a chat with user messages and answers of these lengths; all answers are learned."""
    ids: list[int] = []
    labels: list[int] = []
    for user, answer in turns:
        message = rng.choices(range(_FIRST_ID, _END_ID), k=user + answer)
        ids += message
        labels += [IGNORE_INDEX] * user + message[user:]
    weights = [0.0 if label == IGNORE_INDEX else 1.0 for label in labels]
    return TrainingExample(input_ids=ids, labels=labels, weights=weights)


def distilled(chat: TrainingExample) -> TrainingExample:
    """Return the chat with a teacher's of nearly its length, to which most answers are compared."""
    shift = len(chat.input_ids) // 16
    learned = [n for n, label in enumerate(chat.labels) if label != IGNORE_INDEX and n >= shift]
    alignment = [(n, n - shift) for n in learned if n % 10 < 9]
    return replace(chat, teacher_ids=chat.input_ids[shift:], alignment=alignment)


def chat_of_length(rng: random.Random, tokens: int) -> TrainingExample:
    """Return a chat of exactly `tokens`, half of them answers, in turns of at most 128 tokens."""
    turns = max(1, tokens // 128)
    bounds = [tokens * n // turns for n in range(turns + 1)]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    return make_chat(rng, [(size - size // 2, size // 2) for size in sizes])


def chats_of_lengths(workload: Workload, *, distill: bool) -> list[TrainingExample]:
    """Return the chats of "lengths"; with `distill` each length is there a second time."""
    rng = random.Random(SEED)
    chats = [chat_of_length(rng, n) for n in workload.lengths for _ in range(workload.repeats)]
    return [*chats, *map(distilled, chats)] if distill else chats


def make_dialogues(workload: Workload) -> list[TrainingExample]:
    """Return chats of 2 to 8 turns."""
    rng = random.Random(SEED + 1)
    return [
        make_chat(rng, [(rng.randint(20, 70), rng.randint(30, 80)) for _ in range(2 + n % 7)])
        for n in range(workload.dialogues)
    ]


def case_of(chat: TrainingExample) -> Case:
    """Return the case that a chat of "lengths" belongs to."""
    return Case("distill" if chat.alignment else "all_turns", len(chat.input_ids))


def learn_last_answer(labels: Sequence[int]) -> list[int]:
    """Return the labels of the last answer only."""
    last_user = max((n for n, label in enumerate(labels) if label == IGNORE_INDEX), default=-1)
    return [IGNORE_INDEX] * (last_user + 1) + list(labels[last_user + 1 :])
