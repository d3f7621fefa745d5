"""The Modelfile: Ollama renders chats as the model's own chat template does.

Ollama is not run: `support.go_template` renders TEMPLATE.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.chat_templates import (
    CHATML,
    DEEPSEEK,
    GEMMA2,
    GEMMA3,
    LLAMA2,
    LLAMA3,
    LLAMA31,
    MISTRAL,
    MISTRAL_SMALL,
    NO_SYSTEM,
    PHI3,
    PHI4,
    QWEN2,
    QWEN3,
    SHORTENS,
    SQUEEZES,
    SYSTEM_LAST,
    ZEPHYR,
)
from support.go_template import GoTemplate

from pipeline.errors import GattError
from pipeline.export.modelfile import choose_template, modelfile, write_modelfiles
from pipeline.gguf.formats import KeyValue
from pipeline.gguf.merge import plan_merge, write_skeleton
from pipeline.gguf.reader import Field, GgufInfo, open_gguf
from pipeline.inference.chat_template import ChatTemplate
from pipeline.records import Message

_SPM = {"tokenizer.ggml.model": "llama"}
_BPE = {"tokenizer.ggml.model": "gpt2"}
_ADD_BOS = "tokenizer.ggml.add_bos_token"


class Model(NamedTuple):
    """A chat template with BOS and EOS, and the keys of the GGUF that say whether BOS is added."""

    template: str
    bos: str = ""
    eos: str = ""
    keys: dict[str, Any] = {}  # noqa: RUF012
    takes_system: bool = True

    @property
    def added_bos(self) -> str:
        """What llama.cpp puts in front of a prompt."""
        return self.bos if self.keys.get(_ADD_BOS, self.keys == _SPM) else ""

    def info(self, **keys: Any) -> GgufInfo:
        """Return what `open_gguf` would: the first two tokens are BOS and EOS."""
        values = {
            "tokenizer.chat_template": self.template,
            "tokenizer.ggml.tokens": [self.bos, self.eos],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            **self.keys,
            **{f"tokenizer.ggml.{name}": value for name, value in keys.items()},
        }
        fields = {name: Field(value, 8) for name, value in values.items()}
        path = Path("tuned.gguf")
        return GgufInfo(fields, [], path, 1, (path,))


def _mistral(opening: str, closing: str, answer: str, end: str) -> Model:
    template = MISTRAL.replace("OPEN", opening).replace("CLOSE", closing)
    return Model(
        template.replace("'ANSWER'", f"'{answer}'").replace("'END'", f"'{end}'"),
        "<s>",
        "</s>",
        _SPM,
    )


MODELS = {
    "chatml": Model(CHATML, "", "<|im_end|>", _BPE),
    "chatml, bos is a marker": Model(CHATML, "<|im_start|>", "<|im_end|>", _BPE),
    "qwen2": Model(QWEN2, "", "<|im_end|>", _BPE),
    "qwen3": Model(QWEN3, "", "<|im_end|>", _BPE),
    "llama 3": Model(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", _BPE | {_ADD_BOS: True}),
    "llama 3, no bos added": Model(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", _BPE),
    "llama 3.1": Model(LLAMA31, "<|begin_of_text|>", "<|eot_id|>", _BPE | {_ADD_BOS: True}),
    "llama 3.1, no bos added": Model(LLAMA31, "<|begin_of_text|>", "<|eot_id|>", _BPE),
    "gemma 2": Model(GEMMA2, "<bos>", "<eos>", _SPM, takes_system=False),
    "gemma 3": Model(GEMMA3, "<bos>", "<eos>", _SPM),
    "llama 2": Model(LLAMA2, "<s>", "</s>", _SPM),
    "llama 2, no bos added": Model(LLAMA2, "<s>", "</s>", _SPM | {_ADD_BOS: False}),
    "mistral 0.1": _mistral("[INST] ", " [/INST]", "", " "),
    "mistral 0.2": _mistral("[INST] ", " [/INST]", "", ""),
    "mistral 0.2, spaced": _mistral(" [INST] ", " [/INST]", " ", ""),
    "mistral 0.3, system first": _mistral("[INST] ", "[/INST]", " ", ""),
    "mistral small": Model(MISTRAL_SMALL, "<s>", "</s>", _BPE | {_ADD_BOS: True}),
    "phi 3": Model(PHI3, "<s>", "<|endoftext|>", _SPM),
    "phi 4": Model(PHI4, "", "<|im_end|>", _BPE),
    "phi 4 mini": Model(PHI3.replace(r"\n", "").replace("\n", ""), "", "<|endoftext|>", _BPE),
    "zephyr": Model(ZEPHYR, "<s>", "</s>", _SPM | {_ADD_BOS: False}),
    "deepseek": Model(DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _BPE),
    "no system": Model(NO_SYSTEM, "", "<|end|>", _BPE),
}


def _chats() -> list[list[Message]]:
    """Return chats of one to three questions without, then with a system message.

    Their contents are not those of the trials in the module.
    """
    chats: list[list[Message]] = []
    for system in ("", "You are a pirate.\n\nSay  'Arr'."):
        chat: list[Message] = [Message(role="system", content=system)] if system else []
        for turn in range(3):
            question = f'Why\n\tis {turn}  "odd"? {{{{ .Role }}}} 🙂'
            chat = [*chat, Message(role="user", content=question)]
            chats.append(chat)
            chat = [*chat, Message(role="assistant", content=f"It is\n\n- {turn} + 1")]
    return chats


class Command(NamedTuple):
    """A command of a Modelfile, or a PARAMETER by its own name."""

    name: str
    value: str


def _commands(text: str) -> list[Command]:
    """Read a Modelfile: a quoted value ends with quotes at the end of a line."""
    commands = re.finditer(
        r'^(?!#)(?:PARAMETER )?(\w+) (?:"""(.*?)"""|"(.*?)"|([^"\n].*?))$', text, re.M | re.S
    )
    return [Command(c[1], next(v for v in c.groups()[1:] if v is not None)) for c in commands]


def _values(text: str, name: str) -> list[str]:
    return [command.value for command in _commands(text) if command.name == name]


def _comments(text: str) -> str:
    return "\n".join(re.findall(r"^# (.*)$", text, re.M))


def _written(model: Model, system: str = "", **keys: Any) -> str:
    info = model.info(**keys)
    template = choose_template(info, adds_bos=bool(model.added_bos))
    return modelfile(info, template, "tuned.gguf", 0.7, system)


def _prompt(text: str, messages: Sequence[Message]) -> str:
    (template,) = _values(text, "TEMPLATE")
    return GoTemplate(template).execute(messages)


@pytest.mark.parametrize("name", MODELS)
def test_ollama_renders_chats_as_the_model_s_own_template_does(name: str) -> None:
    model = MODELS[name]
    jinja = ChatTemplate(model.template, model.bos, model.eos)
    written = _written(model)
    chats = [c for c in _chats() if model.takes_system or c[0]["role"] != "system"]
    assert len(chats) == (6 if model.takes_system else 3)
    for chat in chats:
        assert _prompt(written, chat) == jinja.render(chat).removeprefix(model.added_bos)


def test_the_embedded_model_s_modelfile_is_complete(base: Path) -> None:
    info = open_gguf(base)
    template = choose_template(info, adds_bos=False)
    written = modelfile(info, template, "tuned-Q8_0.gguf", 0.7, 'Be a "friend".')
    assert [c for c in _commands(written) if c.name != "TEMPLATE"] == [
        ("FROM", "./tuned-Q8_0.gguf"),
        ("SYSTEM", 'Be a "friend".'),
        ("stop", "<|im_end|>"),
        ("temperature", "0.7"),
        ("num_ctx", "4096"),
        ("LICENSE", info.field("general.license")),
    ]
    assert "You are a helpful AI assistant named SmolLM" in _values(written, "TEMPLATE")[0]
    jinja = ChatTemplate(info.chat_template, info.bos, info.eos)
    for chat in _chats():
        assert _prompt(written, chat) == jinja.render(chat)


def test_an_answer_at_the_end_stays_open() -> None:
    model, chat = MODELS["chatml"], _chats()[1][:2]
    rendered = ChatTemplate(model.template, "", "").render(chat, add_generation_prompt=False)
    assert _prompt(_written(model), chat) == rendered.removesuffix("<|im_end|>\n")


def test_a_system_message_that_is_refused_is_left_out() -> None:
    model = MODELS["gemma 2"]
    written = _written(model)
    assert "takes no system message" in _comments(written)
    plain, with_system = _chats()[0], _chats()[3]
    with pytest.raises(GattError, match="System role not supported"):
        ChatTemplate(model.template, model.bos, model.eos).render(with_system)
    assert _prompt(written, with_system) == _prompt(written, plain)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (SYSTEM_LAST, "more than fixed texts"),
        (SHORTENS, "more than fixed texts"),
        (SQUEEZES, "more than fixed texts"),
        ("{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}", "other texts"),
        ("{{ raise_exception('No chats,\nplease') }}", "No chats, please"),
        ("{{ nothing.at.all }}", "fails"),
        ("{% for", "not valid Jinja"),
        ("{{ '{' }}" + CHATML, "cannot hold '{'"),
        ('{{ \'"""\' }}' + CHATML, "cannot hold"),
        ("\u200b" + CHATML, r"cannot hold '\u200b'"),
    ],
)
def test_an_unknown_template_is_left_to_ollama(template: str, reason: str) -> None:
    written = _written(Model(template, "<s>", "</s>", _SPM))
    assert "the template in the GGUF" in _comments(written)
    assert reason in _comments(written)
    assert _commands(written) == [
        ("FROM", "./tuned.gguf"),
        ("stop", "</s>"),
        ("temperature", "0.7"),
        ("num_ctx", "4096"),
    ]


def test_every_format_gets_a_modelfile_and_a_missing_template_is_reported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "tuned-Q8_0.gguf", tmp_path / "tuned-F16.gguf"]
    monkeypatch.setattr("pipeline.export.modelfile.open_gguf", lambda path: open_gguf(base))
    write_modelfiles(files, 0.5, "")
    assert {p.name for p in tmp_path.iterdir()} == {"Modelfile", "Modelfile-F16"}
    assert _values((tmp_path / "Modelfile").read_text(), "FROM") == ["./tuned-Q8_0.gguf"]
    assert _values((tmp_path / "Modelfile-F16").read_text(), "FROM") == ["./tuned-F16.gguf"]
    assert capsys.readouterr().err == ""
    unknown = replace(Model(SQUEEZES).info(), path=base)
    monkeypatch.setattr("pipeline.export.modelfile.open_gguf", lambda path: unknown)
    write_modelfiles(files, 0.5, "")
    assert capsys.readouterr().err.count("the Modelfile has no TEMPLATE") == 1


class BosCase(NamedTuple):
    """Keys of a GGUF, and how often BOS is in what TEMPLATE renders then."""

    keys: dict[str, Any]
    times: int


@pytest.mark.parametrize(
    "case",
    [
        BosCase(_SPM, 0),
        BosCase(_SPM | {_ADD_BOS: False}, 1),
        BosCase(_BPE, 1),
        BosCase(_BPE | {_ADD_BOS: True}, 0),
    ],
)
@pytest.mark.parametrize("template", [LLAMA3, LLAMA31])
def test_bos_is_left_to_ollama_where_it_adds_one(case: BosCase, template: str) -> None:
    bos = "<|begin_of_text|>"
    written = _written(Model(template, bos, "<|eot_id|>", case.keys))
    for chat in _chats():
        prompt = _prompt(written, chat)
        assert prompt.count(bos) == prompt.startswith(bos) == case.times


@pytest.mark.parametrize(("rule", "times"), [("llama-bpe", 0), ("qwen2", 1)])
def test_whether_ollama_adds_bos_is_read_from_llama_cpp(
    rule: str, times: int, tiny_llama: Path, tmp_path: Path
) -> None:
    """Without `add_bos_token`, which many files lack, the rule for splitting texts decides."""
    file = tmp_path / "tuned-Q8_0.gguf"
    keys: dict[str, KeyValue] = {"tokenizer.ggml.pre": rule, "tokenizer.chat_template": LLAMA3}
    write_skeleton(plan_merge(tiny_llama, keys=keys), file)
    file.write_bytes(file.read_bytes().replace(_ADD_BOS.encode(), b"x" * len(_ADD_BOS)))
    assert open_gguf(file).field(_ADD_BOS) is None and open_gguf(file).bos
    write_modelfiles([file], 0.5, "")
    prompt = _prompt((tmp_path / "Modelfile").read_text(), _chats()[0])
    assert prompt.count(open_gguf(file).bos) == times


def test_stop_texts_are_eos_eot_and_the_closing_token() -> None:
    model = Model(PHI3, "", "<|endoftext|>", _BPE)
    tokens = ["", "<|endoftext|>", "<|end|>", "<|eot|>", "<|user|>"]
    written = _written(model, tokens=tokens, eot_token_id=3)
    assert _values(written, "stop") == ["<|endoftext|>", "<|eot|>", "<|end|>"]
    written = _written(model, tokens=["", "<|endoftext|>", "<|", "end"], eot_token_id=1)
    assert _values(written, "stop") == ["<|endoftext|>"]


def test_a_stop_text_that_ollama_could_not_read_is_left_out() -> None:
    assert _values(_written(Model(CHATML, "", "\x02", _BPE)), "stop") == []


def test_quotes_in_the_system_message_are_kept_or_refused() -> None:
    for system in ('Say "Ahoy!"', '"""', 'Two\nlines with """ in', "plain"):
        written = _written(Model(CHATML), system)
        assert _values(written, "SYSTEM") == [system]
        assert _values(written, "num_ctx") == ["4096"]
    with pytest.raises(GattError, match="cannot stand in a Modelfile"):
        _written(Model(CHATML), 'A line with """ \nat its end')


def test_a_date_is_said_to_be_that_of_the_export() -> None:
    written = _written(Model("{{ strftime_now('%Y') }}\n" + CHATML))
    assert "day of the export" in _comments(written)
    assert re.match(r"20\d\d\n", _prompt(written, _chats()[0]))
