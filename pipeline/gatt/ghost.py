"""Ghost Attention: repeat the instruction in every turn to obtain answers, train without repeats.

Touvron et al. 2023, *Llama 2*, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.records import Message

CHANGE_PREFIX = "From now on: "
"""Precedes an instruction that replaces another one."""


def with_instruction(instruction: str, user: str) -> str:
    """Return the user message with the instruction after it.

    The paper does not state the order; instructions next to the answer are followed more often.
    """
    return f"{user}\n\n{instruction}" if instruction else user


def augment(
    users: Sequence[str], answers: Sequence[str], instructions: Sequence[str], system: str
) -> tuple[Message, ...]:
    """Return the teacher's chat, which ends with user message `len(answers) + 1` if there is one.

    `instructions[k]` is the one in force in turn k + 1; it stands in that turn's user message.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    augmented = map(with_instruction, instructions, users[: len(answers) + 1])
    for turn, user in enumerate(augmented):
        messages.append({"role": "user", "content": user})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": answers[turn]})
    return tuple(messages)


def ghost(
    users: Sequence[str], answers: Sequence[str], instructions: Sequence[str], system: str
) -> tuple[Message, ...]:
    """Return the student's chat: an instruction stands only where it is new.

    That is turn 1, and a turn in which another one replaces it.
    """
    pairs = zip(["", *instructions], instructions, strict=False)
    new = [text if text != previous else "" for previous, text in pairs]
    return augment(users, answers, new, system)


def loss_turns(answers: int, mode: Literal["all_turns", "last_turn", "distill"]) -> range:
    """Return the answers (from 0) that carry a loss.

    The paper sets the loss of all earlier turns to zero (`last_turn`). The other modes train on
    every answer in the same pass: each was sampled from the augmented chat.
    """
    return range(answers - 1, answers) if mode == "last_turn" else range(answers)
