"""What each objective teaches in the same time: `.venv/bin/python scripts/bench/objectives.py runs/demo [--quick]`.

On the dialogues of a run, with its recipe: `last_turn`, `all_turns` and `distill`, each trained for as many seconds (the steps
are counted from a few that are timed first, so that the schedule ends with the time), with three seeds, in turn. Measured is
adherence in turns 16 to 20 of the run's held-out dialogues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.evaluation.rates import wilson
from pipeline.files import read_jsonl
from pipeline.gatt.assignment import read_split
from pipeline.hub.convert import cached_checkpoint, cached_gguf
from pipeline.hub.models import find_model
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.run_dir import RunDir
from pipeline.stages.train import labeled
from pipeline.training.trainer import Step
from pipeline.training.unsloth import load_tokenizer, train
from pipeline.training.validation import Validation

LOSSES, LATE = ("last_turn", "all_turns", "distill"), 16


class Measured(NamedTuple):
    """An arm: steps and seconds of training, and of the late answers those that obey, and all."""

    max_steps: int
    seconds: float
    kept: int
    answers: int


def timed(recipe: Recipe, run_dir: RunDir, steps: int, seed: int, folder: Path) -> list[Step]:
    """Train for so many steps into `folder`, with the recipe's objective."""
    found: list[Step] = []
    base = cached_checkpoint(find_model(recipe.model))
    examples = [
        labeled(load_tokenizer(base), row, recipe) for _, row in read_jsonl(run_dir.examples)
    ]
    settings = recipe.train.model_copy(update={"steps": steps, "save_steps": 10 * steps})
    with capture_output(folder / "log"):
        train(
            base, examples, settings, seed, folder / "checkpoints", folder / "adapter", found.append
        )
    return found


def per_step(found: list[Step]) -> float:
    """Seconds of a step, without the first, which prepares much."""
    return (found[-1].seconds - found[0].seconds) / (len(found) - 1)


def measure(recipe: Recipe, run_dir: RunDir, steps: int, seed: int) -> Measured:
    """Train in this process, and ask."""
    with tempfile.TemporaryDirectory() as folder:
        found = timed(recipe, run_dir, steps, seed, Path(folder))
        file, pairs = (
            cached_gguf(find_model(recipe.model), "Q8_0"),
            read_split(run_dir.pairs, "evaluate"),
        )
        validation = Validation(file, pairs, recipe, recipe.evaluate.turns)
        late = [kept for turn, kept in validation.measure(Path(folder) / "adapter") if turn >= LATE]
        validation.close()
    return Measured(steps, found[-1].seconds, sum(late), len(late))


def alone(run: Path, loss: str, steps: int, seed: int) -> list[float]:
    """The same in a process of its own, or only the seconds of a step where `seed` is 0."""
    command = [
        sys.executable,
        __file__,
        str(run),
        "--arm",
        loss,
        "--steps",
        str(steps),
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print each arm, a table by objective, and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run whose dialogues are synthesized")
    parser.add_argument("--minutes", type=float, default=3, help="of training, for each arm")
    parser.add_argument("--quick", action="store_true", help="one seed, half a minute")
    parser.add_argument("--arm", choices=LOSSES, help="only this one, in this process")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    recipe, run_dir = (
        load_recipe(asked.run / "recipe.toml", (f"train.loss={asked.arm or 'distill'}",)),
        RunDir(asked.run),
    )
    if asked.arm and not asked.seed:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps([per_step(timed(recipe, run_dir, asked.steps, 1, Path(folder)))]))
        return
    if asked.arm:
        print(json.dumps(measure(recipe, run_dir, asked.steps, asked.seed)))
        return
    seconds, seeds = (30.0, 1) if asked.quick else (60 * asked.minutes, 3)
    found: dict[str, list[Measured]] = {loss: [] for loss in LOSSES}
    steps = {loss: max(2, round(seconds / alone(asked.run, loss, 6, 0)[0])) for loss in LOSSES}
    bar = Progress("objectives: arms", seeds * len(LOSSES))
    for seed in range(1, seeds + 1):
        for loss in LOSSES:
            start = time.monotonic()
            found[loss].append(Measured(*alone(asked.run, loss, steps[loss], seed)))  # type: ignore[arg-type]
            one = found[loss][-1]
            print(
                f"  seed {seed}, {loss:9} {one.max_steps:.0f} steps in {one.seconds:.0f} s: {one.kept:.0f} of {one.answers:.0f} "
                f"({time.monotonic() - start:.0f} s with the asking)",
                flush=True,
            )
            bar.advance()
    share = {loss: [one.kept / one.answers for one in arms] for loss, arms in found.items()}
    for loss, arms in found.items():
        kept, answers = sum(int(one.kept) for one in arms), sum(int(one.answers) for one in arms)
        rate = wilson(kept, answers)
        each = ", ".join(f"{100 * its:.0f}" for its in share[loss])
        print(
            f"{loss:9} {100 * kept / answers:3.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f}; seeds {each})"
        )
    means = {loss: statistics.mean(shares) for loss, shares in share.items()}
    print(
        json.dumps(
            {
                "bench": "objectives",
                "figures": {
                    f"{loss}_over_{other}": {
                        "value": round(means[loss] - means[other], 3),
                        "bar": 0,
                        "holds": means[loss] >= means[other],
                    }
                    for loss, other in (
                        ("all_turns", "last_turn"),
                        ("distill", "all_turns"),
                        ("distill", "last_turn"),
                    )
                },
            }
        )
    )


if __name__ == "__main__":
    main()
