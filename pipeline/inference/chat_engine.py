"""One or several models that answer in an interactive chat, each in its own thread.

Each model keeps one sequence for as long as the chat lasts, so that only new tokens are decoded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import NamedTuple

from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.inference.request import GenerationRequest, Job, TextPiece
from pipeline.inference.thoughts import opened_thought
from pipeline.records import Completion, Message, Request, Task

_POLL_SECONDS = 0.2


class AnswerPiece(NamedTuple):
    """A piece of a model's answer or, at its end, the completion."""

    model_index: int
    piece: TextPiece | Completion


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
    """One model, which answers the `requests` one after another until it gets None.

    `chat` is the engine of all models, for what they share.
    """

    def __init__(self, index: int, engine: BatchEngine, chat: ChatEngine) -> None:
        super().__init__(name=f"gatt chat {index}", daemon=True)
        self.engine, self.requests = engine, SimpleQueue[Request | None]()
        self._index, self._turns, self._pieces = index, chat.turns, chat.pieces
        self._context, self._stopping = chat.context, chat.stopping

    def run(self) -> None:
        """Answer all requests as one task of the engine, which keeps the cache between them."""
        task = self._task()
        try:
            # Texts reach `_Turn._is_over`.
            self.engine.run([task], lambda text: None, self._stopping)
        except Exception as error:  # raised again by `ChatEngine.generate`
            task.close()  # releases the turn for the other models
            self._pieces.put(_Failure(error))

    def _task(self) -> Task:
        while (request := self.requests.get()) is not None:
            self._turns.acquire()
            try:
                turn = _Turn(self._limited(request), self._put, self._take_turns)
                completion = turn.end((yield turn.request))
            finally:
                self._turns.release()
            self._put(completion)

    def _limited(self, request: Request) -> GenerationRequest:
        """Return the request with what the context has left for thoughts."""
        prompt = self.engine.template.render(request.messages)
        tokens = self.engine.tokenize(prompt)
        spare = self._context - len(tokens) - request.max_tokens
        sampling = replace(request, max_thought_tokens=max(spare, 0))
        return GenerationRequest(tokens=tokens, sampling=sampling, thought=opened_thought(prompt))

    def _put(self, piece: TextPiece | Completion) -> None:
        self._pieces.put(AnswerPiece(self._index, piece))

    def _take_turns(self) -> bool:
        """Let another model compute, after each token; return whether to stop."""
        self._turns.release()
        self._turns.acquire()
        return self._stopping.is_set()


class _Turn:
    """One answer: passes on its pieces, and tells its thoughts, which have a maximum of their own.

    `take_turns` is called after each token, and returns whether to stop.
    """

    def __init__(
        self,
        request: GenerationRequest,
        on_piece: Callable[[TextPiece], None],
        take_turns: Callable[[], bool],
    ) -> None:
        self._job = Job(request, self._add, lambda result: None)
        self._on_piece, self._take_turns = on_piece, take_turns
        self._text = self._thoughts = ""
        self._characters = self._tokens = 0
        self._cancelled = False
        max_tokens = request.sampling.max_tokens + request.thought_tokens
        self.request = replace(request.sampling, max_tokens=max_tokens, stop_when=self._is_over)
        """What the engine is asked for: it counts thoughts and answer alike."""

    def end(self, completion: Completion) -> Completion:
        """Return the completion without its thoughts."""
        self._job.emit(completion.text[self._characters :], completion.tokens)
        self._job.flush()
        finish = completion.finish
        if self._cancelled or finish == "cancelled":
            finish = "cancelled"
        elif self._job.thinking:
            finish = "thinking"
        elif finish == "stop_when":
            finish = "length"
        return replace(completion, text=self._text, thoughts=self._thoughts, finish=finish)

    def _is_over(self, text: str) -> bool:
        """Pass on what is new in the text so far; return whether to stop."""
        self._tokens += 1
        self._job.emit(text[self._characters :], self._tokens)
        self._characters = len(text)
        self._cancelled = self._take_turns()
        return self._cancelled or self._tokens >= self._job.max_tokens

    def _add(self, piece: TextPiece) -> None:
        self._text += piece.text
        self._thoughts += piece.thoughts
        self._on_piece(piece)


class ChatEngine:
    """The models of a chat, with a context of `context` tokens each; none of them is closed here.

    Raises:
        GattError: an adapter of another base, or too little memory.
    """

    def __init__(self, models: Sequence[tuple[LoadedModel, Adapter | None]], context: int) -> None:
        self.context = context
        self._models = models
        self.stopping = threading.Event()
        self.turns = TurnLock()
        self.pieces = SimpleQueue[AnswerPiece | _Failure]()
        engines: list[BatchEngine] = []
        try:
            for model, adapter in models:
                engines.append(BatchEngine(model, 1, context, adapter=adapter))
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        self._threads = [_ModelThread(index, engine, self) for index, engine in enumerate(engines)]
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
        self.stopping.set()
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
        """End the running answers at their next token, or within the prompt.

        May be called from a signal handler.
        """
        self.stopping.set()

    def generate(self, requests: Sequence[Request]) -> Iterator[AnswerPiece]:
        """Answer one request with each model; yield the pieces, and each completion at its end.

        A stopped answer has the `finish` "cancelled". The iterator must be exhausted: a piece that
        is left over would be part of the next answer.
        """
        self.stopping.clear()
        for thread, request in zip(self._threads, requests, strict=True):
            thread.requests.put(request)
        running = len(requests)
        while running:
            try:
                # Without a timeout Windows would not deliver Ctrl-C.
                piece = self.pieces.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
            if isinstance(piece, _Failure):
                raise piece.error
            running -= isinstance(piece.piece, Completion)
            yield piece
