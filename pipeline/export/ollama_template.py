"""Ollama's TEMPLATE, a Go `text/template`, for the common chat formats.

A format has the literal texts of its turns. What its models do differently (BOS, system message,
start of a reply) is read from the model's own Jinja template. The result is used only if it renders
trial chats exactly as that template does. Tools, images and reasoning are not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.records import Message


class Turn(NamedTuple):
    """The texts before and after the content of a message."""

    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaTemplate:
    """A chat template as fixed texts around the contents of the messages.

    `start` opens a chat without a system message. `system` is None where the model takes none, and
    skips it. Where it is `joined`, it begins the first user's turn, in place of `user.before`.
    `prompt` begins the reply.
    """

    user: Turn
    assistant: Turn
    start: str = ""
    system: Turn | None = None
    joined: bool = False
    prompt: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for the reply to the last message, which is the user's."""
        turns = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = "" if self.system and messages[0]["role"] == "system" else self.start
        for n, message in enumerate(messages):
            if turn := turns[message["role"]]:
                after_system = n == 1 and messages[0]["role"] == "system"
                before = "" if self.joined and after_system else turn.before
                text += before + message["content"] + turn.after
        return text + self.prompt

    def go(self) -> str:
        """Return the Go template; a reply at the end of the chat stays open, to be continued.

        No action trims (`{{-`): that would also trim the texts.
        """
        before, after = self.system or ("", "")
        system = f"{before}{{{{ .Content }}}}{after}" if self.system else ""
        user = self.user.before
        if self.joined:
            user = _when("or (ne $i 1) (not $.System)", user)
        return "".join(
            (
                "" if self.system else self.start,
                "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
                _when('and (eq $i 0) (ne .Role "system")', self.start if self.system else ""),
                '{{ if eq .Role "system" }}' + system,
                '{{ else if eq .Role "user" }}' + user + "{{ .Content }}" + self.user.after,
                '{{ else if eq .Role "assistant" }}' + self.assistant.before + "{{ .Content }}",
                _when("not $last", self.assistant.after) + "{{ end }}",
                _when('and $last (ne .Role "assistant")', self.prompt) + "{{ end }}",
            )
        )


def _when(condition: str, text: str) -> str:
    return f"{{{{ if {condition} }}}}{text}{{{{ end }}}}" if text else ""


def _turns(user: str, user_end: str, assistant: str, assistant_end: str) -> OllamaTemplate:
    return OllamaTemplate(user=Turn(user, user_end), assistant=Turn(assistant, assistant_end))


CHAT_FORMATS = {
    "ChatML": _turns("<|im_start|>user\n", "<|im_end|>\n",
                     "<|im_start|>assistant\n", "<|im_end|>\n"),
    "Llama 3": _turns("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>",
                      "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "Llama 2": _turns("[INST] ", " [/INST]", " ", " </s><s>"),
    "Mistral 0.1": _turns("[INST] ", " [/INST]", "", "</s> "),
    "Mistral 0.2": _turns("[INST] ", " [/INST]", "", "</s>"),
    "Mistral 0.2, spaced": _turns(" [INST] ", " [/INST]", " ", "</s>"),
    "Mistral 0.3": _turns("[INST] ", "[/INST]", " ", "</s>"),
    "Mistral Small": _turns("[INST]", "[/INST]", "", "</s>"),
    "Gemma": _turns("<start_of_turn>user\n", "<end_of_turn>\n",
                    "<start_of_turn>model\n", "<end_of_turn>\n"),
    "Phi-3": _turns("<|user|>\n", "<|end|>\n", "<|assistant|>\n", "<|end|>\n"),
    "Phi-4-mini": _turns("<|user|>", "<|end|>", "<|assistant|>", "<|end|>"),
    "Phi-4": _turns("<|im_start|>user<|im_sep|>", "<|im_end|>",
                    "<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    "Zephyr": _turns("<|user|>\n", "</s>\n", "<|assistant|>\n", "</s>\n"),
    "DeepSeek": _turns("<｜User｜>", "", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
}  # fmt: skip
_SYSTEM = Message(role="system", content="Be brief.\n\n- No  {% lists %}\n.")
_QUESTIONS = [Message(role="user", content=f'{n}\n\t"é 漢"  {{{{ x }}}}?') for n in (1, 2, 3)]
_ANSWERS = [Message(role="assistant", content=f"Answer {n}.\n  1. <b>\n{n}") for n in (1, 2)]
"""Contents without white space at their ends: Go could not strip it as some templates do."""


def find_template(render: Callable[[Sequence[Message]], str]) -> OllamaTemplate:
    """Return the template that renders trial chats as `render`, the model's own template, does.

    Raises:
        GattError: there is none.
    """
    plain = render(_QUESTIONS[:1])
    try:
        with_system = render([_SYSTEM, *_QUESTIONS[:1]])
    except GattError:
        with_system = plain
    for chat_format in CHAT_FORMATS.values():
        template = _fill(chat_format, plain, "" if with_system == plain else with_system)
        if template and all(template.render(c) == render(c) for c in _trials(template.system)):
            return template
    raise GattError(
        "The model's chat template puts more than fixed texts around the messages, or other texts "
        f"than the known formats ({', '.join(CHAT_FORMATS)})."
    )


def _fill(chat_format: OllamaTemplate, plain: str, with_system: str) -> OllamaTemplate | None:
    """Return the format with the texts of a model, None if its chat `plain` is of another format.

    `with_system` is the same chat with a system message, "" where the model takes none.
    """
    question, user = _QUESTIONS[0]["content"], chat_format.user
    start, turn, prompt = plain.partition(f"{user.before}{question}{user.after}")
    if not turn:
        return None
    if not with_system:
        return replace(chat_format, start=start, prompt=prompt)
    before, _, rest = with_system.partition(_SYSTEM["content"])
    after = rest.partition(question)[0]
    joined = not after.endswith(user.before)
    system = Turn(before, after if joined else after.removesuffix(user.before))
    return replace(chat_format, start=start, system=system, joined=joined, prompt=prompt)


def _trials(system: Turn | None) -> Iterator[list[Message]]:
    """Yield chats of one to three questions, also with a system message if the model takes one."""
    chat: list[Message] = []
    for question, answer in zip(_QUESTIONS, [*_ANSWERS, None], strict=True):
        chat.append(question)
        yield list(chat)
        if system:
            yield [_SYSTEM, *chat]
        if answer:
            chat.append(answer)
