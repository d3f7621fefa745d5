"""A Llama of given sizes with random weights in 4 bits, as a checkpoint that Unsloth loads.

It is written as bitsandbytes and transformers save one that is quantized already (NF4, scales
quantized twice). All layers have the same random weights, so that 8 billion parameters take
seconds and 5.7 GB of disk instead of 16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from memory import RandomLlama

if TYPE_CHECKING:
    import torch

LLAMA_3_1_8B = RandomLlama(
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
TINY = RandomLlama(
    num_hidden_layers=2,
    hidden_size=128,
    intermediate_size=448,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1024,
)
MAX_POSITIONS = 131072
_STD = 0.02
_SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|pad|>")


def save_nf4_llama(sizes: RandomLlama, folder: Path) -> Path:
    """Write the model, its configuration and a tokenizer to `folder`; a shard per layer."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    folder.mkdir(parents=True, exist_ok=True)
    layer = _random_layer(sizes, device)
    shards: dict[str, dict[str, torch.Tensor]] = {
        f"layer-{n}.safetensors": {f"model.layers.{n}.{name}": t for name, t in layer.items()}
        for n in range(sizes.num_hidden_layers)
    }
    shards["rest.safetensors"] = {
        "model.embed_tokens.weight": _random(sizes.vocab_size, sizes.hidden_size, device).cpu(),
        "lm_head.weight": _random(sizes.vocab_size, sizes.hidden_size, device).cpu(),
        "model.norm.weight": torch.ones(sizes.hidden_size, dtype=torch.bfloat16),
    }
    _save_shards(shards, folder)
    (folder / "config.json").write_text(json.dumps(_config(sizes), indent=2))
    _save_tokenizer(folder)
    return folder


def _save_shards(shards: dict[str, dict[str, torch.Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    size = sum(
        t.numel() * t.element_size() for tensors in shards.values() for t in tensors.values()
    )
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(outputs: int, inputs: int, device: str) -> torch.Tensor:
    import torch

    return (torch.randn(outputs, inputs, device=device) * _STD).to(torch.bfloat16)


def _random_layer(sizes: RandomLlama, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer on the CPU, by their names within it."""
    import torch
    from bitsandbytes import functional

    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    kv_size = hidden // sizes.num_attention_heads * sizes.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer = {
        f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    for name, (outputs, inputs) in shapes.items():
        data, state = functional.quantize_4bit(
            _random(outputs, inputs, device),
            blocksize=64,
            compress_statistics=True,
            quant_type="nf4",
        )
        layer[f"{name}.weight"] = data.cpu()
        for key, tensor in state.as_dict(packed=True).items():
            layer[f"{name}.weight.{key}"] = tensor.cpu()
    return layer


def _config(sizes: RandomLlama) -> dict[str, object]:
    """Return the configuration of Llama 3.1 with other sizes, quantized with bitsandbytes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": sizes.num_hidden_layers,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }


def _save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of bytes: the benches train on token ids, and libraries want one."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end, pad = _SPECIAL_TOKENS
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad
    )
    wrapped.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    wrapped.save_pretrained(folder)


MODELS = {"8b": LLAMA_3_1_8B, "tiny": TINY}
"""The models of the bench by name."""


def main() -> None:
    """Write one of the models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    save_nf4_llama(MODELS[options.name], options.folder)


if __name__ == "__main__":
    main()
