"""The table and the figures of the GPU bench, from its rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpu_rows import Row

Figure = dict[str, float | bool]
MIN_THROUGHPUT, MIN_LEARNED, MAX_MEMORY, MAX_ERROR, MIN_DECODE = 1.0, 4.0, 1.0, 0.15, 0.9
MAX_TRAINING_SECONDS, MIN_EFFECT = 180.0, 0.77
"""Bars. The effect is the least that the demo's interval allows for tuned minus base."""
DECODE_SEQUENCES = 64


class Length(NamedTuple):
    """Medians of the steps of an arm at a length; `total_bytes` adds the CUDA context to the peak.

    `warm_up_seconds` is what its first step took longer, compilation included.
    """

    seconds: float
    tokens_per_second: float
    learned_per_second: float
    peak_bytes: float
    total_bytes: float
    predicted_bytes: float
    warm_up_seconds: float


def lengths(rows: Iterable[Row]) -> dict[tuple[str, str, int], Length]:
    """Return the medians by (arm, case, tokens), without the first step of each in a process."""
    steps: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    first: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    seen: set[tuple[int, str, int]] = set()
    for row in rows:
        if row["part"] != "training" or "predicted_bytes" not in row:
            continue
        key = (row["arm"], row["case"], row["tokens"])
        in_process = (row["process"], row["case"], row["tokens"])
        if in_process in seen:
            steps[key].append(row)
        else:
            seen.add(in_process)
            first[key].append(row["seconds"])
    return {key: _length(steps[key], first[key]) for key in sorted(steps)}


def _length(steps: Sequence[Row], first: Sequence[float]) -> Length:
    seconds = statistics.median(row["seconds"] for row in steps)
    peak = max(row["peak_bytes"] for row in steps)
    return Length(
        seconds=seconds,
        tokens_per_second=steps[0]["tokens"] / seconds,
        learned_per_second=steps[0]["learned"] / seconds,
        peak_bytes=peak,
        total_bytes=peak + max(row["context_bytes"] for row in steps),
        predicted_bytes=steps[0]["predicted_bytes"] or 0,
        warm_up_seconds=max(first) - seconds,
    )


def dialogues(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the median round of "dialogues" by arm."""
    rounds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["part"] == "training" and row.get("case") == "dialogues":
            rounds[row["arm"]].append(row)
    return {
        arm: sorted(arm_rows, key=lambda row: row["seconds"])[(len(arm_rows) - 1) // 2]
        for arm, arm_rows in rounds.items()
    }


def rates(rows: Iterable[Row]) -> dict[tuple[str, int], tuple[float, float]]:
    """Return the medians of llama.cpp's (prefill, decode) tokens a second by (arm, sequences)."""
    rounds: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["part"] == "llama" and "sequences" in row:
            rounds[row["arm"], row["sequences"]].append(row)
    return {
        key: (
            statistics.median(row["prefill"] for row in arm_rows),
            statistics.median(row["decode"] for row in arm_rows),
        )
        for key, arm_rows in sorted(rounds.items())
    }


def stages(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the rows of the demo's stages."""
    return {row["stage"]: row for row in rows if row["part"] == "embedded" and "stage" in row}


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Return what was measured of the figures that have a bar."""
    values = {**_training_figures(rows), **_demo_figures(rows)}
    speeds = rates(rows)
    counts = [sequences for arm, sequences in speeds if arm == "gatt"]
    if counts:
        sequences = DECODE_SEQUENCES if DECODE_SEQUENCES in counts else max(counts)
        ours, alone = speeds["gatt", sequences][1], speeds.get(("llama_decode", sequences))
        if alone:
            values[f"decode_{sequences}_against_llama_decode"] = _at_least(
                ours / alone[1], MIN_DECODE
            )
    return values


def _training_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Compare the arms; over the lengths the worst counts."""
    measured, values = lengths(rows), {}
    pairs = [
        (measured["gatt", "all_turns", tokens], row)
        for (arm, _, tokens), row in measured.items()
        if arm == "unsloth" and ("gatt", "all_turns", tokens) in measured
    ]
    if pairs:
        throughput = min(a.tokens_per_second / b.tokens_per_second for a, b in pairs)
        values["training_tokens"] = _at_least(throughput, MIN_THROUGHPUT)
        memory = max(a.peak_bytes / b.peak_bytes for a, b in pairs)
        values["training_memory"] = _at_most(memory, MAX_MEMORY)
    errors = [
        abs(row.predicted_bytes / row.total_bytes - 1)
        for row in measured.values()
        if row.predicted_bytes
    ]
    if errors:
        values["memory_prediction_error"] = _at_most(max(errors), MAX_ERROR)
    by_arm = dialogues(rows)
    if by_arm.keys() >= {"gatt", "unsloth"}:
        ours, peer = (
            by_arm[arm]["learned"] / by_arm[arm]["seconds"] for arm in ("gatt", "unsloth")
        )
        values["training_learned_tokens"] = _at_least(ours / peer, MIN_LEARNED)
    return values


def _demo_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    done, values = stages(rows), {}
    if train := done.get("train"):
        values["demo_training_seconds"] = _at_most(train["wall_seconds"], MAX_TRAINING_SECONDS)
    if evaluated := done.get("evaluate"):
        shares = {arm: hits / max(1, n) for arm, (hits, n) in evaluated["last_five"].items()}
        values["demo_effect"] = _at_least(shares["tuned"] - shares["base"], MIN_EFFECT)
    return values


def _at_least(value: float, bar: float) -> Figure:
    return {"value": round(value, 3), "bar": bar, "holds": value >= bar}


def _at_most(value: float, bar: float) -> Figure:
    return {"value": round(value, 3), "bar": bar, "holds": value <= bar}


def table(machine: Row, rows: Sequence[Row]) -> str:
    """Return all that was measured as Markdown."""
    blocks = [
        f"{machine['device']}, {machine['vram_bytes'] / 1e9:.1f} GB, driver {machine['driver']}, "
        f"PyTorch {machine['torch']} for CUDA {machine['cuda']}, Python {machine['python']}"
    ]
    if measured := lengths(rows):
        head = (
            "training",
            "tokens",
            "step",
            "tokens/s",
            "learned/s",
            "peak",
            "with context",
            "predicted",
            "first step",
        )
        blocks.append(
            _markdown(
                head,
                [
                    (
                        f"{arm} {case}",
                        tokens,
                        f"{row.seconds:.3f} s",
                        f"{row.tokens_per_second:.0f}",
                        f"{row.learned_per_second:.0f}",
                        _gb(row.peak_bytes),
                        _gb(row.total_bytes),
                        _gb(row.predicted_bytes) if row.predicted_bytes else "",
                        f"{row.warm_up_seconds:+.1f} s",
                    )
                    for (arm, case, tokens), row in measured.items()
                ],
            )
        )
    if by_arm := dialogues(rows):
        blocks.append(
            _markdown(
                ("dialogues", "tokens/s", "learned/s", "peak"),
                [
                    (
                        arm,
                        f"{row['tokens'] / row['seconds']:.0f}",
                        f"{row['learned'] / row['seconds']:.0f}",
                        _gb(row["peak_bytes"]),
                    )
                    for arm, row in by_arm.items()
                ],
            )
        )
    if speeds := rates(rows):
        blocks.append(
            _markdown(
                ("llama.cpp", "sequences", "prefill tokens/s", "decode tokens/s"),
                [
                    (arm, sequences, f"{prefill:.0f}", f"{decode:.0f}")
                    for (arm, sequences), (prefill, decode) in speeds.items()
                ],
            )
        )
    if done := stages(rows):
        blocks.append(
            _markdown(
                ("demo", "seconds", ""),
                [
                    (name, f"{row['wall_seconds']:.1f}", _stage_text(row))
                    for name, row in done.items()
                ],
            )
        )
    blocks += [
        _remark(row) for row in rows if row.keys() & {"skipped", "problem", "note", "passed"}
    ]
    return "\n\n".join(blocks)


def _stage_text(row: Row) -> str:
    if "last_loss" in row:
        return (
            f"loss {row['first_loss']:.3f} to {row['last_loss']:.3f} in {row['steps']} steps, "
            f"{_gb(row['peak_memory_bytes'])}"
        )
    if "last_five" in row:
        return "adherent in the last five turns: " + ", ".join(
            f"{arm} {hits} of {n}" for arm, (hits, n) in row["last_five"].items()
        )
    return ""


def _remark(row: Row) -> str:
    if "passed" in row:
        return f"tests: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped"
    if "skipped" in row:
        return f"{row['part']}: left out, {row['skipped']}"
    return f"{row['part']}: {row.get('problem') or row['note']}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
