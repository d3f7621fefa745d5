"""Synthesis against its peers, interleaved in one run: `.venv/bin/python scripts/bench/synthesis.py [--quick]`.

answers: accepted answers a second of the demo's recipe, and of the same with sampled answers only (the paper's way), against
a loop over llama-cpp-python's `create_chat_completion` on the embedded file as shipped, which drives the very same dialogues:
prompts, checks, gate and budget of candidates.
tokens: generated tokens a second, against llama_decode alone in the same format: as many prompt and answer tokens, in
lockstep, in batches of 24, all cores as its threads, with no sampling, text or gate. Beside it, Python's share of the time.
memory: resident memory after 1,000 dialogues, against that after 100.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import psutil

from pipeline.console import Progress
from pipeline.data.dialogues import load_dialogues
from pipeline.files import JsonlLog
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Completion, Request, Task
from pipeline.run_dir import RunDir
from pipeline.stages import instructions
from pipeline.stages.synthesize import Synthesis

CONTEXT, TURNS, SEQUENCES = 1280, 5, 24
MODEL = find_model("smollm2-135m")


class Measured(NamedTuple):
    """What one pass gave; `prompt` is the mean length of a prompt in tokens."""

    accepted: int
    answers: int
    tokens: int
    prompt: float
    seconds: float


class Loop:
    """The peer: one `create_chat_completion` after another, with llama-cpp-python's own reuse of the prefix."""

    def __init__(self) -> None:
        self._llama = llama_cpp.Llama(
            str(MODEL.path), n_ctx=CONTEXT, n_threads=os.cpu_count(), verbose=False
        )

    def run(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            completion: Completion | None = None
            while True:
                try:
                    request = task.send(completion) if completion else next(task)
                except StopIteration:
                    break
                completion = self._complete(request)

    def _complete(self, request: Request) -> Completion:
        answer: Any = self._llama.create_chat_completion(
            list(request.messages),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=40,
            top_p=1.0,
            min_p=0.05,
            repeat_penalty=1.0,
            seed=request.seed,
        )
        choice, usage = answer["choices"][0], answer["usage"]
        text, finish = choice["message"]["content"], choice["finish_reason"]
        if request.stop_when and any(request.stop_when(text[:end]) for end in range(len(text))):
            finish = "enough"
        return Completion(text, usage["completion_tokens"], usage["prompt_tokens"], finish)


class Counted:
    """Counts what a teacher says on its way to the dialogues."""

    def __init__(self) -> None:
        self.answers: list[Completion] = []

    def watch(self, task: Task) -> Task:
        try:
            request = next(task)
            while True:
                self.answers.append((yield request))
                request = task.send(self.answers[-1])
        except StopIteration:
            return


def synthesize(teacher: Any, recipe: Recipe, pairs: list[AssignedDialogue]) -> Measured:
    """The stage's own work, without its files."""
    counted = Counted()

    class Watched:
        def run(self, tasks: Iterable[Task]) -> None:
            teacher.run(map(counted.watch, tasks))

    with tempfile.TemporaryDirectory() as folder, JsonlLog(Path(folder) / "answers.jsonl") as log:
        synthesis = Synthesis(
            recipe, log, Progress("bench", sum(len(p.dialogue.turns) for p in pairs))
        )
        start = time.perf_counter()
        synthesis.answer(Watched(), pairs)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
    said = counted.answers
    accepted = sum(len(synthesis.accepted(pair)) for pair in pairs)
    return Measured(
        accepted,
        len(said),
        sum(c.tokens for c in said),
        statistics.mean(c.prompt_tokens for c in said),
        seconds,
    )


def paired(edited_ratio: float, dialogues: int) -> tuple[Recipe, list[AssignedDialogue]]:
    """The demo's recipe on so many dialogues of five turns."""
    changes = (
        f"dialogues.train={dialogues}",
        f"dialogues.turns={TURNS}",
        f"synthesize.edited_ratio={edited_ratio}",
    )
    recipe = load_recipe(None, changes)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        instructions.run(recipe, run_dir)
        return recipe, read_split(run_dir.pairs, "train")


def bare(path: Path, sequences: int, ours: Measured) -> float:
    """The bound in tokens a second: llama_decode alone, `sequences` dialogues in lockstep, as many tokens as ours."""
    each = max(1, ours.tokens // ours.answers)
    # In the middle turn, (TURNS - 1) / 2 answers and (TURNS + 1) / 2 messages of users stand in the prompt.
    user = round((ours.prompt - (TURNS - 1) / 2 * each) / ((TURNS + 1) / 2))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = sequences * CONTEXT, sequences, False
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    weights = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    context = llama_cpp.llama_init_from_model(weights, params)
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    position = 0

    def feed(count: int, logits: bool) -> None:
        nonlocal position
        each_time = max(1, 512 // sequences)
        for start in range(0, count, each_time):
            rows = [
                (s, position + n)
                for s in range(sequences)
                for n in range(start, min(count, start + each_time))
            ]
            batch.n_tokens = len(rows)
            for n, (sequence, at) in enumerate(rows):
                batch.token[n], batch.pos[n], batch.logits[n] = 1000 + (at * 7) % 4000, at, logits
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
        position += count

    start = time.perf_counter()
    for _ in range(TURNS):
        feed(user, False)
        for _ in range(each):
            feed(1, True)
    seconds = time.perf_counter() - start
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(weights)
    return sequences * TURNS * each / seconds


class Timed:
    """llama_cpp with the time that its calls take, and the time from each thread's first call to its last."""

    def __init__(self) -> None:
        self._calls: dict[int, float] = {}
        self._spans: dict[int, tuple[float, float]] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(llama_cpp, name)
        if name not in (
            "llama_decode",
            "llama_sampler_sample",
            "llama_tokenize",
            "llama_sampler_accept",
        ):
            return found

        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = found(*arguments)
            end = time.perf_counter()
            thread = threading.get_ident()
            self._calls[thread] = self._calls.get(thread, 0.0) + end - start
            self._spans[thread] = (self._spans.get(thread, (start, end))[0], end)
            return result

        return call

    @property
    def share(self) -> float:
        """The share of the threads' time that was spent in the calls."""
        return sum(self._calls.values()) / sum(end - start for start, end in self._spans.values())


def python_share(path: Path, recipe: Recipe, pairs: list[AssignedDialogue]) -> float:
    """The share of the engine's time that is spent outside llama.cpp's decoding, sampling and tokenizing."""
    timed = Timed()
    with BatchEngine(path, len(pairs), CONTEXT) as llama:
        parts = [llama._weights, *llama._workers]
        vars(parts[0])["api"] = timed
        for worker in parts[1:]:
            vars(worker)["_api"] = timed
        synthesize(llama, recipe, pairs)
    return 1 - timed.share


def growth(path: Path, dialogues: int) -> float:
    """Resident memory after `dialogues` short dialogues, against that after a tenth of them."""
    turns = [turn for d in load_dialogues("seed") for turn in d.turns][:dialogues]

    def talk(seed: int) -> Task:
        yield Request(({"role": "user", "content": turns[seed]},), seed, 12)

    memory = psutil.Process().memory_info
    with BatchEngine(path, dialogues, 512) as llama:
        llama.run(map(talk, range(dialogues // 10)))
        early = memory().rss
        llama.run(map(talk, range(dialogues // 10, dialogues)))
        return memory().rss / early


def main() -> None:
    """Interleaved runs; the ratio of each pair, and their medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one pair of runs over 24 dialogues")
    quick = parser.parse_args().quick
    rounds, dialogues = (1, 24) if quick else (3, 40)
    ratios: dict[str, list[float]] = {"answers_demo": [], "answers_sampled": [], "tokens": []}
    path = cached_gguf(MODEL, Recipe().synthesize.format)
    ways = {"answers_demo": paired(0.9, dialogues), "answers_sampled": paired(0.0, dialogues)}
    for _ in range(rounds):
        for name, (recipe, pairs) in ways.items():
            with BatchEngine(path, dialogues, CONTEXT) as llama:
                ours = synthesize(llama, recipe, pairs)
            theirs = synthesize(Loop(), recipe, pairs)
            rates = [m.accepted / m.seconds for m in (ours, theirs)]
            ratios[name].append(rates[0] / rates[1])
            print(
                f"{name}: ours {rates[0]:.2f} accepted/s ({ours.accepted} of {ours.answers}), loop {rates[1]:.2f} "
                f"({theirs.accepted} of {theirs.answers}), ratio {ratios[name][-1]:.2f}",
                flush=True,
            )
            if name == "answers_demo":
                bound = bare(path, SEQUENCES, ours)
                ratios["tokens"].append(ours.tokens / ours.seconds / bound)
                print(
                    f"tokens/s: ours {ours.tokens / ours.seconds:.0f}, llama_decode {bound:.0f}",
                    flush=True,
                )
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    share = python_share(path, *ways["answers_demo"])
    memory = growth(path, 100 if quick else 1000)
    figures = {
        "answers_demo_against_loop": {
            "value": medians["answers_demo"],
            "bar": 6,
            "holds": medians["answers_demo"] >= 6,
        },
        "answers_sampled_against_loop": {
            "value": medians["answers_sampled"],
            "bar": 6,
            "holds": medians["answers_sampled"] >= 6,
        },
        "tokens_against_llama_decode": {
            "value": medians["tokens"],
            "bar": 0.9,
            "holds": medians["tokens"] >= 0.9,
        },
        "python_share": {"value": share, "bar": 0.1, "holds": share <= 0.1},
        "memory_growth_over_dialogues": {"value": memory, "bar": 1.02, "holds": memory <= 1.02},
    }
    for figure in figures.values():
        figure["value"] = round(figure["value"], 3)
    print(json.dumps({"bench": "synthesis", "figures": figures}))


if __name__ == "__main__":
    main()
