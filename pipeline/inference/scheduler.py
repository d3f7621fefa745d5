"""The scheduler of a served model: slots for requests that arrive at any time.

A model has one `DecodeThread` (a llama.cpp context with its own thread) per core, or a single one
on a GPU. A request waits in a queue until a slot is free. A slot keeps its KV cells when an answer
ends. The next turn of the conversation is given the same slot, and only its new tokens are decoded.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.inference.llama.context import BatchContext, SequenceState, common_prefix_length
from pipeline.inference.llama.mixed_batch import MixedBatchContext
from pipeline.inference.llama.model import Adapter, ContextSettings, LoadedModel
from pipeline.inference.llama.plan import plan_contexts
from pipeline.inference.request import (
    ContextLengthError,
    EngineClosedError,
    Finish,
    Job,
    QueueFullError,
)

_UNLIMITED = 1 << 16
"""Dialogues to plan for: as many sequences as the machine has room for."""
_MIN_COPIED_TOKENS = 16
"""Copying a sequence's KV cells takes about as long as decoding this number of tokens."""
_TEMPLATE_TOKENS = 8
"""Tokens at the end of a prompt that the chat template may render differently one turn later."""


class EngineStats(NamedTuple):
    """What a model is doing: its sequences, those that are in use, and the requests that wait."""

    sequences: int
    busy: int
    waiting: int


class Limits(NamedTuple):
    """Limits of a served model.

    `context` is in tokens of prompt and answer. `max_waiting` requests may wait. `max_sequences`
    answers are generated in parallel; 0 uses what memory and cores allow. `batch_invariant` answers
    depend on their prompt and seed only.
    """

    context: int = 4096
    max_waiting: int = 64
    max_sequences: int = 0
    batch_invariant: bool = False


@dataclass(slots=True, kw_only=True)
class Slot(SequenceState):
    """A sequence and the job that it works on.

    `last_used` orders slots by the end of their last answer; 0 if there was none.
    """

    job: Job | None = None
    last_used: int = 0


class DecodeThread(threading.Thread):
    """A context with `sequences` slots, and the thread that runs it."""

    def __init__(
        self, model: ServedModel, sequences: int, settings: ContextSettings, *, exact: bool
    ) -> None:
        super().__init__(name=f"gatt {model.name}")
        self.slots = [Slot(id=n) for n in range(sequences)]
        self._mixed: MixedBatchContext[Slot] | None = None
        if settings.batch_tokens:
            self._mixed = MixedBatchContext(model.loaded, self.slots, settings, threads=1)
        self.context = self._mixed or BatchContext(
            model.loaded, self.slots, settings, threads=1, exact=exact
        )
        self.active = False
        """Whether a step is running; inactive threads leave their cores to the others."""
        self._model = model

    @property
    def busy_slots(self) -> int:
        """Return the number of slots in use."""
        return sum(slot.job is not None for slot in self.slots)

    def run(self) -> None:
        """Generate until the engine closes."""
        while slots := self._wait_for_jobs():
            try:
                self._step(slots)
            except Exception:  # a bug in one step must not stop the server: its requests fail
                logging.getLogger("gatt.serve").exception("a step of %s failed", self._model.name)
                for slot in slots:
                    if slot.job:
                        self._finish(slot, slot.job, "failed")
                    self.context.clear(slot)
        for slot in self.slots:
            if slot.job:
                self._finish(slot, slot.job, "closed")

    def _wait_for_jobs(self) -> list[Slot]:
        """Return the slots in use, by id, once there are any; none when the engine closes."""
        model = self._model
        with model.changed:
            self.active = bool(self.busy_slots)
            while not (self.active or model.closed):
                model.changed.wait()
                self.active = bool(self.busy_slots)
            return [] if model.closed else [slot for slot in self.slots if slot.job]

    def _step(self, slots: list[Slot]) -> None:
        """Prefill one chunk of the oldest request, and decode one token of every answer.

        Prefill is chunked, so that a long prompt does not stop the answers that are being streamed.
        On a GPU a batch has room for several prompts, the oldest ones first.
        """
        self.context.set_threads(self._model.threads())
        for slot in slots:
            if slot.job and slot.job.cancelled:
                self._finish(slot, slot.job, "cancelled")
            elif slot.job and not slot.job.started:
                self._start(slot, slot.job)
        # The slot of a cancelled job may have another one by now, which starts in the next step.
        active = [(slot, slot.job) for slot in slots if slot.job and slot.job.started]
        if self._mixed and active:
            by_age = sorted(active, key=lambda pair: pair[1].arrived)
            jobs = {slot.id: job for slot, job in active}
            for slot, piece in self._mixed.step([slot for slot, _ in by_age]):
                self._emit(slot, jobs[slot.id], piece)
            return
        prefilling = [(job.arrived, slot) for slot, job in active if len(slot.pending) > 1]
        if prefilling:
            _, oldest = min(prefilling, key=lambda pair: pair[0])
            self.context.prefill(oldest)
        decoding = [(slot, job) for slot, job in active if len(slot.pending) == 1]
        if decoding:
            indices = self.context.decode([slot for slot, _ in decoding])
            for (slot, job), index in zip(decoding, indices, strict=True):
                self._emit(slot, job, self.context.sample(slot, index))
                if (drafted := self.context.sample_draft(slot, index)) is not None:
                    self._emit(slot, job, drafted)

    def _start(self, slot: Slot, job: Job) -> None:
        """Queue the part of the prompt that the slot does not have in its cache."""
        job.started = True
        request = job.request
        max_tokens = request.sampling.max_tokens + request.thought_tokens
        job.cached_tokens = self.context.start(
            slot,
            replace(request.sampling, max_tokens=max_tokens),
            request.tokens,
            min_copied=_MIN_COPIED_TOKENS,
        )

    def _emit(self, slot: Slot, job: Job, piece: str) -> None:
        """Pass on the text of an answer's next token; finish the answer at its end."""
        stopped = job.emit(piece, slot.tokens, slot.logprob)
        if stopped or slot.finish or slot.tokens >= job.max_tokens:
            stopped = stopped or job.flush() or (slot.finish == "stop" and not job.thinking)
            self._finish(slot, job, "stop" if stopped else "length")

    def _finish(self, slot: Slot, job: Job, finish: Finish) -> None:
        """End the answer in a slot and free the slot; its KV cells stay filled."""
        result = job.result(finish, slot.tokens if job.started else 0)
        slot.pending = []
        self.context.release(slot)
        self._model.free(slot)
        job.on_result(result)


class ServedModel:
    """A loaded model with at most one adapter: its decode threads, and the requests that wait.

    `threads` returns how many threads each decode thread may use now. `vram_share` is as for
    `plan_contexts`.

    Raises:
        GattError: too little memory, or no batch-invariant answers of this model here.
    """

    def __init__(
        self,
        name: str,
        loaded: LoadedModel,
        adapter: Adapter | None,
        limits: Limits,
        threads: Callable[[], int],
        *,
        vram_share: float = 1.0,
    ) -> None:
        self.name, self.loaded, self.threads = name, loaded, threads
        self.changed = threading.Condition()
        """Guards the slots' jobs and the queue; notified when either changes."""
        self.closed = False
        self.context_length = min(limits.context, loaded.info.context_length)
        self._max_waiting = limits.max_waiting
        self._waiting: deque[Job] = deque()
        self._finished = count(1)
        # The two rows of an idle sequence (`BatchBuilder`) take a cell more than an answer does.
        n_ctx = self.context_length + (1 if limits.batch_invariant else 0)
        plan = plan_contexts(
            loaded.info,
            ContextSettings(n_ctx, adapter=adapter),
            dialogues=_UNLIMITED,
            max_sequences=limits.max_sequences,
            loaded=loaded,
            vram_share=vram_share,
        )
        if limits.batch_invariant and (plan.gpu_layers or loaded.has_state):
            raise GattError(
                f"{name} has no batch-invariant answers: "
                + ("it runs on a GPU" if plan.gpu_layers else "llama.cpp keeps a state for it")
                + ". Leave out --batch-invariant."
            )
        self.decode_threads = [
            DecodeThread(self, n, plan.settings, exact=limits.batch_invariant)
            for n in plan.sequences
        ]

    def stats(self) -> EngineStats:
        """Return what the model is doing now."""
        with self.changed:
            return EngineStats(
                sum(len(thread.slots) for thread in self.decode_threads),
                sum(thread.busy_slots for thread in self.decode_threads),
                len(self._waiting),
            )

    def submit(self, job: Job) -> None:
        """Assign a slot to the job, or let it wait for one.

        Raises:
            ContextLengthError: prompt and answer do not fit in the context.
            EngineClosedError: the engine has stopped.
            QueueFullError: too many requests wait already.
        """
        request = job.request
        prompt, answer = len(request.tokens), request.sampling.max_tokens
        if prompt + answer + request.thought_tokens > self.context_length:
            raise ContextLengthError(prompt, answer, self.context_length)
        with self.changed:
            if self.closed:
                raise EngineClosedError
            self._waiting.append(job)
            self._assign_slots()
            if len(self._waiting) > self._max_waiting:
                self._waiting.pop()
                raise QueueFullError(
                    f"All sequences are in use and {self._max_waiting} requests wait already. "
                    "Try again later."
                )

    def cancel(self, job: Job) -> None:
        """End an answer before its next token, or take the job out of the queue."""
        job.cancelled = True
        with self.changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.on_result(job.result("cancelled"))

    def free(self, slot: Slot) -> None:
        """Take the job, which has ended, out of its slot, and assign the slot again."""
        with self.changed:
            slot.job, slot.last_used = None, next(self._finished)
            self._assign_slots()

    def stop(self) -> None:
        """End the requests that wait, and all answers at their next step."""
        with self.changed:
            self.closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self.changed.notify_all()
        for job in waiting:
            job.on_result(job.result("closed"))

    def close(self) -> None:
        """Stop, wait for the decode threads to end, and free their memory."""
        self.stop()
        for thread in self.decode_threads:
            if thread.ident:
                thread.join()
            thread.context.close()

    def _assign_slots(self) -> None:
        """Assign free slots to the jobs that wait, oldest first; `changed` must be held."""
        while self._waiting and not self.closed:
            free = [
                (slot, thread.busy_slots)
                for thread in self.decode_threads
                for slot in thread.slots
                if slot.job is None
            ]
            if not free:
                return
            job = self._waiting.popleft()
            choose_slot(job.request.tokens, free).job = job
        self.changed.notify_all()


def choose_slot(tokens: Sequence[int], free: Sequence[tuple[Slot, int]]) -> Slot:
    """Return the free slot for a prompt; `free` has each with the busy slots of its thread.

    It is the slot with most of this conversation in its cache. If there is none, it is the least
    recently used one of the least busy thread. A slot is of this conversation if its last prompt is
    a prefix of this one: a system message in common is not enough.
    """
    continued: list[tuple[int, Slot]] = []
    for slot, _ in free:
        shared = common_prefix_length(slot.cached, tokens)
        required = min(len(slot.cached), slot.prompt_tokens, len(tokens)) - _TEMPLATE_TOKENS
        if shared and shared >= required:
            continued.append((shared, slot))
    if continued:
        return max(continued, key=lambda pair: pair[0])[1]
    return min(free, key=lambda pair: (pair[1], pair[0].last_used, pair[0].id))[0]
