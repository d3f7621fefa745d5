"""Unsloth's CUDA branch on a CPU: what it trains in a process of its own, with stand-ins.

`UNSLOTH_ALLOW_CPU=1` makes Unsloth take its CUDA branch without a card. Plain torch replaces its
two Triton kernels that these models need, and the CPU its devices. Weights are not in 4 bits.

    PYTHONPATH=.:tests python tests/support/cuda_branch.py FOLDER

trains the models in FOLDER and writes the results beside them; `tests/test_cuda_branch.py` makes
the models and reads the results.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.recipe import Train
from pipeline.training import unsloth as backend
from pipeline.training.examples import TrainingExample
from pipeline.training.job import Step, TrainingJob
from support.training import tiny_examples, tiny_job

SETTINGS = Train(max_steps=4, learning_rate=1e-2, save_steps=2, rank=4, max_length=64)
LONG_TEACHER_TOKENS = 100
"""More than `SETTINGS.max_length`."""


class _OnlyDevice(list[Any]):
    """A list with a value per device, of which there is one, without an index: the CPU."""

    def __getitem__(self, device: Any) -> Any:
        return super().__getitem__(0)

    def __setitem__(self, device: Any, value: Any) -> None:
        super().__setitem__(0, value)


class _DeviceCount(int):
    def __rmul__(self, values: Any) -> Any:
        return _OnlyDevice(values)


def install_stand_ins() -> None:
    """Import Unsloth, and replace what needs a card."""
    import torch

    loader = backend.load_unsloth()

    def rms_layernorm(norm: Any, x: Any, *_: object, gemma: bool = False, **__: object) -> Any:
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
        hidden = x.float()
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
        if gemma:
            return (hidden * (1 + norm.weight.float())).to(x.dtype)
        return norm.weight * hidden.to(x.dtype)

    def rope_embedding(q: Any, k: Any, cos: Any, sin: Any, positions: Any = None) -> Any:
        from transformers.models.llama.modeling_llama import rotate_half

        cos, sin = cos[: q.shape[-2]], sin[: q.shape[-2]]
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    def swiglu(e: Any, g: Any) -> Any:
        return torch.nn.functional.silu(e.float()).to(g.dtype) * g

    from unsloth.kernels.swiglu import _DWf_DW_dfg_traced

    replacements: dict[str, object] = {
        "swiglu_fg_kernel": swiglu,
        "swiglu_DWf_DW_dfg_kernel": _DWf_DW_dfg_traced,
        "fast_rms_layernorm": rms_layernorm,
        "fast_rope_embedding": rope_embedding,
        "get_device_stats": lambda: ("CPU", "no CUDA", 16.0),
        "get_current_device": lambda: "cpu",
        "DEVICE_COUNT": _DeviceCount(1),
        "DEVICE_TYPE_TORCH": "cpu",
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("unsloth"):
            for attribute in replacements.keys() & vars(module).keys():
                setattr(module, attribute, replacements[attribute])
    torch.cuda.get_device_capability = lambda *_: (7, 5)  # a T4
    backend.on_gpu = lambda: True
    backend.load_unsloth = lambda: loader


def use_dtype(dtype: str) -> None:
    """Load all further models in a dtype; "" leaves it to Unsloth."""
    import torch

    loader: Any = backend.load_unsloth()
    loader.from_pretrained = partial(
        _from_pretrained(loader), device_map="cpu", dtype=getattr(torch, dtype) if dtype else None
    )


def _from_pretrained(loader: Any) -> Callable[..., Any]:
    function = loader.from_pretrained
    return function.func if isinstance(function, partial) else function


def train(job: TrainingJob) -> dict[str, Any]:
    """Train, and return the losses and the logits."""
    result = backend.train(job)
    return {"losses": result.losses, "logits": result.logits.values.tolist()}


def gradients(model_dir: Path, adapter_dir: Path, out: Path, stored_layers: int) -> dict[str, Any]:
    """Return the loss of a batch and its gradients, with the adapter in `adapter_dir`."""
    from pipeline.training import trainer
    from pipeline.training.loss import GattLoss, collate

    settings = SETTINGS.model_copy(update={"init_adapter": str(adapter_dir), "alpha": 8.0})
    job = replace(tiny_job(model_dir, out, settings), stored_layers=stored_layers)
    model, _ = backend._load_with_adapter(job)
    model.train()
    loss = GattLoss(model, settings, logits_per_chunk=3000)(collate(tiny_examples(), 0))
    loss.backward()
    grads = {
        name.replace(".default", ""): parameter.grad.flatten().tolist()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    layers = model.get_base_model().model.layers
    checkpointed = [bool(layer.gradient_checkpointing) for layer in layers]
    discarded = trainer._discard_activations(model)
    return {
        "loss": float(loss),
        "gradients": grads,
        "checkpointed": checkpointed,
        "discarded": [discarded, *(bool(layer.gradient_checkpointing) for layer in layers)],
    }


def interrupted_and_resumed(model_dir: Path, out: Path) -> dict[str, Any]:
    """Train a run that is cut off in step 4, then resume it."""

    def interrupt(step: Step) -> None:
        if step.number == 4:
            raise InterruptedError

    job = tiny_job(model_dir, out, SETTINGS)
    try:
        backend.train(replace(job, on_step=interrupt))
    except InterruptedError:
        return train(job)
    raise AssertionError("it was not interrupted")


def long_teacher_job(model_dir: Path, out: Path) -> TrainingJob:
    """Return a job whose teacher's chats are longer than `max_length`."""
    job = tiny_job(model_dir, out, SETTINGS)
    examples: list[TrainingExample] = []
    for example in job.examples:
        tokens = len(example.input_ids)
        shift = LONG_TEACHER_TOKENS - tokens
        examples.append(
            replace(
                example,
                teacher_ids=[*range(3, 3 + shift), *example.input_ids],
                alignment=[(n, n + shift) for n in range(tokens // 2, tokens)],
            )
        )
    return replace(job, examples=examples)


def overflowing_float16(model_dir: Path, out: Path) -> dict[str, Any]:
    """Train in float16 with a loss scale that is too high at first."""
    from pipeline.training import trainer

    trainer._FIRST_LOSS_SCALE = 2.0**40
    result = train(tiny_job(model_dir, out, SETTINGS))
    scale = json.loads((out / "checkpoints" / "checkpoint-4" / "loss_scale.json").read_text())
    trainer._FIRST_LOSS_SCALE = 2.0**16
    return result | {"scale": scale}


def main(folder: Path) -> None:
    """Run every case, and write each result as soon as it is there."""
    install_stand_ins()
    gc.freeze()
    llama, gemma, phi = folder / "llama", folder / "gemma", folder / "phi"
    sequences = [e.input_ids for e in tiny_examples()]
    use_dtype("float32")
    cases: dict[str, Callable[[Path], Any]] = {
        "llama": partial(gradients, llama, folder / "llama-adapter", stored_layers=0),
        "llama stored": partial(gradients, llama, folder / "llama-adapter", stored_layers=1),
        "gemma": partial(gradients, gemma, folder / "gemma-adapter", stored_layers=0),
        "uninterrupted": lambda out: train(tiny_job(llama, out, SETTINGS)),
        "resumed": partial(interrupted_and_resumed, llama),
        "long teacher": lambda out: train(long_teacher_job(llama, out)),
        "phi": lambda out: train(tiny_job(phi, out, SETTINGS)),
        "predicted": lambda _: backend.predict(
            llama, folder / "llama-adapter", sequences, load_in_4bit=True
        ).values.tolist(),
    }
    for name, case in cases.items():
        (folder / f"{name}.json").write_text(json.dumps(case(folder / name)))
    use_dtype("")
    half_precision: dict[str, Callable[[Path], Any]] = {
        "float16": lambda out: train(tiny_job(llama, out, SETTINGS)),
        "overflowing": partial(overflowing_float16, llama),
    }
    for name, case in half_precision.items():
        (folder / f"{name}.json").write_text(json.dumps(case(folder / name)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
