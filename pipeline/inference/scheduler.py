"""Lanes: a llama.cpp context and a thread for each core, which answer the questions put to one model.

A question takes a free seat, a stream of some lane's cache. The seat keeps its cells when the answer ends; the next turn of the
conversation goes there and feeds only what is new.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Literal, NamedTuple

from pipeline.errors import GattError
from pipeline.inference.batch_engine import plan_contexts
from pipeline.inference.context import BatchContext, SequenceState, common_prefix_length
from pipeline.inference.model import Adapter, LoadedModel
from pipeline.records import Request

_ANY = 1 << 16
"""Sequences: as many as the machine has room for."""
_WORTH_A_COPY = 16
"""Tokens: copying a stream takes about as long as evaluating so many."""
_OPENING = 8
"""Tokens: templates may write the opening of an answer otherwise once it is there."""

Finish = Literal["stop", "length", "cancelled", "closed", "failed"]


class QueueFullError(GattError):
    """All sequences are in use, and as many requests wait as may."""


class EngineClosedError(GattError):
    """The engine stops, and answers nothing any more."""


class ContextLengthError(GattError):
    """A prompt with its answer does not fit in the context; both are in tokens, as is `context`."""

    def __init__(self, prompt: int, answer: int, context: int) -> None:
        super().__init__(
            f"{prompt} tokens of prompt and {answer} of answer found; at most {context} fit together. Shorten one."
        )
        self.prompt, self.answer, self.context = prompt, answer, context


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt as tokens, and how to answer it. The answer ends before the first of the texts `stop`.

    The prompt is not made of `request.messages`: they are what the answer is not to repeat.
    """

    tokens: list[int]
    request: Request
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """How an answer ended. `cached_tokens` of the prompt were in the cache; `seconds` count from the question's arrival."""

    finish: Finish
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    first_seconds: float | None
    seconds: float


class EngineStats(NamedTuple):
    """What a model is doing: sequences that there are and that are in use, and requests that wait."""

    sequences: int
    busy: int
    waiting: int


class Limits(NamedTuple):
    """Tokens of a conversation; requests of a model that may wait, and its sequences (0: what memory and cores allow)."""

    context: int = 4096
    waiting: int = 64
    sequences: int = 0


class Job:
    """A question on its way. `on_text` and `on_end` are called from the engine's threads and must not block."""

    def __init__(
        self,
        question: GenerationRequest,
        on_text: Callable[[str], None],
        on_end: Callable[[GenerationResult], None],
    ) -> None:
        self.question, self.on_end = question, on_end
        self.cancelled = False
        self.begun = False
        self.cached_tokens = 0
        self.arrived = time.monotonic()
        self._on_text = on_text
        self._first: float | None = None
        self._held = ""

    def emit(self, piece: str, last: bool) -> bool:
        """Pass text on, but for what may be the beginning of a stop text; whether one is there."""
        if self._first is None:
            self._first = time.monotonic() - self.arrived
        stop, text = self.question.stop, self._held + piece
        places = [at for one in stop if (at := text.find(one)) >= 0]
        if places:
            held = len(text) - min(places)
        else:
            held = (
                0
                if last
                else max(
                    (n for one in stop for n in range(1, len(one)) if text.endswith(one[:n])),
                    default=0,
                )
            )
        self._held = text[len(text) - held :]
        if len(text) > held:
            self._on_text(text[: len(text) - held])
        return bool(places)

    def outcome(self, finish: Finish, tokens: int = 0) -> GenerationResult:
        """Of the answer as it is now."""
        prompt, now = len(self.question.tokens), time.monotonic()
        return GenerationResult(
            finish, prompt, self.cached_tokens, tokens, self._first, now - self.arrived
        )


@dataclass(slots=True)
class Slot(SequenceState):
    """A stream and the question that is answered in it; `used` orders the seats by when their last answer ended."""

    job: Job | None = None
    used: int = 0


class DecodeThread(threading.Thread):
    """One context and the thread that runs it."""

    def __init__(self, model: ServedModel, share: int, cells: int, adapter: Adapter | None) -> None:
        super().__init__(name=f"gatt {model.name}")
        self.slots = [Slot(n) for n in range(share)]
        self.streams = BatchContext(
            model.weights, self.slots, cells, "F16", 1, adapter, exact=False
        )
        self.active = False
        self._model = model

    @property
    def busy(self) -> int:
        """Seats in use."""
        return sum(slot.job is not None for slot in self.slots)

    def run(self) -> None:
        """Answer until the engine closes."""
        while taken := self._gather():
            try:
                self._step(taken)
            except (
                Exception
            ):  # a bug in one step must not take the server down; those who wait are told
                logging.getLogger("gatt.serve").exception("a step of %s failed", self._model.name)
                for slot in taken:
                    if slot.job:
                        self._end(slot, "failed")
                    self.streams.forget(slot)
        for slot in self.slots:
            if slot.job:
                self._end(slot, "closed")

    def _gather(self) -> list[Slot]:
        """The seats in use, by number, once there are some; none when the engine closes."""
        model = self._model
        with model.changed:
            self.active = bool(self.busy)
            while not (self.active or model.closed):
                model.changed.wait()
                self.active = bool(self.busy)
            return [] if model.closed else [slot for slot in self.slots if slot.job]

    def _step(self, taken: list[Slot]) -> None:
        """One chunk of the prompt that has waited longest, and one new token for every answer."""
        self.streams.use(self._model.threads())
        for slot in taken:
            if slot.job and slot.job.cancelled:
                self._end(slot, "cancelled")
            elif slot.job and not slot.job.begun:
                job = slot.job
                job.begun = True
                job.cached_tokens = self.streams.begin(
                    slot, job.question.request, job.question.tokens, _WORTH_A_COPY
                )
        going = [(slot, slot.job) for slot in taken if slot.job]
        filling = [(job.arrived, slot) for slot, job in going if len(slot.pending) > 1]
        if filling:
            self.streams.prefill(min(filling, key=lambda pair: pair[0])[1])
        ready = [(slot, job) for slot, job in going if len(slot.pending) == 1]
        if ready:
            rows = self.streams.decode([slot for slot, _ in ready])
            for (slot, job), row in zip(ready, rows, strict=True):
                stopped = job.emit(self.streams.sample(slot, row), bool(slot.finish))
                if stopped or slot.finish:
                    self._end(slot, "stop" if stopped or slot.finish == "stop" else "length")

    def _end(self, slot: Slot, finish: Finish) -> None:
        """Leave the seat, whose cells are kept, to the next."""
        job = slot.job
        assert job is not None
        outcome = job.outcome(finish, slot.tokens if job.begun else 0)
        slot.pending = []
        self.streams.release(slot)
        self._model.leave(slot)
        job.on_end(outcome)


class ServedModel:
    """Weights with an adapter or without one, the lanes over them, and the questions that wait."""

    def __init__(
        self,
        name: str,
        weights: LoadedModel,
        adapter: Adapter | None,
        limits: Limits,
        threads: Callable[[], int],
    ) -> None:
        self.name, self.weights = name, weights
        self.changed = threading.Condition()
        self.closed = False
        self.context = min(limits.context, weights.info.context_length)
        self.threads = threads
        self._most_waiting = limits.waiting
        self._waiting: deque[Job] = deque()
        self._order = count(1)
        room = plan_contexts(weights.info, self.context, _ANY, limits.sequences, "F16", loaded=True)
        self.decode_threads = [
            DecodeThread(self, share, room.cells, adapter) for share in room.shares
        ]

    def state(self) -> EngineStats:
        """Now."""
        with self.changed:
            return EngineStats(
                sum(len(lane.slots) for lane in self.decode_threads),
                sum(lane.busy for lane in self.decode_threads),
                len(self._waiting),
            )

    def submit(self, job: Job) -> None:
        """Give the question a seat, or let it wait for one."""
        prompt, answer = len(job.question.tokens), job.question.request.max_tokens
        if prompt + answer > self.context:
            raise ContextLengthError(prompt, answer, self.context)
        with self.changed:
            if self.closed:
                raise EngineClosedError("The server is stopping. Try again when it is back.")
            self._waiting.append(job)
            self._place()
            if len(self._waiting) > self._most_waiting:
                self._waiting.pop()
                raise QueueFullError(
                    f"All sequences are in use and {self._most_waiting} requests wait already. Try again in a while."
                )

    def cancel(self, job: Job) -> None:
        """End the answer before its next token."""
        job.cancelled = True
        with self.changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.on_end(job.outcome("cancelled"))

    def leave(self, slot: Slot) -> None:
        """The answer in this seat has ended."""
        with self.changed:
            slot.job, slot.used = None, next(self._order)
            self._place()

    def stop(self) -> None:
        """End what waits and, at their next step, all answers."""
        with self.changed:
            self.closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self.changed.notify_all()
        for job in left:
            job.on_end(job.outcome("closed"))

    def close(self) -> None:
        """Wait for the lanes to end, and give their memory back."""
        self.stop()
        for lane in self.decode_threads:
            if lane.ident:
                lane.join()
            lane.streams.close()

    def _place(self) -> None:
        """Seat those who wait; the lock is held."""
        while self._waiting:
            free = [
                (slot, lane)
                for lane in self.decode_threads
                for slot in lane.slots
                if slot.job is None
            ]
            if not free or self.closed:
                return
            job = self._waiting.popleft()
            self._choose(job.question.tokens, free).job = job
        self.changed.notify_all()

    def _choose(self, tokens: list[int], free: list[tuple[Slot, DecodeThread]]) -> Slot:
        """The seat that holds most of this conversation, or else the one unused longest in the lane with most room.

        A seat whose last prompt is not in this one is another conversation's, though all may begin with one system message.
        """
        shared = [(common_prefix_length(slot.cached, tokens), slot) for slot, _ in free]
        own = [
            (n, s)
            for n, s in shared
            if n and n >= min(len(s.cached), s.prompt_tokens, len(tokens)) - _OPENING
        ]
        if own:
            return max(own, key=lambda pair: pair[0])[1]
        return min(free, key=lambda pair: (pair[1].busy, pair[0].used, pair[0].id))[0]
