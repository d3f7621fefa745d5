"""The persistence exam: `.venv/bin/python scripts/bench/exam.py [--speed [MODEL]] [--quick]`.

Verdicts: the same F16 file greedily through `gatt exam FILE`, `gatt exam` and Inspect on `gatt
serve --batch-invariant`, and Inspect on llama-cpp-python's server, whose repetition penalty of 1.1
is switched off. With `--llama-server PATH`, also Inspect on llama.cpp's own server, of which PATH
is the program. Each is compared with the first one, turn by turn; a turn that only one of both
measured is a difference. Each way goes on from its own answers, so that one other token may change
all that follows.

The lengths are such that no context gets full: gatt refuses a prompt that leaves no room for the
longest answer, other servers cut the answer, so that a client would not drop messages in the same
turn.

--speed: the seconds of one arm of 24 dialogues x 50 turns, as `gatt exam` runs them by default, and
what a generated token costs in the last turn, relative to turn 2.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from serve import at_most, figure, free_port, run_command, run_server

from pipeline.exam.inspect_eval.logs import REPLIES, read_log
from pipeline.exam.report.rows import cost_in
from pipeline.exam.result import ExamResult, read_result
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.stages.exam import ExamOptions, run

MODEL, CONTEXT = "smollm2-135m", 8192
MIN_AGREEMENT, MAX_SECONDS, MAX_TURN_RATIO = 0.99, 600, 2.2

_NO_PENALTIES = {
    "top_k": 1,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
}
"""What llama-server gets in each request, so that it is greedy whatever its defaults are."""

Marks = Mapping[tuple[str, str, int], str]
"""The verdict on each answer, by dialogue, attribute and turn."""


class Size(NamedTuple):
    """How much is asked; of --speed, `dialogues` 0 is all 24 of the regime "first"."""

    dialogues: int
    turns: int
    max_tokens: int


class Way(NamedTuple):
    """What a way of asking gave: verdicts and texts."""

    marks: Marks
    texts: Mapping[tuple[str, str, int], str]


def options(size: Size, *, is_greedy: bool) -> ExamOptions:
    """Return the options of the command."""
    return ExamOptions(
        turns=str(size.turns),
        arms=("once",),
        regimes=() if is_greedy else ("first",),
        dialogues=size.dialogues,
        sampler="greedy" if is_greedy else "plain",
        window="drop",
        max_tokens=size.max_tokens,
        context=CONTEXT if is_greedy else 0,
        training_minutes=None,
        max_parallel=0,
        seed=1,
        quick=False,
    )


def examine(name: str, folder: Path, chosen: ExamOptions) -> Way:
    """Run `gatt exam`."""
    result, replies = run_exam(name, folder, chosen)
    rows = [json.loads(line) for line in replies.read_text().splitlines()[1:]]
    return Way(marks_of(result), texts_of(rows))


def run_exam(name: str, folder: Path, chosen: ExamOptions) -> tuple[ExamResult, Path]:
    """Run `gatt exam`; return the result, and the log of its replies."""
    run([name], chosen, folder)
    (replies,) = folder.glob("*.replies.jsonl")
    return read_result(replies.with_name(replies.name.replace(".replies.jsonl", ".json"))), replies


def inspect(url: str, model: str, folder: Path, size: Size, **fields: Any) -> Way:
    """Run the task of Inspect on a server, which gets `fields` in the body of each request."""
    import inspect_ai

    (log,) = inspect_ai.eval(
        "gatt/exam",
        model=f"openai-api/local/{model}",
        model_base_url=url,
        model_args={"api_key": "any"},
        task_args={**size._asdict(), "sampler": "greedy"},
        log_dir=str(folder),
        display="none",
        extra_body=fields or None,
        # One dialogue after another: the servers that get fields have one cache.
        max_samples=1 if fields else None,
        max_connections=1 if fields else None,
    )
    rows = [row for sample in log.samples or () for row in sample.store[REPLIES]]
    return Way(marks_of(read_log(Path(log.location.removeprefix("file://")))), texts_of(rows))


def texts_of(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int], str]:
    """Return the answers in the rows of a log."""
    replies = [row["reply"] for row in rows]
    return {(r["dialogue"], r["recall_attribute"], r["turn"]): r["text"] for r in replies}


def marks_of(result: ExamResult) -> Marks:
    """Return the verdicts of the only arm."""
    (arm,) = result.arms
    return {
        (row.id, row.attribute, turn): mark
        for row in arm.dialogues
        for turn, mark in enumerate(row.marks, 1)
    }


def agreement(first: Way, other: Way) -> float:
    """Return the share of turns with the same verdict, of those that one of both measured."""
    turns = [key for key in {**first.marks, **other.marks} if not _unmeasured(first, other, key)]
    same = sum(first.marks.get(key) == other.marks.get(key) for key in turns)
    return same / len(turns)


def _unmeasured(first: Way, other: Way, key: tuple[str, str, int]) -> bool:
    return first.marks.get(key, ".") == other.marks.get(key, ".") == "."


@contextmanager
def gatt_server(file: Path) -> Iterator[str]:
    """Run `gatt serve`; yield its address."""
    port = free_port()
    values = {"--port": str(port), "--context": str(CONTEXT)}
    words = ["-m", "pipeline", "serve", str(file), "--batch-invariant", *words_of(values)]
    with run_server(words, port) as server:
        yield f"{server.url}/v1"


def words_of(values: Mapping[str, str]) -> list[str]:
    """Return options as the words of a command line."""
    return [word for option in values.items() for word in option]


@contextmanager
def llama_cpp_server(file: Path) -> Iterator[str]:
    """Run llama-cpp-python's server; yield its address."""
    port = free_port()
    values = {
        "--model": str(file),
        "--model_alias": file.stem,
        "--n_ctx": str(CONTEXT),
        "--port": str(port),
        "--interrupt_requests": "False",
    }
    with run_server(["-m", "llama_cpp.server", *words_of(values)], port) as server:
        yield f"{server.url}/v1"


@contextmanager
def llama_server(program: Path, file: Path) -> Iterator[str]:
    """Run llama.cpp's own server; yield its address.

    It has one slot, whose cache holds the last chat only. Flash attention is off, as in gatt on a
    CPU.
    """
    port = free_port()
    values = {
        "--model": str(file),
        "--alias": file.stem,
        "--ctx-size": str(CONTEXT),
        "--port": str(port),
        "--parallel": "1",
        "--cache-ram": "0",
        "--flash-attn": "off",
    }
    with run_command([str(program), "--jinja", *words_of(values)], port) as server:
        yield f"{server.url}/v1"


def compare_verdicts(
    size: Size, folder: Path, program: Path | None
) -> dict[str, dict[str, float | bool]]:
    """Return the agreement of each way with `gatt exam FILE`; `program` is llama-server."""
    file, chosen = cached_gguf(find_model(MODEL), "F16"), options(size, is_greedy=True)
    ways = {"gatt exam": examine(str(file), folder / "file", chosen)}
    with gatt_server(file) as url:
        ways["gatt serve"] = examine(f"{url}#{file.stem}", folder / "gatt", chosen)
        ways["Inspect"] = inspect(url, file.stem, folder / "logs", size)
    with llama_cpp_server(file) as url:
        ways["llama-cpp-python"] = inspect(
            url, file.stem, folder / "llama", size, repeat_penalty=1.0
        )
    if program:
        with llama_server(program, file) as url:
            ways["llama-server"] = inspect(
                url, file.stem, folder / "llama-server", size, **_NO_PENALTIES
            )
    return agreements(ways)


def agreements(ways: Mapping[str, Way]) -> dict[str, dict[str, float | bool]]:
    """Return the agreement of each way with the first one."""
    (_, first), *others = ways.items()
    figures = {}
    for name, way in others:
        share = agreement(first, way)
        equal = sum(text == first.texts.get(key) for key, text in way.texts.items())
        texts = f"{equal} of {len(way.texts)} texts"
        full = sum(mark in "+-" for mark in way.marks.values())
        if full:
            texts += f" ({full} after the context was full)"
        print(f"{name}: {share:.4f} of the verdicts, {texts}", flush=True)
        label = name.lower().replace(" ", "_").replace("-", "_")
        figures[f"verdicts_{label}"] = figure(
            round(share, 4), MIN_AGREEMENT, holds=share >= MIN_AGREEMENT
        )
    return figures


def measure_speed(model: str, size: Size, folder: Path) -> dict[str, dict[str, float | bool]]:
    """Return the time of an arm, and the growth of the cost of a token."""
    result, _ = run_exam(model, folder, options(size, is_greedy=False))
    (arm,) = result.arms
    early, late = cost_in(arm, 2), cost_in(arm, size.turns)
    assert early and late
    print(
        f"{arm.answers} answers of {arm.words:.0f} words in {arm.seconds:.0f} s; "
        f"{early:.2f} and {late:.2f} ms a token"
    )
    return {
        "arm_seconds": at_most(round(arm.seconds, 1), MAX_SECONDS),
        "token_in_last_turn_against_turn_2": at_most(round(late / early, 3), MAX_TURN_RATIO),
    }


def main() -> None:
    """Print what is measured; the last line is the figures with their bars."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer dialogues, shorter answers")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--speed", nargs="?", const=MODEL, metavar="MODEL", help="time and cost by turn instead"
    )
    group.add_argument(
        "--llama-server", type=Path, metavar="PATH", help="llama.cpp's server, as a further way"
    )
    chosen = parser.parse_args()
    program: Path | None = chosen.llama_server
    if program and not shutil.which(program):
        parser.error(f"--llama-server {program}: no such program.")
    with tempfile.TemporaryDirectory() as folder:
        if chosen.speed:
            size = Size(8, 10, 64) if chosen.quick else Size(0, 50, 256)
            figures = measure_speed(chosen.speed, size, Path(folder))
        else:
            size = Size(1, 5, 48) if chosen.quick else Size(1, 20, 90)
            figures = compare_verdicts(size, Path(folder), program)
    sys.stdout.flush()
    print(json.dumps({"bench": "exam", "figures": figures}))


if __name__ == "__main__":
    main()
