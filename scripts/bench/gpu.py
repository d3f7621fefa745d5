"""What a CUDA card does, in at most 8 minutes: `python scripts/bench/gpu.py [--quick]`.

training: a model of Llama 3.1 8B's sizes with random weights in 4 bits, rank 32, against plain
Unsloth with TRL's trainer (`gpu_training.py`): tokens a second and peak memory by length, learned
tokens a second on dialogues, memory predicted and measured. A process for each arm, in turn.
embedded: the demo on the embedded model, with adherence before and after (`gpu_embedded.py`).
llama: `BatchEngine` against `llama_decode` alone (`gpu_llama.py`).
tests: the tests marked gpu.

Each part is a process of its own with a time limit. One that breaks or hangs is reported, and the
rest goes on. Rows are appended to `--out` as they are measured. `--quick` is a miniature of all
parts, and runs without a card, too; its figures on a CPU are no results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

from gpu_report import figures, table
from gpu_rows import NOT_A_RESULT, Row, append_row, read_rows

from pipeline.gpu import allocator_settings, query_nvidia_smi

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMITS = {"training": 260.0, "embedded": 210.0, "llama": 75.0, "tests": 120.0}
"""Seconds that each part may take of 8 minutes, in the order in which they run.

Most parts end earlier, so together they are more than 8 minutes.
"""
_MINUTES, _MIN_SECONDS = 8.0, 20.0
"""A part is not started with less time left."""
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
_DESCRIBE = """
import json, platform, torch
card = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if card else "",
    "vram_bytes": torch.cuda.mem_get_info()[1] if card else 0,
    "torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip or "none",
    "python": platform.python_version()}))
"""


class Runner:
    """Runs the parts, which write below `folder`; `broken` names those that did not end well."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.quick: bool = options.quick
        self.gguf: Path | None = options.gguf
        self.out: Path = options.out
        self.folder = folder
        self.broken: list[str] = []
        self._deadline = time.monotonic() + 60 * options.minutes
        share = sum(LIMITS.values()) / sum(LIMITS[part] for part in options.parts)
        self._scale = share * options.minutes / _MINUTES
        self._rounds: int = options.rounds

    def run(self, part: str) -> None:
        """Run a part if there is time."""
        left = self._deadline - time.monotonic()
        if left < _MIN_SECONDS:
            append_row(self.out, part=part, skipped=f"{left:.0f} s are left; --minutes gives more")
            return
        print(f"{part}:", file=sys.stderr, flush=True)
        end = time.monotonic() + min(self._scale * LIMITS[part], left)
        parts: dict[str, Callable[[float], None]] = {
            "training": self._training,
            "embedded": self._embedded,
            "llama": self._llama,
            "tests": self._tests,
        }
        parts[part](end)

    def _child(self, part: str, end: float, *words: object) -> bool:
        """Run a script of this folder until `end`; return whether it ended well."""
        command = [sys.executable, *map(str, words)]
        log = self.folder / f"{part}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **_OFFLINE, **allocator_settings()},
            )
            try:
                status = process.wait(timeout=max(1.0, end - time.monotonic()))
                problem = f"exit status {status}" if status else ""
            except subprocess.TimeoutExpired:
                problem = "not done within its time limit"
            finally:
                _end(process)
        if problem:
            self.broken.append(part)
            text = log.read_text(errors="replace").strip()[-1500:]
            what = " ".join(Path(str(word)).name for word in words[:2])
            append_row(self.out, part=part, problem=f"{what}: {problem}", output=text)
            print(f"  {what}: {problem}\n{text}", file=sys.stderr, flush=True)
        return not problem

    def _training(self, end: float) -> None:
        name, model = "tiny" if self.quick else "8b", self.folder / "model"
        started = time.monotonic()
        if not self._child("training", end, HERE / "gpu_models.py", name, model):
            return
        append_row(self.out, part="training", model=name, save_seconds=time.monotonic() - started)
        flags = ["--model", model, "--out", self.out, *(["--quick"] if self.quick else [])]
        seconds = 0.0
        for n in range(self._rounds):
            if n and time.monotonic() + seconds > end:  # another round would not end
                append_row(self.out, part="training", note=f"{n} of {self._rounds} rounds")
                return
            started = time.monotonic()
            for arm, arms_left in (("gatt", 2), ("unsloth", 1)):
                arm_end = end - (end - time.monotonic()) * (arms_left - 1) / arms_left
                self._child("training", arm_end, HERE / "gpu_training.py", arm, *flags)
            seconds = time.monotonic() - started

    def _embedded(self, end: float) -> None:
        flags = ["--out", self.out, "--run", self.folder / "run"]
        flags += ["--quick"] if self.quick else []
        self._needs_llama("embedded", end, HERE / "gpu_embedded.py", *flags)

    def _llama(self, end: float) -> None:
        flags: list[object] = ["--out", self.out]
        flags += ["--gguf", self.gguf] if self.gguf else []
        flags += ["--quick", "--sequences", "1,3"] if self.quick else []
        self._needs_llama("llama", end, HERE / "gpu_llama.py", *flags)

    def _needs_llama(self, part: str, end: float, *words: object) -> None:
        if importlib.util.find_spec("llama_cpp"):
            self._child(part, end, *words)
        else:
            append_row(self.out, part=part, skipped="llama-cpp-python is not installed")

    def _tests(self, end: float) -> None:
        if not importlib.util.find_spec("pytest"):
            append_row(self.out, part="tests", skipped="pytest is not installed")
            return
        files = [file for file in ROOT.glob("tests/test_*.py") if "mark.gpu" in file.read_text()]
        report = self.folder / "tests.xml"
        flags = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        self._child("tests", end, "-m", "pytest", *flags, *files)
        if report.exists():
            append_row(self.out, part="tests", **count_tests(report))


def count_tests(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, from pytest's JUnit file."""
    suite = ElementTree.parse(report).find(".//testsuite")
    counts = (
        {}
        if suite is None
        else {name: int(value) for name, value in suite.items() if value.isdigit()}
    )
    failed = counts.get("failures", 0) + counts.get("errors", 0)
    skipped = counts.get("skipped", 0)
    return {
        "passed": counts.get("tests", 0) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def describe_machine() -> Row:
    """Return the card, the driver and the versions; asked in a process, which frees the card."""
    done = subprocess.run(
        [sys.executable, "-c", _DESCRIBE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"PyTorch cannot be used: {done.stderr.strip().splitlines()[-1]}")
    machine: Row = json.loads(done.stdout.splitlines()[-1])
    drivers = sorted({gpu.driver for gpu in query_nvidia_smi().gpus})
    return machine | {"driver": ", ".join(drivers) or "none"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; `parts` are those that run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ", ".join(LIMITS)
    parser.add_argument("--only", default="", help=f"parts, with commas between: {names}")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu.jsonl", help="rows are appended"
    )
    parser.add_argument("--minutes", type=float, default=_MINUTES, help="start nothing after these")
    parser.add_argument("--rounds", type=int, default=2, help="of training, while time allows")
    parser.add_argument("--gguf", type=Path, help="for llama; default: the embedded model")
    parser.add_argument("--folder", type=Path, help="for files; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="in miniature; also without a card")
    options = parser.parse_args(arguments)
    only, skip = options.only.split(",") if options.only else list(LIMITS), options.skip.split(",")
    for name in (*only, *filter(None, skip)):
        if name not in LIMITS:
            parser.error(f"no part {name!r}; there are {names}")
    options.parts = [name for name in LIMITS if name in only and name not in skip]
    options.out = options.out.resolve()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.rounds = 1
    return options


def main() -> int:
    """Run the parts, print the table, and as the last line all figures."""
    options = parse_arguments()
    machine = describe_machine()
    if not machine["device"] and not options.quick:
        print("No CUDA card that PyTorch can use. --quick runs all parts in miniature without one.")
        return 1
    machine["device"] = machine["device"] or NOT_A_RESULT
    machine |= {"quick": options.quick, "started": time.strftime("%F %T")}
    offset = options.out.stat().st_size if options.out.exists() else 0
    append_row(options.out, part="machine", **machine)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        runner = Runner(options, Path(folder))
        for part in options.parts:
            runner.run(part)
    rows = list(read_rows(options.out, offset))
    print(table(machine, rows))
    facts = {key: machine[key] for key in ("device", "quick")}
    print(json.dumps({"bench": "gpu", **facts, "figures": figures(rows)}))
    return 1 if runner.broken else 0


if __name__ == "__main__":
    sys.exit(main())
