"""`gatt evaluate`: does the instruction of turn 1 hold to turn 20? Base, tuned, and base with it repeated (ceiling).

With an adapter file, all of them run over one loaded copy of the base; each in contexts of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import Progress, capture_output, log, progress
from pipeline.errors import GattError
from pipeline.evaluation.attention import attention_map
from pipeline.evaluation.divergence import measure_divergence
from pipeline.evaluation.judge import judge
from pipeline.evaluation.scores import scores
from pipeline.evaluation.suites import probed_turns
from pipeline.files import JsonlLog, write_json
from pipeline.gatt.assignment import AssignedDialogue, read_split, read_splits
from pipeline.gatt.constraints.content_checks import mentions
from pipeline.gatt.constraints.registry import obeys
from pipeline.gatt.ghost import augment
from pipeline.gatt.quality import find_defect
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.convert import cached_checkpoint, cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.inference.openai_client import OpenAIClient
from pipeline.recipe import Recipe
from pipeline.records import Message, Reply, Request, Task
from pipeline.run_dir import RunDir
from pipeline.system import available_memory

Suites = Mapping[str, list[AssignedDialogue]]
Replies = dict[tuple[str, str, int, str], Reply]
"""By arm, dialogue, turn and probe."""


class Arm(NamedTuple):
    """What is measured under a name: a file, perhaps with an adapter over it, or a server. `whole`: in all suites."""

    name: str
    path: Path | None
    adapter: Adapter | None = None
    server: str = ""
    whole: bool = True


SECTIONS = ("evaluate", "dialogues", "export")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    tuned = [run_dir.tuned(name) for name in recipe.export.formats]
    if recipe.evaluate.adapter:
        tuned = [Path(recipe.evaluate.adapter)]
    return [find_model(recipe.model).path, run_dir.pairs, run_dir.suites, *tuned]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Answer every dialogue in every arm and score it; finished replies of an earlier attempt are kept."""
    suites = {"evaluate": read_split(run_dir.pairs, "evaluate"), **read_splits(run_dir.suites)}
    measured = arms(recipe, run_dir)
    with JsonlLog(run_dir.replies) as log:
        replies: Replies = {
            (r["arm"], r["dialogue"], r["turn"], r["probe"]): Reply(**r) for r in log.records
        }
        total = sum(_turns(pair, recipe) for arm in measured for pair in _pairs(arm, suites))
        with progress("evaluate: replies", total, len(replies)) as bar:
            for path, tested in groupby(
                sorted(measured, key=lambda arm: str(arm.path)), key=lambda arm: arm.path
            ):
                weights = LoadedModel(open_gguf(path)) if path else None
                for arm in tested:
                    pairs = _pairs(arm, suites)
                    with _model(arm, weights, recipe, len(pairs)) as model:
                        model.run(
                            _dialogue(arm.name, pair, recipe, replies, log, bar) for pair in pairs
                        )
                if weights:
                    weights.close()
    names = [arm.name for arm in measured]
    # Not in the order of the log, which an interrupted run leaves otherwise.
    ordered = sorted(
        replies.values(), key=lambda r: (names.index(r.arm), r.dialogue, r.turn, r.probe)
    )
    if recipe.evaluate.attention:
        _attention(recipe, run_dir, suites["evaluate"][0], ordered)
    judged = None
    if recipe.evaluate.judge:
        everything = [pair for suite in suites.values() for pair in suite]
        ordered, judged = judge(recipe.evaluate.judge, ordered, everything, run_dir.judged)
    found = {
        **scores(ordered, suites, recipe.instructions.pool),
        "primary": recipe.evaluate.primary,
        "judge": judged,
    }
    if suites.get("plain"):
        found["degradation"] = _damage(measured, suites["plain"], recipe, ordered)
    write_json(run_dir.scores, found)


def arms(recipe: Recipe, run_dir: RunDir) -> list[Arm]:
    """Base, tuned in the first format, the other formats by their names, the others of the recipe, and ceiling (the base,
    told in every turn).

    Raises:
        GattError: one of the others is no GGUF file and no server.
    """
    first, *formats = recipe.export.formats
    base = cached_gguf(find_model(recipe.model), first)
    if recipe.evaluate.adapter:
        tuned = [
            Arm(
                "tuned", base, Adapter(Path(recipe.evaluate.adapter), recipe.evaluate.adapter_scale)
            )
        ]
    else:
        more = [Arm(f"tuned, {name}", run_dir.tuned(name), whole=False) for name in formats]
        tuned = [Arm("tuned", run_dir.tuned(first)), *more]
    others = [_other(name, base) for name in recipe.evaluate.extra_models]
    found = [Arm("base", base), *tuned, *others, Arm("ceiling", base, whole=False)]
    if twice := [
        arm.name for n, arm in enumerate(found) if arm.name in [a.name for a in found[:n]]
    ]:
        raise GattError(f"evaluate.extra_models has two of the name {twice[0]!r}. Rename the file.")
    return found


def _other(name: str, base: Path) -> Arm:
    if name.startswith(("http://", "https://")):
        return Arm(name.partition("#")[2] or name, None, server=name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise GattError(
            f"evaluate.extra_models: no file at {path}. Expected a GGUF model, a GGUF adapter, or a server's address."
        )
    if read_gguf(path).field("general.type") == "adapter":
        return Arm(path.stem, base, Adapter(path))
    return Arm(path.stem, path)


def _model(
    arm: Arm, weights: LoadedModel | None, recipe: Recipe, dialogues: int
) -> BatchEngine | OpenAIClient:
    settings = recipe.evaluate
    if weights is None:
        url, _, served = arm.server.partition("#")
        return OpenAIClient(url, served, settings.max_parallel or 24)
    return BatchEngine(
        weights, dialogues, _context(recipe), settings.max_parallel, adapter=arm.adapter
    )


def _context(recipe: Recipe) -> int:
    return recipe.evaluate.turns * (recipe.evaluate.max_tokens + 60) + 200


def _pairs(arm: Arm, suites: Suites) -> list[AssignedDialogue]:
    """The dialogues of an arm, long ones first: nobody waits for the last one to end."""
    pairs = [
        pair for name, suite in suites.items() if arm.whole or name == "evaluate" for pair in suite
    ]
    return sorted(pairs, key=lambda pair: -len(pair.dialogue.turns))


def _turns(pair: AssignedDialogue, recipe: Recipe) -> int:
    """How many replies a dialogue takes."""
    turns = min(len(pair.dialogue.turns), recipe.evaluate.turns)
    return turns + len(pair.recall_questions) * len(probed_turns(turns))


def _dialogue(
    arm: str, pair: AssignedDialogue, recipe: Recipe, replies: Replies, log: JsonlLog, bar: Progress
) -> Task:
    """All turns of a dialogue. What is asked in a branch is forgotten: the turn is said as if it had not been asked."""
    said: list[str] = []
    turns = min(len(pair.dialogue.turns), recipe.evaluate.turns)
    for turn in range(1, turns + 1):
        for probe, asked in _branches(pair, turn, turns):
            key = (arm, pair.dialogue.id, turn, probe)
            if key not in replies:
                done = yield _request(
                    arm, asked, said, recipe, f"{pair.dialogue.id} {turn}{probe and f' {probe}'}"
                )
                text = done.text.strip()
                value = next((a.value for a in pair.recall_questions if a.attribute == probe), "")
                held = mentions(value, text) if probe else obeys(pair.constraints(turn - 1), text)
                # Turn 1 would leave the window: the rest of this dialogue is marked, and not measured.
                reply = Reply(
                    arm,
                    pair.dialogue.id,
                    turn,
                    text,
                    done.prompt_tokens,
                    done.tokens,
                    done.finish,
                    held,
                    find_defect(text, () if probe else said, "" if probe else pair.required_words),
                    probe,
                )
                replies[key] = reply
                log.append(reply)
                bar.advance()
        said.append(replies[arm, pair.dialogue.id, turn, ""].text)


def _branches(
    pair: AssignedDialogue, turn: int, turns: int
) -> Iterator[tuple[str, AssignedDialogue]]:
    """The questions that are put in place of this turn, each by its attribute, and last the turn itself ("")."""
    if turn in probed_turns(turns):
        for ask in pair.recall_questions:
            yield ask.attribute, pair.with_question(turn, ask.question)
    yield "", pair


def _request(
    arm: str, pair: AssignedDialogue, said: list[str], recipe: Recipe, name: str
) -> Request:
    system, settings = recipe.dialogues.system, recipe.evaluate
    told = arm == "ceiling"
    messages = (
        augment(pair.dialogue.turns, said, pair.student_instructions, system)
        if told
        else pair.student_prompt(said, system)
    )
    return Request(
        messages,
        zlib.crc32(f"{recipe.seed} {name}".encode()),
        settings.max_tokens,
        settings.temperature,
    )


def _damage(
    measured: list[Arm], plain: list[AssignedDialogue], recipe: Recipe, replies: list[Reply]
) -> dict[str, Any]:
    """Perplexity of each arm on the base's own answers in plain dialogues, and its divergence from the base."""
    base, *others = [arm for arm in measured if arm.whole and arm.path]
    said = {
        (r.dialogue, r.turn): r.text
        for r in replies
        if r.arm == base.name and r.finish != "context"
    }
    chats = [
        pair.student_prompt(
            [
                said[key]
                for t in range(len(pair.dialogue.turns))
                if (key := (pair.dialogue.id, t + 1)) in said
            ],
            recipe.dialogues.system,
        )
        for pair in plain
    ]
    perplexity: dict[str, float] = {}
    kl, tokens = {base.name: 0.0}, 0
    assert base.path
    with (
        BatchEngine(base.path, 1, _context(recipe)) as first,
        progress("evaluate: damage", len(others)) as bar,
    ):
        for arm in others:
            assert arm.path
            with BatchEngine(arm.path, 1, _context(recipe), adapter=arm.adapter) as model:
                if (
                    first.vocabulary == model.vocabulary
                ):  # else their probabilities cannot be compared
                    found = measure_divergence(first, model, chats)
                    perplexity |= {base.name: found.base, arm.name: found.model}
                    kl[arm.name], tokens = found.kl, found.tokens
            bar.advance()
    return {"tokens": tokens, "perplexity": perplexity, "kl": kl}


def _attention(
    recipe: Recipe, run_dir: RunDir, pair: AssignedDialogue, replies: list[Reply]
) -> None:
    """What the answers of one dialogue attend to, for base and tuned, each in the words of its own dialogue."""
    model = find_model(recipe.model)
    if 8 * model.bytes > available_memory():  # float32 of 4 bits, and its maps
        log("evaluate: the model has no room here in float32; no map of its attention.")
        return
    maps = {}
    with capture_output(run_dir.attention.with_name("transformers.log")):
        folder = cached_checkpoint(model)
        for arm, adapter in (("base", None), ("tuned", run_dir.adapter)):
            said = [
                r.text
                for r in replies
                if (r.arm, r.dialogue) == (arm, pair.dialogue.id) and r.finish != "context"
            ]
            asked = pair.student_prompt(said[:-1], recipe.dialogues.system)
            answered: tuple[Message, ...] = (*asked, {"role": "assistant", "content": said[-1]})
            maps[arm] = asdict(
                attention_map(folder, adapter, answered, pair.student_instructions[0])
            )
    write_json(run_dir.attention, maps)
