"""Exported files in the folder layout of LM Studio."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.console import log


def link_for_lm_studio(file: Path, model: str) -> None:
    """Hard-link `file` as `lmstudio/PUBLISHER/MODEL/FILE`, as in LM Studio's models folder."""
    target = file.parent / "lmstudio" / "gatt" / model / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        log(
            "export: this file system has no hard links; "
            f"`lms import {file.name}` copies the file into LM Studio."
        )
