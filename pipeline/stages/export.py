"""`gatt export`: adapter merged into the base, GGUF in every format asked for, each checked before it takes its name."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.backends.convert import format_of, gguf_file, hugging_face_folder
from pipeline.backends.hub import Model, find_model
from pipeline.backends.importance import Importance, measure
from pipeline.backends.llama import quantize
from pipeline.backends.ollama import modelfile
from pipeline.backends.probe import Probed, divergence, probe
from pipeline.backends.template import ChatTemplate
from pipeline.backends.unsloth import Reference, four_bits, load_tokenizer, predict
from pipeline.backends.weights import Adapter
from pipeline.config import Export, Recipe
from pipeline.console import chatter, note, out, progress
from pipeline.dialogues import load_dialogues
from pipeline.errors import GattError
from pipeline.files import read_jsonl, write_json, write_text
from pipeline.gatt.ghost import augment
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.base import Array
from pipeline.gguf.checkpoint import shards
from pipeline.gguf.merge import DIRECT, add, open_base, size, write
from pipeline.gguf.merged import write_checkpoint
from pipeline.gguf.read import open_gguf
from pipeline.machine import available_memory, require_disk
from pipeline.records import Message
from pipeline.rundir import RunDir

_FAR = 1.0
"""Nats a token between the trained model and an unquantised file: something is wrong, not rounded."""
_KEPT = 0.9
"""Share of the adapter's change below which a file is remarked on."""
_TRICKY = (
    "Hi", "  spaces before and after  ", "line\n\n\nbreaks,\ttabs\r\nand 1234567890", "naïve café, 漢字 и 🙂‍↔️ é",
    "It's 2,026 and I'll pay €35.50 {\"x\": [1, 2]} x**2", "<|im_end|> </s> <eos> <|eot_id|> [/INST] <think>",
)  # fmt: skip
"""What tokenizers are apt to disagree on."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is exported to where: `folder/STEM-FORMAT.gguf`.

    `dialogues` are read for an importance matrix; `reference` is what the trained model predicts, if that is known;
    `about` is what the files say of themselves.
    """

    model: Model
    adapter: Path | None
    folder: Path
    stem: str
    settings: Export
    dialogues: Sequence[Sequence[Message]]
    reference: Reference | None
    about: dict[str, Any]
    system: str
    temperature: float

    def file(self, format_name: str) -> Path:
        """Where a format goes."""
        return self.folder / f"{self.stem}-{format_name}.gguf"


def run(recipe: Recipe, rundir: RunDir) -> None:
    """Write `export/tuned-FORMAT.gguf` for every format of the recipe, the adapter alone, a Modelfile and `export.json`."""
    model = find_model(recipe.model)
    dialogues = [row["messages"] for _, row in read_jsonl(rundir.examples)]
    about = about_tuned(model, recipe.dialogues.source)
    reference = Reference.load(rundir.reference) if rundir.reference.exists() else None
    job = Job(
        model, rundir.adapter, rundir.exported.parent, "tuned", recipe.export, dialogues, reference, about,
        recipe.dialogues.system, recipe.evaluate.temperature,
    )  # fmt: skip
    write_json(rundir.exported, export(job))


def alone(
    name: str, adapter: Path | None, folder: Path, formats: tuple[str, ...], merge_onto: str, converter: Path | None
) -> None:  # fmt: skip
    """Export a base and an adapter of any trainer, without a run: the same files, and the same checks.

    Raises:
        GattError: as `export`; or the converter failed.
    """
    model = find_model(name)
    settings = Export.model_validate({"formats": formats, "merge_onto": merge_onto})
    chats: list[list[Message]] = [[{"role": "user", "content": d.turns[0]}] for d in load_dialogues("seed")]
    reference = _predicted(model, adapter, chats, merge_onto != "16bit")
    about = about_tuned(model) if adapter else {}
    job = Job(model, adapter, folder, model.name, settings, chats, reference, about, "", 0.7)
    table = _converted(job, converter) if converter else export(job)
    write_json(folder / "export.json", table)


def _predicted(model: Model, adapter: Path | None, chats: list[list[Message]], in_four_bits: bool) -> Reference | None:
    """What the model predicts in transformers, where it has room in memory for that."""
    folder = hugging_face_folder(model)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if 3 * size > available_memory():  # float32 of bfloat16, and what comes with it
        note("export: the model has no room here in float32; its predictions are not compared.")
        return None
    with chatter(Path(tempfile.gettempdir()) / "gatt-export.log"):
        tokenizer = load_tokenizer(folder)
        ids = [list(tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False)) for c in chats[:4]]
        return predict(folder, adapter, ids, in_four_bits)


def _converted(job: Job, converter: Path) -> dict[str, Any]:
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
            made = file if format_name in DIRECT else scratch / "full.gguf"
            kind = format_name.lower() if format_name in DIRECT else "f16"
            command = [sys.executable, str(converter), str(scratch / "merged"), "--outfile", str(made), "--outtype", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise GattError(f"{converter.name} failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
            if made != file:
                quantize(made, file, format_name)
            rows[format_name] = {"bytes": file.stat().st_size, "retained": {}, **_check(job, format_name, file, None)}
        for format_name in job.settings.formats:
            (scratch / job.file(format_name).name).replace(job.file(format_name))
    table = {"merge_onto": "16bit", "merges": {}, "formats": rows, "importance_tokens": 0}
    _show(job, table)
    return table


def write_merged(name: str, adapter: Path | None, target: Path) -> None:
    """The merged model as transformers loads it, in float32.

    Raises:
        GattError: as `write_checkpoint`.
    """
    folder = hugging_face_folder(find_model(name))
    files = shards(folder)
    require_disk(target.parent, 2 * sum(file.stat().st_size for file in files), "write the merged model in float32")
    with progress("export: merged files", len(files)) as bar:
        write_checkpoint(folder, adapter, target, bar.advance)
    out(str(target))


def about_tuned(model: Model, source: str = "") -> dict[str, Any]:
    """What a tuned file says of itself, by the fields of `gguf.Metadata`."""
    base = {"name": model.repository.split("/")[-1] or model.name}
    if model.repository:
        base |= {"organization": model.repository.split("/")[0], "repo_url": f"https://huggingface.co/{model.repository}"}
    # The name stays the base's own: llama.cpp treats some tokenizers by it.
    about: dict[str, Any] = {"finetune": "GAtt", "base_models": [base]}
    if source:
        about["datasets"] = [{"name": "dialogues that keep an instruction", "description": f"user turns: {source}"}]
    return about


def export(job: Job) -> dict[str, Any]:
    """Write the files; those that stand there are replaced only when all new ones have passed their checks.

    Returns:
        What the report shows: by format the bytes, the divergence from the trained model and from F16 (nats a token), and
        how much of the adapter's change is in it by kind of matrix; and the divergence of either way to merge.

    Raises:
        GattError: something does not fit, or a file is not what it should be.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.folder, prefix=".export-") as name:
        scratch = Path(name)
        adapter = scratch / "adapter.gguf"
        if job.adapter:
            write_adapter(open_base(job.model.path), job.adapter, adapter)
        importance = _importance(job, adapter, scratch)
        merged = _merge_best(job, scratch, importance)
        rows = {name: {"bytes": file.stat().st_size, "retained": kept, **_check(job, name, file, merged.exact)}
                for name, (file, kept) in merged.files.items()}  # fmt: skip
        for name, (file, _) in merged.files.items():
            file.replace(job.file(name))
        for file in (adapter, scratch / "imatrix.gguf"):
            if file.exists():
                file.replace(job.folder / file.name)
    for name in job.settings.formats:
        text = modelfile(open_gguf(job.file(name)), job.file(name).name, job.temperature, 4096, job.system)
        write_text(job.folder / ("Modelfile" if name == job.settings.formats[0] else f"Modelfile-{name}"), text)
    read = importance.tokens if importance else 0
    table = {"merge_onto": merged.onto, "merges": merged.far, "formats": rows, "importance_tokens": read}
    _show(job, table)
    return table


def _importance(job: Job, adapter: Path, scratch: Path) -> Importance | None:
    """The importance matrix of the tuned model, where a format needs one."""
    if all(name in DIRECT for name in job.settings.formats):
        return None
    most = job.settings.importance_tokens
    source = gguf_file(job.model, "Q8_0")
    info = open_gguf(source)
    template = ChatTemplate(info.chat_template, info.bos, info.eos)
    texts = (template.render(messages, answer_follows=False) for messages in job.dialogues)
    with progress("export: importance, tokens", most) as bar:
        importance = measure(source, Adapter(adapter) if job.adapter else None, texts, most, bar.advance)
    importance.save(scratch / "imatrix.gguf", "the run's dialogues")
    return importance


class _Merged(NamedTuple):
    """The files of a merge by format, each with what it holds of the adapter's change, before they are checked.

    `far`: how far either way to merge is from the trained model; `exact`: the logits of the chosen one in F16.
    """

    onto: str
    files: dict[str, tuple[Path, dict[str, float]]]
    far: dict[str, float]
    exact: Array | None


def _merge_best(job: Job, scratch: Path, importance: Importance | None) -> _Merged:
    """Merge onto what was asked for; or try both in F16, and write the wanted formats onto what is nearer."""
    names, asked = job.settings.formats, job.settings.merge_onto
    if asked != "measure" or not job.adapter or not job.reference:
        onto = "16bit" if asked == "measure" else asked
        return _Merged(onto, _merge(job, onto, scratch, importance, names), {}, None)
    trial = _merge(job, "16bit", scratch, importance, ("F16",))["F16"][0]
    plain = probe(trial, (), job.reference.sequences).logits
    trial.unlink()
    # In the same pass, since it mostly is the nearer one.
    made = _merge(job, "4bit", scratch, importance, tuple(dict.fromkeys(("F16", *names))))
    rounded = probe(made["F16"][0], (), job.reference.sequences).logits
    far = {"16bit": divergence(job.reference.logits, plain), "4bit": divergence(job.reference.logits, rounded)}
    if far["16bit"] < far["4bit"]:
        return _Merged("16bit", _merge(job, "16bit", scratch, importance, names), far, plain)
    return _Merged("4bit", {name: made[name] for name in names}, far, rounded)


def _merge(
    job: Job, onto: str, scratch: Path, importance: Importance | None, names: Sequence[str]
) -> dict[str, tuple[Path, dict[str, float]]]:
    """Write one merge in some formats."""
    whole = add(job.model.path, job.adapter, four_bits if onto == "4bit" else None, job.about if job.adapter else {})
    formats = {scratch / f"{onto}-{name}.gguf": format_of(whole, name, scratch, importance) for name in names}
    require_disk(job.folder, sum(size(whole, how) for how in formats.values()), "export")
    with progress(f"export: tensors, merged onto {onto}", len(whole.tensors)) as bar:
        kept = write(whole, formats, bar.advance)
    return dict(zip(names, zip(formats, kept, strict=True), strict=True))


def _check(job: Job, name: str, file: Path, exact: Array | None) -> dict[str, float]:
    """Read a file back, in llama.cpp too: the chat's tokens must be the tokenizer's, and its predictions the model's.

    Raises:
        GattError: they are not.
    """
    info = open_gguf(file)
    tokenizer = load_tokenizer(hugging_face_folder(job.model))
    template = ChatTemplate(info.chat_template, info.bos, info.eos)
    chats = [chat for chat in _chats() if _takes(template, chat)]
    texts = [template.render(chat) for chat in chats]
    sequences = job.reference.sequences if job.reference else []
    probed: Probed = probe(file, texts, sequences)
    for chat, text, ids in zip(chats, texts, probed.ids, strict=True):
        expected = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        if ids != expected:
            at = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), min(len(ids), len(expected)))
            raise GattError(
                f"{file.name} would read a chat in other tokens than the model was trained with (token {at} of {text!r}: "
                f"{ids[at : at + 3]} instead of {expected[at : at + 3]}). Nothing was replaced."
            )
    if not job.reference:
        return {}
    far = {"kl_trained": divergence(job.reference.logits, probed.logits)}
    if exact is not None:
        far["kl_f16"] = divergence(exact, probed.logits)
    if not far["kl_trained"] < (_FAR if name in DIRECT else float("inf")):
        raise GattError(
            f"{file.name} does not predict what the trained model does: {far['kl_trained']:.2f} nats a token apart, less than "
            f"{_FAR} expected. Nothing was replaced."
        )
    return far


def _chats() -> list[list[Message]]:
    single: list[list[Message]] = [[{"role": "user", "content": text}] for text in _TRICKY]
    long = list(augment(_TRICKY, [text.strip() for text in reversed(_TRICKY[1:])], [""] * len(_TRICKY), ""))
    return [*single, long, [{"role": "system", "content": "Be brief."}, *long]]


def _takes(template: ChatTemplate, chat: Sequence[Message]) -> bool:
    """Whether the template takes such a chat (some have no system message)."""
    try:
        template.render(chat)
    except GattError:
        return False
    return True


def _show(job: Job, table: dict[str, Any]) -> None:
    """What was written, in a line for each file, and what a user should know of it."""
    for onto, far in table["merges"].items():
        note(f"export: merged onto {onto}, {far:.4f} nats a token from the trained model")
    for name, row in table["formats"].items():
        parts = [f"{row['bytes'] / 1e6:.0f} MB"]
        parts += [f"{row[key]:.4f} nats a token from {what}" for key, what in _FROM.items() if key in row]
        out(f"{job.file(name)}: {', '.join(parts)}")
        lost = {kind: share for kind, share in row["retained"].items() if share < _KEPT}
        if lost:
            shown = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(lost.items()))
            note(f"export: {name} keeps less than {_KEPT:.0%} of what was learned in {shown}. A larger format keeps more.")


_FROM = {"kl_trained": "the trained model", "kl_f16": "F16"}
