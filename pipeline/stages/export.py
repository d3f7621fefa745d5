"""`gatt export`: GGUF files of a run, or of any base model and adapter."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from pipeline.console import log
from pipeline.data.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.export.adapter_folder import for_text_model, with_adapters_tokenizer
from pipeline.export.exporter import export, predict_reference
from pipeline.export.job import ExportJob, model_metadata
from pipeline.export.merged import require_merge_base
from pipeline.export.merged import write_merged as write_merged_folder
from pipeline.files import read_jsonl, write_json
from pipeline.gguf.formats import require_formats
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.lora.weights import read_adapter
from pipeline.gguf.merge import plan_merge
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.llama_converter import converter_for
from pipeline.hub.models import find_model, require_chat_template, shape_of
from pipeline.inference.logits import Logits
from pipeline.recipe import Export, Recipe
from pipeline.records import Message
from pipeline.report.facts import public_name
from pipeline.run_dir import RunDir
from pipeline.training.job import loads_in_4bit
from pipeline.training.unsloth import load_tokenizer, nf4_round_trip

SECTIONS = ("export", "dialogues")
"""Sections of the recipe that the result depends on."""
KEYS = (("evaluate", "temperature"),)
"""Keys of other sections that it depends on: this one is in the Modelfile."""


def inputs(recipe: Recipe, run_dir: RunDir) -> list[Path]:
    """Return the files that the result depends on."""
    return [find_model(recipe.model).path, run_dir.adapter, run_dir.examples]


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Write `export/tuned-FORMAT.gguf` for every format of the recipe, adapter, Modelfiles and
    `export.json`.
    """
    require_formats(recipe.export.formats)
    model = find_model(recipe.model)
    in_4bit = loads_in_4bit(recipe.train, shape_of(recipe.model))
    require_merge_base(model, recipe.export, in_4bit=in_4bit)
    settings = recipe.export
    if settings.merge_base == "auto" and not in_4bit:
        settings = settings.model_copy(update={"merge_base": "fp16"})
    job = ExportJob(
        model=model,
        adapter=run_dir.adapter,
        folder=run_dir.exported.parent,
        stem="tuned",
        settings=settings,
        dialogues=[row["messages"] for _, row in read_jsonl(run_dir.examples)],
        reference=Logits.load(run_dir.reference) if run_dir.reference.exists() else None,
        trained_in_4bit=in_4bit,
        metadata=model_metadata(model, public_name(recipe.dialogues.source)),
        system=recipe.chat_system,
        temperature=recipe.evaluate.temperature,
        name=run_dir.path.resolve().name,
    )
    converter = converter_for(model.path)
    if converter and settings.merge_base == "auto":
        log("export: merged into fp16; nf4 is not tried for a family of llama.cpp's own converter.")
    write_json(run_dir.exported, asdict(export(job, converter)))


def export_standalone(
    name: str,
    adapter: Path | None,
    folder: Path,
    settings: Export,
    converter: Path | None = None,
    merged_dir: Path | None = None,
) -> None:
    """Export a base model with an adapter of any trainer, without a run, with the same checks.

    With `merged_dir`, the merged model is written there, too, as `write_merged` does.

    Raises:
        GattError: as `export`, or settings that a converter cannot have.
    """
    require_formats(settings.formats)
    base = find_model(name)
    converter = converter or converter_for(base.path)
    if converter and settings.merge_base != "fp16":
        raise GattError(
            f"--merge-base {settings.merge_base} cannot be used with llama.cpp's converter, "
            "which converts the 16-bit merge."
        )
    in_4bit = settings.merge_base != "fp16"
    if not converter:  # an adapter that does not fit is refused at once
        plan_merge(base.path, adapter, nf4_round_trip=nf4_round_trip if in_4bit else None)
    elif adapter:
        read_adapter(adapter)
    if not (adapter and read_chat_template(adapter)):
        require_chat_template(base)
    chats: list[list[Message]] = [
        [{"role": "user", "content": dialogue.turns[0]}] for dialogue in load_dialogues("seed")
    ]
    with tempfile.TemporaryDirectory() as scratch:
        model, loadable = base, adapter
        if adapter:
            model = with_adapters_tokenizer(base, adapter, Path(scratch))
            loadable = for_text_model(adapter, Path(scratch))
        tokenizer = load_tokenizer(cached_checkpoint(model))
        reference = predict_reference(base, loadable, tokenizer, chats, load_in_4bit=in_4bit)
        job = ExportJob(
            model=model,
            adapter=adapter,
            folder=folder,
            stem=model.name.rpartition("/")[2],  # of a Hub id, the name
            settings=settings,
            dialogues=chats,
            dataset="gatt's built-in questions",
            reference=reference,
            trained_in_4bit=in_4bit,
            # llama.cpp's side reads no file without a chat template.
            base=base if base.is_gguf or read_chat_template(base.path) else None,
            metadata=model_metadata(model) if adapter else {},
        )
        write_json(folder / "export.json", asdict(export(job, converter)))
        if merged_dir:
            write_merged_folder(model, adapter, merged_dir, reference, in_4bit=in_4bit)


def write_merged(recipe: Recipe, run_dir: RunDir, target: Path) -> None:
    """Write the merged model of a run in float32 to the folder `target`, as transformers loads it.

    Raises:
        GattError: as `write_checkpoint`, or it does not predict what the trained model does.
    """
    reference = Logits.load(run_dir.reference) if run_dir.reference.exists() else None
    in_4bit = loads_in_4bit(recipe.train, shape_of(recipe.model))
    model = find_model(recipe.model)
    write_merged_folder(model, run_dir.adapter, target, reference, in_4bit=in_4bit)
