"""Chat templates: which characters of a rendered chat are an answer and its end, for all kinds of template."""

from __future__ import annotations

from pathlib import Path

import pytest
from converter import converter

from pipeline.errors import GattError
from pipeline.inference.chat_template import ChatTemplate, answer_spans
from pipeline.records import Message

_CHAT: list[Message] = [
    {"role": "user", "content": "assistant? user!"},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "  assistant: user  "},
]
_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Writes the last answer in another way than the earlier ones, as Qwen3's does."""
_TRIMMING = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
_TWO_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}<|endoftext|>"
)


def _learned(source: str, chat: list[Message]) -> list[str]:
    text, spans = answer_spans(ChatTemplate(source, "<s>", "</s>"), chat)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("source", "learned"),
    [
        (_THINKING, ["assistant<|im_end|>", "  assistant: user  <|im_end|>"]),
        (_TRIMMING, ["assistant</s>", "assistant: user</s>"]),
        (_TWO_ENDS, ["assistant<|end|>", "  assistant: user  <|end|>"]),
    ],
)
def test_answers_are_found_with_their_end_and_nothing_else(source: str, learned: list[str]) -> None:
    assert _learned(source, _CHAT) == learned
    assert _learned(source, _CHAT[:2]) == learned[:1]


def test_the_prompt_of_a_model_that_thinks_aloud_asks_for_the_answer_at_once() -> None:
    assert (
        ChatTemplate(_THINKING, "", "")
        .render(_CHAT[:1])
        .endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    )


def test_a_template_that_changes_words_is_refused() -> None:
    with pytest.raises(GattError, match="changes the words"):
        _learned("{% for m in messages %}{{ m.content | upper }}{% endfor %}", _CHAT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("Qwen-Qwen3-0.6B", "<|im_end|>"),
        ("Qwen-Qwen2.5-7B-Instruct", "<|im_end|>"),
        ("HuggingFaceTB-SmolLM3-3B", "<|im_end|>"),
        ("meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>"),
        ("meta-llama-Llama-3.2-3B-Instruct", "<|eot_id|>"),
        ("google-gemma-2-2b-it", "<end_of_turn>"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "</s>"),
        ("microsoft-Phi-3.5-mini-instruct", "<|end|>"),
    ],
)
def test_published_templates(name: str, end: str) -> None:
    template: Path = converter() / "models" / "templates" / f"{name}.jinja"
    learned = _learned(template.read_text(encoding="utf-8"), _CHAT)
    assert [text.strip() for text in learned] == [f"assistant{end}", learned[1].strip()]
    assert learned[1].strip() in (f"assistant: user{end}", f"assistant: user  {end}")
