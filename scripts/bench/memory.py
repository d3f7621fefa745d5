"""Predicted against real peak memory of training on this CPU: `.venv/bin/python scripts/bench/memory.py [--quick]`.

The embedded model, and random Llamas of other widths, depths and vocabularies, each in a process of its own: eight steps of the
trainer of `gatt train`, each of another length (every new one leaves holes of its own), half of whose tokens are learned. What
`gatt doctor` and `gatt train` would say is compared with the resident memory at its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.console import Progress, capture_output
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model, shape_of
from pipeline.recipe import Train
from pipeline.system import GB, peak_memory
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.memory import training_memory
from pipeline.training.unsloth import train

EMBEDDED = "smollm2-135m"


class Case(NamedTuple):
    """A model (its name, or layers, width, feed-forward, heads, heads of keys and vocabulary), and what it is trained on."""

    model: str | tuple[int, int, int, int, int, int]
    rank: int
    rows: int
    tokens: int
    distill: bool
    dora: bool = False


LENGTHS = (0.68, 0.71, 0.63, 0.86, 1.0, 0.78, 0.8, 0.66)
"""Of the dialogues of each step, as a share of the longest."""
CASES = (
    Case(EMBEDDED, 32, 4, 450, True),
    Case((8, 1280, 3456, 20, 5, 49152), 16, 2, 600, False),
    Case(EMBEDDED, 8, 1, 400, False),
    Case((16, 896, 2432, 14, 2, 49152), 32, 4, 300, True),
    Case((12, 1024, 6144, 16, 16, 150000), 64, 3, 500, True),
    Case((16, 2048, 8192, 32, 8, 128256), 32, 2, 500, True),  # the sizes of Llama 3.2 1B
    Case(EMBEDDED, 32, 4, 450, True, dora=True),
    Case((8, 1280, 3456, 20, 5, 49152), 16, 2, 600, False, dora=True),
)


def folder_of(case: Case, folder: Path) -> Path:
    """The case's model for transformers; a random one is written to `folder`, with the embedded model's tokenizer."""
    if isinstance(case.model, str):
        return cached_checkpoint(find_model(case.model))
    import torch
    import transformers

    layers, width, feed_forward, heads, of_keys, vocabulary = case.model
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=of_keys,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(
        cached_checkpoint(find_model(EMBEDDED))
    ).save_pretrained(folder)
    return folder


def examples(case: Case) -> list[TrainingExample]:
    """Dialogues for all steps; of what is learned, most is distilled, as in the demo."""
    found = []
    for n in range(case.rows * len(LENGTHS)):
        tokens = int(case.tokens * LENGTHS[n // case.rows])
        ids = [(7 * n + 11 * place) % 20000 + 5 for place in range(tokens)]
        half, apart = tokens // 2, tokens // 14
        alignment = (
            [(place, place - apart) for place in range(half, tokens) if place % 10 < 7]
            if case.distill
            else []
        )
        labels, weights = [IGNORE_INDEX] * half + ids[half:], [0.0] * half + [1.0] * (tokens - half)
        found.append(
            TrainingExample(ids, labels, weights, ids[apart:] if case.distill else [], alignment)
        )
    return found


def settings(case: Case) -> Train:
    """One epoch."""
    loss: Literal["distill", "all_turns"] = "distill" if case.distill else "all_turns"
    return Train(
        rank=case.rank,
        max_steps=len(LENGTHS),
        batch_size=case.rows,
        loss=loss,
        dora=case.dora,
        save_steps=100,
    )


def measure(number: int, written: Path) -> dict[str, Any]:
    """Train in this process; bytes that were predicted, and those at the peak."""
    case, shape = CASES[number], shape_of(str(written))
    with tempfile.TemporaryDirectory() as folder, capture_output(Path(folder) / "log"):
        train(
            written,
            examples(case),
            settings(case),
            1,
            Path(folder),
            Path(folder) / "adapter",
            lambda _: None,
        )
    need = training_memory(shape, settings(case), case.rows * case.tokens, watched=False)
    return {"parameters": shape.parameters, "predicted": need, "peak": peak_memory()}


def main() -> None:
    """Print each case, and the largest error."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--quick", action="store_true", help="the first two cases")
    options.add_argument(
        "--case", type=int, help="only this one, in this process, from the folder --model"
    )
    options.add_argument("--model", type=Path)
    asked = options.parse_args()
    if asked.case is not None:
        print(json.dumps(measure(asked.case, asked.model)))
        return
    cases = CASES[:2] if asked.quick else CASES
    bar, errors = Progress("memory: cases", len(cases)), []
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                __file__,
                "--case",
                str(number),
                "--model",
                str(folder_of(case, Path(folder))),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        errors.append(abs(found["predicted"] / found["peak"] - 1))
        kind = "DoRA" if case.dora else "LoRA"
        print(
            f"{found['parameters'] / 1e6:6.0f} M parameters, {kind} of rank {case.rank:2}, {case.rows} x {case.tokens} tokens: "
            f"{found['predicted'] / GB:5.2f} GB predicted, {found['peak'] / GB:5.2f} GB at the peak",
            flush=True,
        )
        bar.advance()
    error = max(errors)
    print(
        json.dumps(
            {
                "bench": "memory",
                "figures": {
                    "error": {"value": round(error, 3), "bar": 0.15, "holds": error <= 0.15}
                },
            }
        )
    )


if __name__ == "__main__":
    main()
