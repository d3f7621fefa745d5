"""Chat templates: rendered as transformers does, the same way for training and for llama.cpp.

The Jinja environment equals that of transformers, which would take 0.6 s to import; a test
compares the two.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.errors import GattError
from pipeline.gguf.huggingface.chat_template import read_chat_template
from pipeline.gguf.reader import open_gguf
from pipeline.records import Message

if TYPE_CHECKING:
    from jinja2.parser import Parser
    from transformers import PreTrainedTokenizerBase

    from pipeline.hub.models import Model

NO_THINKING = {"enable_thinking": False}
"""Template variables that make a reasoning model answer at once; for `apply_chat_template` too."""
_FIXED_VARIABLES = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
}
_CACHED_TEMPLATES = 16

Span = tuple[int, int]
"""First character of a piece of text, and the one after its last."""


class ChatTemplate:
    """A model's Jinja chat template with the texts of its BOS and EOS tokens; "" if it has none.

    `owner` is what error messages call the file that it comes from.

    Raises:
        GattError: the template is not valid Jinja.
    """

    def __init__(self, source: str, bos: str, eos: str, owner: str = "the model") -> None:
        self.source, self._owner = source, owner
        try:
            self._template = _compile(source)
        except (TemplateError, RecursionError) as error:
            line = _source_line(source, getattr(error, "lineno", None))
            raise GattError(
                f"The chat template of {owner} is not valid Jinja: {error}{line}. "
                "Correct it, or take another model."
            ) from error
        # transformers leaves a token that does not exist undefined.
        tokens = {"bos_token": bos, "eos_token": eos}
        self._variables = {name: text for name, text in tokens.items() if text}

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the chat as text, followed by the start of an assistant message if wanted.

        Reasoning is switched off where the template can do that, because the training data have
        none; `variables`, which the template knows (`variable_names`), may switch it on. A template
        that writes the date writes that of `now`, by default the local time.

        Raises:
            GattError: the template refuses the chat, or fails.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **({"strftime_now": now.strftime} if now else {}),
                **self._variables,
                **{**NO_THINKING, **(variables or {})},
            )
        except _RefusalError as error:
            raise GattError(f"The model's chat template refuses this chat: {error}") from error
        except Exception as error:  # a template can do whatever Python's operators can
            line = _source_line(self.source, _line_number(error))
            raise GattError(
                f"The chat template of {self._owner} fails with {type(error).__name__}: "
                f"{error}{line}. Correct it, or take another model."
            ) from error

    def variable_names(self) -> set[str]:
        """Return the names of the template's own variables, such as `enable_thinking`."""
        environment = _environment()
        names = meta.find_undeclared_variables(environment.parse(self.source))
        return names - set(environment.globals) - _FIXED_VARIABLES


def template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the chat template of a Hugging Face tokenizer.

    Raises:
        GattError: it is not valid Jinja.
    """
    return ChatTemplate(
        tokenizer.chat_template,
        tokenizer.bos_token or "",
        tokenizer.eos_token or "",
        Path(tokenizer.name_or_path).name or "the model",
    )


def template_in(model: Model) -> ChatTemplate:
    """Return the chat template of a base model, for a look at it: a folder's without BOS and EOS.

    Raises:
        GattError: it is not valid Jinja.
    """
    if model.is_gguf:
        info = open_gguf(model.path)
        return ChatTemplate(info.chat_template, info.bos, info.eos, model.name)
    return ChatTemplate(read_chat_template(model.path), "", "", model.name)


class _RefusalError(TemplateError):
    """What a template's `raise_exception` raises."""


class _GenerationBlock(Extension):
    """The block `{% generation %}`, which marks what the model writes; here its text only."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call, which gives it a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


@lru_cache(_CACHED_TEMPLATES)
def _compile(source: str) -> Template:
    return _environment().from_string(source)


@lru_cache(1)
def _environment() -> Environment:
    """Return the environment of transformers' `_compile_jinja_template`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  the arguments of transformers' filter
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Return JSON without the escapes of HTML that Jinja's own filter makes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(reason: object) -> NoReturn:
    raise _RefusalError(str(reason))


def _line_number(error: Exception) -> int | None:
    """Return the line of the template that an error comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
    return lines[-1] if lines else None


def _source_line(source: str, number: int | None) -> str:
    """Return where in the template an error is, as a remark."""
    lines = source.splitlines()
    if number is None or not 0 < number <= len(lines):
        return ""
    line = " ".join(lines[number - 1].split())
    return f" (line {number}: {line if len(line) <= 80 else line[:80] + '…'})"


def render_unfinished(
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Mapping[str, object] | None = None,
) -> tuple[str, str]:
    """Return the chat up to the content of its last message, and this content as it is written.

    What the template writes behind the content is left out, so that it can be continued.

    Raises:
        GattError: the template refuses the chat, or changes the words of this message.
    """
    *earlier, last = messages
    marked: list[Message] = [*earlier, {"role": last["role"], "content": "QX0XQ"}]
    now = datetime.now()  # the two renderings must not fall on different days
    text, marked_text = (
        template.render(chat, add_generation_prompt=False, now=now, variables=variables)
        for chat in (messages, marked)
    )
    before, mark, after = marked_text.rpartition("QX0XQ")
    for written in _written_forms(last["content"]) if mark else ():
        # What is before it may differ: some templates write thoughts in a form of their own.
        if text.endswith(written + after) and (written or text == before + after):
            return text[: len(text) - len(written + after)], written
    raise GattError(
        "The model's chat template changes the words of the last message, so it cannot be "
        "continued. Send it without continue_final_message."
    )


def answer_spans(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """Return the rendered chat, and where each answer stands in it with its end-of-turn token.

    Rendering the chat up to an answer would not do. Some templates write earlier answers otherwise
    than the last (Qwen3 drops their reasoning), so this is not a prefix of the chat. Instead, the
    contents are located between the fixed texts that the template writes around them.

    Raises:
        GattError: the template changes the words of a message.
    """
    now = datetime.now()  # the renderings compared here must not fall on different days
    text = template.render(messages, add_generation_prompt=False, now=now)
    fixed = _fixed_texts(template, messages, now)
    end_of_turn = _end_of_turn(template, messages, now)
    spans = _content_spans(text, fixed, [message["content"] for message in messages])
    if not spans:
        raise GattError(
            "The model's chat template changes the words of a message, so the answers cannot be "
            "located in the rendered chat. Take a model with another template."
        )
    return text, [
        (start, end + len(end_of_turn) if text.startswith(end_of_turn, end) else end)
        for (start, end), message in zip(spans, messages, strict=True)
        if message["role"] == "assistant"
    ]


def _end_of_turn(template: ChatTemplate, messages: Sequence[Message], now: datetime) -> str:
    """Return the text that ends an answer: what follows one in the middle of a chat and at its end.

    In the middle, the start of the next message follows too; at the end, perhaps another token.
    """
    longer: list[Message] = [
        *messages,
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "Yes."},
    ]
    fixed = _fixed_texts(template, longer, now)
    pairs = zip(fixed[len(messages)], fixed[-1], strict=False)
    common = "".join(char for char, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    # Two different special tokens may begin alike: cut an incomplete one.
    return re.sub(r"\s*(<[^>]*)?$", "", common)


def _fixed_texts(template: ChatTemplate, messages: Sequence[Message], now: datetime) -> list[str]:
    """Return what the template writes before, between and after the contents of `messages`."""
    marked: list[Message] = [
        {"role": message["role"], "content": f"QX{n}XQ"} for n, message in enumerate(messages)
    ]
    text = template.render(marked, add_generation_prompt=False, now=now)
    return re.split(r"QX\d+XQ", text)


def _content_spans(text: str, fixed: Sequence[str], contents: Sequence[str]) -> list[Span]:
    """Return where `contents` stand in `text`; [] if it is not made of `fixed` and `contents`."""
    if len(fixed) != len(contents) + 1 or not text.startswith(fixed[0]):
        return []
    spans: list[Span] = []
    end = len(fixed[0])
    for content, after in zip(contents, fixed[1:], strict=True):
        forms = _written_forms(content)
        written = next((form for form in forms if text.startswith(form + after, end)), None)
        if written is None:
            return []
        spans.append((end, end + len(written)))
        end += len(written) + len(after)
    return spans if end == len(text) else []


def _written_forms(content: str) -> tuple[str, ...]:
    """Return how a template may write a content: many strip it, some that of one role only."""
    return (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"))
