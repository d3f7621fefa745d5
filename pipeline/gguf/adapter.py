"""A PEFT LoRA adapter by GGUF tensor names: to be added to a base, or written as a GGUF of its own.

Source of the file's form: llama.cpp's `convert_lora_to_gguf` as it comes with llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf.base import Array, Base, Tensor, row_order
from pipeline.gguf.checkpoint import Stored, mapped
from pipeline.gguf.vocabulary import read_object


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one matrix: `scale * b @ a`, with `a` (rank, inputs) and `b` (outputs, rank) in a mapped file.

    `order` says which row of `b` each row is; None where they are the same.
    """

    a: Stored
    b: Stored
    scale: float
    order: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Of the adapter."""
        return self.a.shape[0]

    def factors(self, first: int, last: int) -> tuple[Array, Array]:
        """`a`, and some rows of `b`.

        Raises:
            GattError: they hold NaN or infinity.
        """
        a = self.a.load(slice(None))
        b = self.b.load(slice(first, last) if self.order is None else self.order[first:last])
        if not (np.isfinite(a.sum()) and np.isfinite(b.sum())):
            raise GattError(f"{self.a.file}: the adapter holds NaN or infinity. Train again with a lower train.learning_rate.")
        return a, b

    def rows(self, first: int, last: int) -> Array:
        """Some rows of the change, (rows, inputs), float32."""
        a, b = self.factors(first, last)
        change: Array = np.matmul(b * np.float32(self.scale), a)
        return change


def read_adapter(folder: Path) -> dict[str, Delta]:
    """A PEFT LoRA adapter by the names of the modules that it changes.

    Raises:
        GattError: no adapter there, or one that is more than a LoRA.
    """
    settings = _settings(folder)
    tensors = mapped(folder / "adapter_model.safetensors")
    deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_B.weight"):
            continue
        if not key.endswith(".lora_A.weight"):
            raise GattError(f"{folder} holds {key}; only the two matrices of a LoRA can be merged (no DoRA, no embeddings).")
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = a.shape[0]
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        deltas[module] = Delta(a, tensors[key.replace("lora_A", "lora_B")], scale)
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
        if name not in shapes:
            raise GattError(
                f"The adapter changes {module}, which {base.name} ({base.architecture}) does not have: it is of another base."
            )
        if shapes[name] != delta.shape:
            raise GattError(f"{name}: the adapter is for {delta.shape}, {base.name} has {shapes[name]}: it is of another base.")
        fitted[name] = replace(delta, order=row_order(base, name, delta.shape[0]))
    return fitted


def _settings(folder: Path) -> dict[str, Any]:
    """What PEFT says of an adapter."""
    file = folder / "adapter_config.json"
    if not (file.is_file() and (folder / "adapter_model.safetensors").is_file()):
        raise GattError(f"No adapter in {folder}: adapter_config.json or adapter_model.safetensors is missing.")
    settings = read_object(file)
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if settings.get(name)]
    if patterns:
        raise GattError(f"{folder} has a {patterns[0]}: adapters of one rank and one alpha can be merged only.")
    return settings


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
            a, b = delta.factors(0, delta.shape[0])
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
        about = gguf.Metadata.load(None, folder, None, writer.get_total_parameter_count()[0])
        about.name = about.name or folder.name
        writer.add_type(gguf.GGUFType.ADAPTER)
        about.set_gguf_meta_model(writer)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp divides by the rank, whatever the adapter was trained with.
        scales = {delta.scale * delta.rank for delta in deltas.values()}
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scales.pop())
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
