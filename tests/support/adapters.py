"""Random adapters that PEFT makes, and what PEFT merges them to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.gguf.base import Array, JsonObject
from pipeline.gguf.gguf_base import GgufBase
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model

if TYPE_CHECKING:
    from peft import PeftModel

_TRAINED = ("lora_", "modules_to_save", "trainable_tokens")
"""Parts of the names of what PEFT trains."""


class Adapted(NamedTuple):
    """A PEFT adapter in `folder`, and PEFT's model with it."""

    folder: Path
    model: PeftModel


def make_adapter(base: Path, folder: Path, settings: JsonObject) -> Adapted:
    """Save a random adapter with these settings of `LoraConfig` for the model in `base`."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3)
    values: JsonObject = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    wrapped = peft.get_peft_model(network, peft.LoraConfig(**values))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            bias = "bias" in name and "bias" in settings
            if bias or any(part in name for part in _TRAINED):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return Adapted(folder, wrapped.eval())


def change_settings(folder: Path, settings: JsonObject) -> None:
    """Write some settings into a saved adapter's configuration; "absent" removes one."""
    file = folder / "adapter_config.json"
    merged = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps({k: v for k, v in merged.items() if v != "absent"}))


def gguf_weights(base: Path, adapter: Path | None, file: Path) -> dict[str, Array]:
    """Return the weights that a merge writes in F32, by GGUF name."""
    write_formats(Model(base.name, base), adapter, {"F32": file})
    return {tensor.name: tensor.load(0, tensor.rows) for tensor in GgufBase(file).tensors()}


def save_merged(base: Path, model: PeftModel, folder: Path) -> None:
    """Save what PEFT merges, with the tokenizer of `base`."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("model*"))
    model.merge_and_unload().save_pretrained(folder)


def assert_close(
    actual: dict[str, Array], expected: dict[str, Array], tolerance: float = 2e-6
) -> None:
    """Check that two sets of weights are the same up to rounding in float32."""
    assert actual.keys() == expected.keys()
    for name, weights in expected.items():
        np.testing.assert_allclose(actual[name], weights, rtol=1e-4, atol=tolerance, err_msg=name)
