"""Formats for evaluation on a CPU: `.venv/bin/python scripts/bench/formats.py [MODEL] [--quick]`.

Tokens a second that the engine generates in each format: 12 dialogues at a time, as in an
evaluation (three turns, 64 tokens an answer, temperature 0.7). Formats are interleaved; figures are
medians. MODEL is any name that a recipe takes, or several; by default the embedded model.

q8_0_of_fastest: tokens a second in Q8_0, which exports and evaluations have by default, as a
fraction of those in the fastest format, the least over the models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from pipeline.console import Progress
from pipeline.data.dialogues import load_dialogues
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.records import Message, Request, Task
from pipeline.system import core_count

FORMATS = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
STREAMS, TURNS, MAX_TOKENS, N_CTX = 12, 3, 64, 768
MIN_FRACTION = 0.7
"""Bar of the figure."""


def measure(engine: BatchEngine, turns: int, max_tokens: int) -> float:
    """Return the generated tokens a second of `STREAMS` dialogues."""
    tokens = 0

    def dialogue(seed: int, users: tuple[str, ...]) -> Task:
        nonlocal tokens
        messages: tuple[Message, ...] = ()
        for turn, user in enumerate(users):
            messages += ({"role": "user", "content": user},)
            completion = yield Request(
                messages=messages, seed=100 * seed + turn, max_tokens=max_tokens
            )
            tokens += completion.tokens
            messages += ({"role": "assistant", "content": completion.text},)

    seeds = load_dialogues("seed")[:STREAMS]
    start = time.perf_counter()
    engine.run(dialogue(n, tuple(seed.turns[:turns])) for n, seed in enumerate(seeds))
    return tokens / (time.perf_counter() - start)


def measure_model(name: str, *, rounds: int, turns: int, max_tokens: int) -> dict[str, float]:
    """Return the median tokens a second by format."""
    model = find_model(name)
    files: dict[str, Path] = {format_: cached_gguf(model, format_) for format_ in FORMATS}
    rates: dict[str, list[float]] = {format_: [] for format_ in FORMATS}
    bar = Progress(f"formats: {model.name}", rounds * len(FORMATS))
    for _ in range(rounds):
        for format_, file in files.items():
            with BatchEngine(file, STREAMS, N_CTX, STREAMS) as engine:
                measure(engine, 1, 4)  # reads the file
                rates[format_].append(measure(engine, turns, max_tokens))
            bar.advance()
    for format_, values in rates.items():
        size = files[format_].stat().st_size / 1e6
        median = statistics.median(values)
        print(f"{model.name:28} {format_:7} {size:6.0f} MB {median:7.1f} tokens/s", flush=True)
    return {format_: statistics.median(values) for format_, values in rates.items()}


def main() -> None:
    """Print a row for each model and format, and the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", default=["smollm2-135m"], metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    turns, max_tokens = (1, 16) if options.quick else (TURNS, MAX_TOKENS)
    rounds = 1 if options.quick else options.rounds
    print(f"{STREAMS} dialogues at a time on {core_count()} cores")
    fractions = []
    for name in options.models:
        rates = measure_model(name, rounds=rounds, turns=turns, max_tokens=max_tokens)
        fractions.append(rates["Q8_0"] / max(rates.values()))
    value = min(fractions)
    figure = {"value": round(value, 3), "bar": MIN_FRACTION, "holds": value >= MIN_FRACTION}
    print(json.dumps({"bench": "formats", "figures": {"q8_0_of_fastest": figure}}))


if __name__ == "__main__":
    main()
