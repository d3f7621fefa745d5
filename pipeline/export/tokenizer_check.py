"""Does llama.cpp read chats in the very tokens that the model was trained with? Asked with chats that are apt to differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import GattError
from pipeline.gatt.ghost import augment
from pipeline.gguf.reader import open_gguf
from pipeline.inference.chat_template import NO_THINKING, ChatTemplate
from pipeline.records import Message

_TRICKY = (
    "Hi",
    "  spaces before and after  ",
    "line\n\n\nbreaks,\ttabs\r\nand 1234567890",
    "naïve café, 漢字 и 🙂‍↔️ é",
    "It's 2,026 and I'll pay €35.50 {\"x\": [1, 2]} x**2",
    "<|im_end|> </s> <eos> <|eot_id|> [/INST] <think>",
)


class Chats(NamedTuple):
    """Chats that a GGUF's template takes, and how it renders each."""

    messages: list[list[Message]]
    texts: list[str]


def sample_chats(file: Path) -> Chats:
    """What to ask llama.cpp with the GGUF `file`: `probe` it for the tokens of the texts."""
    info = open_gguf(file)
    template = ChatTemplate(info.chat_template, info.bos, info.eos)
    messages = [chat for chat in _chats() if _takes(template, chat)]
    return Chats(messages, [template.render(chat) for chat in messages])


def find_mismatch(chats: Chats, found: Sequence[list[int]], tokenizer: Any) -> str:
    """Where llama.cpp `found` other tokens in a chat than the Hugging Face tokenizer, in words; "" for nowhere."""
    for chat, text, ids in zip(*chats, found, strict=True):
        expected = list(
            tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False, **NO_THINKING
            )
        )
        if ids != expected:
            at = next(
                (n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b),
                min(len(ids), len(expected)),
            )
            return f"token {at} of {text[:60]!r}: {ids[at : at + 3]} instead of {expected[at : at + 3]}"
    return ""


def _chats() -> list[list[Message]]:
    single: list[list[Message]] = [[{"role": "user", "content": text}] for text in _TRICKY]
    long = list(
        augment(_TRICKY, [text.strip() for text in reversed(_TRICKY[1:])], [""] * len(_TRICKY), "")
    )
    return [*single, long, [{"role": "system", "content": "Be brief."}, *long]]


def _takes(template: ChatTemplate, chat: Sequence[Message]) -> bool:
    """Whether the template takes such a chat (some have no system message)."""
    try:
        template.render(chat)
    except GattError:
        return False
    return True
