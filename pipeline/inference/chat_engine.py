"""One or several models that answer in an interactive chat, each in its own thread.

Each model keeps one sequence for as long as the chat lasts, so that only new tokens are decoded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import NamedTuple

from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.records import Completion, Message, Request, Task

_POLL_SECONDS = 0.2


class AnswerPiece(NamedTuple):
    """A piece of a model's answer or, at its end, the completion."""

    model_index: int
    piece: str | Completion


class _Failure(NamedTuple):
    """An error that ended a model's thread."""

    error: Exception


class TurnLock:
    """Lets one model compute at a time, for a token each, in the order in which they wait.

    Each model uses all cores, and its threads wait for each other at every operation: two models
    at once would slow each other down.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last_ticket = self._served = 0

    def acquire(self) -> None:
        """Wait for all who came before."""
        with self._changed:
            ticket = self._last_ticket
            self._last_ticket += 1
            self._changed.wait_for(lambda: self._served == ticket)

    def release(self) -> None:
        """Let the next one compute."""
        with self._changed:
            self._served += 1
            self._changed.notify_all()


class _ModelThread(threading.Thread):
    """One model, which answers the `requests` one after another until it gets None."""

    def __init__(
        self,
        index: int,
        engine: BatchEngine,
        turns: TurnLock,
        pieces: SimpleQueue[AnswerPiece | _Failure],
    ) -> None:
        super().__init__(name=f"gatt chat {index}", daemon=True)
        self.engine, self.requests = engine, SimpleQueue[Request | None]()
        self._index, self._turns, self._pieces = index, turns, pieces

    def run(self) -> None:
        """Answer all requests as one task of the engine, which keeps the cache between them."""
        task = self._task()
        try:
            self.engine.run([task], lambda text: self._pieces.put(AnswerPiece(self._index, text)))
        except Exception as error:  # raised again by `ChatEngine.generate`
            task.close()  # releases the turn for the other models
            self._pieces.put(_Failure(error))

    def _task(self) -> Task:
        while (request := self.requests.get()) is not None:
            self._turns.acquire()
            try:
                completion = yield request
            finally:
                self._turns.release()
            # In a chat only `ChatEngine.stop` makes `stop_when` true.
            if completion.finish == "stop_when":
                completion = replace(completion, finish="cancelled")
            self._pieces.put(AnswerPiece(self._index, completion))


class ChatEngine:
    """The models of a chat, with a context of `context` tokens each; none of them is closed here.

    Raises:
        GattError: an adapter of another base, or too little memory.
    """

    def __init__(self, models: Sequence[tuple[LoadedModel, Adapter | None]], context: int) -> None:
        self.context = context
        self._models = models
        self._stop = threading.Event()
        self._turns = TurnLock()
        self._pieces = SimpleQueue[AnswerPiece | _Failure]()
        engines: list[BatchEngine] = []
        try:
            for model, adapter in models:
                engines.append(BatchEngine(model, 1, context, adapter=adapter))
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        self._threads = [
            _ModelThread(index, engine, self._turns, self._pieces)
            for index, engine in enumerate(engines)
        ]
        for thread in self._threads:
            thread.start()

    def resized(self, context: int) -> ChatEngine:
        """Return the same models with another context, and close this engine.

        Raises:
            GattError: too little memory; this engine stays open.
        """
        engine = ChatEngine(self._models, context)
        self.close()
        return engine

    def close(self) -> None:
        """Free the memory of the contexts; the models stay loaded."""
        self._stop.set()
        for thread in self._threads:
            thread.requests.put(None)
        for thread in self._threads:
            thread.join()
            thread.engine.close()

    def count_tokens(
        self, model_index: int, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> int:
        """Return the number of tokens of a chat in a model's template."""
        engine = self._threads[model_index].engine
        text = engine.template.render(messages, add_generation_prompt=add_generation_prompt)
        return len(engine.tokenize(text))

    def stop(self) -> None:
        """End the running answers at their next token; may be called from a signal handler."""
        self._stop.set()

    def generate(self, requests: Sequence[Request]) -> Iterator[AnswerPiece]:
        """Answer one request with each model; yield the pieces, and each completion at its end.

        A stopped answer has the `finish` "cancelled". The iterator must be exhausted: a piece that
        is left over would be part of the next answer.
        """
        self._stop.clear()
        for thread, request in zip(self._threads, requests, strict=True):
            thread.requests.put(replace(request, stop_when=self._take_turns))
        running = len(requests)
        while running:
            try:
                # Without a timeout Windows would not deliver Ctrl-C.
                piece = self._pieces.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
            if isinstance(piece, _Failure):
                raise piece.error
            running -= isinstance(piece.piece, Completion)
            yield piece

    def _take_turns(self, text: str) -> bool:
        """Let another model compute, after each token; return whether to stop."""
        self._turns.release()
        self._turns.acquire()
        return self._stop.is_set()
