"""Dialogues on a real Ray cluster of several nodes: the same bytes as on one machine."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.cli import Completed, call_gatt
from support.cluster import (
    add_node,
    can_make_networks,
    client_address,
    kill_raylet,
    local_cluster,
    networked_cluster,
)
from support.cores import pretend_cores
from support.shared import make_once

from pipeline.cluster.calls import CallServer
from pipeline.cluster.rates import Rates
from pipeline.cluster.shared_files import SharedFile, shared_file
from pipeline.errors import GattError
from pipeline.files import read_jsonl, sha256
from pipeline.gatt.acceptance import measure_acceptance
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.instructions import render_instruction
from pipeline.gatt.synthesis import Synthesis
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import EngineOptions, open_engine
from pipeline.recipe import Recipe
from pipeline.records import Completion, Constraint, Dialogue, Message, Request, RunTasks, Task
from pipeline.run_dir import RunDir
from pipeline.system import cache_path

pytest.importorskip("ray", reason="the extra [cluster]")

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

_OPTIONS = EngineOptions(dialogues=8, context=256)
_REPLY_KEY = ("arm", "dialogue", "turn", "recall_attribute")
_ANSWER_KEY = ("dialogue", "turn", "candidate")
_MINUTE = 60.0
Texts = dict[tuple[int, int], list[Completion]]
"""The completions of each dialogue and turn: one, unless a turn was answered twice."""


@pytest.fixture(scope="session")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        write_formats(Model("tiny", tiny_llama), None, {"F16": folder / "tiny.gguf"})

    return make_once(tmp_path_factory, "tiny-f16", make) / "tiny.gguf"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with local_cluster("one", "two") as cluster:
        yield cluster


def _talk(
    number: int, turns: int, texts: Texts, on_answer: Callable[[], object] = lambda: None
) -> Task:
    """Ask `turns` questions; every dialogue has other ones."""
    messages: list[Message] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{number} {turn} naïve café?"})
        request = Request(messages=tuple(messages), seed=10 * number + turn, max_tokens=9)
        completion = yield request
        texts.setdefault((number, turn), []).append(completion)
        messages.append({"role": "assistant", "content": completion.text})
        on_answer()


def _answers(
    gguf: Path,
    *,
    dialogues: int = 8,
    turns: int = 3,
    on_answer: Callable[[], object] = lambda: None,
) -> Texts:
    """Return what the model says in the dialogues, here or on the connected cluster."""
    texts: Texts = {}
    with open_engine(gguf, _OPTIONS) as engine:
        engine.run([_talk(n, turns, texts, on_answer) for n in range(dialogues)])
    return texts


def test_two_nodes_answer_as_one_machine(
    two_nodes: Cluster, tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the two gets its share, and an error of a dialogue ends the run as it does here."""
    from pipeline.cluster.session import connect, current_cluster

    expected = _answers(tiny_gguf)
    assert {len(completions) for completions in expected.values()} == {1}
    with connect(two_nodes.address) as cluster:
        assert current_cluster() is cluster
        assert _answers(tiny_gguf) == expected
        assert cluster.describe() == "a Ray cluster of 2 nodes with 2 cores"
        lines = capsys.readouterr().err.splitlines()
        for node in ("one", "two"):
            assert f"cluster: {node}: 8 sequences of 256 tokens on the CPU" in lines
        total = next(line for line in lines if " answers in " in line)
        rates = [
            float(total.partition(f"{node} ")[2].split(")")[0].split(",")[0])
            for node in ("(one", ", two")
        ]
        assert total.startswith("cluster: 24 answers in ")
        assert rates[0] == pytest.approx(rates[1], abs=0.11)  # 12 answers each

        def fail() -> None:
            raise GattError("The check returned None.")

        with pytest.raises(GattError, match=r"^The check returned None\.$"):
            _answers(tiny_gguf, on_answer=fail)
        assert _answers(tiny_gguf, dialogues=3) == {k: v for k, v in expected.items() if k[0] < 3}
    assert current_cluster() is None


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_data_depend_on_neither_order_nor_workers(workers: int) -> None:
    """An instruction is given up, and answers are too common, whoever comes first."""
    expected, *others = (
        _synthesize(_one_by_one),
        *(_synthesize(_interleaved(workers, seed)) for seed in range(5)),
    )
    given_up, removed, rows = expected
    assert given_up == {"opening: Never!": 6}
    assert removed
    assert len(rows) > 20
    assert all(other == expected for other in others)


def _synthesize(run_tasks: RunTasks) -> tuple[dict[str, int], int, list[str]]:
    dialogues = [_assigned(n) for n in range(40)]
    synthesis = Synthesis(Recipe(), record=lambda answer: None)
    given_up = synthesis.run(run_tasks, dialogues)
    removed = synthesis.remove_common(dialogues)
    rows = [json.dumps(synthesis.synthesized(d, "t")) for d in dialogues if synthesis.accepted(d)]
    rows.append(str(measure_acceptance(dialogues, synthesis.answers.values(), removed)))
    return given_up, removed, rows


def _assigned(number: int) -> AssignedDialogue:
    opening = ("Ahoy!", "Never!")[number % 3 == 2]
    return AssignedDialogue(
        dialogue=Dialogue(f"d{number}", "sea", ("Why is the sea salt?", "Who measures the salt?")),
        instruction=render_instruction((Constraint("opening", opening),)),
        method="edited" if number % 4 == 1 and opening == "Ahoy!" else "sampled",
    )


def _complete(request: Request) -> Completion:
    """Answer by the seed only, often with the same words."""
    draw = random.Random(request.seed)
    river = draw.choice(["rivers", "rain", "streams"])
    text = f"The sea is salt because {river} carry minerals into it, say {draw.randrange(9)} books."
    return Completion(f"{draw.choice(['Ahoy! ', ''])}{text}", 9, 9, "stop")


def _one_by_one(tasks: Iterable[Task]) -> None:
    _interleaved(1, 0)(tasks)


def _interleaved(workers: int, seed: int) -> RunTasks:
    """Return a function that advances up to 4 dialogues of each worker in a random order."""

    def run(tasks: Iterable[Task]) -> None:
        draw, waiting = random.Random(seed), iter(tasks)
        busy: list[tuple[Task, Request]] = []
        while True:
            while len(busy) < 4 * workers and (task := next(waiting, None)):
                busy.append((task, next(task)))
            if not busy:
                return
            task, request = busy.pop(draw.randrange(len(busy)))
            try:
                busy.append((task, task.send(_complete(request))))
            except StopIteration:
                continue

    return run


def test_a_worker_shares_its_dialogues_among_its_cores(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _answers(tiny_gguf)
    pretend_cores(monkeypatch, 3)
    with closing(CallServer(BatchEngine(tiny_gguf, 8, 256), 3)) as server:
        assert server.sequences == 8
        texts: Texts = {}
        tasks = {n: _talk(n, 3, texts) for n in range(8)}
        futures = {server.submit(n, next(task)): n for n, task in tasks.items()}
        assert sorted(queue.load for queue in server._queues) == [2, 3, 3]
        while futures:
            done, _ = wait(futures, _MINUTE, FIRST_COMPLETED)
            for future in done:
                number = futures.pop(future)
                try:
                    request = tasks[number].send(future.result())
                except StopIteration:
                    server.end(number)
                    continue
                futures[server.submit(number, request)] = number
        assert texts == expected
        # A context that has been idle goes on; a new dialogue takes the place of one that ends.
        first = server.submit(8, next(_talk(0, 1, texts)))
        assert first.result(_MINUTE) == expected[0, 0][0]
        assert [queue.load for queue in server._queues].count(1) == 1
        second = server.submit(9, next(_talk(1, 1, texts)), ended=8)
        assert second.result(_MINUTE) == expected[1, 0][0]
        assert sum(queue.load for queue in server._queues) == 1


def test_an_error_in_an_engine_reaches_the_caller(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BatchEngine(tiny_gguf, 1, 256)

    def fail(*_: object) -> None:
        raise RuntimeError("llama_decode returned 1")

    monkeypatch.setattr(engine.workers[0], "_step", fail)
    with closing(CallServer(engine, 1)) as server:
        future = server.submit(0, next(_talk(0, 1, {})))
        with pytest.raises(RuntimeError, match="llama_decode returned 1"):
            future.result(_MINUTE)


def test_a_file_is_located_by_its_hash_and_otherwise_received(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, node = tmp_path / "driver", tmp_path / "node"
    monkeypatch.setenv("XDG_CACHE_HOME", str(driver))
    source = driver / "gatt" / "abc-F16.gguf"
    source.parent.mkdir(parents=True)
    shutil.copy(tiny_gguf, source)
    file = shared_file(source)
    assert file.locate() == source
    monkeypatch.setenv("XDG_CACHE_HOME", str(node))
    chunks = list(file.chunks())
    source.write_bytes(b"another one")  # another file of the same name does not count
    assert file.locate() is None
    received = file.receive(chunks)
    assert received.is_relative_to(node)
    assert sha256(received) == sha256(tiny_gguf)
    assert file.locate() == received
    assert file.receive([b"is not read"]) == received
    converted = node / "gatt" / source.name  # as a conversion on that machine makes it
    shutil.copy(tiny_gguf, converted)
    assert file.locate() == converted
    converted.unlink()
    received.unlink()
    for broken in (chunks[:-1], [b"x" * file.size]):
        with pytest.raises(GattError, match="has changed on the driver's disk"):
            file.receive(broken)
        assert file.locate() is None


def test_all_parts_of_a_split_model_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = [f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 3)
    file = shared_file(tmp_path / names[0])
    elsewhere = SharedFile(
        path=tmp_path / "elsewhere" / names[0], sha256=file.sha256, places=(), sizes=file.sizes
    )
    received = elsewhere.receive(file.chunks())
    for name in names:
        assert received.with_name(name).read_bytes() == name.encode() * 3


def test_rates_name_the_slowest_nodes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rates = Rates()
    for node in range(10):
        for _ in range(60 * (node + 1)):
            rates.count(f"n{node}")
    rates.log_recent()
    assert not capsys.readouterr().err  # too early
    now = 160.0
    rates.log_recent()
    nodes = ", ".join(f"n{node} {node + 1}.0" for node in range(8))
    assert capsys.readouterr().err == f"cluster: 55.0 answers/s ({nodes}, 2 faster nodes)\n"
    rates.count("n9")
    now = 220.0
    rates.log_recent()
    assert "n0 0.0, n1 0.0" in capsys.readouterr().err
    rates.log_all()
    assert capsys.readouterr().err.startswith("cluster: 3301 answers in 120 s: 27.5 answers/s (")


def test_without_a_cluster_the_error_is_one_line(tmp_path: Path) -> None:
    from pipeline.cluster.session import connect

    with (
        pytest.raises(GattError, match=r"no Ray cluster to connect with .not an address of Ray"),
        connect("nonsense"),
    ):
        pass
    for address, reason in {
        "http://127.0.0.1:8265": "not an address of Ray's",
        "ray://127.0.0.1:9": "Connection refused",
        "127.0.0.1:9": "Connection refused",
    }.items():
        done = call_gatt("synthesize", "--run", tmp_path, "--ray", address)
        assert done.returncode == 1
        assert done.stderr.startswith(
            f"gatt: --ray {address}: no Ray cluster to connect with ({reason}). Start one with "
        )
        assert done.stderr.count("\n") == 1


def test_without_ray_the_error_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    for command in ("run", "synthesize", "evaluate"):
        done = call_gatt(command, "--run", tmp_path, "--ray", "auto")
        assert done.stderr == "gatt: ray is not installed. `pip install 'gatt[cluster]'` adds it.\n"
        assert done.returncode == 1


@pytest.mark.slow
def test_a_node_that_dies_loses_nothing_and_one_that_joins_works(
    tiny_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.cluster.session import connect

    expected = _answers(tiny_gguf, dialogues=60, turns=6)
    with local_cluster("one", "two") as nodes, connect(nodes.address):
        events = iter([*[None] * 50, lambda: kill_raylet(nodes, "two")])

        def on_answer() -> None:
            if event := next(events, None):
                event()
                add_node(nodes, "three")
            time.sleep(0.05)  # of the driver: the run lasts until the third node works

        texts = _answers(tiny_gguf, dialogues=60, turns=6, on_answer=on_answer)
    assert texts == expected  # nothing is lost, and no turn was recorded twice
    log = capsys.readouterr().err
    assert "cluster: two is lost (" in log
    total = next(line for line in log.splitlines() if line.startswith("cluster: 360 answers in "))
    assert {"one", "two", "three"} <= {word.strip("(),") for word in total.split()}


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on(
    finished: RunDir, two_nodes: Cluster, tmp_path: Path
) -> None:
    run_dir = _copy(finished, tmp_path / "run", "synthesize")
    environment = {**os.environ, "RAY_ADDRESS": two_nodes.address}
    words = ["synthesize", "--run", str(run_dir.path), "--ray", "auto"]
    command = [sys.executable, "-m", "pipeline", *words]
    lines = sum(1 for _ in read_jsonl(finished.answers))
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not run_dir.answers.exists() or run_dir.answers.read_bytes().count(b"\n") < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = run_dir.answers.read_bytes().count(b"\n")
    assert before < lines
    done = _run(environment, *words)
    assert done.returncode == 0, done.stderr
    _assert_same_synthesis(run_dir, finished)


@pytest.mark.slow
@pytest.mark.skipif(not can_make_networks(), reason="makes network namespaces, as root on Linux")
def test_stages_on_three_machines_give_the_bytes_of_one(
    finished: RunDir, tmp_path: Path, base: Path
) -> None:
    """The nodes have addresses of their own, and two models are sent to them: they lack both."""
    run_dir = _copy(finished, tmp_path / "run", "synthesize", "evaluate")
    exam = ["exam", str(base), "--turns", "2", "--arm", "once", "--regime", "attributes",
            "--dialogues", "2", "--max-tokens", "12"]  # fmt: skip
    alone = _run(os.environ, *exam, "--out", str(tmp_path / "alone"))
    assert alone.returncode == 0, alone.stderr
    hidden = [run_dir.path / "export", cache_path(".")]
    with networked_cluster(tmp_path, 3, hidden) as environment:
        done = _run(environment, "synthesize", "--run", str(run_dir.path), "--ray", "auto")
        assert done.returncode == 0, done.stderr
        for node in ("node-1", "node-2", "node-3"):  # the conversion of this machine's cache
            assert re.search(
                rf"cluster: sending \S+-Q4_0\.gguf \(0\.09 GB\) to {node}", done.stderr
            )
        _assert_same_synthesis(run_dir, finished)
        words = ["evaluate", "--run", str(run_dir.path), "--ray", client_address()]
        done = _run(environment, *words)
        assert done.returncode == 0, done.stderr
        assert "sending tuned-Q8_0.gguf" in done.stderr
        for node in ("node-1", "node-2", "node-3"):
            assert f"cluster: {node}: " in done.stderr
        _assert_same_records(run_dir.replies, finished.replies, _REPLY_KEY)
        assert run_dir.scores.read_bytes() == finished.scores.read_bytes()
        done = _run(environment, *exam, "--out", str(tmp_path / "ray"), "--ray", "auto")
        assert done.returncode == 0, done.stderr
    results = []
    for folder in ("alone", "ray"):
        (file,) = (tmp_path / folder).glob("*.replies.jsonl")
        rows = [row["reply"] for _, row in read_jsonl(file) if "reply" in row]
        results.append(sorted(rows, key=lambda row: [str(row[key]) for key in _REPLY_KEY]))
    assert results[0] == results[1]
    assert len(results[0]) > 4


def _copy(run: RunDir, folder: Path, *without: str) -> RunDir:
    """Return a copy of a run in which some stages have not run."""
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("report", ".lock*", *without))
    return RunDir(folder)


def _run(environment: Mapping[str, str], *words: str) -> Completed:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env=dict(environment),
    )


def _assert_same_synthesis(run_dir: RunDir, expected: RunDir) -> None:
    assert run_dir.examples.read_bytes() == expected.examples.read_bytes()
    assert run_dir.acceptance.read_bytes() == expected.acceptance.read_bytes()
    _assert_same_records(run_dir.answers, expected.answers, _ANSWER_KEY)


def _assert_same_records(log: Path, expected: Path, key: tuple[str, ...]) -> None:
    """Check that two logs have the same lines, each once, in any order."""
    rows = [json.dumps(row) for _, row in read_jsonl(log)]
    assert sorted(rows) == sorted(json.dumps(row) for _, row in read_jsonl(expected))
    keys = {tuple(json.loads(row).get(name) for name in key) for row in rows}
    assert len(keys) == len(rows)
