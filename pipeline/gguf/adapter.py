"""A PEFT LoRA adapter by GGUF tensor names: merged into a base, or written as a GGUF of its own.

Source of the file's layout: llama.cpp's `convert_lora_to_gguf` in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import GattError
from pipeline.files import whole_file
from pipeline.gguf.base import (
    CUT_TO_TOKENS,
    Array,
    Base,
    Metadata,
    Tensor,
    column_order,
    row_order,
)
from pipeline.gguf.huggingface.model_card import read_metadata
from pipeline.gguf.huggingface.stored import gguf_rows
from pipeline.gguf.lora.delta import Delta, Replacement
from pipeline.gguf.lora.settings import ADVICE
from pipeline.gguf.lora.weights import LoraAdapter, read_adapter

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_BY_TOKEN = (_EMBEDDING, _OUTPUT)
"""Tensors with one row per token."""

_NOT_APPLIED = ("per_layer_model_projection",)
"""Linear layers of Gemma 4 that llama.cpp multiplies without an adapter."""


def apply_adapter(
    adapter: LoraAdapter, base: Base, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], dict[str, Delta]]:
    """Return the tensors of `base` with those that the adapter replaces, and its changes by name.

    A base whose output matrix is its embedding gets one of its own where the adapter changes only
    one of the two.

    Raises:
        GattError: the base lacks a tensor, has it in another shape, or cannot store the change.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    to_gguf = _namer(base, by_name)
    replacements = {to_gguf(key): value for key, value in adapter.replacements.items()}
    deltas = {to_gguf(f"{module}.weight"): delta for module, delta in adapter.deltas.items()}
    if _OUTPUT not in by_name:
        _untie(base, by_name, replacements, deltas)
    for name, replacement in replacements.items():
        by_name[name] = _replaced(base, by_name[name], replacement)
    rows = {by_name[name].rows for name in _BY_TOKEN if name in by_name}
    if len(rows) > 1:
        raise GattError(
            f"{adapter.settings.folder} has a vocabulary of {max(rows)} rows for one of embedding "
            f"and output, the other has {min(rows)}. Train with modules_to_save = "
            '["embed_tokens", "lm_head"].'
        )
    for name, delta in deltas.items():
        tensor = by_name[name]
        if not _fits(base, name, delta.shape, tensor.shape):
            raise _wrong_shape(base, name, delta.shape, tensor.shape)
        outputs, inputs = delta.shape
        deltas[name] = replace(
            delta,
            order=row_order(base, name, outputs),
            columns=column_order(base, name, inputs),
        )
    return list(by_name.values()), deltas


def _namer(base: Base, present: Container[str]) -> Callable[[str], str]:
    """Return a function from a checkpoint's tensor names to those of the base's GGUF."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[base.architecture.upper()], base.layers)

    def to_gguf(key: str) -> str:
        name = str(names.get_name(key, try_suffixes=(".weight", ".bias")))
        if key == "lm_head.weight":
            return _OUTPUT  # Gemma 2 has no name for it
        if name not in present and ".experts." in key:
            raise GattError(
                f"The adapter changes {key.removesuffix('.weight')}, one of the experts of "
                f"{base.name}, which cannot be merged one by one. {ADVICE}"
            )
        if name not in present:
            raise GattError(
                f"The adapter changes {key.removesuffix('.weight')}, which {base.name} "
                f"({base.architecture}) does not have: it is of another base."
            )
        return name

    return to_gguf


def _untie(
    base: Base,
    by_name: dict[str, Tensor],
    replacements: dict[str, Replacement],
    deltas: dict[str, Delta],
) -> None:
    """Give a base without an output matrix one of its own, if the adapter's differs."""
    embedding, output = replacements.get(_EMBEDDING), replacements.get(_OUTPUT)
    changed = deltas.keys() & _BY_TOKEN
    if embedding and output and not changed and _equal(embedding, output):
        del replacements[_OUTPUT]
        return
    # PEFT trains chosen tokens of the embedding and of a tied output as one.
    if not changed and not output and (embedding is None or embedding.indices):
        return
    if base.family.without_head:
        raise GattError(
            f"The adapter changes one of embedding and output (lm_head), which are one matrix in "
            f"{base.name}, and llama.cpp has no second one for {base.architecture}. Train without "
            "embed_tokens and lm_head."
        )
    tied = by_name[_EMBEDDING]
    by_name[_OUTPUT] = Tensor(_OUTPUT, tied.shape, tied.load)


def _equal(a: Replacement, b: Replacement) -> bool:
    return a.indices == b.indices and np.array_equal(a.values.data, b.values.data)


def _replaced(base: Base, tensor: Tensor, replacement: Replacement) -> Tensor:
    """Return a tensor with the adapter's values, in llama.cpp's layout."""
    name, shape = tensor.name, replacement.values.shape
    by_token = name in _BY_TOKEN and shape[1:] == tensor.shape[1:]
    if by_token:
        replacement = replacement.for_rows(tensor.rows)
    if replacement.indices:
        if shape[1:] != tensor.shape[1:] or max(replacement.indices) >= tensor.rows:
            raise _wrong_shape(base, name, shape, tensor.shape)
        return Tensor(name, tensor.shape, partial(_load_patched, tensor, replacement))
    if by_token:
        cut = base.architecture in CUT_TO_TOKENS
        rows = min(shape[0], tensor.rows) if cut else shape[0]
        shape = (rows, *shape[1:])
    elif shape != tensor.shape:
        raise _wrong_shape(base, name, shape, tensor.shape)
    return Tensor(name, shape, gguf_rows(base, name, shape, replacement.load))


def _load_patched(tensor: Tensor, replacement: Replacement, first: int, last: int) -> Array:
    return replacement.patch(tensor.load(first, last), first)


def _fits(base: Base, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    spare = base.architecture in CUT_TO_TOKENS and name in _BY_TOKEN and shape[0] > expected[0]
    return shape == expected or (spare and shape[1:] == expected[1:])


def _wrong_shape(
    base: Base, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> GattError:
    return GattError(
        f"{name}: the adapter is for {shape}, {base.name} has {expected}: it is of another base."
    )


def missing_from_gguf(folder: Path) -> str:
    """Return why an adapter cannot be a GGUF of its own, "" if it can.

    llama.cpp adds low-rank changes of matrices that the base has, and nothing else.
    """
    adapter = read_adapter(folder)
    if adapter.settings.dora:
        return "is a DoRA, and llama.cpp applies only LoRA adapters"
    if adapter.settings.init != "plain":
        return f"starts from a base that {adapter.settings.init} changed"
    if adapter.replacements:
        return f"replaces {', '.join(sorted(adapter.replacements)[:3])}, not only adds to matrices"
    not_applied = [m for m in adapter.deltas if m.endswith(_NOT_APPLIED)]
    if not_applied:
        return f"changes {not_applied[0]}, to which llama.cpp applies no adapter"
    by_token = [m for m in adapter.deltas if m.endswith(("embed_tokens", "lm_head"))]
    if by_token:
        return f"changes {by_token[0]}, which a base with one matrix for both cannot have apart"
    return ""


def write_adapter(base: Base, folder: Path, target: Path, metadata: Metadata | None = None) -> None:
    """Write the adapter alone as a GGUF in F32, which llama.cpp applies to the base's own file.

    `metadata` replaces what the folder's model card says. The base in that card is left out, as it
    may be a path on this machine.

    Raises:
        GattError: as `read_adapter` and `apply_adapter`, or it is more than llama.cpp can apply.
    """
    import gguf

    if reason := missing_from_gguf(folder):
        raise GattError(f"{folder} {reason}. Merge it with `gatt export`.")
    _, deltas = apply_adapter(read_adapter(folder), base, list(base.tensors()))
    # llama.cpp has one alpha for all matrices, and divides it by the rank of each, also where
    # training divided by its root (rsLoRA).
    alphas = [delta.scale * delta.rank for delta in deltas.values()]
    with whole_file(target) as draft:
        writer = gguf.GGUFWriter(draft, base.architecture)
        for (name, delta), alpha in zip(deltas.items(), alphas, strict=True):
            a, b = delta.factors(0, delta.shape[0])
            writer.add_tensor(f"{name}.lora_a", a)
            scaled = b * np.float32(alpha / alphas[0])
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(scaled))
        card = read_metadata(folder, writer.get_total_parameter_count()[0])
        card.base_models = None
        tags = [tag for tag in card.tags or () if not str(tag).startswith("base_model:")]
        card.tags = tags or None
        for key, value in (metadata or {}).items():
            setattr(card, key, value)
        writer.add_type(gguf.GGUFType.ADAPTER)
        card.set_gguf_meta_model(writer)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alphas[0])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
