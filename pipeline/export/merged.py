"""The merged model as a Hugging Face folder in float32: for transformers, and for llama.cpp's own
converter.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.console import capture_output, log, print_result, progress
from pipeline.errors import GattError
from pipeline.export.verify import max_kl, require_close
from pipeline.gguf.huggingface.safetensors import shards
from pipeline.hub.adapted import write_merged_checkpoint
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.llama_converter import converter_for
from pipeline.hub.models import Model
from pipeline.inference.logits import Logits
from pipeline.recipe import Export
from pipeline.system import available_memory, cache_path
from pipeline.training.backend import choose_backend


def require_merge_base(model: Model, settings: Export, *, in_4bit: bool) -> None:
    """Check that a model can be merged as the settings say, before any work is done.

    Raises:
        GattError: it is not trained `in_4bit`, or only llama.cpp's own converter writes its family,
            from a 16-bit merge.
    """
    if settings.merge_base == "nf4" and not in_4bit:
        raise GattError(
            'export.merge_base = "nf4" merges into the weights that a training in 4 bits had, but '
            f'{model.name} is trained in 16 bits. Set "auto", or train.load_in_4bit = true.'
        )
    if settings.merge_base == "nf4" and converter_for(model.path):
        raise GattError(
            'export.merge_base = "nf4" cannot be used with this family: llama.cpp\'s own converter '
            'writes it, from the 16-bit merge. Set "fp16".'
        )


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
        GattError: as `write_merged_checkpoint`, or the predictions differ; then nothing is left.
    """
    folder = cached_checkpoint(model)
    others = set(target.iterdir()) if target.is_dir() else set()
    with progress("export: merged files", len(shards(folder))) as bar:
        write_merged_checkpoint(folder, adapter, target, bar.advance)
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
    with capture_output(cache_path("export.log")):
        logits = choose_backend().predict(checkpoint, None, reference.sequences, load_in_4bit=False)
    kl = require_close(str(checkpoint), reference, logits, limit)
    print_result(f"{checkpoint}: {kl:.4f} nats a token from the trained model")
