"""Chat templates: where the answers stand in a rendered chat, each with its end-of-turn token."""

from __future__ import annotations

import pytest
from converter import converter
from support.family_templates import FAMILIES
from support.golden import Golden

from pipeline.errors import GattError
from pipeline.inference.chat_template import ChatTemplate, answer_spans, render_unfinished
from pipeline.inference.thoughts import thinks
from pipeline.records import Message

_CHAT: list[Message] = [
    {"role": "user", "content": "assistant? user!"},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "  assistant: user  "},
]
"""Contents that also stand in the text of templates."""
_THOUGHTLESS: list[Message] = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
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
_OWN_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}"
)
"""Writes an empty thought before an answer that has none."""


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


@pytest.mark.parametrize(
    ("source", "content", "end"),
    [
        (_STRIPPING, "The answer is ", "</s>"),
        (_STRIPPING, " ", "</s>"),
        (_TWO_ENDS, "The answer is ", "<|end|>\n<|endoftext|>"),
        (_TWO_ENDS, "|", "<|end|>\n<|endoftext|>"),
        (_TWO_ENDS, "", "<|end|>\n<|endoftext|>"),
        (_REASONING, "<think>\nI", "<|im_end|>\n"),
        (_OWN_THOUGHTS, "<think>\nI\n</think>\n\nThe", "<|end|>"),
        (_OWN_THOUGHTS, "The", "<|end|>"),
    ],
)
def test_an_unfinished_answer_is_rendered_up_to_its_end(
    source: str, content: str, end: str
) -> None:
    """The words also stand in an earlier answer, or in the text that the template writes."""
    template = ChatTemplate(source, "<s>", "</s>")
    chat: list[Message] = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "The answer is 5."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": content},
    ]
    before, written = render_unfinished(template, chat)
    assert written.strip() == content.strip()
    assert before + written + end == template.render(chat, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "The"),
        ("{% for m in messages if m.content %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ""),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", ""),
    ],
    ids=["changed", "omitted if empty", "omitted"],
)
def test_an_answer_that_is_not_in_the_rendered_chat_is_not_continued(
    source: str, content: str
) -> None:
    chat: list[Message] = [*_CHAT[:1], {"role": "assistant", "content": content}]
    with pytest.raises(GattError, match="Send it without continue_final_message"):
        render_unfinished(ChatTemplate(source, "", ""), chat)


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


@pytest.mark.parametrize(
    ("name", "earlier", "last", "prompt"),
    [
        ("Qwen3", "", "<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("SmolLM3", *["<think>\n\n</think>\n"] * 3),
        ("DeepSeek R1", "", "", "<think>\n"),
    ],
)
def test_a_thinking_model_is_trained_without_thoughts(
    name: str, earlier: str, last: str, prompt: str
) -> None:
    """Thoughts of earlier turns are left out as the template does, and those of any turn empty.

    DeepSeek R1's template always opens a thought, so its answers are trained without one.
    """
    family = FAMILIES[name]
    template = ChatTemplate(family.source, family.bos, family.eos)
    text, spans = answer_spans(template, _THOUGHTLESS)
    before = [text[:start] for start, _ in spans]
    ends = {text[start:end].removeprefix(f"A{n}") for n, (start, end) in enumerate(spans, 1)}
    assert len(ends) == 1 and "think" not in ends.pop()
    assert [text[start:][:2] for start, _ in spans] == ["A1", "A2"]
    assert before[0].endswith(earlier) and before[1].endswith(last)
    assert text.count("<think>") == bool(earlier) + bool(last)
    request = template.render(_THOUGHTLESS[:3])
    assert request.endswith(prompt) and thinks(template) == (name == "DeepSeek R1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("Qwen-Qwen3-0.6B", "<|im_end|>"),
        ("Qwen3.5-4B", "<|im_end|>"),
        ("LFM2.5-Instruct", "<|im_end|>"),
        ("ibm-granite-granite-3.3-2B-Instruct", "<|end_of_text|>"),
        ("ibm-granite-granite-4.1", "<|end_of_text|>"),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "</s>"),
        ("Qwen-Qwen2.5-7B-Instruct", "<|im_end|>"),
        ("HuggingFaceTB-SmolLM3-3B", "<|im_end|>"),
        ("meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>"),
        ("meta-llama-Llama-3.2-3B-Instruct", "<|eot_id|>"),
        ("google-gemma-2-2b-it", "<end_of_turn>"),
        ("google-gemma-4-31B-it", "<turn|>"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "</s>"),
        ("microsoft-Phi-3.5-mini-instruct", "<|end|>"),
    ],
)
def test_published_templates(name: str, end: str) -> None:
    template = converter() / "models" / "templates" / f"{name}.jinja"
    first, second = _answers(template.read_text(encoding="utf-8"), _CHAT)
    assert first.strip() == f"assistant{end}"
    assert second.strip() in (f"assistant: user{end}", f"assistant: user  {end}")
