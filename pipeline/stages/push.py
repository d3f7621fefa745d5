"""`gatt push owner/name`: a finished run goes to a model repository of the Hub, with a model card. Loads no model.

Not for the dialogues: `gatt synthesize --push` uploads them, as a dataset.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from pipeline.console import print_result
from pipeline.errors import GattError
from pipeline.files import sha256
from pipeline.gatt.instructions import render_instruction
from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.hub.models import presets
from pipeline.hub.upload import upload
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_toml
from pipeline.run_dir import STAGES, RunDir

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Published:
    """What the card says of a run beyond its recipe.

    `model` is the GGUF that the report is about, `bytes` the size of every file by its name in the repository. `base` is
    the base's id on the Hub. It, `license` and `dataset` are "" where they are not known.
    """

    repository: str
    model: str
    bytes: dict[str, int]
    base: str
    license: str
    dataset: str
    sentence: str
    report: str
    facts: dict[str, str]


def run(recipe: Recipe, run_dir: RunDir, repository: str) -> None:
    """Upload the exported files, the adapter, the recipe, the chart and the card; a new repository is private.

    Raises:
        GattError: the report or the exported file is missing or not of this run's last export, or the Hub refused.
    """
    _require_report(recipe, run_dir)
    info = open_gguf(_measured(recipe, run_dir))
    base = _hub_id(str(presets().get(recipe.model, {}).get("repository", recipe.model)))
    files = _files(recipe, run_dir, base or Path(recipe.model).name)
    report = json.loads((run_dir.report / "report.json").read_text(encoding="utf-8"))
    published = Published(
        repository=repository,
        model=info.path.name,
        bytes={
            name: len(file) if isinstance(file, bytes) else file.stat().st_size
            for name, file in files.items()
        },
        base=_stated_base(info) or base,
        license=str(info.field("general.license", "")),
        dataset=_hub_id(recipe.dialogues.source),
        sentence=str(report["sentence"]),
        report=(run_dir.report / "report.md").read_text(encoding="utf-8"),
        facts=_facts(recipe, run_dir, str(report["facts"]["teacher"])),
    )
    card = model_card(recipe, published).encode()
    address = upload(repository, "model", {"README.md": card, **files}, "Model trained by gatt")
    print_result(f"Uploaded (private, if it is new): {address}")


def _measured(recipe: Recipe, run_dir: RunDir) -> Path:
    """The file that `gatt evaluate` measures."""
    return run_dir.tuned(recipe.export.formats[0])


def _require_report(recipe: Recipe, run_dir: RunDir) -> None:
    """Refuse a run that is not finished, or whose report speaks of an earlier export."""
    words = f"{run_dir.path / 'recipe.toml'} --run {run_dir.path}"
    model, reports = _measured(recipe, run_dir), ("report.md", "report.json", "adherence.svg")
    for file, stage in (
        (model, "export"),
        *((run_dir.report / name, "report") for name in reports),
    ):
        if not file.is_file():
            raise GattError(f"No {file}: a run is pushed with it. `gatt {stage} {words}` makes it.")
    evaluated = (run_dir.manifest("evaluate") or {}).get("inputs", {}).get(model.name)
    if evaluated not in (None, sha256(model)):
        raise GattError(
            f"The report is not about the present {model}, which is of a later export. `gatt run {words}` measures it."
        )


def _files(recipe: Recipe, run_dir: RunDir, base: str) -> dict[str, Path | bytes]:
    """What is uploaded beside the card, by its name there."""
    folder = _measured(recipe, run_dir).parent
    exported = [*sorted(folder.glob("*.gguf")), *sorted(folder.glob("Modelfile*"))]
    return {
        **{file.name: file for file in exported},
        **_adapter(run_dir.adapter, base),
        "recipe.toml": recipe_toml(recipe, comments=False).encode(),
        "adherence.svg": run_dir.report / "adherence.svg",
    }


def _adapter(folder: Path, base: str) -> dict[str, Path | bytes]:
    """The files of PEFT. In them the name `base` replaces the base's folder on this machine, which nobody else has."""
    files: dict[str, Path | bytes] = {
        f"adapter/{file.name}": file for file in sorted(folder.glob("*")) if file.is_file()
    }
    settings = folder / "adapter_config.json"
    local = (
        json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if settings.is_file()
        else None
    )
    for file in (settings, folder / "README.md"):
        if local and file.is_file():
            text = file.read_text(encoding="utf-8")
            for spelling in (json.dumps(local)[1:-1], local):
                text = text.replace(spelling, base)
            files[f"adapter/{file.name}"] = text.encode()
    return files


def _hub_id(name: str) -> str:
    """`name` if it reads like owner/name on the Hub and is nothing on this disk, else ""."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def _stated_base(info: GgufInfo) -> str:
    """The Hub id of the base as the exported file states it, or "". A title ("Qwen3 0.6B") is no id."""
    url, owner, name = (
        str(info.field(f"general.base_model.0.{key}", ""))
        for key in ("repo_url", "organization", "name")
    )
    ids = (url.removeprefix("https://huggingface.co/"), f"{owner}/{name}")
    return next((found for found in ids if _HUB_ID.fullmatch(found)), "")


def _facts(recipe: Recipe, run_dir: RunDir, teacher: str) -> dict[str, str]:
    facts = {
        "base": _hub_id(recipe.model) or Path(recipe.model).name,
        "teacher": teacher,
        "seed": str(recipe.seed),
        "learned": f"{recipe.train.loss}, {recipe.train.max_steps} steps of {recipe.train.batch_size} dialogues, rank {recipe.train.rank}",
    }
    for stage in STAGES[:-1]:
        if manifest := run_dir.manifest(stage):
            facts[f"time of {stage}"] = f"{manifest['seconds']:.0f} s"
            facts["versions"] = ", ".join(
                f"{k} {v}" for k, v in manifest["versions"].items() if v != "none"
            )
            facts["commit of gatt"], facts["machine"] = manifest["commit"], manifest["platform"]
    return facts


def model_card(recipe: Recipe, published: Published) -> str:
    """The README.md of the repository: a YAML head for the Hub, then what it is, how well it holds, how to use it."""
    title = published.repository.split("/")[-1]
    base = (
        f"[{published.base}](https://huggingface.co/{published.base})"
        if published.base
        else published.facts["base"]
    )
    taught = [
        f"- {render_instruction((constraint,)).text}" for constraint in recipe.instructions.pool
    ]
    if recipe.instructions.generate:
        taught.append(
            f"- and what the teacher listed of these kinds: {', '.join(recipe.instructions.generate)}"
        )
    settings = recipe.evaluate
    warning = f"A shortened run: {settings.dialogues} dialogues of {settings.turns} turns. Take no figure from it."
    lines = [
        "---",
        *_head(published),
        "---",
        "",
        f"# {title}",
        "",
        f"{base}, trained by `gatt` with Ghost Attention (Llama 2, section 3.3) to keep an instruction that is given once, in "
        "the first message.",
        "",
        f"**{published.sentence}**",
        "",
        *([warning, ""] if settings.shortened else []),
        "![Share of the answers that keep the instruction, by turn](adherence.svg)",
        "",
        "## Instructions taught",
        "",
        *taught,
        "",
        "## Files",
        "",
        "| file | MB | |",
        "|---|---|---|",
        *(
            f"| {name} | {_megabytes(size)} | {_meaning(name)} |"
            for name, size in published.bytes.items()
        ),
        "",
        "## Use",
        "",
        f"`hf download {published.repository} --local-dir .` gets the files. Give the instruction in your first "
        "message only.",
        "",
        "```",
        *_commands(recipe, published),
        "```",
        "",
        "## Report",
        "",
        published.report.removeprefix(f"**{published.sentence}**").split("### The run")[0].strip(),
        "",
        "## The run",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in published.facts.items()),
    ]
    return "\n".join(lines) + "\n"


def _head(published: Published) -> list[str]:
    """The lines of YAML; JSON's strings and lists are YAML too, whatever stands in them."""
    head: dict[str, str | list[str]] = {}
    if re.fullmatch(r"[a-z0-9.-]+", published.license):
        head["license"] = published.license
    elif published.license:  # the Hub refuses a card whose `license` is none of its own ids
        head["license"], head["license_name"] = "other", published.license
    if published.base:  # without its relation, the Hub takes a GGUF for the base itself, quantized
        head["base_model"], head["base_model_relation"] = published.base, "finetune"
    head |= {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["ghost-attention", "gguf", "lora"],
    }
    if published.dataset:
        head["datasets"] = [published.dataset]
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 50_000 else "< 0.1"


def _meaning(name: str) -> str:
    """What a file of the repository is, as far as its name tells."""
    kinds = {
        r"tuned-(.+)\.gguf": r"the tuned model, \1",
        r".*adapter.*\.gguf": "the adapter alone, to be laid over the base's GGUF",
        r".*imatrix.*\.gguf": "importance matrix of the quantization",
        r"Modelfile.*": "for `ollama create`",
        r"adapter/.*": "the adapter in PEFT's form",
        r"recipe\.toml": "every setting of the run",
        r"adherence\.svg": "the chart above",
    }
    found = (
        match.expand(meaning)
        for kind, meaning in kinds.items()
        if (match := re.fullmatch(kind, name))
    )
    return next(found, "")


def _commands(recipe: Recipe, published: Published) -> list[str]:
    """One line for each program that can chat with the model."""
    chat = ["gatt", "chat", published.model]
    if recipe.dialogues.system:
        chat += ["--system", recipe.dialogues.system]
    if recipe.instructions.pool:
        chat += ["--instruction", render_instruction(recipe.instructions.pool[:1]).text]
    title = shlex.quote(published.repository.split("/")[-1].lower())
    ollama = [
        f"ollama create {title} -f {name} && ollama run {title}"
        for name in published.bytes
        if name.startswith("Modelfile")
    ]
    return [shlex.join(chat), *ollama[:1], f"llama-server --model {shlex.quote(published.model)}"]
