"""Chat templates render as in transformers: families, system messages, dates and time zones."""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from support.cli import Completed, call_gatt
from support.family_templates import FAMILIES

from pipeline.errors import GattError
from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.inference import chat_template
from pipeline.inference.chat_template import NO_THINKING, ChatTemplate, answer_spans
from pipeline.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_INSTANTS = (
    datetime(2024, 2, 29, 0, 30, tzinfo=timezone.utc),
    datetime(2025, 12, 31, 13, 0, tzinfo=timezone.utc),
    datetime(2026, 7, 4, 12, 0, tzinfo=timezone.utc),
)
_ZONES = {
    "Etc/GMT+12": ("28 Feb 2024", "31 Dec 2025"),
    "Pacific/Kiritimati": ("29 Feb 2024", "01 Jan 2026"),
}
"""Time zones 26 hours apart, and the local dates of the first two instants."""
_DATED = ("Llama 3.2", "Mistral v7", "Granite", "SmolLM3", "gpt-oss")
_QUESTION: list[Message] = [{"role": "user", "content": "  Is 1 < 2 & \"ü\" 'é'?  "}]
_TURNS: list[Message] = [
    *_QUESTION,
    {"role": "assistant", "content": "Yes, <b>漢字</b>.\n\n"},
    {"role": "user", "content": "And 🙂?"},
]
_SYSTEM: Message = {"role": "system", "content": "Be brief. "}
_CHATS = (_QUESTION, _TURNS, [_SYSTEM, *_QUESTION], [_SYSTEM, *_TURNS])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    import transformers
    from tokenizers import Tokenizer, models

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )


class _FrozenClock(datetime):
    """`datetime` at one instant, in the local time zone."""

    instant = _INSTANTS[0]

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _FrozenClock:
        """Return the instant."""
        return cls.fromtimestamp(cls.instant.timestamp(), tz)


@contextmanager
def _clock_at(instant: datetime, zone: str) -> Iterator[None]:
    import transformers.utils.chat_template_utils as reference

    class Clock(_FrozenClock):
        pass

    Clock.instant = instant
    before = os.environ.get("TZ")
    os.environ["TZ"] = zone
    time.tzset()
    try:
        with (
            mock.patch.object(reference, "datetime", Clock),
            mock.patch.object(chat_template, "datetime", Clock),
        ):
            yield
    finally:
        os.environ.pop("TZ")
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()


def _expected(
    tokenizer: PreTrainedTokenizerFast, family: str, chat: list[Message], *, prompt: bool
) -> str:
    import jinja2

    template = FAMILIES[family]
    tokenizer.bos_token, tokenizer.eos_token = template.bos or None, template.eos or None
    try:
        text: str = tokenizer.apply_chat_template(
            chat,
            chat_template=template.source,
            tokenize=False,
            add_generation_prompt=prompt,
            **NO_THINKING,
        )
    except jinja2.TemplateError as error:
        return f"refused: {error}"
    return text


def _rendered(family: str, chat: list[Message], *, prompt: bool) -> str:
    template = ChatTemplate(*FAMILIES[family])
    try:
        return template.render(chat, add_generation_prompt=prompt)
    except GattError as error:
        return f"refused: {str(error).removeprefix(_REFUSAL)}"


_REFUSAL = "The model's chat template refuses this chat: "


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_rendered_as_in_transformers(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    for chat in _CHATS:
        for prompt in (True, False):
            text = _rendered(family, chat, prompt=prompt)
            assert text == _expected(tokenizer, family, chat, prompt=prompt)
            assert text.startswith("refused") or "And 🙂?" in text or chat is not _TURNS
    refuses = _rendered(family, _CHATS[-1], prompt=True).startswith("refused")
    assert refuses == (family in ("Gemma 1", "Gemma 2", "Mistral v1"))


@pytest.mark.skipif(sys.platform == "win32", reason="time zones of POSIX")
@pytest.mark.parametrize("zone", _ZONES)
@pytest.mark.parametrize("family", _DATED)
def test_dates_are_local_as_in_transformers(
    family: str, zone: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    for instant in _INSTANTS:
        with _clock_at(instant, zone):
            for chat in _CHATS:
                text = _rendered(family, chat, prompt=True)
                assert text == _expected(tokenizer, family, chat, prompt=True)
    for instant, day in zip(_INSTANTS, _ZONES[zone], strict=False):
        with _clock_at(instant, zone):
            assert f"Today Date: {day}\n" in _rendered("Llama 3.2", _QUESTION, prompt=True)


def test_a_given_date_replaces_the_clock() -> None:
    template = ChatTemplate(*FAMILIES["Llama 3.2"])
    text = template.render(_QUESTION, now=datetime(2001, 2, 3))
    assert "Today Date: 03 Feb 2001\n" in text


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"Hermes"}))
def test_the_answers_of_a_family_are_located(family: str) -> None:
    chat: list[Message] = [*_TURNS, {"role": "assistant", "content": "Two."}]
    text, spans = answer_spans(ChatTemplate(*FAMILIES[family]), chat)
    answers = [text[start:end] for start, end in spans]
    assert len(answers) == 2
    assert answers[0].startswith("Yes, <b>漢字</b>.")
    assert answers[1].startswith("Two.")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[5].content }}", "UndefinedError: list object has no element 5"),
        ("\n{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ missing.name }}", "UndefinedError: 'missing' is undefined"),
        ("{{ strftime_now(5) }}", "TypeError"),
        ("{{ messages | tojson(indent='x', nope=1) }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "SecurityError"),
    ],
)
def test_a_template_that_fails_is_one_line_with_its_file_and_place(
    source: str, reason: str
) -> None:
    template = ChatTemplate(source, "", "", "mine.gguf")
    with pytest.raises(GattError) as error:
        template.render(_QUESTION)
    message = str(error.value)
    assert message.startswith(f"The chat template of mine.gguf fails with {reason}")
    line = 2 if source.startswith("\n") else 1
    assert f"(line {line}: {source.strip()[:20]}" in message
    assert "\n" not in message


def test_a_template_that_is_no_jinja_names_its_line() -> None:
    with pytest.raises(GattError, match=r"of mine\.gguf is not valid Jinja: .*\(line 2: {% endif"):
        ChatTemplate("a\n{% endif %}", "", "", "mine.gguf")


def test_transformers_is_not_imported_to_render(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from pipeline.inference.chat_template import ChatTemplate; "
        "ChatTemplate('{{ messages }}', '', '').render([]); "
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


_DATE_IN_SYSTEM = "{{ 'Today: ' + strftime_now('%d %b %Y') + ' ' }}"
_TURNS_OF_TINY = "{% for m in messages %}<|begin|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
_EXPORTED = {
    "date": _DATE_IN_SYSTEM + _TURNS_OF_TINY,
    "generation": _TURNS_OF_TINY.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    ),
    "no tools": "{% if tools is not none %}{{ 'Tools: ' + tools | tojson }}{% endif %}"
    + _TURNS_OF_TINY,
}


def _export(tiny_llama: Path, folder: Path, template: str) -> Completed:
    """Export the tiny model with another chat template."""
    base = folder / "base"
    shutil.copytree(tiny_llama, base)
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    return call_gatt("export", "--model", base, "--format", "F16", "--out", folder / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="time zones of POSIX")
@pytest.mark.parametrize("name", _EXPORTED)
def test_a_model_with_such_a_template_is_exported_wherever_it_is_another_day(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The local date is not that of UTC.
    before_noon = datetime.now(timezone.utc).hour < 12
    monkeypatch.setenv("TZ", "Etc/GMT+12" if before_noon else "Pacific/Kiritimati")
    time.tzset()
    try:
        done = _export(tiny_llama, tmp_path, _EXPORTED[name])
        assert done.returncode == 0, done.stderr
        info = open_gguf(tmp_path / "out" / "base-F16.gguf")
        assert info.chat_template == _EXPORTED[name]
        template = ChatTemplate(info.chat_template, info.bos, info.eos)
        today = f"Today: {datetime.now():%d %b %Y} " if name == "date" else ""
        assert template.render(_QUESTION) == (
            f"{today}<|begin|>user {_QUESTION[0]['content']}<|end|>"
        )
        assert datetime.now().date() != datetime.now(timezone.utc).date()
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_template_that_fails_is_one_line_of_export(tiny_llama: Path, tmp_path: Path) -> None:
    done = _export(tiny_llama, tmp_path, "{{ messages[5].content }}" + _TURNS_OF_TINY)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert "fails with UndefinedError: list object has no element 5 (line 1: " in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "base-F16.gguf").exists()


def test_a_template_that_fails_is_one_line_of_chat(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GgufInfo, "chat_template", "{{ messages[5].content }}")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    done = call_gatt("chat", base)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert f"chat template of {base.name} fails with UndefinedError" in line
    assert "Traceback" not in done.stderr
