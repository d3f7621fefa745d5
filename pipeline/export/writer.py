"""Write the files of an export to a scratch folder: importance matrix, choice of the merge, all
formats.

They are not checked yet, and the existing files of the export are not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from pipeline.console import log, progress
from pipeline.errors import GattError
from pipeline.export.importance import measure_importance
from pipeline.export.job import ExportJob
from pipeline.export.merged import write_merged
from pipeline.export.summary import MergeBase, MergeTrial
from pipeline.export.tokens import added_token_keys, read_as_trained, set_bool
from pipeline.export.verify import load_and_predict
from pipeline.gguf.adapter import missing_from_gguf, write_adapter
from pipeline.gguf.base import Array
from pipeline.gguf.formats import UNIFORM_FORMATS, KeyValue, quantize
from pipeline.gguf.huggingface.model_card import checkpoint_name
from pipeline.gguf.imatrix import ImportanceMatrix
from pipeline.gguf.merge import file_size, open_base, plan_merge, write, write_skeleton
from pipeline.gguf.reader import open_gguf
from pipeline.hub.adapted import write_adapter_gguf
from pipeline.hub.convert import cached_checkpoint, cached_gguf, plan_format
from pipeline.hub.llama_converter import convert, converter_for
from pipeline.inference.chat_template import ChatTemplate, template_of
from pipeline.inference.llama.model import Adapter
from pipeline.inference.logits import Logits, mean_kl, mean_nll
from pipeline.system import require_disk
from pipeline.training.unsloth import load_tokenizer, nf4_round_trip

COMPANIONS = ("adapter.gguf", "imatrix.gguf")
"""Names of the files without a format that an export may have."""


class WrittenFile(NamedTuple):
    """One file, and how much of the adapter's change it holds by kind of matrix."""

    path: Path
    retained: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFiles:
    """The model's files by format, and `companions` without a format: adapter and importance
    matrix.

    `trials` are the measured ways to merge, `f16_logits` the logits of the chosen one in F16.
    """

    merge_base: MergeBase
    by_format: dict[str, WrittenFile]
    companions: tuple[Path, ...] = ()
    trials: dict[MergeBase, MergeTrial] = field(default_factory=dict)
    f16_logits: Array | None = None
    imatrix_tokens: int = 0


def write_by_converter(job: ExportJob, converter: Path, scratch: Path) -> WrittenFiles:
    """Write the files with llama.cpp's converter, from a merged checkpoint.

    Formats that it does not know are quantized by llama.cpp from F16.

    Raises:
        GattError: the adapter does not fit, or the converter failed.
    """
    imatrix = scratch / "imatrix.gguf"
    # The converter names the file by the folder.
    checkpoint = scratch / "merged" / checkpoint_name(job.model.path)
    checkpoint.mkdir(parents=True)
    write_merged(job.model, job.adapter, checkpoint)
    names = job.settings.formats
    quantized = [name for name in names if name not in UNIFORM_FORMATS]
    paths = {name: scratch / job.file(name).name for name in names}
    source = paths.get("F16", scratch / "full.gguf")
    targets = {"F16": source, **paths} if quantized else paths
    for name, target in targets.items():
        if name in UNIFORM_FORMATS:
            convert(converter, checkpoint, target, name, job.metadata)
            _add_no_tokens(target)
    importance = None
    if quantized:
        importance = _measure_importance(job, source, None, _template_of(source))
        importance.save(imatrix, job.dataset)
        for name in quantized:
            quantize(source, paths[name], name, importance)
    adapter = scratch / "adapter.gguf"
    if job.adapter and converter_for(job.model.path):
        try:
            write_adapter_gguf(job.model.path, job.adapter, adapter)
        except GattError as error:
            adapter.unlink(missing_ok=True)
            log(f"export: no adapter.gguf. {error}")
    return WrittenFiles(
        merge_base="fp16",
        by_format={name: WrittenFile(path, {}) for name, path in paths.items()},
        companions=tuple(file for file in (adapter, imatrix) if file.exists()),
        imatrix_tokens=importance.tokens if importance else 0,
    )


def _add_no_tokens(file: Path) -> None:
    """Let no program add BOS or EOS to the chats of a converted file, as training had none."""
    for key in added_token_keys(file):
        if set_bool(file, key, value=False):
            log(
                f"export: written with {key} = false. The base's tokenizer adds it, its chat "
                "template does not write it, and training had none; other programs add none now."
            )
        else:
            log(
                f"export: the converter wrote no {key}, which llama.cpp takes for true, and "
                "training had none: other programs feed one token more."
            )


def _template_of(file: Path) -> ChatTemplate:
    info = open_gguf(file)
    return ChatTemplate(info.chat_template, info.bos, info.eos, info.path.name)


def _measure_importance(
    job: ExportJob, source: Path, adapter: Path | None, template: ChatTemplate
) -> ImportanceMatrix:
    """Measure the importance matrix of a GGUF with an adapter, on the job's dialogues."""
    max_tokens = job.settings.imatrix_tokens
    texts = (template.render(messages, add_generation_prompt=False) for messages in job.dialogues)
    applied = Adapter(adapter) if adapter else None
    with progress("export: importance, tokens", max_tokens) as bar:
        return measure_importance(source, applied, texts, max_tokens, bar.advance)


class ExportWriter:
    """Writes the files of one export by the merge of `pipeline.gguf`."""

    def __init__(self, job: ExportJob, scratch: Path) -> None:
        self._job, self._scratch = job, scratch
        self._importance: ImportanceMatrix | None = None
        self._keys: dict[str, KeyValue] = {}

    def write(self) -> WrittenFiles:
        """Write all files.

        Raises:
            GattError: base, adapter and settings do not fit together.
        """
        job = self._job
        adapter, imatrix = self._scratch / "adapter.gguf", self._scratch / "imatrix.gguf"
        if job.adapter and (reason := missing_from_gguf(job.adapter)):
            log(f"export: no adapter.gguf. The adapter {reason}.")
        elif job.adapter:
            write_adapter(open_base(job.model.path), job.adapter, adapter, job.metadata)
        if any(name not in UNIFORM_FORMATS for name in job.settings.formats):
            self._importance = self._measure_importance(adapter)
            self._importance.save(imatrix, job.dataset)
        vocabulary = self._scratch / "vocabulary.gguf"
        if job.settings.verify_tokenizer:
            tokenizer = load_tokenizer(cached_checkpoint(job.model))
            self._keys = read_as_trained(job.model, tokenizer, vocabulary).keys
        for key, value in self._keys.items():
            log(f"export: written with {key} = {str(value).lower()}, the tokenizer's own rule.")
        write_skeleton(plan_merge(job.model.path, keys=self._keys), vocabulary)
        for key in added_token_keys(vocabulary):
            log(
                f"export: written with {key} = false. The base's tokenizer adds it, its chat "
                "template does not write it, and training had none; other programs add none now."
            )
            self._keys[key] = False
        written = self._merge_best()
        return replace(
            written,
            companions=tuple(file for file in (adapter, imatrix) if file.exists()),
            imatrix_tokens=self._importance.tokens if self._importance else 0,
        )

    def _measure_importance(self, adapter: Path) -> ImportanceMatrix:
        """Measure the importance matrix of the tuned model."""
        job = self._job
        if job.adapter and not adapter.exists():  # llama.cpp cannot apply it
            source = self._merge("fp16", ("Q8_0",))["Q8_0"].path
        else:
            source = cached_gguf(job.plain_base, "Q8_0")
        template = _template_of(source)
        if job.model != job.plain_base:
            template = template_of(load_tokenizer(job.model.path))
        return _measure_importance(job, source, adapter if adapter.exists() else None, template)

    def _merge_best(self) -> WrittenFiles:
        """Merge as the settings say, or in the way that makes the job's dialogues more likely.

        Not in the way that is closer to the trained model: that is the merge into 4-bit weights,
        which also inherits their quantization error.
        """
        formats, reference = self._job.settings.formats, self._job.reference
        if self._job.settings.merge_base != "auto" or not self._job.adapter or not reference:
            base = self._job.settings.merge_base
            chosen: MergeBase = "fp16" if base == "auto" else base
            if base == "auto" and self._job.adapter:
                log(
                    "export: merged into fp16; nf4 is not tried without the predictions of the "
                    "trained model."
                )
            return WrittenFiles(merge_base=chosen, by_format=self._merge(chosen, formats))
        trial = self._merge("nf4", ("F16",))["F16"].path
        nf4 = load_and_predict(trial, (), reference.sequences).logits
        trial.unlink()
        # The formats are written in the same pass, because this merge is chosen nearly always.
        files = self._merge("fp16", tuple(dict.fromkeys(("F16", *formats))))
        fp16 = load_and_predict(files["F16"].path, (), reference.sequences).logits
        trials: dict[MergeBase, MergeTrial] = {
            "fp16": _compare(reference, fp16),
            "nf4": _compare(reference, nf4),
        }
        if trials["nf4"].nll < trials["fp16"].nll:
            files = self._merge("nf4", formats)
            return WrittenFiles(
                merge_base="nf4", by_format=files, trials=trials, f16_logits=nf4.values
            )
        return WrittenFiles(
            merge_base="fp16",
            by_format={name: files[name] for name in formats},
            trials=trials,
            f16_logits=fp16.values,
        )

    def _merge(self, merge_base: MergeBase, names: Sequence[str]) -> dict[str, WrittenFile]:
        """Write one merge in some formats."""
        job, folder = self._job, self._scratch / merge_base
        plan = plan_merge(
            job.model.path,
            job.adapter,
            nf4_round_trip=nf4_round_trip if merge_base == "nf4" else None,
            metadata=job.metadata,
            keys=self._keys,
        )
        formats = {
            folder / job.file(name).name: plan_format(
                plan, name, self._scratch, self._importance, job.dataset
            )
            for name in names
        }
        sizes = [file_size(plan, file_format) for file_format in formats.values()]
        require_disk(job.folder, sum(sizes), "export")
        with progress(f"export: tensors, merged into {merge_base}", len(plan.tensors)) as bar:
            retained = write(plan, formats, bar.advance)
        files = map(WrittenFile, formats, retained)
        return dict(zip(names, files, strict=True))


def _compare(reference: Logits, logits: Logits) -> MergeTrial:
    return MergeTrial(mean_kl(reference.values, logits.values), mean_nll(logits))
