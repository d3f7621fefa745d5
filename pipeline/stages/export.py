"""`gatt export`: GGUF files of a run, or of any base and adapter."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.console import capture_output, log, print_result, progress
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.export.exporter import ExportJob, export, log_summary, verify_file
from pipeline.files import read_jsonl, write_json
from pipeline.gguf.checkpoint import shards
from pipeline.gguf.checkpoint_writer import write_checkpoint
from pipeline.gguf.formats import quantize
from pipeline.gguf.merge import UNIFORM_FORMATS, plan_merge
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import Model, find_model
from pipeline.inference.chat_template import NO_THINKING
from pipeline.inference.logits import Logits
from pipeline.recipe import Export, Recipe
from pipeline.records import Message
from pipeline.run_dir import RunDir
from pipeline.system import available_memory, require_disk
from pipeline.training.unsloth import load_tokenizer, predict

SECTIONS = ("export", "dialogues")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    return [find_model(recipe.model).path, run_dir.adapter, run_dir.examples]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Write `export/tuned-FORMAT.gguf` for every format of the recipe, the adapter alone, a Modelfile and `export.json`."""
    model = find_model(recipe.model)
    dialogues = [row["messages"] for _, row in read_jsonl(run_dir.examples)]
    about = about_tuned(model, recipe.dialogues.source)
    reference = Logits.load(run_dir.reference) if run_dir.reference.exists() else None
    job = ExportJob(
        model,
        run_dir.adapter,
        run_dir.exported.parent,
        "tuned",
        recipe.export,
        dialogues,
        reference,
        about,
        recipe.dialogues.system,
        recipe.evaluate.temperature,
    )
    write_json(run_dir.exported, export(job))


def export_standalone(
    name: str, adapter: Path | None, folder: Path, settings: Export, converter: Path | None
) -> None:
    """Export a base and an adapter of any trainer, without a run: the same files, and the same checks.

    Raises:
        GattError: as `export`; or the converter failed.
    """
    if converter and settings.merge_base != "fp16":
        raise GattError(
            f"--merge-onto {settings.merge_base} is not for a converter of your own: it gets the 16-bit merge."
        )
    model = find_model(name)
    if not converter:
        plan_merge(model.path, adapter)  # do they fit, before anything takes its time
    chats: list[list[Message]] = [
        [{"role": "user", "content": d.turns[0]}] for d in load_dialogues("seed")
    ]
    reference = _predicted(model, adapter, chats, settings.merge_base != "fp16")
    about = about_tuned(model) if adapter else {}
    job = ExportJob(model, adapter, folder, model.name, settings, chats, reference, about, "", 0.7)
    table = _converted(job, converter) if converter else export(job)
    write_json(folder / "export.json", table)


def _predicted(
    model: Model, adapter: Path | None, chats: list[list[Message]], in_four_bits: bool
) -> Logits | None:
    """What the model predicts in transformers, where it has room in memory for that."""
    folder = cached_checkpoint(model)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if 3 * size > available_memory():  # float32 of bfloat16, and what comes with it
        log("export: the model has no room here in float32; its predictions are not compared.")
        return None
    with capture_output(Path(tempfile.gettempdir()) / "gatt-export.log"):
        tokenizer = load_tokenizer(folder)
        options = {"add_generation_prompt": True, "return_dict": False, **NO_THINKING}
        ids = [list(tokenizer.apply_chat_template(c, **options)) for c in chats[:4]]
        return predict(folder, adapter, ids, load_in_4bit=in_four_bits)


def _converted(job: ExportJob, converter: Path) -> dict[str, Any]:
    """The way of a family that is not known here: merged on the disk, and given to the user's own converter."""
    if not converter.is_file():
        raise GattError(f"No converter at {converter}. Expected llama.cpp's convert_hf_to_gguf.py.")
    job.folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    with tempfile.TemporaryDirectory(dir=job.folder, prefix=".export-") as name:
        scratch = Path(name)
        write_merged(str(job.model.path), job.adapter, scratch / "merged")
        for format_name in job.settings.formats:
            file = scratch / job.file(format_name).name
            made = file if format_name in UNIFORM_FORMATS else scratch / "full.gguf"
            kind = format_name.lower() if format_name in UNIFORM_FORMATS else "f16"
            command = [
                sys.executable,
                str(converter),
                str(scratch / "merged"),
                "--outfile",
                str(made),
                "--outtype",
                kind,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise GattError(
                    f"{converter.name} failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
                )
            if made != file:
                quantize(made, file, format_name)
            rows[format_name] = {
                "bytes": file.stat().st_size,
                "retained": {},
                **verify_file(job, format_name, file, None),
            }
        for format_name in job.settings.formats:
            (scratch / job.file(format_name).name).replace(job.file(format_name))
    table = {"merge_base": "fp16", "merges": {}, "formats": rows, "imatrix_tokens": 0}
    log_summary(job, table)
    return table


def write_merged(name: str, adapter: Path | None, target: Path) -> None:
    """The merged model as transformers loads it, in float32.

    Raises:
        GattError: as `write_checkpoint`.
    """
    folder = cached_checkpoint(find_model(name))
    files = shards(folder)
    require_disk(
        target.parent,
        2 * sum(file.stat().st_size for file in files),
        "write the merged model in float32",
    )
    with progress("export: merged files", len(files)) as bar:
        write_checkpoint(folder, adapter, target, bar.advance)
    print_result(str(target))


def about_tuned(model: Model, source: str = "") -> dict[str, Any]:
    """What a tuned file says of itself, by the fields of `gguf.Metadata`."""
    base = {"name": model.repository.split("/")[-1] or model.name}
    if model.repository:
        base |= {
            "organization": model.repository.split("/")[0],
            "repo_url": f"https://huggingface.co/{model.repository}",
        }
    # The name stays the base's own: llama.cpp treats some tokenizers by it.
    about: dict[str, Any] = {"finetune": "GAtt", "base_models": [base]}
    if source:
        about["datasets"] = [
            {"name": "dialogues that keep an instruction", "description": f"user turns: {source}"}
        ]
    return about
