"""Generation for requests that come at any time: batched with those that run, and each conversation's cache is kept.

Every core has a context and a thread of its own over one copy of the weights (`lanes`), as in `llama`. Unlike there, no token
is fed a second one for company: what is reused or runs beside an answer may change its rounding (`streams` says why).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.gguf.reader import open_gguf
from pipeline.inference.cpu_monitor import FreeCores
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.inference.scheduler import (
    EngineClosedError,
    EngineStats,
    GenerationRequest,
    GenerationResult,
    Job,
    Limits,
    ServedModel,
)
from pipeline.records import Message

LIMITS = Limits()


class ModelSource(NamedTuple):
    """A model to be served: a GGUF file, and what is laid over it. Sources of one file share its weights."""

    path: Path
    adapter: Adapter | None = None


class AnswerStream:
    """An answer on its way: iterate to get its pieces of text; `outcome` is there when it has ended.

    Raises, while iterated:
        Closed: the engine was stopped.
        RuntimeError: a step failed.
    """

    def __init__(
        self,
        model: ServedModel,
        question: GenerationRequest,
        observe: Callable[[GenerationResult], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.outcome: GenerationResult | None = None
        self._pieces: asyncio.Queue[str | GenerationResult] = asyncio.Queue()
        self._model = model

        def tell(piece: str | GenerationResult) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        def end(outcome: GenerationResult) -> None:
            observe(outcome)
            tell(outcome)

        self._job = Job(question, tell, end)
        model.submit(self._job)

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> str:
        if self.outcome:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, str):
            return piece
        self.outcome = piece
        if piece.finish == "closed":
            raise EngineClosedError("The server is stopping. Try again when it is back.")
        if piece.finish == "failed":
            raise RuntimeError("generation failed; the server's log says why")
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End it before its next token."""
        if not self.outcome:
            self._model.cancel(self._job)

    async def ended(self) -> GenerationResult:
        """How it ended, after the pieces that nobody has taken."""
        while not self.outcome:
            piece = await self._pieces.get()
            self.outcome = None if isinstance(piece, str) else piece
        return self.outcome


class AsyncEngine:
    """The models of `sources` by name, ready to answer. `observe`, once set, is told of every answer's end, from any thread.

    Raises:
        GattError: no GGUF, a broken one, an adapter of another base, or too little memory.
    """

    def __init__(self, sources: Mapping[str, ModelSource], limits: Limits = LIMITS) -> None:
        self.observe: Callable[[str, GenerationResult], None] = lambda name, outcome: None
        self._cores = FreeCores()
        self._weights = {
            path: LoadedModel(open_gguf(path))
            for path in dict.fromkeys(s.path for s in sources.values())
        }
        self._models = {
            name: ServedModel(name, self._weights[s.path], s.adapter, limits, self._threads)
            for name, s in sources.items()
        }
        self._lanes = [lane for model in self._models.values() for lane in model.decode_threads]
        for thread in (self._cores, *self._lanes):
            thread.start()

    @property
    def names(self) -> list[str]:
        """The models that are served."""
        return list(self._models)

    def chat_tokens(self, name: str, messages: tuple[Message, ...]) -> list[int]:
        """The prompt for the next assistant message.

        Raises:
            GattError: the model's chat template refuses this chat.
        """
        weights = self._models[name].weights
        try:
            text = weights.template.render(messages)
        except GattError:
            raise
        except Exception as error:  # a template is a program, which can fail in any way
            raise GattError(
                f"The model's chat template fails on this chat ({type(error).__name__}: {error})."
            ) from error
        return weights.tokenize(text)

    def text_tokens(self, name: str, text: str) -> list[int]:
        """The prompt for what follows a text that is no chat."""
        return self._models[name].weights.tokenize(text, opening=True)

    def context(self, name: str) -> int:
        """Tokens that prompt and answer may have together."""
        return self._models[name].context

    def state(self, name: str) -> EngineStats:
        """What the model is doing."""
        return self._models[name].state()

    def ask(self, name: str, question: GenerationRequest) -> AnswerStream:
        """Begin to answer; to be called in a running event loop, where the answer is then iterated.

        Raises:
            TooLong: prompt and answer do not fit in the context.
            Busy: too many wait already.
            Closed: the engine was stopped.
        """
        return AnswerStream(
            self._models[name], question, lambda outcome: self.observe(name, outcome)
        )

    def stop(self) -> None:
        """End all answers, as soon as their present step is done; may be called from anywhere."""
        for model in self._models.values():
            model.stop()

    def close(self) -> None:
        """Stop, wait for the threads and give the memory back."""
        self._cores.close()
        self.stop()
        for model in self._models.values():
            model.close()
        for weights in self._weights.values():
            weights.close()
        self._models, self._weights = {}, {}

    def _threads(self) -> int:
        """How many threads each lane may use: the free cores are shared by those that have something to do."""
        return max(1, self._cores.count // max(1, sum(lane.active for lane in self._lanes)))
