"""Chat templates, rendered in a sandbox, the same way for training and for llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import takewhile

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import GattError
from pipeline.records import Message

NO_THINKING = {"enable_thinking": False}
"""For `apply_chat_template` too: the variable that templates of models which think aloud ask for."""


class ChatTemplate:
    """A model's Jinja chat template with the texts of its BOS and EOS tokens."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now(timezone.utc).strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise GattError(f"The model's chat template is not valid Jinja: {error}") from error
        self._bos, self._eos = bos, eos

    def render(self, messages: Sequence[Message], answer_follows: bool = True) -> str:
        """The chat as text; with the opening of an assistant message at its end where `answer_follows`.

        A model that thinks aloud is asked to answer at once: training data have no thoughts.
        """
        return self._template.render(
            messages=list(messages),
            add_generation_prompt=answer_follows,
            bos_token=self._bos,
            eos_token=self._eos,
            **NO_THINKING,
        )


def answer_spans(
    template: ChatTemplate, messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and for each assistant message the characters of its text and its end-of-turn token.

    Some templates write earlier answers in another way than the last one (Qwen3 drops their thoughts), so that the chat up to
    an answer is no prefix of the whole. Contents are found by what the template puts between them, and the end of a turn is
    what follows an answer in the middle of a chat and at its end alike.

    Raises:
        GattError: the template changes the words of a message.
    """
    whole = template.render(messages, answer_follows=False)
    more: list[Message] = [
        *messages,
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "Yes."},
    ]
    between, between_more = _between(template, messages), _between(template, more)
    # Cut where two different special tokens begin alike.
    alike = takewhile(
        lambda pair: pair[0] == pair[1],
        zip(between_more[len(messages)], between_more[-1], strict=False),
    )
    end = re.sub(r"\s*(<[^>]*)?$", "", "".join(sign for sign, _ in alike))
    for said in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):
        places = _places(whole, between, said)
        if places:
            return whole, [
                (first, last + len(end) * whole.startswith(end, last))
                for (first, last), m in zip(places, messages, strict=True)
                if m["role"] == "assistant"
            ]
    raise GattError(
        "This chat template changes the words of a message; answers cannot be told from it."
    )


def _between(template: ChatTemplate, messages: Sequence[Message]) -> list[str]:
    """What the template writes before the first message's words, between those of two, and behind the last's."""
    marks = [f"QX{n}XQ" for n in range(len(messages))]
    marked: list[Message] = [
        {"role": m["role"], "content": mark} for m, mark in zip(messages, marks, strict=True)
    ]
    return re.split(r"QX\d+XQ", template.render(marked, answer_follows=False))


def _places(whole: str, between: Sequence[str], said: Sequence[str]) -> list[tuple[int, int]]:
    """Where each message's words stand, if `whole` is made of these parts; else nothing."""
    found: list[tuple[int, int]] = []
    at = 0
    for n, part in enumerate(between):
        if not whole.startswith(part, at) or len(between) != len(said) + 1:
            return []
        at += len(part)
        if n < len(said):
            if not whole.startswith(said[n], at):
                return []
            found.append((at, at + len(said[n])))
            at += len(said[n])
    return found if at == len(whole) else []


def _refuse(reason: str) -> None:
    raise GattError(f"The model's chat template refuses this chat: {reason}")
