"""What MODEL names: a GGUF, a Hugging Face folder, an adapter on the model before it, a server."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from pipeline.errors import GattError
from pipeline.exam.settings import default_context
from pipeline.files import sha256
from pipeline.folders import lock_file
from pipeline.gguf.lora.settings import CONFIG
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.adapted import write_adapter_gguf
from pipeline.hub.convert import runnable_gguf
from pipeline.hub.models import Model, find_model
from pipeline.inference.chat_template import ChatTemplate
from pipeline.inference.generator import (
    EngineOptions,
    GenerationEngine,
    open_engine,
    open_generator,
    thought_room,
)
from pipeline.inference.llama.model import Adapter
from pipeline.inference.openai_client import OpenAIClient
from pipeline.inference.remote.address import is_server_url, parse_servers, served_name
from pipeline.records import Message
from pipeline.system import cache_path

_BYTES_PER_TOKEN = 4
"""Of English text: how the reminders of a server's prompts are counted."""
_CELLS = 256
"""llama.cpp rounds a context up to a multiple of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamModel:
    """A model to examine: a GGUF at `path`, perhaps with an adapter on it, or a `server`.

    `sha256` and `adapter_sha256` are those of the files that were named, "" where there is none.
    """

    name: str
    path: Path | None = None
    adapter: Adapter | None = None
    server: str = ""
    sha256: str = ""
    adapter_sha256: str = ""

    @property
    def file_stem(self) -> str:
        """Return the name as the beginning of a file name."""
        return re.sub(r"[^\w.+#-]+", "_", self.name.partition("://")[2] or self.name).strip("_.")

    def context(self, turns: int, wanted: int) -> int:
        """Return the context in tokens: `wanted`, or the default; 0 for a server with its own.

        Raises:
            GattError: more than the model was trained for.
        """
        if self.path is None:
            return 0
        trained = open_gguf(self.path).context_length
        if wanted > trained:
            raise GattError(
                f"--context {wanted}: {self.name} was trained for {trained} tokens. Take at most "
                "these."
            )
        return -(-wanted // _CELLS) * _CELLS or default_context(turns, trained)

    @property
    def has_system_role(self) -> bool:
        """Return whether the chat template takes a system message; of a server it is assumed."""
        if self.path is None:
            return True
        info = open_gguf(self.path)
        template = ChatTemplate(info.chat_template, info.bos, info.eos, self.path.name)
        messages: list[Message] = [
            {"role": "system", "content": "QXSYSTEMXQ"},
            {"role": "user", "content": "Hello."},
        ]
        try:
            return "QXSYSTEMXQ" in template.render(messages)
        except GattError:
            return False

    def served_model(self) -> str:
        """Return the model that the server lists first, which it is asked for.

        "" where the address names a model, nobody answers, or there is no server.
        """
        if not self.server or parse_servers(self.server).model:
            return ""
        client = OpenAIClient(self.server)
        with suppress(GattError):  # a finished exam is read without its server
            client.run(())
        return client.name

    def open(
        self, dialogues: int, context: int, max_parallel: int, max_thought_tokens: int
    ) -> GenerationEngine:
        """Open the model for up to `dialogues` dialogues of `context` tokens, and its thoughts.

        Raises:
            GattError: as `open_generator`.
        """
        if self.path is None:
            return open_generator(
                self.server, dialogues=dialogues, context=context, max_parallel=max_parallel
            )
        context += thought_room(self.path, max_thought_tokens)
        options = EngineOptions(
            dialogues=dialogues, context=context, max_parallel=max_parallel, adapter=self.adapter
        )
        return open_engine(self.path, options)


@runtime_checkable
class _HasTokenizer(Protocol):
    """An engine that knows the tokens of its model; a server does not tell them."""

    def tokenize(self, text: str) -> list[int]: ...


def token_counter(engine: GenerationEngine) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text; with a server, it estimates them."""
    if isinstance(engine, _HasTokenizer):
        return lambda text: len(engine.tokenize(text))
    return estimated_tokens


def estimated_tokens(text: str) -> int:
    """Return about how many tokens an English text has."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def find_models(names: Sequence[str]) -> list[ExamModel]:
    """Return the models called `names`; an adapter is one on the last model before it.

    Raises:
        GattError: no such model, an adapter without a model before it, or two of one name.
    """
    models: list[ExamModel] = []
    base: tuple[Model, Path] | None = None
    for name in names:
        if is_server_url(name):
            models.append(ExamModel(name=served_name(name), server=name))
        elif _is_adapter(Path(name).expanduser()):
            models.append(_with_adapter(Path(name).expanduser(), base))
        else:
            model = find_model(name)
            base = model, runnable_gguf(model)
            models.append(ExamModel(name=model.name, path=base[1], sha256=sha256(model.path)))
    ((name, count), *_) = Counter(model.file_stem for model in models).most_common(1)
    if count > 1:
        is_served = any(model.server for model in models if model.file_stem == name)
        advice = (
            "Examine them one at a time, each with its own --out, and compare the result files "
            "with `gatt compare`."
            if is_served
            else "Rename one of the files or folders."
        )
        raise GattError(f"Two models have the name {name!r}. {advice}")
    return models


def _is_adapter(path: Path) -> bool:
    if path.is_dir():
        return (path / CONFIG).is_file()
    return path.is_file() and read_gguf(path).field("general.type") == "adapter"


def _with_adapter(path: Path, base: tuple[Model, Path] | None) -> ExamModel:
    if base is None:
        raise GattError(
            f"{path} is an adapter. Name the model that it was trained on before it: `gatt exam "
            f"BASE {path}`."
        )
    model, gguf = base
    resolved = path.resolve()
    return ExamModel(
        name=f"{model.name}+{resolved.name if resolved.is_dir() else resolved.stem}",
        path=gguf,
        adapter=Adapter(path if path.is_file() else _adapter_gguf(path, model)),
        sha256=sha256(model.path),
        adapter_sha256=sha256(path),
    )


def _adapter_gguf(folder: Path, model: Model) -> Path:
    """Return a PEFT folder as a GGUF, made once.

    Raises:
        GattError: it is of another base, or more than llama.cpp can apply.
    """
    target = cache_path(f"adapters/{sha256(folder)[:16]}-{sha256(model.path)[:16]}.gguf")
    if not target.exists():
        with lock_file(target):
            if not target.exists():
                write_adapter_gguf(model.path, folder, target)
    return target
