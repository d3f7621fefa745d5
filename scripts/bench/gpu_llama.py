"""The llama.cpp part of the GPU bench: `BatchEngine` against `llama_decode` alone.

    python gpu_llama.py --out ROWS [--gguf FILE] [--sequences 1,16,64] [--quick]

Both use the same weights and the same kind of context, one after the other. "prefill": a prompt of
512 tokens in every sequence. "decode": 128 tokens in every sequence after a short prompt, sampled
by the engine with the recipe's settings; alone, they are fixed. Ends of answers are banned, so that
every sequence has as many.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from gpu_rows import append_row

from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.gpu import gpu_devices
from pipeline.inference.llama.model import ContextSettings, LoadedModel
from pipeline.inference.llama.placement import GPU_BATCH_TOKENS
from pipeline.records import Completion, Request, SamplerSettings, Task
from pipeline.system import core_count

PART = "llama"
_CPU_BATCH_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Load:
    """Tokens of the long prompt and of the answer, of every sequence, and how often it runs."""

    prompt_tokens: int
    answer_tokens: int
    rounds: int


FULL, QUICK = Load(512, 128, 3), Load(48, 8, 1)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second."""

    prefill: float
    decode: float


class DecodeAlone:
    """llama_decode on `sequences` in lockstep, in a context as the engine's."""

    def __init__(self, model: LoadedModel, sequences: int, n_ctx: int) -> None:
        batch_tokens = GPU_BATCH_TOKENS if model.gpu_layers else 0
        self._api, self._sequences = model.api, sequences
        self._size = max(sequences, batch_tokens or _CPU_BATCH_TOKENS)
        self._context = model.new_context(
            ContextSettings(n_ctx, batch_tokens=batch_tokens),
            sequences=sequences,
            batch_size=self._size,
            threads=core_count(),
        )
        self._batch = self._api.llama_batch_init(self._size, 0, 1)
        self._position = 0

    def close(self) -> None:
        """Free the context."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)

    def prefill(self, tokens: int) -> None:
        """Decode `tokens` in every sequence; only the last of each has logits."""
        end = self._position + tokens
        rows = [
            (sequence, position, position == end - 1)
            for sequence in range(self._sequences)
            for position in range(self._position, end)
        ]
        for start in range(0, len(rows), self._size):
            self._decode(rows[start : start + self._size])
        self._position = end

    def step(self) -> None:
        """Decode one token in every sequence, and wait for its logits."""
        self._decode([(sequence, self._position, True) for sequence in range(self._sequences)])
        self._position += 1

    def _decode(self, rows: list[tuple[int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (sequence, position, logits) in enumerate(rows):
            batch.token[row] = 1000 + (position * 7 + sequence) % 4000
            batch.pos[row], batch.logits[row] = position, logits
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._api.llama_synchronize(self._context)


class Prompts:
    """Chats of about a number of tokens; no two of them begin alike."""

    def __init__(self, model: LoadedModel) -> None:
        self._rng, self._model = random.Random(1), model

    def request(self, tokens: int, max_tokens: int) -> Request:
        """Return a request whose prompt has `tokens`, but for those of the template."""
        words: list[str] = []
        while len(self._model.tokenize(" ".join(words))) < tokens:
            words += self._rng.choices(("river", "green", "seven", "cloud", "stone", "paper"), k=8)
        words.insert(0, str(self._rng.randrange(10**6)))
        return Request(
            messages=({"role": "user", "content": " ".join(words)},),
            seed=self._rng.randrange(10**6),
            max_tokens=max_tokens,
            sampler=SamplerSettings(ignore_eos=True),
        )


def run_engine(engine: BatchEngine, requests: list[Request]) -> tuple[float, list[Completion]]:
    """Return the seconds that the requests take together, and their completions."""
    completions: list[Completion] = []

    def task(request: Request) -> Task:
        completions.append((yield request))

    return timed(lambda: engine.run(map(task, requests))), completions


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_engine(engine: BatchEngine, prompts: Prompts, sequences: int, load: Load) -> Rates:
    """Return the engine's tokens a second.

    The time of a single token with the same prompts, a batch of other texts, is taken off what all
    tokens of the answers take.
    """
    long = [prompts.request(load.prompt_tokens, 1) for _ in range(sequences)]
    prefill_seconds, completions = run_engine(engine, long)
    prompt_tokens = sum(completion.prompt_tokens for completion in completions)
    short = [
        [prompts.request(16, max_tokens) for _ in range(sequences)]
        for max_tokens in (1, 1 + load.answer_tokens)
    ]
    first_seconds, _ = run_engine(engine, short[0])
    all_seconds, completions = run_engine(engine, short[1])
    tokens = sum(completion.tokens for completion in completions) - sequences
    return Rates(prompt_tokens / prefill_seconds, tokens / (all_seconds - first_seconds))


def measure_alone(model: LoadedModel, sequences: int, n_ctx: int, load: Load) -> Rates:
    """Return the tokens a second of llama_decode alone."""
    with closing(DecodeAlone(model, sequences, n_ctx)) as alone:
        seconds = timed(lambda: alone.prefill(load.prompt_tokens))
        prefill = sequences * load.prompt_tokens / seconds
    with closing(DecodeAlone(model, sequences, n_ctx)) as alone:
        alone.prefill(16)

        def steps() -> None:
            for _ in range(load.answer_tokens):
                alone.step()

        return Rates(prefill, sequences * load.answer_tokens / timed(steps))


def measure(file: Path, sequences: int, load: Load, out: Path) -> None:
    """Write rows of the engine and of llama_decode alone, in turn; the first round is warm-up."""
    n_ctx = -(-(2 * load.prompt_tokens + load.answer_tokens + 128) // 256) * 256
    with closing(LoadedModel(open_gguf(file))) as model:
        prompts = Prompts(model)
        for n in range(load.rounds + 1):
            with BatchEngine(model, sequences, n_ctx, sequences) as engine:
                rates = {"gatt": measure_engine(engine, prompts, sequences, load)}
            rates["llama_decode"] = measure_alone(model, sequences, n_ctx, load)
            for arm, rate in rates.items() if n else ():
                append_row(
                    out,
                    part=PART,
                    arm=arm,
                    sequences=sequences,
                    prefill=rate.prefill,
                    decode=rate.decode,
                )


def main() -> None:
    """Measure each number of sequences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="a GGUF file; default: the embedded model")
    parser.add_argument("--sequences", default="1,16,64")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if not options.quick and not gpu_devices():
        append_row(options.out, part=PART, skipped="llama.cpp has no GPU here (a CPU build?)")
        return
    file = options.gguf or cached_gguf(find_model("smollm2-135m"), "Q8_0")
    for sequences in map(int, options.sequences.split(",")):
        measure(file, sequences, QUICK if options.quick else FULL, options.out)


if __name__ == "__main__":
    main()
