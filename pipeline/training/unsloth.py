"""4-bit QLoRA through Unsloth, the same code on CUDA and CPU. Labels and loss are in objective.py, the loop in trainer.py."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from pipeline.errors import GattError
from pipeline.inference.logits import Logits
from pipeline.recipe import Train
from pipeline.system import available_memory, is_main_process
from pipeline.training import mlx
from pipeline.training.examples import TrainingExample
from pipeline.training.trainer import Step, adapter_weights, train_loop

_PREDICTED_TOKENS, _PREDICTED_SEQUENCES = 96, 4


def on_gpu() -> bool:
    """Whether training runs on a CUDA (or ROCm) device."""
    import torch

    return bool(torch.cuda.is_available())


def free_memory() -> int:
    """Bytes that training may take: of the graphics card, or else of the computer."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if on_gpu() else available_memory()


def check_nf4(device: str) -> str:
    """What of Unsloth works here: a matrix is really quantized to NF4 on `device` and back."""
    import torch

    try:
        from bitsandbytes import functional

        matrix = torch.rand(64, 64, device=device)
        restored = functional.dequantize_4bit(*functional.quantize_4bit(matrix, quant_type="nf4"))
    except (ImportError, RuntimeError, NotImplementedError) as error:
        return f"installed, but 4-bit weights fail on {device}: {error}"
    return f"works on {device} with 4-bit weights (mean error of NF4 {(restored - matrix).abs().mean():.3f} of 1)"


@cache
def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def _unsloth() -> Any:
    """Unsloth's loader; it must be imported before transformers."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault(
        "UNSLOTH_COMPILE_LOCATION", str(Path(platformdirs.user_cache_dir("gatt")) / "unsloth")
    )
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"  # the base is on this disk
    warnings.filterwarnings("ignore")
    from unsloth import FastLanguageModel  # isort: skip
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return FastLanguageModel


def train(
    folder: Path,
    examples: Sequence[TrainingExample],
    settings: Train,
    seed: int,
    checkpoints: Path,
    adapter: Path,
    on_step: Callable[[Step], None],
    enough: Callable[[int, Path], bool] = lambda step, folder: False,
) -> tuple[list[float], Logits]:
    """Train an adapter on the base in `folder` and save it; goes on from the last whole checkpoint. `enough`: as in `train_loop`.

    Returns:
        The loss of every step, and what the trained model predicts.
    """
    FastLanguageModel = _unsloth()
    sequences = [e.input_ids for e in examples]
    if mlx.available():
        losses, network = mlx.train(
            FastLanguageModel,
            folder,
            examples,
            settings,
            seed,
            checkpoints,
            adapter,
            on_step,
            enough,
        )
        return losses, _predict(lambda heads: mlx.predict(network, heads), sequences)
    import torch

    network, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=settings.max_length, load_in_4bit=True, local_files_only=True
    )
    if not on_gpu():
        _detach_from_mmap(network)
    network = FastLanguageModel.get_peft_model(
        network,
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        random_state=seed,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        use_gradient_checkpointing=False if not torch.cuda.is_available() else "unsloth",
    )
    if settings.init_adapter:
        continue_from(network, Path(settings.init_adapter).expanduser())
    losses = train_loop(
        network, tokenizer.pad_token_id or 0, examples, settings, seed, checkpoints, on_step, enough
    )
    if is_main_process():
        network.save_pretrained(adapter)
    return losses, _predict(_logits(network), sequences)


def _detach_from_mmap(network: Any) -> None:
    """Copy what was not quantized: it lies in the mapped checkpoint, whose pages would all stay in memory with it."""
    for parameter in network.parameters():
        if not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.clone()


def continue_from(network: Any, folder: Path) -> None:
    """Begin with the weights of an adapter that was trained before.

    Raises:
        GattError: there is none, or it has another rank or other targets.
    """
    import peft

    adapter_weights(folder)
    weights = peft.load_peft_weights(str(folder), device="cpu")
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {
        name: tuple(tensor.shape)
        for name, tensor in peft.get_peft_model_state_dict(network).items()
    }
    if theirs != ours:
        other = next(iter(theirs.items() - ours.items()), None) or next(
            iter(ours.items() - theirs.items())
        )
        raise GattError(
            f"train.init_adapter: {folder} is of another rank, other targets or another base ({other[0]}: {theirs.get(other[0])} found, "
            f"{ours.get(other[0])} expected). Set train.rank and train.target_modules as it has them."
        )
    peft.set_peft_model_state_dict(network, weights)


def predict(
    folder: Path, adapter: Path | None, sequences: Sequence[Sequence[int]], *, load_in_4bit: bool
) -> Logits:
    """What the base in `folder` with `adapter` on it predicts, in 4 bits as in training, or in float32 as it is (with MLX, which
    has other 4 bits, always).
    """
    if load_in_4bit and not mlx.available():
        network, _ = _unsloth().from_pretrained(
            str(folder), max_seq_length=4096, load_in_4bit=True, local_files_only=True
        )
    else:
        import transformers

        network = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", local_files_only=True
        )
    if adapter:
        import peft

        network = peft.PeftModel.from_pretrained(network, str(adapter))
    return _predict(_logits(network), sequences)


def _predict(
    logits: Callable[[list[list[int]]], Any], sequences: Sequence[Sequence[int]]
) -> Logits:
    """The first tokens of the first few sequences are enough to compare models by."""
    heads = [list(s[:_PREDICTED_TOKENS]) for s in sequences[:_PREDICTED_SEQUENCES]]
    return Logits(heads, logits(heads))


def _logits(network: Any) -> Callable[[list[list[int]]], Any]:
    """A function that gives the network's logits (all tokens, vocabulary) of what follows each token, float32."""
    import numpy as np
    import torch

    def of(sequences: list[list[int]]) -> Any:
        device = next(network.parameters()).device
        with torch.no_grad():
            rows = [
                network(input_ids=torch.tensor([s], device=device)).logits[0].float().cpu().numpy()
                for s in sequences
            ]
        return np.concatenate(rows)

    return of


def nf4_round_trip(matrix: Any) -> Any:
    """A matrix (outputs, inputs) as 4-bit training has it: rounded to NF4 and back, float32 in and out."""
    import torch
    from bitsandbytes import functional

    device = "cuda" if on_gpu() else "cpu"
    torch.set_num_threads(1)  # the merge has threads of its own
    stored, state = functional.quantize_4bit(
        torch.from_numpy(matrix).to(device, torch.bfloat16),
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
    )
    return functional.dequantize_4bit(stored, state).float().cpu().numpy()
