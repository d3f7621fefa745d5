"""The map of attention against the weights that transformers itself returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.cli import call_gatt, override_flags

from pipeline.errors import GattError
from pipeline.evaluation.attention import BIN, attention_map, read_attention_maps
from pipeline.files import write_json
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base
from pipeline.records import Message
from pipeline.training.unsloth import nf4_round_trip

_CHAT: list[Message] = [
    {"role": "user", "content": "x x x pay and 2,026. Say y!"},
    {"role": "assistant", "content": "y, I'll pay 35.50"},
    {"role": "user", "content": "It's x?"},
    {"role": "assistant", "content": "y y y naïve"},
]
_ANSWERS = ("y, I'll pay 35.50<|end|>", "y y y naïve<|end|>")


def _weights(model_dir: Path, adapter: Path | None, text: str) -> npt.NDArray[np.float32]:
    """Return (layers, heads, tokens, tokens); with an adapter, the base is rounded to 4 bits."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter:
        for layer in network.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    rounded = nf4_round_trip(module.weight.detach().numpy())
                    module.weight.data = torch.from_numpy(rounded)
        network = peft.PeftModel.from_pretrained(network, str(adapter))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    input_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        layers = network(torch.tensor([input_ids]), output_attentions=True).attentions
    weights: npt.NDArray[np.float32] = torch.cat(layers).numpy()
    return weights


def _tokens_of(part: str, text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """Return the tokens that `part` of the text is made of."""
    start = text.index(part)
    end = start + len(part)
    return [
        token
        for token, (left, right) in enumerate(offsets)
        if left < end and right > start and left < right
    ]


@pytest.mark.parametrize("tuned", [False, True])
def test_it_is_the_maximum_over_heads_and_layers(
    tuned: bool, tiny_llama: Path, tiny_adapter: Path
) -> None:
    import transformers

    adapter = tiny_adapter if tuned else None
    result = attention_map(tiny_llama, adapter, _CHAT, "Say y!", in_4bit=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    text = tokenizer.apply_chat_template(_CHAT, tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    weights = _weights(tiny_llama, adapter, text)
    strongest = weights.max((0, 1))
    instruction = _tokens_of("Say y!", text, offsets)
    assert result.instruction == (instruction[0] // BIN, instruction[-1] // BIN)
    row = 0
    for turn, answer in enumerate(_ANSWERS, 1):
        tokens = _tokens_of(answer, text, offsets)
        share = weights[:, :, tokens][..., instruction].sum(-1).mean()
        assert abs(result.share[turn - 1] - share) < 1e-5
        for first in range(0, len(tokens), BIN):
            assert result.turns[row] == turn
            for column, cell in enumerate(result.strongest[row]):
                block = strongest[tokens[first : first + BIN]][:, column * BIN : (column + 1) * BIN]
                assert abs(cell - block.max()) < 6e-4
            row += 1
    assert row == len(result.strongest)
    assert np.max(result.strongest) <= 1


def test_torch_computes_with_as_many_threads_as_before(
    tiny_llama: Path, tiny_adapter: Path
) -> None:
    import torch

    torch.set_num_threads(2)
    attention_map(tiny_llama, tiny_adapter, _CHAT, "Say y!", in_4bit=True)
    assert torch.get_num_threads() == 2


def test_a_map_is_read_back_as_it_was_written(tiny_llama: Path, tmp_path: Path) -> None:
    maps = {"base": attention_map(tiny_llama, None, _CHAT, "Say y!")}
    write_json(tmp_path / "attention.json", maps)
    text = (tmp_path / "attention.json").read_text(encoding="utf-8")
    assert read_attention_maps(text) == maps


def test_a_run_that_measures_another_adapter_has_no_map(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """This run has not trained, so that it has no adapter of its own."""
    run, adapter = tmp_path / "run", tmp_path / "adapter.gguf"
    write_adapter(open_base(tiny_llama), tiny_adapter, adapter)
    overrides = (
        *(f"model={tiny_llama}", "dialogues.train=4", "dialogues.system=", "evaluate.max_tokens=8"),
        *("evaluate.turns=2", "evaluate.dialogues=1", "evaluate.suite_dialogues=0"),
    )
    flags = override_flags(overrides)
    for words in (("instructions",), ("evaluate", "--adapter", adapter)):
        done = call_gatt(*words, "--run", run, *flags)
        assert done.returncode == 0, done.stderr
    assert "no map of attention, which is of this run's own adapter" in done.stderr
    assert (run / "evaluate" / "scores.json").is_file()
    assert not (run / "evaluate" / "attention.json").exists()


def test_an_instruction_that_is_not_there_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(GattError, match="is not in the dialogue"):
        attention_map(tiny_llama, None, _CHAT, "Speak French.")
