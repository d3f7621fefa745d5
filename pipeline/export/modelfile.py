"""The Modelfile beside an exported GGUF: `ollama create NAME -f Modelfile` then asks the model as it was trained.

Ollama's TEMPLATE is a Go `text/template`. It is derived from the model's own Jinja template: chats of known contents are
rendered, the texts between the contents are the pieces, and other chats must come out the same from the pieces. Not for
tools, images or reasoning: chats of system, user and assistant only. Contents come without outer white space in these
chats, since Go cannot strip it where the Jinja template does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from jinja2 import TemplateError

from pipeline.errors import GattError
from pipeline.gguf.reader import GgufInfo
from pipeline.inference.chat_template import ChatTemplate
from pipeline.records import Message

_SYSTEM: Message = {"role": "system", "content": "probe-system"}
_CHAT: tuple[Message, ...] = (
    {"role": "user", "content": "probe-question"},
    {"role": "assistant", "content": "probe-answer"},
    {"role": "user", "content": "probe-more"},
)


class Turn(NamedTuple):
    """The texts before and after the content of a message."""

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True)
class Shape:
    """A chat template as fixed texts around the contents of the messages.

    `begin` opens every chat, and `preamble` comes next where the first message is no system message. `system` is None where
    the template takes none: it is left out then. Where `joined`, the system message stands inside the first user's turn
    and has the place of that turn's prefix. `opening` begins the answer that is asked for.
    """

    begin: str
    preamble: str
    system: Turn | None
    user: Turn
    assistant: Turn
    opening: str
    joined: bool

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for the answer to `messages`, the last of which is the user's."""
        text = self.begin
        for place, message in enumerate(messages):
            turn = {"system": self.system, "user": self.user, "assistant": self.assistant}[
                message["role"]
            ]
            if place == 0 and message["role"] != "system":
                text += self.preamble
            if turn:
                replaced = self.joined and place == 1 and messages[0]["role"] == "system"
                text += ("" if replaced else turn.prefix) + message["content"] + turn.suffix
        return text + self.opening


def modelfile(
    info: GgufInfo, file_name: str, temperature: float, context: int, system: str = ""
) -> str:
    """The text of a Modelfile for the GGUF `info`, which lies beside it as `file_name`.

    `context` is in tokens; `system` is the system message of chats that bring none. A chat template that is not of the
    form of `Shape` gives a Modelfile without TEMPLATE, and a comment that says why.
    """
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{file_name}"]
    shape = None
    try:
        template = ChatTemplate(info.chat_template, info.bos, info.eos)
        shape = derive(template, info.bos if _adds_bos(info) else "", info.eos)
    except GattError as error:
        lines += [
            "# No TEMPLATE: Ollama then takes the template in the GGUF (older releases: a built-in one that is like it, or none).",
            f"# Reason: {' '.join(str(error).split())}",
        ]
    if shape:
        if not shape.system:
            lines.append(
                "# The model's own template takes no system message, so TEMPLATE leaves it out."
            )
        if "strftime_now" in info.chat_template:
            lines.append(
                "# The model's own template asks for the date; in TEMPLATE it is the day of the export."
            )
        lines.append(f'TEMPLATE """{go_template(shape)}"""')
    lines += [f"SYSTEM {_quoted(system)}"] if system else []
    lines += [f"PARAMETER stop {_quoted(text)}" for text in _stops(info, shape)]
    lines += [f"PARAMETER temperature {temperature:g}", f"PARAMETER num_ctx {context}"]
    license = info.field("general.license")
    lines += [f"LICENSE {_quoted(license)}"] if license else []
    return "\n".join(lines) + "\n"


def derive(template: ChatTemplate, bos: str = "", eos: str = "") -> Shape:
    """The pieces of a chat template, without the `bos` that the runner puts in front by itself ("" if it does not).

    Raises:
        GattError: the template refuses user and assistant in turn, or is not of the form of `Shape`.
    """
    start, between, back, last = _split(_rendered(template, _CHAT, bos), _CHAT)
    asked = _split(_rendered(template, _CHAT[:1], bos, answer_follows=False), _CHAT[:1])[-1]
    answered = _split(_rendered(template, _CHAT[:2], bos, answer_follows=False), _CHAT[:2])[-1]
    after_user = _closing(asked, eos, between, last)
    # What a later turn has and the first has not, as Llama 2's BOS, closes the answer before it.
    prefix = _common_suffix(start, back[len(_closing(answered, eos, back)) :])
    user = Turn(prefix, after_user)
    assistant = Turn(between[len(after_user) :], back[: len(back) - len(prefix)])
    begin, preamble, system, joined = "", start[: len(start) - len(prefix)], None, False
    told = _with_system(template, bos)
    if told:
        before, middle = told[:2]
        joined = not middle.endswith(prefix)
        system = Turn(before, middle if joined else middle[: len(middle) - len(prefix)])
    if not system or system.prefix.startswith(preamble):
        begin, preamble = preamble, ""
        system = system and Turn(system.prefix[len(begin) :], system.suffix)
    shape = Shape(begin, preamble, system, user, assistant, last[len(after_user) :], joined)
    for chat in _trials(with_system=system is not None):
        if shape.render(chat) != _rendered(template, chat, bos):
            raise GattError(
                "The model's chat template is more than fixed texts around the messages."
            )
    return shape


def go_template(shape: Shape) -> str:
    """The Go template of `shape` for Ollama; an answer at the end of the chat stays open, to be continued.

    No action trims (`{{-`): that would take white space from the pieces.
    """
    text = _go_text
    user_prefix, asked = text(shape.user.prefix), text(shape.opening)
    if shape.joined:
        user_prefix = _when("or (ne $i 1) (not $.System)", user_prefix)
    system = (
        text(shape.system.prefix) + "{{ .Content }}" + text(shape.system.suffix)
        if shape.system
        else ""
    )
    return "".join(
        (
            text(shape.begin),
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
            _when('and (eq $i 0) (ne .Role "system")', text(shape.preamble)),
            '{{ if eq .Role "system" }}',
            system,
            '{{ else if eq .Role "user" }}',
            user_prefix,
            "{{ .Content }}",
            text(shape.user.suffix),
            '{{ else if eq .Role "assistant" }}',
            text(shape.assistant.prefix),
            "{{ .Content }}",
            _when("not $last", text(shape.assistant.suffix)),
            "{{ end }}",
            _when('and $last (ne .Role "assistant")', asked),
            "{{ end }}",
        )
    )


def _rendered(
    template: ChatTemplate, messages: Sequence[Message], bos: str, answer_follows: bool = True
) -> str:
    try:
        return template.render(messages, answer_follows).removeprefix(bos)
    except (TemplateError, TypeError) as error:
        raise GattError(f"The model's chat template fails: {error}") from error


def _split(text: str, messages: Sequence[Message]) -> list[str]:
    """The texts before, between and after the contents: one more than there are messages."""
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found:
            raise GattError("The model's chat template does not show the messages in their order.")
        pieces.append(before)
    return [*pieces, text]


def _with_system(template: ChatTemplate, bos: str) -> list[str] | None:
    """The texts around the contents of a chat with a system message, or None if that is refused or left out."""
    try:
        text = _rendered(template, (_SYSTEM, *_CHAT), bos)
    except GattError:
        return None
    return None if text == _rendered(template, _CHAT, bos) else _split(text, (_SYSTEM, *_CHAT))


def _closing(end: str, eos: str, *following: str) -> str:
    """What closes a turn: the end of a chat, without the EOS that some templates put there only."""
    for closing in (end, end.removesuffix(eos)):
        if all(text.startswith(closing) for text in following):
            return closing
    raise GattError(
        "The model's chat template closes the last message in another way than earlier ones."
    )


def _common_suffix(one: str, other: str) -> str:
    same = takewhile(
        lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)
    )
    return "".join(character for character, _ in same)[::-1]


def _trials(with_system: bool) -> Iterator[tuple[Message, ...]]:
    """Chats of one to three questions, without and with a system message."""
    chat: list[Message] = []
    for turn in "abc":
        chat.append(
            {"role": "user", "content": f'Question {turn}:  "é 漢" {{{{ x }}}}\n\n\tand {turn}?'}
        )
        yield tuple(chat)
        if with_system:
            yield ({"role": "system", "content": "Be brief.\n\n- No  {% lists %}\n."}, *chat)
        chat.append({"role": "assistant", "content": f"Answer {turn}.\n  1. <b>\n{turn}"})


def _adds_bos(info: GgufInfo) -> bool:
    """Whether llama.cpp, and so Ollama, puts BOS in front of a prompt: its own default holds for SentencePiece only."""
    return bool(
        info.field("tokenizer.ggml.add_bos_token", info.field("tokenizer.ggml.model") == "llama")
    )


def _stops(info: GgufInfo, shape: Shape | None) -> list[str]:
    """The texts that end an answer: EOS, EOT, and what closes an assistant's turn if that is one token.

    Ollama's parser would drop characters of an unprintable one; the model ends at the token itself in any case.
    """
    closing = shape.assistant.suffix.strip() if shape else ""
    texts = [
        info.eos,
        info.token("eot"),
        closing if closing in info.field("tokenizer.ggml.tokens", []) else "",
    ]
    return [text for text in dict.fromkeys(texts) if text and text.isprintable()]


def _when(condition: str, text: str) -> str:
    return "{{ if " + condition + " }}" + text + "{{ end }}" if text else ""


def _go_text(text: str) -> str:
    """`text` for a Go template inside triple quotes.

    Braces, triple quotes and what Ollama's parser drops (unprintable characters) go in as string actions. A single brace
    does, too: an action may follow it.
    """
    return re.sub(r'\{+|"{3,}|[^\n\t -~]+', lambda found: _go_string(found[0]), text)


def _go_string(text: str) -> str:
    if text.isprintable() and text[0] not in '{"':
        return text
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return '{{ "' + escaped + '" }}'


def _quoted(text: str) -> str:
    """A value of the Modelfile, whose quotes know no escapes: triple ones end at the end of a line only.

    Raises:
        GattError: a line of it ends with triple quotes, which cannot be written.
    """
    if re.search(r'"""\s*[\r\n]', text):
        raise GattError(f'A line that ends with """ cannot stand in a Modelfile: {text!r}.')
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
