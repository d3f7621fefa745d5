"""From an adapter to verified GGUF files: write every format, check the files, move them into
place.

What is exported is decided by `gatt export` (stages/export.py); the bytes are written by
pipeline/gguf/merge.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.console import capture_output, log, print_result
from pipeline.errors import GattError
from pipeline.export.job import ExportJob
from pipeline.export.lm_studio import link_for_lm_studio
from pipeline.export.modelfile import write_modelfiles
from pipeline.export.summary import MIN_RETAINED, ExportSummary, FormatSummary
from pipeline.export.verify import load_and_predict, max_kl, require_close, verify_file
from pipeline.export.writer import COMPANIONS, ExportWriter, WrittenFile, write_by_converter
from pipeline.gguf.base import Array
from pipeline.gguf.reader import read_gguf
from pipeline.hub.convert import cached_checkpoint, cached_gguf
from pipeline.hub.models import Model
from pipeline.inference.chat_template import template_of
from pipeline.inference.logits import Logits
from pipeline.records import Message
from pipeline.system import available_memory, cache_path
from pipeline.training.backend import choose_backend
from pipeline.training.unsloth import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFERENCE_CHATS = 4


def export(job: ExportJob, converter: Path | None = None) -> ExportSummary:
    """Write the files; existing ones are replaced only when all new ones have passed their checks.

    With a `converter`, llama.cpp's convert_hf_to_gguf.py, that script writes them from a merged
    checkpoint: for architectures that this version cannot write.

    Raises:
        GattError: base, adapter and settings do not fit together, or a check failed.
    """
    if converter and not converter.is_file():
        raise GattError(f"No converter at {converter}. Expected llama.cpp's convert_hf_to_gguf.py.")
    job.folder.mkdir(parents=True, exist_ok=True)
    for left_over in job.folder.glob(".export-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=job.folder, prefix=".export-") as name:
        scratch = Path(name)
        if converter:
            written = write_by_converter(job, converter, scratch)
        else:
            written = ExportWriter(job, scratch).write()
        formats = {
            format_name: _verify(job, format_name, file, written.f16_logits)
            for format_name, file in written.by_format.items()
        }
        kl_adapter = _verify_adapter(job, scratch / "adapter.gguf")
        for path in (*(file.path for file in written.by_format.values()), *written.companions):
            path.replace(job.folder / path.name)
    if (job.folder / "export.json").exists():  # otherwise they are a user's own
        for name in {*COMPANIONS} - {path.name for path in written.companions}:
            (job.folder / name).unlink(missing_ok=True)
    files = [job.file(format_name) for format_name in formats]
    if not converter or read_gguf(files[0]).chat_template:  # a user's own script may write none
        write_modelfiles(files, job.temperature, job.system)
        for format_name, file in zip(formats, files, strict=True):
            link_for_lm_studio(file, f"{job.name or job.stem}-{format_name}")
    summary = ExportSummary(
        merge_base=written.merge_base,
        merge_trials=written.trials,
        formats=formats,
        imatrix_tokens=written.imatrix_tokens,
        kl_adapter=kl_adapter,
        trained_in_4bit=job.trained_in_4bit,
    )
    _log_summary(job, summary)
    return summary


def predict_reference(
    model: Model,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Sequence[Message]],
    *,
    load_in_4bit: bool,
) -> Logits | None:
    """Return what the model predicts in transformers; None where it does not fit in memory."""
    folder = cached_checkpoint(model)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # In 4 bits the weights are rounded one by one. Otherwise: float32 of bfloat16, and activations.
    needed = size if load_in_4bit else 3 * size
    if needed > available_memory():
        precision = "4 bits" if load_in_4bit else "float32"
        log(f"export: too little memory for the model in {precision}; predictions not compared.")
        return None
    with capture_output(cache_path("export.log")):
        template = template_of(tokenizer)
        token_ids = [
            list(tokenizer(template.render(chat), add_special_tokens=False)["input_ids"])
            for chat in chats[:_REFERENCE_CHATS]
        ]
        try:
            return choose_backend().predict(folder, adapter, token_ids, load_in_4bit=load_in_4bit)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise GattError(
                f"PEFT cannot load {adapter or folder} ({type(error).__name__}: {reason}). "
                "Check that it loads where it was trained."
            ) from error


def _verify(
    job: ExportJob, format_name: str, file: WrittenFile, f16_logits: Array | None
) -> FormatSummary:
    verify_tokenizer = job.settings.verify_tokenizer
    divergence = verify_file(
        file.path,
        load_tokenizer(cached_checkpoint(job.model)) if verify_tokenizer else None,
        job.reference,
        f16_logits,
        max_kl(format_name, in_4bit=job.trained_in_4bit),
    )
    return FormatSummary(
        bytes=file.path.stat().st_size,
        retained=file.retained,
        kl_trained=divergence.kl_trained,
        kl_f16=divergence.kl_f16,
    )


def _verify_adapter(job: ExportJob, file: Path) -> float | None:
    """Apply the adapter's own GGUF to the base, and return its distance from the trained model."""
    if not (file.exists() and job.reference):
        return None
    base = job.plain_base
    gguf = base.path if base.is_gguf else cached_gguf(base, "Q8_0")
    limit = max_kl("Q8_0", in_4bit=job.trained_in_4bit)
    loaded = load_and_predict(gguf, (), job.reference.sequences, file)
    return require_close(file.name, job.reference, loaded.logits, limit)


def _log_summary(job: ExportJob, summary: ExportSummary) -> None:
    """Print one line per file, and what a user should know about them."""
    for merge_base, trial in summary.merge_trials.items():
        log(
            f"export: merged into {merge_base}, {trial.kl_trained:.4f} nats a token from the "
            f"trained model, {trial.nll:.4f} nats a token for {job.dataset}"
        )
    for format_name, row in summary.formats.items():
        parts = [f"{row.bytes / 1e6:.0f} MB"]
        if row.kl_trained is not None:
            parts.append(f"{row.kl_trained:.4f} nats a token from the trained model")
        if row.kl_f16 is not None:
            parts.append(f"{row.kl_f16:.4f} nats a token from F16")
        print_result(f"{job.file(format_name)}: {', '.join(parts)}")
        lost = {kind: share for kind, share in row.retained.items() if share < MIN_RETAINED}
        if lost:
            kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(lost.items()))
            log(
                f"export: {format_name} retains less than {MIN_RETAINED:.0%} of the adapter's "
                f"change in {kinds}. A larger format retains more."
            )
    if summary.kl_adapter is not None:
        given = job.plain_base
        base = given.path.name if given.is_gguf else f"{given.name} in Q8_0"
        print_result(
            f"{job.folder / 'adapter.gguf'}: {summary.kl_adapter:.4f} nats a token from the "
            f"trained model, applied to {base}"
        )
