"""The page's dialogs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import NamedTuple

from nicegui import ui

from pipeline.chat.conversation import LAST_TURNS
from pipeline.chat.session import Room, SamplingParams, pluralize

_MAX_SEED = (1 << 31) - 1
_MAX_TEMPERATURE = 2.0


class Settings(NamedTuple):
    """What the settings dialog changes."""

    system: str
    sampling: SamplingParams


async def choose(title: str, text: str, options: Mapping[str, str]) -> str:
    """Return the chosen key of `options`, which maps keys to labels; "" if canceled."""
    with ui.dialog() as dialog, ui.element("div").classes("card").props("role=document"):
        ui.html(escape(title, quote=False), sanitize=True, tag="h2")
        ui.label(text).classes("text")
        with ui.element("div").classes("choices"):
            for key, label in options.items():
                ui.button(label, on_click=_submit(dialog, key)).props("unelevated no-caps")
            ui.button("Cancel", on_click=_submit(dialog, "")).props("flat no-caps")
    choice: object = await dialog
    dialog.delete()
    return choice if isinstance(choice, str) else ""


async def choose_room(room: Room) -> str:
    """Return what to do about a context that is nearly full: summarize, shorten, new, or ""."""
    options: dict[str, str] = {}
    if room.summarizable_turns:
        count = pluralize(room.summarizable_turns, "turn")
        options["summarize"] = (
            f"Sum up {count}; the first and the last {LAST_TURNS} remain word for word"
        )
    if room.tokens_left >= 1:
        options["shorten"] = f"Send it, for an answer of at most {room.tokens_left} tokens"
    options["new"] = "Start a new chat under the same instruction"
    return await choose(
        "The context is nearly full",
        f"With this message the chat has {room.prompt_tokens} tokens, and an answer may take "
        f"{room.max_tokens}; the context is {room.context}. Nothing has been dropped, and nothing "
        "will be without your choice.",
        options,
    )


async def edit_settings(system: str, sampling: SamplingParams, context: int) -> Settings | None:
    """Return the settings as the user changes them; None if canceled."""
    max_tokens = context // 2
    with ui.dialog() as dialog, ui.element("div").classes("card").props("role=document"):
        ui.html("Settings", tag="h2")
        system_field = ui.textarea("System message", value=system).props(
            "outlined autogrow hint='It precedes the chat.'"
        )
        with ui.element("div").classes("fields"):
            temperature_field = ui.number(
                "Temperature", value=sampling.temperature, min=0, max=_MAX_TEMPERATURE, step=0.1
            ).props(f"outlined hint='0 to {_MAX_TEMPERATURE:g}'")
            tokens_field = ui.number(
                "Tokens of an answer", value=sampling.max_tokens, min=1, max=max_tokens, precision=0
            ).props(f"outlined hint='at most {max_tokens}'")
            seed_field = ui.number(
                "Seed", value=sampling.seed, min=0, max=_MAX_SEED, precision=0
            ).props("outlined hint='for other answers'")
        with ui.element("div").classes("choices"):
            ui.button("Apply", on_click=_submit(dialog, "apply")).props("unelevated no-caps")
            ui.button("Cancel", on_click=_submit(dialog, "")).props("flat no-caps")
    choice: object = await dialog
    dialog.delete()
    if not choice:
        return None
    changed = SamplingParams(
        _clamped(temperature_field.value, sampling.temperature, 0, _MAX_TEMPERATURE),
        int(_clamped(tokens_field.value, sampling.max_tokens, 1, max_tokens)),
        int(_clamped(seed_field.value, sampling.seed, 0, _MAX_SEED)),
    )
    return Settings((system_field.value or "").strip(), changed)


def _submit(dialog: ui.dialog, choice: str) -> Callable[[], None]:
    return lambda: dialog.submit(choice)


def _clamped(value: float | None, default: float, low: float, high: float) -> float:
    return default if value is None else min(max(value, low), high)
