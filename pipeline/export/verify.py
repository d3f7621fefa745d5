"""Checks of a GGUF file: llama.cpp must read chats in the tokens of training, and predict what the
trained model does.

llama.cpp makes a control token of every token that looks like one to it, such as `</s>`, an
ordinary token of Qwen2.5 (`llama_vocab::impl::load`). It reads these wherever a text spells them
out, where the tokenizer reads plain text; all other texts have to be read in the same tokens.

A broken file may abort the process, so it is loaded in a child process: `python -m
pipeline.export.verify FILE ADAPTER INPUT.json OUTPUT.npz`, where "-" stands for no adapter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.gatt.ghost import augment
from pipeline.gguf.base import Array
from pipeline.gguf.reader import open_gguf
from pipeline.inference.chat_template import NO_THINKING, ChatTemplate
from pipeline.inference.llama.model import Adapter, ContextSettings
from pipeline.inference.logits import Logits, mean_kl
from pipeline.records import Message
from pipeline.system import core_count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_KL = {8: 0.2, 4: 2.0, 2: 3.0, 1: 4.0}
"""Nats per token between a model in full precision and a file with at least so many bits a weight,
above which something is wrong.

Measured for SmolLM2-135M, and the loss shrinks with size: 0.007 in Q8_0, at most 0.57 in 4 bits
(Q4_0), 0.61 in 3 and 0.82 in 2 (IQ2_XXS), 1.6 in 1 (IQ1_S). Formats for ternary models (TQ1_0) are
15 away."""
_4BIT_KL = 1.8
"""What is added where the model was trained in 4 bits: its adapter is 0.3 to 0.4 away when it is
merged into 16-bit weights."""
_DATE = datetime(2024, 7, 26)
"""Date that templates write in both renderings, which otherwise could fall on different days."""
_TRICKY_TEXTS = (
    "Hi",
    "  spaces before and after  ",
    "line\n\n\nbreaks,\ttabs\r\nand 1234567890",
    "naïve café, 漢字 и 🙂‍↔️ é",
    "It's 2,026 and I'll pay €35.50 {\"x\": [1, 2]} x**2",
)
"""Texts that are known to expose differences between tokenizers."""
_SPELLED_TOKENS = ("<|im_end|>", "</s>", "<eos>", "<|eot_id|>", "[/INST]", "<think>")
"""Control tokens of some models, which users may quote; each has a chat of its own."""


class LoadedFile(NamedTuple):
    """What llama.cpp made of a file's inputs.

    `token_ids` are those of each text. `logits` are those of the sequences. `control_tokens` are
    the ids of the tokens that it takes for control tokens, by their texts.
    """

    token_ids: list[list[int]]
    logits: Logits
    control_tokens: dict[str, int]


class SampleChats(NamedTuple):
    """Chats that a GGUF's chat template accepts, and the text that it renders for each."""

    messages: list[list[Message]]
    texts: list[str]


class Divergence(NamedTuple):
    """Nats per token from the trained model and from the F16 merge; None where not known."""

    kl_trained: float | None = None
    kl_f16: float | None = None


def max_kl(format_name: str, *, in_4bit: bool) -> float:
    """Return nats per token between the trained model and a file, above which something is wrong.

    The bits of a format are the first number in its name. `in_4bit` tells what the trained model
    was when its predictions were taken.
    """
    bits = int(re.findall(r"\d+", format_name)[0])
    limit = next(limit for least, limit in _MAX_KL.items() if bits >= least)
    return limit + (_4BIT_KL if in_4bit else 0.0)


def verify_file(
    file: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    reference: Logits | None,
    f16_logits: Array | None,
    limit: float,
) -> Divergence:
    """Load a file in llama.cpp and compare its tokens with `tokenizer` and its logits with
    `reference`.

    Without a tokenizer tokens are not compared; without a reference the file is only loaded and
    run.

    Raises:
        GattError: they differ, or llama.cpp cannot use the file.
    """
    chats = sample_chats(file)
    loaded = load_and_predict(file, chats.texts, reference.sequences if reference else [[0, 0]])
    mismatch = find_mismatch(chats, loaded, tokenizer) if tokenizer else ""
    if mismatch:
        raise GattError(
            f"llama.cpp would tokenize chats for {file.name} differently from the training "
            f"tokenizer ({mismatch}). Nothing was replaced."
        )
    if not reference:
        return Divergence()
    kl = require_close(file.name, reference, loaded.logits, limit)
    return Divergence(kl, None if f16_logits is None else mean_kl(f16_logits, loaded.logits.values))


def require_close(name: str, reference: Logits, logits: Logits, limit: float) -> float:
    """Return the divergence of `logits` from the trained model's in nats per token.

    Raises:
        GattError: it is `limit` or more.
    """
    kl = mean_kl(reference.values, logits.values)
    if not kl < limit:  # also where it is NaN
        raise GattError(
            f"{name} does not predict what the trained model does: the divergence is {kl:.2f} nats "
            f"per token, less than {limit:.1f} expected. Nothing was replaced."
        )
    return kl


def sample_chats(file: Path) -> SampleChats:
    """Return the chats to tokenize with the GGUF `file`; some templates refuse system messages.

    Raises:
        GattError: its chat template refuses every chat, or fails.
    """
    info = open_gguf(file)
    template = ChatTemplate(info.chat_template, info.bos, info.eos, info.path.name)
    texts = (*_TRICKY_TEXTS, *(f"What does {token} mean?" for token in _SPELLED_TOKENS))
    chats: list[list[Message]] = [[{"role": "user", "content": text}] for text in texts]
    replies = [text.strip() for text in reversed(_TRICKY_TEXTS[1:])]
    long = list(augment(_TRICKY_TEXTS, replies, [""] * len(_TRICKY_TEXTS), ""))
    accepted, refusals = SampleChats([], []), []
    for chat in [*chats, long, [Message(role="system", content="Be brief."), *long]]:
        try:
            text = template.render(chat, now=_DATE)
        except GattError as error:
            refusals.append(error)
            continue
        accepted.messages.append(chat)
        accepted.texts.append(text)
    if not accepted.texts:
        raise refusals[0]
    return accepted


def find_mismatch(
    chats: SampleChats, loaded: LoadedFile, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Describe the first token of llama.cpp that is not the Hugging Face tokenizer's; "" if all
    agree.

    Messages that spell out one of `overridden_tokens` are not compared.
    """
    overridden = overridden_tokens(loaded, tokenizer)
    for chat, text, ids in zip(*chats, loaded.token_ids, strict=True):
        if any(token in message["content"] for message in chat for token in overridden):
            continue
        expected = list(
            tokenizer.apply_chat_template(
                chat,
                add_generation_prompt=True,
                return_dict=False,
                strftime_now=_DATE.strftime,
                **NO_THINKING,
            )
        )
        if ids != expected:
            pairs = enumerate(zip(ids, expected, strict=False))
            n = next((n for n, (a, b) in pairs if a != b), min(len(ids), len(expected)))
            return f"token {n} of {text[:60]!r}: {ids[n : n + 3]} instead of {expected[n : n + 3]}"
    return ""


def overridden_tokens(loaded: LoadedFile, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that llama.cpp reads as control tokens, and `tokenizer` as plain text."""
    texts = list(filter(None, loaded.control_tokens))
    if not texts:
        return []
    read = tokenizer(texts, add_special_tokens=False)["input_ids"]
    pairs = zip(texts, read, strict=True)
    return [text for text, ids in pairs if list(ids) != [loaded.control_tokens[text]]]


def load_and_predict(
    path: Path,
    texts: Sequence[str],
    sequences: Sequence[Sequence[int]],
    adapter: Path | None = None,
) -> LoadedFile:
    """Load `path` in llama.cpp, tokenize `texts`, and predict each token of `sequences` of token
    ids.

    Without sequences no weights are loaded.

    Raises:
        GattError: llama.cpp refuses the file, or crashes on it.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "input.json", Path(folder) / "output.npz"
        inputs.write_text(
            json.dumps({"texts": list(texts), "sequences": [list(s) for s in sequences]}),
            encoding="utf-8",
        )
        command = (sys.executable, "-m", "pipeline.export.verify")
        # The child finds this package where the parent did.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [*command, str(path), str(adapter or "-"), str(inputs), str(outputs)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise GattError(f"llama.cpp cannot use {path.name}: {lines[-1]}")
        with np.load(outputs) as arrays:
            ends = np.cumsum(arrays["lengths"])[:-1]
            token_ids = [part.tolist() for part in np.split(arrays["ids"], ends)] if texts else []
            logits = Logits([list(s) for s in sequences], arrays["logits"])
            return LoadedFile(token_ids, logits, json.loads(str(arrays["control_tokens"])))


def _child(path: Path, adapter: Path | None, inputs: Path, outputs: Path) -> None:
    """Do the work of `load_and_predict` in the child process."""
    from pipeline.inference.batch_worker import BatchWorker
    from pipeline.inference.llama.model import LoadedModel

    request = json.loads(inputs.read_text(encoding="utf-8"))
    sequences = request["sequences"]
    model = LoadedModel(open_gguf(path), vocab_only=not sequences)
    token_ids = [model.tokenize(text) for text in request["texts"]]
    control_tokens = json.dumps(model.control_tokens())
    logits = np.empty((sum(map(len, sequences)), model.vocab_size), np.float32)
    if sequences:
        longest = max(map(len, sequences)) + 1
        settings = ContextSettings(longest, "F32", Adapter(adapter) if adapter else None)
        worker = BatchWorker(model, 1, settings, core_count())
        for n, row in enumerate(chain.from_iterable(map(worker.logits, sequences))):
            logits[n] = row
        worker.close()
    model.close()
    flat = np.array([id for ids in token_ids for id in ids], np.int32)
    lengths = [len(ids) for ids in token_ids]
    np.savez(outputs, ids=flat, lengths=lengths, logits=logits, control_tokens=control_tokens)


if __name__ == "__main__":
    file_name, adapter_name, *json_and_npz = sys.argv[1:]
    try:
        adapter_file = None if adapter_name == "-" else Path(adapter_name)
        _child(Path(file_name), adapter_file, *map(Path, json_and_npz))
    except GattError as error:
        sys.exit(str(error))
