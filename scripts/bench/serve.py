"""Compare `gatt serve` with llama-cpp-python's server, interleaved in one run.

    .venv/bin/python scripts/bench/serve.py [--quick | --soak MINUTES]

turn_20: time to the first token in turn 20 relative to turn 2. One client, user messages of about
40 tokens, the same answers as history in every run. `create_chat_completion` is printed as well,
without a bar: in one process it keeps the cache of its only conversation, in a new one it reads
the conversation again.

clients: 16 clients at once, each with its own conversation. All generated tokens over the time of
all clients, relative to llama-cpp-python's server with the same requests. No request may fail.

--soak: random load with clients that disconnect; each conversation has a secret word that is asked
for. A word of another conversation, a sequence that stays in use, or memory that grows by more
than a tenth after the first quarter is a failure.
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
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import httpx
import openai
import psutil

from pipeline.data.dialogues import load_dialogues
from pipeline.hub.models import find_model

MODEL, CONTEXT, CLIENTS = "smollm2-135m", 4096, 16
BASE = find_model(MODEL).path
DIALOGUES = [dialogue.turns for dialogue in load_dialogues("seed")]
PADDING = (
    " Please explain it in a few plain words, as you would to a friend who has never heard of it, "
    "and stay brief."
)
"""Brings a user's message to about 40 tokens."""
HISTORY = (
    "That is a good question. Here is a short answer that stands for what was said in this turn "
    "of the dialogue, and no more."
)
MAX_GROWTH, MIN_SPEEDUP, MAX_MEMORY_GROWTH = 1.3, 2.5, 1.1
TIMEOUT_SECONDS = 600

Messages = list[dict[str, str]]


class Size(NamedTuple):
    """How much is run."""

    rounds: int
    turns: int
    conversations: int
    max_tokens: int


class Server(NamedTuple):
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str

    def client(self) -> openai.OpenAI:
        """Return a client that does not retry: a failure is a failure."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=TIMEOUT_SECONDS
        )


def run_server(words: list[str], port: int) -> AbstractContextManager[Server]:
    """Run a server in Python as a process, and yield it once it answers."""
    return run_command([sys.executable, *words], port)


@contextmanager
def run_command(command: list[str], port: int) -> Iterator[Server]:
    """Run a server as a process, and yield it once it answers."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            while not is_ready(url):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode(errors="replace"))
                time.sleep(0.2)
            yield Server(process, url)
        finally:
            process.terminate()


def is_ready(url: str) -> bool:
    """Return whether the server lists its models."""
    try:
        return httpx.get(f"{url}/v1/models").is_success
    except httpx.HTTPError:
        return False


def gatt_server() -> AbstractContextManager[Server]:
    """Run `gatt serve`."""
    port = free_port()
    words = ["-m", "pipeline", "serve", MODEL, "--port", str(port), "--context", str(CONTEXT)]
    return run_server(words, port)


def llama_cpp_server() -> AbstractContextManager[Server]:
    """Run llama-cpp-python's server; a new request does not interrupt the running one."""
    port = free_port()
    options = {
        "--model": str(BASE),
        "--model_alias": MODEL,
        "--n_ctx": str(CONTEXT),
        "--port": str(port),
        "--interrupt_requests": "False",
    }
    flags = [word for option in options.items() for word in option]
    return run_server(["-m", "llama_cpp.server", *flags], port)


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def conversation(number: int, turn: int) -> Messages:
    """Return a conversation up to the user's message of `turn`, from 1."""
    messages: Messages = []
    for index, user in enumerate(DIALOGUES[number % len(DIALOGUES)][:turn]):
        messages.append({"role": "user", "content": f"{user}{PADDING}"})
        if index < turn - 1:
            messages.append({"role": "assistant", "content": HISTORY})
    return messages


class FirstTokens(NamedTuple):
    """Seconds to the first token."""

    turn_2: float
    last_turn: float


def time_first_tokens(create: Callable[[Messages], Any], turns: int, number: int) -> FirstTokens:
    """Measure the times in one conversation, whose turns are sent one after another."""
    seconds: list[float] = []
    for turn in range(1, turns + 1):
        start = time.perf_counter()
        stream = create(conversation(number, turn))
        next(piece for piece in stream if text_of(piece))
        seconds.append(time.perf_counter() - start)
        for _ in stream:
            pass
    return FirstTokens(seconds[1], seconds[-1])


def text_of(chunk: Any) -> str:
    """Return the text in a chunk of either library."""
    if isinstance(chunk, dict):
        return str(chunk["choices"][0]["delta"].get("content") or "")
    return str(chunk.choices[0].delta.content or "") if chunk.choices else ""


def measure_growth(size: Size, run: int) -> float:
    """Return the last turn's time to the first token relative to turn 2's."""
    with gatt_server() as server:
        client = server.client()

        def create(messages: Messages) -> Any:
            return client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=4, temperature=0, stream=True
            )

        create(conversation(99, 1)).close()
        numbers = range(run * size.conversations, (run + 1) * size.conversations)
        times = [time_first_tokens(create, size.turns, number) for number in numbers]
    median = FirstTokens(*(float(statistics.median(column)) for column in zip(*times, strict=True)))
    print_first_tokens("gatt serve", median)
    measure_in_process(size, run)
    return median.last_turn / median.turn_2


def print_first_tokens(name: str, times: FirstTokens) -> None:
    """Print the times of turn 2 and the last turn, and their ratio."""
    early, late = times
    print(
        f"  {name}: {early * 1000:.0f} and {late * 1000:.0f} ms: {late / early:.2f} times",
        flush=True,
    )


def measure_in_process(size: Size, run: int) -> None:
    """Print the times of `create_chat_completion`, with its cache and with an empty one."""
    import llama_cpp

    llama = llama_cpp.Llama(str(BASE), n_ctx=CONTEXT, verbose=False)

    def create(messages: Messages) -> Any:
        return llama.create_chat_completion(messages, max_tokens=4, temperature=0, stream=True)

    def create_with_empty_cache(messages: Messages) -> Any:
        llama.reset()
        return create(messages)

    for name, function in (("same process", create), ("new process", create_with_empty_cache)):
        print_first_tokens(f"loop, {name}", time_first_tokens(function, size.turns, run))


def measure_throughput(server: Server, size: Size, run: int) -> float:
    """Return the generated tokens per second of all clients together, in two turns each."""

    def chat(number: int) -> int:
        client, tokens = server.client(), 0
        for turn in (1, 2):
            response: Any = client.chat.completions.create(
                model=MODEL,
                messages=conversation(run * CLIENTS + number, turn),
                max_tokens=size.max_tokens,
                temperature=0.7,
                seed=number,
            )
            choice, usage = response.choices[0], response.usage
            assert usage and choice.message.content is not None
            # Ours counts the end-of-turn token, which takes as long as any other; theirs does not.
            has_uncounted_end = choice.finish_reason == "stop" and not usage.prompt_tokens_details
            tokens += usage.completion_tokens + has_uncounted_end
        return tokens

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        tokens = sum(pool.map(chat, range(CLIENTS)))
    seconds = time.perf_counter() - start
    print(f"    {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", flush=True)
    return tokens / seconds


class Soak:
    """Random load for some minutes, and what went wrong."""

    def __init__(self, server: Server, minutes: float) -> None:
        self._server, self._end = server, time.monotonic() + 60 * minutes
        self.requests = self.failures = self.disconnects = 0
        self.foreign_words = self.own_words = 0
        self._words = [
            f"{first}{second}"
            for first in ("bal", "cor", "dun", "fim")
            for second in ("tavo", "rique", "nolda", "susk")
        ]

    def run_client(self, number: int) -> None:
        """Hold one conversation after another, each about the client's secret word."""
        rng, word, client = random.Random(number), self._words[number], self._server.client()
        while time.monotonic() < self._end:
            messages: Messages = [
                {"role": "user", "content": f"The secret word is {word}. Say the secret word."}
            ]
            for _ in range(rng.randint(1, 6)):
                text = self._answer(client, messages, rng)
                foreign = [candidate for candidate in self._words if candidate != word]
                self.foreign_words += any(candidate in text.lower() for candidate in foreign)
                self.own_words += word in text.lower()
                messages += [
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": "Say the secret word again."},
                ]

    def _answer(self, client: openai.OpenAI, messages: Messages, rng: random.Random) -> str:
        """Return the answer, or its beginning: now and then the client disconnects."""
        self.requests += 1
        disconnects, text = rng.random() < 0.3, ""
        try:
            stream = client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=rng.randint(4, 48),
                seed=rng.randint(0, 99),
                stream=True,
            )
            for chunk in stream:
                text += text_of(chunk)
                if disconnects and len(text) > 8:
                    self.disconnects += 1
                    stream.close()
                    break
        except openai.APIError as error:
            self.failures += 1
            print(f"  failed: {error}", flush=True)
        return text

    def sample_memory(self) -> list[float]:
        """Return the server's memory in MB, every two seconds."""
        process, megabytes = psutil.Process(self._server.process.pid), list[float]()
        while time.monotonic() < self._end:
            megabytes.append(process.memory_info().rss / 1e6)
            time.sleep(2)
        return megabytes


def figure(value: float, bar: float, *, holds: bool) -> dict[str, float | bool]:
    """Return a figure as the last line has it."""
    return {"value": value, "bar": bar, "holds": holds}


def at_most(value: float, bar: float) -> dict[str, float | bool]:
    """Return a figure that must not exceed its bar."""
    return figure(value, bar, holds=value <= bar)


def soak(minutes: float) -> dict[str, dict[str, float | bool]]:
    """Return the figures of a soak."""
    with gatt_server() as server:
        load = Soak(server, minutes)
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            memory = pool.submit(load.sample_memory)
            for future in [pool.submit(load.run_client, number) for number in range(CLIENTS)]:
                future.result()
        time.sleep(3)
        metrics = httpx.get(f"{server.url}/metrics").text
        match = re.search(r"gatt_sequences_in_use\{.*\} (\S+)", metrics)
        assert match
    settled = memory.result()[len(memory.result()) // 4 :]
    growth = max(settled[-5:]) / settled[0]
    print(
        f"  {load.requests} requests, {load.disconnects} clients disconnected, {load.own_words} "
        "answers with their own word",
        flush=True,
    )
    print(f"  memory {settled[0]:.0f} to {settled[-1]:.0f} MB", flush=True)
    return {
        "soak_foreign_words": at_most(load.foreign_words, 0),
        "soak_failed_requests": at_most(load.failures, 0),
        "soak_sequences_left": at_most(float(match[1]), 0),
        "soak_memory_growth": at_most(round(growth, 3), MAX_MEMORY_GROWTH),
    }


def compare(size: Size) -> dict[str, dict[str, float | bool]]:
    """Return the figures of interleaved runs of both servers."""
    growths: list[float] = []
    speedups: list[float] = []
    for run in range(size.rounds):
        print(f"run {run + 1} of {size.rounds}", flush=True)
        growths.append(measure_growth(size, run))
        speeds: list[float] = []
        for name, start in (("gatt serve", gatt_server), ("llama-cpp-python", llama_cpp_server)):
            print(f"  {CLIENTS} clients, {name}", flush=True)
            with start() as server:
                speeds.append(measure_throughput(server, size, run))
        speedups.append(speeds[0] / speeds[1])
    growth, speedup = statistics.median(growths), statistics.median(speedups)
    return {
        "first_token_turn_20_against_turn_2": at_most(round(growth, 3), MAX_GROWTH),
        "clients_against_llama_cpp_server": figure(
            round(speedup, 3), MIN_SPEEDUP, holds=speedup >= MIN_SPEEDUP
        ),
    }


def main() -> None:
    """Print what is measured; the last line is the figures with their bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one run, shorter answers")
    parser.add_argument(
        "--soak", type=float, default=0, metavar="MINUTES", help="random load instead"
    )
    options = parser.parse_args()
    if options.soak:
        figures = soak(options.soak)
    else:
        figures = compare(Size(1, 20, 1, 32) if options.quick else Size(3, 20, 3, 64))
    print(json.dumps({"bench": "serve", "figures": figures}))


if __name__ == "__main__":
    main()
