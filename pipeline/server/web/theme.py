"""How the page looks, and what happens in the browser alone: `static/chat.css` and `chat.js`."""

from __future__ import annotations

from functools import cache
from importlib import resources

from nicegui import ui


def apply_theme(*, dark: bool | None) -> ui.dark_mode:
    """Style the present page and return its dark mode; None follows the system."""
    ui.add_head_html(f"<style>{_read('chat.css')}</style><script>{_read('chat.js')}</script>")
    ui.colors(primary="#2a7f9e", dark="#191c21", dark_page="#15171b")
    return ui.dark_mode(dark)


@cache
def _read(name: str) -> str:
    return (resources.files("pipeline.server.web") / "static" / name).read_text(encoding="utf-8")
