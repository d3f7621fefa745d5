"""Predicted training memory against the peak: `.venv/bin/python scripts/bench/memory.py [--quick]`.

The embedded model, and random Llamas of other widths, depths and vocabularies, each train on this
CPU in a process of their own. The trainer of `gatt train` runs eight steps, each of another length
(every new length fragments the heap), with half of the tokens learned, as it would plan them with
plenty of memory. What it predicts is compared with the peak of the resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model, shape_of
from pipeline.recipe import Recipe, Train
from pipeline.system import GB, peak_memory
from pipeline.training.backend import choose_backend
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.job import TrainingJob
from pipeline.training.memory import dequantized_bytes, fit_to_memory, training_memory

EMBEDDED = "smollm2-135m"
PLENTY_OF_MEMORY = 1e12
MAX_ERROR = 0.1
"""Bar of the largest relative error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomLlama:
    """The sizes of a random model, named as in Hugging Face configurations."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model (None: the embedded one), its adapter, and a step of `batch_size` dialogues.

    The longest dialogue has `tokens`.
    """

    model: RandomLlama | None = None
    rank: int
    batch_size: int
    tokens: int
    distill: bool
    dora: bool = False

    @property
    def settings(self) -> Train:
        """Return the settings for one epoch."""
        return Train(
            rank=self.rank,
            max_steps=len(LENGTHS),
            batch_size=self.batch_size,
            loss="distill" if self.distill else "all_turns",
            dora=self.dora,
            save_steps=100,
            load_in_4bit=True,
        )


class Measurement(NamedTuple):
    """Parameters of the model, and bytes that were predicted and those at the peak."""

    parameters: int
    predicted_bytes: float
    peak_bytes: int


LENGTHS = (0.68, 0.71, 0.63, 0.86, 1.0, 0.78, 0.8, 0.66)
"""Length of the dialogues in each step, as a fraction of the longest."""
WIDE = RandomLlama(
    num_hidden_layers=8,
    hidden_size=1280,
    intermediate_size=3456,
    num_attention_heads=20,
    num_key_value_heads=5,
    vocab_size=49152,
)
DEEP = RandomLlama(
    num_hidden_layers=16,
    hidden_size=896,
    intermediate_size=2432,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=49152,
)
LARGE_VOCABULARY = RandomLlama(
    num_hidden_layers=12,
    hidden_size=1024,
    intermediate_size=6144,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=150000,
)
LLAMA_3_2_1B = RandomLlama(
    num_hidden_layers=16,
    hidden_size=2048,
    intermediate_size=8192,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
CASES = (
    Case(rank=32, batch_size=4, tokens=450, distill=True),
    Case(model=WIDE, rank=16, batch_size=2, tokens=600, distill=False),
    Case(rank=8, batch_size=1, tokens=400, distill=False),
    Case(model=DEEP, rank=32, batch_size=4, tokens=300, distill=True),
    Case(model=LARGE_VOCABULARY, rank=64, batch_size=3, tokens=500, distill=True),
    Case(model=LLAMA_3_2_1B, rank=32, batch_size=2, tokens=500, distill=True),
    Case(rank=32, batch_size=4, tokens=450, distill=True, dora=True),
    Case(model=WIDE, rank=16, batch_size=2, tokens=600, distill=False, dora=True),
)


def save_model(model: RandomLlama, folder: Path) -> Path:
    """Write a random model in bfloat16 to `folder`, with the embedded model's tokenizer."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        vocab_size=model.vocab_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    embedded = cached_checkpoint(find_model(EMBEDDED))
    transformers.AutoTokenizer.from_pretrained(embedded).save_pretrained(folder)
    return folder


def synthetic_examples(case: Case) -> list[TrainingExample]:
    """Return the dialogues of all steps; most learned tokens are distilled, as in the demo."""
    examples: list[TrainingExample] = []
    for n in range(case.batch_size * len(LENGTHS)):
        tokens = int(case.tokens * LENGTHS[n // case.batch_size])
        ids = [(7 * n + 11 * position) % 20000 + 5 for position in range(tokens)]
        half, shift = tokens // 2, tokens // 14
        aligned = [index for index in range(half, tokens) if index % 10 < 7]
        examples.append(
            TrainingExample(
                input_ids=ids,
                labels=[IGNORE_INDEX] * half + ids[half:],
                weights=[0.0] * half + [1.0] * (tokens - half),
                teacher_ids=ids[shift:] if case.distill else (),
                alignment=[(index, index - shift) for index in aligned] if case.distill else (),
            )
        )
    return examples


def measure(case: Case, model_dir: Path) -> Measurement:
    """Train in this process."""
    recipe = Recipe(model=str(model_dir), train=case.settings)
    plan = fit_to_memory(recipe, case.tokens, PLENTY_OF_MEMORY, gpu=False)
    with tempfile.TemporaryDirectory() as name, capture_output(Path(name) / "log"):
        job = TrainingJob(
            model_dir=model_dir,
            examples=synthetic_examples(case),
            settings=plan.settings,
            seed=1,
            checkpoint_dir=Path(name),
            adapter_dir=Path(name) / "adapter",
            dequantize=plan.dequantize,
        )
        choose_backend().train(job)
    shape = shape_of(str(model_dir))
    tokens = plan.settings.max_tokens_per_micro_batch or case.batch_size * case.tokens
    predicted = training_memory(shape, plan.settings, tokens, validation=False)
    predicted += dequantized_bytes(shape) if plan.dequantize else 0
    return Measurement(shape.parameters, predicted, peak_memory())


def measure_in_child(number: int) -> Measurement:
    """Measure a case in a process of its own."""
    model = CASES[number].model
    with tempfile.TemporaryDirectory() as name:
        if model is None:
            model_dir = cached_checkpoint(find_model(EMBEDDED))
        else:
            model_dir = save_model(model, Path(name))
        command = [sys.executable, __file__, "--case", str(number), "--model", str(model_dir)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Measurement(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print each case, and the largest error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first two cases")
    parser.add_argument(
        "--case", type=int, help="only this one, in this process, from the folder --model"
    )
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure(CASES[options.case], options.model)))
        return
    cases = CASES[:2] if options.quick else CASES
    bar, errors = Progress("memory: cases", len(cases)), []
    for number, case in enumerate(cases):
        row = measure_in_child(number)
        errors.append(abs(row.predicted_bytes / row.peak_bytes - 1))
        print(
            f"{row.parameters / 1e6:6.0f} M parameters, {'DoRA' if case.dora else 'LoRA'} of rank "
            f"{case.rank:2}, {case.batch_size} x {case.tokens} tokens: "
            f"{row.predicted_bytes / GB:5.2f} GB predicted, {row.peak_bytes / GB:5.2f} GB at the "
            "peak",
            flush=True,
        )
        bar.advance()
    error = max(errors)
    figure = {"value": round(error, 3), "bar": MAX_ERROR, "holds": error <= MAX_ERROR}
    print(json.dumps({"bench": "memory", "figures": {"error": figure}}))


if __name__ == "__main__":
    main()
