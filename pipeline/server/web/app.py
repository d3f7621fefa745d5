"""The page at `/`: NiceGUI on the API's application, who may see it, and the reports of runs.

What the page shows and does is in `chat_page`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

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

_YEAR_SECONDS = 365 * 24 * 3600
_PAGE_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing is loaded from elsewhere, and no page embeds this one. (Vue compiles with `eval`.)"""
_REPORT_POLICY = "; ".join(
    (
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline'",
        "img-src data:",
        "sandbox allow-scripts",
    )
)
"""A report contains text of models: it cannot reach the page."""


def mount(app: FastAPI, engine: AsyncEngine, key: str, runs: Path, port: int) -> None:
    """Put the page on `app`, once in a process. `runs` is the folder whose finished runs it lists.

    Chats are stored in the user's data folder; servers on different ports do not share them.
    """
    Storage.path = _storage_folder()
    secret = _cookie_secret(Storage.path / "secret")
    # What a browser's storage holds once the key was entered: it changes with the key.
    proof = hmac.new(secret.encode(), key.encode(), hashlib.sha256).hexdigest() if key else ""
    _add_page(engine, key, proof, runs)
    _add_reports(proof, runs)
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
            "max_age": _YEAR_SECONDS,
            "same_site": "lax",
        },
    )
    # NiceGUI mounts itself at "/", where it would answer for all unknown addresses of the API.
    app.router.routes.pop()
    app.router.default = PathRouter(nicegui.app, app.router.default)


def _add_page(engine: AsyncEngine, key: str, proof: str, runs: Path) -> None:
    @ui.page("/", title="gatt")
    def page() -> None:
        storage = nicegui.app.storage.user
        if _is_admitted(proof, storage):
            ChatPage(engine, storage, find_reports(runs)).build()
        else:
            ask_for_key(key, lambda: storage.update(key=proof))


def _add_reports(proof: str, runs: Path) -> None:
    def report(name: str) -> Response:
        is_admitted = _is_admitted(proof, nicegui.app.storage.user)
        file = find_reports(runs).get(name) if is_admitted else None
        if file is None:
            return PlainTextResponse("No such report.", 404)
        headers = {"content-security-policy": _REPORT_POLICY}
        return FileResponse(file, media_type="text/html", headers=headers)

    nicegui.app.add_api_route("/runs/{name}", report, include_in_schema=False, response_model=None)


def find_reports(runs: Path) -> dict[str, Path]:
    """Return the reports of the finished runs in a folder, by name, the newest first."""
    reports: list[tuple[float, str, Path]] = []
    try:
        for folder in runs.iterdir() if runs.is_dir() else ():
            report = RunDir(folder).report
            file = report / "report.html"
            if (report / "manifest.json").is_file() and file.is_file():
                reports.append((file.stat().st_mtime, folder.name, file))
    except OSError:  # a run that is being moved, or a folder that cannot be read
        return {}
    return {name: file for _, name, file in sorted(reports, reverse=True)}


def _is_admitted(proof: str, storage: Mapping[str, object]) -> bool:
    return not proof or hmac.compare_digest(str(storage.get("key", "")), proof)


class PathRouter:
    """Sends the page's own addresses to `page`, and all others to `api`."""

    def __init__(self, page: ASGIApp, api: ASGIApp) -> None:
        self._page, self._api = page, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        path = scope.get("path", "")
        if path in ("/", "/favicon.ico") or path.startswith(("/_nicegui", "/runs/")):
            await self._page(scope, receive, _with_policy(send) if path == "/" else send)
        else:
            await self._api(scope, receive, send)


def _with_policy(send: Send) -> Send:
    headers = (
        (b"content-security-policy", _PAGE_POLICY.encode()),
        (b"referrer-policy", b"no-referrer"),
    )

    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *headers]
        await send(message)

    return send_with_policy


def _storage_folder() -> Path:
    """Return where chats are stored: a temporary folder if the user's cannot be written."""
    folder = platformdirs.user_data_path("gatt") / "page"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log(
            f"Chats of the page are lost when the server stops: cannot write {folder} "
            f"({error.strerror})."
        )
        return Path(tempfile.mkdtemp(prefix="gatt-"))


def _cookie_secret(file: Path) -> str:
    """Return what cookies are signed with: it stays, so that browsers find their chats again."""
    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as secret_file:
            secret_file.write(secrets.token_hex(32))
    return file.read_text(encoding="utf-8")


_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<path fill="#2a8fb4" d="M6 28V14a10 10 0 0 1 20 0v14l-4-3-3 3-3-3-3 3-3-3z"/>'
    '<circle cx="12.500" cy="14" r="2" fill="#fff"/><circle cx="19.500" cy="14" r="2" fill="#fff"/>'
    "</svg>"
)
