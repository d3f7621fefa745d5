"""Faster LoRA projections on a CPU, with the same numbers.

In 4 bits, bitsandbytes dequantizes a matrix whenever it multiplies, three times a step with
"distill", and PEFT copies the product. In both, PEFT multiplies the adapter's product by its scale
even if that is 1.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora.bnb import Linear4bit
    from peft.tuners.lora.layer import Linear


def speed_up_projections(model: PeftModel, *, dequantize: bool) -> None:
    """Replace the forward pass of all plain LoRA layers while `model` trains.

    With `dequantize` each matrix in 4 bits is dequantized once, here, and stays so.
    """
    from peft.tuners.lora.bnb import Linear4bit
    from peft.tuners.lora.layer import Linear

    for layer in model.modules():
        if isinstance(layer, Linear4bit | Linear) and not layer.lora_variant:  # DoRA is a variant
            is_4bit = isinstance(layer, Linear4bit)
            weight = _dequantized(layer) if is_4bit and dequantize else None
            layer.forward = partial(_forward, layer, weight)  # type: ignore[method-assign]


def _dequantized(layer: Linear4bit) -> torch.Tensor:
    """Return the base weight (outputs, inputs) in the format that it was quantized from."""
    from bitsandbytes.functional import dequantize_4bit

    weight = layer.get_base_layer().weight
    dequantized: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return dequantized


def _forward(
    layer: Linear4bit | Linear,
    weight: torch.Tensor | None,
    x: torch.Tensor,
    *args: object,
    **kwargs: object,
) -> torch.Tensor:
    """Return what the layer's own forward pass returns; `weight` is the dequantized base."""
    if not layer.training:  # bitsandbytes has a kernel of its own then
        result: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    base = layer.get_base_layer()
    if weight is None:
        result = base(x)
    else:
        bias = None if base.bias is None else base.bias.to(weight.dtype)
        result = functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
    if layer.disable_adapters:
        return result
    for name in layer.active_adapters:
        lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
        inputs = layer._cast_input_dtype(x, lora_a.weight.dtype)
        update = lora_b(lora_a(layer.lora_dropout[name](inputs)))
        if layer.scaling[name] != 1:
            update = update * layer.scaling[name]
        result = result + update.to(result.dtype)
    return result
