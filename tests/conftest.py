"""Shared by the tests: the embedded model, a tiny recipe, and the real command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = (
    "dialogues.train=4", "dialogues.turns=2", "train.steps=2", "train.rank=4", "train.save_steps=1", "synthesize.max_tokens=40",
    "evaluate.dialogues=3", "evaluate.turns=3", "evaluate.max_tokens=24",
)  # fmt: skip

Gatt = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def gatt() -> Gatt:
    """Run `python -m pipeline` with the given words."""

    def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload, no-any-return]

    return run


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """The overrides of a run of a minute."""
    return [word for change in TINY for word in ("--set", change)]


@pytest.fixture(scope="session")
def base() -> Path:
    """The embedded model's file."""
    from pipeline.backends.hub import find_model

    return find_model("smollm2-135m").path
