"""Read a system prompt: a text file, or a character card (V1 to V3) as JSON, PNG or CHARX.

Card formats: https://github.com/malfoyslastname/character-card-spec-v2 and
https://github.com/kwaroran/character-card-spec-v3.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.files import decode_text, without_surrogates

_PNG = b"\x89PNG\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_CHARX_CARD = "card.json"
_KEYWORDS = ("ccv3", "chara")
"""Keywords of the text chunks with a card: that of V3 comes first, V2 is for older programs."""
_FIELDS = {
    "description": "{text}",
    "personality": "Personality: {text}",
    "scenario": "Scenario: {text}",
    "mes_example": "Examples of how {name} talks:\n{text}",
    "first_mes": "{name} begins the conversation with:\n{text}",
    "depth_prompt": "{text}",
    "post_history_instructions": "{text}",
}
"""The parts of a card that follow its `system_prompt`, and how the prompt introduces them.

Programs repeat the last two close to the end of a chat; a prompt has them at its end.
"""
_COMMENT = re.compile(r"\{\{\s*(//|comment:).*?\}\}", re.IGNORECASE | re.DOTALL)
_ORIGINAL = re.compile(r"\{\{\s*original\s*\}\}", re.IGNORECASE)
"""Stands for the system prompt of the program."""
_CHARACTER = re.compile(r"\{\{\s*char\s*\}\}|<BOT>", re.IGNORECASE)
_PERSON = re.compile(r"\{\{\s*user\s*\}\}|<USER>", re.IGNORECASE)
_USER = "User"
"""Stands for {{user}}."""
_EXPECTED = "expected a JSON object with `data`, or with `name` and `description`"


class Prompt(NamedTuple):
    """A system prompt, and the name of the character if it comes from a card."""

    text: str
    name: str = ""


def read_prompt(path: Path) -> Prompt:
    """Read the prompt in a text file, or make one of a character card.

    Raises:
        GattError: no such file, no text in it, or an image, archive or JSON file without a card.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GattError(
            f"Cannot read the prompt {path}: {error.strerror}. Expected a text file, or a "
            "character card (PNG, JSON or CHARX)."
        ) from error
    if data.startswith(_PNG):
        return _prompt_of(_card_of_image(data, path), path)
    if data.startswith(_ZIP):
        return _prompt_of(_card_of_archive(data, path), path)
    if data.startswith((b"\xff\xd8\xff", b"RIFF", b"GIF8")):
        raise GattError(
            f"{path} is an image, but not a PNG. Character cards are PNG, JSON or CHARX."
        )
    text = decode_text(data, path).strip().replace("\r\n", "\n")
    if path.suffix.lower() == ".json" or text.startswith("{"):
        if card := _parsed(text):
            return _prompt_of(card, path)
        if path.suffix.lower() == ".json":
            raise GattError(f"{path} is not a character card: {_EXPECTED}.")
    if not text:
        raise GattError(f"The prompt {path} is empty. Write the system prompt into it.")
    return Prompt(text)


def _parsed(text: str) -> Mapping[str, object] | None:
    """Return the fields of a card in JSON; None if it is no object, or has none of a card."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(card, dict):
        return None
    fields = _table(card.get("data")) or card
    is_card = fields.keys() & {"name", "system_prompt", *_FIELDS}
    return fields if is_card else None


def _card_of_image(data: bytes, path: Path) -> Mapping[str, object]:
    texts = dict(_text_chunks(data))
    keywords = [keyword for keyword in _KEYWORDS if keyword in texts]
    for keyword in keywords:
        try:
            # Some programs leave out the padding; too much of it is ignored.
            decoded = base64.b64decode(texts[keyword] + b"==", validate=False).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            continue
        if card := _parsed(decoded):
            return card
    if keywords:
        raise GattError(
            f"The character card in {path} is broken: expected JSON in Base64 under "
            f"{' or '.join(map(repr, keywords))}. Export the card anew."
        )
    raise GattError(
        f"{path} is an image without a character card (no text chunk {' or '.join(_KEYWORDS)}). "
        "Programs that resize or convert an image remove it: take the original file."
    )


def _card_of_archive(data: bytes, path: Path) -> Mapping[str, object]:
    """Return the card of a CHARX file, a zip archive that has images next to it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            text = decode_text(archive.read(_CHARX_CARD), path / _CHARX_CARD)
    except KeyError as error:
        raise GattError(
            f"{path} is an archive without {_CHARX_CARD}, so it is not a character card (CHARX). "
            "Unpack it and name the prompt in it."
        ) from error
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise GattError(f"{path} is a damaged archive ({error}). Export the card anew.") from error
    if card := _parsed(text):
        return card
    raise GattError(f"{_CHARX_CARD} in {path} is not a character card: {_EXPECTED}.")


def _text_chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield keyword and text of the chunks tEXt, zTXt and iTXt, as far as the image is whole."""
    position = len(_PNG)
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        content = data[position + 8 : position + 8 + length]
        position += 12 + length  # length, kind, and a checksum at the end
        keyword, _, text = content.partition(b"\0")
        compressed = kind == b"zTXt"
        if kind == b"iTXt":
            compressed = text[:1] == b"\1"
            *_, text = text[2:].split(b"\0", 2)  # after the language and a translated keyword
        elif compressed:
            text = text[1:]
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            yield keyword.decode("latin-1").lower(), _decompressed(text) if compressed else text


def _decompressed(text: bytes) -> bytes:
    try:
        return zlib.decompress(text)
    except zlib.error:
        return b""


def _prompt_of(card: Mapping[str, object], path: Path) -> Prompt:
    """Return a card as one text.

    Raises:
        GattError: it has no text but a name.
    """
    own_name = _field(card, "nickname") or _field(card, "name")
    name = own_name or "the character"
    instruction = _field(card, "system_prompt")
    parts = [
        template.format(name=name, text=text)
        for field, template in _FIELDS.items()
        if (text := _field(card, field))
    ]
    if not parts and not instruction:
        raise GattError(
            f"The character card {path} has no text: {', '.join(['system_prompt', *_FIELDS])} are "
            "empty."
        )
    if entries := _book_entries(card):
        log(
            f"{path.name}: its character book is left out ({entries} entries), which programs add "
            "by the words of a chat. Write what always holds into the description."
        )
    opening = instruction or f"You are {name}. Answer as {name} would, and stay in character."
    return Prompt(_filled("\n\n".join([opening, *parts]), name), own_name)


def _field(card: Mapping[str, object], key: str) -> str:
    """Return a text of a card without comments; "" if it has none."""
    value = card.get(key)
    if key == "depth_prompt":  # of SillyTavern
        value = _table(_table(card.get("extensions")).get("depth_prompt")).get("prompt")
    text = without_surrogates(value) if isinstance(value, str) else ""
    return _ORIGINAL.sub("", _COMMENT.sub("", text)).strip()


def _table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _book_entries(card: Mapping[str, object]) -> int:
    """Return how many entries the character book of a card has."""
    entries = _table(card.get("character_book")).get("entries")
    return len(entries) if isinstance(entries, list | dict) else 0


def _filled(text: str, name: str) -> str:
    """Return a text with the names in place of a card's macros."""
    text = _CHARACTER.sub(lambda _: name, text)
    text = _PERSON.sub(_USER, text)
    text = re.sub(r"<START>\s*", "", text, flags=re.IGNORECASE)
    text = "\n".join(text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()
