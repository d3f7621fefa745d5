"""Models that talk: each one stream of its cache for as long as the chat lasts, so that only new tokens are ever fed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.records import Completion, Message, Request, Task

Heard = tuple[int, str | Completion]
"""Which model, and a piece of its answer or, last, the whole."""
_Heard = tuple[int, str | Completion | Exception]


class TurnLock:
    """Lets one model compute at a time, a token each in turn.

    Each wants all cores, and waits for its threads at every operation: two at once hold each other up.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = self._served = 0

    def take(self) -> None:
        """Wait until those who came before have had their turn."""
        with self._changed:
            mine = self._given
            self._given += 1
            self._changed.wait_for(lambda: self._served == mine)

    def give(self) -> None:
        """Let the next one go on."""
        with self._changed:
            self._served += 1
            self._changed.notify_all()


class _ModelThread:
    """One model in a thread of its own, which ends when it is asked None."""

    def __init__(
        self, number: int, llama: BatchEngine, turns: TurnLock, heard: SimpleQueue[_Heard]
    ) -> None:
        self.llama, self.asked = llama, SimpleQueue[Request | None]()
        self._number, self._turns, self._heard = number, turns, heard
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        task = self._task()
        try:
            self.llama.run([task], lambda piece: self._heard.put((self._number, piece)))
        except Exception as error:  # it is raised again where the answer is waited for
            task.close()  # which gives its turn to the other
            self._heard.put((self._number, error))

    def _task(self) -> Task:
        while (request := self.asked.get()) is not None:
            self._turns.take()
            try:
                completion = yield request
            finally:
                self._turns.give()
            self._heard.put((self._number, completion))


class ChatEngine:
    """One or several models side by side with room for `context` tokens each; equal weights are there once.

    Raises:
        GattError: an adapter of another base, or too little memory.
    """

    def __init__(self, models: Sequence[tuple[LoadedModel, Adapter | None]], context: int) -> None:
        self.context = context
        self._models = models
        self._stop = threading.Event()
        self._turns = TurnLock()
        self._heard = SimpleQueue[_Heard]()
        llamas: list[BatchEngine] = []
        try:
            for weights, adapter in models:
                llamas.append(BatchEngine(weights, 1, context, adapter=adapter))
        except BaseException:
            for llama in llamas:
                llama.close()
            raise
        self._speakers = [
            _ModelThread(n, llama, self._turns, self._heard) for n, llama in enumerate(llamas)
        ]

    def resized(self, context: int) -> ChatEngine:
        """The same models with other room, in place of these, which are closed.

        Raises:
            GattError: too little memory; these stay open.
        """
        other = ChatEngine(self._models, context)
        self.close()
        return other

    def close(self) -> None:
        """Give the memory of the caches back; the weights stay."""
        self._stop.set()
        for speaker in self._speakers:
            speaker.asked.put(None)
        for speaker in self._speakers:
            speaker.thread.join()
            speaker.llama.close()

    def tokens(self, side: int, messages: Sequence[Message], answer_follows: bool) -> int:
        """How much room a chat takes."""
        llama = self._speakers[side].llama
        return len(llama.tokenize(llama.template.render(messages, answer_follows)))

    def stop(self) -> None:
        """End the answers in hand at their next token; may be called from a signal handler."""
        self._stop.set()

    def answer(self, requests: Sequence[Request]) -> Iterator[Heard]:
        """One request of each model: the pieces as they come, then each answer, with "enough" as its end if it was stopped.

        All of it must be taken, or the rest would be taken for the next answer.
        """
        self._stop.clear()
        for speaker, request in zip(self._speakers, requests, strict=True):
            speaker.asked.put(replace(request, stop_when=self._pause))
        left = len(requests)
        while left:
            try:
                side, heard = self._heard.get(
                    timeout=0.2
                )  # without one, Ctrl-C would not be seen on Windows
            except Empty:
                continue
            if isinstance(heard, Exception):
                raise heard
            left -= isinstance(heard, Completion)
            yield side, heard

    def _pause(self, text: str) -> bool:
        """Called by a model after each token: let the other one go on, and say whether to stop."""
        self._turns.give()
        self._turns.take()
        return self._stop.is_set()
