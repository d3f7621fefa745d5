"""What is placed on a GPU: plans for the free memory of cards of common sizes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import llama_cpp
import psutil
import pytest
from support.gpu import install_fake_gpu, sizes_of

from pipeline.errors import GattError
from pipeline.gguf.formats import silence
from pipeline.gguf.reader import Field, GgufInfo, open_gguf
from pipeline.hub.presets import presets
from pipeline.hub.shape import ModelShape
from pipeline.inference.batch_engine import BatchEngine, system_info
from pipeline.inference.llama import gpu
from pipeline.inference.llama.gpu import gpu_devices
from pipeline.inference.llama.model import Adapter, ContextSettings, LoadedModel
from pipeline.inference.llama.placement import (
    GPU_BATCH_TOKENS,
    MIN_OUTPUTS,
    compute_bytes,
    gpu_bytes,
    place_layers,
    weight_bytes,
)
from pipeline.inference.llama.plan import plan_contexts
from pipeline.system import trim_memory

_QWEN_05B = ModelShape(
    num_hidden_layers=24,
    hidden_size=896,
    intermediate_size=4864,
    q_size=896,
    kv_size=128,
    vocab_size=151936,
    tie_word_embeddings=True,
)
_SHAPES = {
    "135M": presets()["smollm2-135m"].shape,
    "0.5B": _QWEN_05B,
    "3B": presets()["llama-3.2-3b"].shape,
    "8B": presets()["llama-3.1-8b"].shape,
}
_CONTEXT = 2816
"""Cells of a dialogue of the evaluation: 20 turns."""


@pytest.mark.parametrize("format_name", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("size", _SHAPES)
@pytest.mark.parametrize("vram_gb", [6, 8, 12, 24])
def test_a_plan_fits_on_the_card_and_uses_it(
    vram_gb: int, size: str, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake_gpu(monkeypatch, vram_gb)
    info = sizes_of(_SHAPES[size], format_name)
    plan = plan_contexts(info, ContextSettings(_CONTEXT), dialogues=200)
    (sequences,) = plan.sequences
    needed = _gpu_bytes(info, plan.gpu_layers, sequences)
    assert needed <= vram_gb * 1e9
    # One more sequence, or one more layer, would not fit.
    assert sequences == 64 or _gpu_bytes(info, plan.gpu_layers, sequences + 1) > vram_gb * 1e9
    everything = info.layers + 1
    if plan.gpu_layers < everything:
        assert _gpu_bytes(info, plan.gpu_layers + 1, 1) > vram_gb * 1e9
    assert (plan.settings.n_ctx, plan.settings.batch_tokens) == (2816, GPU_BATCH_TOKENS)


@pytest.mark.parametrize(
    ("vram_gb", "size", "format_name", "layers", "sequences"),
    [
        (6, "135M", "Q8_0", 31, 64),
        (6, "0.5B", "Q8_0", 25, 64),
        (6, "3B", "Q8_0", 29, 5),
        (12, "3B", "Q8_0", 29, 24),
        (6, "8B", "Q4_0", 33, 2),
        (8, "8B", "Q8_0", 27, 1),
        (12, "8B", "Q8_0", 33, 8),
        (24, "8B", "Q8_0", 33, 40),
        (24, "8B", "Q4_0", 33, 50),
    ],
)
def test_what_fits_on_common_cards(
    vram_gb: int,
    size: str,
    format_name: str,
    layers: int,
    sequences: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_fake_gpu(monkeypatch, vram_gb)
    info = sizes_of(_SHAPES[size], format_name)
    plan = plan_contexts(info, ContextSettings(_CONTEXT), dialogues=64)
    assert (plan.gpu_layers, plan.sequences) == (layers, (sequences,))


def test_a_server_divides_the_free_memory_and_a_loaded_model_counts_once(
    monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    """What is loaded already is not free any more: only the cache is added to it."""
    info = sizes_of(_SHAPES["3B"], "Q8_0")
    install_fake_gpu(monkeypatch, 24)
    model = LoadedModel(open_gguf(base))
    model.gpu_layers = info.layers + 1
    settings = ContextSettings(_CONTEXT)
    (alone,) = plan_contexts(info, settings, dialogues=999, loaded=model).sequences
    install_fake_gpu(monkeypatch, 24 - weight_bytes(info, info.layers + 1) / 1e9)
    (shared,) = plan_contexts(info, settings, dialogues=999, loaded=model, vram_share=0.5).sequences
    (fresh,) = plan_contexts(info, settings, dialogues=999).sequences
    model.close()
    # Weights of 3.4 GB, and 0.32 GB for each sequence.
    assert (alone, shared, fresh) == (64, 29, 50)


@pytest.mark.parametrize("vram_gb", [0, 6])
def test_a_model_without_attention_has_no_kv_cache(
    vram_gb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's converter writes 0 heads for Mamba."""
    info = sizes_of(_SHAPES["135M"], "Q8_0")
    info.fields["llama.attention.head_count"] = Field(0, 4)
    for name in ("head_count_kv", "key_length"):
        del info.fields[f"llama.attention.{name}"]
    install_fake_gpu(monkeypatch, vram_gb)
    plan = plan_contexts(info, ContextSettings(_CONTEXT), dialogues=8)
    assert info.kv_bytes_per_token == 0
    assert bool(plan.gpu_layers) == bool(vram_gb)
    assert sum(plan.sequences) == 8


def test_an_explicit_number_of_sequences_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_gpu(monkeypatch, 12)
    info, settings = sizes_of(_SHAPES["8B"], "Q8_0"), ContextSettings(_CONTEXT)
    assert plan_contexts(info, settings, dialogues=64, max_sequences=3).sequences == (3,)
    assert plan_contexts(info, settings, dialogues=64, max_sequences=40).sequences == (8,)


def test_a_float32_cache_takes_twice_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_gpu(monkeypatch, 12)
    info = sizes_of(_SHAPES["8B"], "Q8_0")
    assert plan_contexts(info, ContextSettings(_CONTEXT, "F32"), dialogues=64).sequences == (4,)


def test_an_adapter_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_fake_gpu(monkeypatch, 12)
    adapter = tmp_path / "adapter.gguf"
    with adapter.open("wb") as file:
        file.truncate(1_000_000_000)  # sparse
    info = sizes_of(_SHAPES["8B"], "Q8_0")
    settings = ContextSettings(_CONTEXT, adapter=Adapter(adapter))
    assert plan_contexts(info, settings, dialogues=64).sequences == (5,)


def test_too_little_memory_for_one_sequence_is_an_error(
    monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    install_fake_gpu(monkeypatch, 6)
    model = LoadedModel(open_gguf(base))
    assert model.gpu_layers == 31
    install_fake_gpu(monkeypatch, 0.6)
    message = r"Too little memory on Fake RTX to run .*: 0\.7 GB needed, 0\.6 GB free\. Close other"
    with pytest.raises(GattError, match=message):
        BatchEngine(model, 4, 4000)
    model.close()


def test_a_model_of_which_a_third_would_fit_goes_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = sizes_of(_SHAPES["8B"], "Q8_0")
    install_fake_gpu(monkeypatch, 3)
    assert place_layers(info) == 0
    assert capsys.readouterr().err == (
        "llama.cpp: model-Q8_0.gguf (8.5 GB) does not fit in the 3.0 GB that are free on Fake RTX: "
        "it runs on the CPU\n"
    )
    install_fake_gpu(monkeypatch, 8)
    assert place_layers(info) == 26
    assert capsys.readouterr().err.endswith("Fake RTX: 26 of its 33 layers go there\n")


def test_the_compute_buffer_is_as_large_as_llama_cpp_says(base: Path) -> None:
    """Whatever device it is on: with flash attention, the graph is the same."""
    sizes: list[float] = []

    def record(level: int, text: bytes, data: object) -> None:
        if match := re.search(rb"compute buffer size = +([0-9.]+) MiB", text):
            sizes.append(float(match[1]) * 2**20)

    model = LoadedModel(open_gguf(base))
    callback = llama_cpp.llama_log_callback(record)
    llama_cpp.llama_log_set(callback, None)
    try:
        for n_ctx, sequences in ((1024, 4), (2048, 2)):
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = n_ctx * sequences, sequences
            params.n_batch = params.n_ubatch = GPU_BATCH_TOKENS
            params.n_outputs_max = MIN_OUTPUTS
            params.kv_unified = False
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            context = llama_cpp.llama_init_from_model(model._model, params)
            llama_cpp.llama_free(context)
            assert compute_bytes(model.info, n_ctx, sequences) == pytest.approx(sizes[-1], rel=0.01)
    finally:
        silence(llama_cpp)
        model.close()


def test_devices_and_their_memory_are_read_from_ggml() -> None:
    """The CPU is a device, too: its name and memory are read as those of a GPU."""
    assert gpu_devices() == []
    ggml, base = gpu._libraries()
    assert ggml.ggml_backend_dev_count() == 1
    device = gpu._describe(base, ggml.ggml_backend_dev_get(0))
    assert device.name
    # Of a CPU, ggml reports all memory.
    assert device.free_bytes == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert system_info().startswith("works on the CPU (CPU : ")


def test_the_description_names_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_gpu(monkeypatch, 11.2)
    assert system_info().startswith("works with GPU offload (Fake RTX, 11.2 GB free) (CPU : ")


def _gpu_bytes(info: GgufInfo, layers: int, sequences: int) -> int:
    return gpu_bytes(info, layers, n_ctx=_CONTEXT, sequences=sequences)


def test_memory_that_torch_has_freed_on_the_gpu_goes_back_to_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`gatt run` trains and then generates in one process: llama.cpp needs the room."""
    calls: list[str] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: True, empty_cache=lambda: calls.append("empty_cache")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    trim_memory()
    assert calls == ["empty_cache"]
    cuda.is_initialized = lambda: False  # asking for more would start CUDA
    trim_memory()
    assert calls == ["empty_cache"]
