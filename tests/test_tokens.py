"""Tokens of llama.cpp and of training, where a vocabulary has tokens that llama.cpp overrides."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.bases import edit_json
from support.cli import TINY_RECIPE, call_gatt
from support.families import FAMILIES, save_family
from support.shared import make_once

from pipeline.export.tokens import check_tokens
from pipeline.export.verify import (
    LoadedFile,
    SampleChats,
    find_mismatch,
    load_and_predict,
    overridden_tokens,
    sample_chats,
)
from pipeline.gguf.merge import plan_merge, write_skeleton
from pipeline.gguf.reader import read_gguf
from pipeline.hub.gguf_tokenizer import save_gguf_tokenizer
from pipeline.hub.models import Model, shape_of
from pipeline.hub.presets import presets
from pipeline.training.unsloth import load_tokenizer

_REMARK = "llama.cpp takes for control tokens what training reads as plain text: </s>."
_WITH_TOKEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random Qwen2 in miniature, whose `</s>` is an ordinary token."""
    return make_once(tmp_path_factory, "family-qwen2", lambda folder: save_family("qwen2", folder))


@pytest.fixture
def respelled(qwen: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies the miniature with another chat template."""

    def copy(template: str) -> Path:
        folder = tmp_path / "respelled"
        shutil.copytree(qwen, folder)
        edit_json(folder / "tokenizer_config.json", chat_template=None)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return folder

    return copy


def _load(file: Path) -> tuple[SampleChats, LoadedFile]:
    chats = sample_chats(file)
    return chats, load_and_predict(file, chats.texts, ())


def test_only_messages_that_spell_out_an_overridden_token_are_not_compared(
    qwen: Path, tmp_path: Path
) -> None:
    file, tokenizer = tmp_path / "vocabulary.gguf", load_tokenizer(qwen)
    write_skeleton(plan_merge(qwen), file)
    chats, loaded = _load(file)
    assert overridden_tokens(loaded, tokenizer) == ["</s>"]
    assert {"<|begin|>", "<|end|>", "<|endoftext|>", "</s>"} == loaded.control_tokens.keys()
    assert find_mismatch(chats, loaded, tokenizer) == ""
    refused = 0
    for n, (chat, ids) in enumerate(zip(chats.messages, loaded.token_ids, strict=True)):
        expected = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        spelled = "</s>" in chat[-1]["content"]
        assert (ids == expected) is not spelled
        changed = [*loaded.token_ids[:n], [*ids, 1], *loaded.token_ids[n + 1 :]]
        mismatch = find_mismatch(chats, loaded._replace(token_ids=changed), tokenizer)
        assert bool(mismatch) is not spelled
        refused += bool(mismatch)
    assert refused == len(chats.messages) - 1


@pytest.mark.parametrize("command", ["instructions", "export"])
def test_a_remark_names_the_tokens_that_llama_cpp_overrides(
    command: str, qwen: Path, tmp_path: Path
) -> None:
    """Also in a second run, which does not check again."""
    for name in ("first", "second"):
        out = tmp_path / name
        flags: list[object] = ["--model", qwen, "--format", "F16", "--out", out]
        if command == "instructions":
            settings = (f"model='{qwen}'", *TINY_RECIPE)
            flags = ["--run", out, *(word for s in settings for word in ("--set", s))]
        done = call_gatt(command, *flags)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(_REMARK) == 1, done.stderr
    assert list(tmp_path.glob("second/*.gguf" if command == "export" else "second/*/*.json"))


def test_a_run_whose_chats_would_be_read_otherwise_does_not_begin(
    respelled: Callable[[str], Path], tmp_path: Path
) -> None:
    """The template writes the token itself: every chat is read otherwise than in training."""
    folder, run = respelled(_WITH_TOKEN), tmp_path / "run"
    settings = (f"model='{folder}'", *TINY_RECIPE)
    flags = [word for setting in settings for word in ("--set", setting)]
    done = call_gatt("run", "--run", run, *flags)
    assert done.returncode == 1
    assert "would tokenize a chat differently from the training tokenizer (token " in done.stderr
    assert not list(run.glob("*/assignments.json"))
    flags += ["--set", "export.verify_tokenizer=false"]
    done = call_gatt("instructions", "--run", run, *flags)
    assert done.returncode == 0, done.stderr
    assert (run / "instructions" / "assignments.json").exists()


def test_every_byte_level_miniature_has_an_overridden_token() -> None:
    """So that the tests of the families export such vocabularies, too."""
    assert sum(family.tokenizer != "sentencepiece" for family in FAMILIES.values()) >= 6


def _real(name: str) -> Path:
    """Return the GGUF of a published model, which these tests do not download."""
    folder = Path(os.environ.get("GATT_MODELS", Path.home() / ".cache" / "gatt-models"))
    file = folder / f"{name}.gguf"
    if not file.is_file():
        pytest.skip(f"no {file}: it is downloaded by hand")
    return file


def _copy_vocabulary(source: Path, target: Path, template: str) -> None:
    """Copy the keys of a GGUF with one small tensor; `template` where it has no chat template."""
    info = read_gguf(source)
    writer = gguf.GGUFWriter(target, info.architecture)
    writer.kv_data[0].clear()
    for key, field in info.fields.items():
        items = None if field.items is None else gguf.GGUFValueType(field.items)
        writer.add_key_value(key, field.value, gguf.GGUFValueType(field.kind), items)
    if "tokenizer.chat_template" not in info.fields:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overridden", "control_token"),
    [
        ("qwen-0.5b", ["</s>"], "<|im_end|>"),
        ("qwen-1.5b", ["</s>"], "<|im_end|>"),
        ("gemma-270m", [], "</s>"),  # an added token of Gemma's, one token for both
    ],
)
def test_real_vocabularies_are_read_as_in_training(
    name: str, overridden: list[str], control_token: str, tmp_path: Path
) -> None:
    file, folder = tmp_path / "vocabulary.gguf", tmp_path / "tokenizer"
    _copy_vocabulary(_real(name), file, _GEMMA_TEMPLATE)
    save_gguf_tokenizer(read_gguf(file), folder)
    chats, loaded = _load(file)
    tokenizer = load_tokenizer(folder)
    assert overridden_tokens(loaded, tokenizer) == overridden
    assert control_token in loaded.control_tokens
    assert find_mismatch(chats, loaded, tokenizer) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"), [("qwen-0.5b", "qwen2.5-0.5b"), ("qwen-1.5b", "qwen2.5-1.5b")]
)
def test_presets_have_the_sizes_of_the_published_files(name: str, preset: str) -> None:
    """Qwen2.5-Coder, which the files hold, has the sizes of Qwen2.5."""
    stored = shape_of(str(_real(name)))  # with a copy of the embedding as its output matrix
    assert presets()[preset].shape == replace(stored, tie_word_embeddings=True)


def test_the_embedded_vocabulary_is_read_as_in_training(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_tokens(Model("smollm2-135m", base))
    assert "control tokens" not in capsys.readouterr().err
