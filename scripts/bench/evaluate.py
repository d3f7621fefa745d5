"""Evaluation against a plain loop, interleaved in one run: `.venv/bin/python scripts/bench/evaluate.py [--quick]`.

dialogues: time per generated token of the recipe's 24 dialogues of 20 turns, base and then base with an adapter over one copy
of the weights, against a loop over llama-cpp-python's `create_chat_completion` that goes round the dialogues and feeds the
whole conversation again in each turn. The loop runs two of the dialogues in each arm, to their end. Both say their own
answers, whose lengths differ: hence the time per token. Its kindest form, which stays with a dialogue and keeps the cache from
turn to turn, is shown beside it without a bar.
turn_20: the same time in turn 20 against turn 2, base. A first request, untimed, fills each dialogue's cache with a history of
19 turns or of one (the answers of the run above), and all wait until the last is filled. Then each answers one question after
another in that turn, until it has generated a number of tokens, the same for all, so that all stop in one step. What is new in
the prompts is in the time; the past is not evaluated again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from safetensors.numpy import save_file

from pipeline.console import Progress
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import Model, find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.model import Adapter, CacheType, LoadedModel
from pipeline.recipe import Recipe
from pipeline.records import Completion, Request, Task
from pipeline.run_dir import RunDir
from pipeline.stages import instructions

RECIPE = Recipe()
TURNS, CONTEXT = (
    RECIPE.evaluate.turns,
    RECIPE.evaluate.turns * (RECIPE.evaluate.max_tokens + 60) + 200,
)
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The matrices that an adapter changes, by their names in a GGUF and in a checkpoint."""

Texts = dict[str, list[str]]
"""The answers of each dialogue."""


class Size(NamedTuple):
    """How much is run: the loop takes `subset` of the dialogues; each generates `tokens` in a turn that is looked at closely."""

    rounds: int
    turns: int
    subset: int
    tokens: int


class Cost(NamedTuple):
    """What a number of answers took."""

    seconds: float
    answers: int
    tokens: int
    prompt: int

    @property
    def token(self) -> float:
        """Milliseconds per generated token."""
        return 1000 * self.seconds / self.tokens

    def __str__(self) -> str:
        return (
            f"{self.token:7.2f} ms a token, {1000 / self.token:4.0f} tokens/s ({self.seconds:6.1f} s, {self.answers} answers "
            f"of {self.tokens / self.answers:.0f} tokens to prompts of {self.prompt / self.answers:.0f})"
        )


def total(costs: Iterable[Cost]) -> Cost:
    """Of base and tuned together."""
    return Cost(*map(sum, zip(*costs, strict=True)))


class Measured:
    """Counts the answers of the dialogues that it watches, and keeps their texts."""

    def __init__(self, label: str, expected: int) -> None:
        self.texts: Texts = {}
        self._said: list[Completion] = []
        self._bar = Progress(label, expected)

    def add(self, dialogue: str, completion: Completion, steps: int = 1) -> None:
        """One more answer, which is so much of what is expected."""
        self._said.append(completion)
        self.texts.setdefault(dialogue, []).append(completion.text.strip())
        self._bar.advance(steps)

    def cost(self, seconds: float) -> Cost:
        """Of all answers so far.

        Raises:
            RuntimeError: an answer did not fit in the window, so that there was nothing to measure.
        """
        said = self._said
        if any(c.finish == "context" for c in said):
            raise RuntimeError("A dialogue has outgrown its window.")
        return Cost(
            seconds, len(said), sum(c.tokens for c in said), sum(c.prompt_tokens for c in said)
        )


def request(
    pair: AssignedDialogue, said: Sequence[str], max_tokens: int = RECIPE.evaluate.max_tokens
) -> Request:
    """The next turn, as the stage asks for it."""
    seed = zlib.crc32(f"{pair.dialogue.id} {len(said) + 1}".encode())
    return Request(
        pair.student_prompt(said, RECIPE.dialogues.system),
        seed,
        max_tokens,
        RECIPE.evaluate.temperature,
    )


def talk(pair: AssignedDialogue, turns: int, measured: Measured) -> Task:
    """A dialogue of so many turns, in the model's own answers."""
    said: list[str] = []
    for _ in range(turns):
        done = yield request(pair, said)
        measured.add(pair.dialogue.id, done)
        said.append(done.text.strip())


class Engine(NamedTuple):
    """Ours: one copy of the weights, and the type of the caches over it."""

    weights: LoadedModel
    cache: CacheType

    def run(
        self, pairs: list[AssignedDialogue], turns: int, adapter: Adapter | None, label: str
    ) -> tuple[Cost, Texts]:
        """One arm, its contexts made anew."""
        measured = Measured(label, turns * len(pairs))
        start = time.perf_counter()
        with BatchEngine(
            self.weights, len(pairs), CONTEXT, cache=self.cache, adapter=adapter
        ) as llama:
            llama.run(talk(pair, turns, measured) for pair in pairs)
        return measured.cost(time.perf_counter() - start), measured.texts

    def turn(self, pairs: list[AssignedDialogue], said: Texts, number: int, tokens: int) -> Cost:
        """What turn `number` costs, all dialogues side by side, each asked what the users of another one ask."""
        measured, start = Measured(f"turn {number}: tokens", tokens * len(pairs)), Start(len(pairs))
        with BatchEngine(
            self.weights, len(pairs), CONTEXT, most=len(pairs), cache=self.cache
        ) as llama:
            llama.run(
                late(
                    pair,
                    said[pair.dialogue.id][: number - 1],
                    other.dialogue.turns[1:],
                    tokens,
                    start,
                    measured,
                )
                for pair, other in zip(pairs, (*pairs[1:], pairs[0]), strict=True)
            )
            return measured.cost(time.perf_counter() - start.seconds)


class Loop:
    """The peer: one `create_chat_completion` after another in one `llama_cpp.Llama`, with a sampler as near to ours as it has."""

    def __init__(self, path: Path, adapter: Adapter | None) -> None:
        lora = str(adapter.path) if adapter else None
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=CONTEXT, n_threads=os.cpu_count(), lora_path=lora, verbose=False
        )

    def run(self, pairs: list[AssignedDialogue], turns: int, again: bool, label: str) -> Cost:
        """`again`: turn by turn over all dialogues, with nothing kept; or else one dialogue after the other."""
        measured = Measured(label, turns * len(pairs))
        order = (
            [pair for _ in range(turns) for pair in pairs]
            if again
            else [pair for pair in pairs for _ in range(turns)]
        )
        start = time.perf_counter()
        for pair in order:
            if again:
                self._llama.reset()
            said = measured.texts.get(pair.dialogue.id, [])
            measured.add(pair.dialogue.id, self._complete(request(pair, said)))
        return measured.cost(time.perf_counter() - start)

    def _complete(self, wanted: Request) -> Completion:
        answer: Any = self._llama.create_chat_completion(
            list(wanted.messages),
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            top_k=40,
            top_p=1.0,
            min_p=0.05,
            repeat_penalty=1.0,
            seed=wanted.seed,
        )
        choice, usage = answer["choices"][0], answer["usage"]
        finish = choice["finish_reason"]
        # Ours counts the token that ends an answer, which takes as long as any other; llama-cpp-python does not.
        tokens = usage["completion_tokens"] + (finish == "stop")
        return Completion(choice["message"]["content"], tokens, usage["prompt_tokens"], finish)


class Start:
    """Where dialogues meet: the clock runs from when the last of them is there."""

    def __init__(self, dialogues: int) -> None:
        self.missing = dialogues
        self.seconds = 0.0

    def arrive(self) -> None:
        """One more is there."""
        self.missing -= 1
        self.seconds = time.perf_counter()


def late(
    pair: AssignedDialogue,
    said: list[str],
    questions: Sequence[str],
    tokens: int,
    start: Start,
    measured: Measured,
) -> Task:
    """Fill the cache with a history, wait for the others, and answer one question after another in the turn that follows."""
    filling, *asked = (pair.with_question(len(said) + 1, question) for question in questions)
    yield request(filling, said, 1)
    start.arrive()
    while start.missing:  # nobody may block here: the others run in the same threads
        yield request(filling, said, 1)
    for one in cycle(asked):
        done = yield request(one, said, min(tokens, RECIPE.evaluate.max_tokens))
        measured.add(pair.dialogue.id, done, done.tokens)
        tokens -= done.tokens
        if not tokens:
            return


def prepare() -> list[AssignedDialogue]:
    """The recipe's own dialogues, with the instruction in turn 1."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        instructions.run(RECIPE, run_dir)
        return read_split(run_dir.pairs, "evaluate")


def small_adapter(model: Model, folder: Path) -> Adapter:
    """A random adapter of the recipe's rank on all projections; small, so that the texts stay texts."""
    base, random, rank = open_base(model.path), np.random.default_rng(1), RECIPE.train.rank
    factors = {}
    for tensor in base.tensors():
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in MODULES:
            module = f"base_model.model.model.layers.{parts[1]}.{MODULES[parts[2]]}"
            for side, shape in (("A", (rank, tensor.shape[1])), ("B", (tensor.shape[0], rank))):
                drawn = random.normal(0, 0.02 if side == "A" else 0.005, shape)
                factors[f"{module}.lora_{side}.weight"] = drawn.astype(np.float32)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank}))
    write_adapter(base, folder, folder / "adapter.gguf")
    return Adapter(folder / "adapter.gguf")


class Arm(NamedTuple):
    """What is laid over the base, and the loop with the same over it."""

    adapter: Adapter | None
    loop: Loop


def compare(
    engine: Engine, arms: dict[str, Arm], pairs: list[AssignedDialogue], size: Size
) -> tuple[float, Texts]:
    """The loop's time per token against ours, over both arms, and what the base said to us."""
    costs: dict[str, list[Cost]] = {"ours": [], "loop": [], "kindest": []}
    texts: list[Texts] = []
    for name, (adapter, loop) in arms.items():
        cost, said = engine.run(pairs, size.turns, adapter, f"ours, {name}")
        costs["ours"].append(cost)
        texts.append(said)
        for way in ("loop", "kindest"):
            costs[way].append(
                loop.run(pairs[: size.subset], size.turns, way == "loop", f"{way}, {name}")
            )
        for way, found in costs.items():
            print(f"  {name:6}{way:8}{found[-1]}", flush=True)
    whole = {way: total(found) for way, found in costs.items()}
    minutes = {
        way: cost.seconds / 60 * (1 if way == "ours" else len(pairs) / size.subset)
        for way, cost in whole.items()
    }
    print(
        f"  all {len(pairs)} dialogues, both arms: ours {minutes['ours']:.1f} min, the loop would take {minutes['loop']:.1f} "
        f"({minutes['loop'] / minutes['ours']:.1f} times), the kindest {minutes['kindest']:.1f} "
        f"({minutes['kindest'] / minutes['ours']:.1f} times)"
    )
    ratio = {way: cost.token / whole["ours"].token for way, cost in whole.items()}
    print(
        f"  per token: loop {ratio['loop']:.2f} times ours, kindest {ratio['kindest']:.2f} times",
        flush=True,
    )
    return ratio["loop"], texts[0]


def flat(engine: Engine, pairs: list[AssignedDialogue], said: Texts, size: Size) -> float:
    """The last turn's time per token against that of turn 2."""
    early, last = (engine.turn(pairs, said, number, size.tokens) for number in (2, size.turns))
    ratio = last.token / early.token
    print(
        f"  {'turn 2':14}{early}\n  {f'turn {size.turns}':14}{last}\n  per token: {ratio:.2f} times",
        flush=True,
    )
    return ratio


def main() -> None:
    """Interleaved runs; the last line is the figures with their bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one run of 8 turns; the loop runs one dialogue in each arm",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of about ten minutes each")
    parser.add_argument(
        "--cache",
        default="F16",
        choices=("F16", "F32", "Q8_0"),
        help="the type of our keys and values",
    )
    options = parser.parse_args()
    size = Size(1, 8, 1, 96) if options.quick else Size(options.rounds, TURNS, 2, 192)
    model = find_model(RECIPE.model)
    path, pairs = cached_gguf(model, RECIPE.export.formats[0]), prepare()
    against_loop, over_turns = [], []
    with tempfile.TemporaryDirectory() as folder:
        engine, adapter = (
            Engine(LoadedModel(open_gguf(path)), options.cache),
            small_adapter(model, Path(folder)),
        )
        arms = {
            name: Arm(over, Loop(path, over)) for name, over in (("base", None), ("tuned", adapter))
        }
        print(
            f"{len(pairs)} dialogues of {size.turns} turns in each arm, of which the loop runs {size.subset}; {path.stem}, "
            f"cache {engine.cache}",
            flush=True,
        )
        for number in range(size.rounds):
            print(f"run {number + 1} of {size.rounds}", flush=True)
            ratio, said = compare(engine, arms, pairs, size)
            against_loop.append(ratio)
            over_turns.append(flat(engine, pairs, said, size))
        engine.weights.close()
    speed, growth = statistics.median(against_loop), statistics.median(over_turns)
    figures = {
        "dialogues_against_loop": {"value": round(speed, 3), "bar": 8, "holds": speed >= 8},
        "last_turn_against_turn_2": {"value": round(growth, 3), "bar": 1.5, "holds": growth <= 1.5},
    }
    print(json.dumps({"bench": "evaluate", "figures": figures}))


if __name__ == "__main__":
    main()
