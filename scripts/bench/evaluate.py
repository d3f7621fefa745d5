"""Evaluation against a plain loop: `.venv/bin/python scripts/bench/evaluate.py [--quick]`.

dialogues: time per generated token of the recipe's 24 dialogues of 20 turns, for the base model
and the base model with an adapter over one copy of the weights. The peer is a loop over
llama-cpp-python's `create_chat_completion` that goes through the dialogues turn by turn and feeds
each conversation again; it runs two dialogues of each arm. Both continue from their own answers,
whose lengths differ, hence the time per token. A second loop stays with a dialogue, so that its
cache holds from turn to turn; it has no bar.
turn_20: the time per token of the base model in turn 20, against turn 2. A first request, which is
not timed, fills each dialogue's cache with 19 turns or with one, and all wait until the last one
is filled. Then each dialogue answers one question after another in that turn until it has a fixed
number of tokens, so that all end together. The time includes the prefill of the new messages.

Runs are interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

import llama_cpp
import numpy as np
from peer import create_completion
from safetensors.numpy import save_file

from pipeline.console import Progress
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.gatt.seeds import derive_seed
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base
from pipeline.gguf.reader import open_gguf
from pipeline.hub.convert import cached_gguf
from pipeline.hub.models import Model, find_model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import context_for
from pipeline.inference.llama.model import Adapter, CacheType, LoadedModel
from pipeline.recipe import Recipe
from pipeline.records import Completion, Request, Task
from pipeline.run_dir import RunDir
from pipeline.stages import instructions

RECIPE = Recipe()
TURNS, MAX_TOKENS = RECIPE.evaluate.turns, RECIPE.evaluate.max_tokens
N_CTX = context_for(TURNS, MAX_TOKENS)
MIN_SPEEDUP, MAX_TURN_RATIO = 8, 1.5
"""Bars of the figures."""
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
LoopMode = Literal["refeed", "cached"]
"""Turn by turn over all dialogues with an empty cache, or one dialogue after the other."""


class Size(NamedTuple):
    """How much is run.

    The loop takes `loop_dialogues` of the dialogues. Each dialogue generates `late_tokens` in a
    turn that is timed alone.
    """

    rounds: int
    turns: int
    loop_dialogues: int
    late_tokens: int


class Cost(NamedTuple):
    """What a number of answers took."""

    seconds: float
    answers: int
    tokens: int
    prompt_tokens: int

    @property
    def token_ms(self) -> float:
        """Return the milliseconds per generated token."""
        return 1000 * self.seconds / self.tokens

    def __str__(self) -> str:
        return (
            f"{self.token_ms:7.2f} ms/token, {1000 / self.token_ms:4.0f} tokens/s "
            f"({self.seconds:6.1f} s, {self.answers} answers of "
            f"{self.tokens / self.answers:.0f} tokens to prompts of "
            f"{self.prompt_tokens / self.answers:.0f})"
        )


def total(costs: Sequence[Cost]) -> Cost:
    """Return the sum of costs, such as those of both arms."""
    return Cost(
        sum(cost.seconds for cost in costs),
        sum(cost.answers for cost in costs),
        sum(cost.tokens for cost in costs),
        sum(cost.prompt_tokens for cost in costs),
    )


class Recorder:
    """Counts the answers of dialogues and keeps their texts."""

    def __init__(self, label: str, expected: int) -> None:
        self.texts: Texts = {}
        self._completions: list[Completion] = []
        self._bar = Progress(label, expected)

    def add(self, dialogue: str, completion: Completion, steps: int = 1) -> None:
        """Record an answer, which is `steps` of what is expected."""
        self._completions.append(completion)
        self.texts.setdefault(dialogue, []).append(completion.text.strip())
        self._bar.advance(steps)

    def cost(self, seconds: float) -> Cost:
        """Return the cost of all answers so far.

        Raises:
            RuntimeError: an answer did not fit in the context, so there was nothing to measure.
        """
        completions = self._completions
        if any(c.finish == "context" for c in completions):
            raise RuntimeError("A dialogue does not fit in its context.")
        return Cost(
            seconds,
            len(completions),
            sum(c.tokens for c in completions),
            sum(c.prompt_tokens for c in completions),
        )


def make_request(
    dialogue: AssignedDialogue, answers: Sequence[str], max_tokens: int = MAX_TOKENS
) -> Request:
    """Return the request for the next turn, as the stage makes it."""
    return Request(
        messages=dialogue.student_prompt(answers, RECIPE.dialogues.system),
        seed=derive_seed(dialogue.dialogue.id, len(answers) + 1),
        max_tokens=max_tokens,
        temperature=RECIPE.evaluate.temperature,
    )


def answer_turns(dialogue: AssignedDialogue, turns: int, recorder: Recorder) -> Task:
    """Answer the first `turns` turns."""
    answers: list[str] = []
    for _ in range(turns):
        completion = yield make_request(dialogue, answers)
        recorder.add(dialogue.dialogue.id, completion)
        answers.append(completion.text.strip())


class StartLine:
    """Where dialogues wait for each other: the clock starts when the last one has arrived."""

    def __init__(self, dialogues: int) -> None:
        self.missing = dialogues
        self.started = 0.0

    def arrive(self) -> None:
        """Count one more dialogue."""
        self.missing -= 1
        self.started = time.perf_counter()


class LateTurn(NamedTuple):
    """The turn after `answers`, which is timed for `tokens` generated tokens."""

    dialogue: AssignedDialogue
    answers: list[str]
    tokens: int
    questions: Sequence[str]

    def run(self, start_line: StartLine, recorder: Recorder) -> Task:
        """Fill the cache, wait for the others, and answer one question after another."""
        turn = len(self.answers) + 1
        first, *further = (self.dialogue.with_question(turn, text) for text in self.questions)
        yield make_request(first, self.answers, 1)
        start_line.arrive()
        while start_line.missing:  # a task must not block: the others run in the same threads
            yield make_request(first, self.answers, 1)
        missing = self.tokens
        for branch in cycle(further):
            completion = yield make_request(branch, self.answers, min(missing, MAX_TOKENS))
            recorder.add(self.dialogue.dialogue.id, completion, completion.tokens)
            missing -= completion.tokens
            if not missing:
                return


class Engine(NamedTuple):
    """Our engine: one copy of the weights, and the type of its caches."""

    model: LoadedModel
    cache_type: CacheType

    def answer(
        self,
        dialogues: list[AssignedDialogue],
        turns: int,
        adapter: Adapter | None,
        label: str,
    ) -> tuple[Cost, Texts]:
        """Run one arm, with new contexts."""
        recorder = Recorder(label, turns * len(dialogues))
        start = time.perf_counter()
        with BatchEngine(
            self.model, len(dialogues), N_CTX, cache_type=self.cache_type, adapter=adapter
        ) as engine:
            engine.run(answer_turns(dialogue, turns, recorder) for dialogue in dialogues)
        return recorder.cost(time.perf_counter() - start), recorder.texts

    def answer_late_turn(self, turns: Sequence[LateTurn]) -> Cost:
        """Run one turn of all dialogues in parallel."""
        number = len(turns[0].answers) + 1
        recorder = Recorder(f"turn {number}: tokens", sum(turn.tokens for turn in turns))
        start_line = StartLine(len(turns))
        with BatchEngine(
            self.model,
            len(turns),
            N_CTX,
            max_sequences=len(turns),
            cache_type=self.cache_type,
        ) as engine:
            engine.run(turn.run(start_line, recorder) for turn in turns)
            return recorder.cost(time.perf_counter() - start_line.started)


class CompletionLoop:
    """The peer: one `create_chat_completion` after another, with a sampler as close as it has."""

    def __init__(self, path: Path, adapter: Adapter | None) -> None:
        lora = str(adapter.path) if adapter else None
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=N_CTX, n_threads=os.cpu_count(), lora_path=lora, verbose=False
        )

    def answer(
        self, dialogues: list[AssignedDialogue], turns: int, mode: LoopMode, label: str
    ) -> Cost:
        """Run one arm."""
        recorder = Recorder(label, turns * len(dialogues))
        start = time.perf_counter()
        for dialogue in _order(dialogues, turns, mode):
            if mode == "refeed":
                self._llama.reset()
            answers = recorder.texts.get(dialogue.dialogue.id, [])
            completion = self._complete(make_request(dialogue, answers))
            recorder.add(dialogue.dialogue.id, completion)
        return recorder.cost(time.perf_counter() - start)

    def _complete(self, request: Request) -> Completion:
        completion = create_completion(self._llama, request)
        # Ours counts the token that ends an answer, which takes as long as any other.
        ends = completion.finish == "stop"
        return replace(completion, tokens=completion.tokens + ends)


def _order(
    dialogues: list[AssignedDialogue], turns: int, mode: LoopMode
) -> Iterator[AssignedDialogue]:
    """Yield each dialogue `turns` times: turn by turn, or dialogue by dialogue."""
    if mode == "refeed":
        for _ in range(turns):
            yield from dialogues
    else:
        for dialogue in dialogues:
            yield from [dialogue] * turns


def make_dialogues() -> list[AssignedDialogue]:
    """Return the recipe's evaluation dialogues, with the instruction in turn 1."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = RunDir(Path(folder))
        instructions.run(RECIPE, run_dir)
        return read_split(run_dir.assignments, "evaluation")


def random_adapter(model: Model, folder: Path) -> Adapter:
    """Write an adapter of the recipe's rank on all projections, too small to spoil the texts."""
    base, rng, rank = open_base(model.path), np.random.default_rng(1), RECIPE.train.rank
    factors = {}
    for tensor in base.tensors():
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in MODULES:
            module = f"base_model.model.model.layers.{parts[1]}.{MODULES[parts[2]]}"
            rows, columns = tensor.shape
            a, b = rng.normal(0, 0.02, (rank, columns)), rng.normal(0, 0.005, (rows, rank))
            factors[f"{module}.lora_A.weight"] = a.astype(np.float32)
            factors[f"{module}.lora_B.weight"] = b.astype(np.float32)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": rank}))
    write_adapter(base, folder, folder / "adapter.gguf")
    return Adapter(folder / "adapter.gguf")


class Arm(NamedTuple):
    """A model to compare: its adapter over the base, and the loop with the same."""

    adapter: Adapter | None
    loop: CompletionLoop


def compare(
    engine: Engine, arms: dict[str, Arm], dialogues: list[AssignedDialogue], size: Size
) -> tuple[float, Texts]:
    """Return the loop's time per token relative to ours, over both arms, and the base's answers."""
    costs: dict[str, list[Cost]] = {"ours": [], "refeed": [], "cached": []}
    texts: list[Texts] = []
    loop_dialogues = dialogues[: size.loop_dialogues]
    modes: tuple[LoopMode, ...] = ("refeed", "cached")
    for name, arm in arms.items():
        cost, answers = engine.answer(dialogues, size.turns, arm.adapter, f"ours, {name}")
        costs["ours"].append(cost)
        texts.append(answers)
        for mode in modes:
            label = f"{mode} loop, {name}"
            costs[mode].append(arm.loop.answer(loop_dialogues, size.turns, mode, label))
        for way, arm_costs in costs.items():
            print(f"  {name:6}{way:8}{arm_costs[-1]}", flush=True)
    ours, *loops = (total(arm_costs) for arm_costs in costs.values())
    print(f"  all {len(dialogues)} dialogues, both arms: ours {ours.seconds / 60:.1f} min")
    for mode, loop in zip(modes, loops, strict=True):
        seconds = loop.seconds * len(dialogues) / size.loop_dialogues
        print(
            f"    {mode} loop {seconds / 60:.1f} min, {seconds / ours.seconds:.1f} times; "
            f"{loop.token_ms / ours.token_ms:.2f} times per token",
            flush=True,
        )
    return loops[0].token_ms / ours.token_ms, texts[0]


def compare_turns(
    engine: Engine, dialogues: list[AssignedDialogue], answers: Texts, size: Size
) -> float:
    """Return the last turn's time per token relative to that of turn 2.

    Each dialogue is asked the questions of another one.
    """
    costs = []
    for number in (2, size.turns):
        turns = [
            LateTurn(
                dialogue,
                answers[dialogue.dialogue.id][: number - 1],
                size.late_tokens,
                another.dialogue.turns[1:],
            )
            for dialogue, another in zip(dialogues, (*dialogues[1:], dialogues[0]), strict=True)
        ]
        costs.append(engine.answer_late_turn(turns))
        print(f"  {f'turn {number}':14}{costs[-1]}")
    ratio = costs[1].token_ms / costs[0].token_ms
    print(f"  per token: {ratio:.2f} times", flush=True)
    return ratio


class Ratios(NamedTuple):
    """The figures of all rounds."""

    loop: list[float]
    late_turn: list[float]


def measure(size: Size, cache_type: CacheType) -> Ratios:
    """Run all rounds."""
    model, dialogues = find_model(RECIPE.model), make_dialogues()
    path = cached_gguf(model, RECIPE.export.formats[0])
    ratios = Ratios([], [])
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(LoadedModel(open_gguf(path)), cache_type)
        adapters = {"base": None, "tuned": random_adapter(model, Path(folder))}
        arms = {
            name: Arm(adapter, CompletionLoop(path, adapter)) for name, adapter in adapters.items()
        }
        print(
            f"{len(dialogues)} dialogues of {size.turns} turns in each arm, of which the loop runs "
            f"{size.loop_dialogues}; {path.stem}, cache {engine.cache_type}",
            flush=True,
        )
        for number in range(size.rounds):
            print(f"run {number + 1} of {size.rounds}", flush=True)
            ratio, answers = compare(engine, arms, dialogues, size)
            ratios.loop.append(ratio)
            ratios.late_turn.append(compare_turns(engine, dialogues, answers, size))
        engine.model.close()
    return ratios


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one run of 8 turns; the loop runs one dialogue of each arm",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs, of about ten minutes each")
    parser.add_argument(
        "--cache", default="F16", choices=("F16", "F32"), help="type of our keys and values"
    )
    return parser.parse_args()


def main() -> None:
    """Print each run, and the figures as the last line."""
    options = _options()
    size = Size(1, 8, 1, 96) if options.quick else Size(options.rounds, TURNS, 2, 192)
    ratios = measure(size, options.cache)
    speedup, growth = statistics.median(ratios.loop), statistics.median(ratios.late_turn)
    figures = {
        "dialogues_against_loop": {
            "value": round(speedup, 3),
            "bar": MIN_SPEEDUP,
            "holds": speedup >= MIN_SPEEDUP,
        },
        "last_turn_against_turn_2": {
            "value": round(growth, 3),
            "bar": MAX_TURN_RATIO,
            "holds": growth <= MAX_TURN_RATIO,
        },
    }
    print(json.dumps({"bench": "evaluate", "figures": figures}))


if __name__ == "__main__":
    main()
