"""`gatt evaluate`: does the instruction of turn 1 hold to turn 20? Base, tuned, and base with it repeated (ceiling).

With an adapter file, all of them run over one loaded copy of the base; each in contexts of its own.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from pipeline.backends.attention import attention_map
from pipeline.backends.convert import gguf_file, hugging_face_folder
from pipeline.backends.hub import find_model
from pipeline.backends.llama import Llama
from pipeline.backends.weights import Adapter, Weights
from pipeline.config import Recipe
from pipeline.console import Progress, chatter, note, progress
from pipeline.files import JsonlLog, write_json
from pipeline.gatt.ghost import augment
from pipeline.gatt.kinds import obeys
from pipeline.gatt.metrics import Rate, adherence
from pipeline.gatt.statistics import distinct_n, kaplan_meier, lifetimes, paired_bootstrap, sample_size
from pipeline.gatt.text import flaw
from pipeline.gguf.read import open_gguf
from pipeline.machine import available_memory
from pipeline.pairs import Paired, read_pairs
from pipeline.records import Message, Reply, Request, Task
from pipeline.rundir import RunDir


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Answer every evaluation dialogue in every arm and score it; finished replies of an earlier attempt are kept."""
    pairs = read_pairs(rundir.pairs, "evaluate")
    settings, measured = recipe.evaluate, arms(recipe, rundir)
    context = settings.turns * (settings.max_tokens + 60) + 200
    with JsonlLog(rundir.replies) as log:
        replies = {(r["arm"], r["dialogue"], r["turn"]): Reply(**r) for r in log.records}
        total = len(measured) * len(pairs) * settings.turns
        with progress("evaluate: replies", total, len(replies)) as bar:
            for path, tested in groupby(sorted(measured, key=lambda arm: arm.path), key=lambda arm: arm.path):
                weights = Weights(open_gguf(path))
                for arm in tested:
                    with Llama(weights, len(pairs), context, settings.sequences, adapter=arm.adapter) as llama:
                        llama.run(_dialogue(arm.name, pair, recipe, replies, log, bar) for pair in pairs)
                weights.close()
    names = [arm.name for arm in measured]
    # Not in the order of the log, which an interrupted run leaves otherwise.
    ordered = sorted(replies.values(), key=lambda r: (names.index(r.arm), r.turn))
    if settings.attention:
        _attention(recipe, rundir, pairs[0], ordered)
    write_json(rundir.scores, scores(ordered, pairs))


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
            said = [r.text for r in replies if (r.arm, r.dialogue) == (arm, pair.dialogue.id) and r.finish != "context"]
            asked = pair.ask_student(said[:-1], recipe.dialogues.system)
            answered: tuple[Message, ...] = (*asked, {"role": "assistant", "content": said[-1]})
            maps[arm] = asdict(attention_map(folder, adapter, answered, pair.taught[0]))
    write_json(rundir.attention, maps)


class Arm(NamedTuple):
    """What is measured under a name: a file, perhaps with an adapter over it."""

    name: str
    path: Path
    adapter: Adapter | None = None


def arms(recipe: Recipe, rundir: RunDir) -> list[Arm]:
    """Base, tuned in the first format, the other formats by their names, and ceiling (the base, told in every turn)."""
    first, *others = recipe.export.formats
    base = gguf_file(find_model(recipe.model), first)
    if recipe.evaluate.adapter:
        tuned = [Arm("tuned", base, Adapter(Path(recipe.evaluate.adapter), recipe.evaluate.adapter_scale))]
    else:
        tuned = [Arm("tuned", rundir.tuned(first)), *(Arm(f"tuned, {name}", rundir.tuned(name)) for name in others)]
    return [Arm("base", base), *tuned, Arm("ceiling", base)]


def _dialogue(
    arm: str, pair: Paired, recipe: Recipe, replies: dict[tuple[str, str, int], Reply], log: JsonlLog, bar: Progress
) -> Task:
    said: list[str] = []
    for turn in range(1, recipe.evaluate.turns + 1):
        key = (arm, pair.dialogue.id, turn)
        if key not in replies:
            system = recipe.dialogues.system
            told = augment(pair.dialogue.turns, said, pair.taught, system)
            messages = told if arm == "ceiling" else pair.ask_student(said, system)
            seed = zlib.crc32(f"{recipe.seed} {pair.dialogue.id} {turn}".encode())
            done = yield Request(messages, seed, recipe.evaluate.max_tokens, recipe.evaluate.temperature)
            # Turn 1 would leave the window: the rest of this dialogue is marked, and not measured.
            reply = Reply(
                arm, pair.dialogue.id, turn, done.text.strip(), done.prompt_tokens, done.tokens, done.finish,
                obeys(pair.constraints(turn - 1), done.text.strip()), flaw(done.text, said, pair.demanded),
            )  # fmt: skip
            replies[key] = reply
            log.append(reply)
            bar.advance()
        said.append(replies[key].text)


def scores(replies: list[Reply], pairs: list[Paired]) -> dict[str, object]:
    """Adherence by arm and turn, by arm and instruction, over the last five turns and over all but the first.

    `replies` counts for each arm: all, those that obey (good answers or not), those that are no answer, those that were
    cut at `max_tokens`, and those left out because turn 1 had left the window. `difference` is that of the last five turns
    from the base, `survival` the share of dialogues without a broken answer so far.
    """
    names = {p.dialogue.id: p.name for p in pairs}
    last = max((r.turn for r in replies), default=0)
    first_late = max(1, last - 4)
    late, later = [r for r in replies if r.turn >= first_late], [r for r in replies if r.turn > 1]
    by_arm = {arm: [r for r in replies if r.arm == arm] for arm in dict.fromkeys(r.arm for r in replies)}
    late_by_arm = {arm: [r for r in late if r.arm == arm] for arm in by_arm}
    return {
        "turns": last,
        "by_turn": _table(adherence(replies, lambda r: (r.arm, r.turn))),
        "by_instruction": _table(adherence(replies, lambda r: (r.arm, names[r.dialogue]))),
        "late": _table(adherence(late, lambda r: (r.arm, f"turns {first_late} to {last}"))),
        "later": _table(adherence(later, lambda r: (r.arm, f"turns 2 to {last}"))),
        "replies": {arm: _count(mine) for arm, mine in by_arm.items()},
        "difference": {
            arm: asdict(paired_bootstrap(late_by_arm["base"], mine)) for arm, mine in late_by_arm.items() if arm != "base"
        },
        "survival": {arm: asdict(kaplan_meier(lifetimes(mine).values())) for arm, mine in by_arm.items()},
        "distinct_2": {arm: distinct_n(mine, 2) for arm, mine in by_arm.items()},
        "needed": asdict(needed) if (needed := sample_size(late_by_arm["tuned"])) else None,
    }


def _count(replies: list[Reply]) -> dict[str, int]:
    return {
        "all": len(replies),
        "obey": sum(r.obeys for r in replies),
        "no_answer": sum(bool(r.flaw) for r in replies),
        "cut": sum(r.finish == "length" for r in replies),
        "left_out": sum(r.finish == "context" for r in replies),
    }


def _table(rates: dict[tuple[str, object], Rate]) -> list[dict[str, object]]:
    return [{"arm": arm, "at": at, **asdict(rate)} for (arm, at), rate in rates.items()]
