"""`gatt push owner/name`: upload a finished run to a model repository, with a model card.

It loads no model. Dialogues are uploaded by `gatt synthesize --push`, as a dataset.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipeline.console import print_result
from pipeline.errors import GattError
from pipeline.files import sha256
from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.hub.presets import presets
from pipeline.hub.upload import upload
from pipeline.recipe import Recipe
from pipeline.recipe_file import recipe_toml
from pipeline.report.cards import PublishedModel, model_card
from pipeline.report.facts import run_facts
from pipeline.run_dir import RunDir, stage_commands

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def run(recipe: Recipe, run_dir: RunDir, repository: str) -> None:
    """Upload the exported files, the adapter, the recipe, the chart and the card.

    A new repository is private.

    Raises:
        GattError: the report or the exported file is missing or is not of this run's last export
            and evaluation, the recipe has changed since, or the Hub refused.
    """
    _require_report(recipe, run_dir)
    info = open_gguf(_measured_file(recipe, run_dir))
    preset = presets().get(recipe.model)
    base_id = _hub_id(preset.repository if preset else recipe.model)
    files = _files(recipe, run_dir, base_id or Path(recipe.model).name)
    report = json.loads((run_dir.report / "report.json").read_text(encoding="utf-8"))
    model = PublishedModel(
        repository=repository,
        model_file=info.path.name,
        sizes={
            name: len(file) if isinstance(file, bytes) else file.stat().st_size
            for name, file in files.items()
        },
        headline=report["headline"],
        facts=run_facts(recipe, run_dir, report["facts"]["teacher"]),
        report=(run_dir.report / "report.md").read_text(encoding="utf-8"),
        warning=report.get("warning", ""),
        base_id=_stated_base(info) or base_id,
        license=str(info.field("general.license", "")),
        dataset_id=_hub_id(recipe.dialogues.source),
    )
    card = model_card(recipe, model).encode()
    url = upload(repository, "model", {"README.md": card, **files}, "Model trained by gatt")
    print_result(f"Uploaded (private, if it is new): {url}")


def _measured_file(recipe: Recipe, run_dir: RunDir) -> Path:
    """Return the file that `gatt evaluate` measures."""
    return run_dir.tuned(recipe.export.formats[0])


def _require_report(recipe: Recipe, run_dir: RunDir) -> None:
    """Refuse a run that is not finished, or whose report is about an earlier export."""
    arguments = f"{run_dir.recipe} --run {run_dir.path}"
    if run_dir.outdated:
        stages = stage_commands(run_dir.outdated)
        raise GattError(
            f"{run_dir.recipe} has changed since {stages}, and the model card would state settings "
            f"that the model was not made with. Run `gatt run {arguments}` to make it anew, or "
            "change the recipe back."
        )
    if recipe.evaluate.adapter:
        raise GattError(
            f"The report is about the adapter {recipe.evaluate.adapter}, not about the exported "
            f"file. Run `gatt evaluate {arguments} --adapter ''` and `gatt report {arguments}`."
        )
    model = _measured_file(recipe, run_dir)
    required = {model: "export"}
    for name in ("report.md", "report.json", *_chart(run_dir)):
        required[run_dir.report / name] = "report"
    for file, stage in required.items():
        if not file.is_file():
            raise GattError(
                f"{file} is missing; `gatt push` uploads it. Run `gatt {stage} {arguments}` first."
            )
    evaluated = _finished_inputs(run_dir, "evaluate", arguments)
    # The base may have the same name.
    if model.name in evaluated and sha256(model) not in evaluated.values():
        raise GattError(
            f"The report is about an earlier export than {model}. Run `gatt run {arguments}` to "
            "measure the new one."
        )
    reported = _finished_inputs(run_dir, "report", arguments)
    for file in (run_dir.exported, run_dir.scores):
        if not file.is_file() or reported.get(file.name) != sha256(file):
            raise GattError(
                f"The report was not made of the present {file}. Run `gatt run {arguments}` to "
                "bring it up to date."
            )


def _chart(run_dir: RunDir) -> list[str]:
    """Return the name of the report's chart; there is none where no answer was checked."""
    file = run_dir.report / "report.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return ["adherence.svg"] if report.get("has_chart", True) else []


def _finished_inputs(run_dir: RunDir, stage: str, arguments: str) -> dict[str, str]:
    """Return the hashes of what a stage has read, by name; refuse a stage that is not finished."""
    manifest = run_dir.manifest(stage)
    if manifest is None:
        raise GattError(
            f"`gatt {stage}` has not finished in {run_dir.path}; `gatt push` uploads what it "
            f"writes. Run `gatt run {arguments}` first."
        )
    return manifest["inputs"]


def _files(recipe: Recipe, run_dir: RunDir, base: str) -> dict[str, Path | bytes]:
    """Return what is uploaded with the card, by its path in the repository."""
    folder = _measured_file(recipe, run_dir).parent
    exported = [*sorted(folder.glob("*.gguf")), *sorted(folder.glob("Modelfile*"))]
    return {
        **{file.name: file for file in exported},
        **_adapter_files(run_dir.adapter, base),
        "recipe.toml": _without_home(recipe_toml(recipe, comments=False)).encode(),
        **{name: run_dir.report / name for name in _chart(run_dir)},
    }


def _without_home(text: str) -> str:
    """Return a text in which "~" stands for the user's folder, whose name is nobody's business."""
    home = str(Path.home())
    for spelling in (json.dumps(home)[1:-1], home):
        text = text.replace(spelling, "~")
    return text


def _adapter_files(folder: Path, base: str) -> dict[str, Path | bytes]:
    """Return PEFT's files, in which `base` replaces the base model's path on this machine."""
    files: dict[str, Path | bytes] = {
        f"adapter/{file.name}": file for file in sorted(folder.glob("*")) if file.is_file()
    }
    config = folder / "adapter_config.json"
    if not config.is_file():
        return files
    local_path = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    for file in (config, folder / "README.md"):
        if local_path and file.is_file():
            text = file.read_text(encoding="utf-8")
            for spelling in (json.dumps(local_path)[1:-1], local_path):
                text = text.replace(spelling, base)
            files[f"adapter/{file.name}"] = text.encode()
    return files


def _hub_id(name: str) -> str:
    """Return `name` if it looks like owner/name on the Hub and is not a local path, else ""."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def _stated_base(info: GgufInfo) -> str:
    """Return the base model's Hub id as the exported file states it, else "".

    A title such as "Qwen3 0.6B" is not an id.
    """
    url, owner, name = (
        str(info.field(f"general.base_model.0.{key}", ""))
        for key in ("repo_url", "organization", "name")
    )
    candidates = (url.removeprefix("https://huggingface.co/"), f"{owner}/{name}")
    return next((candidate for candidate in candidates if _HUB_ID.fullmatch(candidate)), "")
