"""The cards of a model and of a dataset on the Hub: YAML metadata, then Markdown.

Their texts are `model_card.md` and `dataset_card.md` in this folder.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath

from pipeline.gatt.instructions import instruction_of
from pipeline.recipe import Instructions, Recipe
from pipeline.report.facts import chat_options, public_name

_MEANINGS = {
    r"tuned-(.+)\.gguf": r"the tuned model, \1",
    r".*adapter.*\.gguf": "the LoRA adapter, for the base model's GGUF",
    r".*imatrix.*\.gguf": "importance matrix of the quantization",
    r"Modelfile.*": "for `ollama create`",
    r"adapter/.*": "the adapter in PEFT's format",
    r"recipe\.toml": "every setting of the run",
    r"adherence\.svg": "the chart above",
}
"""What the files of a model repository are, by a pattern of their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """What a model card says about a run beyond its recipe.

    `model_file` is the GGUF that the report is about, `sizes` the bytes of every file by its path
    in the repository. `base_id` is the base model's id on the Hub. It, `license` and `dataset_id`
    are "" where they are not known.
    """

    repository: str
    model_file: str
    sizes: Mapping[str, int]
    headline: str
    facts: Mapping[str, str]
    report: str = ""
    warning: str = ""
    base_id: str = ""
    license: str = ""
    dataset_id: str = ""


@dataclass(frozen=True, slots=True)
class _FileRow:
    name: str
    megabytes: str
    meaning: str


def model_card(recipe: Recipe, model: PublishedModel) -> str:
    """Return the README.md of a model repository."""
    from huggingface_hub import ModelCard, ModelCardData

    base = f"[{model.base_id}](https://huggingface.co/{model.base_id})"
    card = ModelCard.from_template(
        ModelCardData(**_model_metadata(model)),
        template_str=_template("model_card.md"),
        title=model.repository.split("/")[-1],
        base=base if model.base_id else model.facts["base model"],
        headline=model.headline,
        warning=model.warning,
        has_chart="adherence.svg" in model.sizes,
        instructions=_trained_instructions(recipe.instructions),
        is_baked=bool(recipe.instructions.bake),
        files=[
            _FileRow(name, f"{size / 1e6:.1f}" if size >= 50_000 else "< 0.1", _meaning(name))
            for name, size in model.sizes.items()
        ],
        repository=model.repository,
        commands=_commands(recipe, model),
        report=model.report.replace(f"**{model.headline}**", "", 1).split("### The run")[0].strip(),
        facts=model.facts,
    )
    return str(card)


def dataset_card(
    recipe: Recipe, teacher: str, counts: Mapping[tuple[str, str], int], data_file: str
) -> str:
    """Return the README.md of a dataset repository.

    `counts` are the dialogues in `data_file` by instruction and way.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    metadata = DatasetCardData(
        task_categories=["text-generation"],
        tags=["ghost-attention", "synthetic"],
        configs=[{"config_name": "default", "data_files": data_file}],
    )
    card = DatasetCard.from_template(
        metadata,
        template_str=_template("dataset_card.md"),
        counts=dict(sorted(counts.items())),
        teacher=teacher,
        source=public_name(recipe.dialogues.source),
        seed=recipe.seed,
    )
    return str(card)


def _template(name: str) -> str:
    return (resources.files("pipeline.report") / name).read_text(encoding="utf-8")


def _trained_instructions(settings: Instructions) -> list[str]:
    """Return what was trained, as items of a list; a baked prompt takes the place of all others."""
    if settings.bake:
        return [f"The system prompt {PurePath(settings.bake).name}, which the model is not given."]
    instructions = [instruction_of(entry).text for entry in settings.pool]
    if settings.file:
        instructions.append(f"and those of {PurePath(settings.file).name}")
    if values := settings.vocabulary_kinds:
        instructions.append(f"and any value of the kinds {', '.join(values)}: a new one each time")
    if kinds := settings.generate:
        instructions.append(f"and values that the teacher listed for: {', '.join(kinds)}")
    return instructions


def _model_metadata(model: PublishedModel) -> dict[str, str | list[str]]:
    metadata: dict[str, str | list[str]] = {}
    if re.fullmatch(r"[a-z0-9.-]+", model.license):
        metadata["license"] = model.license
    elif model.license:  # the Hub refuses a card whose `license` is not one of its ids
        metadata |= {"license": "other", "license_name": model.license}
    if model.base_id:
        # Without the relation, the Hub takes a GGUF for a quantization of the base model.
        metadata |= {"base_model": model.base_id, "base_model_relation": "finetune"}
    metadata |= {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["ghost-attention", "gguf", "lora"],
    }
    if model.dataset_id:
        metadata["datasets"] = [model.dataset_id]
    return metadata


def _meaning(name: str) -> str:
    """Return what a file of the repository is, as far as its name tells, else ""."""
    for pattern, meaning in _MEANINGS.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(meaning)
    return ""


def _commands(recipe: Recipe, model: PublishedModel) -> list[str]:
    """Return one command for each program that can chat with the model."""
    chat = ["gatt", "chat", model.model_file, *chat_options(recipe)]
    title = shlex.quote(model.repository.split("/")[-1].lower())
    ollama = [
        f"ollama create {title} -f {name} && ollama run {title}"
        for name in model.sizes
        if name.startswith("Modelfile")
    ]
    return [shlex.join(chat), *ollama[:1], f"llama-server --model {shlex.quote(model.model_file)}"]
