"""Training against TRL and plain Unsloth: `.venv/bin/python scripts/bench/training.py [--quick]`.

supervised: learned tokens a second on dialogues of 2 to 8 turns in 4 bits, with every answer
learned in one pass (`all_turns`), against TRL's `SFTTrainer` by default: one example per dialogue,
its last answer learned, padded to the longest of the batch. Two arms have no bar: TRL with an
example for each answer, and `distill`.
throughput: all tokens a second on dialogues cut to one length, where nothing is padded, against
Unsloth's own trainer, which learns every token of them.
memory: peak resident memory, against that of TRL's trainer.

Arms are interleaved. Each measurement is a process of its own, because Unsloth patches TRL in the
process that imports it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.data.dialogues import load_dialogues
from pipeline.gatt.ghost import ghost
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.recipe import Train
from pipeline.records import Message
from pipeline.system import peak_memory
from pipeline.training.backend import choose_backend
from pipeline.training.examples import TrainingExample, build_example
from pipeline.training.job import TrainingJob
from pipeline.training.unsloth import load_tokenizer

if TYPE_CHECKING:
    import transformers
    import trl

BATCH_SIZE, MAX_LENGTH, LEARNING_RATE = 4, 1024, 2e-4
ARMS = ("all_turns", "distill", "trl", "trl, each answer", "all_turns, even", "unsloth")
MIN_SUPERVISED, MIN_THROUGHPUT, MAX_MEMORY = 4, 1, 1
"""Bars of the figures, as multiples of the peer's."""
Chat = tuple[Message, ...]
Loss = Literal["all_turns", "last_turn", "distill"]


class Measurement(NamedTuple):
    """One epoch: learned tokens and all tokens, both without padding, and the process's peak."""

    seconds: float
    learned: int
    tokens: int
    peak_bytes: int

    @property
    def learned_per_second(self) -> float:
        """Return the learned tokens a second."""
        return self.learned / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Return all tokens a second."""
        return self.tokens / self.seconds


def base_model() -> Path:
    """Return the folder of the embedded model in Hugging Face format."""
    return cached_checkpoint(find_model("smollm2-135m"))


def synthetic_chats(count: int, turns: range) -> list[Chat]:
    """Return dialogues with as many turns, drawn evenly; answers are user messages of others."""
    rng = random.Random(1)
    seeds = load_dialogues("seed")
    chats: list[Chat] = []
    for n in range(count):
        users = list(seeds[n % len(seeds)].turns[: turns[n % len(turns)]])
        texts = [text for dialogue in rng.sample(seeds, len(users)) for text in dialogue.turns[:2]]
        answers = [
            f"Ahoy! {first} {second}" for first, second in zip(texts[::2], texts[1::2], strict=True)
        ]
        instructions = ['Begin every answer with "Ahoy!"'] * len(users)
        chats.append(ghost(users, answers, instructions, "Be brief."))
    return chats


def settings(loss: Loss, steps: int) -> Train:
    """Return the recipe's defaults with the bench's sizes."""
    return Train(
        loss=loss,
        max_steps=steps,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        learning_rate=LEARNING_RATE,
        save_steps=10 * steps,
        load_in_4bit=True,
    )


def train_gatt(
    examples: Sequence[TrainingExample], loss: Loss, steps: int, folder: Path
) -> list[float]:
    """Train as `gatt train` does, and return the time at the end of each step."""
    ends: list[float] = []
    job = TrainingJob(
        model_dir=base_model(),
        examples=examples,
        settings=settings(loss, steps),
        seed=1,
        checkpoint_dir=folder,
        adapter_dir=folder / "adapter",
        on_step=lambda _: ends.append(time.perf_counter()),
    )
    choose_backend().train(job)
    return ends


def train_trl(chats: Sequence[Chat], steps: int, folder: Path) -> list[float]:
    """Train with TRL's `SFTTrainer` on a model that bitsandbytes has loaded in 4 bits."""
    import peft
    import torch
    import transformers

    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base_model(), quantization_config=quantization, dtype=torch.bfloat16
    )
    defaults = Train()
    lora = peft.LoraConfig(
        r=defaults.rank,
        lora_alpha=defaults.rank,
        target_modules=list(defaults.target_modules),
    )
    trainer = _sft_trainer_class()(
        model,
        processing_class=transformers.AutoTokenizer.from_pretrained(base_model()),
        train_dataset=_dataset(
            [{"prompt": list(chat[:-1]), "completion": [chat[-1]]} for chat in chats]
        ),
        peft_config=lora,
        args=_sft_config(steps, MAX_LENGTH, folder),
    )
    return _timed(trainer)


def _sft_trainer_class() -> type[trl.SFTTrainer]:
    """Return TRL's trainer, on a CPU with the loss of transformers: its own kernel needs a GPU."""
    import torch
    import transformers
    import trl

    class CpuTrainer(trl.SFTTrainer):  # type: ignore[misc]
        compute_loss = transformers.Trainer.compute_loss

    return trl.SFTTrainer if torch.cuda.is_available() else CpuTrainer


def train_unsloth(chats: Sequence[Chat], max_length: int, steps: int, folder: Path) -> list[float]:
    """Train Unsloth's model with TRL's trainer, which it patches: all tokens of texts cut alike."""
    import trl
    from unsloth import FastLanguageModel

    defaults = Train()
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base_model()), max_seq_length=MAX_LENGTH, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=defaults.rank,
        lora_alpha=defaults.rank,
        target_modules=list(defaults.target_modules),
        use_gradient_checkpointing=False,
    )
    texts = [tokenizer.apply_chat_template(list(chat), tokenize=False) for chat in chats]
    trainer = trl.SFTTrainer(
        model,
        processing_class=tokenizer,
        train_dataset=_dataset([{"text": text} for text in texts]),
        args=_sft_config(steps, max_length, folder),
    )
    return _timed(trainer)


def _dataset(rows: list[dict[str, Any]]) -> object:
    import datasets

    return datasets.Dataset.from_list(rows)


def _sft_config(steps: int, max_length: int, folder: Path) -> trl.SFTConfig:
    import trl

    return trl.SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        max_length=max_length,
        learning_rate=LEARNING_RATE,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
    )


def _timed(trainer: transformers.Trainer) -> list[float]:
    """Train, and return the time at the end of each step."""
    import transformers

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    return ends


def measure(arm: str, count: int) -> Measurement:
    """Measure the second of two epochs over `count` dialogues, in this process."""
    if arm == "unsloth":
        importlib.import_module("unsloth")  # before transformers, which it patches
    even = arm in ("unsloth", "all_turns, even")
    chats = synthetic_chats(count, range(5, 6) if even else range(2, 9))
    if arm == "trl, each answer":
        chats = random.Random(2).sample(_each_answer(chats), count)
    steps, loss = 2 * count // BATCH_SIZE, _loss(arm)
    tokenizer = load_tokenizer(base_model())
    examples = [build_example(tokenizer, chat, settings(loss, steps), chat) for chat in chats]
    if even:
        shortest = min(len(example.input_ids) for example in examples)
        examples = [_cut(example, shortest) for example in examples]
    tokens = sum(len(example.input_ids) for example in examples)
    learned = sum(example.learned_tokens for example in examples)
    with tempfile.TemporaryDirectory() as name, capture_output(Path(name) / "log"):
        folder = Path(name)
        if arm.startswith("trl"):
            ends = train_trl(chats, steps, folder)
        elif arm == "unsloth":
            learned = tokens
            ends = train_unsloth(chats, shortest, steps, folder)
        else:
            ends = train_gatt(examples, loss, steps, folder)
    return Measurement(ends[-1] - ends[steps // 2 - 1], learned, tokens, peak_memory())


def _loss(arm: str) -> Loss:
    if arm == "distill":
        return "distill"
    return "last_turn" if arm.startswith("trl") else "all_turns"


def _each_answer(chats: Sequence[Chat]) -> list[Chat]:
    """Return an example for each answer: the chat up to it."""
    return [
        chat[: n + 1]
        for chat in chats
        for n, message in enumerate(chat)
        if message["role"] == "assistant"
    ]


def _cut(example: TrainingExample, length: int) -> TrainingExample:
    """Return the first `length` tokens."""
    return replace(
        example,
        input_ids=example.input_ids[:length],
        labels=example.labels[:length],
        weights=example.weights[:length],
        teacher_ids=(),
        alignment=(),
    )


def measure_in_child(arm: str, count: int) -> Measurement:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--dialogues", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measurement(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run the arms in turn, and print their medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer dialogues, one round")
    parser.add_argument(
        "--arm", choices=ARMS, help="only this arm, in this process; prints a JSON list"
    )
    parser.add_argument("--dialogues", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.dialogues)))
        return
    count, rounds = (12, 1) if options.quick else (options.dialogues, options.rounds)
    measurements: dict[str, list[Measurement]] = {arm: [] for arm in ARMS}
    bar = Progress("training: epochs", rounds * len(ARMS))
    for _ in range(rounds):
        for arm in ARMS:
            measurements[arm].append(measure_in_child(arm, count))
            bar.advance()
    for arm, rows in measurements.items():
        median = statistics.median_low([row.seconds for row in rows])
        row = next(row for row in rows if row.seconds == median)
        print(
            f"{arm:17} {row.learned_per_second:6.0f} learned tokens/s, "
            f"{row.tokens_per_second:6.0f} tokens/s, {row.peak_bytes / 1e9:.2f} GB at the peak "
            f"({row.seconds:.1f} s)"
        )
    print(json.dumps({"bench": "training", "figures": figures(measurements)}))


def figures(measurements: dict[str, list[Measurement]]) -> dict[str, dict[str, float | bool]]:
    """Return the medians as multiples of the peer's, with their bars."""

    def ratio(arm: str, peer: str, value: Callable[[Measurement], float]) -> float:
        medians = [statistics.median(map(value, measurements[name])) for name in (arm, peer)]
        return medians[0] / medians[1]

    supervised = ratio("all_turns", "trl", lambda row: row.learned_per_second)
    throughput = ratio("all_turns, even", "unsloth", lambda row: row.tokens_per_second)
    memory = ratio("all_turns", "trl", lambda row: row.peak_bytes)
    return {
        "supervised": _figure(supervised, MIN_SUPERVISED, holds=supervised >= MIN_SUPERVISED),
        "throughput": _figure(throughput, MIN_THROUGHPUT, holds=throughput >= MIN_THROUGHPUT),
        "memory": _figure(memory, MAX_MEMORY, holds=memory <= MAX_MEMORY),
    }


def _figure(value: float, bar: float, *, holds: bool) -> dict[str, float | bool]:
    return {"value": round(value, 3), "bar": bar, "holds": holds}


if __name__ == "__main__":
    main()
