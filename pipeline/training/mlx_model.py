"""A model in MLX: loaded from a Hugging Face folder in 4 bits, its adapter in PEFT's format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import GattError
from pipeline.files import write_json
from pipeline.recipe import Train
from pipeline.training import unsloth
from pipeline.training.job import adapter_weights

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn


def load_base(model_dir: Path, max_length: int, *, load_in_4bit: bool) -> mlx.nn.Module:
    """Return the base model in 4 or 16 bits, for chats of at most `max_length` tokens."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        for file in model_dir.iterdir():
            (Path(scratch) / file.name).symlink_to(file.resolve())
        (Path(scratch) / "config.json").unlink()
        write_json(Path(scratch) / "config.json", mlx_config(config, max_length))
        model, _ = unsloth.load_unsloth().from_pretrained(
            scratch, max_seq_length=max_length, load_in_4bit=load_in_4bit, local_files_only=True
        )
    return model


def mlx_config(config: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Return a model's configuration with the rotary embedding as MLX reads it.

    transformers 5 writes its settings as `rope_parameters`. MLX only knows the older keys, and
    would use its defaults without a warning. Of the two lists of factors of Phi's "longrope" it
    always takes the one for long texts; here it is given the one that transformers takes.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    older = dict(config)
    if "rope_theta" in rope:
        older["rope_theta"] = rope["rope_theta"]
        older["rope_scaling"] = rope if kind != "default" else None
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        factor = "short_factor" if original and max_length <= original else "long_factor"
        older["rope_scaling"] = {**rope, "type": kind, "long_factor": rope[factor]}
        if original:
            older["original_max_position_embeddings"] = original
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return older


def linear_layers(model: mlx.nn.Module) -> set[str]:
    """Return the names of the linear layers in the model's blocks, without their path."""
    import mlx.nn

    linear = (mlx.nn.Linear, mlx.nn.QuantizedLinear)
    paths = (name for name, module in model.named_modules() if isinstance(module, linear))
    return {path.rsplit(".", 1)[-1] for path in paths if path != "lm_head"}


class _AdapterMatrix(NamedTuple):
    """A LoRA matrix under both libraries' names. PEFT stores it transposed."""

    peft_name: str
    mlx_name: str
    matrix: mx.array


def _adapter_matrices(model: mlx.nn.Module) -> Iterator[_AdapterMatrix]:
    import mlx.utils

    for name, matrix in mlx.utils.tree_flatten(model.trainable_parameters()):
        module, side = name.rsplit(".lora_", 1)
        yield _AdapterMatrix(f"base_model.model.{module}.lora_{side.upper()}.weight", name, matrix)


def save_adapter(model: mlx.nn.Module, folder: Path, settings: Train) -> None:
    """Write the adapter as PEFT does."""
    import mlx.core as mx

    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"),
        {row.peft_name: mx.contiguous(row.matrix.T) for row in _adapter_matrices(model)},
        metadata={"format": "pt"},
    )
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": settings.rank,
            "lora_alpha": settings.alpha or settings.rank,
            "lora_dropout": settings.dropout,
            "use_rslora": settings.rslora,
            "target_modules": _target_modules(model),
        },
    )


def _target_modules(model: mlx.nn.Module) -> list[str]:
    """Return the names of the adapted layers, without their path."""
    modules = (row.mlx_name.rsplit(".lora_", 1)[0] for row in _adapter_matrices(model))
    return sorted({module.rsplit(".", 1)[-1] for module in modules})


def load_adapter(model: mlx.nn.Module, folder: Path) -> None:
    """Load an adapter that PEFT wrote.

    Raises:
        GattError: there is none, or it differs in rank, target modules or base model.
    """
    import mlx.core as mx

    weights = mx.load(str(adapter_weights(folder)))
    expected = list(_adapter_matrices(model))
    actual_shapes = {name: matrix.shape for name, matrix in weights.items()}
    if actual_shapes != {row.peft_name: row.matrix.T.shape for row in expected}:
        raise GattError(
            f"train.init_adapter: {folder} is of another rank, other targets or another base model "
            "than the recipe's. Set train.rank and train.target_modules as it has them."
        )
    model.load_weights(
        [(row.mlx_name, mx.contiguous(weights[row.peft_name].T)) for row in expected],
        strict=False,
    )
