"""`gatt exam`: how long instructions hold, with and without reminders, in models of any kind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.cluster.session import current_cluster
from pipeline.console import log, print_result, print_table
from pipeline.errors import GattError, did_you_mean
from pipeline.exam.arms import ONCE, find_arms
from pipeline.exam.benchmarks.base import Benchmark, BenchmarkTask, criteria
from pipeline.exam.benchmarks.registry import read_benchmark
from pipeline.exam.dialogue_run import ExamReply, are_filled
from pipeline.exam.ifeval import agreement_table, agreements, require_verifiers
from pipeline.exam.machine import joined_machines, local_machine, server_machine
from pipeline.exam.models import ExamModel, find_models
from pipeline.exam.replies import ExamPlan, generate
from pipeline.exam.report.page import publish
from pipeline.exam.result import (
    RESULT_VERSION,
    ExaminedModel,
    ExamResult,
    ExamSet,
    read_result,
    sampler_values,
)
from pipeline.exam.scores import score_arms
from pipeline.exam.settings import (
    FULL_TURNS,
    ExamSettings,
    WindowPolicy,
    most_turns,
    parse_turns,
)
from pipeline.exam.steering import require_steering
from pipeline.exam.tasks import (
    ExamIdentity,
    ExamTask,
    exam_tasks,
    frozen_exam,
    ordered_regimes,
)
from pipeline.files import read_jsonl, sha256, write_json
from pipeline.folders import lock_folder
from pipeline.records import MAX_THOUGHT_TOKENS, SamplerName

_DEFAULT_TURNS, _DEFAULT_TOKENS = "20", 256
_QUICK_TURNS, _QUICK_TOKENS, _QUICK_ARMS = "8", 64, ("once", "every")
_BENCHMARK_VERSION = 1
"""Of the reading of benchmarks' files; another one may give other checks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamOptions:
    """The options of the command; without arms or regimes, all of them.

    `turns` is a number or "context"; None takes the default, as of `max_tokens`, or that of
    `quick`. `dialogues` are those of each regime, 0 for all. With a `benchmark`, its dialogues in
    `benchmark_file` take the place of the exam's.
    """

    turns: str | None
    arms: Sequence[str]
    regimes: Sequence[str]
    dialogues: int
    sampler: SamplerName
    window: WindowPolicy
    max_tokens: int | None
    context: int
    training_minutes: float | None
    max_parallel: int
    seed: int
    quick: bool
    ifeval: bool = False
    benchmark: str = ""
    benchmark_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Questions:
    """What is asked: `turns` of each task, 0 until the context is full.

    `is_complete` if nothing of the set is left out; whether each context gets full shows later.
    """

    identity: ExamIdentity
    tasks: Sequence[ExamTask]
    turns: int
    is_complete: bool


def run(names: Sequence[str], options: ExamOptions, folder: Path) -> None:
    """Examine the models, write a result file for each and a page for all, and print the tables.

    Raises:
        GattError: no such model, arm or regime, a context that is too large or too small, or
            `folder` has replies of other settings.
    """
    turns = parse_turns(options.turns or (_QUICK_TURNS if options.quick else _DEFAULT_TURNS))
    arms = find_arms(_arm_names(options))
    benchmark = _benchmark(options)
    if options.ifeval:
        require_verifiers()
    if not benchmark:
        exam_tasks(options.regimes, 1, 1)
    minutes = options.training_minutes
    if minutes is not None and not 0 < minutes < math.inf:
        raise GattError(f"--training-minutes {minutes:g}: expected what training took, above 0.")
    if minutes is not None and len(names) < 2:
        raise GattError(
            "--training-minutes is about the models after the first, which is the one before "
            "training. Name both: `gatt exam BASE TUNED`."
        )
    models = find_models(names)
    require_steering(models, arms)
    asked_of = partial(_questions, options, turns, benchmark)
    plans = [_plan(model, options, asked_of) for model in models]
    with lock_folder(folder, "--out"):
        results = []
        for number, (plan, questions) in enumerate(plans):
            results.append(_examine(plan, questions, folder, minutes if number else None))
        publish(results, folder / "exam.html")
        if options.ifeval:
            _show_agreement(options, [folder / f"{m.file_stem}.replies.jsonl" for m in models])


def _benchmark(options: ExamOptions) -> Benchmark | None:
    """Return the benchmark that was asked for, or None.

    Raises:
        GattError: it cannot be read, or with an option that is only for the exam's own dialogues.
    """
    if not options.benchmark:
        if options.benchmark_file:
            raise GattError("--benchmark-file needs --benchmark NAME, which says how to read it.")
        return None
    if set(options.arms) - {ONCE} or options.ifeval or options.turns == "context":
        raise GattError(
            "--benchmark is asked as published: without reminders, --ifeval and --turns context. "
            "Leave --arm, --ifeval and --turns out."
        )
    benchmark = read_benchmark(options.benchmark, options.benchmark_file)
    parts = ordered_regimes(task.regime for task in benchmark.tasks)
    for regime in options.regimes:
        if regime not in parts:
            raise GattError(
                f"{benchmark.name} has no part {regime!r}. {did_you_mean(regime, parts)} Expected "
                f"one of {', '.join(parts)}."
            )
    return benchmark


def _questions(
    options: ExamOptions, turns: int, benchmark: Benchmark | None, context: int
) -> _Questions:
    """Return what a model with this context is asked."""
    per_regime = options.dialogues or int(options.quick)
    if benchmark is None:
        tasks = exam_tasks(options.regimes, per_regime, most_turns(turns, context))
        has_all = len(tasks) == len(exam_tasks((), 0, 1))
        is_complete = has_all and (turns == 0 or turns >= FULL_TURNS)
        return _Questions(identity=frozen_exam(), tasks=tasks, turns=turns, is_complete=is_complete)
    chosen = [
        task
        for part in ordered_regimes(t.regime for t in benchmark.tasks)
        if not options.regimes or part in options.regimes
        for task in [t for t in benchmark.tasks if t.regime == part][: per_regime or None]
    ]
    longest = max(len(task.assigned.dialogue.turns) for task in benchmark.tasks)
    asked_turns = min(turns, longest) if options.turns or options.quick else longest
    return _Questions(
        identity=ExamIdentity(benchmark.name, _BENCHMARK_VERSION, benchmark.sha256),
        tasks=chosen,
        turns=asked_turns,
        is_complete=len(chosen) == len(benchmark.tasks) and asked_turns == longest,
    )


def _plan(
    model: ExamModel, options: ExamOptions, asked_of: Callable[[int], _Questions]
) -> tuple[ExamPlan, _Questions]:
    """Return what is measured of a model.

    Raises:
        GattError: it was not trained for such a context, or no answer fits in it.
    """
    if model.server and options.context:
        log(f"exam: --context {options.context} is not for {model.name}: a server has its own.")
    context = model.context(asked_of(0).turns, options.context)
    questions = asked_of(context)
    settings = ExamSettings(
        max_tokens=options.max_tokens or (_QUICK_TOKENS if options.quick else _DEFAULT_TOKENS),
        max_thought_tokens=MAX_THOUGHT_TOKENS,
        context=context,
        window=options.window,
        sampler=options.sampler,
        seed=options.seed,
        system_role=model.has_system_role,
    )
    longest = settings.max_tokens * max(task.max_tokens_factor for task in questions.tasks)
    if context and longest >= context:
        raise GattError(
            f"--max-tokens {settings.max_tokens}: an answer may have {longest} tokens, and the "
            f"context of {model.name} has {context}. Lower --max-tokens or raise --context."
        )
    plan = ExamPlan(
        model=model,
        tasks=questions.tasks,
        arms=find_arms(_arm_names(options)),
        turns=questions.turns,
        settings=settings,
        machine=server_machine(model.server) if model.server else _machine(),
        max_parallel=options.max_parallel,
        exam=questions.identity,
    )
    return plan, questions


def _examine(
    plan: ExamPlan, questions: _Questions, folder: Path, minutes: float | None
) -> ExamResult:
    """Return the result of one model, which is written to `folder` with its replies.

    If nothing was left to generate, an earlier result knows when, where and by which version the
    replies were made, and what the server has refused.
    """
    model, settings = plan.model, plan.settings
    replies_file, file = (folder / f"{model.file_stem}{s}" for s in (".replies.jsonl", ".json"))
    generated = generate(plan, replies_file)
    replies_sha256 = sha256(replies_file)
    earlier = _earlier_result(file, replies_sha256)
    notes = earlier.notes if earlier else generated.notes
    result = ExamResult(
        format=RESULT_VERSION,
        gatt=earlier.gatt if earlier else ", ".join(generated.versions),
        exam=_exam_set(questions, generated.replies),
        model=ExaminedModel(
            name=earlier.model.name if earlier else generated.name,
            sha256=model.sha256,
            adapter_sha256=model.adapter_sha256,
            server=model.server,
            training_minutes=minutes,
        ),
        settings=settings,
        sampler=sampler_values(settings.sampler, is_server=bool(model.server), refused=notes),
        machine=earlier.machine if earlier else joined_machines(generated.machines),
        date=earlier.date if earlier else time.strftime("%Y-%m-%d"),
        notes=notes,
        replies_sha256=replies_sha256,
        arms=score_arms(generated.replies, questions.tasks),
    )
    write_json(file, result)
    return result


def _earlier_result(file: Path, replies_sha256: str) -> ExamResult | None:
    """Return the result in `file` if it is of the same replies."""
    try:
        result = read_result(file)
    except GattError:
        return None
    return result if result.replies_sha256 == replies_sha256 else None


def _arm_names(options: ExamOptions) -> Sequence[str]:
    if options.benchmark:
        return (ONCE,)
    return options.arms or (_QUICK_ARMS if options.quick else ())


def _exam_set(questions: _Questions, replies: Sequence[ExamReply]) -> ExamSet:
    checked, unchecked = criteria([t for t in questions.tasks if isinstance(t, BenchmarkTask)])
    return ExamSet(
        **questions.identity._asdict(),
        turns=questions.turns,
        regimes=tuple(ordered_regimes(task.regime for task in questions.tasks)),
        dialogues=len(questions.tasks),
        complete=questions.is_complete and (questions.turns > 0 or are_filled(replies)),
        criteria=checked + unchecked,
        unchecked=unchecked,
    )


def _show_agreement(options: ExamOptions, files: Sequence[Path]) -> None:
    """Print how our checks agree with IFEval's verifiers on the replies in some logs."""
    rows = [row for file in files for _, row in read_jsonl(file)]
    texts = [row["reply"]["text"] for row in rows if "reply" in row]
    tasks = exam_tasks(options.regimes, 0, 1)
    constraints = [c for task in tasks for c in task.assigned.constraints(0)]
    compared, problems = agreements(constraints, texts)
    print_result("\nOur checks and the verifiers of IFEval and IFBench on the same replies\n")
    print_table(*agreement_table(compared))
    for problem in problems:
        log(f"exam: {problem}")


def _machine() -> str:
    if cluster := current_cluster():
        return cluster.describe()
    return local_machine()
