"""The real-weights part of the GPU bench: the demo on the embedded model, stage by stage.

    python gpu_embedded.py --out ROWS --run FOLDER [--quick]

The recipe is the demo's; the evaluation has half of its dialogues and turns, and no further suites.
llama.cpp generates on whatever it was built for.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from gpu_rows import append_row

from pipeline.evaluation.scores import Scores
from pipeline.run_dir import RunDir

PART = "embedded"
STAGES = ("instructions", "synthesize", "train", "export", "evaluate")
_ROOT = Path(__file__).resolve().parents[2]
_EVALUATION = (
    "evaluate.dialogues=12",
    "evaluate.turns=10",
    "evaluate.suite_dialogues=0",
    "evaluate.attention=false",
)
_MINIATURE = (
    "dialogues.train=4",
    "dialogues.turns=2",
    "dialogues.validation=1",
    "synthesize.max_tokens=40",
    "train.max_steps=2",
    "train.save_steps=2",
    "evaluate.dialogues=2",
    "evaluate.turns=2",
    "evaluate.max_tokens=12",
)


def run_stage(name: str, run_dir: Path, overrides: tuple[str, ...]) -> float:
    """Run a stage of gatt and return its seconds.

    Raises:
        SystemExit: it fails; the text is the end of what it printed.
    """
    flags = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "pipeline", name, "--run", str(run_dir), *flags]
    start = time.monotonic()
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"gatt {name}: {done.stderr.strip()[-600:]}")
    return time.monotonic() - start


def facts_of(name: str, run_dir: RunDir) -> dict[str, object]:
    """Return what a finished stage has to show."""
    if name == "train":
        losses = json.loads(run_dir.losses.read_text())
        speed = json.loads(run_dir.speed.read_text())
        return {"first_loss": losses[0], "last_loss": losses[-1], "steps": len(losses), **speed}
    if name == "evaluate":
        scores = Scores.from_json(run_dir.scores.read_text())
        rates = {row.arm: [row.hits, row.n] for row in scores.last_five}
        return {"turns": scores.turns, "last_five": rates}
    return {}


def main() -> None:
    """Run the stages, and write a row after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    overrides = (*_EVALUATION, *(_MINIATURE if options.quick else ()))
    for name in STAGES:
        seconds = run_stage(name, options.run, overrides)
        facts = facts_of(name, RunDir(options.run))
        append_row(options.out, part=PART, stage=name, wall_seconds=seconds, **facts)


if __name__ == "__main__":
    main()
