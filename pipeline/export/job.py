"""The description of one export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.gguf.base import Metadata
from pipeline.hub.models import Model
from pipeline.inference.logits import Logits
from pipeline.recipe import Export
from pipeline.records import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What is exported to where: `folder/STEM-FORMAT.gguf`.

    `base` is the model before it got the tokenizer of its adapter, None for `model` itself.
    `dialogues` are read for an importance matrix; `dataset` is what files and messages call them.
    `reference` holds the logits of the trained model, if they are known; its base was in 4 bits if
    `trained_in_4bit`. `metadata` is what the files say about themselves; `system` and `temperature`
    go into the Modelfile. LM Studio shows `name`, or else the stem."""

    model: Model
    adapter: Path | None
    folder: Path
    stem: str
    settings: Export
    dialogues: Sequence[Sequence[Message]]
    reference: Logits | None
    trained_in_4bit: bool = True
    base: Model | None = None
    metadata: Metadata = field(default_factory=dict)
    system: str = ""
    temperature: float = 0.7
    dataset: str = "the run's dialogues"
    name: str = ""

    @property
    def plain_base(self) -> Model:
        """The base as it was given, whose conversions are cached."""
        return self.base or self.model

    def file(self, format_name: str) -> Path:
        """Return the path of a format."""
        return self.folder / f"{self.stem}-{format_name}.gguf"


def model_metadata(model: Model, dataset: str = "") -> Metadata:
    """Return what a fine-tuned file says about itself: its base, and the source of its user turns.

    The name stays the base's own, because llama.cpp treats some tokenizers by it.
    """
    base = {"name": model.repository.split("/")[-1] or model.name}
    if model.repository:
        base |= {
            "organization": model.repository.split("/")[0],
            "repo_url": f"https://huggingface.co/{model.repository}",
        }
    metadata: Metadata = {"finetune": "GAtt", "base_models": [base]}
    if dataset:
        metadata["datasets"] = [
            {"name": "dialogues that keep an instruction", "description": f"user turns: {dataset}"}
        ]
    return metadata
