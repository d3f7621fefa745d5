"""Base models of every form: the right result, or one line that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.bases import (
    copy_base,
    edit_json,
    load_weights,
    make_multimodal,
    quantize_to_4_bits,
    quantize_to_8_bits,
    split_gguf,
)
from support.cli import call_gatt
from support.families import save_family
from support.shared import make_once

from pipeline.errors import GattError
from pipeline.gguf.base import Array
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.merge import plan_merge, write_skeleton
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.convert import cached_checkpoint, write_formats
from pipeline.hub.gguf_tokenizer import save_gguf_tokenizer
from pipeline.hub.models import Model, find_model, require_exportable, shape_of
from pipeline.records import Message

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random text-only Gemma 3."""
    return make_once(tmp_path_factory, "family-gemma-3", lambda f: save_family("gemma 3", f))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep converted models in a folder of the test."""
    monkeypatch.setattr(
        "pipeline.hub.convert.cache_path", lambda name: tmp_path / "cache" / str(name)
    )
    return tmp_path / "cache"


def _gguf(folder: Path, target: Path, format_name: str = "F32") -> bytes:
    write_formats(Model("base", folder), None, {format_name: target})
    return target.read_bytes()


def _refused(folder: Path | str) -> str:
    """Return the one line with which a base is refused before any work."""
    with pytest.raises(GattError) as refusal:
        require_exportable(find_model(str(folder)))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# Multimodal models


@pytest.mark.parametrize("layout", ["language_model.", "model.language_model"])
def test_the_text_part_of_a_multimodal_model_is_exported(
    layout: str, gemma: Path, cache: Path, tmp_path: Path
) -> None:
    """Byte for byte the file of the text-only model; transformers loads the same weights."""
    import transformers

    text = copy_base(gemma, tmp_path / "a" / "base")
    full = make_multimodal(text, tmp_path / "b" / "base", layout)
    assert _gguf(full, tmp_path / "b.gguf") == _gguf(text, tmp_path / "a.gguf")
    folder = cached_checkpoint(Model("base", full))
    assert folder.parent == cache
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert type(network).__name__ == "Gemma3ForCausalLM"
    weights, loaded = load_weights(text), network.state_dict()
    assert set(weights) <= set(loaded)
    assert all(loaded[key].equal(weight) for key, weight in weights.items())
    tokenizers = [transformers.AutoTokenizer.from_pretrained(f) for f in (folder, text)]
    assert tokenizers[0]("a Hi").input_ids == tokenizers[1]("a Hi").input_ids
    assert cached_checkpoint(Model("text", text)) == text


def test_a_multimodal_model_says_that_its_vision_part_is_left_out(
    gemma: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_multimodal(gemma, tmp_path / "seeing", "language_model.")
    for _ in range(2):
        CheckpointBase(folder)
    assert capsys.readouterr().err.count("seeing: a multimodal model; only its text part is") == 1


def test_a_configuration_may_leave_out_transformers_defaults(gemma: Path, tmp_path: Path) -> None:
    """As google/gemma-3-4b-it does; the sizes are checked against the weights."""
    folder = make_multimodal(gemma, tmp_path / "base", "language_model.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in ("rms_norm_eps", "max_position_embeddings", "rope_parameters"):
        del config["text_config"][key]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _gguf(folder, tmp_path / "out.gguf")
    info = read_gguf(tmp_path / "out.gguf")
    assert info.hyperparameter("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert info.hyperparameter("context_length") == 131072
    assert info.hyperparameter("rope.freq_base") == 1e6
    del config["text_config"]["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert shape_of(str(folder)).vocab_size == 262208


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "model_type"])
def test_a_size_that_every_configuration_has_must_be_there(
    key: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base")
    edit_json(folder / "config.json", **{key: None})
    assert f"config.json lacks {key}." in _refused(folder)


def test_a_default_that_contradicts_the_weights_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base")
    edit_json(folder / "config.json", hidden_size=128)
    assert "hidden_size = 128" in _refused(folder)


def test_an_unknown_text_model_is_refused_by_its_name(gemma: Path, tmp_path: Path) -> None:
    folder = make_multimodal(gemma, tmp_path / "base", "language_model.")
    text = {"model_type": "perceptron_text", "hidden_size": 64}
    edit_json(folder / "config.json", architectures=["EyeForVision"], text_config=text)
    assert "is a EyeForVision with the text model 'perceptron_text'; this" in _refused(folder)


# Split GGUF files


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama as one GGUF in Q8_0."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_formats(Model("tiny", tiny_llama), None, {"Q8_0": folder / "tiny.gguf"})

    return make_once(tmp_path_factory, "tiny-gguf", make) / "tiny.gguf"


@pytest.mark.parametrize("named", [1, 2, 3])
def test_a_split_gguf_is_read_as_one(named: int, tiny_gguf: Path, tmp_path: Path) -> None:
    """Whichever part is named: the same export, joined file and size as of the unsplit one."""
    parts = split_gguf(tiny_gguf, tmp_path, 3)
    model = find_model(str(parts[named - 1]))
    assert (model.name, model.path) == ("tiny", parts[0])
    assert model.bytes == sum(part.stat().st_size for part in parts)
    assert _gguf(model.path, tmp_path / "a.gguf") == _gguf(tiny_gguf, tmp_path / "b.gguf")


def test_training_reads_all_parts_of_a_split_gguf(
    tiny_gguf: Path, cache: Path, tmp_path: Path
) -> None:
    parts = split_gguf(tiny_gguf, tmp_path, 2)
    joined, single = (cached_checkpoint(find_model(str(f))) for f in (parts[0], tiny_gguf))
    assert joined.parent == single.parent == cache
    weights, expected = load_weights(joined), load_weights(single)
    assert weights.keys() == expected.keys()
    assert all(weights[key].equal(expected[key]) for key in weights)


def test_a_missing_part_is_named(tiny_gguf: Path, tmp_path: Path) -> None:
    parts = split_gguf(tiny_gguf, tmp_path, 4)
    parts[2].unlink()
    done = call_gatt("export", "--model", parts[1], "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.strip().startswith(f"gatt: {parts[2]} is missing: {parts[1].name} is one of")
    parts[0].unlink()
    assert f"{parts[0]} is missing (and 1 others)" in _refused(parts[1])


def test_parts_that_do_not_belong_together_are_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    parts = split_gguf(tiny_gguf, tmp_path, 2)
    shutil.copy(parts[0], parts[1])
    assert "do not belong together" in _refused(parts[0])
    renamed = parts[0].rename(tmp_path / "mine.gguf")
    assert "-0000N-of-00002.gguf. Rename the parts" in _refused(renamed)


# Quantized checkpoints


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Llama in bfloat16."""
    return make_once(tmp_path_factory, "family-llama-3", lambda f: save_family("llama 3", f))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_weights_are_those_of_bitsandbytes(
    quant_type: str, nested: bool, plain: Path, tmp_path: Path
) -> None:
    """Bit by bit, also for rows in another order and rows that are not whole blocks."""
    import torch
    from bitsandbytes import functional

    folder = quantize_to_4_bits(plain, tmp_path / "base", quant_type, nested=nested)
    stored, weights = load_weights(folder), CheckpointBase(folder).weights()
    assert weights.keys() == load_weights(plain).keys()
    packed = 0
    for key, tensor in weights.items():
        tables = {k.removeprefix(f"{key}."): v for k, v in stored.items() if k.startswith(key)}
        if len(tables) == 1:
            continue
        packed += 1
        state = functional.QuantState.from_dict(
            {k: v for k, v in tables.items() if k != key}, torch.device("cpu")
        )
        expected = _dequantize(stored[key], state)
        assert np.array_equal(tensor.load(slice(None)), expected), key
        order = np.arange(len(expected))[::-2]
        assert np.array_equal(tensor.load(order), expected[order]), key
    assert packed == 14


def _dequantize(packed: torch.Tensor, state: QuantState) -> Array:
    """Return what bitsandbytes makes of a matrix.

    Its kernel for CPUs takes wrong scales where a row is not whole blocks; its own reference for
    other devices does not.
    """
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    if state.shape[-1] % state.blocksize == 0:
        return np.asarray(functional.dequantize_4bit(packed, state).float().numpy())
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    values = _dequantize_4bit_compute(
        packed.reshape(-1), scales, state.code, state.blocksize, tuple(state.shape), state.dtype
    )
    return np.asarray(values.float().numpy())


def test_8_bit_weights_are_those_of_bitsandbytes(plain: Path, tmp_path: Path) -> None:
    import torch
    from bitsandbytes import functional

    folder = quantize_to_8_bits(plain, tmp_path / "base")
    stored, weights = load_weights(folder), CheckpointBase(folder).weights()
    assert weights.keys() == load_weights(plain).keys()
    key = "model.layers.1.mlp.down_proj.weight"
    scales = stored[f"{key.removesuffix('.weight')}.SCB"]
    expected = functional.int8_vectorwise_dequant(stored[key], scales).to(torch.bfloat16)
    assert np.array_equal(weights[key].load(slice(None)), expected.float().numpy())


def test_a_4_bit_base_is_exported_and_trained_on_in_16_bits(
    plain: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    folder = quantize_to_4_bits(plain, tmp_path / "mine-bnb-4bit")
    (folder / "README.md").write_text("---\nbase_model:\n- me/mine\n---\n# Mine\n")
    _gguf(folder, tmp_path / "a.gguf")
    assert "4 or 8 bits are used as they are" in (note := capsys.readouterr().err)
    assert "The 16-bit model: me/mine would be more exact." in note
    copy = cached_checkpoint(Model("mine", folder))
    assert copy.parent == cache
    network = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype="bfloat16")
    weights, rounded = network.state_dict(), CheckpointBase(folder).weights()
    for key, tensor in rounded.items():
        values = weights[key].float().numpy().reshape(-1, tensor.shape[-1])
        assert np.array_equal(values, tensor.load(slice(None))), key
    shutil.copytree(copy, tmp_path / "c" / folder.name, ignore=lambda *_: ["done.json"])
    shutil.copy(folder / "README.md", tmp_path / "c" / folder.name)
    assert _gguf(tmp_path / "c" / folder.name, tmp_path / "c.gguf") == (
        (tmp_path / "a.gguf").read_bytes()
    )


def test_4_bit_weights_without_their_tables_are_refused(plain: Path, tmp_path: Path) -> None:
    folder = quantize_to_4_bits(plain, tmp_path / "base")
    broken = copy_base(
        folder,
        tmp_path / "broken",
        lambda weights: {k: v for k, v in weights.items() if "quant_state" not in k},
    )
    assert "in 4 bits, but its tables are incomplete" in _refused(broken)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"quantization_config": {"bits": 4}}, "an unknown method"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
def test_other_quantized_checkpoints_are_refused_before_their_download(
    settings: dict[str, object],
    name: str,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copy_base(plain, tmp_path / "base")
    edit_json(folder / "config.json", **settings)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: me/original\n---\n")
    downloads: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        downloads.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(GattError, match=rf"\({name}\).*Take the 16-bit model: me/original\."):
        find_model(f"me/{name.replace(' ', '-')}")
    assert len(downloads) == 1
    with pytest.raises(GattError, match=name):
        cached_checkpoint(find_model(str(folder)))


def test_an_unset_quantization_is_none(plain: Path, tmp_path: Path) -> None:
    folder = copy_base(plain, tmp_path / "base")
    off = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    edit_json(folder / "config.json", quantization_config=off)
    assert CheckpointBase(folder).quantization == ""


# Damaged or incomplete folders


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 9)


def _drop(part: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        weights = {k: v for k, v in load_weights(folder).items() if part not in k}
        from safetensors.torch import save_file

        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return drop


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (_write("tokenizer.json", b""), "tokenizer.json is not JSON"),
        (_write("tokenizer.json", b"{}"), "tokenizer.json has no vocabulary"),
        (_write("tokenizer_config.json", b'["a"]'), "holds a JSON list; an object is expected"),
        (_write("tokenizer_config.json", b'{"a": 1'), "tokenizer_config.json is not JSON"),
        (_write("tokenizer.model", b""), "tokenizer.model is not a SentencePiece model"),
        (_write("config.json", b"{"), "config.json is not JSON"),
        (_write("config.json", b"null"), "config.json holds a JSON NoneType"),
        (_write("config.json", b"\xff\xfe{}"), "config.json is not JSON"),
        (_write("model.safetensors", b""), "model.safetensors has 0 bytes: no weights"),
        (_write("model.safetensors", b"\x00" * 20), "not a safetensors file, or a damaged one"),
        (_write("model.safetensors", b"\xff" * 20), "not a safetensors file, or a damaged one"),
        (_write("model.safetensors", b"version https://git-lfs.github.com/spec"), "git lfs pull"),
        (_truncate, "model.safetensors is cut short"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (
            _write("model.safetensors.index.json", b'{"weight_map": {"a": "model-2.safetensors"}}'),
            "lacks model-2.safetensors",
        ),
        (_write("model.safetensors.index.json", b"{}"), "has no weight_map"),
        (_drop("embed_tokens"), "incomplete: the embedding is missing"),
        (_drop("model.norm"), "incomplete: the last norm is missing"),
        (_drop("lm_head"), "incomplete: the output matrix (lm_head) is missing"),
        (_drop("layers.1.mlp.up_proj"), "incomplete: ffn_up of layer 1 is missing"),
        (_drop("layers.1."), "and 8 others are missing"),
        (_drop("q_proj"), "attn_q of layer 0 and 1 others are missing"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=1), "has no place in a llama"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "layer 2 and 8 others are"),
        (lambda f: edit_json(f / "config.json", vocab_size="many"), "vocab_size = 'many' found, a"),
        (lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "yarn"}), "'factor'"),
        (lambda f: edit_json(f / "config.json", architectures=None), "is a none; this version"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template, so it is a base"),
        (_write("chat_template.jinja", b"\xe9"), "chat_template.jinja is not UTF-8 text"),
    ],
)
def test_a_damaged_folder_is_one_line(
    damage: Callable[[Path], object], message: str, plain: Path, tmp_path: Path
) -> None:
    folder = copy_base(plain, tmp_path / "base")
    damage(folder)
    assert message in _refused(folder)
    done = call_gatt("export", "--model", folder, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("Traceback")) == (1, 0)
    assert message in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_a_default_of_a_key_that_is_left_out_is_written(plain: Path, tmp_path: Path) -> None:
    """Without rms_norm_eps in the file, llama.cpp would refuse it."""
    folder = copy_base(plain, tmp_path / "a" / "base")
    expected = _gguf(folder, tmp_path / "a.gguf")
    for key in ("rms_norm_eps", "num_key_value_heads"):
        edit_json(folder / "config.json", **{key: None})
    assert "incomplete" not in _refused_or_empty(folder)
    info = read_gguf(tmp_path / "a.gguf")
    _gguf(folder, tmp_path / "b.gguf")
    other = read_gguf(tmp_path / "b.gguf")
    assert other.hyperparameter("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert other.fields.keys() == info.fields.keys()
    assert len(expected) == (tmp_path / "b.gguf").stat().st_size


def _refused_or_empty(folder: Path) -> str:
    try:
        require_exportable(find_model(str(folder)))
    except GattError as error:
        return str(error)
    return ""


# Chat templates


def _named(folder: Path, **templates: str) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    entries = [{"name": name, "template": text} for name, text in templates.items()]
    edit_json(folder / "tokenizer_config.json", chat_template=entries)


def test_the_default_of_named_templates_is_taken(plain: Path, tmp_path: Path) -> None:
    from pipeline.training.unsloth import load_tokenizer

    folder = copy_base(plain, tmp_path / "base")
    _named(folder, tool_use="tools", default="{{ bos_token }}plain")
    _gguf(folder, tmp_path / "a.gguf")
    assert open_gguf(tmp_path / "a.gguf").chat_template == "{{ bos_token }}plain"
    assert load_tokenizer(folder).chat_template == "{{ bos_token }}plain"


def test_named_templates_without_a_default_are_named(plain: Path, tmp_path: Path) -> None:
    folder = copy_base(plain, tmp_path / "base")
    _named(folder, tool_use="tools", rag="documents")
    assert "chat templates named tool_use, rag, and none named default" in _refused(folder)
    done = call_gatt("chat", folder)
    assert done.returncode == 1
    assert "named tool_use, rag, and none named default. Save the one" in done.stderr


def test_the_template_of_training_is_exported(plain: Path, tmp_path: Path) -> None:
    """A file wins over tokenizer_config.json, as in transformers; others keep their names."""
    from pipeline.training.unsloth import load_tokenizer

    folder = copy_base(plain, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("file")
    edit_json(folder / "tokenizer_config.json", chat_template="setting")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("documents")
    _gguf(folder, tmp_path / "a.gguf")
    info = open_gguf(tmp_path / "a.gguf")
    assert info.chat_template == load_tokenizer(folder).chat_template == "file"
    assert info.field("tokenizer.chat_template.rag") == "documents"


def test_a_gguf_with_named_templates_only_is_refused_by_their_names(
    plain: Path, tmp_path: Path
) -> None:
    folder = copy_base(plain, tmp_path / "base")
    _named(folder, tool_use="tools")
    write_formats(Model("base", folder), None, {"F16": tmp_path / "a.gguf"})
    with pytest.raises(GattError, match=r"lacks a chat template \(only templates named tool_use\)"):
        find_model(str(tmp_path / "a.gguf"))


# BOS and EOS

_CHATML = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
_PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
_WITH_BOS = "{{ bos_token }}" + _PLAIN
_QUESTION = "Hi, it's 2,026"


def _fed_by_llama_server(file: Path) -> list[int]:
    """Return the tokens of a chat as llama-server makes them (`apply` in common/chat.cpp)."""
    from pipeline.inference.llama.model import LoadedModel

    info = open_gguf(file)
    model = LoadedModel(info, vocab_only=True)
    text = model.template.render([Message(role="user", content=_QUESTION)])
    adds_bos, adds_eos = model.added_tokens
    text = text.removeprefix(info.bos) if adds_bos else text
    text = text.removesuffix(info.eos) if adds_eos else text
    ids = model.tokenize(text, add_special=True)
    model.close()
    return ids


@pytest.mark.parametrize("source", ["folder", "gguf"])
@pytest.mark.parametrize(
    ("name", "template", "flags", "written"),
    [
        ("llama 3", _CHATML, {"bos": True}, {"bos": True}),  # begins with the BOS of this base
        ("llama 3", _PLAIN, {"bos": True, "eos": True}, {"bos": False, "eos": False}),
        ("llama 3", _PLAIN, {}, {"bos": False}),  # llama.cpp adds one by default
        ("llama 3", _PLAIN, {"bos": False}, {"bos": False}),
        ("llama 3", _WITH_BOS, {"bos": True}, {"bos": True}),
        ("llama 3", _WITH_BOS, {"bos": False}, {"bos": False}),
        ("gemma 3", _PLAIN, {"bos": True, "eos": False}, {"bos": False, "eos": False}),
        ("llama 2", _WITH_BOS, {"bos": True, "eos": False}, {"bos": True, "eos": False}),
    ],
)
def test_other_programs_feed_the_tokens_of_training(
    name: str,
    template: str,
    flags: dict[str, bool],
    written: dict[str, bool],
    source: str,
    cache: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    from pipeline.training.unsloth import load_tokenizer

    stem = f"family-{name.replace(' ', '-')}"
    family = make_once(tmp_path_factory, stem, lambda folder: save_family(name, folder))
    folder = copy_base(family, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(template)
    settings = {f"add_{n}_token": flags.get(n) for n in ("bos", "eos")}
    edit_json(folder / "tokenizer_config.json", chat_template=None, **settings)
    given = folder
    if source == "gguf":
        given = tmp_path / "given.gguf"
        _gguf(folder, given)
    done = call_gatt("export", "--model", given, "--format", "F16", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").glob("*-F16.gguf")
    info = open_gguf(file)
    present = {n: info.field(f"tokenizer.ggml.add_{n}_token") for n in ("bos", "eos")}
    assert {n: value for n, value in present.items() if value is not None} == written
    chat = [{"role": "user", "content": _QUESTION}]
    trained = load_tokenizer(cached_checkpoint(find_model(str(given)))).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert _fed_by_llama_server(file) == trained
    for n in ("bos", "eos"):
        changed = written.get(n) is False and flags.get(n, n == "bos")
        assert (f"written with tokenizer.ggml.add_{n}_token = false" in done.stderr) is changed


# Tokenizers of GGUF files


@pytest.mark.parametrize("name", ["llama3", "llama-v3", "falcon3", "pixtral", "deepseek-r1-qwen"])
def test_a_pre_tokenizer_is_known_by_its_other_names(
    name: str, plain: Path, tmp_path: Path
) -> None:
    import transformers

    from pipeline.export.verify import find_mismatch, load_and_predict, sample_chats

    file = tmp_path / "vocabulary.gguf"
    write_skeleton(plan_merge(plain, keys={"tokenizer.ggml.pre": name}), file)
    save_gguf_tokenizer(open_gguf(file), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    chats = sample_chats(file)
    assert find_mismatch(chats, load_and_predict(file, chats.texts, ()), tokenizer) == ""


def test_an_unknown_pre_tokenizer_is_refused(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "vocabulary.gguf"
    write_skeleton(plan_merge(plain, keys={"tokenizer.ggml.pre": "viking"}), file)
    with pytest.raises(GattError, match=r"tokenizer\.ggml\.pre = 'viking' found; 'gpt2' with"):
        save_gguf_tokenizer(open_gguf(file), tmp_path / "hf")


# File names


def test_a_file_name_that_is_not_utf_8_works(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    from pipeline.inference.llama.model import LoadedModel

    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le.gguf"))
    shutil.copy(tiny_gguf, file)
    model = find_model(str(file))
    assert model.name == "mod\ufffdle"
    loaded = LoadedModel(open_gguf(model.path), vocab_only=True)
    assert loaded.tokenize("Hi")
    loaded.close()
    assert (cached_checkpoint(model) / "config.json").is_file()
    assert cache.is_dir()
    folder = file.with_suffix("")
    shutil.copytree(find_model(str(file)).path.parent / "cache", tmp_path / "unused")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(GattError, match="mod\ufffdle is not UTF-8"):
        find_model(str(folder))
