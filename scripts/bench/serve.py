"""The server against llama-cpp-python's, interleaved in one run: `.venv/bin/python scripts/bench/serve.py [--quick]`.

turn_20: the time to the first token in turn 20 against that in turn 2, one client, users' messages of about 40 tokens, and the
same answers as history in every run. `create_chat_completion` is shown beside it without a bar: in one process it keeps the
cache of its only conversation, in a fresh one it reads the whole conversation again.
clients: 16 clients at once, each with a conversation of its own; all generated tokens over the time that all of them took, ours
against llama-cpp-python's server with the same requests. No request may fail.
--soak MINUTES: random load with clients that leave, each conversation with a secret word that is asked back. A word of another
conversation, a sequence that stays in use, or memory that grows by more than a tenth after the first quarter is a failure.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import openai
import psutil

from pipeline.data.dialogues import load_dialogues
from pipeline.hub.models import find_model

MODEL, CONTEXT, CLIENTS = "smollm2-135m", 4096, 16
BASE = find_model(MODEL).path
DIALOGUES = [dialogue.turns for dialogue in load_dialogues("seed")]
PADDING = " Please explain it in a few plain words, as you would to a friend who has never heard of it, and stay brief."
"""Brings a user's message to about 40 tokens."""
HISTORY = "That is a good question. Here is a short answer that stands for what was said in this turn of the dialogue, and no more."

Messages = list[dict[str, str]]


class Size(NamedTuple):
    """How much is run."""

    rounds: int
    turns: int
    conversations: int
    tokens: int


class Server(NamedTuple):
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str

    def client(self) -> openai.OpenAI:
        """A client that does not try again: a failure is a failure."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=600)


@contextmanager
def serving(words: list[str], port: int) -> Iterator[Server]:
    """A server as a process of its own."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen([sys.executable, *words], stdout=log, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    httpx.get(f"{url}/v1/models").raise_for_status()
                    break
                except httpx.HTTPError:
                    if process.poll() is not None:
                        log.seek(0)
                        raise RuntimeError(log.read().decode(errors="replace")) from None
                    time.sleep(0.2)
            yield Server(process, url)
        finally:
            process.terminate()


def ours() -> Any:
    """`gatt serve`."""
    port = free_port()
    return serving(
        ["-m", "pipeline", "serve", MODEL, "--port", str(port), "--context", str(CONTEXT)], port
    )


def theirs() -> Any:
    """llama-cpp-python's server, as it is; a new request does not break off the one that runs."""
    port = free_port()
    options = [
        "--model",
        str(BASE),
        "--model_alias",
        MODEL,
        "--n_ctx",
        str(CONTEXT),
        "--port",
        str(port),
    ]
    return serving(["-m", "llama_cpp.server", *options, "--interrupt_requests", "False"], port)


def free_port() -> int:
    """One that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def conversation(number: int, turn: int) -> Messages:
    """A conversation up to the user's message of `turn` (from 1)."""
    said: Messages = []
    for n, user in enumerate(DIALOGUES[number % len(DIALOGUES)][:turn]):
        said.append({"role": "user", "content": f"{user}{PADDING}"})
        if n < turn - 1:
            said.append({"role": "assistant", "content": HISTORY})
    return said


def first_tokens(create: Callable[[Messages], Any], turns: int, number: int) -> tuple[float, float]:
    """Seconds to the first token of turn 2 and of the last turn, all turns asked one after another."""
    seconds = []
    for turn in range(1, turns + 1):
        start = time.perf_counter()
        stream = create(conversation(number, turn))
        next(piece for piece in stream if text_of(piece))
        seconds.append(time.perf_counter() - start)
        for _ in stream:
            pass
    return seconds[1], seconds[-1]


def text_of(chunk: Any) -> str:
    """The text in an event of either library."""
    if isinstance(chunk, dict):
        return str(chunk["choices"][0]["delta"].get("content") or "")
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


def growth(size: Size, run: int) -> float:
    """The last turn's time to the first token against turn 2's, and the peer's beside it."""
    with ours() as server:
        client = server.client()

        def create(messages: Messages) -> Any:
            return client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=4,
                temperature=0,
                stream=True,  # type: ignore[arg-type]
            )

        create(conversation(99, 1)).close()
        found = [
            first_tokens(create, size.turns, run * size.conversations + n)
            for n in range(size.conversations)
        ]
    early, late = (statistics.median(side) for side in zip(*found, strict=True))
    print(
        f"  ours: turn 2 {early * 1000:.0f} ms, turn {size.turns} {late * 1000:.0f} ms: {late / early:.2f} times",
        flush=True,
    )
    peer(size, run)
    return late / early


def peer(size: Size, run: int) -> None:
    """`create_chat_completion`, in one process and with its cache thrown away."""
    import llama_cpp

    llama = llama_cpp.Llama(str(BASE), n_ctx=CONTEXT, verbose=False)

    def create(messages: Messages) -> Any:
        return llama.create_chat_completion(messages, max_tokens=4, temperature=0, stream=True)

    def anew(messages: Messages) -> Any:
        llama.reset()
        return create(messages)

    for name, way in (("same process", create), ("fresh process", anew)):
        early, late = first_tokens(way, size.turns, run)
        print(
            f"  loop, {name}: {early * 1000:.0f} and {late * 1000:.0f} ms: {late / early:.2f} times",
            flush=True,
        )


def throughput(server: Server, size: Size, run: int) -> float:
    """Generated tokens per second of all clients together, in two turns each."""

    def talk(number: int) -> int:
        client, tokens = server.client(), 0
        for turn in (1, 2):
            said = client.chat.completions.create(
                model=MODEL,
                messages=conversation(run * CLIENTS + number, turn),  # type: ignore[arg-type]
                max_tokens=size.tokens,
                temperature=0.7,
                seed=number,
            )
            assert said.usage and said.choices[0].message.content is not None
            # Ours counts the token that ends an answer, which takes as long as any other; theirs does not.
            ended = said.choices[0].finish_reason == "stop" and not said.usage.prompt_tokens_details
            tokens += said.usage.completion_tokens + ended
        return tokens

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        tokens = sum(pool.map(talk, range(CLIENTS)))
    seconds = time.perf_counter() - start
    print(f"    {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", flush=True)
    return tokens / seconds


class Soak:
    """Random load for some minutes."""

    def __init__(self, server: Server, minutes: float) -> None:
        self._server, self._end = server, time.monotonic() + 60 * minutes
        self.mixed = self.failed = self.asked = self.left = self.kept = 0
        self._words = [
            f"{a}{b}"
            for a in ("bal", "cor", "dun", "fim")
            for b in ("tavo", "rique", "nolda", "susk")
        ]

    def client(self, number: int) -> None:
        """One conversation after another, each with its secret word; now and then the client leaves in mid-answer."""
        chance, word, client = random.Random(number), self._words[number], self._server.client()
        while time.monotonic() < self._end:
            messages: Messages = [
                {"role": "user", "content": f"The secret word is {word}. Say the secret word."}
            ]
            for _ in range(chance.randint(1, 6)):
                text = self._answer(client, messages, chance)
                self.mixed += any(other in text.lower() for other in self._words if other != word)
                self.kept += word in text.lower()
                messages += [
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": "Say the secret word again."},
                ]

    def _answer(self, client: openai.OpenAI, messages: Messages, chance: random.Random) -> str:
        self.asked += 1
        leaves, said = chance.random() < 0.3, ""
        try:
            stream = client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=chance.randint(4, 48),
                seed=chance.randint(0, 99),
                stream=True,  # type: ignore[arg-type]
            )
            for chunk in stream:
                said += text_of(chunk)
                if leaves and len(said) > 8:
                    self.left += 1
                    stream.close()
                    break
        except openai.APIError as error:
            self.failed += 1
            print(f"  failed: {error}", flush=True)
        return said

    def watch(self) -> list[float]:
        """The server's memory in MB, looked at every two seconds."""
        process, seen = psutil.Process(self._server.process.pid), []
        while time.monotonic() < self._end:
            seen.append(process.memory_info().rss / 1e6)
            time.sleep(2)
        return seen


def soak(minutes: float) -> dict[str, Any]:
    """The figures of a soak."""
    with ours() as server:
        load = Soak(server, minutes)
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            memory = pool.submit(load.watch)
            for future in [pool.submit(load.client, n) for n in range(CLIENTS)]:
                future.result()
        time.sleep(3)
        in_use = float(
            re.findall(
                r"gatt_sequences_in_use\{.*\} (\S+)", httpx.get(f"{server.url}/metrics").text
            )[0]
        )
    quarters = memory.result()[len(memory.result()) // 4 :]
    grown = max(quarters[-5:]) / quarters[0]
    print(
        f"  {load.asked} requests, {load.left} clients left, {load.kept} answers with their own word",
        flush=True,
    )
    print(f"  memory {quarters[0]:.0f} to {quarters[-1]:.0f} MB", flush=True)
    return {
        "soak_foreign_words": {"value": load.mixed, "bar": 0, "holds": load.mixed == 0},
        "soak_failed_requests": {"value": load.failed, "bar": 0, "holds": load.failed == 0},
        "soak_sequences_left": {"value": in_use, "bar": 0, "holds": in_use == 0},
        "soak_memory_growth": {"value": round(grown, 3), "bar": 1.1, "holds": grown <= 1.1},
    }


def main() -> None:
    """Interleaved runs; the last line is the figures with their bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one run, shorter answers")
    parser.add_argument(
        "--soak", type=float, default=0, metavar="MINUTES", help="random load instead"
    )
    options = parser.parse_args()
    if options.soak:
        print(json.dumps({"bench": "serve", "figures": soak(options.soak)}))
        return
    size = Size(1, 20, 1, 32) if options.quick else Size(3, 20, 3, 64)
    growths, ratios = [], []
    for run in range(size.rounds):
        print(f"run {run + 1} of {size.rounds}", flush=True)
        growths.append(growth(size, run))
        speed = []
        for name, start in (("ours", ours), ("theirs", theirs)):
            print(f"  {CLIENTS} clients, {name}", flush=True)
            with start() as server:
                speed.append(throughput(server, size, run))
        ratios.append(speed[0] / speed[1])
    late, ratio = statistics.median(growths), statistics.median(ratios)
    figures = {
        "first_token_turn_20_against_turn_2": {
            "value": round(late, 3),
            "bar": 1.3,
            "holds": late <= 1.3,
        },
        "clients_against_llama_cpp_server": {
            "value": round(ratio, 3),
            "bar": 2.5,
            "holds": ratio >= 2.5,
        },
    }
    print(json.dumps({"bench": "serve", "figures": figures}))


if __name__ == "__main__":
    main()
