"""What a server with an API key shows to a browser that has not entered it: a form for the key."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from nicegui import ui

from pipeline.server.web.theme import apply_theme

_SECONDS_AFTER_WRONG_KEY = 1.0
"""Slows down a program that tries many keys."""


def ask_for_key(key: str, admit: Callable[[], None]) -> None:
    """Show the form until `key` is entered; then call `admit` and reload the page."""
    apply_theme(dark=None)

    async def check() -> None:
        if hmac.compare_digest((field.value or "").strip().encode(), key.encode()):
            admit()
            ui.navigate.reload()
            return
        button.disable()
        await asyncio.sleep(_SECONDS_AFTER_WRONG_KEY)
        button.enable()
        field.props('error error-message="This is not the key of this server."')

    with ui.element("main").classes("login"):
        ui.html("gatt", tag="h1")
        ui.label("This server has an API key. Enter it once for this browser.")
        field = (
            ui.input("API key", password=True)
            .props("outlined autofocus autocomplete=off")
            .on("keydown.enter", check)
        )
        button = ui.button("Continue", on_click=check).props("unelevated no-caps")
