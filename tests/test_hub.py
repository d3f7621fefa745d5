"""What goes to the Hub and over which wire: a server on this machine that speaks the Hub's form."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Gatt


class _Hub(BaseHTTPRequestHandler):
    """Takes a new dataset and one commit, and keeps what it was sent."""

    received: dict[str, list[dict[str, object]]]

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        rows = [json.loads(line) for line in raw.splitlines() if line]
        self.server.received[self.path] = rows  # type: ignore[attr-defined]
        host = f"http://{self.headers['Host']}"
        answer: dict[str, object] = {"url": f"{host}/datasets/me/mine", "name": "me/mine"}
        if "/preupload/" in self.path:
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in rows[0]["files"]]}
        elif "/commit/" in self.path:
            answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{host}/datasets/me/mine/commit/{'0' * 40}"}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.received = {}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_dialogues_are_pushed_with_their_card(hub: ThreadingHTTPServer, tmp_path: Path, gatt: Gatt) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "dialogues.jsonl").write_text('{"messages": []}\n')
    (folder / "README.md").write_text("# card\n")
    (folder / "acceptance.json").write_text('{"answers": [], "too_common": 0}')
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "hf")}
    done = gatt("synthesize", "--run", tmp_path, "--stats", "--push", "me/mine", env=environment)
    assert done.returncode == 0, done.stderr
    assert "me/mine" in done.stdout
    received = hub.received  # type: ignore[attr-defined]
    assert received["/api/repos/create"][0]["visibility"] == "private"
    commit = next(rows for path, rows in received.items() if "/commit/" in path)
    sent = {row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in commit if row["key"] == "file"}
    assert sent == {"README.md": b"# card\n", "dialogues.jsonl": b'{"messages": []}\n'}


def test_a_refused_push_is_one_line(tmp_path: Path, gatt: Gatt) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "acceptance.json").write_text('{"answers": [], "too_common": 0}')
    for name in ("README.md", "dialogues.jsonl"):
        (folder / name).write_text("x")
    done = gatt("synthesize", "--run", tmp_path, "--stats", "--push", "me/mine", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("gatt: Cannot upload to me/mine")
