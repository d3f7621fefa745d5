"""Measure adherence at the checkpoints of training, through llama.cpp, on held-out dialogues."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache, cached_property
from pathlib import Path

from pipeline.console import log
from pipeline.errors import GattError
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.rollout import Rollout, Turn
from pipeline.gatt.seeds import derive_seed
from pipeline.gguf.reader import open_gguf
from pipeline.hub.adapted import write_adapter_gguf, write_merged_gguf
from pipeline.hub.shape import ModelShape
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import context_for
from pipeline.inference.llama.gpu import gpu_devices
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.inference.llama.placement import MARGIN_BYTES, MIN_OUTPUTS, compute_buffer_bytes
from pipeline.recipe import Recipe
from pipeline.records import Reply, Request
from pipeline.system import cache_path

_MAX_TOKENS, _MAX_TURNS = 48, 8
"""Tokens of a reply, and turns of a dialogue."""
_BYTES_PER_WEIGHT = 34 / 32
"""Q8_0: blocks of 32 weights with a scale of two bytes."""
_CHEAP_SECONDS = 30.0
"""A validation of this length is never left out."""
_MAX_FRACTION = 0.25
"""Fraction of the training time that longer ones may take."""


_log_once = cache(log)


def require_validation(recipe: Recipe, dialogues: Sequence[AssignedDialogue]) -> None:
    """Check that training which is to stop early has `dialogues` to measure adherence on.

    Raises:
        GattError: it has none.
    """
    if dialogues or not recipe.train.early_stop_adherence:
        return
    if not recipe.dialogues.validation:
        advice = "Raise dialogues.validation"
    elif recipe.instructions.bake:
        advice = (
            "No sentence of the prompt is worded as a check: write one as in `gatt instructions "
            "--kinds`"
        )
    else:
        advice = "Give the instructions checks, or add dialogues if there are only a few"
    raise GattError(
        "train.early_stop_adherence needs validation dialogues whose constraints a program can "
        f"check. {advice}, or set train.early_stop_adherence = 0."
    )


class AdaptableBase:
    """The base model to which adapters are applied one after another.

    `make_file` returns its GGUF. It is loaded once, when it is first used. DoRA adapters (`dora`)
    cannot be applied by llama.cpp and are merged. Without `gpu`, all of it runs on the CPU.
    `folder` is what llama.cpp's own converter made the GGUF of; None if it was not needed. An
    adapter that it cannot write for this family is merged.
    """

    def __init__(
        self,
        make_file: Callable[[], Path],
        *,
        folder: Path | None = None,
        dora: bool = False,
        gpu: bool = True,
    ) -> None:
        self._make_file, self._folder = make_file, folder
        self._is_merged, self._gpu_layers = dora, None if gpu else 0
        self._weights: LoadedModel | None = None

    @cached_property
    def file(self) -> Path:
        """Return the GGUF."""
        return self._make_file()

    @property
    def weights(self) -> LoadedModel:
        """Return the loaded model."""
        if self._weights is None:
            self._weights = self._load(self.file)
        return self._weights

    def prepare(self) -> None:
        """Make the file now, and load it unless adapters may have to be merged into it."""
        file = self.file
        if not (self._is_merged or self._folder or self._weights):
            self._weights = self._load(file)

    def close(self) -> None:
        """Free the memory."""
        if self._weights:
            self._weights.close()
            self._weights = None

    @contextmanager
    def engine(self, adapter: Path, dialogues: int, context: int) -> Iterator[BatchEngine]:
        """Open the base with the PEFT adapter in the folder `adapter`, for up to `dialogues`.

        Each has `context` tokens, as far as the model was made for that many.
        """
        context = min(context, open_gguf(self.file).context_length)
        # On the disk of the caches, because a merge may take several gigabytes.
        with tempfile.TemporaryDirectory(dir=cache_path("adapted").parent) as folder:
            gguf = Path(folder) / f"{adapter.name}.gguf"
            if self._write_adapter(adapter, gguf):
                with BatchEngine(self.weights, dialogues, context, adapter=Adapter(gguf)) as engine:
                    yield engine
                self.weights.unload_adapter(Adapter(gguf))
                return
            write_merged_gguf(self._folder or self.file, adapter, gguf)
            with (
                closing(self._load(gguf)) as weights,
                BatchEngine(weights, dialogues, context) as engine,
            ):
                yield engine

    def _write_adapter(self, adapter: Path, target: Path) -> bool:
        """Write an adapter as a GGUF; return whether that is possible, or it must be merged."""
        if self._is_merged:
            return False
        try:
            write_adapter_gguf(self._folder or self.file, adapter, target)
        except GattError as error:
            if not self._folder:
                raise
            _log_once(f"train: adapters are merged into the base to be measured. {error}")
            self._is_merged = True
        return not self._is_merged

    def _load(self, file: Path) -> LoadedModel:
        return LoadedModel(open_gguf(file), gpu_layers=self._gpu_layers)


class Validation:
    """Held-out `dialogues` that each checkpoint answers, for up to `max_turns` turns.

    0 are those of the evaluation, at most 8.
    """

    def __init__(
        self,
        base: AdaptableBase,
        dialogues: Sequence[AssignedDialogue],
        recipe: Recipe,
        max_turns: int = 0,
    ) -> None:
        self._base, self._dialogues = base, dialogues
        self._recipe = recipe
        self._max_turns = max_turns or min(_MAX_TURNS, recipe.evaluate.turns)

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
        turns, system = self._max_turns, self._recipe.dialogues.system
        further = [d.further_tokens(turns, system=system) for d in self._dialogues]
        context = context_for(turns, _MAX_TOKENS) + max(further, default=0)
        with self._base.engine(checkpoint, len(self._dialogues), context) as engine:
            engine.run(map(rollout.run, self._dialogues))
        return [reply for reply in replies if reply.finish != "context"]

    def _request(self, dialogue: AssignedDialogue, turn: Turn, answers: list[str]) -> Request:
        return Request(
            messages=dialogue.student_prompt(answers, self._recipe.dialogues.system),
            seed=derive_seed(self._recipe.seed, dialogue.dialogue.id, turn.number - 1),
            max_tokens=_MAX_TOKENS,
            temperature=self._recipe.evaluate.temperature,
        )


class Schedule:
    """Decides at which checkpoints validation is worth its time.

    The first one is always validated. After a validation of more than 30 seconds, the next one
    waits until all of them together take at most a quarter of the training time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._seconds = self.last_seconds = 0.0

    def is_due(self) -> bool:
        """Return whether to validate now."""
        training = self._clock() - self._started - self._seconds
        expected = self._seconds + self.last_seconds
        return self.last_seconds <= _CHEAP_SECONDS or expected <= _MAX_FRACTION * training

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Measure how long a validation takes."""
        start = self._clock()
        yield
        self.last_seconds = self._clock() - start
        self._seconds += self.last_seconds


def validation_gpu_bytes(shape: ModelShape, dialogues: int) -> float:
    """Return the bytes that validation takes on a GPU beside training; 0 if llama.cpp has none.

    They are the weights and the output layer in Q8_0, a KV cache in float16 for each dialogue, and
    llama.cpp's compute buffer. The input embedding is in the computer's memory.
    """
    if not (dialogues and gpu_devices()):
        return 0
    n_ctx = context_for(_MAX_TURNS, _MAX_TOKENS)
    weights = shape.projection_parameters + shape.vocab_size * shape.hidden_size
    cells = min(dialogues, MIN_OUTPUTS) * n_ctx
    buffer = compute_buffer_bytes(
        hidden=shape.hidden_size,
        inner=shape.intermediate_size,
        vocab=shape.vocab_size,
        n_ctx=n_ctx,
        sequences=dialogues,
    )
    cache = 4 * cells * shape.num_hidden_layers * shape.kv_size
    return _BYTES_PER_WEIGHT * weights + cache + buffer + MARGIN_BYTES
