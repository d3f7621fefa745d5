"""`adapter_model.safetensors` of a PEFT LoRA: every tensor has a known place, or is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pipeline.errors import GattError
from pipeline.gguf.huggingface.keys import is_within, text_model_key
from pipeline.gguf.huggingface.safetensors import SafetensorsTensor, open_safetensors
from pipeline.gguf.lora.delta import Delta, Replacement
from pipeline.gguf.lora.settings import WEIGHTS, LoraSettings, read_settings

T = TypeVar("T")

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)|(?P<tokens>token_adapter\.trainable_tokens_delta))"
)
_OF_TRAINING = re.compile(
    r".+\.(lora_velora_embed|lora_monteclora_sampler\..+|original_module\..+)"
)
"""Tensors that PEFT's merge does not read."""
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save)\.(?=(weight|bias)$)")
"""What PEFT puts around a module that it trains."""
_STORED = re.compile(r"[^:]+\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A LoRA by the names of the checkpoint that it belongs to.

    `deltas` are by module ("model.layers.0.mlp.up_proj"), `replacements` by tensor
    ("lm_head.weight").
    """

    settings: LoraSettings
    deltas: dict[str, Delta]
    replacements: dict[str, Replacement]

    def renamed(self, names: Mapping[str, str]) -> LoraAdapter:
        """Return it with other names for some of the checkpoint's weights."""
        deltas = {
            names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight"): delta
            for module, delta in self.deltas.items()
        }
        replacements = {names.get(name, name): value for name, value in self.replacements.items()}
        return replace(self, deltas=deltas, replacements=replacements)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding that the adapter brings along; 0 if it brings none."""
        return next(
            (
                replacement.values.shape[0]
                for name, replacement in self.replacements.items()
                if name.endswith(("embed_tokens.weight", "lm_head.weight"))
                and not replacement.indices
            ),
            0,
        )


def read_adapter(folder: Path) -> LoraAdapter:
    """Read the PEFT adapter in `folder`.

    Raises:
        GattError: no adapter there, a damaged one, or one that cannot be merged.
    """
    settings = read_settings(folder)
    file = folder / WEIGHTS
    tensors = open_safetensors(file)
    _require_values(file, tensors)
    parts: dict[str, dict[str, SafetensorsTensor]] = {}
    replacements = {}
    trained_names: dict[str, str] = {}
    for text_key, key in _text_keys(tensors).items():
        name, tensor = text_key.removeprefix(_PREFIX), tensors[key]
        if name == text_key:
            raise _unknown(file, key)
        if match := _PART.fullmatch(name):
            (kind, text), *_ = [(k, v) for k, v in match.groupdict().items() if v and k != "module"]
            part = f"{kind} {text}" if kind in ("linear", "embedding") else kind
            parts.setdefault(match["module"], {})[part] = tensor
            end = name.removeprefix(match["module"])
            trained_names[match["module"]] = key.removeprefix(_PREFIX).removesuffix(end)
        elif _OF_TRAINING.fullmatch(name):
            continue
        elif _STORED.fullmatch(name) and ".lora_" not in name:
            replacements[_WRAPPER.sub(".", name)] = Replacement(tensor)
        else:
            raise _unknown(file, key)
    deltas = {}
    for module, by_part in parts.items():
        if "tokens" in by_part:
            replacements[f"{module}.weight"] = _token_rows(settings, module, by_part["tokens"])
        else:
            replaced = f"{module}.weight" in replacements
            trained_name = trained_names[module]
            deltas[module] = _delta(file, settings, trained_name, by_part, replaced=replaced)
    _require_saved_modules(file, settings, [*deltas, *replacements])
    return LoraAdapter(settings, deltas, replacements)


def text_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of an adapter by their keys for a text model.

    One that was trained within a multimodal model has names of its own for it; its changes of other
    parts are left out.
    """
    return {text_key: tensors[key] for text_key, key in _text_keys(tensors).items()}


def _text_keys(keys: Collection[str]) -> dict[str, str]:
    """Return the keys of an adapter's tensors by those for a text model."""
    if not any(is_within(key.removeprefix(_PREFIX)) for key in keys):
        return {key: key for key in keys}
    text_keys = {key: text_model_key(key.removeprefix(_PREFIX)) for key in keys}
    return {f"{_PREFIX}{text_key}": key for key, text_key in text_keys.items() if text_key}


def _require_values(file: Path, tensors: dict[str, SafetensorsTensor]) -> None:
    """Refuse a file without values, as a trainer saves it that has not gathered its shards."""
    empty = next((key for key, tensor in tensors.items() if 0 in tensor.shape), "")
    if empty or not tensors:
        raise GattError(
            f"{file}: {f'{empty} has size 0' if empty else 'no tensors found'}; the matrices of a "
            "LoRA expected. DeepSpeed ZeRO-3 saves this where the weights were not gathered: "
            "set stage3_gather_16bit_weights_on_model_save, or recover them with zero_to_fp32.py."
        )


def _delta(
    file: Path,
    settings: LoraSettings,
    module: str,
    by_part: dict[str, SafetensorsTensor],
    *,
    replaced: bool,
) -> Delta:
    """Return the change of one module, by its name in training, which the patterns match.

    Where the file has the module's own weight, too (`replaced`), that one is already the residual.
    """
    embedding = any(part.startswith("embedding") for part in by_part)
    kind, label = ("embedding", "lora_embedding") if embedding else ("linear", "lora")
    a, b = by_part.get(f"{kind} A"), by_part.get(f"{kind} B")
    if a is None or b is None:
        present, absent = ("B", "A") if a is None else ("A", "B")
        raise GattError(
            f"{file}: {module} has {label}_{present} but no {label}_{absent}. The file is "
            "incomplete: save or download the adapter again."
        )
    magnitude = by_part.get("magnitude")
    if embedding and (magnitude or settings.dora):
        raise GattError(
            f"{file}: use_dora on the embedding {module} cannot be merged. "
            "Train with linear layers as targets."
        )
    if settings.dora != (magnitude is not None):
        state = "is" if settings.dora else "is not"
        raise GattError(
            f"{file}: use_dora {state} set, and {module} has "
            f"{'no ' if magnitude is None else 'a '}lora_magnitude_vector. "
            "Save the adapter again."
        )
    rank = settings.rank_of(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise GattError(
            f"{file}: {module} has matrices of {a.shape} and {b.shape}; rank {rank} expected by r "
            "and rank_pattern in adapter_config.json. The two files are of different adapters."
        )
    return Delta(
        a=a,
        b=b,
        scale=settings.scale_of(module),
        magnitude=magnitude,
        embedding=embedding,
        init="plain" if replaced or embedding else settings.init,
    )


def _token_rows(settings: LoraSettings, module: str, values: SafetensorsTensor) -> Replacement:
    """Return the rows of the trained tokens."""
    names = (name for name in settings.token_indices if f".{module}".endswith(f".{name}"))
    indices = tuple(settings.token_indices.get(next(names, ""), ()))
    if len(indices) != values.shape[0]:
        raise GattError(
            f"{settings.folder}: trainable_token_indices names {len(indices)} tokens of {module}, "
            f"the weights are of {values.shape[0]}. The two files are of different adapters."
        )
    return Replacement(values, indices)


def _require_saved_modules(file: Path, settings: LoraSettings, names: list[str]) -> None:
    """Check that the weights of every module in `modules_to_save` are there."""
    for module in settings.modules_to_save:
        if not any(f".{module}." in f".{name}." for name in names):
            raise GattError(
                f"{file}: modules_to_save names {module}, but its weights are missing. "
                "Save the adapter again."
            )


def _unknown(file: Path, key: str) -> GattError:
    return GattError(
        f"{file}: {key} found, which is not a name that PEFT gives to the weights of a LoRA "
        f"({_PREFIX}MODULE.lora_A.weight). Load the adapter where it was trained, and save it with "
        "PEFT's save_pretrained."
    )
