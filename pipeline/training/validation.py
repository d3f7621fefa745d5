"""Does the instruction hold yet? Asked at each checkpoint of training, through llama.cpp, of a few dialogues that are held out."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import obeys
from pipeline.gatt.quality import find_defect
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base, plan_merge, uniform_format, write
from pipeline.gguf.reader import open_gguf
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.recipe import Recipe
from pipeline.records import Request, Task

_TOKENS = 48


class Validation:
    """Over the base as a GGUF `file`, loaded once; each checkpoint's adapter is laid over it, for so many turns."""

    def __init__(
        self, file: Path, pairs: Sequence[AssignedDialogue], recipe: Recipe, turns: int = 8
    ) -> None:
        self._file, self._pairs, self._recipe, self._turns = file, pairs, recipe, turns
        self._weights = None if recipe.train.dora else LoadedModel(open_gguf(file))

    def close(self) -> None:
        """Give the memory back."""
        if self._weights:
            self._weights.close()

    def measure(self, folder: Path) -> list[tuple[int, bool]]:
        """Of each answer of the base with the adapter in `folder` the turn (from 1), and whether it keeps its instruction."""
        kept: list[tuple[int, bool]] = []
        with tempfile.TemporaryDirectory() as scratch, self._tuned(folder, Path(scratch)) as llama:
            llama.run(self._dialogue(pair, kept) for pair in self._pairs)
        return kept

    @contextmanager
    def _tuned(self, folder: Path, scratch: Path) -> Iterator[BatchEngine]:
        context, laid = self._turns * (_TOKENS + 60) + 200, scratch / f"{folder.name}.gguf"
        if not self._weights:
            whole = plan_merge(self._file, folder)
            write(whole, {laid: uniform_format(whole.tensors, "Q8_0")})
            with BatchEngine(laid, len(self._pairs), context) as llama:
                yield llama
            return
        write_adapter(open_base(self._file), folder, laid)
        with BatchEngine(self._weights, len(self._pairs), context, adapter=Adapter(laid)) as llama:
            yield llama
        self._weights.unload_adapter(Adapter(laid))

    def _dialogue(self, pair: AssignedDialogue, kept: list[tuple[int, bool]]) -> Task:
        said: list[str] = []
        recipe = self._recipe
        for turn in range(min(self._turns, len(pair.dialogue.turns))):
            seed = zlib.crc32(f"{recipe.seed} {pair.dialogue.id} {turn}".encode())
            messages = pair.student_prompt(said, recipe.dialogues.system)
            done = yield Request(messages, seed, _TOKENS, recipe.evaluate.temperature)
            if done.finish == "context":
                return
            text = done.text.strip()
            kept.append(
                (
                    turn + 1,
                    obeys(pair.constraints(turn), text)
                    and not find_defect(text, said, pair.required_words),
                )
            )
            said.append(text)
