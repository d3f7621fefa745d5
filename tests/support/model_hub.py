"""A Hugging Face Hub on this machine that serves one model, with answers in the real one's form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    server: ModelHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        """Send what the Hub has at the path, or only its headers."""
        content = self._content(self.path.partition("?")[0])
        self.send_response(404 if content is None else 200)
        content = content or b""
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("x-repo-commit", _COMMIT)
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    def _content(self, path: str) -> bytes | None:
        hub = self.server
        api, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/{_COMMIT}/"
        if path == f"{api}/revision/main":
            names = [{"rfilename": name} for name in hub.files]
            return json.dumps({"id": hub.repository, "sha": _COMMIT, "siblings": names}).encode()
        if path == f"{api}/tree/{_COMMIT}":
            return json.dumps([_entry(*file) for file in hub.files.items()]).encode()
        name = path.removeprefix(files)
        if name in hub.files and self.command == "GET":
            hub.downloaded.append(name)
        return hub.files.get(name)


def _entry(name: str, content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}
    large = {"oid": digest, "size": len(content), "pointerSize": 134}
    return entry | ({"lfs": large} if name.endswith((".safetensors", ".pth")) else {})


class ModelHub(ThreadingHTTPServer):
    """A Hub with one model; `downloaded` are the files that were fetched of it so far."""

    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repository, self.files = repository, dict(files)
        self.downloaded: list[str] = []

    def replace_the_real_one(self, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
        """Let huggingface_hub ask this server, and keep what it downloads in the folder `cache`."""
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": cache,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
