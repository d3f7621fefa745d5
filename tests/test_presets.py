"""A base model by its name: a preset, a file, a folder, or an id of the Hub.

What the Hub has of every preset is recorded in `data/hub_configs.json`, from other projects that
have it; `source` names them. Presets that take a copy have what the original has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.families import FAMILIES, SIZES
from support.model_hub import ModelHub
from support.servers import in_thread

from pipeline.errors import GattError
from pipeline.files import write_json, write_text
from pipeline.gguf.huggingface.config import text_part
from pipeline.hub import models
from pipeline.hub.llama_converter import converter_for
from pipeline.hub.models import find_model, shape_of
from pipeline.hub.presets import presets


class _Recorded(NamedTuple):
    """A repository on the Hub: its `config.json`, without keys that change nothing here.

    `embedding` is what its `model.safetensors.index.json` calls the embedding.
    """

    source: str
    config: dict[str, Any]
    embedding: str = "model.embed_tokens.weight"

    def save(self, folder: Path) -> None:
        """Write the repository's small files, as far as they are recorded."""
        write_json(folder / "config.json", self.config)
        index = {"weight_map": {self.embedding: "model-00001-of-00002.safetensors"}}
        write_json(folder / "model.safetensors.index.json", index)


_FILE = Path(__file__).parent / "data" / "hub_configs.json"
_RECORDED = {
    name: _Recorded(**values) for name, values in json.loads(_FILE.read_text("utf-8")).items()
}


def test_a_model_is_known_by_its_file_its_folder_or_its_preset(base: Path, tmp_path: Path) -> None:
    assert find_model(str(base)).name == base.stem
    write_json(tmp_path / "config.json", {})
    write_text(tmp_path / "model.safetensors", "weights")
    folder = find_model(str(tmp_path))
    assert (folder.name, folder.path, folder.is_gguf) == (tmp_path.name, tmp_path, False)
    assert folder.bytes == len("weights")
    preset = find_model("smollm2-135m")
    assert (preset.path, preset.is_gguf) == (base, True)
    assert preset.repository == presets()["smollm2-135m"].repository
    assert preset.bytes == base.stat().st_size


def test_an_unknown_model_is_refused_with_the_nearest_preset() -> None:
    with pytest.raises(GattError, match=r"Unknown model 'qwen3-8'\. Did you mean 'qwen3-8b'\?"):
        find_model("qwen3-8")
    with pytest.raises(GattError, match=r"Unknown model '\./a/b'\. Expected a preset \(gemma"):
        find_model("./a/b")


@pytest.fixture
def each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call of `find_model` ask the Hub, which it does once per process."""
    monkeypatch.setattr(models, "_download", models._download.__wrapped__)


@pytest.fixture
def downloads(each_time: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collect the patterns of what is downloaded; every repository is the folder `tmp_path`."""
    patterns: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        patterns.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return patterns


@pytest.mark.parametrize("weights", [False, True])
def test_weights_are_downloaded_last_and_only_if_wanted(
    weights: bool, downloads: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "CheckpointBase", lambda folder: folder)
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    model = find_model("me/mine", weights=weights)
    assert (model.repository, model.path) == ("me/mine", tmp_path)
    assert all("*.json" in patterns for patterns in downloads)
    assert ["model*.safetensors" in patterns for patterns in downloads] == (
        [False, True] if weights else [False]
    )


def test_weights_of_an_unknown_architecture_are_not_downloaded(
    downloads: list[list[str]], tmp_path: Path
) -> None:
    write_json(tmp_path / "config.json", {"architectures": ["PerceptronForCausalLM"]})
    with pytest.raises(GattError, match="PerceptronForCausalLM"):
        find_model("me/unknown")
    assert len(downloads) == 1


@pytest.mark.parametrize("convertible", [False, True])
def test_the_converter_tries_a_family_that_only_it_knows_before_weights_are_downloaded(
    convertible: bool,
    downloads: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[Path] = []

    def check(converter: Path, folder: Path) -> None:
        assert converter == tmp_path / "convert.py"
        checked.append(folder)
        if not convertible:
            raise GattError("convert.py failed: another tokenizer")

    monkeypatch.setattr(models, "converter_for", lambda folder: tmp_path / "convert.py")
    monkeypatch.setattr(models, "check_convertible", check)
    if convertible:
        find_model("me/convertible")
    else:
        with pytest.raises(GattError, match="another tokenizer"):
            find_model("me/not-convertible")
    assert checked == [tmp_path]
    assert len(downloads) == (2 if convertible else 1)
    write_text(tmp_path / "model.safetensors", "weights")
    find_model("me/again")  # what is here was checked before it was downloaded
    assert checked == [tmp_path]


def test_every_preset_is_recorded() -> None:
    assert _RECORDED.keys() == presets().keys()
    assert all(recorded.source for recorded in _RECORDED.values())


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_what_its_repository_has(
    name: str, downloads: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are downloaded for its sizes, its context, and whether it can be exported."""
    recorded, preset = _RECORDED[name], presets()[name]
    recorded.save(tmp_path)
    monkeypatch.setattr("pipeline.gguf.checkpoint.Vocabulary", lambda *_: None)  # is not recorded
    model = find_model(preset.repository if preset.package else name, weights=False)
    assert (model.path, model.repository) == (tmp_path, preset.repository)
    assert [any("*.safetensors" in p for p in patterns) for patterns in downloads] == [False]
    assert converter_for(tmp_path) is None
    assert shape_of(str(tmp_path)) == shape_of(name) == preset.shape
    assert preset.context == text_part(recorded.config)["max_position_embeddings"]


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_the_parameters_of_transformers_model(name: str) -> None:
    """Its shape leaves out norms, and small projections: 1.1% of Gemma 4 E4B."""
    config = text_part(_RECORDED[name].config)
    assert presets()[name].shape.parameters == pytest.approx(_parameters(config), rel=0.012)


_WIDE = {
    **{"hidden_size": 2048, "intermediate_size": 512, "vocab_size": 64},
    **{"head_dim": 512, "global_head_dim": 1024, "hidden_size_per_layer_input": 8},
    **{"linear_key_head_dim": 512, "linear_value_head_dim": 512, "vocab_size_per_layer_input": 64},
}
"""Sizes of a miniature most of whose parameters are those in which its layers differ."""


@pytest.mark.parametrize(
    ("name", "model_type", "model"),
    [
        ("lfm2", "lfm2", "Lfm2"),
        ("qwen3.5", "qwen3_5_text", "Qwen3_5"),
        ("gemma 4", "gemma4_text", "Gemma4"),
        ("gemma 4 dense", "gemma4_text", "Gemma4"),
    ],
)
def test_layers_of_several_kinds_are_counted_as_torch_counts_them(
    name: str, model_type: str, model: str, tmp_path: Path
) -> None:
    config = {**SIZES, **FAMILIES[name].settings, **_WIDE, "model_type": model_type}
    write_json(tmp_path / "config.json", {**config, "architectures": [f"{model}ForCausalLM"]})
    parameters = shape_of(str(tmp_path)).parameters
    assert parameters == pytest.approx(_parameters(config), rel=0.005)


def _parameters(config: dict[str, Any]) -> int:
    """Return the parameters of transformers' model of a configuration, without memory for them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(settings).num_parameters())


def test_the_hub_sends_small_files_first_and_then_only_the_weights_that_are_read(
    each_time: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub itself reads the answers: what the repository holds, and each file."""
    name = "ministral-3-3b"
    _RECORDED[name].save(tmp_path)
    monkeypatch.setattr("pipeline.gguf.checkpoint.Vocabulary", lambda *_: None)
    saved = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    small = {"README.md", "chat_template.jinja", "generation_config.json", "tokenizer.json", *saved}
    weights = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    others = {".gitattributes", "SYSTEM_PROMPT.txt", "consolidated.safetensors", "original/0.pth"}
    files = {file: file.encode() for file in (*small, *weights, *others)} | saved
    with in_thread(ModelHub(presets()[name].repository, files)) as hub:
        hub.replace_the_real_one(monkeypatch, str(tmp_path / "hub"))
        model = find_model(name, weights=False)
        assert sorted(hub.downloaded) == sorted(small)
        assert shape_of(str(model.path)) == presets()[name].shape
        hub.downloaded.clear()
        assert find_model(name).path == model.path
        assert sorted(hub.downloaded) == sorted(weights)


def test_copies_in_8_bits_are_refused_before_they_are_downloaded(
    downloads: list[list[str]], tmp_path: Path
) -> None:
    """As mistralai/Ministral-3-3B-Instruct-2512, of which the preset takes the 16-bit copy."""
    quantized = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
    write_json(tmp_path / "config.json", _RECORDED["ministral-3-3b"].config | quantized)
    with pytest.raises(GattError, match=r"quantized weights \(FP8\)"):
        find_model("mistralai/Ministral-3-3B-Instruct-2512")
    assert len(downloads) == 1
    assert presets()["ministral-3-3b"].repository.endswith("-BF16")
