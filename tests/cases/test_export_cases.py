"""Exports as users ask for them: the right file, or one line before any work; no model is run."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.family_tokenizers import save_sentencepiece

from pipeline.errors import GattError
from pipeline.export import exporter
from pipeline.export.adapter_folder import for_text_model
from pipeline.export.exporter import export, predict_reference
from pipeline.export.job import ExportJob, model_metadata
from pipeline.export.summary import FormatSummary
from pipeline.export.writer import ExportWriter, WrittenFile, WrittenFiles
from pipeline.files import write_json, write_text
from pipeline.gguf.adapter import apply_adapter, write_adapter
from pipeline.gguf.base import Base, JsonObject, Tensor
from pipeline.gguf.huggingface.model_card import checkpoint_name, read_metadata
from pipeline.gguf.lora.weights import read_adapter
from pipeline.gguf.reader import read_gguf
from pipeline.gguf.vocabulary import Vocabulary
from pipeline.hub.models import Model, find_model
from pipeline.recipe import Export, Recipe
from pipeline.report.cards import dataset_card
from pipeline.run_dir import RunDir
from pipeline.stages import instructions
from pipeline.stages.export import export_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4


def _save_lora(folder: Path, module: str, rank: int, **settings: object) -> Path:
    """Save a LoRA of one linear layer, as PEFT does."""
    a, b = np.ones((rank, 8), np.float32), np.ones((6, rank), np.float32)
    key = f"base_model.model.{module}.lora"
    folder.mkdir()
    save_file({f"{key}_A.weight": a, f"{key}_B.weight": b}, folder / "adapter_model.safetensors")
    plain: JsonObject = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    write_json(folder / "adapter_config.json", {**plain, **settings})
    return folder


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_match_the_names_of_a_multimodal_model(rslora: bool, tmp_path: Path) -> None:
    """Its text part alone is loaded by PEFT, whose modules have other names."""
    pattern = "language_model.layers.0.mlp.up_proj"
    settings = {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 64}, "use_rslora": rslora}
    adapter = _save_lora(tmp_path / "adapter", f"model.{pattern}", 2, **settings)
    scale = 64 / 2 ** (0.5 if rslora else 1)
    text = for_text_model(adapter, tmp_path)
    for folder in (adapter, text):
        delta = read_adapter(folder).deltas["model.layers.0.mlp.up_proj"]
        assert delta.rank == 2
        assert delta.scale == pytest.approx(scale)
    assert text != adapter


def test_a_lora_of_single_experts_is_refused_as_such(tmp_path: Path) -> None:
    adapter = _save_lora(tmp_path / "adapter", "model.layers.0.mlp.experts.0.gate_proj", 4)
    base = cast(Base, SimpleNamespace(architecture="qwen3moe", layers=1, name="Qwen3-30B-A3B"))
    with pytest.raises(GattError, match=r"one of the experts of Qwen3-30B-A3B.* --model FOLDER"):
        apply_adapter(read_adapter(adapter), base, [])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_tokens_that_only_the_tokenizer_json_adds_keep_text_and_type(
    architecture: str, tmp_path: Path
) -> None:
    """transformers 5 writes no `added_tokens_decoder`."""
    size = save_sentencepiece(tmp_path, "LlamaTokenizer")
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    decoder = settings.pop("added_tokens_decoder")
    write_json(file, settings)
    added = [{"id": int(id), **token} for id, token in decoder.items()]
    write_json(tmp_path / "tokenizer.json", {"added_tokens": added})
    writer = gguf.GGUFWriter(None, architecture)
    Vocabulary(tmp_path, {"vocab_size": size}, architecture).write(writer)
    texts, kinds = (
        writer.kv_data[0][f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type")
    )
    assert texts[size - 4 : size - 2] == [b"<start_of_turn>", b"  x"]
    assert kinds[size - 4 : size - 2] == [_CONTROL, _USER_DEFINED]


def test_a_snapshot_of_the_hub_has_the_name_of_its_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint_name(Path("hub/models--me--Tiny-1B/snapshots/0a1b")) == "Tiny-1B"
    assert checkpoint_name(Path("my/snapshots/0a1b")) == "0a1b"
    folder = tmp_path / "models--me--Tiny-1B-Instruct" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    about = read_metadata(folder, 10**9)
    assert (about.name, about.basename, about.size_label) == ("Tiny-1B-Instruct", "Tiny", "1B")
    monkeypatch.chdir(tmp_path)
    assert checkpoint_name(Path()) == tmp_path.name


def test_the_file_of_an_adapter_names_the_base_and_no_folder_of_this_machine(
    tmp_path: Path,
) -> None:
    """PEFT's model card names the folder from which it has loaded the base."""
    adapter = _save_lora(tmp_path / "adapter", "model.layers.0.mlp.up_proj", 4)
    tags = f"tags:\n- base_model:adapter:{tmp_path}/base\n- lora\n"
    write_text(adapter / "README.md", f"---\nbase_model: {tmp_path}/base\n{tags}---\n")
    up = Tensor("blk.0.ffn_up.weight", (6, 8), lambda first, last: np.zeros((6, 8), np.float32))
    sizes = {"layers": 1, "heads": 1, "key_heads": 1, "linear_heads": None, "interleaved": False}
    base = SimpleNamespace(architecture="llama", name="base", tensors=lambda: [up], **sizes)
    about = model_metadata(Model("me/Tiny-1B", tmp_path, "me/Tiny-1B"))
    write_adapter(cast(Base, base), adapter, tmp_path / "adapter.gguf", about)
    info = read_gguf(tmp_path / "adapter.gguf")
    assert info.field("general.base_model.0.name") == "Tiny-1B"
    assert info.field("general.base_model.0.repo_url") == "https://huggingface.co/me/Tiny-1B"
    assert info.field("general.tags") == ["lora"]
    assert str(tmp_path).encode() not in (tmp_path / "adapter.gguf").read_bytes()


@pytest.mark.parametrize("card", [b"---\nname: [\n---\n", b"---\nname: \xff\n---\n"])
def test_a_model_card_that_cannot_be_read_is_left_out(
    card: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine-1B"
    folder.mkdir()
    (folder / "README.md").write_bytes(card)
    assert read_metadata(folder, 10**9).name == "Mine 1B"
    assert "README.md is left out" in capsys.readouterr().err


def test_a_dataset_card_does_not_name_a_folder_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    write_text(file, "")
    recipe = Recipe.model_validate({"dialogues": {"source": str(file)}})
    card = dataset_card(recipe, "me", {}, "dialogues.jsonl")
    assert "User turns: chats.jsonl." in card
    assert str(tmp_path) not in card


def _failing_download(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


def test_a_failed_download_tells_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    _failing_download(monkeypatch, OSError("Connection reset\nby peer"))
    with pytest.raises(GattError, match=r"\(OSError: Connection reset\)\. Without a network"):
        find_model("me/offline")
    response = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))
    _failing_download(monkeypatch, GatedRepoError("Access is restricted.", response=response))
    with pytest.raises(
        GattError, match=r"restricted\)\. Accept .*/me/gated, and .*`hf auth login`"
    ):
        find_model("me/gated")


def test_a_full_disk_is_not_taken_for_a_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device (28)")):
        _failing_download(monkeypatch, error)
        with pytest.raises(type(error)) as raised:
            find_model("me/large")
        assert raised.value is error


def test_a_format_that_is_named_twice_is_written_once() -> None:
    assert Export(formats=("Q8_0", "F16", "Q8_0")).formats == ("Q8_0", "F16")


def test_an_unknown_format_is_refused_before_any_work(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"model": "./none", "export": {"formats": ["F16", "q4_k_m"]}})
    with pytest.raises(GattError, match="Unknown format 'q4_k_m'"):
        instructions.run(recipe, RunDir(tmp_path))
    with pytest.raises(GattError, match="Unknown format 'q4_k_m'"):
        export_standalone("./none", None, tmp_path, recipe.export)


def test_a_reference_in_4_bits_takes_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    write_json(tmp_path / "config.json", {})
    monkeypatch.setattr(exporter, "available_memory", lambda: 200)
    monkeypatch.setattr(exporter, "template_of", lambda tokenizer: None)
    monkeypatch.setattr(
        exporter,
        "choose_backend",
        lambda: SimpleNamespace(predict=lambda *_, load_in_4bit: "logits"),
    )
    model, tokenizer = Model("mine", tmp_path), cast("PreTrainedTokenizerBase", None)

    def predict(*, load_in_4bit: bool) -> object:
        return predict_reference(model, None, tokenizer, [], load_in_4bit=load_in_4bit)

    assert predict(load_in_4bit=True) == "logits"
    assert predict(load_in_4bit=False) is None
    assert "too little memory for the model in float32" in capsys.readouterr().err


def _job(folder: Path, adapter: Path | None) -> ExportJob:
    return ExportJob(
        model=Model("mine", folder),
        adapter=adapter,
        folder=folder,
        stem="mine",
        settings=Export(formats=("F16",), merge_base="auto"),
        dialogues=[],
        reference=None,
    )


def test_an_automatic_merge_that_cannot_be_measured_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ExportWriter, "_merge", lambda *_: {})
    assert ExportWriter(_job(tmp_path, tmp_path), tmp_path)._merge_best().merge_base == "fp16"
    assert "nf4 is not tried without the predictions" in capsys.readouterr().err
    ExportWriter(_job(tmp_path, None), tmp_path)._merge_best()
    assert not capsys.readouterr().err


def test_nothing_of_an_earlier_export_stays_beside_the_new_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the adapter of another LoRA, nor the scratch folder of a killed process.

    A user's own files stay.
    """
    (tmp_path / ".export-abcd").mkdir()
    for name in (".export-abcd/half.gguf", "adapter.gguf", "imatrix.gguf"):
        write_text(tmp_path / name, "earlier")

    class Writer:
        def __init__(self, job: ExportJob, scratch: Path) -> None:
            self._scratch = scratch

        def write(self) -> WrittenFiles:
            for name in ("mine-F16.gguf", "imatrix.gguf"):
                write_text(self._scratch / name, "new")
            return WrittenFiles(
                merge_base="fp16",
                by_format={"F16": WrittenFile(self._scratch / "mine-F16.gguf", {})},
                companions=(self._scratch / "imatrix.gguf",),
            )

    summary = FormatSummary(bytes=3)
    monkeypatch.setattr(exporter, "ExportWriter", Writer)
    monkeypatch.setattr(exporter, "_verify", lambda *_: summary)
    monkeypatch.setattr(exporter, "write_modelfiles", lambda *_: None)
    export(_job(tmp_path, None))
    assert (tmp_path / "adapter.gguf").is_file()
    write_text(tmp_path / "export.json", "{}")
    export(_job(tmp_path, None))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine-F16.gguf", "imatrix.gguf", "lmstudio", "export.json"}
    assert (tmp_path / "imatrix.gguf").read_text() == "new"
    assert (tmp_path / "lmstudio" / "gatt" / "mine-F16" / "mine-F16.gguf").is_file()
