"""The server as a process of its own, with the embedded model: real clients, prefixes, those who leave, and wrong input."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import Gatt

from pipeline.data.dialogues import load_dialogues
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.async_engine import AsyncEngine, ModelSource
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.model import Adapter
from pipeline.inference.scheduler import GenerationRequest, Limits, QueueFullError
from pipeline.records import Message, Request

NAME = "smollm2-135m"
CONTEXT = 512


class Serving:
    """A running server: its address, its clients and its log."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self._log = process, url, log
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120)

    def chat(self, text: str | list[Message], **more: Any) -> Any:
        """One chat completion by the official client."""
        messages: Any = [{"role": "user", "content": text}] if isinstance(text, str) else text
        wanted = {"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0} | more
        return self.client.chat.completions.create(**wanted)

    def post(
        self, body: object, path: str = "/v1/chat/completions", **headers: str
    ) -> httpx.Response:
        """A body as it is (bytes), or as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"content-type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return httpx.post(self.url + path, content=content, headers=named, timeout=60)

    def metric(self, name: str) -> float:
        """The value of a metric of the model."""
        found = re.search(
            rf'^gatt_{name}{{model="{NAME}"}} (\S+)$', httpx.get(f"{self.url}/metrics").text, re.M
        )
        assert found, name
        return float(found[1])

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What was logged."""
        return [
            json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")
        ]

    @property
    def log(self) -> str:
        """The log as it is."""
        return self._log.read_text()


@contextmanager
def serving(folder: Path, *words: object) -> Iterator[Serving]:
    """Start `gatt serve` on a free port; at the end, Ctrl-C stops it at once."""
    log = folder / "log"
    command = [sys.executable, "-m", "pipeline", "serve", *map(str, words), "--port", "0"]
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL
        ) as process,
    ):
        end = time.monotonic() + 60
        while not (found := re.search(r"at (http://\S+)/v1\.", log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        try:
            yield Serving(process, found[1], log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("serve"), NAME, "--context", CONTEXT) as running:
        yield running


@pytest.fixture(scope="module")
def alone(base: Path) -> Iterator[BatchEngine]:
    """The engine of the other stages, for comparison; on one thread, as the server needs the other cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        with BatchEngine(base, 1, CONTEXT) as llama:
            yield llama


def _same_or_tied(exact: BatchEngine, messages: list[Message], got: Any) -> bool:
    """Whether a greedy answer is the exact engine's, or leaves it where two tokens tie but for the kernels' rounding."""
    expected = exact.complete(Request(tuple(messages), 1, 12, 0))
    one, other = got.choices[0].message.content, expected.text
    if one == other:
        return bool(
            got.usage.completion_tokens == expected.tokens
            and got.usage.prompt_tokens == expected.prompt_tokens
        )
    ours, theirs = exact.tokenize(one), exact.tokenize(other)
    apart = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    *_, logits = exact.logits([*exact.tokenize(exact.template.render(messages)), *ours[:apart]])
    return abs(float(logits[ours[apart]] - logits[theirs[apart]])) < 0.2


def test_greedy_answers_are_the_engines_own_whatever_runs_beside(
    server: Serving, alone: BatchEngine
) -> None:
    questions = [d.turns[0] for d in load_dialogues("seed")[:12]]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(server.chat, questions))
    for question, answer in zip(questions, answers, strict=True):
        assert _same_or_tied(alone, [{"role": "user", "content": question}], answer), question


def test_a_seed_is_an_answer(server: Serving) -> None:
    def drawn(seed: int) -> str:
        return str(
            server.chat("Tell a story.", temperature=0.9, seed=seed).choices[0].message.content
        )

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(1, 5)}) > 2


def test_a_stream_is_the_same_answer_with_usage(server: Serving) -> None:
    whole = server.chat("Name a color.")
    chunks = list(server.chat("Name a color.", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[
        0
    ].finish_reason
    assert (
        chunks[-1].choices == []
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )
    assert len(chunks) > 5


def test_text_completions_models_and_langchain(server: Serving) -> None:
    text = server.client.completions.create(
        model=NAME, prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in text.choices[0].text
    assert [m.id for m in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).id == NAME
    from langchain_openai import ChatOpenAI

    chain = ChatOpenAI(
        model=NAME,
        base_url=f"{server.url}/v1",
        api_key="any",
        temperature=0,
        max_completion_tokens=12,
        max_retries=0,  # type: ignore[arg-type, call-arg]
    )
    expected = server.chat("Name a color.").choices[0].message.content
    assert chain.invoke("Name a color.").content == expected
    assert "".join(str(piece.content) for piece in chain.stream("Name a color.")) == expected


def test_stop_texts_end_an_answer_and_are_not_sent_in_part(server: Serving) -> None:
    whole = server.chat("Count from one to ten.", max_tokens=24).choices[0].message.content
    stop = whole[9:14]
    chunks = list(
        server.chat("Count from one to ten.", max_tokens=24, stop=[stop, "zzz"], stream=True)
    )
    said = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert said == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (
        server.chat("Count from one to ten.", max_tokens=24, stop=stop).choices[0].message.content
        == said
    )


def test_parts_and_the_developers_role_are_plain_messages(server: Serving) -> None:
    plain = server.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    )
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
    ]
    assert server.chat(parts).choices[0].message.content == plain.choices[0].message.content


def test_the_next_turn_feeds_only_what_is_new_and_answers_as_if_all_were(
    server: Serving, alone: BatchEngine
) -> None:
    messages: list[Message] = [{"role": "user", "content": "My cat is called Mio."}]
    before = 0
    for user in ("What do cats eat?", "And at night?", "Thank you."):
        said = server.chat(messages)
        usage = said.usage
        assert usage.prompt_tokens_details.cached_tokens >= before
        before = usage.prompt_tokens
        assert _same_or_tied(alone, messages, said)
        messages += [
            {"role": "assistant", "content": said.choices[0].message.content},
            {"role": "user", "content": user},
        ]
        server.chat("Something else.", max_tokens=1)


def test_eight_clients_keep_their_own_words(server: Serving) -> None:
    words = ["walrus", "cactus", "violin", "pepper", "saturn", "oyster", "hammer", "velvet"]

    def talk(word: str) -> tuple[str, list[str]]:
        messages: list[Message] = [{"role": "user", "content": f"Repeat this word: {word}"}]
        said = []
        for _ in range(3):
            said.append(server.chat(messages).choices[0].message.content)
            messages += [
                {"role": "assistant", "content": said[-1]},
                {"role": "user", "content": f"Say again: {word}"},
            ]
        return word, said

    with ThreadPoolExecutor(8) as pool:
        texts = {word: " ".join(said).lower() for word, said in pool.map(talk, words)}
    assert not [
        (word, other)
        for word, text in texts.items()
        for other in words
        if other != word and other in text
    ]
    assert (
        sum(word in text for word, text in texts.items()) >= 6
    )  # the model is small, and does not manage all of them


def test_a_client_that_leaves_frees_its_sequence(server: Serving) -> None:
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": 400,
        "temperature": 0,
    }
    for stream in (True, False):
        tokens = server.metric("generated_tokens_total")
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as raw:
            content = json.dumps(body | {"stream": stream}).encode()
            lines = (
                "POST /v1/chat/completions HTTP/1.1",
                "host: localhost",
                "content-type: application/json",
                f"content-length: {len(content)}",
                "",
                "",
            )
            raw.sendall("\r\n".join(lines).encode() + content)
            _until(lambda: server.metric("sequences_in_use") == 1)
            time.sleep(0.1)
        _until(lambda: server.metric("sequences_in_use") == 0)
        assert server.metric("generated_tokens_total") - tokens < 400
        assert server.lines[-1]["status"] == 499


def _until(holds: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def _chat(**changes: Any) -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": "Hi."}],
        "max_tokens": 1,
        "temperature": 0,
    } | changes


def _said(content: Any, role: Any = "user") -> dict[str, Any]:
    return _chat(messages=[{"role": role, "content": content}])


WRONG: list[tuple[object, int, str | None]] = [
    (b"", 400, None),
    (b"{", 400, None),
    (b"\xff\xfe", 400, None),
    (b"[" * 100_000, 400, None),
    (b"null", 400, None),
    (b"[]", 400, None),
    (b'"hi"', 400, None),
    ({}, 400, "model"),
    ({"model": NAME}, 400, "messages"),
    (_chat(model="gpt-4o"), 404, "model"),
    (_chat(model="../../etc/passwd"), 404, "model"),
    (_chat(model=7), 400, "model"),
    (_chat(messages=[]), 400, "messages"),
    (_chat(messages="Hi."), 400, "messages"),
    (_said(None), 400, None),
    (_said(["x"]), 400, None),
    (_said([]), 400, None),
    (_said([{"type": "image_url", "image_url": {"url": "x"}}]), 400, None),
    (_said("x", role="tool"), 400, "messages.0.role"),
    (_chat(max_tokens=0), 400, "max_tokens"),
    (_chat(max_tokens=-1), 400, "max_tokens"),
    (_chat(max_tokens=1.5), 400, "max_tokens"),
    (_chat(max_tokens="9"), 400, "max_tokens"),
    (_chat(max_tokens=10**30), 400, "max_tokens"),
    (_chat(max_tokens=CONTEXT), 400, "messages"),
    (_said("word " * 600), 400, "messages"),
    (_chat(temperature=3), 400, "temperature"),
    (_chat(temperature=-1), 400, "temperature"),
    (
        b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        400,
        "temperature",
    ),
    (
        b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}',
        400,
        None,
    ),
    (_chat(top_p=1.1), 400, "top_p"),
    (_chat(seed=2**70), 400, "seed"),
    (_chat(seed="x"), 400, "seed"),
    (_chat(n=2), 400, "n"),
    (_chat(stop=[""]), 400, None),
    (_chat(stop=["a"] * 5), 400, None),
    (_chat(stream="yes"), 400, "stream"),
    (_chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (_chat(tools=[{"type": "function"}]), 400, "tools"),
    (_chat(response_format={"type": "json_object"}), 400, "response_format"),
    (_chat(logprobs=True), 400, "logprobs"),
    (_chat(presence_penalty=1), 400, "presence_penalty"),
    (b" " * 1_100_000, 413, None),
]


def test_wrong_input_is_told_in_openais_form_and_the_server_goes_on(server: Serving) -> None:
    for body, status, param in WRONG:
        got = server.post(body)
        error = got.json()["error"]
        assert (got.status_code, sorted(error)) == (status, ["code", "message", "param", "type"]), (
            str(body)[:80],
            got.text,
        )
        assert error["message"] and (param is None or error["param"] == param), (
            str(body)[:80],
            got.text,
        )
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/x", 404),
    ):
        got = httpx.request(method, server.url + path)
        assert (got.status_code, sorted(got.json()["error"])) == (
            status,
            ["code", "message", "param", "type"],
        )
    assert server.post(_chat(), host="evil.example").status_code == 403
    assert server.post({"model": NAME, "prompt": ["a", "b"]}, "/v1/completions").status_code == 400
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat("word " * 600)
    assert caught.value.code == "context_length_exceeded"
    for more in (
        {"user": "me"},
        {"metadata": {}},
        {"n": 1},
        {"logit_bias": {}},
        {"tools": []},
        {"frequency_penalty": 0.0},
    ):
        assert server.post(_chat(**more)).status_code == 200
    assert server.chat("Hi.").usage.completion_tokens > 0


def test_each_request_has_a_line_of_log_without_its_texts(server: Serving) -> None:
    server.chat("Do you like marzipan?", max_tokens=3)
    line = server.lines[-1]
    assert (line["model"], line["status"], line["tokens"]) == (NAME, 200, 3)
    assert (
        line["prompt_tokens"] > line["cached_tokens"]
        and 0 < line["first_token_seconds"] <= line["seconds"]
    )
    assert server.metric("prompt_tokens_total") > 0
    assert "marzipan" not in server.log


def test_a_key_is_asked_for_and_ctrl_c_stops_a_running_answer(tmp_path: Path) -> None:
    with serving(
        tmp_path, NAME, "--api-key", "s3cret", "--context", CONTEXT, "--cors", "http://page.example"
    ) as server:
        assert server.post(_chat()).status_code == 401
        assert (
            server.post(_chat(), authorization="Bearer s3cre").json()["error"]["code"]
            == "invalid_api_key"
        )
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        asked = {"origin": "http://page.example", "access-control-request-method": "POST"}
        allowed = httpx.options(f"{server.url}/v1/chat/completions", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "http://page.example"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0)
        stream = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "Tell a story."}], stream=True
        )
        pieces = iter(stream)
        next(pieces), next(pieces)
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError):
            list(pieces)
        assert server.process.wait(20) == 0
        assert time.monotonic() - start < 10
    assert "Traceback" not in server.log


def test_what_cannot_be_served_is_told_before_a_model_is_loaded(gatt: Gatt, base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, expected in (
            ((NAME, "--host", "0.0.0.0"), "--api-key"),
            ((NAME, "--port", taken.getsockname()[1]), "--port"),
            ((NAME, "--host", "no.such.host.invalid"), "Expected 127.0.0.1"),
            ((NAME, NAME), "Two models would be served as"),
            ((NAME, base, "--adapter", "x.gguf"), "one MODEL"),
            (("smollm3",), "Unknown model"),
        ):
            done = gatt("serve", "--port", 0, *words, env={**os.environ, "GATT_API_KEY": ""})
            assert (
                done.returncode == 1 and expected in done.stderr and "Traceback" not in done.stderr
            ), done.stderr


def test_a_full_queue_says_so_and_who_waits_is_served_or_leaves(base: Path) -> None:
    async def ask(engine: AsyncEngine) -> None:
        tokens = engine.chat_tokens("one", ({"role": "user", "content": "Tell a story."},))
        question = GenerationRequest(tokens, Request((), 1, 60, 0))
        running, waiting = engine.ask("one", question), engine.ask("one", question)
        with pytest.raises(QueueFullError, match="1 requests wait"):
            engine.ask("one", question)
        assert engine.state("one") == (1, 1, 1)
        waiting.cancel()
        assert (await waiting.ended()).finish == "cancelled"
        after = engine.ask("one", question)
        running.cancel()
        assert (await running.ended()).finish == "cancelled"
        assert len("".join([piece async for piece in after])) > 0
        assert after.outcome and after.outcome.finish in ("stop", "length")

    engine = AsyncEngine({"one": ModelSource(base)}, Limits(context=256, waiting=1, sequences=1))
    try:
        asyncio.run(ask(engine))
    finally:
        engine.close()


def test_an_adapter_is_a_model_of_its_own_over_the_same_weights(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    async def ask(engine: AsyncEngine) -> dict[str, str]:
        for _ in range(2):
            for name in sources:
                answer = engine.ask(
                    name, GenerationRequest(engine.chat_tokens(name, request.messages), request)
                )
                got[name] = "".join([piece async for piece in answer])
                cached[name] = answer.outcome.cached_tokens if answer.outcome else 0
        return got

    got: dict[str, str] = {}
    cached: dict[str, int] = {}
    write_formats(Model("tiny", tiny_llama), None, {"F32": tmp_path / "base.gguf"})
    write_adapter(open_base(tiny_llama), tiny_adapter, tmp_path / "adapter.gguf")
    sources = {
        "tiny": ModelSource(tmp_path / "base.gguf"),
        "a": ModelSource(tmp_path / "base.gguf", Adapter(tmp_path / "adapter.gguf")),
    }
    request = Request(({"role": "user", "content": "naive caf"},), 1, 12, 0)
    engine = AsyncEngine(sources, Limits(context=256, sequences=2))
    try:
        asyncio.run(ask(engine))
    finally:
        engine.close()
    assert min(cached.values()) > 0
    for name, source in sources.items():
        with BatchEngine(source.path, 1, 256, adapter=source.adapter) as llama:
            assert got[name] == llama.complete(request).text
    assert got["tiny"] != got["a"]


@pytest.mark.slow
def test_no_request_that_the_schema_allows_or_forbids_breaks_the_server(tmp_path: Path) -> None:
    """Two thousand generated requests; what they ask to be generated is kept short."""
    hooks = tmp_path / "hooks.py"
    hooks.write_text(
        "import schemathesis\n"
        "@schemathesis.hook\n"
        "def map_body(context, body):\n"
        "    if isinstance(body, dict) and isinstance(body.get('max_tokens', 1), int):\n"
        "        body = {**body, 'max_tokens': min(body.get('max_tokens') or 2, 2)}\n"
        "        body.pop('max_completion_tokens', None)\n"
        "    return body\n"
    )
    with serving(tmp_path, NAME, "--context", 256) as server:
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{server.url}/openapi.json",
            "--checks",
            "not_a_server_error",
            "--max-examples",
            "400",
            "--request-timeout",
            "60",
            "--seed",
            "1",
            "--generation-database",
            "none",
        ]
        path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": path}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:]
        found = re.search(r"(\d+) generated", done.stdout)
        assert found and int(found[1]) >= 2000, done.stdout[-2000:]
        assert server.post(_chat()).status_code == 200
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_greedy_answers_are_those_of_llama_cpps_own_server(base: Path, tmp_path: Path) -> None:
    """On an exported F16 file. Formats below compute in 8 bits, where another order of sums, as of a long prompt, turns words."""
    exported = tmp_path / "exported.gguf"
    write_formats(Model(NAME, base), None, {"F16": exported})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [
        "--model",
        str(exported),
        "--model_alias",
        "exported",
        "--n_ctx",
        str(CONTEXT),
        "--n_threads",
        "1",
    ]
    with (
        (tmp_path / "theirs").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "llama_cpp.server", *options, "--port", str(port)],
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            peer = Serving(process, f"http://127.0.0.1:{port}", tmp_path / "theirs")
            _until(lambda: _answers(peer.url), 60)
            questions = [d.turns[0] for d in load_dialogues("seed")[:10]]
            with serving(tmp_path, exported, "--context", CONTEXT) as server:
                one, other = (
                    [
                        s.chat(q, model="exported", max_tokens=24, **more)
                        .choices[0]
                        .message.content
                        for q in questions
                    ]
                    for s, more in (
                        (server, {}),
                        (peer, {"extra_body": {"repeat_penalty": 1.0}}),
                    )  # theirs is 1.1 unasked
                )
            assert one == other
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models").status_code == 200
    except httpx.HTTPError:
        return False
