"""Look at a GGUF from a child process, which a broken file may abort: what llama.cpp makes of texts and tokens.

`python -m pipeline.export.verify FILE ADAPTER QUESTIONS.json ANSWERS.npz` is the child; ADAPTER is "-" for none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array
from pipeline.inference.model import Adapter


class LoadedFile(NamedTuple):
    """Token ids of each text, and (tokens, vocabulary) logits of what follows each token of all sequences."""

    ids: list[list[int]]
    logits: Array


def load_and_predict(
    path: Path,
    texts: Sequence[str],
    sequences: Sequence[Sequence[int]],
    adapter: Path | None = None,
) -> LoadedFile:
    """Load `path` in llama.cpp, tokenize `texts` and read `sequences` of token ids (without any: load no weights).

    Raises:
        GattError: llama.cpp refuses the file, or dies of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        questions, answers = Path(folder) / "questions.json", Path(folder) / "answers.npz"
        questions.write_text(
            json.dumps({"texts": list(texts), "sequences": [list(s) for s in sequences]}),
            encoding="utf-8",
        )
        command = [
            sys.executable,
            "-m",
            "pipeline.export.verify",
            path,
            adapter or "-",
            questions,
            answers,
        ]
        # The child finds this package where the parent did.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or [
                f"it died with status {done.returncode}"
            ]
            raise GattError(f"llama.cpp cannot use {path.name}: {why[0]}")
        with np.load(answers) as found:
            ends = np.cumsum(found["lengths"])[:-1]
            return LoadedFile(
                [part.tolist() for part in np.split(found["ids"], ends)] if texts else [],
                found["logits"],
            )


def _answer(path: Path, adapter: Path | None, questions: Path, answers: Path) -> None:
    """The child's part."""
    from pipeline.gguf.reader import open_gguf
    from pipeline.inference.batch_worker import BatchWorker
    from pipeline.inference.model import LoadedModel

    asked = json.loads(questions.read_text(encoding="utf-8"))
    sequences = asked["sequences"]
    weights = LoadedModel(open_gguf(path), vocabulary_only=not sequences)
    ids = [weights.tokenize(text) for text in asked["texts"]]
    logits = np.empty((sum(map(len, sequences)), weights.vocabulary), np.float32)
    if sequences:
        longest = max(map(len, sequences)) + 1
        worker = BatchWorker(
            weights, 1, longest, "F32", os.cpu_count() or 1, Adapter(adapter) if adapter else None
        )
        for place, row in enumerate(chain.from_iterable(map(worker.logits, sequences))):
            logits[place] = row
        worker.close()
    weights.close()
    flat = np.array([id for text in ids for id in text], np.int32)
    np.savez(answers, ids=flat, lengths=[len(text) for text in ids], logits=logits)


if __name__ == "__main__":
    file, adapter_file, *rest = sys.argv[1:]
    try:
        _answer(Path(file), None if adapter_file == "-" else Path(adapter_file), *map(Path, rest))
    except GattError as error:
        sys.exit(str(error))
