"""`gatt export`: adapter merged into the base, GGUF in every format asked for, and the base in the first one beside it."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.backends.hub import find_model
from pipeline.backends.llama import quantize
from pipeline.config import Recipe
from pipeline.console import note
from pipeline.files import whole_file
from pipeline.gguf.merge import merge
from pipeline.gguf.read import open_gguf
from pipeline.machine import require_disk
from pipeline.rundir import RunDir


def base_gguf(recipe: Recipe, rundir: RunDir) -> Path:
    """The base in the evaluated format; made once. It is also the teacher."""
    target = rundir.gguf("base", recipe.export.formats[0])
    if not target.exists():
        _write(recipe, rundir, None, "base", recipe.export.formats[:1])
    return target


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Write `export/tuned-FORMAT.gguf` for every format of the recipe."""
    base_gguf(recipe, rundir)
    _write(recipe, rundir, rundir.adapter, "tuned", recipe.export.formats)


def _write(recipe: Recipe, rundir: RunDir, adapter: Path | None, arm: str, formats: tuple[str, ...]) -> None:
    model = find_model(recipe.model)
    require_disk(rundir.path, 8 * model.bytes, "export")
    rundir.models.mkdir(parents=True, exist_ok=True)
    full = rundir.models / f".{arm}-F16.gguf"
    try:
        merge(model.path, adapter, full)
        for name in formats:
            target = rundir.gguf(arm, name)
            with whole_file(target) as draft:
                if name == "F16":
                    shutil.copyfile(full, draft)
                else:
                    quantize(full, draft, name)
                open_gguf(draft)
            note(f"export: {target} ({target.stat().st_size / 1e6:.0f} MB)")
    finally:
        full.unlink(missing_ok=True)
