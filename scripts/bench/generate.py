"""Batched multi-turn generation against its peers, in one run: `.venv/bin/python scripts/bench/generate.py [--quick]`.

answers: accepted answers a second, against a loop over llama-cpp-python's `create_chat_completion` that drives the very
same dialogues (same file, prompts, gate and budget of candidates).
tokens: generated tokens a second, against llama_decode alone: the same numbers of prompt and answer tokens, in lockstep,
in large batches, with no sampling, text or gate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import llama_cpp

from pipeline.backends.hub import find_model
from pipeline.backends.llama import Llama, quantize
from pipeline.backends.teacher import Task
from pipeline.dialogues import load_dialogues
from pipeline.gatt.text import first_sentences, flaw, has_sentences
from pipeline.gguf.merge import merge
from pipeline.records import Completion, Dialogue, Message, Request

SYSTEM = "You are a friendly assistant. Answer in one or two short sentences."
SEQUENCES, CONTEXT, TURNS, CANDIDATES, MAX_TOKENS = 24, 1024, 6, 4, 80


class Measured(NamedTuple):
    """What one pass over the dialogues gave; `prompt_tokens` is the mean length of a prompt."""

    accepted: int
    tokens: int
    prompt_tokens: float
    seconds: float


def talk(dialogue: Dialogue, done: list[Completion], accepted: list[str]) -> Task:
    """One dialogue as synthesis runs it: candidates until one is a good answer of one sentence."""
    messages: list[Message] = [{"role": "system", "content": SYSTEM}]
    said: list[str] = []
    for turn, user in enumerate(dialogue.turns[:TURNS]):
        messages.append({"role": "user", "content": user})
        for candidate in range(CANDIDATES):
            seed = 10 * turn + candidate
            completion = yield Request(tuple(messages), seed, MAX_TOKENS, 0.8, partial(has_sentences, count=1))
            done.append(completion)
            answer = first_sentences(completion.text, 1)
            if not flaw(answer, said, finished=True):
                said.append(answer)
                accepted.append(answer)
                messages.append({"role": "assistant", "content": answer})
                break
        else:
            return


def batched(model: Path, dialogues: list[Dialogue]) -> Measured:
    """Ours."""
    done: list[Completion] = []
    accepted: list[str] = []
    with Llama(model, SEQUENCES, CONTEXT) as llama:
        start = time.perf_counter()
        llama.run(talk(d, done, accepted) for d in dialogues)
        seconds = time.perf_counter() - start
    return Measured(len(accepted), sum(c.tokens for c in done), statistics.mean(c.prompt_tokens for c in done), seconds)


def looped(model: Path, dialogues: list[Dialogue]) -> Measured:
    """The peer: one `create_chat_completion` after another."""
    done: list[Completion] = []
    accepted: list[str] = []
    peer = llama_cpp.Llama(str(model), n_ctx=CONTEXT, verbose=False)
    start = time.perf_counter()
    for dialogue in dialogues:
        task = talk(dialogue, done, accepted)
        request = next(task, None)
        while request:
            answer = peer.create_chat_completion(
                list(request.messages), max_tokens=request.max_tokens, temperature=request.temperature, top_k=40, top_p=1.0,
                min_p=0.05, repeat_penalty=1.0, seed=request.seed,
            )  # fmt: skip
            choice, usage = answer["choices"][0], answer["usage"]
            completion = Completion(
                choice["message"]["content"], usage["completion_tokens"], usage["prompt_tokens"], choice["finish_reason"]
            )
            try:
                request = task.send(completion)
            except StopIteration:
                request = None
    seconds = time.perf_counter() - start
    peer.close()
    return Measured(len(accepted), sum(c.tokens for c in done), 0, seconds)


def bare(model: Path, answer_tokens: int, user_tokens: int) -> Measured:
    """The bound: llama_decode alone, SEQUENCES dialogues in lockstep, each turn a prefill and then answer tokens."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = SEQUENCES * CONTEXT, SEQUENCES, False
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    weights = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    context = llama_cpp.llama_init_from_model(weights, params)
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    position = 0

    def feed(count: int, logits: bool) -> None:
        nonlocal position
        each = 512 // SEQUENCES
        for start in range(0, count, each):
            rows = [(s, position + n) for s in range(SEQUENCES) for n in range(start, min(count, start + each))]
            batch.n_tokens = len(rows)
            for n, (sequence, at) in enumerate(rows):
                batch.token[n], batch.pos[n], batch.logits[n] = 1000 + (at * 7) % 4000, at, logits
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
        position += count

    start = time.perf_counter()
    for _ in range(TURNS):
        feed(user_tokens, False)
        for _ in range(answer_tokens):
            feed(1, True)
    seconds = time.perf_counter() - start
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(weights)
    return Measured(0, SEQUENCES * TURNS * answer_tokens, 0, seconds)


@contextmanager
def model_file() -> Iterator[Path]:
    """The embedded model in Q8_0, removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        full, target = Path(folder) / "f16.gguf", Path(folder) / "q8.gguf"
        merge(find_model("smollm2-135m").path, None, full)
        quantize(full, target, "Q8_0")
        full.unlink()
        yield target


def main() -> None:
    """Interleaved runs; the ratio of each pair, and their median."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one pair of runs over fewer dialogues")
    quick = parser.parse_args().quick
    dialogues = load_dialogues("seed")[:: 5 if quick else 2]
    peer_share = dialogues[: 2 if quick else 8]
    answers, tokens = [], []
    with model_file() as model:
        for _ in range(1 if quick else 3):
            ours, theirs = batched(model, dialogues), looped(model, peer_share)
            each = ours.tokens // max(1, ours.accepted)
            # In the middle turn, (TURNS - 1) / 2 answers and (TURNS + 1) / 2 messages of users stand in the prompt.
            bound = bare(model, each, round((ours.prompt_tokens - (TURNS - 1) / 2 * each) / ((TURNS + 1) / 2)))
            rates = [m.accepted / m.seconds for m in (ours, theirs)]
            speeds = [m.tokens / m.seconds for m in (ours, bound)]
            answers.append(rates[0] / rates[1])
            tokens.append(speeds[0] / speeds[1])
            print(f"answers/s: ours {rates[0]:.2f}, loop {rates[1]:.2f}, ratio {answers[-1]:.2f}; "
                  f"tokens/s: ours {speeds[0]:.0f}, llama_decode {speeds[1]:.0f}, ratio {tokens[-1]:.2f}", flush=True)  # fmt: skip
    figures = {
        name: {"value": round(statistics.median(values), 3), "bar": bar, "holds": statistics.median(values) >= bar}
        for name, values, bar in (("answers_against_loop", answers, 6), ("tokens_against_llama_decode", tokens, 0.9))
    }
    print(json.dumps({"bench": "generate", "figures": figures}))


if __name__ == "__main__":
    main()
