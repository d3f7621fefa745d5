"""The number of cores that the engine sees."""

from __future__ import annotations

import os

import pytest


def pretend_cores(patch: pytest.MonkeyPatch, cores: int) -> None:
    """Let `pipeline.system.core_count` return at most `cores`."""
    patch.setattr(os, "cpu_count", lambda: cores)
    if hasattr(os, "sched_getaffinity"):
        patch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
