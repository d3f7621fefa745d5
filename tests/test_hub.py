"""What `--push` and `gatt push` upload to the Hub, which a fake server on this machine plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml
from support.cli import Gatt
from support.servers import FakeHub, in_thread

from pipeline.errors import GattError
from pipeline.files import sha256, write_json, write_text
from pipeline.hub import models
from pipeline.hub.models import find_model, shape_of
from pipeline.hub.presets import presets
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.report.cards import PublishedModel, model_card
from pipeline.run_dir import RunDir
from pipeline.stages import push


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with in_thread(FakeHub()) as server:
        yield server


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
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
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
    model = find_model(f"me/{weights}", weights=weights)
    assert (model.repository, model.path) == (f"me/{weights}", tmp_path)
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
    find_model(f"me/{convertible}-again")  # what is here was checked before it was downloaded
    assert checked == [tmp_path]


_GRANITE = {
    "architectures": ["GraniteForCausalLM"],
    "attention_bias": False,
    "embedding_multiplier": 12.0,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "granite",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49159,
}
_RECORDED: dict[str, dict[str, object]] = {
    "granite-3.3-2b": {
        **_GRANITE,
        "attention_multiplier": 0.015625,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
    },
    "granite-3.3-8b": {
        **_GRANITE,
        "attention_multiplier": 0.0078125,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "logits_scaling": 16.0,
    },
}
"""`config.json` of presets' repositories, as they are on the Hub."""


@pytest.mark.parametrize("name", _RECORDED)
def test_a_preset_has_the_sizes_of_its_repository(
    name: str, downloads: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "config.json", _RECORDED[name])
    monkeypatch.setattr(models, "CheckpointBase", lambda folder: folder)
    preset = presets()[name]
    model = find_model(name, weights=False)
    assert (model.name, model.repository) == (name, preset.repository)
    assert len(downloads) == 1 and "model*.safetensors" not in downloads[0]
    assert shape_of(str(model.path)) == shape_of(name) == preset.shape
    assert preset.context == _RECORDED[name]["max_position_embeddings"]


@pytest.mark.parametrize("name", ["smollm3-3b", "olmo-3-7b", "qwen3.5-9b"])
def test_a_preset_has_the_sizes_that_transformers_takes_for_its_family(name: str) -> None:
    """They are those of the published checkpoint that the family's configuration describes."""
    import transformers

    defaults = {
        "smollm3-3b": transformers.SmolLM3Config,
        "olmo-3-7b": transformers.Olmo3Config,
        "qwen3.5-9b": transformers.Qwen3_5TextConfig,
    }[name]()
    shape = presets()[name].shape
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "tie_word_embeddings"):
        assert getattr(shape, key) == getattr(defaults, key), key


def test_copies_in_8_bits_are_refused_before_they_are_downloaded(
    downloads: list[list[str]], tmp_path: Path
) -> None:
    """As mistralai/Ministral-3-3B-Instruct-2512, of which the preset takes the 16-bit copy."""
    text = {"model_type": "ministral3", "hidden_size": 3072, "num_hidden_layers": 26}
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"},
        "text_config": text,
    }
    write_json(tmp_path / "config.json", config)
    with pytest.raises(GattError, match=r"quantized weights \(FP8\)"):
        find_model("mistralai/Ministral-3-3B-Instruct-2512")
    assert len(downloads) == 1
    assert presets()["ministral-3-3b"].repository.endswith("-BF16")


def test_dialogues_are_pushed_with_their_card(hub: FakeHub, tmp_path: Path, gatt: Gatt) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "dialogues.jsonl").write_text('{"messages": []}\n')
    (folder / "README.md").write_text("# card\n")
    (folder / "acceptance.json").write_text('{"rows": [], "too_common": 0}')
    environment = hub.environment(tmp_path / "hf")
    done = gatt("synthesize", "--run", tmp_path, "--stats", "--push", "me/mine", env=environment)
    assert done.returncode == 0, done.stderr
    assert "/datasets/me/mine" in done.stdout
    assert hub.committed("dataset") == {
        "README.md": b"# card\n",
        "dialogues.jsonl": b'{"messages": []}\n',
    }


def test_a_refused_push_is_one_line(tmp_path: Path, gatt: Gatt) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "acceptance.json").write_text('{"rows": [], "too_common": 0}')
    for name in ("README.md", "dialogues.jsonl"):
        (folder / name).write_text("x")
    done = gatt(
        "synthesize",
        "--run",
        tmp_path,
        "--stats",
        "--push",
        "me/mine",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("gatt: Cannot upload to me/mine")


_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SENTENCE = (
    "In turns 16 to 20, the tuned model keeps its instruction in 68% of the answers, "
    "the base in 0%."
)
_LOCAL = "/home/me/.cache/gatt/0123-hf"


def _finished_run(path: Path, **about: str) -> RunDir:
    """Write a small run as its stages leave it; `about` are further keys of the exported GGUF."""
    run_dir = RunDir(path)
    run_dir.save_recipe(
        Recipe.model_validate(
            {
                "dialogues": {"source": "me/chats"},
                "instructions": {"pool": [{"kind": "opening", "value": "Hark!"}]},
                "evaluate": {"turns": 8},
            }
        )
    )
    tuned = run_dir.tuned("Q8_0")
    tuned.parent.mkdir()
    writer = gguf.GGUFWriter(tuned, "llama")
    for key, value in {"tokenizer.chat_template": "{{ messages }}", **about}.items():
        writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((256, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_text(tuned.with_name("adapter.gguf"), "GGUF")
    write_text(tuned.with_name("Modelfile"), f"FROM ./{tuned.name}\n")
    write_json(
        run_dir.adapter / "adapter_config.json", {"base_model_name_or_path": _LOCAL, "r": 32}
    )
    write_text(run_dir.adapter / "README.md", f"---\nbase_model: {_LOCAL}\n---\n")
    write_text(run_dir.adapter / "adapter_model.safetensors", "weights")
    write_text(
        run_dir.report / "report.md",
        f"**{_SENTENCE}**\n\n| turn | base | tuned |\n|---|---|---|\n| 1 | 0.00 | 0.71 |\n",
    )
    write_text(run_dir.report / "adherence.svg", "<svg/>")
    write_json(
        run_dir.report / "report.json",
        {"headline": _SENTENCE, "facts": {"teacher": "smollm2-135m Q4_0"}},
    )
    run_dir.claim("evaluate", "", [tuned])
    run_dir.finish("evaluate", "", [tuned], 480.0)
    return run_dir


def _push(run_dir: RunDir, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "push", "me/mine", "--run", str(run_dir.path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _refused(run_dir: RunDir) -> str:
    with pytest.raises(GattError) as refused:
        push.run(load_recipe(run_dir.path / "recipe.toml"), run_dir, "me/mine")
    return str(refused.value)


def test_a_run_is_pushed_with_its_card(hub: FakeHub, tmp_path: Path) -> None:
    run_dir = _finished_run(
        tmp_path / "run",
        **{
            "general.license": "apache-2.0",
            "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        },
    )
    done = _push(run_dir, hub.environment(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    sent = hub.committed("model")
    card = sent.pop("README.md").decode()
    assert done.stdout == f"Uploaded (private, if it is new): {hub.url}/me/mine\n"
    assert sorted(sent) == [
        "Modelfile",
        "adapter.gguf",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adherence.svg",
        "recipe.toml",
        "tuned-Q8_0.gguf",
    ]
    assert sent["tuned-Q8_0.gguf"] == run_dir.tuned("Q8_0").read_bytes()
    assert sent["recipe.toml"] == (run_dir.path / "recipe.toml").read_bytes()
    assert not any(_LOCAL.encode() in content for content in sent.values())
    assert json.loads(sent["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": _BASE,
        "r": 32,
    }
    assert all(f"| {name} |" in card for name in sent)
    assert "| tuned-Q8_0.gguf | 0.3 | the tuned model, Q8_0 |" in card
    assert card.count(_SENTENCE) == 1
    for part in (
        "](adherence.svg)",
        '- Begin every answer with "Hark!".',
        "A shortened run: 24 dialogues of 8 turns.",
        "| 1 | 0.00 | 0.71 |",
        "gatt chat tuned-Q8_0.gguf --system ",
        "\nollama create mine -f Modelfile && ollama run mine\n",
        "\nllama-server --model tuned-Q8_0.gguf\n",
        "| teacher | smollm2-135m Q4_0 |",
        "| time of evaluate | 480 s |",
    ):
        assert part in card
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["ghost-attention", "gguf", "lora"],
        "datasets": ["me/chats"],
    }


def test_the_metadata_has_only_what_is_known() -> None:
    model = PublishedModel(
        repository="me/mine",
        model_file="tuned-Q8_0.gguf",
        sizes={"tuned-Q8_0.gguf": 10**9},
        headline="It keeps.",
        facts={"base model": "b"},
    )
    card = model_card(Recipe(), model)
    assert yaml.safe_load(card.split("---\n")[1]).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "| tuned-Q8_0.gguf | 1000.0 |" in card
    assert "ollama" not in card
    assert "shortened" not in card


def test_a_license_that_the_hub_does_not_know_is_quoted() -> None:
    odd = 'My: "own" license # 1'
    model = PublishedModel(
        repository="me/mine",
        model_file="t.gguf",
        sizes={"t.gguf": 1},
        headline="It keeps.",
        facts={"base model": "b"},
        base_id="o/b",
        license=odd,
    )
    metadata = yaml.safe_load(model_card(Recipe(), model).split("---\n")[1])
    assert metadata["license"] == "other"
    assert (metadata["license_name"], metadata["base_model"]) == (odd, "o/b")


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("report/report.md", "report"),
        ("report/adherence.svg", "report"),
        ("export/tuned-Q8_0.gguf", "export"),
    ],
)
def test_an_unfinished_run_is_refused_with_the_command(
    tmp_path: Path, missing: str, stage: str
) -> None:
    run_dir = _finished_run(tmp_path)
    (tmp_path / missing).unlink()
    assert _refused(run_dir) == (
        f"{tmp_path / missing} is missing; `gatt push` uploads it. Run `gatt {stage} "
        f"{tmp_path / 'recipe.toml'} --run {tmp_path}` first."
    )


def test_the_report_of_an_earlier_export_is_refused(tmp_path: Path) -> None:
    run_dir = _finished_run(tmp_path)
    before = sha256(run_dir.tuned("Q8_0"))
    with run_dir.tuned("Q8_0").open("ab") as file:
        file.write(b"\0")
    assert sha256(run_dir.tuned("Q8_0")) != before
    assert _refused(run_dir).startswith(
        f"The report is about an earlier export than {run_dir.tuned('Q8_0')}"
    )


def test_a_model_that_the_hub_refuses_is_one_line(tmp_path: Path) -> None:
    done = _push(_finished_run(tmp_path), {**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stderr.strip().splitlines()[-1].startswith("gatt: Cannot upload to me/mine")
    assert "owner/name of a model of yours" in done.stderr
