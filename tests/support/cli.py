"""The command line in a process of its own, and the recipe of a run that takes a minute."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import Protocol
from unittest import mock

TINY_RECIPE = (
    "dialogues.train=4",
    "dialogues.turns=2",
    "dialogues.validation=1",
    "synthesize.max_tokens=40",
    "train.max_steps=2",
    "train.rank=4",
    "train.save_steps=1",
    "train.load_in_4bit=true",
    "evaluate.dialogues=3",
    "evaluate.turns=3",
    "evaluate.max_tokens=12",
    "evaluate.attention=false",
    "evaluate.suite_dialogues=1",
)
"""Overrides of the default recipe."""

Completed = subprocess.CompletedProcess[str]


class Gatt(Protocol):
    """Runs `python -m pipeline` with the given words."""

    def __call__(
        self,
        *words: object,
        env: Mapping[str, str] | None = None,
        preexec_fn: Callable[[], object] | None = None,
    ) -> Completed: ...


def run_gatt(
    *words: object,
    env: Mapping[str, str] | None = None,
    preexec_fn: Callable[[], object] | None = None,
) -> Completed:
    """Run `python -m pipeline` with the given words and return its output."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=env,
        preexec_fn=preexec_fn,
    )


def call_gatt(*words: object) -> Completed:
    """Run the command line in this process, for commands that load no model and fail fast."""
    from pipeline.cli import main

    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    arguments = ["gatt", *map(str, words)]
    with redirect_stdout(stdout), redirect_stderr(stderr), mock.patch("sys.argv", arguments):
        try:
            main()
        except SystemExit as end:
            # As the interpreter does: a text goes to stderr, with status 1.
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                stderr.write(f"{end.code}\n")
    return Completed(arguments, status, stdout.getvalue(), stderr.getvalue())


def override_flags(overrides: tuple[str, ...] = TINY_RECIPE) -> list[str]:
    """Return `overrides` as flags of the command line."""
    return [word for override in overrides for word in ("--set", override)]
