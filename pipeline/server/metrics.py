"""Counts of what the server does, in the text form of Prometheus."""

from __future__ import annotations

import threading
from collections import Counter

from pipeline.inference.async_engine import AsyncEngine
from pipeline.inference.scheduler import GenerationResult

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of the time to the first token."""


class Metrics:
    """Counts; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._first: dict[str, list[float]] = {}

    def request(self, model: str, status: int) -> None:
        """A request has been answered with this status; `model` is "" where it named none that is served."""
        with self._lock:
            self._requests[model, status] += 1

    def outcome(self, model: str, outcome: GenerationResult) -> None:
        """An answer has ended."""
        with self._lock:
            for kind in ("prompt_tokens", "cached_tokens", "tokens"):
                self._tokens[kind, model] += getattr(outcome, kind)
            if outcome.first_seconds is not None:
                found = self._first.setdefault(model, [0.0] * (len(_SECONDS) + 2))
                for n, bound in enumerate(_SECONDS):
                    found[n] += outcome.first_seconds <= bound
                found[-2] += 1
                found[-1] += outcome.first_seconds

    def text(self, engine: AsyncEngine) -> str:
        """All of them, and what the engine is doing now."""
        with self._lock:
            lines = [_kind("requests_total", "counter", "requests by model and status")]
            lines += [
                f'gatt_requests_total{{model={_quoted(model)},status="{status}"}} {n}'
                for (model, status), n in sorted(self._requests.items())
            ]
            for kind, name, means in (
                ("prompt_tokens", "prompt_tokens_total", "tokens of prompts"),
                (
                    "cached_tokens",
                    "cached_tokens_total",
                    "tokens of prompts that were in the cache",
                ),
                ("tokens", "generated_tokens_total", "tokens of answers"),
            ):
                lines.append(_kind(name, "counter", means))
                lines += [
                    f"gatt_{name}{{model={_quoted(model)}}} {self._tokens[kind, model]}"
                    for model in engine.names
                ]
            lines.append(
                _kind(
                    "first_token_seconds",
                    "histogram",
                    "from a request's arrival in the engine to its first token",
                )
            )
            for model, found in sorted(self._first.items()):
                for bound, n in zip([*map(str, _SECONDS), "+Inf"], found, strict=False):
                    lines.append(
                        f'gatt_first_token_seconds_bucket{{model={_quoted(model)},le="{bound}"}} {n:.0f}'
                    )
                lines.append(
                    f"gatt_first_token_seconds_sum{{model={_quoted(model)}}} {found[-1]:.6f}"
                )
                lines.append(
                    f"gatt_first_token_seconds_count{{model={_quoted(model)}}} {found[-2]:.0f}"
                )
        states = {model: engine.state(model) for model in engine.names}
        for field, name, means in (
            ("sequences", "sequences", "answers that may run side by side"),
            ("busy", "sequences_in_use", "answers that run"),
            ("waiting", "queue", "requests that wait"),
        ):
            lines.append(_kind(name, "gauge", means))
            lines += [
                f"gatt_{name}{{model={_quoted(model)}}} {getattr(state, field)}"
                for model, state in states.items()
            ]
        return "\n".join(lines) + "\n"


def _kind(name: str, kind: str, means: str) -> str:
    return f"# HELP gatt_{name} {means}\n# TYPE gatt_{name} {kind}"


def _quoted(label: str) -> str:
    escaped = label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
