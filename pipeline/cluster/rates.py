"""Answers a second of a cluster, by node, as lines of the log."""

from __future__ import annotations

import time
from collections import Counter

from pipeline.console import log

_SECONDS_BETWEEN_LINES = 30.0
_NAMED_NODES = 8
"""Nodes that a line names; of more, those with the fewest answers: they hold the others up."""


class Rates:
    """Counts answers by node from now on."""

    def __init__(self) -> None:
        self._all: Counter[str] = Counter()
        self._recent: Counter[str] = Counter()
        self._started = self._logged = time.monotonic()

    def count(self, node: str) -> None:
        """Count an answer."""
        self._all[node] += 1
        self._recent[node] += 1

    def log_recent(self) -> None:
        """Log the rates since the last line, if that was a while ago."""
        now = time.monotonic()
        if now - self._logged >= _SECONDS_BETWEEN_LINES:
            nodes = Counter(dict.fromkeys(self._all, 0))  # one that did nothing is named, too
            nodes.update(self._recent)
            log(f"cluster: {_describe(nodes, now - self._logged)}")
            self._logged, self._recent = now, Counter()

    def log_all(self) -> None:
        """Log the rates from the beginning on."""
        if total := self._all.total():
            seconds = time.monotonic() - self._started
            log(f"cluster: {total} answers in {seconds:.0f} s: {_describe(self._all, seconds)}")


def _describe(answers: Counter[str], seconds: float) -> str:
    """Return "3.2 answers/s (NODE 1.7, NODE 1.5)"."""
    rates = {node: count / seconds for node, count in answers.items()}
    slowest = sorted(sorted(rates, key=lambda node: (rates[node], node))[:_NAMED_NODES])
    nodes = ", ".join(f"{node} {rates[node]:.1f}" for node in slowest)
    more = len(rates) - len(slowest)
    faster = f", {more} faster nodes" if more else ""
    return f"{sum(rates.values()):.1f} answers/s ({nodes}{faster})"
