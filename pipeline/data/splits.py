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
    """The dialogues of a run; no dialogue of the source is in two of them."""

    training: list[Dialogue]
    validation: list[Dialogue]
    evaluation: list[Dialogue]


def split_dialogues(recipe: Recipe) -> DialogueSplits:
    """Load and shuffle the dialogues and split them; training dialogues are cut into pieces.

    Raises:
        GattError: too few dialogues to evaluate and train on different ones.
    """
    dialogues = load_dialogues(recipe.dialogues.source)
    random.Random(f"split {recipe.seed}").shuffle(dialogues)
    turns, count = recipe.evaluate.turns, recipe.evaluate.dialogues
    evaluation = [d for d in dialogues if len(d.turns) >= turns][:count]
    rest = _without_copies(dialogues, evaluation)
    validation = rest[: min(recipe.dialogues.validation, len(rest) // 4)]
    training = _without_copies(rest, validation)
    copies = len(dialogues) - len(evaluation) - len(validation) - len(training)
    if len(evaluation) < count or not training:
        same = f", {copies} copies of those" if copies else ""
        raise GattError(
            f"{recipe.dialogues.source} has {len(dialogues)} dialogues, {len(evaluation)} of them "
            f"with {turns} user turns{same}: too few to evaluate on {count} and train on others. "
            "Add dialogues, or lower evaluate.dialogues or evaluate.turns."
        )
    if copies:
        log(
            f"{recipe.dialogues.source}: {copies} dialogues are not trained on, because their "
            "turns are those of one for evaluation or validation."
        )
    pieces = _pieces(training, recipe.dialogues.turns, recipe.dialogues.train)
    return DialogueSplits(pieces, validation, evaluation)


def _without_copies(dialogues: list[Dialogue], held_out: list[Dialogue]) -> list[Dialogue]:
    """Return the dialogues that are not held out, nor have the same turns as one that is."""
    turns = {dialogue.turns for dialogue in held_out}
    return [dialogue for dialogue in dialogues if dialogue.turns not in turns]


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
