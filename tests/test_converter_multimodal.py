"""Models that see or hear, whose text part only llama.cpp's own converter writes."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.bases import edit_json
from support.converter_families import MINIATURES, class_of, let_converter_know, nats_from
from support.converter_multimodal import SEEING, TEXT_PARTS, TextPart, save_seeing
from support.training import tiny_job

from pipeline.errors import GattError
from pipeline.export.verify import load_and_predict
from pipeline.files import write_json
from pipeline.gguf.base import JsonObject
from pipeline.gguf.families import FAMILIES, is_supported
from pipeline.gguf.huggingface.safetensors import open_safetensors, shards
from pipeline.gguf.lora.weights import read_adapter
from pipeline.hub import models
from pipeline.hub.adapted import write_adapter_gguf, write_merged_gguf
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.llama_converter import convert, converter_for
from pipeline.hub.models import Model, _check_without_weights, require_exportable, shape_of
from pipeline.hub.text_checkpoint import read_text_model, text_settings, write_text_checkpoint
from pipeline.inference.logits import mean_kl
from pipeline.training.backend import choose_backend


@pytest.mark.parametrize("part", TEXT_PARTS, ids=str)
def test_a_class_that_sees_or_hears_has_its_text_part_or_is_refused_without_weights(
    part: TextPart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {*map(class_of, MINIATURES), *(part.class_name for part in TEXT_PARTS)}
    script = let_converter_know(known, tmp_path / "llama.cpp", monkeypatch)
    text = {"model_type": part.model_type, "hidden_size": 64, "num_hidden_layers": 2}
    config = {"architectures": [part.class_name], "model_type": "seeing"}
    write_json(
        tmp_path / "config.json", config | ({"text_config": text} if part.model_type else {})
    )
    if not part.text_class:
        with pytest.raises(GattError, match=f"is a {part.class_name}.*this version trains and"):
            _check_without_weights(tmp_path)
    elif part.text_class in FAMILIES:
        assert converter_for(tmp_path) is None
        assert is_supported({**config, "text_config": text})
    else:
        assert converter_for(tmp_path) == script
        settings = text_settings(tmp_path)
        assert settings["architectures"] == [part.text_class]
        assert settings["model_type"] == part.model_type and "text_config" not in settings


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (("language_model.model.embed_tokens.weight", "vision_tower.norm.weight"), True),
        (("model.language_model.embed_tokens.weight", "model.visual.norm.weight"), True),
        (("model.text_model.embed_tokens.weight", "model.connector.proj.weight"), True),
        (("text_decoder.model.embed_tokens.weight", "speech_encoder.norm.weight"), False),
        (("model.vision_tower.embed_tokens.weight",), False),
    ],
)
@pytest.mark.parametrize("model_type", ["cohere2", "llama"])
def test_names_of_weights_that_an_index_lists_are_checked_before_the_download(
    model_type: str,
    names: tuple[str, ...],
    known: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[Path] = []
    let_converter_know(["Cohere2ForCausalLM"], tmp_path / "llama.cpp", monkeypatch)
    monkeypatch.setattr(models, "check_convertible", lambda _, folder: checked.append(folder))
    monkeypatch.setattr(models, "CheckpointBase", checked.append)
    text = {"model_type": model_type}
    config = {"architectures": ["SeeingForConditionalGeneration"], "text_config": text}
    write_json(tmp_path / "config.json", config)
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    write_json(tmp_path / "model.safetensors.index.json", index)
    if known:
        _check_without_weights(tmp_path)
        assert checked == [tmp_path]
        return
    with pytest.raises(GattError, match=r"no weight is known as its text model's model\.embed_t"):
        _check_without_weights(tmp_path)
    assert not checked


@pytest.mark.parametrize(
    ("text", "output", "problem"),
    [
        ({"tie_word_embeddings": False}, False, "no weight is known as the text model's lm_head"),
        ({"tie_word_embeddings": False}, True, ""),
        ({}, False, ""),
    ],
)
def test_the_output_of_a_text_part_is_stored_or_tied(
    text: JsonObject, output: bool, problem: str, tmp_path: Path
) -> None:
    weights = {"language_model.model.embed_tokens.weight": np.ones((4, 8), np.float16)}
    if output:
        weights["language_model.lm_head.weight"] = np.full((4, 8), 2, np.float16)
    config = {
        "architectures": ["AyaVisionForConditionalGeneration"],
        "tie_word_embeddings": False,
        "text_config": {"model_type": "cohere2", **text},
    }
    save_file(weights | {"vision_tower.norm.weight": np.ones(4)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", config)
    if problem:
        with pytest.raises(GattError, match=problem):
            read_text_model(tmp_path)
        return
    model = read_text_model(tmp_path)
    expected = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if output else set())
    assert model.weights.keys() == expected
    assert model.settings["tie_word_embeddings"] == (not output)


def test_weights_of_a_text_part_are_in_16_or_32_bits(tmp_path: Path) -> None:
    weights = {"language_model.model.embed_tokens.weight": np.ones((4, 8), np.int8)}
    save_file(weights, tmp_path / "model.safetensors")
    text = {"model_type": "cohere2"}
    config = {"architectures": ["AyaVisionForConditionalGeneration"], "text_config": text}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(
        GattError, match=r"language_model\.model\.embed_tokens\.weight is of type I8"
    ):
        read_text_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.text_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        # Of a text encoder, which is another base.
        ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("model.vision_tower.layers.0.mlp.fc1", "model.vision_tower.layers.0.mlp.fc1"),
    ],
)
def test_an_adapter_has_the_names_of_the_text_model(key: str, module: str, tmp_path: Path) -> None:
    a, b = np.ones((2, 8), np.float32), np.ones((4, 2), np.float32)
    prefix = f"base_model.model.{key}.lora_"
    weights = {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    write_json(tmp_path / "adapter_config.json", settings)
    assert list(read_adapter(tmp_path).deltas) == [module]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEING)
def test_the_text_part_of_a_class_that_sees_predicts_what_transformers_does(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = tmp_path / f"a {name}", tmp_path / "base.gguf"
    network = save_seeing(name, folder)
    stored = {k for shard in shards(folder) for k in open_safetensors(shard)}
    require_exportable(Model(folder.name, folder))
    assert f"a {name}: a multimodal model; only its text part is used." in capsys.readouterr().err
    script, text = converter_for(folder), read_text_model(folder)
    assert script and len(text.weights) < len(stored)
    write_text_checkpoint(text, tmp_path / "text")
    assert converter_for(tmp_path / "text") == script
    convert(script, tmp_path / "text", file, "F16")
    assert nats_from(network, file) < 1e-3
    hidden_size = network.config.get_text_config().hidden_size
    assert shape_of(str(folder)) == shape_of(str(tmp_path / "text"))
    assert shape_of(str(folder)).hidden_size == hidden_size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Gemma3n", "Llama4"])
def test_the_text_part_of_a_class_that_sees_is_trained_and_exported(
    name: str, tmp_path: Path
) -> None:
    """Unsloth's model, its adapter in llama.cpp and the merge predict the same.

    At some tokens the choice of an expert is too close to be the same in bfloat16.
    """
    folder = tmp_path / f"trained {name}"
    save_seeing(name, folder)
    edit_json(folder / "config.json", made_for=str(tmp_path))  # not in the cache yet
    model = Model(folder.name, folder)
    text, job = cached_checkpoint(model), tiny_job(cached_checkpoint(model), tmp_path)
    job = replace(job, settings=job.settings.model_copy(update={"load_in_4bit": False}))
    trained = choose_backend().train(job).logits
    base, adapter, merged = (tmp_path / f"{stem}.gguf" for stem in ("base", "adapter", "merged"))
    script = converter_for(folder)
    assert script
    convert(script, text, base, "F16")
    write_adapter_gguf(folder, job.adapter_dir, adapter)
    write_merged_gguf(folder, job.adapter_dir, merged)
    runs = ((base, None), (base, adapter), (merged, None))
    logits = [load_and_predict(file, (), trained.sequences, lora).logits for file, lora in runs]
    pairs = [zip(trained.values[:, None], run.values[:, None], strict=True) for run in logits]
    untrained, in_memory, tuned = (median(starmap(mean_kl, tokens)) for tokens in pairs)
    assert in_memory < 0.01 and tuned < 0.01
    assert untrained > 5 * max(in_memory, tuned)
