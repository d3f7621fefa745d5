"""Training against the plain way, interleaved in one run: `.venv/bin/python scripts/bench/training.py [--quick]`.

supervised: learned tokens a second on dialogues of 2 to 8 turns in 4 bits, with every answer learned in one pass (`all_turns`),
against TRL's `SFTTrainer` as it comes: one example for a dialogue, its last answer learned, padded to the longest of the
batch. Beside it, without a bar, the same where each answer makes an example of its own, and `distill`.
throughput: all tokens a second on dialogues cut to one length, where nothing is padded, against Unsloth's own trainer, which learns
every token of them.
memory: peak resident memory, against that of TRL's trainer.

Every measurement is a process of its own, since Unsloth changes TRL for the process that imports it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.data.dialogues import load_dialogues
from pipeline.gatt.ghost import ghost
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.recipe import Train
from pipeline.records import Message
from pipeline.training.examples import IGNORE_INDEX, TrainingExample, build_example
from pipeline.training.unsloth import load_tokenizer, train

BATCH, LENGTH, RATE = 4, 1024, 2e-4
ARMS = ("all_turns", "distill", "trl", "trl, each answer", "all_turns, even", "unsloth")
Chat = tuple[Message, ...]
Loss = Literal["all_turns", "last_turn", "distill"]


class Measured(NamedTuple):
    """One epoch: tokens that were learned and all tokens, both without padding, and what the process took at its peak."""

    seconds: float
    learned: int
    tokens: int
    peak_bytes: int


def chats(count: int, turns: range) -> list[Chat]:
    """Dialogues of so many turns, drawn evenly; what the assistant says is what users say elsewhere."""
    rng = random.Random(1)
    seeds = load_dialogues("seed")
    made = []
    for n in range(count):
        users = list(seeds[n % len(seeds)].turns[: turns[n % len(turns)]])
        words = [turn for d in rng.sample(seeds, len(users)) for turn in d.turns[:2]]
        answers = [f"Ahoy! {one} {two}" for one, two in zip(words[::2], words[1::2], strict=True)]
        made.append(
            ghost(users, answers, ['Begin every answer with "Ahoy!"'] * len(users), "Be brief.")
        )
    return made


def settings(loss: Loss, steps: int) -> Train:
    """The recipe's, for so many steps."""
    return Train(
        loss=loss,
        max_steps=steps,
        batch_size=BATCH,
        max_length=LENGTH,
        learning_rate=RATE,
        save_steps=10 * steps,
    )


def ours(examples: list[TrainingExample], loss: Loss, steps: int, folder: Path) -> list[float]:
    """The trainer of `gatt train`; when its steps ended."""
    ends: list[float] = []
    train(
        base(),
        examples,
        settings(loss, steps),
        1,
        folder,
        folder / "adapter",
        lambda _: ends.append(time.perf_counter()),
    )
    return ends


def cut(one: TrainingExample, length: int) -> TrainingExample:
    """The first so many tokens."""
    return TrainingExample(
        one.input_ids[:length], one.labels[:length], one.weights[:length], [], []
    )


def plain(dialogues: list[Chat], steps: int, folder: Path) -> list[float]:
    """TRL's `SFTTrainer` on a model that transformers and bitsandbytes have loaded in 4 bits."""
    import peft
    import torch
    import transformers

    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base(), quantization_config=four_bits, dtype=torch.bfloat16
    )
    rows = [{"prompt": list(chat[:-1]), "completion": [chat[-1]]} for chat in dialogues]
    lora = peft.LoraConfig(
        r=Train().rank, lora_alpha=Train().rank, target_modules=list(Train().target_modules)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(base())
    return _train(_on_cpus(), model, tokenizer, rows, LENGTH, steps, folder, peft_config=lora)


def _on_cpus() -> Any:
    """TRL's trainer with the loss of the transformers' one where there is no GPU: its own is a kernel that no CPU runs."""
    import torch
    import transformers
    import trl

    class Plain(trl.SFTTrainer):  # type: ignore[misc]
        compute_loss = transformers.Trainer.compute_loss

    return trl.SFTTrainer if torch.cuda.is_available() else Plain


def plain_unsloth(dialogues: list[Chat], length: int, steps: int, folder: Path) -> list[float]:
    """Unsloth's way: its model in TRL's trainer, which it has changed; all texts learned whole and cut to one length."""
    from unsloth import FastLanguageModel

    rank = Train().rank
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base()), max_seq_length=LENGTH, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=rank,
        target_modules=list(Train().target_modules),
        use_gradient_checkpointing=False,
    )
    rows = [
        {"text": tokenizer.apply_chat_template(list(chat), tokenize=False)} for chat in dialogues
    ]
    import trl

    return _train(trl.SFTTrainer, model, tokenizer, rows, length, steps, folder)


def _train(
    kind: Any,
    model: Any,
    tokenizer: Any,
    rows: list[Any],
    length: int,
    steps: int,
    folder: Path,
    **more: Any,
) -> list[float]:
    import datasets
    import transformers
    import trl

    ends: list[float] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    trainer = kind(
        model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[Watch()],
        **more,
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            max_length=length,
            learning_rate=RATE,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=False,
        ),
    )
    trainer.train()
    return ends


def base() -> Path:
    """The embedded model for transformers."""
    return cached_checkpoint(find_model("smollm2-135m"))


def measure(arm: str, count: int) -> Measured:
    """The second of two epochs over `count` dialogues, in this process."""
    if arm == "unsloth":
        importlib.import_module("unsloth")  # before transformers, which it changes
    even = arm in ("unsloth", "all_turns, even")
    dialogues = chats(count, range(5, 6) if even else range(2, 9))
    if arm == "trl, each answer":
        each = [
            chat[: end + 1]
            for chat in dialogues
            for end, m in enumerate(chat)
            if m["role"] == "assistant"
        ]
        dialogues = random.Random(2).sample(each, count)
    steps = 2 * count // BATCH
    loss: Loss = (
        "distill" if arm == "distill" else "last_turn" if arm.startswith("trl") else "all_turns"
    )
    labeled = [
        build_example(load_tokenizer(base()), chat, settings(loss, steps), chat)
        for chat in dialogues
    ]
    lengths = [len(one.input_ids) for one in labeled]
    if even:
        labeled = [cut(one, min(lengths)) for one in labeled]
        lengths = [min(lengths)] * count
    tokens, learned = (
        sum(lengths),
        sum(token != IGNORE_INDEX for one in labeled for token in one.labels),
    )
    with tempfile.TemporaryDirectory() as folder, capture_output(Path(folder) / "log"):
        if arm.startswith("trl"):
            ends = plain(dialogues, steps, Path(folder))
        elif arm == "unsloth":
            learned = tokens
            ends = plain_unsloth(dialogues, lengths[0], steps, Path(folder))
        else:
            ends = ours(labeled, loss, steps, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return Measured(ends[-1] - ends[steps // 2 - 1], learned, tokens, peak)


def alone(arm: str, count: int) -> Measured:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--dialogues", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Run the arms in turn, and print the medians and their ratios."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--quick", action="store_true", help="fewer dialogues, one round")
    options.add_argument(
        "--arm", choices=ARMS, help="only this one, in this process; its figures as a JSON list"
    )
    options.add_argument("--dialogues", type=int, default=32)
    options.add_argument("--rounds", type=int, default=3)
    asked = options.parse_args()
    if asked.arm:
        print(json.dumps(measure(asked.arm, asked.dialogues)))
        return
    count, rounds = (12, 1) if asked.quick else (asked.dialogues, asked.rounds)
    found: dict[str, list[Measured]] = {arm: [] for arm in ARMS}
    bar = Progress("training: epochs", rounds * len(ARMS))
    for _ in range(rounds):
        for arm in ARMS:
            found[arm].append(alone(arm, count))
            bar.advance()
    for arm, all_of_it in found.items():
        one = min(
            all_of_it,
            key=lambda m: abs(m.seconds - statistics.median(x.seconds for x in all_of_it)),
        )
        print(
            f"{arm:17} {one.learned / one.seconds:6.0f} learned tokens/s, {one.tokens / one.seconds:6.0f} tokens/s, "
            f"{one.peak_bytes / 1e9:.2f} GB at the peak ({one.seconds:.1f} s)"
        )
    print(json.dumps({"bench": "training", "figures": figures(found)}))


def figures(found: dict[str, list[Measured]]) -> dict[str, Any]:
    """Medians of ours over the peer's, with their bars."""

    def ratio(one: str, other: str, what: Callable[[Measured], float]) -> float:
        return statistics.median(map(what, found[one])) / statistics.median(map(what, found[other]))

    def at_least(value: float, bar: float) -> dict[str, Any]:
        return {"value": round(value, 3), "bar": bar, "holds": value >= bar}

    def learned(m: Measured) -> float:
        return m.learned / m.seconds

    memory = ratio("all_turns", "trl", lambda m: m.peak_bytes)
    return {
        "supervised": at_least(ratio("all_turns", "trl", learned), 4),
        "throughput": at_least(
            ratio("all_turns, even", "unsloth", lambda m: m.tokens / m.seconds), 1
        ),
        "memory": {"value": round(memory, 3), "bar": 1, "holds": memory <= 1},
    }


if __name__ == "__main__":
    main()
