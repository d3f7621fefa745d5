"""Adapters as users have them: the right model, or one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.adapters import change_settings, gguf_weights, make_adapter
from support.bases import copy_base, edit_json
from support.cli import call_gatt
from support.families import save_family
from support.shared import make_once

from pipeline.errors import GattError
from pipeline.export import adapter_folder
from pipeline.export.verify import load_and_predict, max_kl
from pipeline.gguf.gguf_base import GgufBase
from pipeline.gguf.lora.weights import LoraAdapter, read_adapter
from pipeline.gguf.reader import open_gguf
from pipeline.recipe import Train
from pipeline.training.job import check_init_adapter

if TYPE_CHECKING:
    import torch

pytestmark = pytest.mark.filterwarnings("ignore")

_ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "### Response:\n{% else %}{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
)
_WEIGHTS = "adapter_model.safetensors"
Tensors = dict[str, "torch.Tensor"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Qwen 2 in miniature."""
    return make_once(tmp_path_factory, "adapters-qwen2", lambda to: save_family("qwen2", to))


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a LoRA for it."""
    return make_once(tmp_path_factory, "adapters-lora", lambda to: make_adapter(base, to, {"r": 4}))


@pytest.fixture
def full(base: Path, tmp_path: Path) -> Path:
    """Return a copy of the Qwen 2 whose embedding has a row for every token and no more."""
    import torch
    import transformers

    folder = shutil.copytree(base, tmp_path / "full", ignore=shutil.ignore_patterns("model*"))
    network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    network.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(base)))
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the LoRA."""
    return shutil.copytree(made, tmp_path / "adapter")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep converted models in a folder of the test."""
    monkeypatch.setattr(
        "pipeline.hub.convert.cache_path", lambda name: tmp_path / "cache" / str(name)
    )


def _edit_weights(adapter: Path, edit: Callable[[Tensors], Tensors]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(edit(load_file(adapter / _WEIGHTS)), adapter / _WEIGHTS)


def _export(base: Path, adapter: Path, *words: object) -> list[str]:
    """Export in F32 and return the lines of the output."""
    out = adapter.parent / "out"
    flags = ("--format", "F32", "--out", out, *words)
    done = call_gatt("export", "--model", base, "--adapter", adapter, *flags)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def _refusal(base: Path, adapter: Path, *words: object) -> str:
    """Return the one line with which an export is refused; no file is written."""
    out = adapter.parent / "out"
    flags = ("--format", "F32", "--out", out, *words)
    done = call_gatt("export", "--model", base, "--adapter", adapter, *flags)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.gguf"))
    return next(line for line in done.stderr.splitlines() if line.startswith("gatt: "))


def _drop(suffix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(suffix)}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: {}, "no tensors found"),
        (lambda tensors: {k: v[:0] for k, v in tensors.items()}, "has size 0"),
        (_drop("0.mlp.up_proj.lora_B.weight"), "layers.0.mlp.up_proj has lora_A but no lora_B"),
        (_drop("0.mlp.up_proj.lora_A.weight"), "layers.0.mlp.up_proj has lora_B but no lora_A"),
        (
            lambda tensors: {k.replace("A.w", "A.default.w"): v for k, v in tensors.items()},
            "lora_A.default.weight found, which is not a name that PEFT gives",
        ),
        (
            lambda tensors: {k.removeprefix("base_model.model."): v for k, v in tensors.items()},
            "not a name that PEFT gives",
        ),
        (lambda tensors: {k: v * np.inf for k, v in tensors.items()}, "holds NaN or infinity"),
        (
            lambda tensors: {
                k: v[:, :-1].contiguous() if "A.w" in k else v for k, v in tensors.items()
            },
            "it is of another base",
        ),
        (
            lambda tensors: {k.replace("layers.1.", "layers.7."): v for k, v in tensors.items()},
            "layers.7.mlp.down_proj, which",
        ),
    ],
)
def test_broken_weights_are_refused(
    edit: Callable[[Tensors], Tensors], message: str, base: Path, adapter: Path
) -> None:
    _edit_weights(adapter, edit)
    assert message in _refusal(base, adapter)


def _put(name: str, content: bytes = b"x") -> Callable[[Path], None]:
    """Return an edit that puts another file in the place of the weights."""

    def edit(folder: Path) -> None:
        (folder / _WEIGHTS).unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_put(_WEIGHTS, b""), "has 0 bytes"),
        (_put(_WEIGHTS, b"\x10\0\0\0\0\0\0\0not JSON at all."), "not a safetensors file"),
        (_put("adapters.safetensors"), "format of mlx-lm. Fuse it with `mlx_lm.fuse"),
        (_put("adapter_model.bin"), "is a pickle, which may run code"),
        (_put("config.json"), "The folder holds a model"),
        (_put("tuned.gguf"), "tuned.gguf cannot be merged"),
        (_put(f"checkpoint-100/{_WEIGHTS}"), "There is one in"),
        (lambda folder: (folder / _WEIGHTS).unlink(), f"{_WEIGHTS} missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json missing"),
        (lambda folder: change_settings(folder, {"lora_alpha": "absent"}), "lora_alpha is missing"),
        (lambda folder: change_settings(folder, {"lora_alpha": "8"}), "lora_alpha is '8'"),
        (lambda folder: change_settings(folder, {"r": "absent"}), "r is missing"),
        (lambda folder: change_settings(folder, {"peft_type": "LOHA"}), "peft_type = 'LOHA'"),
        (lambda folder: change_settings(folder, {"use_qalora": True}), "use_qalora = True"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
    ],
)
def test_a_folder_that_is_no_lora_is_refused(
    edit: Callable[[Path], object], message: str, base: Path, adapter: Path
) -> None:
    edit(adapter)
    assert message in _refusal(base, adapter)


def test_a_file_is_no_adapter(base: Path, adapter: Path) -> None:
    assert "which is a file" in _refusal(base, adapter / _WEIGHTS)


def test_the_chat_template_of_the_adapter_is_exported(base: Path, adapter: Path) -> None:
    (adapter / "chat_template.jinja").write_text(_ALPACA)
    merged = adapter.parent / "merged"
    lines = _export(base, adapter, "--merged-dir", merged)
    assert any("the chat template is the one in" in line for line in lines)
    file = adapter.parent / "out" / f"{base.name}-F32.gguf"
    assert open_gguf(file).chat_template == _ALPACA
    assert (merged / "chat_template.jinja").read_text() == _ALPACA
    assert sum("0.0000 nats a token from the trained model" in line for line in lines) == 2


def test_a_base_without_a_template_takes_the_adapters(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    bare = copy_base(base, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(bare / "tokenizer_config.json", chat_template=None)
    assert "has no chat template" in _refusal(bare, adapter)
    (adapter / "chat_template.jinja").write_text(_ALPACA)
    assert any("bare has none" in line for line in _export(bare, adapter))
    assert open_gguf(tmp_path / "out" / "bare-F32.gguf").chat_template == _ALPACA


def test_a_gguf_base_takes_the_adapters_template(base: Path, adapter: Path, tmp_path: Path) -> None:
    gguf_weights(base, None, tmp_path / "base.gguf")
    (adapter / "chat_template.jinja").write_text(_ALPACA)
    _export(tmp_path / "base.gguf", adapter)
    assert open_gguf(tmp_path / "out" / "base-F32.gguf").chat_template == _ALPACA


def _save_tokenizer(base: Path, adapter: Path, tokens: list[str], **settings: object) -> int:
    """Save the base's tokenizer with more tokens beside the adapter, and return its size."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(tokens, special_tokens=True)
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(adapter)
    return len(tokenizer)


def test_new_tokens_without_embeddings_are_refused(base: Path, adapter: Path) -> None:
    _save_tokenizer(base, adapter, [f"<|new {n}|>" for n in range(5)])
    line = _refusal(base, adapter)
    assert "2 tokens (<|new 3|>, <|new 4|>), for which" in line  # 3 spare rows
    assert "modules_to_save" in line


def test_a_token_for_padding_is_left_out(full: Path, tmp_path: Path) -> None:
    """Nothing is generated from it, so the model is the same without it."""
    adapter = make_adapter(full, tmp_path / "adapter", {}).folder
    _save_tokenizer(full, adapter, ["[PAD]"], pad_token="[PAD]")
    assert any("without [PAD]" in line for line in _export(full, adapter))


def test_new_tokens_come_with_their_embeddings(base: Path, tmp_path: Path) -> None:
    """As Axolotl and TRL save them: a larger vocabulary in modules_to_save."""
    import peft
    import torch
    import transformers

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    size = _save_tokenizer(base, adapter, [f"<|new {n}|>" for n in range(9)])
    network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    network.resize_token_embeddings(size)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    model = peft.get_peft_model(network, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(adapter))
    lines = _export(base, adapter, "--merged-dir", tmp_path / "merged")
    assert any("9 tokens (<|new 0|>" in line for line in lines)
    file = tmp_path / "out" / f"{base.name}-F32.gguf"
    token_ids = [size - 1, 5, size - 9, 7]
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([token_ids])).logits[0].numpy()
    loaded = load_and_predict(file, ["<|new 8|>"], [token_ids])
    assert loaded.token_ids == [[size - 1]]
    np.testing.assert_allclose(loaded.logits.values, expected, atol=2e-3)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == size


def test_a_vocabulary_that_was_cut_keeps_the_other_rows(base: Path, tmp_path: Path) -> None:
    """`resize_token_embeddings(len(tokenizer))` removes the rows that no token has."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = network.config.vocab_size - 3
    network.resize_token_embeddings(rows)
    settings = peft.LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"])
    peft.get_peft_model(network, settings).save_pretrained(str(tmp_path / "adapter"))
    _export(base, tmp_path / "adapter", "--merged-dir", tmp_path / "merged")
    tensors = {t.name: t for t in GgufBase(tmp_path / "out" / f"{base.name}-F32.gguf").tensors()}
    assert tensors["token_embd.weight"].rows == tensors["output.weight"].rows == rows + 3


def test_an_adapter_of_a_multimodal_model_is_merged_into_its_text_part(
    base: Path, adapter: Path
) -> None:
    """As Unsloth saves one of Gemma 3 4B, with the vision tower trained, too."""
    plain = gguf_weights(base, adapter, adapter.parent / "plain.gguf")

    def rename(tensors: Tensors) -> Tensors:
        renamed = {
            k.replace("model.layers", "model.language_model.layers"): v for k, v in tensors.items()
        }
        first = next(iter(tensors))
        vision = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
        return {**renamed, **{f"{vision}.lora_{x}.weight": tensors[first].clone() for x in "AB"}}

    _edit_weights(adapter, rename)
    targets = r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj))"
    change_settings(adapter, {"target_modules": targets})
    lines = _export(base, adapter)
    assert any("other than the text model are left out" in line for line in lines)
    assert any("adapter.gguf: 0.00" in line for line in lines)
    for tensor in GgufBase(adapter.parent / "out" / f"{base.name}-F32.gguf").tensors():
        np.testing.assert_array_equal(tensor.load(0, tensor.rows), plain[tensor.name])


def test_another_end_of_an_answer_is_exported(base: Path, adapter: Path) -> None:
    _save_tokenizer(base, adapter, [], eos_token="<tool>")
    assert any("an answer ends with <tool>" in line for line in _export(base, adapter))
    assert open_gguf(adapter.parent / "out" / f"{base.name}-F32.gguf").eos == "<tool>"


def test_a_tokenizer_of_another_base_is_refused(base: Path, adapter: Path) -> None:
    _save_tokenizer(base, adapter, [])
    tokenizer = json.loads((adapter / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "2 tokens (a, b) other ids" in _refusal(base, adapter)


@pytest.mark.parametrize(
    ("named", "given", "same"),
    [
        ("unsloth/Qwen3-0.6B-unsloth-bnb-4bit", "qwen3-0.6b", True),
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B-Q8_0.gguf", True),
        ("/home/x/.cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0a1b2c", "Qwen/Qwen3-0.6B", True),
        ("/data/Qwen3-0.6B/", "qwen3-0.6b", True),
        ("Qwen/Qwen3-0.6B-Base", "qwen3-0.6b", False),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B-Instruct", False),
    ],
)
def test_names_of_one_base_are_recognized(named: str, given: str, same: bool) -> None:
    plain = adapter_folder.plain_name
    assert (plain(named) == plain(given)) == same


def test_another_base_in_the_configuration_is_said(base: Path, adapter: Path) -> None:
    change_settings(adapter, {"base_model_name_or_path": "o/other-7B", "revision": "v2"})
    lines = _export(base, adapter)
    assert any(f"names o/other-7B as its base; the base given is {base.name}" in x for x in lines)
    assert any("revision v2" in line for line in lines)


def _exaggerate(folder: Path) -> LoraAdapter:
    """Read an adapter wrongly: its changes are multiplied by 40."""
    lora = read_adapter(folder)
    deltas = {name: replace(delta, scale=40 * delta.scale) for name, delta in lora.deltas.items()}
    return replace(lora, deltas=deltas)


@pytest.mark.parametrize(
    ("module", "name"),
    [("merge", "F32.gguf"), ("adapter", "adapter.gguf"), ("checkpoint_writer", "merged")],
)
def test_nothing_is_exported_that_predicts_something_else(
    module: str, name: str, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"pipeline.gguf.{module}.read_adapter", _exaggerate)
    out, merged = adapter.parent / "out", adapter.parent / "merged"
    flags = ("--format", "F32", "--out", out, "--merged-dir", merged)
    done = call_gatt("export", "--model", base, "--adapter", adapter, *flags)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert f"{name} does not predict what the trained model does" in error
    assert not merged.exists() or not list(merged.iterdir())
    assert bool(list(out.rglob("*.gguf"))) == (name == "merged")


def test_every_format_has_a_bound_far_below_11_nats() -> None:
    for name in ("F32", "Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS", "Q3_K_S", "Q2_K", "IQ1_S", "TQ1_0"):
        assert max_kl(name, in_4bit=False) <= 4 < max_kl(name, in_4bit=True) + 3 < 9
    assert max_kl("F16", in_4bit=False) == 0.2


def test_training_does_not_start_from_an_adapter_of_another_strength(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Train(init_adapter=str(adapter), rank=4, alpha=8)
    check_init_adapter(settings, "template")
    assert not capsys.readouterr().err
    with pytest.raises(GattError, match=r"by 2, and this training by 1\. Set train\.alpha"):
        check_init_adapter(settings.model_copy(update={"alpha": 4}), "template")
    (adapter / "chat_template.jinja").write_text(_ALPACA)
    check_init_adapter(settings, "template")
    assert "a chat template of its own" in capsys.readouterr().err
    change_settings(adapter, {"init_lora_weights": "pissa"})
    with pytest.raises(GattError, match="the base itself"):
        check_init_adapter(settings, "template")
