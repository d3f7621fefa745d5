"""Measure adherence at the checkpoints of training, through llama.cpp, on held-out dialogues."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.rollout import Rollout, Turn
from pipeline.gatt.seeds import derive_seed
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.formats import uniform_format
from pipeline.gguf.merge import open_base, plan_merge, write
from pipeline.gguf.reader import open_gguf
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import context_for
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.recipe import Recipe
from pipeline.records import Reply, Request

_MAX_TOKENS = 48
"""Tokens of a reply."""


class Validation:
    """Held-out `dialogues` that each checkpoint answers, for up to `max_turns` turns.

    The base, the GGUF `file`, is loaded once, and each checkpoint's adapter is applied to it. DoRA
    adapters cannot be applied by llama.cpp and are merged.
    """

    def __init__(
        self, file: Path, dialogues: Sequence[AssignedDialogue], recipe: Recipe, max_turns: int = 8
    ) -> None:
        self._file, self._dialogues = file, dialogues
        self._recipe, self._max_turns = recipe, max_turns
        self._weights = None if recipe.train.dora else LoadedModel(open_gguf(file))

    def close(self) -> None:
        """Free the memory of the base."""
        if self._weights:
            self._weights.close()

    def measure(self, checkpoint: Path) -> list[Reply]:
        """Return the replies of the base with the PEFT adapter in the folder `checkpoint`.

        Replies whose turn 1 had left the context window are left out.
        """
        replies: list[Reply] = []
        rollout = Rollout(
            arm=checkpoint.name,
            max_turns=self._max_turns,
            make_request=self._request,
            record=replies.append,
        )
        with self._open(checkpoint) as engine:
            engine.run(map(rollout.run, self._dialogues))
        return [reply for reply in replies if reply.finish != "context"]

    def _request(self, dialogue: AssignedDialogue, turn: Turn, answers: list[str]) -> Request:
        return Request(
            messages=dialogue.student_prompt(answers, self._recipe.dialogues.system),
            seed=derive_seed(self._recipe.seed, dialogue.dialogue.id, turn.number - 1),
            max_tokens=_MAX_TOKENS,
            temperature=self._recipe.evaluate.temperature,
        )

    @contextmanager
    def _open(self, checkpoint: Path) -> Iterator[BatchEngine]:
        count, context = len(self._dialogues), context_for(self._max_turns, _MAX_TOKENS)
        with tempfile.TemporaryDirectory() as folder:
            gguf = Path(folder) / f"{checkpoint.name}.gguf"
            if not self._weights:
                merged = plan_merge(self._file, checkpoint)
                write(merged, {gguf: uniform_format(merged.tensors, "Q8_0")})
                with BatchEngine(gguf, count, context) as engine:
                    yield engine
                return
            write_adapter(open_base(self._file), checkpoint, gguf)
            with BatchEngine(self._weights, count, context, adapter=Adapter(gguf)) as engine:
                yield engine
            self._weights.unload_adapter(Adapter(gguf))
