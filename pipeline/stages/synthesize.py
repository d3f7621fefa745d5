"""`gatt synthesize`: the teacher answers with the instruction in every turn; we keep it in turn 1 only.

Two ways to an obedient answer: *sampled* (candidates are drawn until one passes the instruction's check) and *edited*
(the teacher answers without the instruction, and the answer is edited to obey). Either way it must be a good answer.
"""

from __future__ import annotations

import zlib
from collections import Counter
from functools import partial
from pathlib import Path

from pipeline.backends.llama import Llama
from pipeline.backends.teacher import Task
from pipeline.config import Recipe
from pipeline.console import Progress, note, progress
from pipeline.errors import GattError
from pipeline.files import JsonlLog, write_json, write_jsonl
from pipeline.gatt.ghost import augment, ghost
from pipeline.gatt.kinds import edit, hopeless, obeys
from pipeline.gatt.text import first_sentences, flaw, has_sentences
from pipeline.pairs import Paired, read_pairs
from pipeline.records import Answer, Completion, Request
from pipeline.rundir import RunDir

ACCEPTED = "accepted"


def run(recipe: Recipe, rundir: RunDir, teacher: Path) -> None:
    """Answer every training dialogue and write the ghosted ones; candidates of an earlier attempt are not drawn again.

    Raises:
        GattError: no dialogue was answered, because the teacher cannot follow the instructions.
    """
    pairs = read_pairs(rundir.pairs, "train")
    settings = recipe.synthesize
    with JsonlLog(rundir.answers) as log:
        known = {(row["dialogue"], row["turn"], row["candidate"]): Answer(**row) for row in log.records}
        turns = sum(len(p.dialogue.turns) for p in pairs)
        finished: dict[str, list[Answer]] = {}
        context = recipe.dialogues.turns * (settings.max_tokens + 100) + 200
        with (
            Llama(teacher, min(settings.sequences, len(pairs)), context) as llama,
            progress("synthesize: answers", turns, sum(a.verdict == ACCEPTED for a in known.values())) as bar,
        ):
            llama.run(_dialogue(pair, recipe, known, log, bar, finished) for pair in pairs)
    examples = [_example(p, finished[p.dialogue.id], recipe) for p in pairs if finished[p.dialogue.id]]
    if not examples:
        raise GattError("The teacher followed no instruction even once. Take others, a larger teacher, or edited_share = 1.")
    write_jsonl(rundir.examples, examples)
    _summarise(rundir, pairs, len(examples))


def _dialogue(
    pair: Paired, recipe: Recipe, known: dict[tuple[str, int, int], Answer], log: JsonlLog, bar: Progress,
    finished: dict[str, list[Answer]],
) -> Task:  # fmt: skip
    """Answer one dialogue turn by turn; it is cut short at a turn that no candidate answers well."""
    name = pair.dialogue.id
    accepted = finished[name] = []
    if pair.way == "sampled":
        enough = partial(hopeless, pair.constraints)
    else:
        enough = partial(has_sentences, count=recipe.synthesize.sentences)
    text = pair.instruction.text if pair.instruction and pair.way == "sampled" else ""
    for turn in range(len(pair.dialogue.turns)):
        # An edited answer goes on from the teacher's own words, a sampled one from the words that were accepted.
        history = [a.raw if pair.way == "edited" else a.text for a in accepted]
        messages = augment(pair.dialogue.turns, history, text, recipe.dialogues.system)
        for candidate in range(recipe.synthesize.candidates):
            answer = known.get((name, turn, candidate))
            if answer is None:
                seed = zlib.crc32(f"{recipe.seed} {name} {turn} {candidate}".encode())
                settings = recipe.synthesize
                completion = yield Request(messages, seed, settings.max_tokens, settings.temperature, enough)
                answer = _judge(pair, turn, candidate, completion, accepted, settings.sentences)
                log.append(answer)
                if answer.verdict == ACCEPTED:
                    bar.advance()
            if answer.verdict == ACCEPTED:
                accepted.append(answer)
                break
        else:
            return


def _judge(
    pair: Paired, turn: int, candidate: int, completion: Completion, accepted: list[Answer], sentences: int
) -> Answer:
    """Cut the candidate to whole sentences, edit it where that is the way, and say whether it is a good, obedient answer."""
    raw = completion.text.strip()
    if pair.way != "sampled":
        raw = first_sentences(raw, sentences)
    text = edit(pair.constraints, raw) if pair.way == "edited" and raw else raw
    verdict = ACCEPTED
    if completion.finish == "context":
        verdict = "context"
    elif completion.finish == "enough" and pair.way == "sampled":
        verdict = "disobeys"
    elif reason := flaw(raw, [a.raw for a in accepted], pair.demanded, finished=pair.way != "sampled"):
        verdict = reason
    elif completion.finish == "length" and pair.way == "sampled":
        verdict = "unfinished"
    elif not obeys(pair.constraints, text):
        verdict = "disobeys"
    return Answer(pair.dialogue.id, turn, candidate, raw, text, completion.tokens, verdict)


def _example(pair: Paired, answers: list[Answer], recipe: Recipe) -> dict[str, object]:
    """The ghosted dialogue in the `messages` form, with where it came from."""
    users = pair.dialogue.turns[: len(answers)]
    return {
        "messages": list(ghost(users, [a.text for a in answers], pair.taught, recipe.dialogues.system)),
        "dialogue": pair.dialogue.id,
        "instruction": pair.instruction.id if pair.instruction else None,
        "way": pair.way,
    }


def _summarise(rundir: RunDir, pairs: list[Paired], examples: int) -> None:
    """Write how many candidates were drawn and accepted by instruction and way; name what the teacher cannot follow."""
    of = {p.dialogue.id: (", ".join(c.name for c in p.constraints) or "none", p.way) for p in pairs}
    with JsonlLog(rundir.answers) as log:
        verdicts = Counter(row["verdict"] for row in log.records)
        drawn = Counter(of[row["dialogue"]] for row in log.records)
        taken = Counter(of[row["dialogue"]] for row in log.records if row["verdict"] == ACCEPTED)
    rows = [{"instruction": key[0], "way": key[1], "drawn": drawn[key], "accepted": taken[key]} for key in sorted(drawn)]
    write_json(rundir.acceptance, rows)
    rejected = ", ".join(f"{n} {reason}" for reason, n in verdicts.most_common() if reason != ACCEPTED)
    note(f"synthesize: {examples} of {len(pairs)} dialogues, {verdicts[ACCEPTED]} answers (rejected: {rejected or 'none'})")
    for row in rows:
        if not row["accepted"]:
            note(f"synthesize: the teacher never followed {row['instruction']!r} ({row['way']}, {row['drawn']} candidates); "
                 "it is not taught that way. Word it otherwise, take it out of the pool, or take a larger teacher.")  # fmt: skip
