"""The chat templates of a Hugging Face folder, from every place where transformers looks.

A folder has one template, or several with names. transformers 5 takes the one named "default"
(`PreTrainedTokenizerBase.get_chat_template`), and its files before `tokenizer_config.json`.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import GattError
from pipeline.gguf.huggingface.config import read_object

DEFAULT = "default"


def read_chat_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by name; {} if it has none.

    Raises:
        GattError: a file is not readable, or the templates are neither a text nor a list.
    """
    file = folder / "chat_template.jinja"
    by_name = {DEFAULT: _read(file)} if file.is_file() else {}
    for extra in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        by_name[extra.stem] = _read(extra)
    if by_name:
        return by_name
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        templates = read_object(folder / name).get("chat_template")
        if templates:
            return _by_name(templates, folder / name)
    return {}


def read_chat_template(folder: Path) -> str:
    """Return the chat template that chats are rendered with, or "" if the folder has none.

    Raises:
        GattError: as `read_chat_templates`, or several templates of which none is the default.
    """
    return choose_template(read_chat_templates(folder), str(folder))


def choose_template(by_name: dict[str, str], source: str) -> str:
    """Return the default of named templates, or "" where there are none.

    Raises:
        GattError: none of them is the default.
    """
    if by_name and DEFAULT not in by_name:
        raise GattError(
            f"{source} has chat templates named {', '.join(by_name)}, and none named {DEFAULT}. "
            f"Save the one to use as chat_template.jinja in the model's folder."
        )
    return by_name.get(DEFAULT, "")


def _by_name(templates: object, source: Path) -> dict[str, str]:
    if isinstance(templates, str):
        return {DEFAULT: templates}
    try:
        if isinstance(templates, dict):
            return {str(name): str(text) for name, text in templates.items()}
        if isinstance(templates, list):
            return {str(entry["name"]): str(entry["template"]) for entry in templates}
    except (KeyError, TypeError):
        pass
    raise GattError(
        f"{source}: chat_template is neither a text nor a list of templates with names. "
        "Download the checkpoint again."
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise GattError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error
