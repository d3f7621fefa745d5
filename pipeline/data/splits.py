"""The split of a source of dialogues into training, validation and evaluation."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from pipeline.console import log
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.recipe import Recipe
from pipeline.records import Dialogue


class DialogueSplits(NamedTuple):
    """The dialogues of a run; no dialogue of the source is in two of them.

    An evaluation dialogue may be joined from several.
    """

    training: list[Dialogue]
    validation: list[Dialogue]
    evaluation: list[Dialogue]


def split_dialogues(recipe: Recipe) -> DialogueSplits:
    """Load and shuffle the dialogues and split them; training dialogues are cut into pieces.

    Raises:
        GattError: too few dialogues to evaluate and train on different ones.
    """
    source, turns, count = recipe.dialogues.source, recipe.evaluate.turns, recipe.evaluate.dialogues
    dialogues = load_dialogues(source)
    random.Random(f"split {recipe.seed}").shuffle(dialogues)
    held_out = _held_out(dialogues, turns, count)
    evaluation = _joined(held_out, turns, count)
    rest = _without_copies(dialogues, held_out)
    validation = rest[: min(recipe.dialogues.validation, len(rest) // 4)]
    training = _without_copies(rest, validation)
    copies = len(dialogues) - len(held_out) - len(validation) - len(training)
    if not evaluation or not training:
        same = f", {copies} begin as one of those" if copies else ""
        raise GattError(
            f"{source} has {len(dialogues)} dialogues with {_messages(dialogues)} user turns, of "
            f"which {count} evaluation dialogues of {turns} turns take {len(held_out)}{same}: too "
            f"few to evaluate on {count} and train on others. Add dialogues, or lower "
            "evaluate.dialogues or evaluate.turns."
        )
    if any(len(dialogue.turns) < turns for dialogue in held_out):
        log(
            f"{source}: too few dialogues have {turns} user turns; the evaluation dialogues are "
            f"joined from {len(held_out)} shorter ones, without repeating a message."
        )
    if copies:
        log(
            f"{recipe.dialogues.source}: {copies} dialogues are not trained on, because they "
            "begin as one for evaluation or validation."
        )
    pieces = _pieces(training, recipe.dialogues.turns, recipe.dialogues.train)
    return DialogueSplits(pieces, validation, evaluation)


def _held_out(dialogues: list[Dialogue], turns: int, count: int) -> list[Dialogue]:
    """Return `count` dialogues for evaluation, those of `turns` turns first.

    There are more where short ones have to be joined, and the messages of `count` are too few.
    """
    ordered = sorted(dialogues, key=lambda dialogue: len(dialogue.turns) < turns)
    size = count
    if len(ordered) >= count and len(ordered[count - 1].turns) >= turns:
        return ordered[:count]
    while size < len(ordered) and _messages(ordered[:size]) < turns:
        size += 1
    return ordered[:size]


def _joined(held_out: list[Dialogue], turns: int, count: int) -> list[Dialogue]:
    """Return `count` dialogues of at least `turns` turns, or none if there are too few messages.

    The n-th has the n-th of `held_out` first. A shorter one goes on with those after it, which
    begin again after the last; it has no message twice.
    """
    dialogues = []
    for n, dialogue in enumerate(held_out[:count]):
        if len(dialogue.turns) < turns:
            following = [*held_out[n:], *held_out[:n]]
            messages = dict.fromkeys(turn for other in following for turn in other.turns)
            dialogue = replace(dialogue, turns=tuple(messages)[:turns])
        dialogues.append(dialogue)
    is_enough = len(dialogues) == count and all(len(d.turns) >= turns for d in dialogues)
    return dialogues if is_enough else []


def _messages(dialogues: list[Dialogue]) -> int:
    """Return the number of different user messages."""
    return len({turn for dialogue in dialogues for turn in dialogue.turns})


def _without_copies(dialogues: list[Dialogue], held_out: list[Dialogue]) -> list[Dialogue]:
    """Return the dialogues that are not held out, nor begin as one that is.

    Two dialogues begin alike if their first two user turns are equal, or the only one of either.
    Sources have several rows of one conversation: up to each of its answers, or with other answers.
    """
    firsts = {dialogue.turns[:1] for dialogue in held_out}
    beginnings = {dialogue.turns[:2] for dialogue in held_out}
    return [
        dialogue
        for dialogue in dialogues
        if dialogue.turns[:1] not in beginnings
        and dialogue.turns[:2] not in (firsts if len(dialogue.turns) == 1 else beginnings)
    ]


def _pieces(dialogues: list[Dialogue], turns: int, count: int) -> list[Dialogue]:
    """Return `count` dialogues of up to `turns` turns.

    First come the beginnings of all dialogues, then their later pieces, then all of these again.
    """
    longest = max(len(d.turns) for d in dialogues)
    pieces = [
        replace(d, id=f"{d.id}@{start}", turns=d.turns[start : start + turns])
        for start in range(0, longest, turns)
        for d in dialogues
        if len(d.turns) - start >= min(turns, len(d.turns))
    ]
    rounds = -(-count // len(pieces))
    repeated = [
        replace(piece, id=f"{piece.id}.{n}" if n else piece.id)
        for n in range(rounds)
        for piece in pieces
    ]
    return repeated[:count]
