"""The page at `/`: NiceGUI on the server's own application, who may see it, and the runs whose reports it opens.

What the page shows and does is in `view`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import nicegui
import platformdirs
from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response
from nicegui import ui
from nicegui.storage import Storage
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.console import log
from pipeline.inference.async_engine import AsyncEngine
from pipeline.run_dir import RunDir
from pipeline.server.web.chat_page import ChatPage
from pipeline.server.web.login import ask_for_key

_YEAR = 365 * 24 * 3600
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Of the page: nothing is loaded from elsewhere, and no other page has it in a frame. (Vue compiles with `eval`.)"""
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; sandbox allow-scripts"
"""Of a report, which has words of models in it: it cannot reach the page."""


def mount(app: FastAPI, engine: AsyncEngine, key: str, runs: Path, port: int) -> None:
    """Put the page on `app`, once in a process. `runs` is the folder whose finished runs it lists.

    Chats are kept in the user's data folder; servers on other ports have others.
    """
    folder = _folder()
    Storage.path = folder
    secret = _secret(folder / "secret")
    proof = hmac.new(secret.encode(), key.encode(), hashlib.sha256).hexdigest() if key else ""

    @ui.page("/", title="gatt")
    def page() -> None:
        kept: dict[str, Any] = nicegui.app.storage.user
        if _admitted(proof, kept):
            ChatPage(engine, kept, reports(runs)).build()
        else:
            ask_for_key(key, lambda: kept.update(key=proof))

    def report(name: str) -> Response:
        found = reports(runs).get(name) if _admitted(proof, nicegui.app.storage.user) else None
        if found is None:
            return PlainTextResponse("No such report.", 404)
        return FileResponse(
            found, media_type="text/html", headers={"content-security-policy": _REPORT_POLICY}
        )

    nicegui.app.add_api_route("/runs/{name}", report, include_in_schema=False, response_model=None)
    ui.run_with(
        app,
        dark=None,
        language="en-US",
        tailwind=False,
        binding_refresh_interval=None,
        show_welcome_message=False,
        storage_secret=secret,
        favicon=_ICON,
        session_middleware_kwargs={
            "session_cookie": f"gatt-{port}",
            "max_age": _YEAR,
            "same_site": "lax",
        },
    )
    # Mounted at "/", it would answer for every address of the interface that is wrong.
    app.router.routes.pop()
    app.router.default = PathRouter(nicegui.app, app.router.default)


def reports(runs: Path) -> dict[str, Path]:
    """The reports of the finished runs in a folder by name, the youngest first."""
    try:
        folders = [folder for folder in runs.iterdir() if folder.is_dir()] if runs.is_dir() else []
        found = {
            f.name: RunDir(f).report / "report.html"
            for f in folders
            if (RunDir(f).report / "manifest.json").is_file()
        }
        ages = {name: file.stat().st_mtime for name, file in found.items() if file.is_file()}
    except OSError:  # a run that is moved at this moment, or a folder that may not be read
        return {}
    return {name: found[name] for name in sorted(ages, key=lambda name: -ages[name])}


def _admitted(proof: str, kept: dict[str, Any]) -> bool:
    return not proof or hmac.compare_digest(str(kept.get("key", "")), proof)


class PathRouter:
    """Sends the page's own addresses to it, and all others to where they went before."""

    def __init__(self, page: ASGIApp, others: ASGIApp) -> None:
        self._page, self._others = page, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        path = scope.get("path", "")
        if path in ("/", "/favicon.ico") or path.startswith(("/_nicegui", "/runs/")):
            await self._page(scope, receive, _with_policy(send) if path == "/" else send)
        else:
            await self._others(scope, receive, send)


def _with_policy(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = (
                (b"content-security-policy", _POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
            )
            message["headers"] = [*message["headers"], *added]
        await send(message)

    return sending


def _folder() -> Path:
    """Where chats are kept; says so where they cannot be."""
    folder = platformdirs.user_data_path("gatt") / "page"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log(
            f"Chats of the page are gone when the server stops: {folder} cannot be written ({error.strerror})."
        )
        return Path(tempfile.mkdtemp(prefix="gatt-"))


def _secret(file: Path) -> str:
    """What cookies are signed with: the same after a restart, so that a browser finds its chats again."""
    if not file.exists():
        with os.fdopen(
            os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8"
        ) as made:
            made.write(secrets.token_hex(32))
    return file.read_text(encoding="utf-8")


_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><path fill="#2a8fb4" d="M6 28V14a10 10 0 0 1 20 0v14l-4-3-3 3-3-3'
    '-3 3-3-3z"/><circle cx="12.500" cy="14" r="2" fill="#fff"/><circle cx="19.500" cy="14" r="2" fill="#fff"/></svg>'
)
