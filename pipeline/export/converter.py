"""Export of an architecture that this version cannot write, by the user's own copy of llama.cpp's
converter.

The adapter is merged into a checkpoint on the disk, which the converter reads.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.console import capture_output, log, print_result, progress
from pipeline.errors import GattError
from pipeline.export.verify import max_kl, require_close
from pipeline.gguf.checkpoint_writer import write_checkpoint
from pipeline.gguf.formats import UNIFORM_FORMATS, quantize
from pipeline.gguf.huggingface.safetensors import shards
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import Model
from pipeline.inference.logits import Logits
from pipeline.system import available_memory, require_disk
from pipeline.training.backend import choose_backend


def write_merged(
    model: Model,
    adapter: Path | None,
    target: Path,
    reference: Logits | None = None,
    *,
    in_4bit: bool = True,
) -> None:
    """Write the merged model in float32 to the folder `target`, as transformers loads it.

    Its predictions are compared with those of the trained model, `reference`, if these are known.
    They were taken with the base in 4 bits if `in_4bit`.

    Raises:
        GattError: as `write_checkpoint`, or the predictions differ; then nothing is left.
    """
    folder = cached_checkpoint(model)
    files = shards(folder)
    require_disk(
        target.parent,
        2 * sum(file.stat().st_size for file in files),
        "write the merged model in float32",
    )
    others = set(target.iterdir()) if target.is_dir() else set()
    with progress("export: merged files", len(files)) as bar:
        write_checkpoint(folder, adapter, target, bar.advance)
    if reference:
        try:
            _verify(target, reference, max_kl("F32", in_4bit=in_4bit))
        except GattError:
            for file in {*target.iterdir()} - others:
                file.unlink()
            raise


def _verify(checkpoint: Path, reference: Logits, limit: float) -> None:
    """Compare the predictions of a merged checkpoint with those of the trained model."""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    if 1.5 * size > available_memory():  # weights and activations
        log("export: too little memory for the merged model; predictions are not compared.")
        return
    with capture_output(Path(tempfile.gettempdir()) / "gatt-export.log"):
        logits = choose_backend().predict(checkpoint, None, reference.sequences, load_in_4bit=False)
    kl = require_close(str(checkpoint), reference, logits, limit)
    print_result(f"{checkpoint}: {kl:.4f} nats a token from the trained model")


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
