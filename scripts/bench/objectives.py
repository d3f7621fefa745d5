"""What each objective teaches: `.venv/bin/python scripts/bench/objectives.py runs/demo [--quick]`.

`last_turn`, `all_turns` and `distill` train on the dialogues of a run, with its recipe, each for as
many seconds and with three seeds, in turn. A few steps are timed first to count the steps, so that
the schedule ends with the time. Measured are the run's evaluation dialogues (`late`: turns 16 to
20) and its suites.
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
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.evaluation.rates import wilson
from pipeline.gatt.assignment import AssignedDialogue, read_split, read_splits
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Reply
from pipeline.run_dir import RunDir
from pipeline.stages.train import adaptable_base
from pipeline.training.backend import choose_backend
from pipeline.training.examples import training_examples
from pipeline.training.job import Step, TrainingJob
from pipeline.training.unsloth import load_tokenizer
from pipeline.training.validation import Validation

ARMS = {
    "last_turn": ("train.loss=last_turn",),
    "all_turns": ("train.loss=all_turns",),
    "distill": ("train.loss=distill",),
}
"""What each arm sets in the recipe."""
COMPARISONS = (
    ("all_turns", "last_turn"),
    ("distill", "all_turns"),
    ("distill", "last_turn"),
)
SUITES = ("unseen_values", "unseen", "change", "recall", "single")
FIRST_LATE_TURN = 16
TIMED_STEPS = 6
QUICK_DIALOGUES = 2


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
    """An arm: steps, seconds, mean tokens of an answer, and rates by outcome."""

    steps: int
    seconds: float
    answer_tokens: float
    rates: dict[str, Rate]


def train(recipe: Recipe, run_dir: RunDir, seed: int, folder: Path) -> list[Step]:
    """Train into `folder`, with the recipe's objective."""
    finished: list[Step] = []
    model_dir = cached_checkpoint(find_model(recipe.model))
    tokenizer = load_tokenizer(model_dir)
    examples = training_examples(tokenizer, recipe, run_dir.examples)
    job = TrainingJob(
        model_dir=model_dir,
        examples=examples,
        settings=recipe.train,
        seed=seed,
        checkpoint_dir=folder / "checkpoints",
        adapter_dir=folder / "adapter",
        on_step=finished.append,
    )
    with capture_output(folder / "log"):
        choose_backend().train(job)
    return finished


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe with so many steps, and no checkpoints."""
    changes = {"max_steps": steps, "save_steps": 10 * steps}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def seconds_per_step(recipe: Recipe, run_dir: RunDir) -> float:
    """Time a few steps; the first one sets up a lot, so the others stand for it."""
    with tempfile.TemporaryDirectory() as folder:
        first, *_, last = train(with_steps(recipe, TIMED_STEPS), run_dir, 1, Path(folder))
    return (last.seconds - first.seconds) / (last.number - 1)


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
        last.seconds,
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


def time_in_child(run: Path, arm: str) -> float:
    """Return the seconds of an arm's step, measured in a process of its own."""
    (seconds,) = run_child(run, arm)
    return float(str(seconds))


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
    parser.add_argument("--arm", choices=ARMS, help="only this arm, in this process")
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
    steps = {arm: max(2, round(seconds / time_in_child(options.run, arm))) for arm in options.arms}
    measurements = compare(options.run, steps, seeds, QUICK_DIALOGUES if options.quick else 0)
    for arm, rows in measurements.items():
        print(summary(arm, rows))
    print(json.dumps({"bench": "objectives", "figures": figures(measurements)}))


def run_arm(options: argparse.Namespace) -> object:
    """Time or measure one arm in this process."""
    run_dir = RunDir(options.run)
    recipe = load_recipe(options.run / "recipe.toml", ARMS.get(options.arm, ()))
    if not options.seed:
        return [seconds_per_step(recipe, run_dir)]
    steps = with_steps(recipe, options.steps)
    return measure(steps, run_dir, options.seed, options.dialogues)


def compare(
    run: Path, steps: dict[str, int], seeds: int, dialogues: int
) -> dict[str, list[Measurement]]:
    """Measure all arms, each with its number of steps, with each seed."""
    measurements: dict[str, list[Measurement]] = {arm: [] for arm in steps}
    bar = Progress("objectives: arms", seeds * len(steps))
    for seed in range(1, seeds + 1):
        for arm, count in steps.items():
            start = time.monotonic()
            row = measure_in_child(run, arm, count, seed, dialogues)
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
        means = [
            statistics.mean(row.rates["late"].value for row in measurements[arm])
            for arm in (better, worse)
        ]
        result[f"{better}_over_{worse}"] = {
            "value": round(means[0] - means[1], 3),
            "bar": 0,
            "holds": means[0] >= means[1],
        }
    return result


if __name__ == "__main__":
    main()
