"""Synthesis against its peers: `.venv/bin/python scripts/bench/synthesis.py [--quick]`.

answers: accepted answers a second of the demo's recipe, and of the same with sampled answers only
(the paper's method), against a loop over llama-cpp-python's `create_chat_completion`. The loop
uses the embedded file as shipped and runs the same dialogues: prompts, checks, and number of
candidates.
tokens: generated tokens a second, against llama_decode alone in the same format: as many prompt
and answer tokens in batches of 24 sequences, with a thread per core, without sampling or text.
python_share: time of the engine outside llama.cpp's decoding, sampling and tokenization.
memory: resident memory after 1,000 dialogues, against that after 100.

Runs are interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import psutil
from peer import create_completion

from pipeline.data.dialogues import load_dialogues
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.gatt.synthesis import Synthesis
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import LoadedModel
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Completion, Request, RunTasks, Task
from pipeline.run_dir import RunDir
from pipeline.stages import instructions

N_CTX, TURNS, SEQUENCES, N_BATCH = 1280, 5, 24, 512
MIN_SPEEDUP, MIN_DECODE_SHARE, MAX_PYTHON_SHARE, MAX_GROWTH = 6, 0.9, 0.1, 1.02
"""Bars of the figures."""
MODEL = find_model("smollm2-135m")
Figure = dict[str, float | bool]


class Workload(NamedTuple):
    """A recipe and its training dialogues."""

    recipe: Recipe
    dialogues: list[AssignedDialogue]


class Measurement(NamedTuple):
    """One synthesis; `prompt_tokens` is the mean length of a prompt."""

    accepted: int
    candidates: int
    tokens: int
    prompt_tokens: float
    seconds: float

    @property
    def accepted_per_second(self) -> float:
        """Return the accepted answers a second."""
        return self.accepted / self.seconds

    def __str__(self) -> str:
        rate = f"{self.accepted_per_second:.2f} accepted/s"
        return f"{rate} ({self.accepted} of {self.candidates})"


class CompletionLoop:
    """The peer: one `create_chat_completion` after another; llama-cpp-python reuses prefixes."""

    def __init__(self) -> None:
        self._llama = llama_cpp.Llama(
            str(MODEL.path), n_ctx=N_CTX, n_threads=os.cpu_count(), verbose=False
        )

    def run(self, tasks: Iterable[Task]) -> None:
        """Run the tasks one after another."""
        for task in tasks:
            try:
                request = next(task)
                while True:
                    request = task.send(self._complete(request))
            except StopIteration:
                pass

    def _complete(self, request: Request) -> Completion:
        completion, stop_when = create_completion(self._llama, request), request.stop_when
        text = completion.text
        if stop_when and any(stop_when(text[:end]) for end in range(len(text))):
            return replace(completion, finish="stop_when")
        return completion


def synthesize(run_tasks: RunTasks, workload: Workload) -> Measurement:
    """Run the synthesis without its files."""
    completions: list[Completion] = []

    def record_completions(task: Task) -> Task:
        try:
            request = next(task)
            while True:
                completions.append((yield request))
                request = task.send(completions[-1])
        except StopIteration:
            return

    synthesis = Synthesis(workload.recipe, record=lambda answer: None)
    start = time.perf_counter()
    synthesis.run(lambda tasks: run_tasks(map(record_completions, tasks)), workload.dialogues)
    seconds = time.perf_counter() - start
    return Measurement(
        accepted=sum(len(synthesis.accepted(dialogue)) for dialogue in workload.dialogues),
        candidates=len(completions),
        tokens=sum(c.tokens for c in completions),
        prompt_tokens=statistics.mean(c.prompt_tokens for c in completions),
        seconds=seconds,
    )


def make_workload(edited_ratio: float, dialogues: int) -> Workload:
    """Return the demo's recipe with that many dialogues of `TURNS` turns."""
    overrides = (
        f"dialogues.train={dialogues}",
        f"dialogues.turns={TURNS}",
        f"synthesize.edited_ratio={edited_ratio}",
    )
    recipe = load_recipe(None, overrides)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        instructions.run(recipe, run_dir)
        return Workload(recipe, read_split(run_dir.assignments, "train"))


class DecodeLoop:
    """llama_decode alone, on `SEQUENCES` sequences in lockstep."""

    def __init__(self, path: Path) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = SEQUENCES * N_CTX, SEQUENCES, False
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self._position = 0

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def decode(self, count: int, *, logits: bool) -> None:
        """Decode `count` more tokens in each sequence."""
        per_batch = max(1, N_BATCH // SEQUENCES)
        for start in range(0, count, per_batch):
            positions = range(
                self._position + start, self._position + min(count, start + per_batch)
            )
            rows = [(sequence, p) for sequence in range(SEQUENCES) for p in positions]
            batch = self._batch
            batch.n_tokens = len(rows)
            for row, (sequence, position) in enumerate(rows):
                batch.token[row] = 1000 + (position * 7) % 4000
                batch.pos[row], batch.logits[row] = position, logits
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            if llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
        self._position += count


def decode_rate(path: Path, measurement: Measurement) -> float:
    """Return the upper bound in tokens a second: llama_decode on as many tokens."""
    answer_tokens = max(1, measurement.tokens // measurement.candidates)
    # The prompt of the middle turn has (TURNS - 1) / 2 answers and (TURNS + 1) / 2 user messages.
    earlier_tokens = (TURNS - 1) / 2 * answer_tokens
    user_tokens = round((measurement.prompt_tokens - earlier_tokens) / ((TURNS + 1) / 2))
    loop = DecodeLoop(path)
    start = time.perf_counter()
    for _ in range(TURNS):
        loop.decode(user_tokens, logits=False)
        for _ in range(answer_tokens):
            loop.decode(1, logits=True)
    seconds = time.perf_counter() - start
    loop.close()
    return SEQUENCES * TURNS * answer_tokens / seconds


class TimedApi:
    """llama_cpp with the time that its calls take, by thread."""

    _TIMED = ("llama_decode", "llama_sampler_sample", "llama_tokenize", "llama_sampler_accept")

    def __init__(self) -> None:
        self._call_seconds: dict[int, float] = {}
        self._spans: dict[int, tuple[float, float]] = {}

    def __getattr__(self, name: str) -> object:
        function = getattr(llama_cpp, name)
        return self._timed(function) if name in self._TIMED else function

    def _timed(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            start = time.perf_counter()
            result = function(*arguments)
            end = time.perf_counter()
            thread = threading.get_ident()
            self._call_seconds[thread] = self._call_seconds.get(thread, 0.0) + end - start
            self._spans[thread] = (self._spans.get(thread, (start, end))[0], end)
            return result

        return call

    @property
    def share(self) -> float:
        """Return the share of the calls in the time from each thread's first call to its last."""
        spans = sum(end - start for start, end in self._spans.values())
        return sum(self._call_seconds.values()) / spans


def python_share(path: Path, workload: Workload) -> float:
    """Return the share of the engine's time outside llama.cpp."""
    timed, model = TimedApi(), LoadedModel(open_gguf(path))
    vars(model)["api"] = timed
    with BatchEngine(model, len(workload.dialogues), N_CTX) as engine:
        synthesize(engine.run, workload)
    model.close()
    return 1 - timed.share


def memory_growth(path: Path, dialogues: int) -> float:
    """Return the memory after `dialogues` short dialogues, relative to that after a tenth."""
    turns = [turn for d in load_dialogues("seed") for turn in d.turns][:dialogues]

    def short_dialogue(n: int) -> Task:
        yield Request(messages=({"role": "user", "content": turns[n]},), seed=n, max_tokens=12)

    memory = psutil.Process().memory_info
    with BatchEngine(path, dialogues, 512) as engine:
        engine.run(map(short_dialogue, range(dialogues // 10)))
        early_bytes = memory().rss
        engine.run(map(short_dialogue, range(dialogues // 10, dialogues)))
        return memory().rss / early_bytes


def measure(rounds: int, dialogues: int, many: int) -> dict[str, Figure]:
    """Return all figures; `many` is the number of dialogues of the memory test."""
    path = cached_gguf(MODEL, Recipe().synthesize.format)
    workloads = {
        "answers_demo": make_workload(0.9, dialogues),
        "answers_sampled": make_workload(0.0, dialogues),
    }
    speedups: dict[str, list[float]] = {name: [] for name in workloads}
    decode_shares: list[float] = []
    for _ in range(rounds):
        for name, workload in workloads.items():
            with BatchEngine(path, dialogues, N_CTX) as engine:
                ours = synthesize(engine.run, workload)
            peer = synthesize(CompletionLoop().run, workload)
            speedups[name].append(ours.accepted_per_second / peer.accepted_per_second)
            print(f"{name}: ours {ours}, loop {peer}, {speedups[name][-1]:.2f} times", flush=True)
            if name == "answers_demo":
                rate, bound = ours.tokens / ours.seconds, decode_rate(path, ours)
                decode_shares.append(rate / bound)
                print(f"tokens/s: ours {rate:.0f}, llama_decode {bound:.0f}", flush=True)
    figures = {
        f"{name}_against_loop": _at_least(statistics.median(values), MIN_SPEEDUP)
        for name, values in speedups.items()
    }
    return figures | {
        "tokens_against_llama_decode": _at_least(
            statistics.median(decode_shares), MIN_DECODE_SHARE
        ),
        "python_share": _at_most(python_share(path, workloads["answers_demo"]), MAX_PYTHON_SHARE),
        "memory_growth_over_dialogues": _at_most(memory_growth(path, many), MAX_GROWTH),
    }


def _at_least(value: float, bar: float) -> Figure:
    return {"value": round(value, 3), "bar": bar, "holds": value >= bar}


def _at_most(value: float, bar: float) -> Figure:
    return {"value": round(value, 3), "bar": bar, "holds": value <= bar}


def main() -> None:
    """Print each run, and the figures as the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one pair of runs over 24 dialogues")
    quick = parser.parse_args().quick
    figures = measure(1, 24, 100) if quick else measure(3, 40, 1000)
    print(json.dumps({"bench": "synthesis", "figures": figures}))


if __name__ == "__main__":
    main()
