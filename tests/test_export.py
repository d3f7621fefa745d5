"""A Hugging Face folder becomes the GGUF that its GGUF twin is, and runs in llama.cpp as it runs in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Gatt

from pipeline.backends.convert import hugging_face_folder, write_formats
from pipeline.backends.hub import Model, find_model
from pipeline.backends.llama import Llama
from pipeline.errors import GattError
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.merge import GgufBase
from pipeline.gguf.read import open_gguf
from pipeline.gguf.vocabulary import PRE_TOKENIZERS
from pipeline.records import Request

_TEXTS = ("It's 2,026 and I'll pay €35.50!", "naïve  café\n\n\tтест 漢字 🙂", "<|im_start|>user\nHi<|im_end|>\n", "x" * 40 + "  y ")


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """SmolLM2 as a Hugging Face folder (bfloat16)."""
    return hugging_face_folder(find_model("smollm2-135m"))


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "f16.gguf"
    write_formats(Model("tiny", folder), None, {"F16": target})
    return target


def test_keys_are_those_of_the_gguf_it_came_from(base: Path, converted: Path) -> None:
    ours, theirs = open_gguf(converted), open_gguf(base)
    passed_over = "general."
    for name in theirs.fields:
        if not name.startswith(passed_over) and name != "tokenizer.ggml.add_space_prefix":
            assert ours.field(name) == theirs.field(name), name


def test_weights_are_those_of_the_gguf_it_came_from(base: Path, folder: Path) -> None:
    theirs = {t.name: t for t in GgufBase(base).tensors()}
    for tensor in CheckpointBase(folder).tensors():
        ours = tensor.load(0, tensor.rows)
        np.testing.assert_allclose(ours, theirs.pop(tensor.name).load(0, tensor.rows), rtol=2**-8)  # bfloat16 has 8 bits
    assert not theirs


def test_tokens_are_the_same_in_training_and_in_llama_cpp(folder: Path, base: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with Llama(base, 1, 256) as llama:
        for text in _TEXTS:
            assert llama.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama 3 in miniature: scaled rotary embedding, grouped heads, untied output, sharded."""
    import torch
    import transformers
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    target = tmp_path_factory.mktemp("tiny") / "llama"
    core = Tokenizer(models.BPE())
    rule = PRE_TOKENIZERS["llama-bpe"][0]["pattern"]["Regex"]
    core.pre_tokenizer = Sequence([Split(Regex(rule), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator([" ".join(_TEXTS)] * 4, trainer)
    core.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(target)
    torch.manual_seed(1)
    scaling: dict[str, Any] = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rope_parameters=scaling, tie_word_embeddings=False,
        initializer_range=0.2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(target, max_shard_size="100KB")
    assert (target / "model.safetensors.index.json").exists()
    return target


def test_llama_cpp_says_what_transformers_says(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    write_formats(Model("tiny", tiny_llama), None, {"F16": tmp_path / "tiny.gguf"})
    question = {"role": "user", "content": "It's 2,026 and I'll pay €35.50! " * 3}
    with Llama(tmp_path / "tiny.gguf", 1, 256) as llama:
        said = llama.complete(Request((question,), 1, 24, temperature=0))
        prompt = llama.tokenize(llama.template.render((question,)))
    expected = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    assert prompt == list(expected)
    answer = network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
    assert said.text == tokenizer.decode(answer, skip_special_tokens=True)


def test_what_cannot_be_written_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    import json
    import shutil

    config = json.loads((tiny_llama / "config.json").read_text())
    for name, change, said in (
        ("family", {"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM"),
        ("rope", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
    ):
        shutil.copytree(tiny_llama, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(GattError, match=said):
            write_formats(Model("tiny", tmp_path / name), None, {"F16": tmp_path / "out.gguf"})
    shutil.copytree(tiny_llama, tmp_path / "short")
    shard = next((tmp_path / "short").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(GattError, match="cut short"):
        write_formats(Model("tiny", tmp_path / "short"), None, {"F16": tmp_path / "out.gguf"})
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.slow
def test_a_folder_goes_the_whole_way(folder: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]) -> None:
    done = gatt("run", "--run", tmp_path, *tiny, "--set", f"model='{folder}'")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "export" / "tuned-Q8_0.gguf").exists()
