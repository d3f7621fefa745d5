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

from pipeline.console import Progress, chatter, note, progress
from pipeline.errors import GattError
from pipeline.evaluation.attention import attention_map
from pipeline.evaluation.divergence import drift
from pipeline.evaluation.judge import judge
from pipeline.evaluation.scores import scores
from pipeline.evaluation.suites import probed_turns
from pipeline.files import JsonlLog, write_json
from pipeline.gatt.assignment import Paired, read_pairs, read_sides
from pipeline.gatt.constraints.content_checks import mentions
from pipeline.gatt.constraints.registry import obeys
from pipeline.gatt.ghost import augment
from pipeline.gatt.quality import flaw
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.convert import gguf_file, hugging_face_folder
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import Llama
from pipeline.inference.model import Adapter, Weights
from pipeline.inference.openai_client import Server
from pipeline.recipe import Recipe
from pipeline.records import Message, Reply, Request, Task
from pipeline.run_dir import RunDir
from pipeline.system import available_memory

Suites = Mapping[str, list[Paired]]
Replies = dict[tuple[str, str, int, str], Reply]
"""By arm, dialogue, turn and probe."""


class Arm(NamedTuple):
    """What is measured under a name: a file, perhaps with an adapter over it, or a server. `whole`: in all suites."""

    name: str
    path: Path | None
    adapter: Adapter | None = None
    server: str = ""
    whole: bool = True


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Answer every dialogue in every arm and score it; finished replies of an earlier attempt are kept."""
    suites = {"evaluate": read_pairs(rundir.pairs, "evaluate"), **read_sides(rundir.suites)}
    measured = arms(recipe, rundir)
    with JsonlLog(rundir.replies) as log:
        replies: Replies = {
            (r["arm"], r["dialogue"], r["turn"], r["probe"]): Reply(**r) for r in log.records
        }
        total = sum(_turns(pair, recipe) for arm in measured for pair in _pairs(arm, suites))
        with progress("evaluate: replies", total, len(replies)) as bar:
            for path, tested in groupby(
                sorted(measured, key=lambda arm: str(arm.path)), key=lambda arm: arm.path
            ):
                weights = Weights(open_gguf(path)) if path else None
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
        _attention(recipe, rundir, suites["evaluate"][0], ordered)
    judged = None
    if recipe.evaluate.judge:
        everything = [pair for suite in suites.values() for pair in suite]
        ordered, judged = judge(recipe.evaluate.judge, ordered, everything, rundir.judged)
    found = {
        **scores(ordered, suites, recipe.instructions.pool),
        "primary": recipe.evaluate.primary,
        "judge": judged,
    }
    if suites.get("plain"):
        found["damage"] = _damage(measured, suites["plain"], recipe, ordered)
    write_json(rundir.scores, found)


def arms(recipe: Recipe, rundir: RunDir) -> list[Arm]:
    """Base, tuned in the first format, the other formats by their names, the others of the recipe, and ceiling (the base,
    told in every turn).

    Raises:
        GattError: one of the others is no GGUF file and no server.
    """
    first, *formats = recipe.export.formats
    base = gguf_file(find_model(recipe.model), first)
    if recipe.evaluate.adapter:
        tuned = [
            Arm(
                "tuned", base, Adapter(Path(recipe.evaluate.adapter), recipe.evaluate.adapter_scale)
            )
        ]
    else:
        more = [Arm(f"tuned, {name}", rundir.tuned(name), whole=False) for name in formats]
        tuned = [Arm("tuned", rundir.tuned(first)), *more]
    others = [_other(name, base) for name in recipe.evaluate.others]
    found = [Arm("base", base), *tuned, *others, Arm("ceiling", base, whole=False)]
    if twice := [
        arm.name for n, arm in enumerate(found) if arm.name in [a.name for a in found[:n]]
    ]:
        raise GattError(f"evaluate.others has two of the name {twice[0]!r}. Rename the file.")
    return found


def _other(name: str, base: Path) -> Arm:
    if name.startswith(("http://", "https://")):
        return Arm(name.partition("#")[2] or name, None, server=name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise GattError(
            f"evaluate.others: no file at {path}. Expected a GGUF model, a GGUF adapter, or a server's address."
        )
    if read_gguf(path).field("general.type") == "adapter":
        return Arm(path.stem, base, Adapter(path))
    return Arm(path.stem, path)


def _model(arm: Arm, weights: Weights | None, recipe: Recipe, dialogues: int) -> Llama | Server:
    settings = recipe.evaluate
    if weights is None:
        url, _, served = arm.server.partition("#")
        return Server(url, served, settings.sequences or 24)
    return Llama(weights, dialogues, _context(recipe), settings.sequences, adapter=arm.adapter)


def _context(recipe: Recipe) -> int:
    return recipe.evaluate.turns * (recipe.evaluate.max_tokens + 60) + 200


def _pairs(arm: Arm, suites: Suites) -> list[Paired]:
    """The dialogues of an arm, long ones first: nobody waits for the last one to end."""
    pairs = [
        pair for name, suite in suites.items() if arm.whole or name == "evaluate" for pair in suite
    ]
    return sorted(pairs, key=lambda pair: -len(pair.dialogue.turns))


def _turns(pair: Paired, recipe: Recipe) -> int:
    """How many replies a dialogue takes."""
    turns = min(len(pair.dialogue.turns), recipe.evaluate.turns)
    return turns + len(pair.asks) * len(probed_turns(turns))


def _dialogue(
    arm: str, pair: Paired, recipe: Recipe, replies: Replies, log: JsonlLog, bar: Progress
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
                value = next((a.value for a in pair.asks if a.attribute == probe), "")
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
                    flaw(text, () if probe else said, "" if probe else pair.demanded),
                    probe,
                )
                replies[key] = reply
                log.append(reply)
                bar.advance()
        said.append(replies[arm, pair.dialogue.id, turn, ""].text)


def _branches(pair: Paired, turn: int, turns: int) -> Iterator[tuple[str, Paired]]:
    """The questions that are put in place of this turn, each by its attribute, and last the turn itself ("")."""
    if turn in probed_turns(turns):
        for ask in pair.asks:
            yield ask.attribute, pair.asking(turn, ask.question)
    yield "", pair


def _request(arm: str, pair: Paired, said: list[str], recipe: Recipe, name: str) -> Request:
    system, settings = recipe.dialogues.system, recipe.evaluate
    told = arm == "ceiling"
    messages = (
        augment(pair.dialogue.turns, said, pair.taught, system)
        if told
        else pair.ask_student(said, system)
    )
    return Request(
        messages,
        zlib.crc32(f"{recipe.seed} {name}".encode()),
        settings.max_tokens,
        settings.temperature,
    )


def _damage(
    measured: list[Arm], plain: list[Paired], recipe: Recipe, replies: list[Reply]
) -> dict[str, Any]:
    """Perplexity of each arm on the base's own answers in plain dialogues, and its divergence from the base."""
    base, *others = [arm for arm in measured if arm.whole and arm.path]
    said = {
        (r.dialogue, r.turn): r.text
        for r in replies
        if r.arm == base.name and r.finish != "context"
    }
    chats = [
        pair.ask_student(
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
        Llama(base.path, 1, _context(recipe)) as first,
        progress("evaluate: damage", len(others)) as bar,
    ):
        for arm in others:
            assert arm.path
            with Llama(arm.path, 1, _context(recipe), adapter=arm.adapter) as model:
                if (
                    first.vocabulary == model.vocabulary
                ):  # else their probabilities cannot be compared
                    found = drift(first, model, chats)
                    perplexity |= {base.name: found.base, arm.name: found.model}
                    kl[arm.name], tokens = found.kl, found.tokens
            bar.advance()
    return {"tokens": tokens, "perplexity": perplexity, "kl": kl}


def _attention(recipe: Recipe, rundir: RunDir, pair: Paired, replies: list[Reply]) -> None:
    """What the answers of one dialogue attend to, for base and tuned, each in the words of its own dialogue."""
    model = find_model(recipe.model)
    if 8 * model.bytes > available_memory():  # float32 of 4 bits, and its maps
        note("evaluate: the model has no room here in float32; no map of its attention.")
        return
    maps = {}
    with chatter(rundir.attention.with_name("transformers.log")):
        folder = hugging_face_folder(model)
        for arm, adapter in (("base", None), ("tuned", rundir.adapter)):
            said = [
                r.text
                for r in replies
                if (r.arm, r.dialogue) == (arm, pair.dialogue.id) and r.finish != "context"
            ]
            asked = pair.ask_student(said[:-1], recipe.dialogues.system)
            answered: tuple[Message, ...] = (*asked, {"role": "assistant", "content": said[-1]})
            maps[arm] = asdict(attention_map(folder, adapter, answered, pair.taught[0]))
    write_json(rundir.attention, maps)
