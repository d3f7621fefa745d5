"""The page of a server with an API key, to a browser that has not named it yet: nothing but the question."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from nicegui import ui

from pipeline.server.web.theme import apply_theme

_PAUSE_SECONDS = 1.0
"""After a wrong key, so that nobody tries many."""


def ask_for_key(key: str, admit: Callable[[], None]) -> None:
    """Ask until `key` is given; then `admit` is called and the page loaded anew."""
    apply_theme(None)

    async def check() -> None:
        if hmac.compare_digest((field.value or "").strip().encode(), key.encode()):
            admit()
            ui.navigate.reload()
            return
        button.disable()
        await asyncio.sleep(_PAUSE_SECONDS)
        button.enable()
        field.props('error error-message="That is not the key of this server."')

    with ui.element("main").classes("gate"):
        ui.html("gatt", tag="h1")
        ui.label("This server has an API key. Enter it once for this browser.")
        field = (
            ui.input("API key", password=True)
            .props("outlined autofocus autocomplete=off")
            .on("keydown.enter", check)
        )
        button = ui.button("Continue", on_click=check).props("unelevated no-caps")
