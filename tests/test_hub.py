"""What goes to the Hub and over which wire: a server on this machine that speaks the Hub's form."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml
from conftest import Gatt

from pipeline.errors import GattError
from pipeline.files import sha256, write_json, write_text
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.run_dir import RunDir
from pipeline.stages import push


class _Hub(BaseHTTPRequestHandler):
    """Takes a new repository and one commit, and keeps what it was sent."""

    received: dict[str, list[dict[str, object]]]

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        rows = [json.loads(line) for line in raw.splitlines() if line]
        self.server.received[self.path] = rows  # type: ignore[attr-defined]
        host = f"http://{self.headers['Host']}"
        kind = "datasets/" if rows[0].get("type") == "dataset" else ""
        answer: dict[str, object] = {"url": f"{host}/{kind}me/mine", "name": "me/mine"}
        if "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in rows[0]["files"]
                ]
            }
        elif "/commit/" in self.path:
            answer = {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{host}/me/mine/commit/{'0' * 40}",
            }
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


def _environment(hub: ThreadingHTTPServer, home: Path) -> dict[str, str]:
    """Of a process for which `hub` is the Hub."""
    inherited = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return inherited | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_x",
        "HF_HOME": str(home),
    }


def _sent(hub: ThreadingHTTPServer, kind: str) -> dict[str, bytes]:
    """The files of the commit to me/mine by name; the repository was asked for as a private one of this kind."""
    received = hub.received  # type: ignore[attr-defined]
    made = received["/api/repos/create"][0]
    assert (made["visibility"], made.get("type", "model")) == ("private", kind)
    commit = received[f"/api/{kind}s/me/mine/commit/main"]
    return {
        row["value"]["path"]: base64.b64decode(row["value"]["content"])
        for row in commit
        if row["key"] == "file"
    }


def test_dialogues_are_pushed_with_their_card(
    hub: ThreadingHTTPServer, tmp_path: Path, gatt: Gatt
) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "dialogues.jsonl").write_text('{"messages": []}\n')
    (folder / "README.md").write_text("# card\n")
    (folder / "acceptance.json").write_text('{"answers": [], "too_common": 0}')
    environment = _environment(hub, tmp_path / "hf")
    done = gatt("synthesize", "--run", tmp_path, "--stats", "--push", "me/mine", env=environment)
    assert done.returncode == 0, done.stderr
    assert "/datasets/me/mine" in done.stdout
    assert _sent(hub, "dataset") == {
        "README.md": b"# card\n",
        "dialogues.jsonl": b'{"messages": []}\n',
    }


def test_a_refused_push_is_one_line(tmp_path: Path, gatt: Gatt) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "acceptance.json").write_text('{"answers": [], "too_common": 0}')
    for name in ("README.md", "dialogues.jsonl"):
        (folder / name).write_text("x")
    done = gatt(
        "synthesize",
        "--run",
        tmp_path,
        "--stats",
        "--push",
        "me/mine",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("gatt: Cannot upload to me/mine")


_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SENTENCE = "In turns 16 to 20, the tuned model keeps its instruction in 68% of the answers, the base in 0%."
_LOCAL = "/home/me/.cache/gatt/0123-hf"


def _finished_run(path: Path, **about: str) -> RunDir:
    """A run as its stages leave it, in small; `about` is what the exported GGUF says of its model."""
    run_dir = RunDir(path)
    run_dir.save_recipe(
        Recipe.model_validate({"dialogues": {"source": "me/chats"}, "evaluate": {"turns": 8}})
    )
    tuned = run_dir.tuned("Q8_0")
    tuned.parent.mkdir()
    writer = gguf.GGUFWriter(tuned, "llama")
    for key, value in {"tokenizer.chat_template": "{{ messages }}", **about}.items():
        writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((256, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_text(tuned.with_name("adapter.gguf"), "GGUF")
    write_text(tuned.with_name("Modelfile"), f"FROM ./{tuned.name}\n")
    write_json(
        run_dir.adapter / "adapter_config.json", {"base_model_name_or_path": _LOCAL, "r": 32}
    )
    write_text(run_dir.adapter / "README.md", f"---\nbase_model: {_LOCAL}\n---\n")
    write_text(run_dir.adapter / "adapter_model.safetensors", "weights")
    write_text(
        run_dir.report / "report.md",
        f"**{_SENTENCE}**\n\n| turn | base | tuned |\n|---|---|---|\n| 1 | 0.00 | 0.71 |\n",
    )
    write_text(run_dir.report / "adherence.svg", "<svg/>")
    write_json(
        run_dir.report / "report.json",
        {"sentence": _SENTENCE, "facts": {"teacher": "smollm2-135m Q4_0"}},
    )
    run_dir.finish("evaluate", "", [tuned], 480.0)
    return run_dir


def _push(run_dir: RunDir, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "push", "me/mine", "--run", str(run_dir.path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _refused(run_dir: RunDir) -> str:
    with pytest.raises(GattError) as refused:
        push.run(load_recipe(run_dir.path / "recipe.toml"), run_dir, "me/mine")
    return str(refused.value)


def test_a_run_is_pushed_with_its_card(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    run_dir = _finished_run(
        tmp_path / "run",
        **{
            "general.license": "apache-2.0",
            "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        },
    )
    done = _push(run_dir, _environment(hub, tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    sent = _sent(hub, "model")
    card = sent.pop("README.md").decode()
    assert (
        done.stdout
        == f"Uploaded (private, if it is new): http://127.0.0.1:{hub.server_port}/me/mine\n"
    )
    assert sorted(sent) == [
        "Modelfile",
        "adapter.gguf",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adherence.svg",
        "recipe.toml",
        "tuned-Q8_0.gguf",
    ]
    assert sent["tuned-Q8_0.gguf"] == run_dir.tuned("Q8_0").read_bytes()
    assert sent["recipe.toml"] == (run_dir.path / "recipe.toml").read_bytes()
    assert not any(_LOCAL.encode() in content for content in sent.values())
    assert json.loads(sent["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": _BASE,
        "r": 32,
    }
    assert all(f"| {name} |" in card for name in sent)
    assert "| tuned-Q8_0.gguf | 0.3 | the tuned model, Q8_0 |" in card
    assert card.count(_SENTENCE) == 1
    for part in (
        "](adherence.svg)",
        '- Begin every answer with "Hark!".',
        "A shortened run: 24 dialogues of 8 turns.",
        "| 1 | 0.00 | 0.71 |",
        "gatt chat tuned-Q8_0.gguf --system ",
        "\nollama create mine -f Modelfile && ollama run mine\n",
        "\nllama-server --model tuned-Q8_0.gguf\n",
        "| teacher | smollm2-135m Q4_0 |",
        "| time of evaluate | 480 s |",
    ):
        assert part in card
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["ghost-attention", "gguf", "lora"],
        "datasets": ["me/chats"],
    }


def test_the_head_says_only_what_is_known() -> None:
    published = push.Published(
        "me/mine",
        "tuned-Q8_0.gguf",
        {"tuned-Q8_0.gguf": 10**9},
        "",
        "",
        "",
        "It keeps.",
        "",
        {"base": "b"},
    )
    card = push.model_card(Recipe(), published)
    assert yaml.safe_load(card.split("---\n")[1]).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "| tuned-Q8_0.gguf | 1000.0 |" in card
    assert "ollama" not in card
    assert "shortened" not in card


def test_a_license_that_the_hub_does_not_know_is_quoted() -> None:
    odd = 'My: "own" license # 1'
    published = push.Published(
        "me/mine", "t.gguf", {"t.gguf": 1}, "o/b", odd, "", "It keeps.", "", {"base": "b"}
    )
    head = yaml.safe_load(push.model_card(Recipe(), published).split("---\n")[1])
    assert (head["license"], head["license_name"], head["base_model"]) == ("other", odd, "o/b")


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("report/report.md", "report"),
        ("report/adherence.svg", "report"),
        ("export/tuned-Q8_0.gguf", "export"),
    ],
)
def test_an_unfinished_run_is_refused_with_the_command(
    tmp_path: Path, missing: str, stage: str
) -> None:
    run_dir = _finished_run(tmp_path)
    (tmp_path / missing).unlink()
    assert _refused(run_dir) == (
        f"No {tmp_path / missing}: a run is pushed with it. `gatt {stage} {tmp_path / 'recipe.toml'} --run {tmp_path}` makes it."
    )


def test_the_report_of_an_earlier_export_is_refused(tmp_path: Path) -> None:
    run_dir = _finished_run(tmp_path)
    before = sha256(run_dir.tuned("Q8_0"))
    with run_dir.tuned("Q8_0").open("ab") as file:
        file.write(b"\0")
    assert sha256(run_dir.tuned("Q8_0")) != before
    assert _refused(run_dir).startswith(
        f"The report is not about the present {run_dir.tuned('Q8_0')}"
    )


def test_a_model_that_the_hub_refuses_is_one_line(tmp_path: Path) -> None:
    done = _push(_finished_run(tmp_path), {**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stderr.strip().splitlines()[-1].startswith("gatt: Cannot upload to me/mine")
    assert "owner/name of a model of yours" in done.stderr
