"""What each objective teaches: `.venv/bin/python scripts/bench/objectives.py runs/demo [--quick]`.

`last_turn`, `all_turns` and `distill` train on the dialogues of a run, with its recipe, each for as
many seconds and with three seeds, in turn. A few steps are timed first to count the steps, so that
the schedule ends with the time. Measured is the adherence of the run's evaluation dialogues in
turns 16 to 20.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.evaluation.rates import wilson
from pipeline.gatt.assignment import read_split
from pipeline.hub.convert import cached_checkpoint, cached_gguf
from pipeline.hub.models import find_model
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.run_dir import RunDir
from pipeline.training.backend import choose_backend
from pipeline.training.examples import training_examples
from pipeline.training.job import Step, TrainingJob
from pipeline.training.unsloth import load_tokenizer
from pipeline.training.validation import Validation

OBJECTIVES = ("last_turn", "all_turns", "distill")
COMPARISONS = (("all_turns", "last_turn"), ("distill", "all_turns"), ("distill", "last_turn"))
FIRST_LATE_TURN = 16
TIMED_STEPS = 6


class Measurement(NamedTuple):
    """An arm: steps and seconds of training, and adherent and all answers of the late turns."""

    steps: int
    seconds: float
    adherent: int
    answers: int

    @property
    def adherence(self) -> float:
        """Return the fraction of adherent answers."""
        return self.adherent / self.answers


def train(recipe: Recipe, run_dir: RunDir, steps: int, seed: int, folder: Path) -> list[Step]:
    """Train for some steps into `folder`, with the recipe's objective."""
    finished: list[Step] = []
    model_dir = cached_checkpoint(find_model(recipe.model))
    job = TrainingJob(
        model_dir=model_dir,
        examples=training_examples(load_tokenizer(model_dir), recipe, run_dir.examples),
        settings=recipe.train.model_copy(update={"max_steps": steps, "save_steps": 10 * steps}),
        seed=seed,
        checkpoint_dir=folder / "checkpoints",
        adapter_dir=folder / "adapter",
        on_step=finished.append,
    )
    with capture_output(folder / "log"):
        choose_backend().train(job)
    return finished


def seconds_per_step(recipe: Recipe, run_dir: RunDir, steps: int) -> float:
    """Time a few steps, without the first, which sets up a lot."""
    with tempfile.TemporaryDirectory() as folder:
        finished = train(recipe, run_dir, steps, 1, Path(folder))
    return (finished[-1].seconds - finished[0].seconds) / (len(finished) - 1)


def measure(recipe: Recipe, run_dir: RunDir, steps: int, seed: int) -> Measurement:
    """Train in this process, and measure adherence."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished = train(recipe, run_dir, steps, seed, folder)
        file = cached_gguf(find_model(recipe.model), "Q8_0")
        dialogues = read_split(run_dir.assignments, "evaluation")
        with closing(Validation(file, dialogues, recipe, recipe.evaluate.turns)) as validation:
            replies = validation.measure(folder / "adapter")
    late = [reply.adherent for reply in replies if reply.turn >= FIRST_LATE_TURN]
    return Measurement(steps, finished[-1].seconds, sum(late), len(late))


def run_child(run: Path, objective: str, *options: object) -> list[float]:
    """Run this script for one arm in a process of its own, and return the list that it prints."""
    command = [sys.executable, __file__, run, "--arm", objective, *options]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def measure_in_child(run: Path, objective: str, steps: int, seed: int) -> Measurement:
    """Measure in a process of its own."""
    _, seconds, adherent, answers = run_child(run, objective, "--steps", steps, "--seed", seed)
    return Measurement(steps, seconds, round(adherent), round(answers))


def main() -> None:
    """Print each arm, a table by objective, and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run whose dialogues are synthesized")
    parser.add_argument("--minutes", type=float, default=3, help="of training, for each arm")
    parser.add_argument("--quick", action="store_true", help="one seed, half a minute")
    parser.add_argument("--arm", choices=OBJECTIVES, help="only this arm, in this process")
    parser.add_argument("--steps", type=int, default=TIMED_STEPS)
    parser.add_argument("--seed", type=int, default=0, help="with --arm; 0 only times its steps")
    options = parser.parse_args()
    if options.arm:
        recipe = load_recipe(options.run / "recipe.toml", (f"train.loss={options.arm}",))
        run_dir = RunDir(options.run)
        if options.seed:
            print(json.dumps(measure(recipe, run_dir, options.steps, options.seed)))
        else:
            print(json.dumps([seconds_per_step(recipe, run_dir, options.steps)]))
        return
    seconds, seeds = (30.0, 1) if options.quick else (60 * options.minutes, 3)
    measurements = compare(options.run, seconds, seeds)
    for objective, rows in measurements.items():
        print(summary(objective, rows))
    print(json.dumps({"bench": "objectives", "figures": figures(measurements)}))


def compare(run: Path, seconds: float, seeds: int) -> dict[str, list[Measurement]]:
    """Measure all objectives, each for as many seconds of training, with each seed."""
    steps = {
        objective: max(2, round(seconds / run_child(run, objective, "--steps", TIMED_STEPS)[0]))
        for objective in OBJECTIVES
    }
    measurements: dict[str, list[Measurement]] = {objective: [] for objective in OBJECTIVES}
    bar = Progress("objectives: arms", seeds * len(OBJECTIVES))
    for seed in range(1, seeds + 1):
        for objective in OBJECTIVES:
            start = time.monotonic()
            row = measure_in_child(run, objective, steps[objective], seed)
            measurements[objective].append(row)
            print(
                f"  seed {seed}, {objective:9} {row.steps} steps in {row.seconds:.0f} s: "
                f"{row.adherent} of {row.answers} "
                f"({time.monotonic() - start:.0f} s with evaluation)",
                flush=True,
            )
            bar.advance()
    return measurements


def summary(objective: str, rows: list[Measurement]) -> str:
    """Return the pooled adherence of an objective with its interval, and that of each seed."""
    adherent, answers = sum(row.adherent for row in rows), sum(row.answers for row in rows)
    rate = wilson(adherent, answers)
    seeds = ", ".join(f"{100 * row.adherence:.0f}" for row in rows)
    return (
        f"{objective:9} {100 * adherent / answers:3.0f} % "
        f"({100 * rate.low:.0f} to {100 * rate.high:.0f}; seeds {seeds})"
    )


def figures(measurements: dict[str, list[Measurement]]) -> dict[str, dict[str, float | bool]]:
    """Return the differences of mean adherence; each objective should be at least as good."""
    means = {
        objective: statistics.mean(row.adherence for row in rows)
        for objective, rows in measurements.items()
    }
    return {
        f"{better}_over_{worse}": {
            "value": round(means[better] - means[worse], 3),
            "bar": 0,
            "holds": means[better] >= means[worse],
        }
        for better, worse in COMPARISONS
    }


if __name__ == "__main__":
    main()
