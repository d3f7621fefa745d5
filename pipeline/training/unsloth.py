"""QLoRA and LoRA through Unsloth, with the same code on CUDA, ROCm, XPU and CPU: a `Backend`.

Labels are made in `examples`, the loss in `loss`, the loop in `trainer`.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import GattError
from pipeline.gguf.base import Array
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.lora.weights import read_adapter
from pipeline.inference.logits import Logits
from pipeline.system import available_memory, cache_path, is_main_process
from pipeline.training.cpu.precision import cpu_dtype
from pipeline.training.job import (
    TrainingJob,
    TrainingResult,
    adapter_weights,
)
from pipeline.training.projections import adaptable_layers, layer_names, own_projections

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from unsloth import FastLanguageModel

# On import, bitsandbytes complains that the package `kernels` is missing. That would download code
# from the Hub to speed up inference in 4 bits, of which there is a second's worth here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PREDICTED_TOKENS, _PREDICTED_SEQUENCES = 96, 4
"""What logits are kept of, to compare models: the first tokens of the first sequences."""
_CPU_KERNELS = 128
"""On a CPU: compiled kernels that PyTorch and oneDNN each keep, of half a megabyte. A step takes
about 40, and every new length of its dialogues others; by default 1,024 are kept."""
_IN_16_BITS = {"correction_coefs", "prediction_coefs"} | {
    f"altup_{part}projections.{n}" for part in ("", "unembed_") for n in range(8)
}
"""Layers of Gemma 3n that training limits in place, and others that Unsloth keeps in 16 bits with
them: on a GPU, but not on a CPU."""
_MIN_OFFLOAD_LENGTH = 512
"""For a shorter limit Unsloth keeps what lies between layers on the GPU."""


def on_gpu() -> bool:
    """Return whether training runs on a CUDA (or ROCm) device."""
    import torch

    return bool(torch.cuda.is_available())


def free_memory() -> int:
    """Return the bytes that training may take: of the GPU, or else of the computer."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if on_gpu() else available_memory()


def training_dtype() -> torch.dtype:
    """Return the format that training computes in here, 16 bits where the hardware has them.

    As Unsloth does, float16 on a card older than Ampere: it has no bfloat16 (T4, RTX 20xx).
    """
    import torch

    if not on_gpu():
        return cpu_dtype()
    older = torch.version.hip is None and torch.cuda.get_device_capability()[0] < 8
    return torch.float16 if older else torch.bfloat16


def check_nf4(device: str) -> str:
    """Quantize a matrix to NF4 on `device` and back, and return how that went as a text."""
    import torch

    try:
        from bitsandbytes import functional

        matrix = torch.rand(64, 64, device=device)
        restored = functional.dequantize_4bit(*functional.quantize_4bit(matrix, quant_type="nf4"))
    except (ImportError, RuntimeError, NotImplementedError) as error:
        return f"installed, but 4-bit weights fail on {device}: {error}"
    mean_error = (restored - matrix).abs().mean()
    return f"works on {device} with 4-bit weights (mean error of NF4 {mean_error:.3f} of 1)"


@cache
def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model, with the one chat template that is exported.

    Raises:
        GattError: the tokenizer cannot be loaded, or has several templates and none as the default.
    """
    import transformers

    template = read_chat_template(model_dir)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    except Exception as error:  # a damaged file raises any class
        reason = str(error).strip().partition("\n")[0]
        raise GattError(
            f"transformers cannot load the tokenizer of {model_dir} ({type(error).__name__}: "
            f"{reason}). Download the checkpoint again."
        ) from error
    tokenizer.chat_template = template or None
    return tokenizer


def load_unsloth() -> type[FastLanguageModel]:
    """Import Unsloth and return its loader. It has to be imported before transformers."""
    cache_dir = cache_path("unsloth")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir))
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"  # the base model is on this disk already
    for cache_size in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache_size, str(_CPU_KERNELS))
    warnings.filterwarnings("ignore")
    from unsloth import FastLanguageModel  # isort: skip
    import transformers
    from unsloth_zoo.peft_utils import SKIP_QUANTIZATION_MODULES

    SKIP_QUANTIZATION_MODULES.extend(sorted(_IN_16_BITS - {*SKIP_QUANTIZATION_MODULES}))
    transformers.utils.logging.disable_progress_bar()
    return FastLanguageModel  # type: ignore[no-any-return]


def train(job: TrainingJob) -> TrainingResult:
    """Train an adapter on the base model and save it; see `Backend.train`."""
    model, tokenizer = _load_with_adapter(job)
    from pipeline.training.trainer import train_loop  # imports transformers: after Unsloth

    losses = train_loop(model, job, tokenizer.pad_token_id or 0)
    if is_main_process():
        model.save_pretrained(str(job.adapter_dir))
    return TrainingResult(losses, compute_logits(model, [e.input_ids for e in job.examples]))


def _load_with_adapter(job: TrainingJob) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Return the base model with the adapter to train, and its tokenizer."""
    loader, settings = load_unsloth(), job.settings
    model, tokenizer = loader.from_pretrained(
        str(job.model_dir),
        max_seq_length=sequence_length(job),
        load_in_4bit=job.load_in_4bit,
        dtype=_unsloth_dtype(),
        local_files_only=True,
    )
    if not on_gpu():
        _detach_from_mmap(model)
    targets = own_projections(settings.target_modules, layer_names(adaptable_layers(model)))
    model = loader.get_peft_model(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets,
        # Unsloth would train the experts of a mixture, which are one tensor that no merge follows.
        target_parameters=[],
        random_state=job.seed,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        use_gradient_checkpointing="unsloth" if on_gpu() else False,
        **({"checkpoint_skip_layers": job.stored_layers} if on_gpu() else {}),
    )
    if settings.init_adapter:
        load_init_adapter(model, Path(settings.init_adapter).expanduser())
    if not on_gpu():
        from pipeline.training.cpu.projections import speed_up_projections

        speed_up_projections(model, dequantize=job.dequantize)
    return model, tokenizer


def _unsloth_dtype() -> torch.dtype | None:
    """Return what Unsloth gets: on a GPU nothing, as it chooses the same as `training_dtype`."""
    return None if on_gpu() else training_dtype()


def sequence_length(job: TrainingJob, minimum: int = _MIN_OFFLOAD_LENGTH) -> int:
    """Return the limit that Unsloth gets: on a GPU it cuts what is longer, without an error.

    Raises:
        GattError: a chat is longer than the model can read. Unsloth would stretch its rotary
            embedding, and llama.cpp would not.
    """
    config = json.loads((job.model_dir / "config.json").read_text(encoding="utf-8"))
    text_config = {**config, **config.get("text_config", {})}
    limit = text_config.get("max_position_embeddings") or job.max_tokens
    if job.max_tokens > limit:
        raise GattError(
            f"A chat has {job.max_tokens} tokens, and the model reads {limit} at most. Lower "
            "train.max_length."
        )
    return int(min(limit, max(job.max_tokens, minimum)))


def _detach_from_mmap(model: PreTrainedModel) -> None:
    """Copy the parameters that were not quantized out of the memory-mapped checkpoint.

    Otherwise all pages of the mapped files would stay in memory with them.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.clone()


def load_init_adapter(model: PeftModel, folder: Path) -> None:
    """Start from the weights of an adapter that was trained before.

    Raises:
        GattError: there is none, or it differs in rank, target modules or base model.
    """
    import peft

    adapter_weights(folder)
    weights = peft.load_peft_weights(str(folder), device="cpu")
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {
        name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    for name in {**actual, **expected}:
        if actual.get(name) != expected.get(name):
            raise GattError(
                f"train.init_adapter: {folder} is of another rank, other targets or another base "
                f"model ({name}: {actual.get(name)} found, {expected.get(name)} expected). Set "
                "train.rank and train.target_modules as it has them."
            )
    peft.set_peft_model_state_dict(model, weights)


def predict(
    model_dir: Path,
    adapter_dir: Path | None,
    sequences: Sequence[Sequence[int]],
    *,
    load_in_4bit: bool,
) -> Logits:
    """Return the logits of the base model with an adapter; see `Backend.predict`."""
    if load_in_4bit:
        # A limit beyond the model's own would make Unsloth stretch its rotary embedding.
        model, _ = load_unsloth().from_pretrained(
            str(model_dir),
            max_seq_length=_PREDICTED_TOKENS,
            load_in_4bit=True,
            dtype=_unsloth_dtype(),
            local_files_only=True,
        )
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype="float32", local_files_only=True
        )
    if adapter_dir:
        import peft

        rows = read_adapter(adapter_dir).vocabulary_rows
        if rows not in (0, model.get_input_embeddings().num_embeddings):
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = peft.PeftModel.from_pretrained(model, str(adapter_dir))
    return compute_logits(model, sequences)


def compute_logits(
    model: PreTrainedModel | PeftModel, sequences: Sequence[Sequence[int]]
) -> Logits:
    """Return the logits of what follows each token of the `first_tokens` of `sequences`.

    `model` is in evaluation mode afterwards.
    """
    import numpy as np
    import torch

    prefixes = first_tokens(sequences)
    device = next(model.parameters()).device
    model.eval()  # no dropout
    with torch.no_grad():
        rows = [
            model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu().numpy()
            for ids in prefixes
        ]
    return Logits(prefixes, np.concatenate(rows))


def first_tokens(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the first tokens of the first few sequences, enough to compare models by."""
    return [list(ids[:_PREDICTED_TOKENS]) for ids in sequences[:_PREDICTED_SEQUENCES]]


def nf4_round_trip(matrix: Array) -> Array:
    """Round a float32 matrix (outputs, inputs) to NF4 and back, as 4-bit training stores it.

    Before that it is rounded to the format that this machine trains in.
    """
    import torch
    from bitsandbytes import functional

    device = "cuda" if on_gpu() else "cpu"
    torch.set_num_threads(1)  # the merge runs several threads itself
    quantized, state = functional.quantize_4bit(
        torch.from_numpy(matrix).to(device, training_dtype()),
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
    )
    restored: Array = functional.dequantize_4bit(quantized, state).float().cpu().numpy()
    return restored
