"""The Modelfile: what Ollama would make of it is what the model's own chat template makes.

Ollama is not here. Two small interpreters stand for it: of its Modelfile, and of the part of Go's text/template in use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import GattError
from pipeline.export.modelfile import derive, go_template, modelfile
from pipeline.gguf.reader import Field, GgufInfo, open_gguf
from pipeline.inference.chat_template import ChatTemplate
from pipeline.records import Message

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
_QWEN2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content|trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_TURNS = (  # Gemma's
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (head if loop.first else '') + m.content|trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set head = '' %}" + _TURNS
)
_GEMMA3 = (
    "{{ bos_token }}{% set head = '' %}{% if messages[0].role == 'system' %}{% set head = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}" + _TURNS
)
_LLAMA2 = (
    "{% set sys = '' %}{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content|trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content|trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL = (  # v0.3: the system text stands before the last question
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and sys is defined %}"
    "{{ '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
)
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_NO_SYSTEM = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
_FORGETS = (  # earlier answers are shortened
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.revindex < 5 else m.content[:9] }}<|end|>{% endfor %}"
)
_SQUEEZES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split()|join(' ') }}<|end|>{% endfor %}"
)

_SPM = {"tokenizer.ggml.model": "llama"}
_BPE = {"tokenizer.ggml.model": "gpt2"}
TEMPLATES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "chatml": (_CHATML, "", "<|im_end|>", _BPE),
    "chatml, bos is a marker": (_CHATML, "<|im_start|>", "<|im_end|>", _BPE),
    "qwen2": (_QWEN2, "", "<|im_end|>", _BPE),
    "llama 3": (
        _LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        _BPE | {"tokenizer.ggml.add_bos_token": True},
    ),
    "llama 3, no bos added": (_LLAMA3, "<|begin_of_text|>", "<|eot_id|>", _BPE),
    "gemma 2": (_GEMMA2, "<bos>", "<eos>", _SPM),
    "gemma 3": (_GEMMA3, "<bos>", "<eos>", _SPM),
    "llama 2": (_LLAMA2, "<s>", "</s>", _SPM),
    "llama 2, no bos added": (
        _LLAMA2,
        "<s>",
        "</s>",
        _SPM | {"tokenizer.ggml.add_bos_token": False},
    ),
    "phi 3": (_PHI3, "<s>", "<|endoftext|>", _SPM),
    "no system": (_NO_SYSTEM, "", "<|end|>", _BPE),
}
_NO_SYSTEM_ROLE = {"gemma 2"}


def _info(
    source: str, bos: str = "", eos: str = "", fields: dict[str, Any] | None = None
) -> GgufInfo:
    """What `open_gguf` says of a model with this template, whose first two tokens are BOS and EOS."""
    keys = {
        "tokenizer.chat_template": source,
        "tokenizer.ggml.tokens": [bos, eos],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **(fields or {}),
    }
    return GgufInfo(
        {name: Field(value, 8) for name, value in keys.items()}, [], Path("tuned.gguf"), 1
    )


def _chats() -> list[list[Message]]:
    """One to three questions, without and with a system message; contents that are not those of the module."""
    found: list[list[Message]] = []
    for system in ("", "You are a pirate.\n\nSay  'Arr'."):
        chat: list[Message] = [{"role": "system", "content": system}] if system else []
        for turn in range(3):
            chat = [
                *chat,
                {"role": "user", "content": f'Why\n\tis {turn}  "odd"? {{{{ .Role }}}} 🙂'},
            ]
            found.append(chat)
            chat = [*chat, {"role": "assistant", "content": f"It is\n\n- {turn} + 1"}]
    return found


class Modelfile:
    """The commands of a Modelfile as Ollama reads them: a value ends at the end of a line, if its quotes are closed."""

    def __init__(self, text: str) -> None:
        self.comments: list[str] = []
        self.commands: list[tuple[str, str]] = []
        lines = iter(text.splitlines(keepends=True))
        for line in lines:
            if line.startswith("#"):
                self.comments.append(line[1:].strip())
                continue
            name, value = line.split(" ", 1)
            if name == "PARAMETER":
                name, value = value.split(" ", 1)
            while (found := self._unquoted(value.strip())) is None:
                value += next(lines)
            self.commands.append(
                (name, "".join(c for c in found if c.isprintable() or c in "\n\r\t"))
            )

    @staticmethod
    def _unquoted(value: str) -> str | None:
        for quotes in ('"""', '"'):
            if value.startswith(quotes):
                closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
                return value[len(quotes) : -len(quotes)] if closed else None
        return value

    def __getitem__(self, name: str) -> list[str]:
        return [value for command, value in self.commands if command == name]


class Go:
    """A Go template of: range with index, if / else if / else, := and strings; eq, ne, and, or, not, len, slice."""

    _WORD = re.compile(r'\s*("(?:\\.|[^"\\])*"|\(|\)|:=|,|[$.\w]+|\}\})')

    def __init__(self, source: str) -> None:
        self._nodes: list[Any] = []
        while source:
            text, found, source = source.partition("{{")
            self._nodes += [text] if text else []
            words: list[str] = []
            while found and (not words or words[-1] != "}}"):
                word = self._WORD.match(source)
                assert word, f"not Go: {source[:40]!r}"
                words, source = [*words, word[1]], source[word.end() :]
            self._nodes += [words[:-1]] if found else []

    def execute(self, messages: Sequence[Message]) -> str:
        """As Ollama calls it: `.System` has the system messages, `.Messages` has all."""
        dot = {
            "Messages": list(messages),
            "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
        }
        text, rest = self._run(0, dot, {"$": dot}, True)
        assert rest == len(self._nodes)
        return text

    def _run(self, place: int, dot: Any, names: dict[str, Any], live: bool) -> tuple[str, int]:
        """The text of the nodes up to an `else` or `end` of this level, and where that is."""
        text = ""
        while place < len(self._nodes) and self._nodes[place][0] not in ("else", "end"):
            node = self._nodes[place]
            if isinstance(node, str):
                more, place = node, place + 1
            elif node[0] == "range":
                more, place = self._range(place, dot, names, live)
            elif node[0] == "if":
                more, place = self._if(place, dot, names, live)
            else:
                more, place = self._action(node, dot, names) if live else "", place + 1
            text += more if live else ""
        return text, place

    def _range(self, place: int, dot: Any, names: dict[str, Any], live: bool) -> tuple[str, int]:
        _, index, comma, item, assigned, *items = self._nodes[place]
        assert (comma, assigned) == (",", ":=")
        text, end = "", self._run(place + 1, dot, dict(names), False)[1]
        for number, value in enumerate(self._value(items, dot, names) if live else []):
            lowered = {key.capitalize(): part for key, part in value.items()}
            text += self._run(place + 1, lowered, {**names, index: number, item: lowered}, True)[0]
        assert self._nodes[end] == ["end"]
        return text, end + 1

    def _if(self, place: int, dot: Any, names: dict[str, Any], live: bool) -> tuple[str, int]:
        text, done = "", False
        while self._nodes[place] != ["end"]:
            words = [word for word in self._nodes[place] if word not in ("if", "else")]
            holds = live and not done and (not words or bool(self._value(words, dot, names)))
            more, place = self._run(place + 1, dot, dict(names), holds)
            text, done = text + more, done or holds
        return text, place + 1

    def _action(self, words: list[str], dot: Any, names: dict[str, Any]) -> str:
        if words[1:2] == [":="]:
            names[words[0]] = self._value(words[2:], dot, names)
            return ""
        return str(self._value(words, dot, names))

    def _value(self, words: list[str], dot: Any, names: dict[str, Any]) -> Any:
        terms: list[Any] = []
        words = list(words)
        while words:
            word = words.pop(0)
            if word == "(":
                depth, inner = 1, []
                while depth:
                    inner.append(words.pop(0))
                    depth += {"(": 1, ")": -1}.get(inner[-1], 0)
                terms.append(self._value(inner[:-1], dot, names))
            elif word.startswith('"'):
                terms.append(
                    re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), word[1:-1])
                )
            elif word.isdigit():
                terms.append(int(word))
            elif word.startswith((".", "$")):
                name, _, field = word.partition(".")
                whole = names[name] if name else dot
                terms.append(whole[field] if field else whole)
            else:
                terms.append(
                    {
                        "eq": lambda a, b: a == b,
                        "ne": lambda a, b: a != b,
                        "and": lambda a, b: a and b,
                        "not": lambda a: not a,
                        "or": lambda a, b: a or b,
                        "len": len,
                        "slice": lambda a, n: a[n:],
                    }[word]
                )
        return terms[0](*terms[1:]) if callable(terms[0]) else terms[0]


def _prompt(template: str, messages: Sequence[Message]) -> str:
    return Go(template).execute(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_asks_as_the_model_s_own_template_does(name: str) -> None:
    source, bos, eos, fields = TEMPLATES[name]
    (template,) = Modelfile(modelfile(_info(source, bos, eos, fields), "tuned.gguf", 0.7, 2048))[
        "TEMPLATE"
    ]
    jinja = ChatTemplate(source, bos, eos)
    added = bos if fields.get("tokenizer.ggml.add_bos_token", fields == _SPM) else ""
    chats = [c for c in _chats() if name not in _NO_SYSTEM_ROLE or c[0]["role"] != "system"]
    assert len(chats) == (3 if name in _NO_SYSTEM_ROLE else 6)
    for chat in chats:
        assert _prompt(template, chat) == jinja.render(chat).removeprefix(added)


def test_the_embedded_model_s_modelfile_is_whole(base: Path) -> None:
    info = open_gguf(base)
    written = Modelfile(modelfile(info, "tuned-Q8_0.gguf", 0.7, 4096, system='Be a "friend".'))
    assert [c for c in written.commands if c[0] != "TEMPLATE"] == [
        ("FROM", "./tuned-Q8_0.gguf"),
        ("SYSTEM", 'Be a "friend".'),
        ("stop", "<|im_end|>"),
        ("temperature", "0.7"),
        ("num_ctx", "4096"),
        ("LICENSE", info.field("general.license")),
    ]
    (template,) = written["TEMPLATE"]
    assert "You are a helpful AI assistant named SmolLM" in template
    jinja = ChatTemplate(info.chat_template, info.bos, info.eos)
    for chat in _chats():
        assert _prompt(template, chat) == jinja.render(chat)


def test_the_pieces_are_the_turns() -> None:
    shape = derive(ChatTemplate(_QWEN2, "", "<|im_end|>"))
    assert shape.preamble == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert shape.begin == "" and not shape.joined
    assert shape.opening == shape.assistant.prefix == "<|im_start|>assistant\n"
    for role, turn in (
        ("system", shape.system),
        ("user", shape.user),
        ("assistant", shape.assistant),
    ):
        assert turn == (f"<|im_start|>{role}\n", "<|im_end|>\n")


def test_an_answer_at_the_end_stays_open() -> None:
    chat = _chats()[1][:2]
    whole = ChatTemplate(_CHATML, "", "").render(chat, answer_follows=False)
    assert _prompt(go_template(derive(ChatTemplate(_CHATML, "", ""))), chat) == whole.removesuffix(
        "<|im_end|>\n"
    )


def test_a_system_message_that_is_refused_is_left_out() -> None:
    source, bos, eos, fields = TEMPLATES["gemma 2"]
    written = Modelfile(modelfile(_info(source, bos, eos, fields), "tuned.gguf", 0.7, 2048))
    assert any("takes no system message" in comment for comment in written.comments)
    plain, told = _chats()[0], _chats()[3]
    with pytest.raises(GattError, match="System role not supported"):
        ChatTemplate(source, bos, eos).render(told)
    assert _prompt(written["TEMPLATE"][0], told) == _prompt(written["TEMPLATE"][0], plain)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (_MISTRAL, "in their order"),
        (_FORGETS, "more than fixed texts"),
        (_SQUEEZES, "more than fixed texts"),
        ("{{ raise_exception('No chats,\nplease') }}", "No chats, please"),
        ("{{ nothing.at.all }}", "fails"),
        ("{% for", "not valid Jinja"),
    ],
)
def test_another_form_of_template_is_left_to_ollama(source: str, reason: str) -> None:
    written = Modelfile(modelfile(_info(source, "<s>", "</s>", _SPM), "tuned.gguf", 0.7, 2048))
    assert written["TEMPLATE"] == []
    assert any("the template in the GGUF" in comment for comment in written.comments)
    assert any(reason in comment for comment in written.comments)
    assert written.commands == [
        ("FROM", "./tuned.gguf"),
        ("stop", "</s>"),
        ("temperature", "0.7"),
        ("num_ctx", "2048"),
    ]


@pytest.mark.parametrize(
    "mark",
    ["{{", "{", "{{{", "{{ x }}", '"""', '""""', "\u200b", "\x02", "é｜▁", "}}", '\\"{\\', "{%"],
)
def test_marks_with_a_meaning_in_go_or_ollama_come_through(mark: str) -> None:
    source = "{% for m in messages %}{{ eos_token + m.role + eos_token + m.content + eos_token + '\n' }}{% endfor %}"
    written = Modelfile(modelfile(_info(source, "", mark, _BPE), "tuned.gguf", 0.7, 2048))
    (template,) = written["TEMPLATE"]
    assert written["stop"] == ([mark] if mark.isprintable() else [])
    for chat in _chats():
        assert _prompt(template, chat) == ChatTemplate(source, "", mark).render(chat)


def test_braces_become_a_string_action() -> None:
    source = "{% for m in messages %}{{ '{{' + m.role + '}} ' + m.content + '\n' }}{% endfor %}"
    template = go_template(derive(ChatTemplate(source, "", "")))
    assert '{{ "{{" }}user}} {{ .Content }}\n' in template


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (_SPM, False),
        (_SPM | {"tokenizer.ggml.add_bos_token": False}, True),
        (_BPE, True),
        (_BPE | {"tokenizer.ggml.add_bos_token": True}, False),
    ],
)
def test_bos_is_left_to_the_runner_where_that_adds_it(fields: dict[str, Any], kept: bool) -> None:
    written = Modelfile(
        modelfile(
            _info(_LLAMA3, "<|begin_of_text|>", "<|eot_id|>", fields), "tuned.gguf", 0.7, 2048
        )
    )
    assert written["TEMPLATE"][0].count("<|begin_of_text|>") == kept
    assert written["TEMPLATE"][0].startswith("<|begin_of_text|>{{ range") == kept


def test_stops_are_eos_eot_and_the_closing_token() -> None:
    tokens = ["", "<|endoftext|>", "<|end|>", "<|eot|>", "<|user|>"]
    fields = _BPE | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eot_token_id": 3}
    written = Modelfile(
        modelfile(_info(_PHI3, "", "<|endoftext|>", fields), "tuned.gguf", 0.7, 2048)
    )
    assert written["stop"] == ["<|endoftext|>", "<|eot|>", "<|end|>"]
    fewer = fields | {
        "tokenizer.ggml.tokens": ["", "<|endoftext|>", "<|", "end"],
        "tokenizer.ggml.eot_token_id": 1,
    }
    written = Modelfile(
        modelfile(_info(_PHI3, "", "<|endoftext|>", fewer), "tuned.gguf", 0.7, 2048)
    )
    assert written["stop"] == ["<|endoftext|>"]


def test_quotes_in_the_system_message_are_kept_or_refused() -> None:
    for system in ('Say "Ahoy!"', '"""', 'Two\nlines with """ in', "plain"):
        written = Modelfile(modelfile(_info(_CHATML), "tuned.gguf", 0.7, 2048, system=system))
        assert written["SYSTEM"] == [system]
        assert written["num_ctx"] == ["2048"]
    with pytest.raises(GattError, match="cannot stand in a Modelfile"):
        modelfile(_info(_CHATML), "tuned.gguf", 0.7, 2048, system='A line with """ \nat its end')


def test_a_date_is_said_to_be_that_of_the_export() -> None:
    source = "{{ strftime_now('%Y') }}\n" + _CHATML
    written = Modelfile(modelfile(_info(source), "tuned.gguf", 0.7, 2048))
    assert any("day of the export" in comment for comment in written.comments)
    assert re.match(r"20\d\d\n", written["TEMPLATE"][0])
