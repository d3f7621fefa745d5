"""Chat templates: where the answers stand in a rendered chat, each with its end-of-turn token."""

from __future__ import annotations

import pytest
from converter import converter
from support.golden import Golden

from pipeline.errors import GattError
from pipeline.inference.chat_template import ChatTemplate, answer_spans
from pipeline.records import Message

_CHAT: list[Message] = [
    {"role": "user", "content": "assistant? user!"},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "  assistant: user  "},
]
"""Contents that also stand in the text of templates."""
_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""Writes the last answer otherwise than the earlier ones, as Qwen3's template does."""
_STRIPPING = (
    "{{ bos_token }}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}"
)
_TWO_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}<|endoftext|>"
)


def _answers(source: str, chat: list[Message]) -> list[str]:
    text, spans = answer_spans(ChatTemplate(source, "<s>", "</s>"), chat)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        (_REASONING, ["assistant<|im_end|>", "  assistant: user  <|im_end|>"]),
        (_STRIPPING, ["assistant</s>", "assistant: user</s>"]),
        (_TWO_ENDS, ["assistant<|end|>", "  assistant: user  <|end|>"]),
    ],
    ids=["reasoning", "stripping", "two ends"],
)
def test_answers_are_located_with_their_end_and_nothing_else(
    source: str, answers: list[str]
) -> None:
    assert _answers(source, _CHAT) == answers
    assert _answers(source, _CHAT[:2]) == answers[:1]


def test_the_prompt_of_a_reasoning_model_asks_for_the_answer_at_once() -> None:
    template = ChatTemplate(_REASONING, "", "")
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert template.render(_CHAT[:1]).endswith(end)
    assert not template.render(_CHAT[:1], add_generation_prompt=False).endswith(end)


def test_a_template_that_changes_words_is_refused() -> None:
    with pytest.raises(GattError, match="changes the words"):
        _answers("{% for m in messages %}{{ m.content | upper }}{% endfor %}", _CHAT)


def test_invalid_templates_and_refused_chats_are_errors_for_the_user() -> None:
    with pytest.raises(GattError, match="not valid Jinja"):
        ChatTemplate("{% for m in messages %}", "", "")
    refusing = ChatTemplate("{{ raise_exception('Roles must alternate') }}", "", "")
    with pytest.raises(GattError, match="refuses this chat: Roles must alternate"):
        refusing.render(_CHAT)


@pytest.mark.parametrize(
    ("name", "source"),
    [("reasoning", _REASONING), ("stripping", _STRIPPING), ("two-ends", _TWO_ENDS)],
)
def test_rendered_chats(name: str, source: str, golden: Golden) -> None:
    template = ChatTemplate(source, "<s>", "</s>")
    chats = (template.render(_CHAT[:1]), template.render(_CHAT[:3]))
    golden(f"chat-{name}.txt", "".join(f"{chat}\n--------\n" for chat in chats))


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
    template = converter() / "models" / "templates" / f"{name}.jinja"
    first, second = _answers(template.read_text(encoding="utf-8"), _CHAT)
    assert first.strip() == f"assistant{end}"
    assert second.strip() in (f"assistant: user{end}", f"assistant: user  {end}")
