"""How much memory of a GPU a model takes there, and how many of its layers fit.

`n_gpu_layers` counts as in llama.cpp: the output layer first, then the last layers of the model.
The input embedding stays in the computer's memory. A layer's KV cache is where the layer is.
"""

from __future__ import annotations

from pipeline.console import log
from pipeline.gguf.reader import GgufInfo
from pipeline.inference.llama.gpu import describe_gpus, free_vram, gpu_devices
from pipeline.system import GB

GPU_BATCH_TOKENS = 2048
"""Tokens in one batch on a GPU. From a few hundred on, arithmetic is the limit, not memory."""
MIN_OUTPUTS = 64
"""Rows of a batch on a GPU that logits can be requested for, at least."""
MARGIN_BYTES = 0.5e9
"""Left free: kernels, cuBLAS's workspace and temporary matrices, which belong to no buffer of
llama.cpp. An estimate; llama.cpp's own fitting leaves 1 GiB."""
_USUAL_CONTEXT = 4096
"""Tokens of the sequence that room is left for when weights are loaded without a context."""
_MIN_GPU_SHARE = 1 / 3
"""With a smaller share of the layers on the GPU, a context per core on the CPU is faster: that is
1.3 to 1.7 times as fast as one context with all cores."""


def all_gpu_layers(info: GgufInfo) -> int:
    """Return the `n_gpu_layers` with which a model is wholly on the GPU."""
    return info.layers + 1


def place_layers(info: GgufInfo, n_ctx: int = _USUAL_CONTEXT) -> int:
    """Return as many layers as fit in the free memory of the GPU, with a sequence of `n_ctx` cells.

    0 means the CPU. If the model does not fit wholly, a log line says so.
    """
    devices = gpu_devices()
    if not devices:
        return 0
    free, everything = free_vram(devices), all_gpu_layers(info)
    fitting = everything
    while fitting and gpu_bytes(info, fitting, n_ctx=n_ctx, sequences=1) > free:
        fitting -= 1
    layers = fitting if fitting >= _MIN_GPU_SHARE * everything else 0
    if layers < everything:
        where = f"{layers} of its {everything} layers go there" if layers else "it runs on the CPU"
        name = info.field("general.name", info.path.name)
        log(
            f"llama.cpp: {name} ({info.bytes / GB:.1f} GB) does not fit in the {free / GB:.1f} GB "
            f"that are free on {describe_gpus(devices)}: {where}"
        )
    return layers


def gpu_bytes(
    info: GgufInfo, layers: int, *, n_ctx: int, sequences: int, loaded: bool = False
) -> int:
    """Return the bytes that a model and its sequences of `n_ctx` cells (F16) take on a GPU.

    With `loaded`, the weights are left out.
    """
    weights = 0 if loaded else weight_bytes(info, layers)
    cache = sequences * sequence_bytes(info, layers, n_ctx)
    return weights + cache + compute_bytes(info, n_ctx, sequences) + int(MARGIN_BYTES)


def weight_bytes(info: GgufInfo, layers: int) -> int:
    """Return the bytes of the `layers` that are on a GPU."""
    first = info.layers + 1 - layers
    sizes = {tensor.name: tensor.data.nbytes for tensor in info.tensors}
    output = "output.weight" if "output.weight" in sizes else "token_embd.weight"
    on_gpu = sizes.get(output, 0) if layers else 0  # tied to the embedding, it is a copy
    for name, size in sizes.items():
        if name.startswith("blk.") and int(name.split(".")[1]) >= first:
            on_gpu += size
    return on_gpu


def sequence_bytes(info: GgufInfo, layers: int, n_ctx: int) -> int:
    """Return the bytes of the KV cache (F16) of one sequence on a GPU.

    Sliding windows, of which llama.cpp keeps less, are counted in full.
    """
    repeating = min(layers - 1, info.layers) if layers else 0
    return n_ctx * info.kv_bytes_per_token * repeating // max(1, info.layers)


def compute_bytes(info: GgufInfo, n_ctx: int, sequences: int) -> int:
    """Return the bytes of a model's compute buffer (see `compute_buffer_bytes`)."""
    hidden = int(info.hyperparameter("embedding_length", 0))
    inner = info.hyperparameter("feed_forward_length", 4 * hidden)
    vocab = next((t.shape[0] for t in info.tensors if t.name == "token_embd.weight"), 0)
    return compute_buffer_bytes(
        hidden=hidden,
        inner=max(inner) if isinstance(inner, list) else int(inner),  # one number per layer
        vocab=vocab,
        n_ctx=n_ctx,
        sequences=sequences,
    )


def compute_buffer_bytes(*, hidden: int, inner: int, vocab: int, n_ctx: int, sequences: int) -> int:
    """Return the bytes of llama.cpp's compute buffer for batches of `GPU_BATCH_TOKENS`.

    Within 1 % of what llama.cpp reports for models of 0.1 to 8 billion parameters with flash
    attention, with and without an adapter (`scripts/bench/LOG.md`). Per token: 4 vectors of the
    hidden size, the feed-forward network's two inner vectors and their product in float32, and a
    row of the attention mask in float16; or, after the last layer, the logits of requested rows.
    """
    layer = GPU_BATCH_TOKENS * (4 * (4 * hidden + 3 * inner) + 2 * n_ctx)
    logits = 4 * max(sequences, MIN_OUTPUTS) * vocab + GPU_BATCH_TOKENS * 4 * 2 * hidden
    return max(layer, logits)
