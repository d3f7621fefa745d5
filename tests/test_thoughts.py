"""Thoughts of reasoning models, told from answers: complete texts and streams."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from converter import converter

from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.chat_template import ChatTemplate
from pipeline.inference.llama.model import LoadedModel
from pipeline.inference.thoughts import (
    MARKERS,
    AnswerFilter,
    Split,
    ThoughtSplitter,
    always_thinks,
    opened_thought,
    split_thoughts,
    thinks,
)
from pipeline.records import (
    Completion,
    FinishReason,
    Message,
    Request,
    SamplerSettings,
    Task,
)

_CUT = Split("a b", "", finished=False)
_CASES = {
    "block": ("<think>\na b\n</think>\n\nHi.", Split("a b", "Hi.")),
    "one line": ("<think>a b</think>Hi.", Split("a b", "Hi.")),
    "space before": ("\n <think>a b</think>\nHi.", Split("a b", "Hi.")),
    "empty block": ("<think>\n\n</think>\n\nHi.", Split("", "Hi.")),
    "two blocks": ("<think>a</think>\n<think> b</think>Hi.", Split("a b", "Hi.")),
    "later block": ("<think>a</think>Hi.\n<think> b</think>\nYou.", Split("a b", "Hi.\nYou.")),
    "end twice": ("<think>a b</think>\n</think>\nHi.", Split("a b", "Hi.")),
    "cut": ("<think>\na b", _CUT),
    "cut in the end": ("<think>a b</thi", Split("a b</thi", "", finished=False)),
    "cut later": ("<think>a</think>Hi.\n<think> b", Split("a b", "Hi.", finished=False)),
    "only thoughts": ("<think>a b</think>", Split("a b", "")),
    "channels": (
        "<|channel|>analysis<|message|>a b<|end|><|start|>assistant<|channel|>final<|message|>Hi.",
        Split("a b", "Hi."),
    ),
    "channels, cut": ("<|channel|>analysis<|message|>a b", _CUT),
    "final channel alone": ("<|channel|>final<|message|>Hi.", Split("", "Hi.")),
    "response": (
        "<|START_THINKING|>a b<|END_THINKING|><|START_RESPONSE|>Hi.",
        Split("a b", "Hi."),
    ),
    "plain": (" Hi. ", Split("", " Hi. ")),
    "mentioned": ("Write <think> and </think>.\n<think>", None),
    "code after thoughts": (
        "<think>a b</think>As in\n```\n<think>\n```\nso.",
        Split("a b", "As in\n```\n<think>\n```\nso."),
    ),
    "inside a line": ("<think>a b</think>Not <think>.", Split("a b", "Not <think>.")),
    "begins like one": ("<thinly veiled> Hi.", None),
    "empty": ("", None),
}
"""Text, and its parts if the prompt opened no thought; None: the text is the answer."""


@pytest.mark.parametrize("name", _CASES)
def test_a_text_is_divided_the_same_at_once_and_in_pieces_of_any_size(name: str) -> None:
    text, parts = _CASES[name]
    expected = parts or Split("", text)
    assert split_thoughts(text, "") == expected
    for size in range(1, len(text) + 1):
        splitter = ThoughtSplitter()
        pieces = [splitter.feed(text[n : n + size]) for n in range(0, len(text), size)]
        pieces.append(splitter.close())
        thoughts = "".join(piece.thoughts for piece in pieces)
        answer = "".join(piece.answer for piece in pieces)
        if splitter.has_thoughts:
            thoughts, answer = thoughts.strip(), answer.strip()
        assert Split(thoughts, answer, pieces[-1].finished) == expected


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_opens_a_thought_that_its_end_closes(marker: str) -> None:
    for end in MARKERS[marker]:
        assert split_thoughts(f"{marker}a b{end}\nHi.") == Split("a b", "Hi.")
    assert split_thoughts(f"{marker}a b") == _CUT


def test_a_prompt_that_opens_a_thought_makes_the_text_begin_within_it() -> None:
    assert opened_thought("<|im_start|>assistant\n<think>\n") == "<think>"
    assert opened_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    # The prompt may go on with the beginning of the answer.
    assert opened_thought("<|im_start|>assistant\n", "<think>\na b") == "<think>"
    assert opened_thought("<|im_start|>assistant\n", "<think>\na b\n</think>\n\nHi") == ""
    assert opened_thought("<|im_start|>assistant\n<think>\n", "a b</think>Hi") == ""
    assert opened_thought("<|im_start|>assistant\n<think>\n", "a b") == "<think>"
    assert opened_thought("<|im_start|>assistant\n", "Write <think>") == ""
    assert split_thoughts("a b\n</think>\n\nHi.", "<think>") == Split("a b", "Hi.")
    assert split_thoughts("a b", "<think>") == _CUT
    splitter = ThoughtSplitter("<think>")
    assert splitter.feed("a b</") == Split("a b", "", finished=False)
    assert splitter.feed("think> H") == Split("", "H", finished=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b\n</think>\n\nHi.", Split("a b", "Hi.")),
        ("a b[/THINK]Hi.", Split("a b", "Hi.")),
        ("a b", Split("", "a b")),
        ("analysisa bassistantfinalHi.", Split("a b", "Hi.")),
        ("The end is `</think>`.", Split("", "The end is `</think>`.")),
        ('The end is "</think>".', Split("", 'The end is "</think>".')),
        ("```\na\n</think>\n```\nHi.", Split("", "```\na\n</think>\n```\nHi.")),
        ("Put it in <think> and </think>.", Split("", "Put it in <think> and </think>.")),
    ],
)
def test_a_server_may_have_opened_a_thought_that_is_not_in_its_text(
    text: str, expected: Split
) -> None:
    assert split_thoughts(text) == expected
    # A local model whose prompt is known to have opened none mentions the tag.
    if "analysis" not in text:
        assert split_thoughts(text, "") == Split("", text)


def _template(prompt: str) -> ChatTemplate:
    """Return a chat template that ends with `prompt` and strips thoughts from earlier answers."""
    return ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n" + prompt,
        "",
        "",
    )


_OPENS, _MAY_THINK = _template("<think>\n"), _template("")
_SWITCHES_OFF = _template("{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}")
_PLAIN = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "", "")


def test_a_model_thinks_unless_its_template_switches_that_off() -> None:
    assert [thinks(t) for t in (_OPENS, _MAY_THINK, _SWITCHES_OFF, _PLAIN)] == [
        True,
        True,
        False,
        False,
    ]
    assert [always_thinks(t) for t in (_OPENS, _MAY_THINK, _SWITCHES_OFF, _PLAIN)] == [
        *(True, False, False, False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "thinking", "always", "strips"),
    [
        ("Qwen-Qwen3-0.6B", False, False, True),
        ("Qwen3.5-4B", False, False, True),
        ("HuggingFaceTB-SmolLM3-3B", False, False, False),
        ("google-gemma-4-31B-it", False, False, False),
        # Without its variable `thinking` it asks for none, but does not rule it out.
        ("ibm-granite-granite-3.3-2B-Instruct", True, False, False),
        ("Qwen-QwQ-32B", False, False, True),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", True, True, True),
    ],
)
def test_published_templates_switch_thinking_off_or_are_known_to_think(
    name: str, thinking: bool, always: bool, strips: bool
) -> None:
    """Where a template keeps the thought of an earlier answer, there is none: it was cut off."""
    source = (converter() / "models" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate(source, "<s>", "</s>")
    answer = "<think>\nhidden\n</think>\n\nSo."
    chat: list[Message] = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And?"},
    ]
    assert (thinks(template), always_thinks(template)) == (thinking, always)
    assert ("hidden" not in template.render(chat)) == strips
    chat[1] = {"role": "assistant", "content": split_thoughts(answer).answer}
    text = template.render(chat)
    assert "So." in text and "hidden" not in text
    assert bool(opened_thought(text)) == always


def _run(template: ChatTemplate, request: Request, text: str) -> tuple[Request, Completion]:
    """Return the request that a task's engine gets, and the completion that the task gets.

    The engine generates `text` a word at a time, which is a token, and obeys the request.
    """
    completions: list[Completion] = []

    def task() -> Task:
        completions.append((yield request))

    wrapped = AnswerFilter(template, str.split, 100).wrap(task())  # type: ignore[arg-type]
    extended = next(wrapped)
    written = ""
    finish: FinishReason = "stop"
    for count, word in enumerate(re.findall(r"\s*\S+", text), 1):
        written += word
        if extended.stop_when and extended.stop_when(written):
            finish = "stop_when"
            break
        if count >= extended.max_tokens:
            finish = "length"
            break
    with pytest.raises(StopIteration):
        wrapped.send(Completion(written, len(written.split()), 5, finish))
    return extended, completions[0]


def _ask(**options: Any) -> Request:
    messages: tuple[Message, ...] = ({"role": "user", "content": "Why <think>?"},)
    return Request(messages=messages, seed=1, **{"max_tokens": 3, **options})


def test_a_local_model_that_thinks_has_tokens_for_it_and_gives_its_answer() -> None:
    thoughts = " ".join(["hm"] * 20)
    extended, completion = _run(_OPENS, _ask(max_thought_tokens=30), f"{thoughts} </think> One two")
    assert extended.max_tokens == 33
    assert (completion.text, completion.finish) == ("One two", "stop")
    assert completion.thoughts == thoughts
    # The answer has its own tokens, and no more.
    _, completion = _run(_MAY_THINK, _ask(), f"<think> {thoughts} </think> One two three four five")
    assert (completion.text, completion.finish) == ("One two three", "length")
    # The thoughts have theirs.
    _, completion = _run(_OPENS, _ask(max_thought_tokens=10), f"{thoughts} </think> One two")
    assert (completion.text, completion.finish) == ("", "thinking")
    assert completion.thoughts == " ".join(["hm"] * 13)
    # What the context leaves is the limit.
    extended, _ = _run(_OPENS, _ask(), "hm </think> One")
    assert extended.max_tokens == 100 - len(_OPENS.render(_ask().messages).split())


def test_the_end_of_a_request_applies_to_the_answer_not_to_the_thoughts() -> None:
    request = _ask(stop_when=lambda text: "hm" in text or "two" in text, max_tokens=9)
    _, completion = _run(_OPENS, request, "hm hm </think> One two three")
    assert (completion.text, completion.finish) == ("One two", "stop_when")
    for template in (_PLAIN, _SWITCHES_OFF):
        extended, completion = _run(template, request, "<think>hm</think> One two three")
        assert extended.max_tokens == 9
        assert (completion.text, completion.finish) == ("One two", "stop_when")


def test_a_model_that_does_not_think_is_not_changed() -> None:
    request = _ask()
    extended, completion = _run(_SWITCHES_OFF, request, " Say <think> and </think>")
    assert extended is request
    assert completion == Completion(" Say <think> and", 3, 5, "length")


def test_a_real_engine_cuts_thoughts_and_answers_apart(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grammar writes what a reasoning model would."""
    grammar = 'root ::= "<think>hm hm hm hm hm hm</think>One two " [a-z ]+'
    request = _ask(max_tokens=4, sampler=SamplerSettings(grammar=grammar))
    with BatchEngine(base, 1, 256) as engine:
        plain = engine.complete(_ask(max_tokens=12))
        cut = engine.complete(request)
    assert (cut.text, cut.finish) == ("", "thinking")
    monkeypatch.setattr(GgufInfo, "chat_template", _MAY_THINK.source)
    with BatchEngine(base, 1, 256) as engine:
        completion = engine.complete(request)
    assert completion.text.startswith("One two")
    assert completion.thoughts == "hm hm hm hm hm hm"
    assert completion.finish == "length"
    monkeypatch.undo()
    with BatchEngine(base, 1, 256) as engine:
        assert engine.complete(_ask(max_tokens=12)) == plain


def test_a_marker_that_is_a_control_token_is_seen(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Magistral's and gpt-oss's are; this model's control token stands for them."""
    monkeypatch.setattr("pipeline.inference.llama.model.MARKER_TOKENS", {"<|im_start|>"})
    pieces = []
    for source in (_PLAIN.source, _MAY_THINK.source):
        monkeypatch.setattr(GgufInfo, "chat_template", source)
        model = LoadedModel(open_gguf(base), vocab_only=True)
        (start,), (end,) = model.tokenize("<|im_start|>"), model.tokenize("<|im_end|>")
        pieces.append((model.token_to_piece(start), model.token_to_piece(end)))
        model.close()
    assert pieces == [(b"", b""), (b"<|im_start|>", b"")]
