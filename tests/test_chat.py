"""The chat with the embedded model: its cache, its engine, pipes, and a real terminal."""

from __future__ import annotations

import asyncio
import io
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.chat import (
    BEGIN_WITH_AHOY,
    SAMPLING,
    ScriptedScreen,
    open_chat,
    run_chat,
)
from support.cli import call_gatt
from support.cores import pretend_cores
from support.servers import MODEL
from support.tmux import terminal

from pipeline.chat.commands import chat_loop
from pipeline.chat.conversation import Conversation
from pipeline.chat.files import read_chat
from pipeline.chat.session import SamplingParams
from pipeline.gguf.reader import open_gguf
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.chat_engine import ChatEngine
from pipeline.inference.llama.batch_builder import BatchRow
from pipeline.inference.llama.context import BatchContext, SequenceState
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.records import Completion, Message, Request

GREEDY = SamplingParams(0.0, 12, 1)
CHAT = (sys.executable, "-m", "pipeline", "chat", MODEL)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Generate with one thread: several wait for each other on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        pretend_cores(patch, 1)
        yield


@pytest.fixture(scope="module")
def model(base: Path) -> Iterator[LoadedModel]:
    loaded = LoadedModel(open_gguf(base))
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random adapter of the embedded model that changes its answers."""
    import gguf
    import numpy as np

    file = tmp_path_factory.mktemp("adapter") / "random.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(1)
    for tensor in open_gguf(base).tensors:
        if tensor.name.endswith("attn_q.weight"):
            for half, shape in (("a", (4, tensor.shape[1])), ("b", (tensor.shape[0], 4))):
                values = rng.normal(0, 0.12, shape).astype(np.float32)
                writer.add_tensor(f"{tensor.name}.lora_{half}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _chat(
    model: LoadedModel, *lines: str, sampling: SamplingParams = SAMPLING, context: int = 512
) -> Conversation:
    engine = ChatEngine([(model, None)], context)
    return run_chat(engine, ScriptedScreen(lines), sampling=sampling)


def test_turn_20_feeds_no_more_than_turn_2(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_rows: list[int] = []
    decode_rows = BatchContext._decode_rows

    def count_rows(context: BatchContext[SequenceState], rows: Sequence[BatchRow]) -> list[int]:
        turn_rows[-1] += len(rows)
        return decode_rows(context, rows)

    class CountingScreen(ScriptedScreen):
        async def read_message(self, status: str, draft: str = "") -> str:
            turn_rows.append(0)
            return await super().read_message(status, draft)

    monkeypatch.setattr(BatchContext, "_decode_rows", count_rows)
    screen = CountingScreen(["Say one word about rain."] * 20)
    engine = ChatEngine([(model, None)], 1024)
    chat = open_chat(engine, screen, sampling=SamplingParams(0.7, 4, 1))
    asyncio.run(chat_loop(chat))
    assert asyncio.run(chat.session.tokens_used()) > 400
    chat.backend.close()
    assert len(chat.session.conversation.turns) == 20
    # A row of padding goes with each token, so that the 20 tokens or so of a turn are 40 rows.
    assert max(turn_rows[1:20]) <= turn_rows[1] + 12 < 60


def test_a_probe_leaves_the_chat_and_its_cache_unchanged(model: LoadedModel) -> None:
    plain = _chat(model, "Hello there", "What is rain?")
    probed = _chat(model, "Hello there", "/probe What is your name?", "What is rain?")
    assert probed == plain
    assert len(plain.turns) == 2


def test_undo_edit_and_another_context_leave_nothing_in_the_cache(model: LoadedModel) -> None:
    plain = _chat(model, "Hello there", "What is rain?", sampling=GREEDY)
    detours = (
        "Good day",
        "/edit 1",
        "Hello there",
        "Name a river.",
        "/undo",
        "/params context=640",
    )
    assert _chat(model, *detours, "What is rain?", sampling=GREEDY) == plain


def test_ctrl_c_ends_an_answer_while_its_prompt_is_read(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ChatEngine([(model, None)], 512)
    chunks: list[int] = []
    prefill = BatchContext.prefill

    def stop_in_the_first_chunk(
        context: BatchContext[SequenceState], sequence: SequenceState
    ) -> None:
        prefill(context, sequence)
        chunks.append(len(sequence.pending))
        engine.stop()

    monkeypatch.setattr(BatchContext, "prefill", stop_in_the_first_chunk)
    user: Message = {"role": "user", "content": "Tell me about rain. " * 50}
    request = Request(messages=(user,), seed=1, max_tokens=4)
    try:
        (stopped,) = engine.generate([request])
        assert len(chunks) == 1 < chunks[0]
        assert isinstance(stopped.piece, Completion)
        assert (stopped.piece.text, stopped.piece.finish) == ("", "cancelled")
        monkeypatch.setattr(BatchContext, "prefill", prefill)
        again = [answer.piece for answer in engine.generate([request])][-1]
    finally:
        engine.close()
    with BatchEngine(model, 1, 512) as alone:
        assert again == alone.complete(request)


def test_two_models_over_the_same_weights_answer_as_each_alone(
    model: LoadedModel, adapter: Path
) -> None:
    prompts: list[tuple[Message, ...]] = [
        ({"role": "user", "content": text},) for text in ("What is rain?", "Name a river.")
    ]
    requests = [Request(messages=prompt, seed=1, max_tokens=16) for prompt in prompts]
    models = [(model, Adapter(adapter)), (model, None)]
    alone: list[list[Completion]] = []
    for loaded, model_adapter in models:
        with BatchEngine(loaded, 1, 256, adapter=model_adapter) as engine:
            alone.append([engine.complete(request) for request in requests])
    together: list[list[Completion]] = [[], []]
    chat_engine = ChatEngine(models, 256)
    try:
        for request in requests:
            for answer in chat_engine.generate([request] * 2):
                if isinstance(answer.piece, Completion):
                    together[answer.model_index].append(answer.piece)
    finally:
        chat_engine.close()
    assert together == alone
    assert alone[0] != alone[1]


def test_lines_from_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    options = (
        "--instruction",
        "Begin with Ahoy!",
        "--check",
        "opening=Ahoy!",
        "--max-tokens",
        "12",
    )
    done = subprocess.run(
        [*CHAT, "--lines", *options],
        input=f"Hello there\n\nWhat is rain?\n/save {file}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [m["content"] for m in read_chat(file) if m["role"] == "assistant"]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert len(answers) == 2
    assert "of 2: " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    wrong = subprocess.run(
        [*CHAT, "--lines", "--load", file],
        input="/undoo\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 1
    assert "Loaded" in wrong.stderr
    assert wrong.stderr.splitlines()[-1].startswith(
        "gatt: Unknown command /undoo. Did you mean '/undo'?"
    )


def test_ctrl_c_ends_a_chat_with_a_pipe() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        (*CHAT, "--lines"), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        assert any("Each line is a message" in line for line in process.stderr)
        process.stdin.write("Tell me a very long story about a ship.\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
        assert time.monotonic() - start < 3
        assert "Traceback" not in process.stderr.read()


def test_a_full_context_without_a_user_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 60 + "\n"))
    done = call_gatt("chat", MODEL, "--context", 64, "--max-tokens", 32)
    assert done.returncode == 1
    assert "nearly full" in done.stderr.splitlines()[-1]


def test_what_cannot_be_chatted_with_is_explained_in_a_line(base: Path, tmp_path: Path) -> None:
    for words, problem in (
        (("smollm2-135n",), "Did you mean 'smollm2-135m'"),
        ((base, "--adapter", base), "is not an adapter"),
        ((base, "--check", "opening"), "needs a value"),
        ((base, "--temperature", "-1"), "expected 0"),
        ((base, "--context", "63"), "expected at least 64"),
        ((base, "--load", tmp_path / "none.json"), "Cannot read"),
    ):
        done = call_gatt("chat", *words)
        assert done.returncode == 1
        assert problem in done.stderr.splitlines()[-1]


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
@pytest.mark.slow
def test_a_terminal_as_a_user_sees_it(adapter: Path, tmp_path: Path) -> None:
    options = ("--adapter", str(adapter), "--compare", MODEL, "--max-tokens", "1000")
    command = [*CHAT, *options, "--instruction", BEGIN_WITH_AHOY.text]
    names = ("smollm2-135m + random.gguf", "smollm2-135m ─")

    def side_by_side(screen: str) -> bool:
        return any(all(name in line for name in names) for line in screen.splitlines())

    with terminal(command, tmp_path, columns=120) as tty:
        tty.wait("turn 1 · context 0 of 4096, 4096 left")
        assert "checked as opening: Ahoy!" in tty.screen
        tty.type("Write a long story", "M-Enter", "about **rain**.", "Enter")
        word_counts: set[int] = set()

        def has_grown(screen: str) -> bool:
            if "Ctrl-C stops" in screen:
                word_counts.add(len(screen.split("──", 1)[-1].split()))
            return len(word_counts) > 3

        tty.wait_until(has_grown)  # it streams
        tty.type("C-c")
        screen = tty.wait("turn 2 · context")
        assert side_by_side(screen)
        verdicts = ("followed 0 of 1: ✗", "followed 1 of 1: ✓", "is not a valid answer")
        assert sum(map(screen.count, verdicts)) >= 2
        assert screen.count("stopped") == 2
        assert "^C" not in screen

        tty.type(f"/save {tmp_path / 'chat.json'}", "Enter")
        tty.wait("Saved 1 turn")
        (user, answer), (same_user, second_answer) = (
            read_chat(tmp_path / name) for name in ("chat.json", "chat-2.json")
        )
        sent = f"Write a long story\nabout **rain**.\n\n{BEGIN_WITH_AHOY.text}"
        assert user["content"] == same_user["content"] == sent
        assert answer["content"] != second_answer["content"]
        tty.type("/undo", "Enter")
        tty.wait("Removed turn 1: Write a long story")
        tty.wait("turn 1 · context 0 of")
        tty.type(f"/load {tmp_path / 'chat.json'}", "Enter")
        tty.wait("turn 2 · context")

        tty.type("/params max_tokens=8", "Enter")
        tty.wait("max_tokens=8 seed")
        tty.resize(60)
        tty.type(*["Up"] * 6, "Enter")  # the first message again
        screen = tty.wait("turn 3 · context")
        assert not side_by_side(screen)
        assert screen.count("of 2: ") == 2
        tty.type("C-c")
        tty.wait("Ctrl-D leaves the chat")
        tty.type("C-d")
        tty.wait("left")
