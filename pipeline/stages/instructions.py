"""`gatt instructions`: which dialogue is to keep which instruction, in training and in evaluation."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path

import tomlkit

from pipeline.console import log
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.evaluation.suites import Suite, suites
from pipeline.files import write_json, write_text
from pipeline.gatt.constraints.registry import kind_of
from pipeline.gatt.generated_values import LISTINGS, distinct, items, known, masked
from pipeline.gatt.instructions import Ratios, assign_evaluation, assign_training
from pipeline.gguf.merge import open_base
from pipeline.hub.models import find_model
from pipeline.inference.generator import GenerationEngine, open_generator
from pipeline.recipe import Recipe
from pipeline.records import Assignment, Constraint, Dialogue, Instruction, Request, Task
from pipeline.run_dir import RunDir

_ASKED = 8
"""How often the teacher is asked for a list."""

SECTIONS = ("dialogues", "instructions", "synthesize", "evaluate")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    generated = [run_dir.lists] if run_dir.lists.exists() else []
    return [find_model(recipe.model).path, *generated]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Split the dialogues, pair them with instructions, and write both to `instructions/pairs.json`.

    What evaluation measures beside the trained instructions goes to `suites.json`: another choice there trains nothing anew.

    Raises:
        GattError: too few dialogues to keep training and evaluation apart.
    """
    open_base(
        find_model(recipe.model).path
    )  # refuses what cannot be exported now, and not after the training
    everything = load_dialogues(recipe.dialogues.source)
    random.Random(f"split {recipe.seed}").shuffle(everything)
    held_out = [d for d in everything if len(d.turns) >= recipe.evaluate.turns][
        : recipe.evaluate.dialogues
    ]
    names = {d.id for d in held_out}
    rest = [d for d in everything if d.id not in names]
    if len(held_out) < recipe.evaluate.dialogues or not rest:
        raise GattError(
            f"{recipe.dialogues.source} has {len(everything)} dialogues, {len(held_out)} of them with "
            f"{recipe.evaluate.turns} user turns: too few to evaluate on {recipe.evaluate.dialogues} and train on others. "
            "Bring more, or lower evaluate.dialogues or evaluate.turns."
        )
    watched = rest[: min(recipe.dialogues.validation, len(rest) // 4)]
    training = _pieces(rest[len(watched) :], recipe.dialogues.turns, recipe.dialogues.train)
    asked = recipe.instructions
    pool = (*asked.pool, *_generated(recipe, run_dir))
    for constraint in (*pool, *recipe.evaluate.unseen):
        if kind_of(constraint).judged and not recipe.evaluate.judge:
            raise GattError(
                f"No program can check {constraint.name!r}. Name a model or a server in evaluate.judge that can tell."
            )
    if not pool:
        raise GattError(
            'instructions.pool is empty. Name at least one, for example {kind = "opening", value = "Ahoy!"}.'
        )
    shares = Ratios(
        asked.plain_ratio,
        asked.system_ratio,
        asked.change_ratio,
        asked.combine_ratio,
        asked.short_ratio,
        recipe.synthesize.edited_ratio,
    )
    made, pairs = assign_training(training, pool, shares, recipe.seed)
    checkable = [c for c in pool if not kind_of(c).judged]
    tested, evaluation = assign_evaluation(held_out, pool)
    sides = {
        "train": list(zip(training, pairs, strict=True)),
        "validate": list(zip(watched, assign_evaluation(watched, checkable)[1], strict=True))
        if checkable
        else [],
        "evaluate": list(zip(held_out, evaluation, strict=True)),
    }
    write_json(run_dir.pairs, written({**made, **tested}, sides))
    settings = recipe.evaluate
    turns = min(settings.suite_turns, settings.turns)
    write_json(
        run_dir.suites,
        written(
            *suites(
                held_out[: settings.suite_dialogues], pool, settings.unseen, turns, settings.turns
            )
        ),
    )
    log(
        f"instructions: {len(training)} training dialogues, {len(held_out)} for evaluation, {len(made)} instructions"
    )


def written(made: dict[str, Instruction], sides: dict[str, Suite]) -> dict[str, object]:
    """What `pairs.read_pairs` reads back."""
    rows = {
        side: [{"dialogue": asdict(d), **_pair(p)} for d, p in suite]
        for side, suite in sides.items()
    }
    return {"instructions": [asdict(i) for i in made.values()], **rows}


def _generated(recipe: Recipe, run_dir: RunDir) -> list[Constraint]:
    """The values of `lists.toml`, which the teacher fills where a kind is missing."""
    asked = recipe.instructions
    lists = (
        tomlkit.parse(run_dir.lists.read_text(encoding="utf-8")).unwrap()
        if run_dir.lists.exists()
        else {}
    )
    missing = [kind for kind in asked.generate if kind not in lists]
    if missing:
        with open_generator(recipe, _ASKED) as teacher:
            lists |= {
                kind: _list(kind, teacher, asked.generate_count, recipe.seed) for kind in missing
            }
        write_text(
            run_dir.lists, "# Edit as you like: what stands here is used.\n" + tomlkit.dumps(lists)
        )
    found = [Constraint(kind, value) for kind in asked.generate for value in lists[kind]]
    for constraint in found:
        kind_of(constraint)  # a mistake in an edited list is told now
    return found


def _list(kind: str, teacher: GenerationEngine, count: int, seed: int) -> list[str]:
    """Up to `count` values that the teacher lists and knows, in the order of its lists."""
    listing = LISTINGS[kind]
    said: dict[int, str] = {}
    shown: dict[str, str] = {}

    def ask(n: int) -> Task:
        said[n] = (yield _question(listing.ask, seed + n)).text

    def probe(item: str) -> Task:
        answer = (yield _question(listing.probe.format(v=item), seed)).text
        if listing.guess:
            answer = (yield _question(listing.guess.format(text=masked(item, answer)), seed)).text
        shown[item] = answer

    teacher.run(ask(n) for n in range(_ASKED))
    candidates = distinct([item for n in range(_ASKED) for item in items(said[n])])
    teacher.run(probe(item) for item in candidates)
    kept = [item for item in candidates if known(kind, item, shown[item])]
    log(
        f"instructions: {kind}: {len(candidates)} listed, {len(kept)} of them known to the teacher: {', '.join(kept[:count])}"
    )
    if not kept:
        raise GattError(
            f"The teacher knows none of what it listed as {kind}. Take a larger teacher, or name values in the pool."
        )
    return kept[:count]


def _question(text: str, seed: int) -> Request:
    return Request(({"role": "user", "content": text},), seed, 120)


def _pair(pair: Assignment) -> dict[str, object]:
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
        Dialogue(f"{p.id}.{r}" if r else p.id, p.topic, p.turns)
        for r in range(rounds)
        for p in pieces
    ][:count]
