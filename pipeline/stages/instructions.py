"""`gatt instructions`: which dialogue is to keep which instruction, in training and in evaluation."""

from __future__ import annotations

import random
from dataclasses import asdict

from pipeline.config import Recipe
from pipeline.console import note
from pipeline.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.files import write_json
from pipeline.gatt.instructions import pair_for_evaluation, pair_for_training
from pipeline.records import Dialogue, Pairing
from pipeline.rundir import RunDir


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Split the dialogues, pair them with instructions, and write both to `instructions/pairs.json`.

    Raises:
        GattError: too few dialogues to keep training and evaluation apart.
    """
    everything = load_dialogues(recipe.dialogues.source)
    random.Random(f"split {recipe.seed}").shuffle(everything)
    held_out = [d for d in everything if len(d.turns) >= recipe.evaluate.turns][: recipe.evaluate.dialogues]
    names = {d.id for d in held_out}
    rest = [d for d in everything if d.id not in names]
    if len(held_out) < recipe.evaluate.dialogues or not rest:
        raise GattError(
            f"{recipe.dialogues.source} has {len(everything)} dialogues, {len(held_out)} of them with "
            f"{recipe.evaluate.turns} user turns: too few to evaluate on {recipe.evaluate.dialogues} and train on others. "
            "Bring more, or lower evaluate.dialogues or evaluate.turns."
        )
    training = _pieces(rest, recipe.dialogues.turns, recipe.dialogues.train)
    shares = recipe.instructions
    made, pairs = pair_for_training(
        training, shares.pool, combine_share=shares.combine_share, short_share=shares.short_share,
        plain_share=shares.plain_share, edited_share=recipe.synthesize.edited_share, seed=recipe.seed,
    )  # fmt: skip
    asked, evaluation = pair_for_evaluation(held_out, shares.pool)
    write_json(
        rundir.pairs,
        {
            "instructions": [asdict(i) for i in {**made, **asked}.values()],
            "train": [{"dialogue": asdict(d), **_pair(p)} for d, p in zip(training, pairs, strict=True)],
            "evaluate": [{"dialogue": asdict(d), **_pair(p)} for d, p in zip(held_out, evaluation, strict=True)],
        },
    )
    note(f"instructions: {len(training)} training dialogues, {len(held_out)} for evaluation, {len(made)} instructions")


def _pair(pair: Pairing) -> dict[str, object]:
    return {k: v for k, v in asdict(pair).items() if k != "dialogue"}


def _pieces(dialogues: list[Dialogue], turns: int, count: int) -> list[Dialogue]:
    """`count` dialogues of up to `turns` turns: first every dialogue's beginning, then its later pieces, then again."""
    longest = max(len(d.turns) for d in dialogues)
    pieces = [
        Dialogue(f"{d.id}@{start}", d.topic, d.turns[start : start + turns])
        for start in range(0, longest, turns)
        for d in dialogues
        if len(d.turns) - start >= min(turns, len(d.turns))
    ]
    rounds = -(-count // len(pieces))
    return [
        Dialogue(f"{p.id}.{r}" if r else p.id, p.topic, p.turns) for r in range(rounds) for p in pieces
    ][:count]
