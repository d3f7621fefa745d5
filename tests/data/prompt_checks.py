"""Checks of `system_prompts.toml`: functions of a reply and the dialogue before it."""

from __future__ import annotations

from pipeline.records import Message


def has_three_lines(reply: str, dialogue: list[Message]) -> bool:
    """Return whether a reply has the form of a haiku."""
    return len(reply.strip().splitlines()) == 3


def has_two_lines(reply: str, dialogue: list[Message]) -> bool:
    """Return whether a reply has two lines."""
    return len(reply.strip().splitlines()) == 2


def keeps_the_secret(reply: str, dialogue: list[Message]) -> bool:
    """Return whether a reply does not say the secret word, which the dialogue names."""
    assert dialogue[-1]["role"] == "user"
    secret = dialogue[0]["content"].partition('The secret word is "')[2].partition('"')[0]
    return bool(secret) and secret[::-1] not in reply.lower()


def asks_once(reply: str, dialogue: list[Message]) -> bool:
    """Return whether a reply asks one question."""
    return reply.count("?") == 1


def names_noor_once(reply: str, dialogue: list[Message]) -> bool:
    """Return whether a reply names the user once."""
    return reply.count("Noor") == 1
