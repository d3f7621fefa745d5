"""What each objective teaches: `.venv/bin/python scripts/bench/objectives.py runs/demo [--quick]`.

`last_turn`, `all_turns`, `distill`, and `distill` with each schedule of `train.rollouts` train on
the dialogues of a run, with its recipe, each for as many seconds (with rollouts, without the flip
rates before them) and with three seeds, in turn. A few steps are timed first to count the steps,
so that the schedule ends with the time. Measured are the run's evaluation dialogues (`late`: turns
16 to 20) and its suites. Rollouts are compared with the run's synthesis, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.evaluation.rates import wilson
from pipeline.gatt.assignment import AssignedDialogue, read_split, read_splits
from pipeline.gatt.synthesis import Synthesis
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.inference.teacher import open_teacher
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Reply
from pipeline.run_dir import RunDir
from pipeline.stages.train import adaptable_base, read_rollouts, rollout_base
from pipeline.training.backend import choose_backend
from pipeline.training.examples import training_examples
from pipeline.training.job import Step, TrainingJob
from pipeline.training.unsloth import load_tokenizer
from pipeline.training.validation import Validation

ARMS = {
    "last_turn": ("train.loss=last_turn",),
    "all_turns": ("train.loss=all_turns",),
    "distill": ("train.loss=distill",),
    "prefix": ("train.loss=distill", "train.rollouts=prefix"),
    "mixed": ("train.loss=distill", "train.rollouts=mixed"),
    "own": ("train.loss=distill", "train.rollouts=own"),
}
"""What each arm sets in the recipe."""
ON_POLICY = ("prefix", "mixed", "own")
COMPARISONS = (
    ("all_turns", "last_turn"),
    ("distill", "all_turns"),
    ("distill", "last_turn"),
    *((arm, "distill") for arm in ON_POLICY),
)
SUITES = ("unseen_values", "unseen", "change", "recall", "single")
FIRST_LATE_TURN = 16
TIMED_STEPS = 20
"""Two rollouts of as many dialogues as in the run."""
QUICK_DIALOGUES = 2
MAX_STEP_RATIO, MIN_ROLLOUT_RATIO = 1.6, 0.9


class Rate(NamedTuple):
    """Adherent answers, and all of them."""

    adherent: int = 0
    answers: int = 0

    def plus(self, other: Rate) -> Rate:
        """Return the rate over both."""
        return Rate(self.adherent + other.adherent, self.answers + other.answers)

    @property
    def value(self) -> float:
        """Return the fraction of adherent answers."""
        return self.adherent / max(1, self.answers)


class Measurement(NamedTuple):
    """An arm: steps, seconds with rollouts, mean tokens of an answer, and rates by outcome."""

    steps: int
    seconds: float
    answer_tokens: float
    rates: dict[str, Rate]


class Timing(NamedTuple):
    """Seconds of a step with its share of rollouts, whose tokens a second are 0 without any."""

    seconds_per_step: float
    rollout_tokens_per_second: float


def train(recipe: Recipe, run_dir: RunDir, seed: int, folder: Path) -> list[Step]:
    """Train into `folder`, with the recipe's objective."""
    finished: list[Step] = []
    model_dir = cached_checkpoint(find_model(recipe.model))
    tokenizer = load_tokenizer(model_dir)
    examples = training_examples(tokenizer, recipe, run_dir.examples)
    seeded = recipe.model_copy(update={"seed": seed})
    rollouts = read_rollouts(seeded, run_dir, tokenizer, examples)
    job = TrainingJob(
        model_dir=model_dir,
        examples=examples,
        settings=recipe.train,
        seed=seed,
        checkpoint_dir=folder / "checkpoints",
        adapter_dir=folder / "adapter",
        rollouts=rollouts,
        on_step=finished.append,
    )
    with closing(rollout_base(recipe)) as base, closing(rollouts) if rollouts else nullcontext():
        if rollouts:
            start = recipe.train.init_adapter
            adapter = Path(start).expanduser() if start else None
            rollouts.prepare(base, folder / "rollouts.jsonl", adapter)
        with capture_output(folder / "log"):
            choose_backend().train(job)
    return finished


def total_seconds(step: Step) -> float:
    """Return the seconds of all steps so far, with those of rollouts."""
    return step.seconds + (step.rollouts.seconds if step.rollouts else 0.0)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe with so many steps, and no checkpoints."""
    changes = {"max_steps": steps, "save_steps": 10 * steps}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def measure_time(recipe: Recipe, run_dir: RunDir) -> Timing:
    """Time a few steps; the first one sets up a lot, so the others stand for it."""
    timed = with_steps(recipe, TIMED_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        first, *_, last = train(timed, run_dir, 1, Path(folder))
    seconds = (last.seconds - first.seconds) / (last.number - 1)
    if not last.rollouts:
        return Timing(seconds, 0.0)
    seconds += last.rollouts.seconds / last.number
    return Timing(seconds, last.rollouts.tokens / last.rollouts.seconds)


def synthesis_speed(recipe: Recipe, run_dir: RunDir) -> float:
    """Return the tokens a second of synthesis, on as many dialogues as the timed rollouts have."""
    count = TIMED_STEPS * recipe.train.batch_size
    dialogues = read_split(run_dir.assignments, "train")[:count]
    synthesis = Synthesis(recipe, lambda answer: None)
    start = time.monotonic()
    with open_teacher(recipe, count, 0) as teacher:
        synthesis.run(teacher.run, dialogues)
    tokens = sum(answer.tokens for answer in synthesis.answers.values())
    return tokens / (time.monotonic() - start)


def measure(recipe: Recipe, run_dir: RunDir, seed: int, dialogues: int) -> Measurement:
    """Train in this process, and measure `dialogues` of evaluation and of each suite; 0: all."""
    with tempfile.TemporaryDirectory() as name:
        last = train(recipe, run_dir, seed, Path(name))[-1]
        suites = read_splits(run_dir.suites)
        chosen = {"late": read_split(run_dir.assignments, "evaluation")}
        chosen |= {suite: suites[suite] for suite in SUITES if suites.get(suite)}
        replies: dict[str, list[Reply]] = {}
        with closing(adaptable_base(recipe)) as base:
            for outcome, assigned in chosen.items():
                some = assigned[: dialogues or len(assigned)]
                validation = Validation(base, some, recipe, recipe.evaluate.turns)
                replies[outcome] = validation.measure(Path(name) / "adapter")
    return Measurement(
        recipe.train.max_steps,
        total_seconds(last),
        statistics.mean(reply.tokens for reply in replies["late"]),
        {outcome: rate(outcome, chosen[outcome], rows) for outcome, rows in replies.items()},
    )


def rate(outcome: str, dialogues: Sequence[AssignedDialogue], replies: Sequence[Reply]) -> Rate:
    """Return the adherence that an outcome stands for."""
    changes = {dialogue.dialogue.id: dialogue.change_turn for dialogue in dialogues}
    counted = [
        reply.adherent
        for reply in replies
        if (outcome != "late" or reply.turn >= FIRST_LATE_TURN)
        and (outcome != "change" or reply.turn > changes[reply.dialogue])
        and (outcome != "recall" or reply.recall_attribute)
    ]
    return Rate(sum(counted), len(counted))


def run_child(run: Path, arm: str, *options: object) -> list[object]:
    """Run this script for one arm in a process of its own, and return the list that it prints."""
    command = [sys.executable, __file__, run, "--arm", arm, *options]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def time_in_child(run: Path, arm: str) -> Timing:
    """Time an arm in a process of its own."""
    values = run_child(run, arm)
    return Timing(*(float(str(value)) for value in values))


def measure_in_child(run: Path, arm: str, steps: int, seed: int, dialogues: int) -> Measurement:
    """Measure in a process of its own."""
    options = ("--steps", steps, "--seed", seed, "--dialogues", dialogues)
    _, seconds, tokens, rates = run_child(run, arm, *options)
    by_outcome = {str(name): Rate(*counts) for name, counts in dict(rates).items()}  # type: ignore[call-overload]
    return Measurement(steps, float(str(seconds)), float(str(tokens)), by_outcome)


def main() -> None:
    """Print each arm, a table by objective, and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run whose dialogues are synthesized")
    parser.add_argument("--minutes", type=float, default=3, help="of training, for each arm")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, half a minute, few dialogues"
    )
    parser.add_argument(
        "--arm", choices=(*ARMS, "synthesis"), help="only this arm, in this process"
    )
    parser.add_argument("--steps", type=int, default=TIMED_STEPS)
    parser.add_argument("--seed", type=int, default=0, help="with --arm; 0 only times its steps")
    parser.add_argument(
        "--dialogues", type=int, default=0, help="with --arm: of each suite; 0: all"
    )
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options)))
        return
    seconds, seeds = (30.0, 1) if options.quick else (60 * options.minutes, options.seeds)
    timings = {arm: time_in_child(options.run, arm) for arm in options.arms}
    (synthesis,) = run_child(options.run, "synthesis")
    measurements = compare(
        options.run, timings, seconds, seeds, QUICK_DIALOGUES if options.quick else 0
    )
    for arm, rows in measurements.items():
        print(summary(arm, rows))
    all_figures = figures(measurements) | speed_figures(timings, float(str(synthesis)))
    print(json.dumps({"bench": "objectives", "figures": all_figures}))


def run_arm(options: argparse.Namespace) -> object:
    """Time or measure one arm in this process."""
    run_dir = RunDir(options.run)
    recipe = load_recipe(options.run / "recipe.toml", ARMS.get(options.arm, ()))
    if options.arm == "synthesis":
        return [synthesis_speed(recipe, run_dir)]
    if not options.seed:
        return measure_time(recipe, run_dir)
    steps = with_steps(recipe, options.steps)
    return measure(steps, run_dir, options.seed, options.dialogues)


def compare(
    run: Path, timings: dict[str, Timing], seconds: float, seeds: int, dialogues: int
) -> dict[str, list[Measurement]]:
    """Measure all arms, each for as many seconds, with each seed."""
    measurements: dict[str, list[Measurement]] = {arm: [] for arm in timings}
    bar = Progress("objectives: arms", seeds * len(timings))
    for seed in range(1, seeds + 1):
        for arm, timing in timings.items():
            start = time.monotonic()
            steps = max(2, round(seconds / timing.seconds_per_step))
            row = measure_in_child(run, arm, steps, seed, dialogues)
            measurements[arm].append(row)
            rates = ", ".join(
                f"{name} {value.adherent} of {value.answers}" for name, value in row.rates.items()
            )
            print(
                f"  seed {seed}, {arm:9} {row.steps} steps in {row.seconds:.0f} s: {rates}, "
                f"{row.answer_tokens:.0f} tokens an answer "
                f"({time.monotonic() - start:.0f} s with evaluation)",
                flush=True,
            )
            bar.advance()
    return measurements


def summary(arm: str, rows: list[Measurement]) -> str:
    """Return the pooled rates of an arm with their intervals, and the late one of each seed."""
    parts = []
    for outcome in rows[0].rates:
        pooled = Rate()
        for row in rows:
            pooled = pooled.plus(row.rates[outcome])
        interval = wilson(pooled.adherent, max(1, pooled.answers))
        parts.append(
            f"{outcome} {100 * pooled.value:.0f} % "
            f"({100 * interval.low:.0f} to {100 * interval.high:.0f})"
        )
    seeds = ", ".join(f"{100 * row.rates['late'].value:.0f}" for row in rows)
    tokens = statistics.mean(row.answer_tokens for row in rows)
    return f"{arm:9} {', '.join(parts)}; late by seed {seeds}; {tokens:.0f} tokens an answer"


Figures = dict[str, dict[str, float | bool]]


def figures(measurements: dict[str, list[Measurement]]) -> Figures:
    """Return the differences of mean adherence; each objective should be at least as good."""
    result: Figures = {}
    for better, worse in COMPARISONS:
        if not {better, worse} <= measurements.keys():
            continue
        for outcome in ("late", "unseen_values") if better in ON_POLICY else ("late",):
            means = [
                statistics.mean(row.rates.get(outcome, Rate()).value for row in measurements[arm])
                for arm in (better, worse)
            ]
            suffix = "" if outcome == "late" else f"_{outcome}"
            result[f"{better}_over_{worse}{suffix}"] = {
                "value": round(means[0] - means[1], 3),
                "bar": 0,
                "holds": means[0] >= means[1],
            }
    return result


def speed_figures(timings: dict[str, Timing], synthesis: float) -> Figures:
    """Return what rollouts cost: a step against `distill`, tokens a second against synthesis."""
    result: Figures = {}
    if {"prefix", "distill"} <= timings.keys():
        step = timings["prefix"].seconds_per_step / timings["distill"].seconds_per_step
        result["prefix_step_over_distill"] = {
            "value": round(step, 2),
            "bar": MAX_STEP_RATIO,
            "holds": step <= MAX_STEP_RATIO,
        }
    if "own" in timings:
        speed = timings["own"].rollout_tokens_per_second / synthesis
        result["rollout_over_synthesis"] = {
            "value": round(speed, 2),
            "bar": MIN_ROLLOUT_RATIO,
            "holds": speed >= MIN_ROLLOUT_RATIO,
        }
    return result


if __name__ == "__main__":
    main()
