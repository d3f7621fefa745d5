"""How many sequences of a model run in parallel, in how many contexts, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.gguf.reader import GgufInfo
from pipeline.inference.llama.gpu import describe_gpus, free_vram, gpu_devices
from pipeline.inference.llama.model import ContextSettings, LoadedModel
from pipeline.inference.llama.placement import (
    GPU_BATCH_TOKENS,
    gpu_bytes,
    place_layers,
    sequence_bytes,
    weight_bytes,
)
from pipeline.system import GB, available_memory, core_count, require_memory

_CTX_PADDING = 256
"""llama.cpp rounds a KV stream up to a multiple of this number of cells."""
_SEQUENCES_PER_CORE, _SEQUENCES_PER_GPU = 16, 64
"""On a core, batches of more than 16 rows are hardly cheaper per row."""


class ContextPlan(NamedTuple):
    """How the sequences of a model are divided among contexts.

    Context `k` has `sequences[k]` sequences of `settings.n_ctx` cells each, and decodes with
    `threads`. `gpu_layers` of the model are on the GPU, as `placement` counts them.
    """

    sequences: tuple[int, ...]
    settings: ContextSettings
    threads: int
    gpu_layers: int = 0

    def describe(self, info: GgufInfo) -> str:
        """Return how many sequences run where."""
        where = "the CPU"
        if self.gpu_layers:
            where = describe_gpus(gpu_devices())
            if self.gpu_layers <= info.layers:
                where += f" ({self.gpu_layers} of {info.layers + 1} layers) and the CPU"
        return (
            f"llama.cpp: {sum(self.sequences)} sequences of {self.settings.n_ctx} tokens on {where}"
        )


def plan_contexts(
    info: GgufInfo,
    settings: ContextSettings,
    *,
    dialogues: int,
    max_sequences: int = 0,
    loaded: LoadedModel | None = None,
    vram_share: float = 1.0,
) -> ContextPlan:
    """Return the contexts for up to `dialogues` dialogues of `settings.n_ctx` tokens each.

    `max_sequences` limits the sequences; 0 uses what the cores and half of the free memory allow,
    or what the free memory of the GPU allows. `loaded` is the model, if it is in memory already.
    `vram_share` is the share of the GPU's free memory to use.

    Raises:
        GattError: too little memory.
    """
    settings = replace(settings, n_ctx=-(-settings.n_ctx // _CTX_PADDING) * _CTX_PADDING)
    gpu_layers = loaded.gpu_layers if loaded else place_layers(info, settings.n_ctx)
    if gpu_layers:
        settings = replace(settings, batch_tokens=GPU_BATCH_TOKENS)
        return _plan_gpu(
            info,
            ContextPlan((1,), settings, core_count(), gpu_layers),
            sequences=min(dialogues, max_sequences or _SEQUENCES_PER_GPU),
            loaded=bool(loaded),
            vram_share=vram_share,
        )
    bytes_each, cores = _cache_bytes(info, settings), core_count()
    sequences = min(dialogues, max_sequences or _fitting_sequences(info, bytes_each, cores))
    contexts = min(cores, sequences)
    require_memory(
        (0 if loaded else info.bytes) + sequences * bytes_each,
        f"run {info.path.name} with {sequences} sequences",
    )
    shares = tuple(len(range(n, sequences, contexts)) for n in range(contexts))
    return ContextPlan(shares, settings, cores // contexts)


def _cache_bytes(info: GgufInfo, settings: ContextSettings) -> int:
    """Return the bytes of the KV cache of one sequence."""
    return settings.n_ctx * info.kv_bytes_per_token * (2 if settings.cache_type == "F32" else 1)


def _fitting_sequences(info: GgufInfo, bytes_each: int, cores: int) -> int:
    """Return how many sequences with a KV cache of `bytes_each` the cores run."""
    cache_bytes = (available_memory() - info.bytes) / 2
    fitting = int(cache_bytes / max(1, bytes_each))  # a model without attention has no KV cache
    return max(1, min(_SEQUENCES_PER_CORE * cores, fitting - cores))


def _plan_gpu(
    info: GgufInfo, plan: ContextPlan, *, sequences: int, loaded: bool, vram_share: float
) -> ContextPlan:
    """Return the plan with up to `sequences`, as many as fit on the GPU, in one context.

    Raises:
        GattError: not even one fits, or too little memory for the layers that stay on the CPU.
    """
    layers, settings, devices = plan.gpu_layers, plan.settings, gpu_devices()
    bytes_each = _cache_bytes(info, settings)
    on_gpu = sequence_bytes(info, layers, settings.n_ctx)
    on_gpu *= 2 if settings.cache_type == "F32" else 1
    adapter_bytes = settings.adapter.path.stat().st_size if settings.adapter else 0
    fixed = gpu_bytes(info, layers, n_ctx=settings.n_ctx, sequences=0, loaded=loaded)
    fixed += adapter_bytes
    free = int(free_vram(devices) * vram_share)
    fitting = min(sequences, (free - fixed) // on_gpu) if on_gpu else sequences
    if fitting < 1:
        raise GattError(
            f"Too little memory on {describe_gpus(devices)} to run {info.path.name} with "
            f"{settings.n_ctx} tokens: {(fixed + on_gpu) / GB:.1f} GB needed, {free / GB:.1f} GB "
            "free. Close other programs that use it, or take fewer turns or a smaller model."
        )
    on_cpu = fitting * (bytes_each - on_gpu)
    if not loaded and layers <= info.layers:
        on_cpu += info.bytes - weight_bytes(info, layers)
    require_memory(on_cpu, f"run {info.path.name} with {fitting} sequences")
    return plan._replace(sequences=(fitting,))
