"""The map of attention is what transformers itself computes, folded layer by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import GattError
from pipeline.evaluation.attention import BIN, attention_map
from pipeline.records import Message
from pipeline.training.unsloth import nf4_round_trip

_CHAT: list[Message] = [
    {"role": "user", "content": "x x x pay and 2,026. Say y!"},
    {"role": "assistant", "content": "y, I'll pay 35.50"},
    {"role": "user", "content": "It's x?"},
    {"role": "assistant", "content": "y y y naïve"},
]


@pytest.mark.parametrize("tuned", [False, True])
def test_it_is_the_maximum_over_heads_and_layers(
    tuned: bool, tiny_llama: Path, tiny_adapter: Path
) -> None:
    import peft
    import torch
    import transformers

    found = attention_map(tiny_llama, tiny_adapter if tuned else None, _CHAT, "Say y!")
    network = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    if tuned:
        for layer in network.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = torch.from_numpy(
                        nf4_round_trip(module.weight.detach().numpy())
                    )
        network = peft.PeftModel.from_pretrained(network, tiny_adapter)
    text = tokenizer.apply_chat_template(_CHAT, tokenize=False)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    with torch.no_grad():
        layers = network(torch.tensor([coded["input_ids"]]), output_attentions=True).attentions
    weights = torch.cat(layers).numpy()  # (layers, heads, tokens, tokens)
    strongest = weights.max((0, 1))
    spans = [(text.index(t), text.index(t) + len(t) + len("<|end|>")) for t in ("y, I'll", "y y y")]
    spans[0] = (spans[0][0], text.index("<|end|>user: It's") + len("<|end|>"))
    spans[1] = (spans[1][0], len(text))
    told = text.index("Say y!")
    inside = [
        n
        for n, (left, right) in enumerate(coded["offset_mapping"])
        if left < told + 6 and right > told and left < right
    ]
    assert found.instruction == (inside[0] // BIN, inside[-1] // BIN)
    rows = 0
    for turn, (start, end) in enumerate(spans, 1):
        tokens = [
            n
            for n, (left, right) in enumerate(coded["offset_mapping"])
            if left < end and right > start and left < right
        ]
        share = weights[:, :, tokens][..., inside].sum(-1).mean()
        assert abs(found.share[turn - 1] - share) < 1e-5
        for first in range(0, len(tokens), BIN):
            assert found.turns[rows] == turn
            for column, cell in enumerate(found.strongest[rows]):
                block = strongest[tokens[first : first + BIN]][:, column * BIN : (column + 1) * BIN]
                assert abs(cell - block.max()) < 6e-4
            rows += 1
    assert rows == len(found.strongest)
    assert np.max(found.strongest) <= 1


def test_an_instruction_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(GattError, match="does not stand in the dialogue"):
        attention_map(tiny_llama, None, _CHAT, "Speak French.")
