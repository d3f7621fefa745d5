"""A PEFT LoRA adapter by GGUF tensor names: to be added to a base, or written as a GGUF of its own.

Source of the file's form: llama.cpp's `convert_lora_to_gguf` as it comes with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf.base import Array, Base, Tensor, row_order


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one matrix: `scale * b @ a`, with `a` (rank, inputs) and `b` (outputs, rank)."""

    a: Array
    b: Array
    scale: float

    def rows(self, first: int, last: int) -> Array:
        """Some rows of the change, (rows, inputs), float32."""
        return np.matmul(self.b[first:last] * np.float32(self.scale), self.a, dtype=np.float32)


def read_adapter(folder: Path) -> dict[str, Delta]:
    """A PEFT LoRA adapter by the names of the modules that it changes.

    Raises:
        GattError: no adapter there, one that is more than a LoRA, or one that holds NaN.
    """
    settings, tensors = _files(folder)
    deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_B.weight"):
            continue
        if not key.endswith(".lora_A.weight"):
            raise GattError(f"{folder} holds {key}; only the two matrices of a LoRA can be merged (no DoRA, no embeddings).")
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[key.replace("lora_A", "lora_B")].astype(np.float32)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise GattError(f"{module}: the adapter holds NaN or infinity. Train again with a lower train.learning_rate.")
        scale = settings["lora_alpha"] / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a))
        deltas[module] = Delta(a.astype(np.float32), b, scale)
    return deltas


def fit(deltas: dict[str, Delta], base: Base, tensors: Iterable[Tensor]) -> dict[str, Delta]:
    """The same by GGUF tensor name; the rows of q and k stand as llama.cpp stores them.

    Raises:
        GattError: a matrix that has no place in the base, or is of another shape than the base's.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[base.architecture.upper()], base.layers)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    fitted = {}
    for module, delta in deltas.items():
        name = f"{names.get_name(module)}.weight"
        change = (len(delta.b), delta.a.shape[1])
        if name not in shapes:
            raise GattError(
                f"The adapter changes {module}, which {base.name} ({base.architecture}) does not have: it is of another base."
            )
        if shapes[name] != change:
            raise GattError(f"{name}: the adapter is for {change}, {base.name} has {shapes[name]}: it is of another base.")
        order = row_order(base, name, len(delta.b))
        fitted[name] = delta if order is None else Delta(delta.a, delta.b[order], delta.scale)
    return fitted


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the tensors of a PEFT folder."""
    from safetensors.numpy import load_file

    try:
        settings = dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
        tensors = load_file(folder / "adapter_model.safetensors")
    except OSError as error:
        raise GattError(f"No adapter in {folder} ({error}). `gatt train` writes one.") from error
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if settings.get(name)]
    if patterns:
        raise GattError(f"{folder} has a {patterns[0]}: adapters of one rank and one alpha can be merged only.")
    return settings, tensors


def write_adapter(base: Base, folder: Path, target: Path) -> None:
    """Write the adapter alone as a GGUF in F32, which llama.cpp lays over the base's own file.

    Raises:
        GattError: as `read_adapter` and `fit`.
    """
    import gguf

    deltas = fit(read_adapter(folder), base, base.tensors())
    with whole_file(target) as draft:
        writer = gguf.GGUFWriter(draft, base.architecture)
        for name, delta in deltas.items():
            writer.add_tensor(f"{name}.lora_a", delta.a)
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(delta.b))
        about = gguf.Metadata.load(None, folder, None, writer.get_total_parameter_count()[0])
        about.name = about.name or folder.name
        writer.add_type(gguf.GGUFType.ADAPTER)
        about.set_gguf_meta_model(writer)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp divides by the rank, whatever the adapter was trained with.
        scales = {delta.scale * len(delta.a) for delta in deltas.values()}
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scales.pop())
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
