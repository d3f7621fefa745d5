"""Golden loss masks: which tokens are learned, by chat template and by objective."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pipeline.errors import GattError
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.recipe import Train
from pipeline.records import Message
from pipeline.training.examples import IGNORE_INDEX, build_example, mark_learned
from pipeline.training.unsloth import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT: list[Message] = [
    {"role": "user", "content": "Say Ahoy!\nHi"},
    {"role": "assistant", "content": "Ahoy! Hi."},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "Ahoy! assistant?"},
]

# Written from the formats that the makers document. The published templates are read by the slow
# tests of test_template.py.
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN3 = _CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Family(NamedTuple):
    """A chat template with its BOS and EOS tokens, and `_CHAT` as text.

    In brackets stands what every objective learns, in parentheses what `last_turn` does not.
    """

    template: str
    bos: str
    eos: str
    golden: str


_FAMILIES = {
    "smollm2": Family(
        _CHATML,
        "",
        "<|im_end|>",
        "<|im_start|>user\nSay Ahoy!\nHi<|im_end|>\n"
        "<|im_start|>assistant\n(Ahoy! Hi.<|im_end|>)\n"
        "<|im_start|>user\nuser<|im_end|>\n"
        "<|im_start|>assistant\n[Ahoy! assistant?<|im_end|>]\n",
    ),
    "qwen3": Family(
        _QWEN3,
        "",
        "<|im_end|>",
        "<|im_start|>user\nSay Ahoy!\nHi<|im_end|>\n"
        "<|im_start|>assistant\n(Ahoy! Hi.<|im_end|>)\n"
        "<|im_start|>user\nuser<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[Ahoy! assistant?<|im_end|>]\n",
    ),
    "llama 3": Family(
        _LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSay Ahoy!\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n(Ahoy! Hi.<|eot_id|>)"
        "<|start_header_id|>user<|end_header_id|>\n\nuser<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[Ahoy! assistant?<|eot_id|>]",
    ),
    "gemma 3": Family(
        _GEMMA,
        "<bos>",
        "<eos>",
        "<bos><start_of_turn>user\nSay Ahoy!\nHi<end_of_turn>\n"
        "<start_of_turn>model\n(Ahoy! Hi.<end_of_turn>)\n"
        "<start_of_turn>user\nuser<end_of_turn>\n"
        "<start_of_turn>model\n[Ahoy! assistant?<end_of_turn>]\n",
    ),
    "mistral": Family(
        _MISTRAL,
        "<s>",
        "</s>",
        "<s>[INST] Say Ahoy!\nHi[/INST]( Ahoy! Hi.</s>)[INST] user[/INST][ Ahoy! assistant?</s>]",
    ),
    "phi 4": Family(
        _PHI,
        "",
        "<|endoftext|>",
        "<|user|>Say Ahoy!\nHi<|end|><|assistant|>(Ahoy! Hi.<|end|>)"
        "<|user|>user<|end|><|assistant|>[Ahoy! assistant?<|end|>]",
    ),
}
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


class FamilyTokenizer(NamedTuple):
    """The embedded model's tokenizer with a family's template and special tokens."""

    tokenizer: PreTrainedTokenizerBase
    golden: str


@pytest.fixture(scope="module", params=_FAMILIES)
def family(request: pytest.FixtureRequest) -> FamilyTokenizer:
    """Return one family's tokenizer and golden text."""
    template, bos, eos, golden = _FAMILIES[request.param]
    tokenizer = copy.deepcopy(load_tokenizer(cached_checkpoint(find_model("smollm2-135m"))))
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = template, bos or None, eos
    return FamilyTokenizer(tokenizer, golden)


@pytest.mark.parametrize("settings", [Train(loss="all_turns"), Train(loss="distill")])
def test_every_answer_is_learned_with_its_end_and_nothing_else(
    family: FamilyTokenizer, settings: Train
) -> None:
    example = build_example(family.tokenizer, _CHAT, settings, _CHAT)
    marked = mark_learned(family.tokenizer, example, "[", "]")
    assert marked == family.golden.replace("(", "[").replace(")", "]")


def test_tokens_without_a_weight_are_not_marked_and_the_text_is_that_of_the_chat() -> None:
    tokenizer = load_tokenizer(cached_checkpoint(find_model("smollm2-135m")))
    answer = "Crabs \U0001f980\U0001f99c are na\u00efve."
    teacher: list[Message] = [_CHAT[0], {"role": "assistant", "content": answer}]
    chat: list[Message] = [_CHAT[0], {"role": "assistant", "content": f"Ahoy! \U0001f99e {answer}"}]
    example = build_example(tokenizer, chat, Train(loss="all_turns", unedited_weight=0), teacher)
    marked = mark_learned(tokenizer, example, "[", "]")
    assert f"assistant\n[Ahoy! \U0001f99e Cra]{answer[3:]}[<|im_end|>]" in marked
    assert marked.replace("[", "").replace("]", "") == tokenizer.decode(example.input_ids)
    assert example.learned_tokens == sum(weight > 0 for weight in example.weights)


def test_last_turn_learns_the_last_answer_only(family: FamilyTokenizer) -> None:
    example = build_example(family.tokenizer, _CHAT, Train(loss="last_turn"))
    marked = mark_learned(family.tokenizer, example, "[", "]")
    assert marked == family.golden.replace("(", "").replace(")", "")


@pytest.mark.parametrize("max_length", [64, 100, 150])
def test_a_dialogue_that_is_too_long_is_cut_after_an_answer(
    family: FamilyTokenizer, max_length: int
) -> None:
    long_chat = _CHAT * 8
    example = build_example(family.tokenizer, long_chat, Train(max_length=max_length))
    assert len(example.input_ids) <= max_length
    turns = sum(
        label != IGNORE_INDEX == example.labels[n - 1]
        for n, label in enumerate(example.labels)
        if n > 0
    )
    assert turns >= 1
    uncut = build_example(family.tokenizer, long_chat[: 2 * turns], Train(max_length=4096))
    assert example.input_ids == uncut.input_ids


def test_a_first_turn_that_is_too_long_is_an_error(family: FamilyTokenizer) -> None:
    chat: list[Message] = [{"role": "user", "content": "far " * 70}, _CHAT[1]]
    with pytest.raises(
        GattError, match=r"Turn 1 of a dialogue is longer than train\.max_length = 64 tokens"
    ):
        build_example(family.tokenizer, chat, Train(max_length=64))
