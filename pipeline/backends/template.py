"""Chat templates, rendered in a sandbox, the same way for training and for llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import GattError
from pipeline.records import Message


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
        """The chat as text; with the opening of an assistant message at its end where `answer_follows`."""
        return self._template.render(
            messages=list(messages), add_generation_prompt=answer_follows, bos_token=self._bos, eos_token=self._eos
        )


def answer_spans(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and for each assistant message the characters of its text and its end-of-turn token.

    Raises:
        GattError: the template rewrites earlier messages, so that a prefix of the chat is no prefix of the text.
    """
    whole = template.render(messages, answer_follows=False)
    spans: list[tuple[int, int]] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:place])
        after = template.render(messages[: place + 1], answer_follows=False)
        if not (whole.startswith(before) and whole.startswith(after.rstrip())):
            raise GattError("This chat template rewrites earlier messages; its answers cannot be labelled yet.")
        spans.append((len(before), len(after.rstrip())))
    return whole, spans


def _refuse(reason: str) -> None:
    raise GattError(f"The model's chat template refuses this chat: {reason}")
