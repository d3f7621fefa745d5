"""`gatt export`: adapter merged into the base, GGUF in every format asked for."""

from __future__ import annotations

from contextlib import ExitStack

from pipeline.backends.convert import write_formats
from pipeline.backends.hub import find_model
from pipeline.config import Recipe
from pipeline.console import note
from pipeline.files import whole_file
from pipeline.gguf.read import open_gguf
from pipeline.machine import require_disk
from pipeline.rundir import RunDir


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Write `export/tuned-FORMAT.gguf` for every format of the recipe."""
    model = find_model(recipe.model)
    require_disk(rundir.path, 8 * model.bytes, "export")
    targets = {name: rundir.tuned(name) for name in recipe.export.formats}
    with ExitStack() as stack:
        drafts = {name: stack.enter_context(whole_file(target)) for name, target in targets.items()}
        write_formats(model, rundir.adapter, drafts)
        for draft in drafts.values():
            open_gguf(draft)
    for target in targets.values():
        note(f"export: {target} ({target.stat().st_size / 1e6:.0f} MB)")
