"""Read a system prompt: a text file, or a character card (V1 to V3) as JSON or in a PNG image.

Card formats: https://github.com/malfoyslastname/character-card-spec-v2 and
https://github.com/kwaroran/character-card-spec-v3.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.files import decode_text

_PNG = b"\x89PNG\r\n\x1a\n"
_KEYWORDS = ("ccv3", "chara")
"""Keywords of the text chunks with a card: that of V3 comes first, V2 is for older programs."""
_FIELDS = {
    "description": "{text}",
    "personality": "Personality: {text}",
    "scenario": "Scenario: {text}",
    "mes_example": "Examples of how {name} talks:\n{text}",
    "first_mes": "{name} begins the conversation with:\n{text}",
}
"""The parts of a card that follow its `system_prompt`, and how the prompt introduces them."""
_USER = "User"
"""Stands for {{user}}."""


class Prompt(NamedTuple):
    """A system prompt, and the name of the character if it comes from a card."""

    text: str
    name: str = ""


def read_prompt(path: Path) -> Prompt:
    """Read the prompt in a text file, or make one of a character card.

    Raises:
        GattError: no such file, no text in it, or an image or JSON file without a card.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise GattError(
            f"Cannot read the prompt {path}: {error.strerror}. Expected a text file, or a "
            "character card (PNG or JSON)."
        ) from error
    if data.startswith(_PNG):
        return _prompt_of(_card_of_image(data, path), path)
    if data.startswith((b"\xff\xd8\xff", b"RIFF", b"GIF8")):
        raise GattError(f"{path} is an image, but not a PNG. Character cards are PNG or JSON.")
    text = decode_text(data, path).strip()
    if path.suffix.lower() == ".json" or text.startswith("{"):
        if card := _parsed(text):
            return _prompt_of(card, path)
        if path.suffix.lower() == ".json":
            raise GattError(
                f"{path} is not a character card: expected a JSON object with `data`, or with "
                "`name` and `description`."
            )
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
    fields = card.get("data", card)
    is_card = isinstance(fields, dict) and fields.keys() & {"name", "system_prompt", *_FIELDS}
    return fields if is_card else None


def _card_of_image(data: bytes, path: Path) -> Mapping[str, object]:
    texts = dict(_text_chunks(data))
    for keyword in _KEYWORDS:
        if keyword in texts:
            try:
                decoded = base64.b64decode(texts[keyword], validate=False).decode("utf-8")
            except (binascii.Error, UnicodeDecodeError):
                decoded = ""
            if card := _parsed(decoded):
                return card
            raise GattError(
                f"The character card in {path} is broken: expected JSON in Base64 under "
                f"{keyword!r}. Export the card anew."
            )
    raise GattError(
        f"{path} is an image without a character card (no text chunk {' or '.join(_KEYWORDS)}). "
        "Programs that resize or convert an image remove it: take the original file."
    )


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
    name = _field(card, "name") or "the character"
    instruction = _field(card, "system_prompt").replace("{{original}}", "").strip()
    parts = [
        template.format(name=name, text=text)
        for field, template in _FIELDS.items()
        if (text := _field(card, field))
    ]
    if not parts and not instruction:
        raise GattError(
            f"The character card {path} has no text: description, personality, scenario, "
            "system_prompt, first_mes and mes_example are empty."
        )
    opening = instruction or f"You are {name}. Answer as {name} would, and stay in character."
    return Prompt(_filled("\n\n".join([opening, *parts]), name), _field(card, "name"))


def _field(card: Mapping[str, object], key: str) -> str:
    value = card.get(key)
    return value.strip() if isinstance(value, str) else ""


def _filled(text: str, name: str) -> str:
    """Return a text with the names in place of a card's macros."""
    text = re.sub(r"\{\{char\}\}|<BOT>", lambda _: name, text, flags=re.IGNORECASE)
    text = re.sub(r"\{\{user\}\}|<USER>", _USER, text, flags=re.IGNORECASE)
    text = re.sub(r"<START>\s*", "", text, flags=re.IGNORECASE)
    text = "\n".join(text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()
