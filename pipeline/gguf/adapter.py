"""A PEFT LoRA adapter by GGUF tensor names: merged into a base, or written as a GGUF of its own.

Source of the file's layout: llama.cpp's `convert_lora_to_gguf` in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf.base import Array, Base, JsonObject, RowOrder, Tensor, row_order
from pipeline.gguf.checkpoint import SafetensorsTensor, open_safetensors
from pipeline.gguf.vocabulary import read_object

_MAGNITUDE = ".lora_magnitude_vector"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What an adapter adds to one matrix: `scale * b @ a`, with `a` (rank, inputs), `b` (outputs,
    rank).

    A DoRA (Liu et al. 2024, section 4.1) then gives each row of the sum the length in `magnitude`
    (outputs). `order` has the row of `b` for each row of the matrix; None where they are the same.
    """

    a: SafetensorsTensor
    b: SafetensorsTensor
    scale: float
    magnitude: SafetensorsTensor | None = None
    order: RowOrder | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the adapter."""
        return self.a.shape[0]

    def factors(self, first: int, last: int) -> tuple[Array, Array]:
        """Return `a`, and some rows of `b`.

        Raises:
            GattError: they hold NaN or infinity.
        """
        a, b = self.a.load(slice(None)), self.b.load(self._adapter_rows(first, last))
        if not (np.isfinite(a.sum()) and np.isfinite(b.sum())):
            raise GattError(
                f"{self.a.file}: the adapter holds NaN or infinity. "
                "Train again with a lower train.learning_rate."
            )
        return a, b

    def change(self, weights: Array, first: int, last: int) -> Array:
        """Return what is added to some rows of the matrix, `weights` (rows, inputs), in float32."""
        a, b = self.factors(first, last)
        change: Array = np.matmul(b * np.float32(self.scale), a)
        if self.magnitude is None:
            return change
        total = weights + change
        magnitude = self.magnitude.load(slice(None))[0][self._adapter_rows(first, last)]
        lengths = magnitude / np.linalg.norm(total, axis=1)
        scaled: Array = total * lengths[:, None] - weights
        return scaled

    def _adapter_rows(self, first: int, last: int) -> slice | RowOrder:
        return slice(first, last) if self.order is None else self.order[first:last]


def read_adapter(folder: Path) -> dict[str, Delta]:
    """Return the changes of a PEFT adapter by the names of the modules.

    Raises:
        GattError: no adapter there, or one that is more than a LoRA or a DoRA.
    """
    settings = _read_settings(folder)
    tensors = open_safetensors(folder / "adapter_model.safetensors")
    deltas = {}
    for key, a in tensors.items():
        if key.endswith((".lora_B.weight", _MAGNITUDE)):
            continue
        if not key.endswith(".lora_A.weight"):
            raise GattError(
                f"{folder} holds {key}; only the matrices of a LoRA or a DoRA can be merged, "
                "not embeddings."
            )
        module = key.removesuffix(".lora_A.weight")
        rank = a.shape[0]
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        deltas[module.removeprefix("base_model.model.")] = Delta(
            a=a,
            b=tensors[f"{module}.lora_B.weight"],
            scale=scale,
            magnitude=tensors.get(module + _MAGNITUDE),
        )
    return deltas


def to_gguf_names(
    deltas: dict[str, Delta], base: Base, tensors: Iterable[Tensor]
) -> dict[str, Delta]:
    """Return the changes by GGUF tensor name, with the rows of q and k in llama.cpp's order.

    Raises:
        GattError: the base does not have a matrix, or has it in another shape.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[base.architecture.upper()], base.layers)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    renamed = {}
    for module, delta in deltas.items():
        name = f"{names.get_name(module)}.weight"
        if name not in shapes:
            raise GattError(
                f"The adapter changes {module}, which {base.name} ({base.architecture}) does not "
                "have: it is of another base."
            )
        if shapes[name] != delta.shape:
            raise GattError(
                f"{name}: the adapter is for {delta.shape}, {base.name} has {shapes[name]}: "
                "it is of another base."
            )
        renamed[name] = replace(delta, order=row_order(base, name, delta.shape[0]))
    return renamed


def _read_settings(folder: Path) -> JsonObject:
    """Read PEFT's configuration of an adapter."""
    file = folder / "adapter_config.json"
    if not (file.is_file() and (folder / "adapter_model.safetensors").is_file()):
        raise GattError(
            f"No adapter in {folder}: adapter_config.json or adapter_model.safetensors is missing."
        )
    settings = read_object(file)
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if settings.get(name)]
    if patterns:
        raise GattError(
            f"{folder} has a {patterns[0]}; "
            "only adapters with one rank and one alpha can be merged."
        )
    return settings


def is_dora(folder: Path) -> bool:
    """Return whether an adapter is a DoRA, which can be merged but not written as a GGUF.

    llama.cpp applies only LoRA adapters at run time.
    """
    return bool(_read_settings(folder).get("use_dora"))


def write_adapter(base: Base, folder: Path, target: Path) -> None:
    """Write the adapter alone as a GGUF in F32, which llama.cpp applies to the base's own file.

    Raises:
        GattError: as `read_adapter` and `to_gguf_names`, or a DoRA.
    """
    import gguf

    if is_dora(folder):
        raise GattError(
            f"{folder} is a DoRA, and llama.cpp applies only LoRA adapters. "
            "Merge it with `gatt export`."
        )
    deltas = to_gguf_names(read_adapter(folder), base, base.tensors())
    with whole_file(target) as draft:
        writer = gguf.GGUFWriter(draft, base.architecture)
        for name, delta in deltas.items():
            a, b = delta.factors(0, delta.shape[0])
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
        metadata = gguf.Metadata.load(None, folder, None, writer.get_total_parameter_count()[0])
        metadata.name = metadata.name or folder.name
        writer.add_type(gguf.GGUFType.ADAPTER)
        metadata.set_gguf_meta_model(writer)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp divides alpha by the rank, also where training divided by its root (rsLoRA).
        alphas = {delta.scale * delta.rank for delta in deltas.values()}
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alphas.pop())
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
