"""Chat templates, rendered in a sandbox, the same way for training and for llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import takewhile
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import GattError
from pipeline.records import Message

NO_THINKING = {"enable_thinking": False}
"""Template variables that make a reasoning model answer at once; for `apply_chat_template` too."""

Span = tuple[int, int]
"""First character of a piece of text, and the one after its last."""


class ChatTemplate:
    """A model's Jinja chat template with the texts of its BOS and EOS tokens.

    Raises:
        GattError: the template is not valid Jinja.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now(timezone.utc).strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise GattError(f"The model's chat template is not valid Jinja: {error}") from error
        self._bos, self._eos = bos, eos

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the chat as text, followed by the start of an assistant message if wanted.

        Reasoning is switched off, because the training data have none.
        """
        return self._template.render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=self._bos,
            eos_token=self._eos,
            **NO_THINKING,
        )


def answer_spans(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """Return the rendered chat, and where each answer stands in it with its end-of-turn token.

    Rendering the chat up to an answer would not do. Some templates write earlier answers otherwise
    than the last (Qwen3 drops their reasoning), so this is not a prefix of the chat. Instead, the
    contents are located between the fixed texts that the template writes around them.

    Raises:
        GattError: the template changes the words of a message.
    """
    text = template.render(messages, add_generation_prompt=False)
    fixed = _fixed_texts(template, messages)
    end_of_turn = _end_of_turn(template, messages)
    contents = [message["content"] for message in messages]
    # Many templates strip the contents.
    for candidates in (contents, [content.strip() for content in contents]):
        spans = _content_spans(text, fixed, candidates)
        if spans:
            return text, [
                (start, end + len(end_of_turn) if text.startswith(end_of_turn, end) else end)
                for (start, end), message in zip(spans, messages, strict=True)
                if message["role"] == "assistant"
            ]
    raise GattError(
        "The model's chat template changes the words of a message, so the answers cannot be "
        "located in the rendered chat. Take a model with another template."
    )


def _end_of_turn(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """Return the text that ends an answer: what follows one in the middle of a chat and at its end.

    In the middle, the start of the next message follows too; at the end, perhaps another token.
    """
    longer: list[Message] = [
        *messages,
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "Yes."},
    ]
    fixed = _fixed_texts(template, longer)
    pairs = zip(fixed[len(messages)], fixed[-1], strict=False)
    common = "".join(char for char, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    # Two different special tokens may begin alike: cut an incomplete one.
    return re.sub(r"\s*(<[^>]*)?$", "", common)


def _fixed_texts(template: ChatTemplate, messages: Sequence[Message]) -> list[str]:
    """Return what the template writes before, between and after the contents of `messages`."""
    marked: list[Message] = [
        {"role": message["role"], "content": f"QX{n}XQ"} for n, message in enumerate(messages)
    ]
    return re.split(r"QX\d+XQ", template.render(marked, add_generation_prompt=False))


def _content_spans(text: str, fixed: Sequence[str], contents: Sequence[str]) -> list[Span]:
    """Return where `contents` stand in `text`; [] if it is not made of `fixed` and `contents`."""
    if len(fixed) != len(contents) + 1:
        return []
    spans: list[Span] = []
    rebuilt = fixed[0]
    for content, after in zip(contents, fixed[1:], strict=True):
        spans.append((len(rebuilt), len(rebuilt) + len(content)))
        rebuilt += content + after
    return spans if rebuilt == text else []


def _raise_exception(reason: str) -> NoReturn:
    raise GattError(f"The model's chat template refuses this chat: {reason}")
