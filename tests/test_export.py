"""A Hugging Face folder becomes the GGUF that its GGUF twin is, and runs in llama.cpp as it runs in transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEXTS as _TEXTS
from conftest import Gatt

from pipeline.errors import GattError
from pipeline.export.importance import measure_importance
from pipeline.export.verify import load_and_predict
from pipeline.gguf import ggml
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.formats import quantize
from pipeline.gguf.merge import GgufBase, open_base
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.convert import cached_checkpoint, write_formats
from pipeline.hub.models import Model, find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.logits import mean_kl
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.recipe import Export
from pipeline.records import Request
from pipeline.stages.export import export_standalone


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """SmolLM2 as a Hugging Face folder (bfloat16)."""
    return cached_checkpoint(find_model("smollm2-135m"))


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
        np.testing.assert_allclose(
            ours, theirs.pop(tensor.name).load(0, tensor.rows), rtol=2**-8
        )  # bfloat16 has 8 bits
    assert not theirs


def test_tokens_are_the_same_in_training_and_in_llama_cpp(folder: Path, base: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with BatchEngine(base, 1, 256) as llama:
        for text in _TEXTS:
            assert llama.tokenize(text) == tokenizer(text, add_special_tokens=False)["input_ids"], (
                text
            )


def test_llama_cpp_says_what_transformers_says(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    write_formats(Model("tiny", tiny_llama), None, {"F16": tmp_path / "tiny.gguf"})
    question = {"role": "user", "content": "It's 2,026 and I'll pay €35.50! " * 3}
    with BatchEngine(tmp_path / "tiny.gguf", 1, 256) as llama:
        said = llama.complete(Request((question,), 1, 24, temperature=0))
        prompt = llama.tokenize(llama.template.render((question,)))
    expected = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_dict=False
    )
    assert prompt == list(expected)
    answer = network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[
        0, len(prompt) :
    ]
    assert said.text == tokenizer.decode(answer, skip_special_tokens=True)


def _refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert said in done.stderr.strip().splitlines()[-1]


def _damaged(source: Path, target: Path, damage: str) -> Path:
    """A copy of a checkpoint with something wrong."""
    shutil.copytree(source, target)
    shard = sorted(target.glob("*.safetensors"))[0]
    config = json.loads((target / "config.json").read_text())
    if damage in ("family", "rope"):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4}
        change = (
            {"architectures": ["GPTNeoXForCausalLM"]}
            if damage == "family"
            else {"rope_parameters": rope}
        )
        (target / "config.json").write_text(json.dumps({**config, **change}))
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif damage == "missing":
        shard.unlink()
    elif damage == "pickle":
        (target / "pytorch_model.bin").write_bytes(b"")
        for file in [*target.glob("*.safetensors"), target / "model.safetensors.index.json"]:
            file.unlink()
    elif damage == "tokenizer":
        (target / "tokenizer.json").unlink()
    else:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(shard)
        tensors[sorted(tensors)[0]].flat[3] = np.nan
        save_file(tensors, shard)
    return target


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("family", "GPTNeoXForCausalLM"),
        ("family", "--converter PATH"),
        ("rope", "'dynamic'"),
        ("cut", "cut short"),
        ("missing", "lacks model-00001"),
        ("pickle", "is a pickle"),
        ("tokenizer", "lacks tokenizer.json"),
        ("NaN", "holds NaN"),
    ],
)
def test_what_cannot_be_written_is_named(
    damage: str, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = _damaged(tiny_llama, tmp_path / "model", damage)
    (tmp_path / "out.gguf").write_bytes(b"an earlier file")
    with pytest.raises(GattError, match=said):
        write_formats(Model("tiny", folder), None, {"F16": tmp_path / "out.gguf"})
    assert (tmp_path / "out.gguf").read_bytes() == b"an earlier file"
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_of_another_base_is_refused(
    tiny_adapter: Path, base: Path, gatt: Gatt, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _refused(
        gatt("export", "--model", base, "--adapter", tiny_adapter, "--out", out),
        "it is of another base",
    )
    _refused(gatt("export", "--model", base, "--adapter", tmp_path, "--out", out), "No adapter in")
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_full_disk_leaves_no_half_file(tiny_llama: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        with pytest.raises(OSError, match="No space left"):
            write_formats(Model("tiny", tiny_llama), None, {"F16": full / "out.gguf"})
        assert not list(full.iterdir())
    finally:
        subprocess.run(["umount", full], check=True)


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_any_format_is_what_llama_cpp_makes_of_it(
    name: str, base: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Without the file in F32 that it starts from; in the tiny one no row is long enough for a K-quant."""
    model = Model(name, base if name == "smollm2" else tiny_llama)
    names = ("F32", "Q4_K_M", "Q4_0", "IQ4_XS")
    write_formats(model, None, {name: tmp_path / f"{name}.gguf" for name in names})
    for name in names[1:]:
        quantize(tmp_path / "F32.gguf", tmp_path / "theirs.gguf", name)
        ours, theirs = read_gguf(tmp_path / f"{name}.gguf"), read_gguf(tmp_path / "theirs.gguf")
        assert ours.fields == theirs.fields
        stored = {t.name: (t.kind, t.data.tobytes()) for t in theirs.tensors}
        assert {t.name: (t.kind, t.data.tobytes()) for t in ours.tensors} == stored


def test_the_importance_matrix_is_the_mean_square_of_what_comes_in(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """What comes into the first attention can be told by hand: the normalized embeddings of the tokens."""
    file = tmp_path / "tiny.gguf"
    write_formats(Model("tiny", tiny_llama), None, {"F32": file})
    text = "user: It's 2,026 and I'll pay. "
    importance = measure_importance(file, None, [text, text], 1000, lambda count: None)
    importance.save(tmp_path / "imatrix.gguf", "test")
    saved = {t.name: t for t in read_gguf(tmp_path / "imatrix.gguf").tensors}
    tensors = {t.name: t for t in GgufBase(file).tensors()}
    embedding, norm = (
        tensors[n].load(0, tensors[n].rows) for n in ("token_embd.weight", "blk.0.attn_norm.weight")
    )
    with BatchEngine(file, 1, 256) as llama:
        tokens = llama.tokenize(text)
    rows = (
        embedding[tokens] / np.sqrt((embedding[tokens] ** 2).mean(-1, keepdims=True) + 1e-6) * norm
    )
    np.testing.assert_allclose(
        importance.by_tensor()["blk.0.attn_q.weight"][0], (rows**2).mean(0), rtol=1e-4
    )
    assert saved["blk.0.attn_q.weight.counts"].data.view("<f4") == 2 * len(tokens)
    assert importance.by_tensor()["blk.1.ffn_down.weight"].shape == (1, 96)


@pytest.mark.slow
def test_an_importance_matrix_helps(base: Path, tmp_path: Path) -> None:
    """Rounded with it, a file is nearer to F32 on texts of the kind that it was taken from; and it needs it below 3 bits."""
    tensors = GgufBase(base).tensors()
    matrix = next(t for t in tensors if t.name == "blk.5.ffn_down.weight")
    importance = measure_importance(base, None, _TEXTS * 6, 400, lambda count: None)
    columns = importance.by_tensor()[matrix.name]
    weights = matrix.load(0, matrix.rows)

    def lost(stored: Any, kind: int) -> float:
        return float(
            (columns[0] * (ggml.dequantize(stored, kind, matrix.columns) - weights) ** 2).sum()
        )

    for kind in (11, 12):  # Q3_K, Q4_K
        plain, minded = ggml.quantize(weights, kind), ggml.quantize(weights, kind, columns[0])
        assert lost(minded, kind) < 0.95 * lost(plain, kind)


def test_an_adapter_over_the_base_is_the_merged_model(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    model = Model("tiny", tiny_llama)
    write_formats(model, None, {"F32": tmp_path / "base.gguf"})
    write_formats(model, tiny_adapter, {"F32": tmp_path / "tuned.gguf"})
    write_adapter(open_base(tiny_llama), tiny_adapter, tmp_path / "adapter.gguf")
    tokens = [list(range(5, 60))]
    merged, base = (
        load_and_predict(tmp_path / f"{n}.gguf", (), tokens).logits for n in ("tuned", "base")
    )
    laid = load_and_predict(tmp_path / "base.gguf", (), tokens, tmp_path / "adapter.gguf").logits
    assert mean_kl(merged, laid) < 1e-6 < 1e-2 < mean_kl(merged, base)


def test_contexts_over_one_copy_of_the_weights_do_not_mix(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    write_formats(Model("tiny", tiny_llama), None, {"F32": tmp_path / "base.gguf"})
    write_adapter(open_base(tiny_llama), tiny_adapter, tmp_path / "adapter.gguf")
    weights = LoadedModel(open_gguf(tmp_path / "base.gguf"))
    request = Request(({"role": "user", "content": "It's 2,026"},), 1, 12, temperature=0)

    def says(adapter: Adapter | None) -> str:
        with BatchEngine(weights, 1, 256, adapter=adapter) as llama:
            return llama.complete(request).text

    with (
        BatchEngine(weights, 1, 256) as base,
        BatchEngine(weights, 1, 256, adapter=Adapter(tmp_path / "adapter.gguf")) as tuned,
    ):
        mixed = [
            base.complete(request).text,
            tuned.complete(request).text,
            base.complete(request).text,
        ]
    assert mixed == [says(None), says(Adapter(tmp_path / "adapter.gguf")), says(None)]
    assert mixed[0] != mixed[1]
    assert says(Adapter(tmp_path / "adapter.gguf", 0.0)) == mixed[0]
    weights.close()


def test_a_file_that_would_be_read_in_other_tokens_replaces_nothing(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Named like this, the tokenizer splits words by GPT-2's rule in transformers, and by Llama's in the GGUF."""
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_llama, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "tokenizer_class": "GPT2Tokenizer"})
    )
    out.mkdir()
    (out / "model-F16.gguf").write_bytes(b"an earlier file")
    with pytest.raises(GattError, match="in other tokens than the model is trained with"):
        export_standalone(str(folder), None, out, Export(formats=("F16",), merge_base="fp16"), None)
    assert [p.name for p in out.iterdir()] == ["model-F16.gguf"]
    assert (out / "model-F16.gguf").read_bytes() == b"an earlier file"
    export_standalone(
        str(folder),
        None,
        out,
        Export(formats=("F16",), merge_base="fp16", verify_tokenizer=False),
        None,
    )
    assert open_gguf(out / "model-F16.gguf").architecture == "llama"


def test_chat_lays_an_adapter_over_a_base(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    write_formats(Model("tiny", tiny_llama), None, {"F32": tmp_path / "base.gguf"})
    write_adapter(open_base(tiny_llama), tiny_adapter, tmp_path / "adapter.gguf")
    command = [sys.executable, "-m", "pipeline", "chat", str(tmp_path / "base.gguf")]

    def says(*words: object) -> str:
        return subprocess.run(
            [*command, *map(str, words)], input="Hi\n\n", capture_output=True, text=True, check=True
        ).stdout

    plain, tuned = says(), says("--adapter", tmp_path / "adapter.gguf")
    assert plain != tuned
    assert says("--adapter", tmp_path / "adapter.gguf", "--adapter-scale", 0) == plain


def test_a_file_that_kills_llama_cpp_kills_a_child(tiny_llama: Path, tmp_path: Path) -> None:
    """A vocabulary without its bytes aborts llama.cpp when a text needs one."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        ("gone " * 3 + text if len(text) == 1 else text): id for text, id in vocabulary.items()
    }
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    write_formats(Model("tiny", folder), None, {"F16": tmp_path / "broken.gguf"})
    with pytest.raises(GattError, match="cannot use broken"):
        load_and_predict(tmp_path / "broken.gguf", ["hello"], ())


def test_a_merged_folder_is_what_peft_makes(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path, gatt: Gatt
) -> None:
    import peft
    import torch
    import transformers

    words = (
        "--model",
        tiny_llama,
        "--adapter",
        tiny_adapter,
        "--out",
        tmp_path / "out",
        "--merged-dir",
        tmp_path / "merged",
    )
    done = gatt("export", *words, "--format", "F16")
    assert done.returncode == 0, done.stderr
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(network, tiny_adapter).merge_and_unload()
    expected = theirs.state_dict()
    for name, weights in ours.state_dict().items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-6)
    assert "nats a token from the trained model" in done.stdout
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {"Modelfile", "adapter.gguf", "export.json", "llama-F16.gguf", "lmstudio"}
    again = gatt("export", *words, "--format", "F16")
    _refused(again, "holds a model already")


@pytest.mark.slow
def test_a_folder_goes_the_whole_way(
    folder: Path, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    done = gatt("run", "--run", tmp_path, *tiny, "--set", f"model='{folder}'")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "export" / "tuned-Q8_0.gguf").exists()


def test_a_dora_is_merged_as_peft_merges_it_and_has_no_gguf_of_its_own(
    tiny_llama: Path, tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    wrapped = peft.get_peft_model(
        network, peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(tmp_path / "dora")
    shutil.copytree(tiny_llama, tmp_path / "theirs", ignore=shutil.ignore_patterns("model*"))
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    export_standalone(
        str(tiny_llama),
        tmp_path / "dora",
        tmp_path / "out",
        Export(formats=("F32", "Q4_0"), merge_base="fp16"),
        None,
    )
    write_formats(Model("theirs", tmp_path / "theirs"), None, {"F32": tmp_path / "theirs.gguf"})
    ours = {
        tensor.name: tensor for tensor in GgufBase(tmp_path / "out" / "llama-F32.gguf").tensors()
    }
    for tensor in GgufBase(tmp_path / "theirs.gguf").tensors():
        np.testing.assert_allclose(
            ours[tensor.name].load(0, tensor.rows),
            tensor.load(0, tensor.rows),
            rtol=1e-4,
            atol=1e-5,
        )
    assert not (tmp_path / "out" / "adapter.gguf").exists()
    with pytest.raises(GattError, match="is a DoRA"):
        write_adapter(open_base(tiny_llama), tmp_path / "dora", tmp_path / "adapter.gguf")
