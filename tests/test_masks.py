"""Golden loss masks: which tokens are learned under the chat templates of the presets' families, for each objective."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pipeline.errors import GattError
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.recipe import Train
from pipeline.records import Message
from pipeline.stages.train import marked
from pipeline.training.examples import IGNORE_INDEX, build_example
from pipeline.training.unsloth import load_tokenizer

_CHAT: list[Message] = [
    {"role": "user", "content": "Say Ahoy!\nHi"},
    {"role": "assistant", "content": "Ahoy! Hi."},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "Ahoy! assistant?"},
]

# Written from the formats that the makers document; the published files are in test_template.py, among the slow tests.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3 = _CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_GOLDEN = {
    "smollm2": (
        _CHATML,
        "",
        "<|im_end|>",
        "<|im_start|>user\nSay Ahoy!\nHi<|im_end|>\n<|im_start|>assistant\n(Ahoy! Hi.<|im_end|>)"
        "\n<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n[Ahoy! assistant?<|im_end|>]\n",
    ),
    "qwen3": (
        _QWEN3,
        "",
        "<|im_end|>",
        "<|im_start|>user\nSay Ahoy!\nHi<|im_end|>\n<|im_start|>assistant\n(Ahoy! Hi.<|im_end|>)"
        "\n<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[Ahoy! assistant?<|im_end|>]\n",
    ),
    "llama 3": (
        _LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nSay "
        "Ahoy!\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n(Ahoy! Hi.<|eot_id|>)<|start_header_id|>user"
        "<|end_header_id|>\n\nuser<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[Ahoy! assistant?<|eot_id|>]",
    ),
    "gemma 3": (
        _GEMMA,
        "<bos>",
        "<eos>",
        "<bos><start_of_turn>user\nSay Ahoy!\nHi<end_of_turn>\n<start_of_turn>model\n(Ahoy! Hi."
        "<end_of_turn>)\n<start_of_turn>user\nuser<end_of_turn>\n<start_of_turn>model\n[Ahoy! assistant?<end_of_turn>]\n",
    ),
    "mistral": (
        _MISTRAL,
        "<s>",
        "</s>",
        "<s>[INST] Say Ahoy!\nHi[/INST]( Ahoy! Hi.</s>)[INST] user[/INST][ Ahoy! assistant?</s>]",
    ),
    "phi 4": (
        _PHI,
        "",
        "<|endoftext|>",
        "<|user|>Say Ahoy!\nHi<|end|><|assistant|>(Ahoy! Hi.<|end|>)<|user|>user<|end|>"
        "<|assistant|>[Ahoy! assistant?<|end|>]",
    ),
}
"""By family: template, BOS, EOS, and the chat as text: in brackets what every objective learns, in parentheses what `last_turn`
does not.
"""
_SPECIAL = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
)


@pytest.fixture(params=_GOLDEN)
def family(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """The embedded model's tokenizer with a family's special tokens and template; and the golden text."""
    template, bos, eos, golden = _GOLDEN[request.param]
    tokenizer = copy.deepcopy(load_tokenizer(cached_checkpoint(find_model("smollm2-135m"))))
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = template, bos or None, eos
    return tokenizer, golden


def test_every_answer_is_learned_with_its_end_and_nothing_else(family: tuple[Any, str]) -> None:
    tokenizer, golden = family
    expected = golden.replace("(", "[").replace(")", "]")
    for loss in ("all_turns", "distill"):
        assert (
            marked(tokenizer, build_example(tokenizer, _CHAT, Train(loss=loss), _CHAT), "[", "]")
            == expected
        )


def test_of_the_last_turn_no_earlier_end_is_learned(family: tuple[Any, str]) -> None:
    tokenizer, golden = family
    expected = golden.replace("(", "").replace(")", "")
    assert (
        marked(tokenizer, build_example(tokenizer, _CHAT, Train(loss="last_turn")), "[", "]")
        == expected
    )


def test_a_dialogue_that_is_too_long_is_cut_behind_an_answer(family: tuple[Any, str]) -> None:
    tokenizer, _ = family
    many = _CHAT * 8
    for length in (64, 100, 150):
        found = build_example(tokenizer, many, Train(max_length=length))
        assert len(found.input_ids) <= length
        turns = sum(
            found.labels[n] != IGNORE_INDEX == found.labels[n - 1]
            for n in range(1, len(found.labels))
        )
        assert (
            turns >= 1
            and found.input_ids
            == build_example(tokenizer, many[: 2 * turns], Train(max_length=4096)).input_ids
        )
    with pytest.raises(
        GattError, match=r"Turn 1 of a dialogue is longer than train\.max_length = 64 tokens"
    ):
        build_example(
            tokenizer, [{"role": "user", "content": "far " * 70}, _CHAT[1]], Train(max_length=64)
        )
