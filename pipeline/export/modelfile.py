"""The Modelfile of an exported GGUF, for `ollama create NAME -f Modelfile`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.export.ollama_template import OllamaTemplate, find_template
from pipeline.files import write_text
from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.inference.chat_template import ChatTemplate
from pipeline.inference.llama.model import LoadedModel
from pipeline.records import Message

_CONTEXT_TOKENS = 4096


def write_modelfiles(files: Sequence[Path], temperature: float, system: str) -> None:
    """Write a Modelfile next to each of the `files`, the formats of one model.

    The first has the name that Ollama expects; the names of the others end with their formats.
    """
    info = open_gguf(files[0])
    vocabulary = LoadedModel(info, vocab_only=True)
    adds_bos, _ = vocabulary.added_tokens
    vocabulary.close()
    template = choose_template(info, adds_bos=adds_bos)
    if isinstance(template, str):
        log(f"export: the Modelfile has no TEMPLATE. {template}")
    for file in files:
        suffix = "" if file == files[0] else f"-{file.stem.rpartition('-')[2]}"
        text = modelfile(info, template, file.name, temperature, system)
        write_text(file.parent / f"Modelfile{suffix}", text)


def choose_template(info: GgufInfo, *, adds_bos: bool) -> OllamaTemplate | str:
    """Return the template for Ollama, or the reason why there is none.

    It has no BOS where Ollama adds one, as llama.cpp does (`adds_bos`).
    """
    bos = info.bos if adds_bos else ""
    today = datetime.now()

    def render(messages: Sequence[Message]) -> str:
        return jinja.render(messages, now=today).removeprefix(bos)

    try:
        jinja = ChatTemplate(info.chat_template, info.bos, info.eos, info.path.name)
        template = find_template(render)
    except GattError as error:
        return " ".join(str(error).split())
    for text in (template.start, *(template.system or ()), template.prompt):
        # An action may follow a brace, and Ollama's parser drops unprintable characters.
        if "{" in text or '"""' in text or not re.sub(r"[\n\t]", "", text).isprintable():
            return f"A Modelfile cannot hold {text!r}, which the model's chat template writes."
    return template


def modelfile(
    info: GgufInfo,
    template: OllamaTemplate | str,
    file_name: str,
    temperature: float,
    system: str = "",
) -> str:
    """Return the text of a Modelfile for the GGUF `info`, which lies next to it as `file_name`.

    `system` is the system message of chats that bring none.

    Raises:
        GattError: a value that a Modelfile cannot hold.
    """
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{file_name}"]
    if isinstance(template, str):
        lines += [
            "# No TEMPLATE: Ollama then takes the template in the GGUF (older releases: a similar "
            "built-in one, or none).",
            f"# Reason: {template}",
        ]
    else:
        if not template.system:
            lines.append("# The model's chat template takes no system message; TEMPLATE skips it.")
        if "strftime_now" in info.chat_template:
            lines.append("# The date in TEMPLATE is the day of the export.")
        lines.append(f'TEMPLATE """{template.go()}"""')
    lines += [f"SYSTEM {_quote(system)}"] if system else []
    lines += [f"PARAMETER stop {_quote(text)}" for text in _stop_texts(info, template)]
    lines += [f"PARAMETER temperature {temperature:g}", f"PARAMETER num_ctx {_CONTEXT_TOKENS}"]
    license = info.field("general.license")
    lines += [f"LICENSE {_quote(license)}"] if license else []
    return "\n".join(lines) + "\n"


def _stop_texts(info: GgufInfo, template: OllamaTemplate | str) -> list[str]:
    """Return the texts that end a reply: EOS, EOT, and the end of a turn if it is a token.

    Unprintable ones are left out, because Ollama's parser would drop their characters; the model
    ends at the token itself in any case.
    """
    texts = [info.eos, info.token("eot")]
    end = "" if isinstance(template, str) else template.assistant.after.strip()
    if end in info.field("tokenizer.ggml.tokens", []):
        texts.append(end)
    return [text for text in dict.fromkeys(texts) if text and text.isprintable()]


def _quote(text: str) -> str:
    """Return a value of a Modelfile in quotes, which know no escapes.

    Triple quotes end at the end of a line only.

    Raises:
        GattError: a line of the value ends with triple quotes.
    """
    if re.search(r'"""\s*[\r\n]', text):
        raise GattError(f'A line that ends with """ cannot stand in a Modelfile: {text!r}.')
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
