"""`gatt serve` as a process with the embedded model: real clients, cached prefixes, disconnects."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr
from support.cli import call_gatt
from support.cores import pretend_cores
from support.servers import MODEL, GattServer, gatt_server, llama_cpp_server

from pipeline.data.dialogues import load_dialogues
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.records import Message, Request

CONTEXT = 512
_MAX_LOGIT_TIE = 0.2
"""Two tokens whose logits are nearer are a tie, which rounding may break either way."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GattServer]:
    with gatt_server(tmp_path_factory.mktemp("serve"), MODEL, "--context", CONTEXT) as running:
        yield running


@pytest.fixture(scope="module")
def exact_engine(base: Path) -> Iterator[BatchEngine]:
    """Return the engine of the other stages; on one thread, as the server needs the other cores."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_cores(patch, 1)
        with BatchEngine(base, 1, CONTEXT) as engine:
            yield engine


def _text(response: Any) -> str:
    """Return the text of a chat completion."""
    return str(response.choices[0].message.content)


def _streamed_text(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def _is_exact_or_tied(exact: BatchEngine, messages: list[Message], response: Any) -> bool:
    """Return whether a greedy answer is that of `exact`, or first differs where tokens tie."""
    expected = exact.complete(
        Request(messages=tuple(messages), seed=1, max_tokens=12, temperature=0)
    )
    if _text(response) == expected.text:
        usage = response.usage
        return bool(
            usage.completion_tokens == expected.tokens
            and usage.prompt_tokens == expected.prompt_tokens
        )
    tokens, expected_tokens = exact.tokenize(_text(response)), exact.tokenize(expected.text)
    pairs = enumerate(zip(tokens, expected_tokens, strict=False))
    index = next(index for index, (first, second) in pairs if first != second)
    prompt = exact.tokenize(exact.template.render(messages))
    *_, logits = exact.logits([*prompt, *tokens[:index]])
    return abs(float(logits[tokens[index]] - logits[expected_tokens[index]])) < _MAX_LOGIT_TIE


def _wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_greedy_answers_are_the_exact_engines_under_load(
    server: GattServer, exact_engine: BatchEngine
) -> None:
    questions = [dialogue.turns[0] for dialogue in load_dialogues("seed")[:12]]
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(server.chat, questions))
    for question, response in zip(questions, responses, strict=True):
        messages: list[Message] = [{"role": "user", "content": question}]
        assert _is_exact_or_tied(exact_engine, messages, response), question


def test_a_seed_determines_the_answer(server: GattServer) -> None:
    def sample(seed: int) -> str:
        return _text(server.chat("Tell a story.", temperature=0.9, seed=seed))

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 2


def test_a_stream_is_the_same_answer_with_usage(server: GattServer) -> None:
    response = server.chat("Name a color.")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(server.chat("Name a color.", **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert _streamed_text(chunks) == _text(response)
    assert chunks[-2].choices[0].finish_reason == response.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == response.usage.completion_tokens
    assert len(chunks) > 5


def test_text_completions_and_models(server: GattServer) -> None:
    text = server.client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in text.choices[0].text
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).id == MODEL


def test_langchain_is_a_client(server: GattServer) -> None:
    from langchain_openai import ChatOpenAI

    chain = ChatOpenAI(
        model=MODEL,
        base_url=f"{server.url}/v1",
        api_key=SecretStr("any"),
        temperature=0,
        max_completion_tokens=12,
        max_retries=0,
    )
    expected = _text(server.chat("Name a color."))
    assert chain.invoke("Name a color.").content == expected
    assert "".join(str(piece.content) for piece in chain.stream("Name a color.")) == expected


def test_stop_texts_end_an_answer_and_are_not_sent_in_part(server: GattServer) -> None:
    question = "Count from one to ten."
    text = _text(server.chat(question, max_tokens=24))
    stop = text[9:14]
    chunks = list(server.chat(question, max_tokens=24, stop=[stop, "zzz"], stream=True))
    assert _streamed_text(chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert _text(server.chat(question, max_tokens=24, stop=stop)) == _streamed_text(chunks)


def test_parts_and_the_developers_role_are_plain_messages(server: GattServer) -> None:
    plain = server.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    )
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
    ]
    assert _text(server.chat(parts)) == _text(plain)


def test_the_next_turn_feeds_only_what_is_new_and_answers_as_if_all_were(
    server: GattServer, exact_engine: BatchEngine
) -> None:
    messages: list[Message] = [{"role": "user", "content": "My cat is called Mio."}]
    previous_prompt_tokens = 0
    for user in ("What do cats eat?", "And at night?", "Thank you."):
        response = server.chat(messages)
        usage = response.usage
        assert usage.prompt_tokens_details.cached_tokens >= previous_prompt_tokens
        previous_prompt_tokens = usage.prompt_tokens
        assert _is_exact_or_tied(exact_engine, messages, response)
        messages += [
            {"role": "assistant", "content": _text(response)},
            {"role": "user", "content": user},
        ]
        server.chat("Something else.", max_tokens=1)


def test_eight_clients_do_not_get_each_others_words(server: GattServer) -> None:
    words = ["walrus", "cactus", "violin", "pepper", "saturn", "oyster", "hammer", "velvet"]

    def talk_about(word: str) -> str:
        messages: list[Message] = [{"role": "user", "content": f"Repeat this word: {word}"}]
        answers: list[str] = []
        for _ in range(3):
            answers.append(_text(server.chat(messages)))
            messages += [
                {"role": "assistant", "content": answers[-1]},
                {"role": "user", "content": f"Say again: {word}"},
            ]
        return " ".join(answers).lower()

    with ThreadPoolExecutor(8) as pool:
        texts = dict(zip(words, pool.map(talk_about, words), strict=True))
    for word, text in texts.items():
        assert not [foreign for foreign in words if foreign != word and foreign in text]
    # The model is small: it does not manage all of them.
    assert sum(word in text for word, text in texts.items()) >= 6


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_sequence(server: GattServer, stream: bool) -> None:
    tokens = server.metric("generated_tokens_total")
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell a long story."}],
        "max_tokens": 400,
        "temperature": 0,
        "stream": stream,
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {len(content)}",
        "\r\n",
    )
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port or 0)) as connection:
        connection.sendall("\r\n".join(head).encode() + content)
        _wait_until(lambda: server.metric("sequences_in_use") == 1)
        time.sleep(0.1)
    _wait_until(lambda: server.metric("sequences_in_use") == 0)
    assert server.metric("generated_tokens_total") - tokens < 400
    assert server.log_records[-1]["status"] == 499


def test_each_request_has_a_line_of_log_without_its_texts(server: GattServer) -> None:
    earlier = len(server.log_records)
    server.chat("Do you like marzipan?", max_tokens=3)
    # Requests of other tests may end, and be logged, after this one.
    end = time.monotonic() + 30
    while not (lines := [r for r in server.log_records[earlier:] if r.get("tokens") == 3]):
        assert time.monotonic() < end, server.log
        time.sleep(0.05)
    (line,) = lines
    assert (line["model"], line["status"]) == (MODEL, 200)
    assert line["prompt_tokens"] > line["cached_tokens"]
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    assert server.metric("prompt_tokens_total") > 0
    assert "marzipan" not in server.log


def test_a_key_is_required_and_ctrl_c_stops_a_running_answer(tmp_path: Path) -> None:
    options = ("--api-key", "s3cret", "--context", CONTEXT, "--cors", "http://page.example")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 1}
    with gatt_server(tmp_path, MODEL, *options) as server:
        assert server.post(body).status_code == 401
        refused = server.post(body, authorization="Bearer s3cre")
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        preflight = {"origin": "http://page.example", "access-control-request-method": "POST"}
        allowed = httpx.options(f"{server.url}/v1/chat/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "http://page.example"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0)
        stream = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Tell a story."}], stream=True
        )
        pieces = iter(stream)
        for _ in range(2):
            next(pieces)
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError):
            list(pieces)
        assert server.process.wait(20) == 0
        assert time.monotonic() - start < 10
    assert "Traceback" not in server.log


def test_what_cannot_be_served_is_explained_before_a_model_is_loaded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATT_API_KEY", "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, problem in (
            ((MODEL, "--host", "0.0.0.0"), "--api-key"),
            ((MODEL, "--port", taken.getsockname()[1]), "--port"),
            ((MODEL, "--host", "no.such.host.invalid"), "Expected 127.0.0.1"),
            ((MODEL, MODEL), "Two models would be served as"),
            ((MODEL, base, "--adapter", "x.gguf"), "one MODEL"),
            (("smollm3",), "Unknown model"),
            ((MODEL, "--runs", "no/such/folder"), "No folder"),
        ):
            done = call_gatt("serve", "--port", 0, *words)
            assert done.returncode == 1
            assert problem in done.stderr


@pytest.mark.slow
def test_greedy_answers_are_those_of_llama_cpps_own_server(base: Path, tmp_path: Path) -> None:
    """Compare with an F16 file: formats that compute in 8 bits differ by the order of sums."""
    exported = tmp_path / "exported.gguf"
    write_formats(Model(MODEL, base), None, {"F16": exported})
    questions = [dialogue.turns[0] for dialogue in load_dialogues("seed")[:10]]
    options = {"model": "exported", "max_tokens": 24}
    with gatt_server(tmp_path, exported, "--context", CONTEXT) as server:
        answers = [_text(server.chat(question, **options)) for question in questions]
    log = tmp_path / "llama-cpp-log"
    with llama_cpp_server(exported, log, model_alias="exported", n_ctx=CONTEXT) as url:
        client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=120)
        expected = [
            _text(
                client.chat.completions.create(
                    messages=[{"role": "user", "content": question}],
                    temperature=0,
                    extra_body={"repeat_penalty": 1.0},  # its default is 1.1
                    **options,
                )
            )
            for question in questions
        ]
    assert answers == expected
