"""The page's questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nicegui import ui

from pipeline.server.web.session import SamplingParams

_MOST_SEED = (1 << 31) - 1


async def choose(title: str, text: str, options: Mapping[str, str]) -> str | None:
    """What is chosen of `options` (value, label); None where nothing is."""
    with ui.dialog() as dialog, ui.element("div").classes("card").props("role=document"):
        ui.html(sanitize=True, tag="h2").set_content(
            title.replace("&", "&amp;").replace("<", "&lt;")
        )
        ui.label(text).classes("text")
        with ui.element("div").classes("choices"):
            for value, label in options.items():
                ui.button(label, on_click=lambda value=value: dialog.submit(value)).props(
                    "unelevated no-caps"
                )
            ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat no-caps")
    chosen: Any = await dialog
    dialog.delete()
    return None if chosen is None else str(chosen)


async def settings(
    system: str, drawing: SamplingParams, context: int
) -> tuple[str, SamplingParams] | None:
    """The settings as the user leaves them; None if unchanged."""
    with ui.dialog() as dialog, ui.element("div").classes("card").props("role=document"):
        ui.html("Settings", tag="h2")
        words = ui.textarea("System message", value=system).props(
            "outlined autogrow hint='It stands before the whole chat.'"
        )
        with ui.element("div").classes("fields"):
            warm = ui.number(
                "Temperature", value=drawing.temperature, min=0, max=2, step=0.1
            ).props("outlined hint='0 to 2'")
            most = ui.number(
                "Tokens of an answer",
                value=drawing.max_tokens,
                min=1,
                max=context // 2,
                precision=0,
            ).props(f"outlined hint='at most {context // 2}'")
            seed = ui.number("Seed", value=drawing.seed, min=0, max=_MOST_SEED, precision=0).props(
                "outlined hint='for other answers'"
            )
        with ui.element("div").classes("choices"):
            ui.button("Use these", on_click=lambda: dialog.submit(True)).props("unelevated no-caps")
            ui.button("Cancel", on_click=lambda: dialog.submit(None)).props("flat no-caps")
    done: Any = await dialog
    dialog.delete()
    if not done:
        return None
    found = SamplingParams(
        _within(warm.value, drawing.temperature, 0, 2),
        int(_within(most.value, drawing.max_tokens, 1, context // 2)),
        int(_within(seed.value, drawing.seed, 0, _MOST_SEED)),
    )
    return (words.value or "").strip(), found


def _within(value: float | None, before: float, least: float, most: float) -> float:
    """What was typed, as far as it is allowed."""
    return before if value is None else min(max(value, least), most)
