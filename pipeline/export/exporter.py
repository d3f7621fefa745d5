"""An export from the adapter to checked files: merge, write every format, look at them through llama.cpp, give them their names.

`gatt export` (stages/export.py) says what is exported; the bytes are written by pipeline/gguf/merge.py.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import log, print_result, progress
from pipeline.errors import GattError
from pipeline.export.importance import measure_importance
from pipeline.export.modelfile import modelfile
from pipeline.export.tokenizer_check import find_mismatch, sample_chats
from pipeline.export.verify import load_and_predict
from pipeline.files import write_text
from pipeline.gguf.adapter import is_dora, write_adapter
from pipeline.gguf.base import Array
from pipeline.gguf.imatrix import ImportanceMatrix
from pipeline.gguf.merge import (
    UNIFORM_FORMATS,
    file_size,
    open_base,
    plan_merge,
    write,
    write_skeleton,
)
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_checkpoint, cached_gguf, plan_format
from pipeline.hub.models import Model
from pipeline.inference.chat_template import ChatTemplate
from pipeline.inference.logits import Logits, mean_kl, mean_nll
from pipeline.inference.model import Adapter
from pipeline.recipe import Export
from pipeline.records import Message
from pipeline.system import require_disk
from pipeline.training.unsloth import load_tokenizer, nf4_round_trip

MAX_KL = 2.0
"""Nats a token between the trained model and a file that is hardly rounded: something is wrong. Merged onto 16 bits, an adapter
trained in 4 bits is 0.3 to 0.4 away."""
MIN_RETAINED = 0.9
"""Share of the adapter's change below which a file is remarked on."""
_FROM = {"kl_trained": "the trained model", "kl_f16": "F16"}


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What is exported to where: `folder/STEM-FORMAT.gguf`.

    `dialogues` are read for an importance matrix; `reference` is what the trained model predicts, if that is known;
    `about` is what the files say of themselves, and `keys` replace keys of the base.
    """

    model: Model
    adapter: Path | None
    folder: Path
    stem: str
    settings: Export
    dialogues: Sequence[Sequence[Message]]
    reference: Logits | None
    about: dict[str, Any]
    system: str
    temperature: float
    keys: dict[str, Any] = field(default_factory=dict)

    def file(self, format_name: str) -> Path:
        """Where a format goes."""
        return self.folder / f"{self.stem}-{format_name}.gguf"


def export(job: ExportJob) -> dict[str, Any]:
    """Write the files; those that stand there are replaced only when all new ones have passed their checks.

    Returns:
        What the report shows: by format the bytes, the divergence from the trained model and from F16 (nats a token), and
        how much of the adapter's change is in it by kind of matrix; and of either way to merge the divergence, and how unlikely
        it finds the run's dialogues.

    Raises:
        GattError: something does not fit, or a file is not what it should be.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.folder, prefix=".export-") as name:
        scratch = Path(name)
        adapter = scratch / "adapter.gguf"
        if job.adapter and not is_dora(job.adapter):
            write_adapter(open_base(job.model.path), job.adapter, adapter)
        importance = _importance(job, adapter, scratch)
        keys = _fitting_keys(job, scratch) if job.settings.verify_tokenizer else {}
        merged = _merge_best(replace(job, keys=keys), scratch, importance)
        rows = {
            name: {
                "bytes": file.stat().st_size,
                "retained": kept,
                **verify_file(job, name, file, merged.exact),
            }
            for name, (file, kept) in merged.files.items()
        }
        for name, (file, _) in merged.files.items():
            file.replace(job.file(name))
        for file in (adapter, scratch / "imatrix.gguf"):
            if file.exists():
                file.replace(job.folder / file.name)
    for name in job.settings.formats:
        text = modelfile(
            open_gguf(job.file(name)), job.file(name).name, job.temperature, 4096, job.system
        )
        write_text(
            job.folder / ("Modelfile" if name == job.settings.formats[0] else f"Modelfile-{name}"),
            text,
        )
        _for_lm_studio(job.file(name))
    read = importance.tokens if importance else 0
    table = {
        "merge_base": merged.onto,
        "merges": merged.far,
        "nll": merged.mean_nll,
        "formats": rows,
        "imatrix_tokens": read,
    }
    log_summary(job, table)
    return table


def _for_lm_studio(file: Path) -> None:
    """LM Studio reads publisher/model/file below its folder of models: a second name of the same bytes."""
    target = file.parent / "lmstudio" / "gatt" / file.stem / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        log(
            f"export: this file system gives a file one name only; `lms import {file.name}` brings it into LM Studio."
        )


def _importance(job: ExportJob, adapter: Path, scratch: Path) -> ImportanceMatrix | None:
    """The importance matrix of the tuned model, where a format needs one."""
    if all(name in UNIFORM_FORMATS for name in job.settings.formats):
        return None
    most = job.settings.imatrix_tokens
    laid = Adapter(adapter) if adapter.exists() else None
    merged = job.adapter and not laid
    source = (
        _merge(job, "fp16", scratch, None, ("Q8_0",))["Q8_0"][0]
        if merged
        else cached_gguf(job.model, "Q8_0")
    )
    info = open_gguf(source)
    template = ChatTemplate(info.chat_template, info.bos, info.eos)
    texts = (template.render(messages, answer_follows=False) for messages in job.dialogues)
    with progress("export: importance, tokens", most) as bar:
        importance = measure_importance(source, laid, texts, most, bar.advance)
    importance.save(scratch / "imatrix.gguf", "the run's dialogues")
    return importance


class _Merged(NamedTuple):
    """The files of a merge by format, each with what it holds of the adapter's change, before they are checked.

    `far`: how far either way to merge is from the trained model; `mean_nll`: how unlikely the run's dialogues are under it;
    `exact`: the logits of the chosen one in F16.
    """

    onto: str
    files: dict[str, tuple[Path, dict[str, float]]]
    far: dict[str, float]
    mean_nll: dict[str, float]
    exact: Array | None


def _merge_best(job: ExportJob, scratch: Path, importance: ImportanceMatrix | None) -> _Merged:
    """Merge onto what was asked for; or try both in F16, and write the wanted formats onto what makes the dialogues likelier.

    Not onto what is nearer to the trained model: that is the 4-bit merge, and with it come the errors of the rounding.
    """
    names, asked = job.settings.formats, job.settings.merge_base
    if asked != "auto" or not job.adapter or not job.reference:
        onto = "fp16" if asked == "auto" else asked
        return _Merged(onto, _merge(job, onto, scratch, importance, names), {}, {}, None)
    sequences = job.reference.sequences
    trial = _merge(job, "nf4", scratch, importance, ("F16",))["F16"][0]
    rounded = load_and_predict(trial, (), sequences).logits
    trial.unlink()
    # In the same pass, since it mostly is the likelier one.
    made = _merge(job, "fp16", scratch, importance, tuple(dict.fromkeys(("F16", *names))))
    plain = load_and_predict(made["F16"][0], (), sequences).logits
    far = {
        "fp16": mean_kl(job.reference.logits, plain),
        "nf4": mean_kl(job.reference.logits, rounded),
    }
    unlikely = {"fp16": mean_nll(sequences, plain), "nf4": mean_nll(sequences, rounded)}
    if unlikely["nf4"] < unlikely["fp16"]:
        return _Merged(
            "nf4", _merge(job, "nf4", scratch, importance, names), far, unlikely, rounded
        )
    return _Merged("fp16", {name: made[name] for name in names}, far, unlikely, plain)


def _merge(
    job: ExportJob,
    onto: str,
    scratch: Path,
    importance: ImportanceMatrix | None,
    names: Sequence[str],
) -> dict[str, tuple[Path, dict[str, float]]]:
    """Write one merge in some formats."""
    whole = plan_merge(
        job.model.path, job.adapter, nf4_round_trip if onto == "nf4" else None, job.about, job.keys
    )
    formats = {
        scratch / f"{onto}-{name}.gguf": plan_format(whole, name, scratch, importance)
        for name in names
    }
    require_disk(job.folder, sum(file_size(whole, how) for how in formats.values()), "export")
    with progress(f"export: tensors, merged onto {onto}", len(whole.tensors)) as bar:
        kept = write(whole, formats, bar.advance)
    return dict(zip(names, zip(formats, kept, strict=True), strict=True))


def _fitting_keys(job: ExportJob, scratch: Path) -> dict[str, Any]:
    """Keys with which llama.cpp reads chats in the tokens of training: none, or another rule for the space before a text.

    llama.cpp's converter takes that rule from a tokenizer's settings, which mean different things to different versions of it.

    Raises:
        GattError: the tokens differ either way.
    """
    tokenizer = load_tokenizer(cached_checkpoint(job.model))
    file = scratch / "vocabulary.gguf"
    rule = "tokenizer.ggml.add_space_prefix"
    keys: dict[str, Any] = {}
    for _ in range(2):
        write_skeleton(plan_merge(job.model.path, None, keys=keys), file)
        chats = sample_chats(file)
        found = find_mismatch(chats, load_and_predict(file, chats.texts, ()).ids, tokenizer)
        if not found:
            if keys:
                log(
                    f"export: written with {rule} = {str(keys[rule]).lower()}, as the tokenizer does it."
                )
            return keys
        info = open_gguf(file)
        if info.field("tokenizer.ggml.model") != "llama":
            break
        keys = {rule: not info.field(rule, True)}
    raise GattError(
        f"llama.cpp would read a chat in other tokens than the model is trained with ({found}). Nothing was written. Set "
        "export.verify_tokenizer = false (or --other-tokens) to export it nevertheless."
    )


def verify_file(job: ExportJob, name: str, file: Path, exact: Array | None) -> dict[str, float]:
    """Read a file back, in llama.cpp too: its tokens must be the tokenizer's, and its predictions the trained model's.

    Raises:
        GattError: they are not, or llama.cpp cannot use the file.
    """
    chats = sample_chats(file)
    probed = load_and_predict(
        file, chats.texts, job.reference.sequences if job.reference else [[0, 0]]
    )
    found = find_mismatch(chats, probed.ids, load_tokenizer(cached_checkpoint(job.model)))
    if found and job.settings.verify_tokenizer:
        raise GattError(
            f"{job.file(name).name} would be read in other tokens ({found}). Nothing was replaced."
        )
    if not job.reference:
        return {}
    far = {"kl_trained": mean_kl(job.reference.logits, probed.logits)}
    if exact is not None:
        far["kl_f16"] = mean_kl(exact, probed.logits)
    if not far["kl_trained"] < (MAX_KL if name in UNIFORM_FORMATS else math.inf):
        raise GattError(
            f"{job.file(name).name} does not predict what the trained model does: {far['kl_trained']:.2f} nats a token apart, "
            f"less than {MAX_KL} expected. Nothing was replaced."
        )
    return far


def log_summary(job: ExportJob, table: dict[str, Any]) -> None:
    """What was written, in a line for each file, and what a user should know of it."""
    for onto, far in table["merges"].items():
        unlikely = f"{table['nll'][onto]:.4f} nats a token for the run's dialogues"
        log(
            f"export: merged onto {onto}, {far:.4f} nats a token from the trained model, {unlikely}"
        )
    for name, row in table["formats"].items():
        parts = [f"{row['bytes'] / 1e6:.0f} MB"]
        parts += [
            f"{row[key]:.4f} nats a token from {what}" for key, what in _FROM.items() if key in row
        ]
        print_result(f"{job.file(name)}: {', '.join(parts)}")
        lost = {kind: share for kind, share in row["retained"].items() if share < MIN_RETAINED}
        if lost:
            shown = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(lost.items()))
            log(
                f"export: {name} keeps less than {MIN_RETAINED:.0%} of what was learned in {shown}. A larger format keeps more."
            )
