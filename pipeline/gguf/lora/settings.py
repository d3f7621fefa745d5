"""`adapter_config.json` of a PEFT LoRA, and what each setting means for a merge.

Source: `LoraConfig` of PEFT 0.21. A setting that a merge cannot follow is refused by its name, and
so is one that this version does not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import GattError
from pipeline.gguf.base import JsonObject
from pipeline.gguf.huggingface.config import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

FOLLOWED = frozenset(
    (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "init_lora_weights",
        "peft_type",
        "base_model_name_or_path",
        "revision",
    )
)
"""Settings that the merge follows."""
WITHOUT_EFFECT = frozenset(
    (
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "monteclora_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    )
)
"""Settings of training alone, or that the stored weights show; PEFT's merge does not read them.

`fan_in_fan_out` is for GPT-2's layers, and PEFT unsets it for the others."""
REFUSED = {
    "alora_invocation_tokens": "an aLoRA works from its invocation tokens on, a merge everywhere",
    "arrow_config": "Arrow chooses among several adapters for each token",
    "kasa_config": "KaSA truncates the weights of the base",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "it trains a bias for every matrix, and most bases have none",
    "megatron_config": "Megatron's layers are not those of the checkpoint",
    "target_parameters": "it trains parameters that are not linear layers, such as the experts of "
    "a mixture in one tensor",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "use_qalora": "QA-LoRA pools the inputs in groups",
}
"""Settings that a merge cannot follow, with the reason."""
_PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
"""Initializations that leave the base as it is."""
ADVICE = (
    "Merge it with the program that trained it, and export the merged folder "
    "(gatt export --model FOLDER)."
)

Init = Literal["plain", "pissa", "olora"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """What a merge needs of `adapter_config.json`.

    `rank` and `alpha` hold where no pattern matches a module. `init` tells what the base was while
    the adapter was trained: itself, or what PiSSA or OLoRA left of it. `base` is what the adapter
    calls its base model, "" if nothing."""

    folder: Path
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    init: Init
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]
    token_indices: dict[str, list[int]]
    base: str
    revision: str

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        return self.rank_pattern.get(_match(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """Return what `B @ A` of a module is multiplied by."""
        alpha = self.alpha_pattern.get(_match(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(folder: Path) -> LoraSettings:
    """Read the settings of the adapter in `folder`.

    Raises:
        GattError: no adapter there, or one that cannot be merged.
    """
    _require_files(folder)
    file = folder / CONFIG
    settings = read_object(file)
    _check_names(file, settings)
    alpha = _number(file, settings.get("lora_alpha"), "lora_alpha")
    patterns = {
        name: _pattern(file, settings.get(name) or {}, name)
        for name in ("rank_pattern", "alpha_pattern")
    }
    indices = settings.get("trainable_token_indices") or {}
    return LoraSettings(
        folder=folder,
        rank=_rank(file, settings.get("r"), "r"),
        alpha=alpha,
        rslora=bool(settings.get("use_rslora")),
        dora=bool(settings.get("use_dora")),
        init=_init(file, settings),
        rank_pattern={
            key: _rank(file, value, "rank_pattern")
            for key, value in patterns["rank_pattern"].items()
        },
        alpha_pattern=patterns["alpha_pattern"],
        modules_to_save=tuple(settings.get("modules_to_save") or ()),
        token_indices=indices if isinstance(indices, dict) else {"embed_tokens": indices},
        base=settings.get("base_model_name_or_path") or "",
        revision=settings.get("revision") or "",
    )


def _require_files(folder: Path) -> None:
    """Check that the folder has the two files of an adapter; if not, say what is there."""
    if folder.is_file():
        raise GattError(
            f"No adapter in {folder}, which is a file. Name the folder of a PEFT LoRA: "
            f"{CONFIG} and {WEIGHTS}."
        )
    names = (CONFIG, WEIGHTS)
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        empty = [name for name in names if not (folder / name).stat().st_size]
        if empty:
            raise GattError(f"{folder / empty[0]} has 0 bytes. Save or download the adapter again.")
        return
    raise GattError(
        f"No adapter in {folder}: {' and '.join(missing)} missing. {_describe_content(folder)}"
    )


def _describe_content(folder: Path) -> str:
    """Say what a folder without an adapter's files holds, and what to do."""
    if (folder / "adapters.safetensors").is_file():
        return (
            "adapters.safetensors is in the format of mlx-lm. Fuse it with `mlx_lm.fuse --model "
            f"BASE --adapter-path {folder} --save-path MERGED`, and export MERGED with --model."
        )
    if (folder / "adapter_model.bin").is_file():
        return (
            "adapter_model.bin is a pickle, which may run code. Load it with PEFT where you trust "
            f"it, and call save_pretrained, which writes {WEIGHTS}."
        )
    if (folder / "config.json").is_file():
        return "The folder holds a model: give it with --model, without --adapter."
    inner = next(iter(sorted(folder.glob(f"*/{WEIGHTS}"))), None)
    if inner:
        return f"There is one in {inner.parent}: name that folder."
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    if gguf:
        return f"{gguf.name} cannot be merged. Name the PEFT folder that it was made of."
    return "Name the folder to which PEFT (or Unsloth, TRL, Axolotl) saved the adapter."


def _check_names(file: Path, settings: JsonObject) -> None:
    """Refuse what is not a LoRA, and settings that are unknown or cannot be followed."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise GattError(
            f"{file}: peft_type = {kind!r} found, 'LORA' expected; only LoRA and DoRA can be "
            f"merged. {ADVICE}"
        )
    for name, value in settings.items():
        if name in FOLLOWED or name in WITHOUT_EFFECT or not value:
            continue
        reason = REFUSED.get(name, "this version does not know the setting")
        raise GattError(f"{file}: {name} = {value!r} cannot be merged: {reason}. {ADVICE}")


def _init(file: Path, settings: JsonObject) -> Init:
    """Return what the initialization made of the base.

    Raises:
        GattError: something that the adapter alone does not tell.
    """
    init = str(settings.get("init_lora_weights", True)).lower()
    if init in ("pissa", "olora"):
        return "pissa" if init == "pissa" else "olora"
    if init in _PLAIN_INITS:
        return "plain"
    raise GattError(
        f"{file}: init_lora_weights = {init!r} cannot be merged: it changes the base in a way "
        "that is not saved. Save the adapter again with PEFT's save_pretrained(FOLDER, "
        "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA. Or: " + ADVICE
    )


def _pattern(file: Path, pattern: object, name: str) -> dict[str, float]:
    """Check that a pattern maps regular expressions to numbers."""
    if not isinstance(pattern, dict):
        raise GattError(f"{file}: {name} = {pattern!r} found; modules with numbers expected.")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise GattError(
                f"{file}: {name} has {key!r}, which is not a regular expression ({error})."
            ) from error
    return {key: _number(file, value, name) for key, value in pattern.items()}


def _number(file: Path, value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        state = "is missing" if value is None else f"is {value!r}"
        raise GattError(
            f"{file}: {name} {state}; a number expected. Without it the strength of the adapter "
            "is not known. Write the value of its training into the file."
        )
    return value


def _rank(file: Path, value: object, name: str) -> int:
    rank = _number(file, value, name)
    if rank != int(rank) or rank < 1:
        raise GattError(f"{file}: {name} holds {rank}; a whole number above 0 expected.")
    return int(rank)


def _match(patterns: Iterable[str], module: str) -> str:
    """Return the first of the patterns that matches the end of a module's name, as PEFT does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
