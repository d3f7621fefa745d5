"""`gatt synthesize`: the teacher answers the training dialogues; what it sees is then ghosted.

The rules are in `pipeline/gatt/synthesis.py`; here are the files, the statistics and the upload.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from pipeline.console import log, print_result, print_table, progress
from pipeline.errors import GattError
from pipeline.evaluation.judge import judge_context, question, verdict
from pipeline.files import JsonlLog, read_json, write_json, write_jsonl, write_text
from pipeline.gatt.acceptance import (
    ACCEPTED,
    MAX_COPIES,
    UNFINISHED_THOUGHTS,
    Acceptance,
    by_kind,
    measure_acceptance,
)
from pipeline.gatt.assignment import AssignedDialogue, check_files, read_split
from pipeline.gatt.synthesis import DISOBEYS_JUDGE, Judge, Synthesis
from pipeline.hub.models import find_model
from pipeline.hub.upload import upload
from pipeline.inference.generator import model_files, open_generator
from pipeline.inference.teacher import open_teacher
from pipeline.recipe import Recipe
from pipeline.records import Answer
from pipeline.report.cards import dataset_card
from pipeline.run_dir import Input, RunDir

_NAMED_INSTRUCTIONS = 8
"""Instructions that the remark on those that were given up names."""

_MAX_ROWS = 40
"""Instructions that have a row each in the table; more are summed by kind."""

SECTIONS = ("synthesize", "dialogues")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Input]:
    """Return what the result depends on."""
    teacher = model_files(recipe.synthesize.teacher) if recipe.synthesize.teacher else []
    judge = model_files(recipe.synthesize.judge) if recipe.synthesize.judge else []
    checks = check_files(run_dir.assignments)
    return [find_model(recipe.model).path, run_dir.assignments, *teacher, *judge, *checks]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Answer the training dialogues and write the ghosted ones, the statistics and the data card.

    Candidates of an interrupted attempt are not sampled again.

    Raises:
        GattError: the teacher followed no instruction, so that there is nothing to train on.
    """
    dialogues = read_split(run_dir.assignments, "train")
    synthesis, teacher = _answer(recipe, run_dir, dialogues)
    too_common = synthesis.remove_common(dialogues)
    rows = [synthesis.synthesized(d, teacher) for d in dialogues if synthesis.accepted(d)]
    # A few plain dialogues alone do not bake a prompt.
    instructed = [d for d in dialogues if d.baked] or dialogues
    if not any(map(synthesis.accepted, instructed)):
        raise GattError(_nothing_accepted(recipe, synthesis.answers.values()))
    write_jsonl(run_dir.examples, rows)
    trained = [answer for d in dialogues for answer in synthesis.accepted(d)]
    acceptance = replace(
        measure_acceptance(dialogues, synthesis.answers.values(), too_common),
        answers=len(trained),
        edited=sum(answer.text != answer.raw for answer in trained),
    )
    write_json(run_dir.acceptance, acceptance)
    counts: Counter[tuple[str, str]] = Counter((row["instruction"], row["way"]) for row in rows)
    write_text(run_dir.card, dataset_card(recipe, teacher, counts, run_dir.examples.name))
    log(f"synthesize: {len(rows)} of {len(dialogues)} dialogues, {len(trained)} answers")
    show_statistics(run_dir)


def _answer(
    recipe: Recipe, run_dir: RunDir, dialogues: list[AssignedDialogue]
) -> tuple[Synthesis, str]:
    """Run the synthesis, and return it with the teacher's name."""
    turns = {d.dialogue.id: len(d.dialogue.turns) for d in dialogues}
    candidates = recipe.synthesize.candidates
    each, system = recipe.dialogues.turns, recipe.dialogues.system
    longer = max(d.further_tokens(each, reminders=each, system=system) for d in dialogues)
    with (
        JsonlLog(run_dir.answers) as answers,
        open_teacher(recipe, len(dialogues), longer) as teacher,
    ):
        recorded = [Answer(**row) for row in answers.records]
        done = sum(_settled(answer, turns[answer.dialogue], candidates) for answer in recorded)
        with progress("synthesize: turns", sum(turns.values()), done) as bar:

            def record(answer: Answer) -> None:
                answers.append(answer)
                bar.advance(_settled(answer, turns[answer.dialogue], candidates))

            with _open_judge(recipe, dialogues) as judge:
                synthesis = Synthesis(recipe, record, recorded, judge)
                _log_given_up(synthesis.run(teacher.run, dialogues))
        run_dir.note("synthesize", teacher.name, teacher.changes)
        return synthesis, teacher.name


def _settled(answer: Answer, turns: int, candidates: int) -> int:
    """Return for how many turns no candidate is to be sampled any more after `answer`.

    A dialogue of `turns` turns ends where the last of the `candidates` is rejected.
    """
    if answer.verdict == ACCEPTED:
        return 1
    return turns - answer.turn if answer.candidate + 1 == candidates else 0


@contextmanager
def _open_judge(recipe: Recipe, dialogues: Sequence[AssignedDialogue]) -> Iterator[Judge | None]:
    """Open the judge of answers that no program can check, if the recipe names one."""
    settings = recipe.synthesize
    if not settings.judge:
        yield None
        return
    questions = (
        question(dialogue.criterion(turn), user, "")
        for dialogue in dialogues
        for turn, user in enumerate(dialogue.dialogue.turns)
        if dialogue.needs_judge(turn)
    )
    with open_generator(
        settings.judge,
        dialogues=len(dialogues),
        context=judge_context(questions, settings.max_tokens),
        max_thought_tokens=settings.max_thought_tokens,
    ) as model:
        yield Judge(model.run, question, verdict)


def _nothing_accepted(recipe: Recipe, answers: Iterable[Answer]) -> str:
    """Return why there is nothing to train on: the most frequent reason, and what to do."""
    rejected = Counter(a.verdict for a in answers if a.verdict != ACCEPTED)
    verdict, count = next(iter(rejected.most_common(1)), ("too common", 0))
    if verdict == UNFINISHED_THOUGHTS:
        return (
            f"The teacher thinks, and {count} answers were cut within their thoughts. Raise "
            f"synthesize.max_thought_tokens ({recipe.synthesize.max_thought_tokens}), or switch "
            "the teacher's thinking off."
        )
    if verdict in ("disobeys", DISOBEYS_JUDGE):
        if recipe.instructions.bake:
            return (
                "No answer of the teacher follows the prompt. Choose a larger teacher, or reword "
                "the sentences that `gatt instructions` has derived checks from."
            )
        return (
            "The teacher followed no instruction even once. Choose other instructions, a larger "
            "teacher, or synthesize.edited_ratio = 1."
        )
    return (
        f"No answer of the teacher was accepted, most often because of {verdict!r} ({count}). "
        "Read synthesize/answers.jsonl, and choose another teacher or other settings."
    )


def _log_given_up(pilots: dict[str, int]) -> None:
    """Log the instructions that were given up; `pilots` counts the dialogues that tried each."""
    names = [f"{name} ({count})" for name, count in pilots.items()]
    if len(names) > _NAMED_INSTRUCTIONS:
        names[_NAMED_INSTRUCTIONS:] = [f"{len(names) - _NAMED_INSTRUCTIONS} more (see --stats)"]
    if names:
        log(
            "synthesize: instructions that were given up, with the number of dialogues that tried "
            f"them: {'; '.join(names)}. No sampled answer was accepted. Raise "
            "synthesize.edited_ratio or candidates, or choose other instructions or a larger "
            "teacher."
        )


def show_statistics(run_dir: RunDir) -> None:
    """Print how many candidates were accepted, by instruction and method.

    Raises:
        GattError: nothing was synthesized in this run yet.
    """
    if not run_dir.acceptance.exists():
        raise GattError(
            f"Nothing was synthesized in {run_dir.path} yet. Run `gatt synthesize --run "
            f"{run_dir.path}`."
        )
    acceptance = read_json(run_dir.acceptance, Acceptance, "synthesize")
    all_rows = acceptance.rows
    shown = all_rows if len(all_rows) <= _MAX_ROWS else by_kind(all_rows)
    rows = [
        (r.instruction, r.method, r.accepted, r.candidates, r.words, r.rejections) for r in shown
    ]
    if len(shown) < len(all_rows):
        print_result(
            f"{len(all_rows)} instructions, by kind of the first; each: {run_dir.acceptance}"
        )
    print_table(("instruction", "method", "accepted", "of", "words", "rejected"), rows)
    print_result(
        f"{acceptance.too_common} accepted answers were removed, because the training data has "
        f"{MAX_COPIES} with the same words, or because they follow such an answer."
    )


def push(run_dir: RunDir, repository: str) -> None:
    """Upload the dialogues and their card to a dataset on the Hub; a new one is private.

    Raises:
        GattError: no such account, no permission, or no network.
    """
    files = {"README.md": run_dir.card, "dialogues.jsonl": run_dir.examples}
    address = upload(repository, "dataset", files, "Dialogues made by gatt")
    print_result(f"Uploaded (private, if it is new): {address}")
