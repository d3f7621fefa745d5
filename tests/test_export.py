"""A Hugging Face folder becomes a GGUF that llama.cpp runs as transformers runs the folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.cli import Completed, Gatt, call_gatt
from support.models import TEXTS
from support.shared import make_once

from pipeline.errors import GattError
from pipeline.export.importance import measure_importance
from pipeline.export.lm_studio import link_for_lm_studio
from pipeline.export.summary import ExportSummary, FormatSummary
from pipeline.export.verify import LoadedFile, SampleChats, find_mismatch, load_and_predict
from pipeline.gguf import ggml
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.base import Bytes
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.formats import quantize
from pipeline.gguf.gguf_base import GgufBase
from pipeline.gguf.merge import open_base
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub import convert
from pipeline.hub.convert import cached_checkpoint, write_formats
from pipeline.hub.models import Model, find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.inference.logits import Logits, mean_kl
from pipeline.recipe import Export
from pipeline.records import Message, Request
from pipeline.stages.export import export_standalone


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """Return SmolLM2 as a Hugging Face folder in bfloat16."""
    return cached_checkpoint(find_model("smollm2-135m"))


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF of that folder in F16."""
    target = tmp_path_factory.mktemp("converted") / "f16.gguf"
    write_formats(Model("tiny", folder), None, {"F16": target})
    return target


class TinyFiles(NamedTuple):
    """The tiny Llama as GGUF files in F32: base, merged with the adapter, and the adapter alone."""

    base: Path
    tuned: Path
    adapter: Path


@pytest.fixture(scope="module")
def tiny_files(
    tiny_llama: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> TinyFiles:
    """Return GGUF files that several tests read."""

    def make(target: Path) -> None:
        model = Model("tiny", tiny_llama)
        target.mkdir()
        write_formats(model, None, {"F32": target / "base.gguf"})
        write_formats(model, tiny_adapter, {"F32": target / "tuned.gguf"})
        write_adapter(open_base(tiny_llama), tiny_adapter, target / "adapter.gguf")

    files = make_once(tmp_path_factory, "tiny-files", make)
    return TinyFiles(files / "base.gguf", files / "tuned.gguf", files / "adapter.gguf")


def test_keys_are_those_of_the_gguf_that_was_converted(base: Path, converted: Path) -> None:
    written, original = open_gguf(converted), open_gguf(base)
    for name in original.fields:
        if not name.startswith("general.") and name != "tokenizer.ggml.add_space_prefix":
            assert written.field(name) == original.field(name), name


def test_weights_are_those_of_the_gguf_that_was_converted(base: Path, folder: Path) -> None:
    originals = {t.name: t for t in GgufBase(base).tensors()}
    for tensor in CheckpointBase(folder).tensors():
        original = originals.pop(tensor.name)
        np.testing.assert_allclose(
            tensor.load(0, tensor.rows),
            original.load(0, tensor.rows),
            rtol=2**-8,  # bfloat16 has 8 bits
        )
    assert not originals


def test_tokens_are_the_same_in_training_and_in_llama_cpp(folder: Path, base: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = LoadedModel(open_gguf(base), vocab_only=True)
    for text in TEXTS:
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text) == token_ids, text
    model.close()


def test_llama_cpp_generates_what_transformers_does(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    write_formats(Model("tiny", tiny_llama), None, {"F16": tmp_path / "tiny.gguf"})
    question = Message(role="user", content="It's 2,026 and I'll pay €35.50! " * 3)
    with BatchEngine(tmp_path / "tiny.gguf", 1, 256) as llama:
        request = Request(messages=(question,), seed=1, max_tokens=24, temperature=0)
        completion = llama.complete(request)
        prompt = llama.tokenize(llama.template.render((question,)))
    expected = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, return_dict=False
    )
    assert prompt == list(expected)
    output = network.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    answer = output[0, len(prompt) :]
    assert completion.text == tokenizer.decode(answer, skip_special_tokens=True)


def _assert_refused(done: Completed, message: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert message in done.stderr.strip().splitlines()[-1]


def _damaged(source: Path, target: Path, damage: str) -> Path:
    """Return a copy of a checkpoint with something wrong."""
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
        _write_nan(shard)
    return target


def _write_nan(file: Path) -> None:
    """Put a NaN into the first tensor of a safetensors file."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    tensors[sorted(tensors)[0]].flat[3] = np.nan
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "message"),
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
def test_a_model_that_cannot_be_written_is_refused(
    damage: str, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = _damaged(tiny_llama, tmp_path / "model", damage)
    (tmp_path / "out.gguf").write_bytes(b"an earlier file")
    with pytest.raises(GattError, match=message):
        write_formats(Model("tiny", folder), None, {"F16": tmp_path / "out.gguf"})
    assert (tmp_path / "out.gguf").read_bytes() == b"an earlier file"
    assert not list(tmp_path.glob(".*"))


def test_an_adapter_with_nan_is_refused(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    _write_nan(adapter / "adapter_model.safetensors")
    with pytest.raises(GattError, match=r"the adapter holds NaN or infinity.*learning_rate"):
        write_formats(Model("tiny", tiny_llama), adapter, {"F16": tmp_path / "out.gguf"})
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_of_another_base_is_refused(
    tiny_adapter: Path, base: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out")
    done = call_gatt("export", "--model", base, "--adapter", tiny_adapter, *out)
    _assert_refused(done, "it is of another base")
    done = call_gatt("export", "--model", base, "--adapter", tmp_path, *out)
    _assert_refused(done, "No adapter in")
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_full_disk_leaves_no_partial_file(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program may fill it after the space was checked."""
    monkeypatch.setattr(convert, "require_disk", lambda *_: None)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        with pytest.raises(OSError, match="No space left"):
            write_formats(Model("tiny", tiny_llama), None, {"F16": disk / "out.gguf"})
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_any_format_is_what_llama_cpp_makes_of_it(
    name: str, base: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """No F32 file is needed for it. In the tiny model no row is long enough for a K-quant."""
    model = Model(name, base if name == "smollm2" else tiny_llama)
    names = ("F32", "Q4_K_M", "Q4_0", "IQ4_XS")
    write_formats(model, None, {name: tmp_path / f"{name}.gguf" for name in names})
    for name in names[1:]:
        quantize(tmp_path / "F32.gguf", tmp_path / "expected.gguf", name)
        written, expected = (read_gguf(tmp_path / f"{n}.gguf") for n in (name, "expected"))
        assert written.fields == expected.fields
        stored = {t.name: (t.kind, t.data.tobytes()) for t in expected.tensors}
        assert {t.name: (t.kind, t.data.tobytes()) for t in written.tensors} == stored


def test_the_importance_matrix_is_the_mean_square_of_the_inputs(
    tiny_files: TinyFiles, tmp_path: Path
) -> None:
    """The inputs of the first attention are known: the normalized embeddings of the tokens."""
    file = tiny_files.base
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
    rows = embedding[tokens]
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * norm
    np.testing.assert_allclose(
        importance.by_tensor()["blk.0.attn_q.weight"][0], (rows**2).mean(0), rtol=1e-4
    )
    assert saved["blk.0.attn_q.weight.counts"].data.view("<f4") == 2 * len(tokens)
    assert importance.by_tensor()["blk.1.ffn_down.weight"].shape == (1, 96)


@pytest.mark.slow
def test_an_importance_matrix_lowers_the_error(base: Path) -> None:
    """On texts of the kind that it was measured on, and most below 4 bits."""
    tensors = GgufBase(base).tensors()
    matrix = next(t for t in tensors if t.name == "blk.5.ffn_down.weight")
    importance = measure_importance(base, None, TEXTS * 6, 400, lambda count: None)
    columns = importance.by_tensor()[matrix.name]
    weights = matrix.load(0, matrix.rows)

    def error(stored: Bytes, kind: int) -> float:
        differences = ggml.dequantize(stored, kind, matrix.columns) - weights
        return float((columns[0] * differences**2).sum())

    for kind in (11, 12):  # Q3_K, Q4_K
        plain, weighted = ggml.quantize(weights, kind), ggml.quantize(weights, kind, columns[0])
        assert error(weighted, kind) < 0.95 * error(plain, kind)


def test_an_adapter_applied_to_the_base_is_the_merged_model(tiny_files: TinyFiles) -> None:
    tokens = [list(range(5, 60))]
    merged, base = (
        load_and_predict(file, (), tokens).logits.values
        for file in (tiny_files.tuned, tiny_files.base)
    )
    applied = load_and_predict(tiny_files.base, (), tokens, tiny_files.adapter).logits.values
    assert mean_kl(merged, applied) < 1e-6 < 1e-2 < mean_kl(merged, base)


def test_contexts_with_different_adapters_share_one_copy_of_the_weights(
    tiny_files: TinyFiles,
) -> None:
    model = LoadedModel(open_gguf(tiny_files.base))
    question = Message(role="user", content="It's 2,026")
    request = Request(messages=(question,), seed=1, max_tokens=12, temperature=0)

    def answer(adapter: Adapter | None) -> str:
        with BatchEngine(model, 1, 256, adapter=adapter) as llama:
            return llama.complete(request).text

    with (
        BatchEngine(model, 1, 256) as base,
        BatchEngine(model, 1, 256, adapter=Adapter(tiny_files.adapter)) as tuned,
    ):
        mixed = [engine.complete(request).text for engine in (base, tuned, base)]
    assert mixed == [answer(None), answer(Adapter(tiny_files.adapter)), answer(None)]
    assert mixed[0] != mixed[1]
    assert answer(Adapter(tiny_files.adapter, 0.0)) == mixed[0]
    model.close()


def test_a_file_with_different_tokens_replaces_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """With this class transformers splits words by GPT-2's rule, the GGUF by Llama's."""
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_llama, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "tokenizer_class": "GPT2Tokenizer"})
    )
    out.mkdir()
    (out / "model-F16.gguf").write_bytes(b"an earlier file")
    settings = Export(formats=("F16",), merge_base="fp16")
    with pytest.raises(GattError, match="differently from the training tokenizer"):
        export_standalone(str(folder), None, out, settings, None)
    assert [p.name for p in out.iterdir()] == ["model-F16.gguf"]
    assert (out / "model-F16.gguf").read_bytes() == b"an earlier file"
    settings = Export(formats=("F16",), merge_base="fp16", verify_tokenizer=False)
    export_standalone(str(folder), None, out, settings, None)
    assert open_gguf(out / "model-F16.gguf").architecture == "llama"


def test_a_model_of_the_hub_is_exported_under_its_name(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its id has a slash, its folder is called after a commit, and PEFT's card names the folder."""
    folder = tmp_path / "models--me--Tiny-1B" / "snapshots" / ("0a1b" * 10)
    shutil.copytree(tiny_llama, folder)
    model = Model("me/Tiny-1B", folder, "me/Tiny-1B")
    monkeypatch.setattr("pipeline.stages.export.find_model", lambda name: model)
    adapter = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    tags = f"tags:\n- base_model:adapter:{folder}\n- lora\n"
    (adapter / "README.md").write_text(f"---\nbase_model: {folder}\n{tags}---\n")
    out = tmp_path / "out"
    export_standalone(model.name, adapter, out, Export(formats=("F16", "Q4_0"), merge_base="fp16"))
    assert open_gguf(out / "Tiny-1B-F16.gguf").field("general.name") == "Tiny-1B"
    small = open_gguf(out / "Tiny-1B-Q4_0.gguf")
    assert small.field("quantize.imatrix.dataset") == "gatt's built-in questions"
    alone = read_gguf(out / "adapter.gguf")
    assert alone.field("general.base_model.0.name") == "Tiny-1B"
    assert alone.field("general.base_model.0.repo_url") == "https://huggingface.co/me/Tiny-1B"
    assert alone.field("general.tags") == ["lora"]


def test_the_first_different_token_is_described() -> None:
    class Tokenizer:
        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[5]] * len(texts)}

        def apply_chat_template(self, chat: list[Message], **_: object) -> list[int]:
            return [1, 2, 3, 4] if chat[0]["content"] == "Hi" else [7]

    questions = [Message(role="user", content=text) for text in ("Hi", "Bye")]
    chats = SampleChats([[question] for question in questions], ["<Hi>", "<Bye>"])

    def mismatch(*token_ids: list[int], **control_tokens: int) -> str:
        loaded = LoadedFile(
            list(token_ids), Logits([], np.empty((0, 9), np.float32)), control_tokens
        )
        return find_mismatch(chats, loaded, Tokenizer())

    assert mismatch([1, 2, 3, 4], [7]) == ""
    assert mismatch([1, 2, 9, 4], [7]) == "token 2 of '<Hi>': [9, 4] instead of [3, 4]"
    assert "token 1 of '<Bye>'" in mismatch([1, 2, 3, 4], [7, 8])
    # A control token of both, and one that the tokenizer reads as plain text.
    assert "token 1 of '<Bye>'" in mismatch([1, 2, 3, 4], [7, 8], Bye=5)
    assert mismatch([1, 2, 3, 4], [7, 8], Bye=8) == ""


def test_chat_applies_an_adapter_to_a_base(
    tiny_files: TinyFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def answer(*words: object) -> str:
        (tmp_path / "stdin").write_text("Hi\n\n")
        with (tmp_path / "stdin").open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            done = call_gatt("chat", tiny_files.base, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    plain, tuned = answer(), answer("--adapter", tiny_files.adapter)
    assert plain != tuned
    assert answer("--adapter", tiny_files.adapter, "--adapter-scale", 0) == plain


def test_a_file_that_crashes_llama_cpp_crashes_a_child(tiny_llama: Path, tmp_path: Path) -> None:
    """llama.cpp aborts when a text needs a byte that the vocabulary lacks."""
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
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    out, merged = tmp_path / "out", tmp_path / "merged"
    flags = ("--out", out, "--merged-dir", merged, "--format", "F16")
    words = ("export", "--model", tiny_llama, "--adapter", tiny_adapter, *flags)
    done = call_gatt(*words)
    assert done.returncode == 0, done.stderr
    written = transformers.AutoModelForCausalLM.from_pretrained(merged)
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(network, tiny_adapter).merge_and_unload().state_dict()
    for name, weights in written.state_dict().items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-6)
    assert "nats a token from the trained model" in done.stdout
    names = {path.name for path in out.iterdir()}
    stem = tiny_llama.name
    written_names = {"Modelfile", "adapter.gguf", "export.json", f"{stem}-F16.gguf", "lmstudio"}
    assert names - {".lock"} == written_names
    _assert_refused(call_gatt(*words), "holds a model already")


@pytest.mark.slow
def test_a_folder_passes_through_all_stages(
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

    dora, merged = tmp_path / "dora", tmp_path / "merged"
    network = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    wrapped = peft.get_peft_model(
        network, peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(dora))
    shutil.copytree(tiny_llama, merged, ignore=shutil.ignore_patterns("model*"))
    wrapped.merge_and_unload().save_pretrained(merged)
    settings = Export(formats=("F32", "Q4_0"), merge_base="fp16")
    export_standalone(str(tiny_llama), dora, tmp_path / "out", settings, None)
    write_formats(Model("merged", merged), None, {"F32": tmp_path / "merged.gguf"})
    exported = tmp_path / "out" / f"{tiny_llama.name}-F32.gguf"
    tensors = {tensor.name: tensor for tensor in GgufBase(exported).tensors()}
    for expected in GgufBase(tmp_path / "merged.gguf").tensors():
        np.testing.assert_allclose(
            tensors[expected.name].load(0, expected.rows),
            expected.load(0, expected.rows),
            rtol=1e-4,
            atol=1e-5,
        )
    assert not (tmp_path / "out" / "adapter.gguf").exists()
    with pytest.raises(GattError, match="is a DoRA"):
        write_adapter(open_base(tiny_llama), dora, tmp_path / "adapter.gguf")


def test_lm_studio_gets_a_hard_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tuned-F16.gguf"
    file.write_bytes(b"GGUF")
    for _ in range(2):  # also over an earlier link
        link_for_lm_studio(file, "pirate-F16")
    link = tmp_path / "lmstudio" / "gatt" / "pirate-F16" / "tuned-F16.gguf"
    assert link.samefile(file)
    assert not capsys.readouterr().err

    def refuse(*_: object) -> None:
        raise OSError("no hard links")

    monkeypatch.setattr("os.link", refuse)
    link_for_lm_studio(file, "pirate-F16")
    assert "lms import tuned-F16.gguf" in capsys.readouterr().err


def test_a_summary_names_the_matrix_that_retains_least() -> None:
    assert FormatSummary(bytes=1).least_retained == ("", 1.0)
    summary = FormatSummary(bytes=1, retained={"attn_q": 0.9, "ffn_up": 0.4})
    assert summary.least_retained == ("ffn_up", 0.4)


def test_a_summary_of_another_version_is_refused() -> None:
    text = '{"merge_base": "fp16", "formats": {"F16": {"bytes": 3}}}'
    summary = ExportSummary.from_json(text)
    assert summary.formats["F16"] == FormatSummary(bytes=3)
    with pytest.raises(GattError, match="Run `gatt export` again"):
        ExportSummary.from_json(text.replace("merge_base", "merge_onto"))


def test_a_conversion_needs_the_disk_of_its_format_only(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model("tiny", tiny_llama)
    write_formats(model, None, {"Q8_0": tmp_path / "free.gguf"})
    size = (tmp_path / "free.gguf").stat().st_size
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk._replace(free=size))
    write_formats(model, None, {"Q8_0": tmp_path / "tiny.gguf"})
    with pytest.raises(
        GattError, match=r"to convert tiny: .*needed.* XDG_CACHE_HOME for the cache"
    ):
        write_formats(model, None, {"F32": tmp_path / "large.gguf"})
    assert not (tmp_path / "large.gguf").exists()
