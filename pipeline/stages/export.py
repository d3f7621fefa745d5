"""`gatt export`: GGUF files of a run, or of any base model and adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pipeline.console import print_result
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.export import converter as checkpoint_converter
from pipeline.export.exporter import export, predict_reference
from pipeline.export.job import ExportJob, model_metadata
from pipeline.files import read_jsonl, write_json
from pipeline.gguf.merge import plan_merge
from pipeline.hub.models import find_model
from pipeline.inference.logits import Logits
from pipeline.recipe import Export, Recipe
from pipeline.records import Message
from pipeline.run_dir import RunDir

SECTIONS = ("export", "dialogues")
"""Sections of the recipe that the result depends on."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    return [find_model(recipe.model).path, run_dir.adapter, run_dir.examples]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Write `export/tuned-FORMAT.gguf` for every format of the recipe, adapter, Modelfiles and
    `export.json`.
    """
    model = find_model(recipe.model)
    job = ExportJob(
        model=model,
        adapter=run_dir.adapter,
        folder=run_dir.exported.parent,
        stem="tuned",
        settings=recipe.export,
        dialogues=[row["messages"] for _, row in read_jsonl(run_dir.examples)],
        reference=Logits.load(run_dir.reference) if run_dir.reference.exists() else None,
        metadata=model_metadata(model, recipe.dialogues.source),
        system=recipe.dialogues.system,
        temperature=recipe.evaluate.temperature,
    )
    write_json(run_dir.exported, asdict(export(job)))


def export_standalone(
    name: str, adapter: Path | None, folder: Path, settings: Export, converter: Path | None = None
) -> None:
    """Export a base model with an adapter of any trainer, without a run, with the same checks.

    Raises:
        GattError: as `export`, or settings that a converter cannot have.
    """
    if converter and settings.merge_base != "fp16":
        raise GattError(
            f"--merge-base {settings.merge_base} cannot be used with --converter, "
            "which converts the 16-bit merge."
        )
    model = find_model(name)
    if not converter:
        plan_merge(model.path, adapter)  # an adapter that does not fit is refused at once
    chats: list[list[Message]] = [
        [{"role": "user", "content": dialogue.turns[0]}] for dialogue in load_dialogues("seed")
    ]
    job = ExportJob(
        model=model,
        adapter=adapter,
        folder=folder,
        stem=model.name,
        settings=settings,
        dialogues=chats,
        reference=predict_reference(
            model, adapter, chats, load_in_4bit=settings.merge_base != "fp16"
        ),
        metadata=model_metadata(model) if adapter else {},
    )
    write_json(folder / "export.json", asdict(export(job, converter)))


def write_merged(name: str, adapter: Path | None, target: Path) -> None:
    """Write the merged model in float32 to the folder `target`, as transformers loads it.

    Raises:
        GattError: as `write_checkpoint`.
    """
    checkpoint_converter.write_merged(find_model(name), adapter, target)
    print_result(str(target))
