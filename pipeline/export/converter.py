"""Export of an architecture that this version cannot write, by the user's own copy of llama.cpp's
converter.

The adapter is merged into a checkpoint on the disk, which the converter reads.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.console import progress
from pipeline.errors import GattError
from pipeline.gguf.checkpoint import shards
from pipeline.gguf.checkpoint_writer import write_checkpoint
from pipeline.gguf.formats import UNIFORM_FORMATS, quantize
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import Model
from pipeline.system import require_disk


def write_merged(model: Model, adapter: Path | None, target: Path) -> None:
    """Write the merged model in float32 to the folder `target`, as transformers loads it.

    Raises:
        GattError: as `write_checkpoint`.
    """
    folder = cached_checkpoint(model)
    files = shards(folder)
    require_disk(
        target.parent,
        2 * sum(file.stat().st_size for file in files),
        "write the merged model in float32",
    )
    with progress("export: merged files", len(files)) as bar:
        write_checkpoint(folder, adapter, target, bar.advance)


def convert(converter: Path, checkpoint: Path, target: Path, format_name: str) -> None:
    """Write `checkpoint` as a GGUF; formats that the converter does not know are quantized from
    F16.

    Raises:
        GattError: the converter or llama.cpp failed.
    """
    if format_name in UNIFORM_FORMATS:
        _run(converter, checkpoint, target, format_name)
        return
    full = target.with_name("full.gguf")
    if not full.exists():
        _run(converter, checkpoint, full, "F16")
    quantize(full, target, format_name)


def _run(converter: Path, checkpoint: Path, target: Path, format_name: str) -> None:
    options = ["--outfile", str(target), "--outtype", format_name.lower()]
    done = subprocess.run(
        [sys.executable, str(converter), str(checkpoint), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no message"]
        raise GattError(f"{converter.name} failed: {lines[-1]}")
