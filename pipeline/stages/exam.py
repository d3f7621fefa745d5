"""`gatt exam`: how long instructions hold, with and without reminders, in models of any kind."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import __version__
from pipeline.console import print_result, print_table
from pipeline.errors import GattError
from pipeline.exam.arms import find_arms
from pipeline.exam.ifeval import agreement_table, agreements, require_verifiers
from pipeline.exam.models import ExamModel, find_models
from pipeline.exam.page import publish
from pipeline.exam.replies import ExamPlan, generate
from pipeline.exam.result import RESULT_VERSION, ExaminedModel, ExamResult, ExamSet
from pipeline.exam.scores import score_arms
from pipeline.exam.settings import (
    FULL_TURNS,
    SAMPLERS,
    ExamSettings,
    SamplerName,
    WindowPolicy,
    most_turns,
    parse_turns,
)
from pipeline.exam.tasks import EXAM_NAME, EXAM_VERSION, REGIMES, exam_sha256, exam_tasks
from pipeline.files import read_jsonl, sha256, write_json
from pipeline.folders import lock_folder
from pipeline.inference.llama.gpu import describe_gpus, gpu_devices
from pipeline.records import MAX_THOUGHT_TOKENS
from pipeline.system import core_count

_QUICK_TURNS, _QUICK_TOKENS, _QUICK_ARMS = "8", 64, ("once", "every")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamOptions:
    """The options of the command; without arms or regimes, all of them.

    `turns` is a number or "context"; `dialogues` those of each regime, 0 for all.
    """

    turns: str
    arms: Sequence[str]
    regimes: Sequence[str]
    dialogues: int
    sampler: SamplerName
    window: WindowPolicy
    max_tokens: int
    context: int
    training_minutes: float | None
    max_parallel: int
    seed: int
    quick: bool
    ifeval: bool = False


def run(names: Sequence[str], options: ExamOptions, folder: Path) -> None:
    """Examine the models, write a result file for each and a page for all, and print the tables.

    Raises:
        GattError: no such model, arm or regime, or `folder` has replies of other settings.
    """
    turns = parse_turns(_QUICK_TURNS if options.quick else options.turns)
    find_arms(options.arms)
    if options.ifeval:
        require_verifiers()
    exam_tasks(options.regimes, 1, 1)
    models = find_models(names)
    if options.training_minutes is not None and len(models) < 2:
        raise GattError(
            "--training-minutes is about the models after the first, which is the one before "
            "training. Name both: `gatt exam BASE TUNED`."
        )
    with lock_folder(folder, "--out"):
        results = []
        for number, model in enumerate(models):
            minutes = options.training_minutes if number else None
            results.append(_examine(model, options, turns, folder, minutes))
        publish(results, folder / "exam.html")
        if options.ifeval:
            _show_agreement(options, [folder / f"{m.file_stem}.replies.jsonl" for m in models])


def _examine(
    model: ExamModel, options: ExamOptions, turns: int, folder: Path, minutes: float | None
) -> ExamResult:
    """Return the result of one model, which is written to `folder` with its replies."""
    context = model.context(turns, options.context)
    settings = ExamSettings(
        max_tokens=min(options.max_tokens, _QUICK_TOKENS) if options.quick else options.max_tokens,
        max_thought_tokens=MAX_THOUGHT_TOKENS,
        context=context,
        window=options.window,
        sampler=options.sampler,
        seed=options.seed,
        system_role=model.has_system_role,
    )
    per_regime = options.dialogues or int(options.quick)
    tasks = exam_tasks(options.regimes, per_regime, most_turns(turns, context))
    plan = ExamPlan(
        model=model,
        tasks=tasks,
        arms=find_arms(options.arms or (_QUICK_ARMS if options.quick else ())),
        turns=turns,
        settings=settings,
        max_parallel=options.max_parallel,
    )
    replies_file = folder / f"{model.file_stem}.replies.jsonl"
    generated = generate(plan, replies_file)
    regimes = tuple(name for name in REGIMES if name in {task.regime for task in tasks})
    is_whole = len(regimes) == len(REGIMES) and not per_regime
    result = ExamResult(
        format=RESULT_VERSION,
        gatt=__version__,
        exam=ExamSet(
            name=EXAM_NAME,
            version=EXAM_VERSION,
            sha256=exam_sha256(),
            turns=turns,
            regimes=regimes,
            dialogues=len(tasks),
            complete=is_whole and (turns == 0 or turns >= FULL_TURNS),
        ),
        model=ExaminedModel(
            name=generated.name,
            sha256=model.sha256,
            adapter_sha256=model.adapter_sha256,
            server=model.server,
            training_minutes=minutes,
        ),
        settings=settings,
        sampler=SAMPLERS[options.sampler].values,
        machine="a server" if model.server else _machine(),
        date=time.strftime("%Y-%m-%d"),
        notes=generated.notes,
        replies_sha256=sha256(replies_file),
        arms=score_arms(generated.replies, tasks),
    )
    write_json(folder / f"{model.file_stem}.json", result)
    return result


def _show_agreement(options: ExamOptions, files: Sequence[Path]) -> None:
    """Print how our checks agree with IFEval's verifiers on the replies in some logs."""
    rows = [row for file in files for _, row in read_jsonl(file)]
    texts = [row["reply"]["text"] for row in rows if "reply" in row]
    print_result("\nOur checks and IFEval's verifiers on the same replies\n")
    print_table(*agreement_table(agreements(exam_tasks(options.regimes, 0, 1), texts)))


def _machine() -> str:
    devices = gpu_devices()
    if devices:
        return describe_gpus(devices)
    return f"{platform.system()} {platform.machine()}, {core_count()} cores"
