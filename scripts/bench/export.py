"""Export against the usual way, interleaved: `.venv/bin/python scripts/bench/export.py [--quick]`.

For Linux. Both make one GGUF of a folder of safetensors and a LoRA adapter, in Q8_0, F16 and
Q4_K_M: of SmolLM2-135M, and of a random Llama of 1.2 billion parameters. The usual way is three
programs: PEFT's `merge_and_unload` and `save_pretrained`, llama.cpp's `convert_hf_to_gguf.py`, and
for Q4_K_M llama.cpp's quantization of an F16 file. The two files must hold the same tensors.

wall: seconds from the start of a program to its end, with imports.
memory: peak of anonymous memory (RssAnon, read every 10 ms). Unlike mapped files it cannot be
dropped and read again.
bytes: all that was written, with intermediate files.
depth: peak of anonymous memory of our F16 export of a Llama of 24 layers, against 4 layers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from converter import converter

FORMATS = ("Q8_0", "F16", "Q4_K_M")
DEEP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
# Llama-3.2-1B, with two more layers in place of the rows that SmolLM2's vocabulary lacks.
LARGE = {
    **DEEP,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 18,
}
TINY = {**DEEP, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
CHECKED = ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight")
"""Tensors whose numbers are compared too: one that no adapter changes, one whose rows are permuted,
a plain one.
"""


class Figure(NamedTuple):
    """A measured ratio, and the largest one that is accepted."""

    value: float
    bar: float


class Cost(NamedTuple):
    """What one way took, in seconds and bytes.

    `resident` is the peak of memory with mapped files, which `anonymous` leaves out.
    """

    seconds: float
    anonymous: float
    resident: float
    written: float

    def __str__(self) -> str:
        return f"{self.seconds:8.2f} s" + "".join(f"{n / 1e6:10,.0f} MB" for n in self[1:])


def ours(base: str, adapter: str, target: str, format_name: str) -> None:
    """Run our export as a step."""
    from pipeline.hub.convert import write_formats
    from pipeline.hub.models import find_model

    write_formats(find_model(base), Path(adapter), {format_name: Path(target)})


def merge(base: str, adapter: str, target: str) -> None:
    """Run the usual merge, in the type that the base is stored in, as a step."""
    import peft
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    peft.PeftModel.from_pretrained(network, adapter).merge_and_unload().save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(target)


def convert(folder: str, target: str, kind: str) -> None:
    """Run llama.cpp's script as a step.

    Its pre-tokenizer is set, because it recognizes those of published tokenizers only.
    """
    import importlib
    import runpy

    root = converter()
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    sys.argv = [str(root / "convert_hf_to_gguf.py"), folder, "--outfile", target, "--outtype", kind]
    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = (
        lambda self, tokenizer: "smollm"
    )
    runpy.run_path(sys.argv[0], run_name="__main__")


def quantize(source: str, target: str) -> None:
    """Run llama.cpp's quantization to Q4_K_M on all cores as a step."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize failed")


def prepare(smollm: str, base: str, adapter: str, sizes: str) -> None:
    """Make a random Llama in bfloat16 (or take SmolLM2), and a random adapter for it, as a step.

    `sizes` is its configuration as JSON; its tokenizer is SmolLM2's.
    """
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    if base == smollm:
        network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    else:
        config = transformers.AutoConfig.from_pretrained(smollm, **json.loads(sizes))
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        network.save_pretrained(base, max_shard_size="1GB")
        for file in Path(smollm).iterdir():
            if "token" in file.name or file.suffix == ".jinja":
                shutil.copy(file, base)
    wrapped = peft.get_peft_model(
        network, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    )
    wrapped.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    wrapped.save_pretrained(adapter)


STEPS = {f.__name__: f for f in (ours, merge, convert, quantize, prepare)}


def in_child(step: str, *arguments: str) -> None:
    """Run a step, then print what this process has held in memory and written."""
    STEPS[step](*arguments)
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    # What is written through a mapping counts in write_bytes alone.
    written = max(int(io["wchar"]), int(io["write_bytes"]))
    print(
        "\n" + json.dumps({"resident": _status(os.getpid(), "VmHWM"), "written": written}),
        flush=True,
    )


def run(step: str, *arguments: object) -> Cost:
    """Run one step in a process of its own."""
    os.sync()  # the previous step's unwritten data are not this one's work
    command = [sys.executable, __file__, "--step", step, *map(str, arguments)]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start, peak = time.perf_counter(), 0
        with subprocess.Popen(
            command, stdout=output, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        ) as child:
            while child.poll() is None:
                peak = max(peak, _anonymous(child.pid))
                time.sleep(0.01)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise RuntimeError(
                f"The step {step} failed:\n{errors.read().decode(errors='replace')[-3000:]}"
            )
        usage = json.loads(output.read().splitlines()[-1])
    return Cost(seconds, peak, usage["resident"], usage["written"])


def _anonymous(process: int) -> int:
    """Return the bytes of anonymous memory of a process and its children."""
    try:
        own = _status(process, "RssAnon")
        children = [
            n
            for file in Path(f"/proc/{process}/task").glob("*/children")
            for n in file.read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):  # the process or a thread has just ended
        return 0
    return own + sum(_anonymous(int(child)) for child in children)


def _status(process: int, field: str) -> int:
    """Return a field of /proc/PID/status in bytes; 0 for a zombie process."""
    status = Path(f"/proc/{process}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.M)
    return int(match[1]) * 1024 if match else 0


def usual(base: Path, adapter: Path, target: Path, format_name: str) -> Cost:
    """Run the programs that users combine today, one after the other."""
    merged, full = target.with_name("merged"), target.with_name("full.gguf")
    steps = [run("merge", base, adapter, merged)]
    if format_name == "Q4_K_M":
        steps += [run("convert", merged, full, "f16"), run("quantize", full, target)]
    else:
        steps += [run("convert", merged, target, format_name.lower())]
    seconds, anonymous, resident, written = zip(*steps, strict=True)
    return Cost(sum(seconds), max(anonymous), max(resident), sum(written))


def require_same(our_file: Path, usual_file: Path, tolerance: float) -> None:
    """Check that two files hold the same tensors in the same types, and nearly the same numbers.

    The numbers differ because the usual way rounds twice.

    Raises:
        RuntimeError: they do not, so that their costs must not be compared.
    """
    import gguf
    import numpy as np

    first, second = (
        {t.name: t for t in gguf.GGUFReader(path).tensors} for path in (our_file, usual_file)
    )
    kinds = [
        {(n, t.tensor_type.name, *t.shape.tolist()) for n, t in tensors.items()}
        for tensors in (first, second)
    ]
    if kinds[0] != kinds[1]:
        different = sorted(kinds[0] ^ kinds[1])[:6]
        raise RuntimeError(f"Tensors differ from the usual way's: {different}")
    for name in CHECKED:
        a, b = (
            np.asarray(gguf.quants.dequantize(t[name].data, t[name].tensor_type))
            for t in (first, second)
        )
        distance = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        if not distance <= tolerance:
            raise RuntimeError(
                f"{name} differs from the usual way's by {distance:.2%}, more than {tolerance:.0%}."
            )


def pair(base: Path, adapter: Path, format_name: str) -> tuple[Cost, Cost]:
    """Run our export and the usual way once; the files are compared and removed."""
    with tempfile.TemporaryDirectory(dir=adapter.parent) as work:
        our_file, usual_file = Path(work) / "ours.gguf", Path(work) / "usual.gguf"
        costs = (
            run("ours", base, adapter, our_file, format_name),
            usual(base, adapter, usual_file, format_name),
        )
        require_same(our_file, usual_file, 0.06 if format_name == "Q4_K_M" else 0.01)
    return costs


def prepared(
    smollm: Path, folder: Path, name: str, sizes: dict[str, int] | None = None
) -> tuple[Path, Path]:
    """Return a base (SmolLM2, or a random one of such `sizes`), and a random adapter for it."""
    print(f"{name}: making a random {'model and its ' if sizes else ''}adapter", flush=True)
    base, adapter = folder / name if sizes else smollm, folder / f"{name}-adapter"
    run("prepare", smollm, base, adapter, json.dumps(sizes))
    return base, adapter


def compare(
    name: str, base: Path, adapter: Path, rounds: int
) -> tuple[dict[str, Figure], list[str]]:
    """Return the figures of a model, and the lines of the table.

    Lines are medians of each way; figures are medians of the ratios of interleaved pairs.
    """
    costs: dict[str, list[tuple[Cost, Cost]]] = {format_name: [] for format_name in FORMATS}
    for n in range(rounds):
        for format_name, pairs in costs.items():
            print(f"{name} {format_name}: run {n + 1} of {rounds}", flush=True)
            pairs.append(pair(base, adapter, format_name))
            print(f"  ours  {pairs[-1][0]}\n  usual {pairs[-1][1]}", flush=True)
    figures, lines = {}, []
    for format_name, pairs in costs.items():
        for way, runs in zip(("ours", "usual"), zip(*pairs, strict=True), strict=True):
            medians = Cost(*map(statistics.median, zip(*runs, strict=True)))
            lines.append(f"{name} {format_name:7} {way:7}{medians}")
        bars = {
            "wall": 1 / 2 if format_name == "Q4_K_M" else 1 / 3,
            "memory": 1 / 3,
            "bytes": 1 / 2,
        }
        for (what, bar), field in zip(
            bars.items(), ("seconds", "anonymous", "written"), strict=True
        ):
            ratio = statistics.median(
                getattr(our, field) / getattr(their, field) for our, their in pairs
            )
            figures[f"{name}_{format_name}_{what}"] = Figure(ratio, bar)
    return figures, lines


def depth(smollm: Path, folder: Path) -> tuple[dict[str, Figure], list[str]]:
    """Return the figure of memory by depth, and the lines of the table."""
    costs = {}
    for layers in (4, 24):
        base, adapter = prepared(
            smollm, folder, f"{layers}-layers", {**DEEP, "num_hidden_layers": layers}
        )
        costs[layers] = run("ours", base, adapter, folder / "deep.gguf", "F16")
    lines = [f"{f'{layers} layers':13}{'ours':7}{cost}" for layers, cost in costs.items()]
    return {
        "memory_24_layers_against_4": Figure(costs[24].anonymous / costs[4].anonymous, 1.1)
    }, lines


def main() -> None:
    """Run both ways interleaved; the last line has the figures with their bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one run each, and SmolLM2-135M only")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return in_child(*options.step)
    needed, free, place = (
        4 if options.quick else 12,
        shutil.disk_usage(tempfile.gettempdir()).free / 1e9,
        tempfile.gettempdir(),
    )
    print(f"disk: about {needed} GB needed in {place}, {free:.0f} GB free", flush=True)
    if free < needed:
        raise SystemExit("Too little disk: set TMPDIR to a folder elsewhere.")
    from pipeline.hub.convert import cached_checkpoint
    from pipeline.hub.models import find_model

    converter()
    smollm = cached_checkpoint(find_model("smollm2-135m"))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        # After it neither way compiles its Python or reads it from the disk.
        pair(*prepared(smollm, folder, "warm-up", TINY), "Q4_K_M")
        parts = [compare("135M", *prepared(smollm, folder, "135M"), 1 if options.quick else 3)]
        if not options.quick:
            parts.append(compare("1.2B", *prepared(smollm, folder, "1.2B", LARGE), 1))
        parts.append(depth(smollm, folder))
    print(f"\n{'':20}{'wall':>10}{'anonymous':>13}{'resident':>13}{'written':>13}")
    print("\n".join(line for _, lines in parts for line in lines))
    figures = {
        name: {"value": round(value, 3), "bar": round(bar, 3), "holds": value <= bar}
        for part, _ in parts
        for name, (value, bar) in part.items()
    }
    print(json.dumps({"bench": "export", "figures": figures}))


if __name__ == "__main__":
    main()
