"""`gatt synthesize`: the teacher answers with the instruction in every turn; we keep only its first mention.

Two ways to an obedient answer: *sampled* (candidates are drawn until one passes the instruction's check) and *edited*
(the teacher answers without the instruction, and the answer is edited to obey). Either way it must be a good answer.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.console import Progress, log, print_result, progress
from pipeline.errors import GattError
from pipeline.files import JsonlLog, write_json, write_jsonl, write_text
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.gatt.constraints.registry import edit, kind_of, obeys, prefix_fails
from pipeline.gatt.quality import find_defect, has_repeated_ngrams, is_on_topic
from pipeline.gatt.text import first_sentences, has_sentences, words
from pipeline.hub.models import find_model
from pipeline.hub.upload import upload
from pipeline.inference.generator import GenerationEngine, open_generator
from pipeline.recipe import Recipe
from pipeline.records import Answer, Completion, Constraint, Message, Request, Task
from pipeline.run_dir import RunDir

ACCEPTED = "accepted"
_PILOTS = 6
"""Dialogues by which an instruction is tried: if none of their first turns is obeyed, the others are not begun."""
_NAMED = 8
"""Instructions that a remark names."""
_ALIKE = 0.3
"""Share of its pairs of words that an answer may have in common with an earlier one: who learns from repeats, repeats."""
_COMMON = 3
"""Accepted answers of the same words that the corpus may hold."""

SECTIONS = ("synthesize", "dialogues")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    return [find_model(recipe.model).path, run_dir.pairs]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Answer every training dialogue and write the ghosted ones; candidates of an earlier attempt are not drawn again.

    Raises:
        GattError: no dialogue was answered, because the teacher cannot follow the instructions.
    """
    pairs = read_split(run_dir.pairs, "train")
    turns = sum(len(p.dialogue.turns) for p in pairs)
    with JsonlLog(run_dir.answers) as answers, open_generator(recipe, len(pairs)) as teacher:
        before = sum(row["verdict"] == ACCEPTED for row in answers.records)
        with progress("synthesize: answers", turns, before) as bar:
            synthesis = Synthesis(recipe, answers, bar)
            synthesis.answer(teacher, pairs)
        name = teacher.name
    common = synthesis.cut_common(pairs)
    examples = [synthesis.example(pair, name) for pair in pairs if synthesis.accepted(pair)]
    if not examples:
        raise GattError(
            "The teacher followed no instruction even once. Take others, a larger teacher, or edited_ratio = 1."
        )
    write_jsonl(run_dir.examples, examples)
    _write_statistics(run_dir, pairs, synthesis.answers.values(), common)
    write_text(run_dir.card, _card(recipe, examples, name))
    log(
        f"synthesize: {len(examples)} of {len(pairs)} dialogues, {sum(len(synthesis.accepted(p)) for p in pairs)} answers"
    )
    show_statistics(run_dir)


class Synthesis:
    """All candidates by (dialogue, turn, candidate), and the rules by which more are drawn."""

    def __init__(self, recipe: Recipe, log: JsonlLog, bar: Progress) -> None:
        self._recipe, self._settings, self._log, self._bar = recipe, recipe.synthesize, log, bar
        self.answers = {
            (row["dialogue"], row["turn"], row["candidate"]): Answer(**row) for row in log.records
        }
        self._accepted: dict[str, list[Answer]] = {}

    def accepted(self, pair: AssignedDialogue) -> list[Answer]:
        """The answers of a dialogue, in order of the turns."""
        return self._accepted.get(pair.dialogue.id, [])

    def answer(self, teacher: GenerationEngine, pairs: list[AssignedDialogue]) -> None:
        """Answer the dialogues, but not those of an instruction that its pilots show to be beyond the teacher.

        The pilots are done first, so that who is given up does not depend on what ran when.
        """
        nth: Counter[str] = Counter()
        first: list[AssignedDialogue] = []
        later: list[AssignedDialogue] = []
        for pair in pairs:
            nth[pair.name] += pair.method == "sampled"
            (later if pair.method == "sampled" and nth[pair.name] > _PILOTS else first).append(pair)
        teacher.run(map(self._dialogue, first))
        followed = {pair.name for pair in first if pair.method == "sampled" and self.accepted(pair)}
        teacher.run(self._dialogue(pair) for pair in later if pair.name in followed)
        vain = [
            f"{name} ({min(n, _PILOTS)})"
            for name, n in nth.most_common()
            if n and name not in followed
        ]
        if vain:
            vain[_NAMED:] = (
                [f"{len(vain) - _NAMED} more (see --stats)"] if len(vain) > _NAMED else []
            )
            log(
                f"synthesize: given up after so many dialogues, because no sampled answer obeyed and was a good one: "
                f"{'; '.join(vain)}. Raise edited_ratio or candidates, take others, or a larger teacher."
            )

    def _dialogue(self, pair: AssignedDialogue) -> Task:
        """Answer one dialogue turn by turn; it is cut short at a turn that no candidate answers well."""
        accepted = self._accepted[pair.dialogue.id] = []
        settings = self._settings
        for turn in range(len(pair.dialogue.turns)):
            constraints = pair.constraints(turn)
            # An edited answer goes on from the teacher's own words, a sampled one from the words that were accepted.
            history = [a.text if pair.method == "sampled" else a.raw for a in accepted]
            messages = pair.teacher_prompt(history, self._recipe.dialogues.system)
            sampled, plain = (
                partial(_in_vain, constraints),
                partial(has_sentences, count=settings.max_sentences),
            )
            for candidate in range(settings.candidates):
                key = (pair.dialogue.id, turn, candidate)
                if key not in self.answers:
                    seed = zlib.crc32(
                        f"{self._recipe.seed} {pair.dialogue.id} {turn} {candidate}".encode()
                    )
                    enough = sampled if pair.method == "sampled" else plain
                    completion = yield Request(
                        messages, seed, settings.max_tokens, settings.temperature, enough
                    )
                    self.answers[key] = answer = _judge(
                        pair, turn, candidate, completion, accepted, settings.max_sentences
                    )
                    self._log.append(answer)
                    self._bar.advance(answer.verdict == ACCEPTED)
                if self.answers[key].verdict == ACCEPTED:
                    accepted.append(self.answers[key])
                    break
            else:
                return

    def cut_common(self, pairs: list[AssignedDialogue]) -> int:
        """Cut a dialogue where its answer is one that the corpus holds already too often; how many answers that costs."""
        seen: Counter[frozenset[str]] = Counter()
        cut = 0
        for pair in pairs:
            answers = self.accepted(pair)
            for turn, answer in enumerate(answers):
                said = frozenset(words(answer.raw))
                seen[said] += 1
                if seen[said] > _COMMON:
                    cut += len(answers) - turn
                    del answers[turn:]
        return cut

    def example(self, pair: AssignedDialogue, teacher: str) -> dict[str, Any]:
        """The ghosted dialogue in the `messages` form, with where it came from."""
        answers = self.accepted(pair)
        messages = pair.student_prompt([a.text for a in answers], self._recipe.dialogues.system)
        verdicts = [
            [a.verdict for a in self._candidates(pair, turn)] for turn in range(len(answers))
        ]
        return {
            # A dialogue that was cut short ends with the answer before.
            "messages": messages[:-1] if messages[-1]["role"] == "user" else messages,
            "asked": self._asked(pair, answers),
            "dialogue": pair.dialogue.id,
            "instruction": pair.name,
            "way": pair.method,
            "teacher": teacher,
            "seed": self._recipe.seed,
            "verdicts": verdicts,
        }

    def _asked(self, pair: AssignedDialogue, answers: list[Answer]) -> list[Message]:
        """The chat as the teacher had it, with the answers in its own words."""
        told = pair.teacher_prompt(
            [a.text if pair.method == "sampled" else a.raw for a in answers],
            self._recipe.dialogues.system,
        )
        return list(told[:-1] if told[-1]["role"] == "user" else told)

    def _candidates(self, pair: AssignedDialogue, turn: int) -> list[Answer]:
        keys = (
            (pair.dialogue.id, turn, candidate) for candidate in range(self._settings.candidates)
        )
        return [self.answers[key] for key in keys if key in self.answers]


def _in_vain(constraints: tuple[Constraint, ...], text: str) -> bool:
    """Whether a candidate that begins so will be rejected, whatever follows."""
    return prefix_fails(constraints, text) or has_repeated_ngrams(
        words(text)[:-1]
    )  # the last word may not be whole


def _judge(
    pair: AssignedDialogue,
    turn: int,
    candidate: int,
    completion: Completion,
    accepted: list[Answer],
    sentences: int,
) -> Answer:
    """Cut the candidate to whole sentences, edit it where that is the way, and say whether it is a good, obedient answer."""
    raw = completion.text.strip()
    constraints, asked = pair.constraints(turn), pair.dialogue.turns[: turn + 1]
    if pair.method != "sampled":
        raw = first_sentences(raw, sentences)
    text = edit(constraints, raw) if pair.method == "edited" and raw else raw
    verdict = ACCEPTED
    if completion.finish == "context":
        verdict = "context"
    elif (
        pair.method == "sampled"
        and completion.finish == "enough"
        and not has_repeated_ngrams(words(raw))
    ):
        verdict = "disobeys"
    elif reason := find_defect(
        raw, [a.raw for a in accepted], pair.required_words, pair.method != "sampled", _ALIKE
    ):
        verdict = reason
    elif not any(kind_of(c).family == "language" for c in constraints) and not is_on_topic(
        raw, [*asked, *(a.raw for a in accepted)]
    ):
        verdict = "off topic"
    elif completion.finish == "length" and pair.method == "sampled":
        verdict = "unfinished"
    elif not obeys(constraints, text):
        verdict = "disobeys"
    return Answer(pair.dialogue.id, turn, candidate, raw, text, completion.tokens, verdict)


def _write_statistics(
    run_dir: RunDir, pairs: list[AssignedDialogue], answers: Iterable[Answer], common: int
) -> None:
    """Candidates drawn and accepted by instruction and way, why the others were rejected, and how long answers are."""
    of = {p.dialogue.id: (p.name, p.method) for p in pairs}
    table: dict[tuple[str, str], list[Answer]] = {}
    for answer in sorted(answers, key=lambda a: (a.dialogue, a.turn, a.candidate)):
        table.setdefault(of[answer.dialogue], []).append(answer)
    rows = []
    for (name, way), drawn in sorted(table.items()):
        taken = [a for a in drawn if a.verdict == ACCEPTED]
        lengths = [len(words(a.text)) for a in taken]
        rows.append(
            {
                "instruction": name,
                "way": way,
                "drawn": len(drawn),
                "accepted": len(taken),
                "rejected": dict(
                    Counter(a.verdict for a in drawn if a.verdict != ACCEPTED).most_common()
                ),
                "words": round(sum(lengths) / len(lengths), 1) if lengths else None,
                "example": taken[0].text if taken else "",
            }
        )
    write_json(run_dir.acceptance, {"answers": rows, "too_common": common})


def show_statistics(run_dir: RunDir) -> None:
    """Print the acceptance by instruction and way.

    Raises:
        GattError: nothing was synthesized in this run yet.
    """
    if not run_dir.acceptance.exists():
        raise GattError(
            f"No synthesis in {run_dir.path} yet. `gatt synthesize --run {run_dir.path}` makes one."
        )
    found = json.loads(run_dir.acceptance.read_text(encoding="utf-8"))
    print_result(f"{'instruction':44} {'way':8} accepted of drawn  words  rejected")
    for row in found["answers"]:
        why = ", ".join(f"{n} {reason}" for reason, n in row["rejected"].items())
        print_result(
            f"{row['instruction'][:44]:44} {row['way']:8} {row['accepted']:8} {row['drawn']:8}  {row['words'] or '':>5}  {why}"
        )
    print_result(
        f"{found['too_common']} accepted answers were cut, because the corpus held the same words {_COMMON} times already."
    )


def _card(recipe: Recipe, examples: list[dict[str, Any]], teacher: str) -> str:
    """The data card in the Hub's form: a YAML head that says which file to load, then what is in it."""
    rows = Counter((example["instruction"], example["way"]) for example in examples)
    lines = [
        "---",
        "task_categories: [text-generation]",
        "tags: [ghost-attention, synthetic]",
        "configs: [{config_name: default, data_files: dialogues.jsonl}]",
        "---",
        "",
        "# Dialogues that keep an instruction",
        "",
        f"{len(examples)} dialogues in the `messages` form, made by `gatt` after Ghost Attention (Llama 2, section 3.3): the "
        "instruction stands where it is first said, and every answer after it obeys. Answers were *sampled* until one obeyed "
        "a program's check, or the teacher's own were *edited* to obey; *plain* dialogues have no instruction.",
        "",
        f"Teacher: {teacher}. Users' turns: {recipe.dialogues.source}. Seed: {recipe.seed}.",
        "",
        "| column | meaning |",
        "|---|---|",
        "| messages | the chat |",
        "| dialogue | whose user turns they are |",
        "| asked | the same chat as the teacher had it: its own words, and the instruction in every turn or nowhere |",
        '| instruction | what is kept, "A, then B" where it changes |',
        "| way | sampled, edited or plain |",
        "| teacher, seed | where the answers come from |",
        "| verdicts | for each turn, what was found of each candidate; the last one was taken |",
        "",
        "| instruction | way | dialogues |",
        "|---|---|---|",
        *(f"| {name} | {way} | {count} |" for (name, way), count in sorted(rows.items())),
    ]
    return "\n".join(lines) + "\n"


def push(run_dir: RunDir, repository: str) -> None:
    """Upload the dialogues with their card to a dataset of the Hub, private until its owner opens it.

    Raises:
        GattError: no such account, no permission, or no network.
    """
    files = {"README.md": run_dir.card, "dialogues.jsonl": run_dir.examples}
    address = upload(repository, "dataset", files, "Dialogues made by gatt")
    print_result(f"Uploaded (private): {address}")
