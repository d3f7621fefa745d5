"""Several servers as one teacher: the least busy one answers, and one that fails is left out."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.cli import call_gatt
from support.servers import MODEL, FakeOpenAIServer, Handler, free_port, gatt_server, send_json
from support.teachers import Teacher, serve

from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.inference.openai_client import OpenAIClient
from pipeline.inference.remote import pool, server
from pipeline.inference.remote.address import parse_servers, served_name
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe, recipe_toml
from pipeline.records import Request, Task

_DOWN = send_json(500, {"error": {"message": "CUDA error"}})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "FEW_RETRIES", 0)
    monkeypatch.setattr(pool, "MAX_RETRIES", 1)
    monkeypatch.setattr(server, "FEW_RETRIES", 0)


@pytest.fixture
def servers() -> Iterator[list[FakeOpenAIServer]]:
    """Run three servers that give the same answers."""
    with ExitStack() as stack:
        yield [stack.enter_context(serve(Teacher())) for _ in range(3)]


def _address(servers: list[FakeOpenAIServer]) -> str:
    return ", ".join(server.url for server in servers)


def _ask(client: OpenAIClient, count: int, turns: int = 2) -> dict[tuple[int, int], str]:
    """Return the answers by dialogue and turn."""
    answers: dict[tuple[int, int], str] = {}

    def task(number: int) -> Task:
        for turn in range(turns):
            message = {"role": "user", "content": f"Question {number}.{turn}?"}
            request = Request(messages=(message,), seed=number, max_tokens=40)  # type: ignore[arg-type]
            answers[number, turn] = (yield request).text

    client.run(task(number) for number in range(count))
    return answers


@pytest.fixture
def expected() -> dict[tuple[int, int], str]:
    """Return the answers of one server to twenty dialogues."""
    with serve(Teacher()) as one:
        return _ask(OpenAIClient(one.url), 20)


def test_all_servers_work_and_give_the_answers_of_one(
    servers: list[FakeOpenAIServer], expected: dict[tuple[int, int], str]
) -> None:
    client = OpenAIClient(_address(servers), max_parallel=6)
    assert _ask(client, 20) == expected and len(expected) == 40
    assert client.name == "first"
    counts = [len(server.bodies) for server in servers]
    assert sum(counts) == 40 and min(counts) > 5


def test_the_least_busy_server_is_asked(servers: list[FakeOpenAIServer]) -> None:
    """A server that is stuck with one answer gets no further request from this client."""
    release, teacher = threading.Event(), Teacher()

    def slow(handler: Handler, body: dict[str, Any]) -> None:
        release.wait(20)
        teacher(handler, body)

    def last(handler: Handler, body: dict[str, Any]) -> None:
        if len(servers[1].bodies) == 19:
            release.set()
        teacher(handler, body)

    servers[0].responses, servers[1].responses = [slow], [last]
    answers = _ask(OpenAIClient(_address(servers[:2]), max_parallel=2), 20, turns=1)
    assert len(answers) == 20
    assert [len(server.bodies) for server in servers] == [1, 19, 0]


def test_a_server_that_fails_is_left_out_and_used_again(
    servers: list[FakeOpenAIServer],
    expected: dict[tuple[int, int], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pool, "_SECONDS_LEFT_OUT", 0.05)
    teacher = Teacher()
    failed = threading.Event()

    def failing(handler: Handler, body: dict[str, Any]) -> None:
        if len(servers[1].bodies) == 3:
            failed.set()
            _DOWN(handler, body)
        else:
            teacher(handler, body)

    def waiting(handler: Handler, body: dict[str, Any]) -> None:
        if failed.is_set() and len(servers[1].bodies) < 6:  # until the other works again
            time.sleep(0.02)
        teacher(handler, body)

    servers[0].responses, servers[1].responses = [waiting], [failing]
    client = OpenAIClient(_address(servers[:2]), max_parallel=2)
    assert _ask(client, 20) == expected
    log = capsys.readouterr().err
    left_out, again = log.strip().splitlines()
    assert left_out == (
        f"The server at {servers[1].url} keeps failing (500: CUDA error). Check its log, then run "
        "again. It is left out, and tried again every 0 s; 1 of 2 servers go on."
    )
    assert again == f"The server at {servers[1].url} answers again, and is used."
    questions = [body["messages"][0]["content"] for body in servers[1].bodies]
    assert questions[3].startswith("What is 2 + 3?")
    assert len(questions) > 4


def test_a_server_that_cannot_be_used_does_not_end_the_trials_of_others(
    servers: list[FakeOpenAIServer],
    expected: dict[tuple[int, int], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One has no list of models at first, then an empty one, then answers without a message."""
    monkeypatch.setattr(pool, "_SECONDS_LEFT_OUT", 0.05)
    lists = [_DOWN, send_json(403, {}), send_json(200, {"data": []}), servers[1].models]
    teacher = Teacher()

    def waiting(handler: Handler, body: dict[str, Any]) -> None:
        if len(servers[1].bodies) < 3:  # until the other works
            time.sleep(0.02)
        teacher(handler, body)

    def list_models(handler: Handler, body: dict[str, Any]) -> None:
        (lists.pop(0) if len(lists) > 1 else lists[0])(handler, body)

    servers[0].responses, servers[1].models = [waiting], list_models
    servers[1].responses = [send_json(200, {"choices": [{}]}), teacher]
    client = OpenAIClient(_address(servers[:2]), max_parallel=2)
    assert _ask(client, 20) == expected
    left_out, again = capsys.readouterr().err.strip().splitlines()
    assert "keeps failing (500: CUDA error)" in left_out and len(lists) == 1
    assert again == f"The server at {servers[1].url} answers again, and is used."


def test_a_server_that_is_not_there_is_left_out(
    servers: list[FakeOpenAIServer],
    expected: dict[tuple[int, int], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    absent = f"http://127.0.0.1:{free_port()}/v1"
    client = OpenAIClient(f"{absent},{servers[0].url}")
    assert _ask(client, 20) == expected
    assert _ask(client, 20) == expected  # a second run says nothing again
    log = capsys.readouterr().err
    assert log.startswith(f"No server answers at {absent}") and log.count("\n") == 1


def test_it_fails_only_when_no_server_answers(
    servers: list[FakeOpenAIServer], capsys: pytest.CaptureFixture[str]
) -> None:
    for each in servers[:2]:
        each.responses = [Teacher(), _DOWN]
    with pytest.raises(GattError) as error:
        _ask(OpenAIClient(_address(servers[:2]), max_parallel=2), 20)
    assert str(error.value).startswith("None of the 2 servers answers. The server at http")
    assert "keeps failing (500: CUDA error)" in str(error.value)
    assert capsys.readouterr().err.count("1 of 2 servers go on") == 1


def test_all_are_absent() -> None:
    ports = [free_port(), free_port()]
    client = OpenAIClient(",".join(f"http://127.0.0.1:{port}/v1" for port in ports))
    with pytest.raises(GattError, match=r"^None of the 2 servers answers\. No server answers at"):
        _ask(client, 2)


def test_after_all_have_failed_a_second_run_tries_all_again(
    servers: list[FakeOpenAIServer],
) -> None:
    client = OpenAIClient(_address(servers))
    models = [each.models for each in servers]
    for each in servers:
        each.models = _DOWN
    with pytest.raises(GattError, match="None of the 3 servers answers"):
        _ask(client, 2)
    for each, response in zip(servers[1:], models[1:], strict=True):
        each.models = response
    assert len(_ask(client, 5)) == 10


def test_servers_of_different_models_are_refused(servers: list[FakeOpenAIServer]) -> None:
    servers[1].models = send_json(200, {"data": [{"id": "other"}]})
    with pytest.raises(GattError) as error:
        _ask(OpenAIClient(_address(servers)), 2)
    assert f"The server at {servers[1].url} runs other, and others run first." in str(error.value)
    assert not any(each.bodies for each in servers)
    # The user may know better: llama-server takes any name.
    named = OpenAIClient(f"{servers[0].url},{servers[1].url}#mine", max_parallel=2)
    assert len(_ask(named, 4)) == 8
    assert {body["model"] for each in servers for body in each.bodies} == {"mine"}


def test_what_one_server_refuses_none_gets(
    servers: list[FakeOpenAIServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """Else an answer would depend on which server gave it."""

    def refusal(body: dict[str, Any]) -> tuple[int, object] | None:
        unsupported = {"error": {"message": "temperature is not supported"}}
        return (400, unsupported) if "temperature" in body else None

    servers[1].responses = [Teacher(refusal=refusal)]
    client = OpenAIClient(_address(servers), max_parallel=6, probe=True)
    _ask(client, 12)
    for each in servers:
        probe, *bodies = each.bodies
        assert probe["messages"][0]["content"].startswith("What is 2 + 3?")
        assert bodies and not any("temperature" in body for body in bodies[each is servers[1] :])
    assert client.changes == {"temperature": "left out"}
    assert capsys.readouterr().err.count(f"{servers[1].url} refuses temperature") == 1


@pytest.mark.parametrize(
    ("name", "urls", "model"),
    [
        ("http://a/v1", ("http://a/v1",), ""),
        ("http://a/v1#m,HTTPS://b/v1", ("http://a/v1", "HTTPS://b/v1"), "m"),
        ("http://a/v1#m , http://b/v1#m,http://a/v1", ("http://a/v1", "http://b/v1"), "m"),
        ("http://a/x,y/v1#m,n", ("http://a/x,y/v1",), "m,n"),
    ],
)
def test_addresses(name: str, urls: tuple[str, ...], model: str) -> None:
    assert parse_servers(name) == (urls, model)
    assert served_name(name) == (model or name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://a/v1#m,http://b/v1#n", "run different models (m, n)"),
        ("http://a/v1,http://", "'http://' is not the address of a server"),
        ("http://a:0/v1", "'http://a:0/v1' is not the address of a server"),
    ],
)
def test_wrong_addresses(name: str, message: str) -> None:
    with pytest.raises(GattError) as error:
        OpenAIClient(name)
    assert message in str(error.value)


def test_a_list_of_servers_in_a_recipe(tmp_path: Path) -> None:
    urls = ["http://a:8000/v1", "http://b:8000/v1#m"]
    file = tmp_path / "recipe.toml"
    file.write_text(f"[synthesize]\nteacher = {urls}\njudge = {urls[:1]}", encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.synthesize.teacher == "http://a:8000/v1,http://b:8000/v1#m"
    assert recipe.synthesize.judge == urls[0]
    file.write_text(recipe_toml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert load_recipe(None, ("synthesize.teacher=http://a/v1,http://b/v1",)) == Recipe(
        synthesize=recipe.synthesize.model_copy(
            update={"teacher": "http://a/v1,http://b/v1", "judge": ""}
        )
    )
    with pytest.raises(GattError, match=r"synthesize\.teacher: a list names servers of one model"):
        load_recipe(None, ("synthesize.teacher=['http://a/v1', 'smollm2-135m']",))


_SETTINGS = (
    "dialogues.train=6",
    "dialogues.turns=2",
    "dialogues.validation=0",
    "evaluate.dialogues=2",
    "evaluate.turns=2",
    "evaluate.suite_dialogues=0",
    "synthesize.max_tokens=40",
    "synthesize.temperature=0",
)


@pytest.mark.slow
def test_a_real_server_that_is_killed_in_the_middle(tmp_path: Path) -> None:
    """The data are those of one server; `gatt serve` is greedy here, as it is not batch-invariant.

    The process is killed as soon as its first answer is logged.
    """
    flags = [word for setting in _SETTINGS for word in ("--set", setting)]
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(gatt_server(_folder(tmp_path / name), MODEL)) for name in "ab"
        )
        single, both = tmp_path / "single", tmp_path / "both"
        for run in (single, both):
            assert call_gatt("instructions", "--run", run, *flags).returncode == 0
        teacher = f"synthesize.teacher=['{first.url}/v1']"
        done = call_gatt("synthesize", "--run", single, *flags, "--set", teacher)
        assert done.returncode == 0, done.stderr

        def kill() -> None:
            log = both / "synthesize" / "answers.jsonl"
            while not (log.exists() and log.stat().st_size):
                time.sleep(0.01)
            second.process.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        teacher = f"synthesize.teacher=['{first.url}/v1', '{second.url}/v1']"
        done = call_gatt(
            "synthesize", "--run", both, *flags, "--set", teacher,
            "--set", "synthesize.max_parallel=2",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        killer.join(5)
        assert second.process.poll() is not None
    assert f"No server answers at {second.url}" in done.stderr
    chats = [
        [row["messages"] for _, row in read_jsonl(run / "synthesize" / "dialogues.jsonl")]
        for run in (single, both)
    ]
    assert chats[0] == chats[1] and len(chats[0]) > 1
    keys = [
        (row["dialogue"], row["turn"], row["candidate"])
        for _, row in read_jsonl(both / "synthesize" / "answers.jsonl")
    ]
    assert len(keys) == len(set(keys))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
