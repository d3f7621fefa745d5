"""Generation for requests that arrive at any time, batched with those that are running.

Like `batch_engine`, it has one context and thread per core over one copy of the weights
(`scheduler`). Unlike there, results are batch-invariant only if `Limits.batch_invariant`: otherwise
cached prefixes and concurrent requests can change rounding (`context` explains why).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.errors import GattError
from pipeline.gguf.reader import open_gguf
from pipeline.inference.chat_template import render_unfinished
from pipeline.inference.llama.model import Adapter, LoadedModel
from pipeline.inference.request import (
    PROMPT_OPTIONS,
    EngineClosedError,
    GenerationRequest,
    GenerationResult,
    Job,
    OptionError,
    Prompt,
    PromptOptions,
    TextPiece,
)
from pipeline.inference.scheduler import EngineStats, Limits, ServedModel
from pipeline.inference.thoughts import opened_thought
from pipeline.records import Message, SamplerSettings
from pipeline.system import core_count

LIMITS = Limits()
_CPU_INTERVAL_SECONDS = 1.0


class ModelSource(NamedTuple):
    """A model to serve: a GGUF file and an adapter. Sources of one file share its weights."""

    path: Path
    adapter: Adapter | None = None


class AnswerStream:
    """An answer that is being generated: iterate to get its pieces; `result` is set at its end.

    Raises, while iterated:
        EngineClosedError: the engine was stopped.
        RuntimeError: a step failed.
    """

    def __init__(
        self,
        model: ServedModel,
        request: GenerationRequest,
        on_result: Callable[[GenerationResult], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.result: GenerationResult | None = None
        self._pieces: asyncio.Queue[TextPiece | GenerationResult] = asyncio.Queue()
        self._model = model

        # Both are called from the engine's threads.
        def put(piece: TextPiece | GenerationResult) -> None:
            with suppress(RuntimeError):  # the event loop is closed: nobody reads any more
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        def finish(result: GenerationResult) -> None:
            on_result(result)
            put(result)

        self._job = Job(request, put, finish)
        model.submit(self._job)

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> TextPiece:
        if self.result:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, TextPiece):
            return piece
        self.result = piece
        if piece.finish == "closed":
            raise EngineClosedError
        if piece.finish == "failed":
            raise RuntimeError("generation failed; the server's log has the error")
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the answer before its next token."""
        if not self.result:
            self._model.cancel(self._job)

    async def wait(self) -> GenerationResult:
        """Wait for the end, skip the text that was not read, and return the result."""
        while not self.result:
            piece = await self._pieces.get()
            self.result = None if isinstance(piece, TextPiece) else piece
        return self.result


class AsyncEngine:
    """The models of `sources`, by the names under which they are served.

    `on_result`, if set, is called at the end of every answer with the model's name and the result,
    from any thread.

    Raises:
        GattError: not a GGUF, a broken one, an adapter of another base, too little memory, or no
            batch-invariant answers of a model here.
    """

    def __init__(self, sources: Mapping[str, ModelSource], limits: Limits = LIMITS) -> None:
        self.on_result: Callable[[str, GenerationResult], None] = lambda name, result: None
        self._cpu = CpuMonitor()
        self._loaded = {
            path: LoadedModel(open_gguf(path))
            for path in dict.fromkeys(source.path for source in sources.values())
        }
        self._models = {
            name: ServedModel(
                name,
                self._loaded[source.path],
                source.adapter,
                limits,
                self._threads_per_context,
                vram_share=1 / (len(sources) - n),  # of what the models before it have left
            )
            for n, (name, source) in enumerate(sources.items())
        }
        self._decode_threads = [
            thread for model in self._models.values() for thread in model.decode_threads
        ]
        for thread in (self._cpu, *self._decode_threads):
            thread.start()

    @property
    def names(self) -> list[str]:
        """Return the names of the models."""
        return list(self._models)

    def chat_prompt(
        self, name: str, messages: tuple[Message, ...], options: PromptOptions = PROMPT_OPTIONS
    ) -> Prompt:
        """Return the prompt for the next assistant message of a chat.

        Raises:
            GattError: the model's chat template refuses this chat or an option, or fails.
        """
        model = self._models[name].loaded
        known = model.template.variable_names() if options.template_variables else set[str]()
        for variable in options.template_variables:
            if variable not in known:
                names = ", ".join(sorted(known)) or "no variable of its own"
                effort = variable == "reasoning_effort"
                raise OptionError(
                    variable if effort else "chat_template_kwargs",
                    f"The chat template of {name} has no variable {variable!r}; it has {names}. "
                    "Omit it.",
                )
        variables = options.template_variables
        if options.continue_final:
            text, answer = render_unfinished(model.template, messages, variables)
        else:
            text, answer = model.template.render(messages, variables=variables), ""
        return Prompt(model.tokenize(text + answer), opened_thought(text, answer))

    def check(self, name: str, sampler: SamplerSettings) -> None:
        """Refuse settings that the model cannot follow; `generate` relies on it.

        Raises:
            GattError: the grammar is not valid, or a token is not in the vocabulary.
        """
        model = self._models[name].loaded
        for token, _ in sampler.logit_bias:
            if not 0 <= token < model.vocab_size:
                raise OptionError(
                    "logit_bias",
                    f"Token {token} of 'logit_bias' does not exist; expected 0 to "
                    f"{model.vocab_size - 1}.",
                )
        if sampler.grammar:
            try:
                model.check_grammar(sampler.grammar)
            except GattError as error:
                raise OptionError("grammar", str(error)) from error

    def text_tokens(self, name: str, text: str) -> list[int]:
        """Return the prompt for the continuation of plain text."""
        return self._models[name].loaded.tokenize(text, add_special=True)

    def context_length(self, name: str) -> int:
        """Return how many tokens prompt and answer may have together."""
        return self._models[name].context_length

    def stats(self, name: str) -> EngineStats:
        """Return what the model is doing now."""
        return self._models[name].stats()

    def generate(self, name: str, request: GenerationRequest) -> AnswerStream:
        """Start an answer; to be called in the running event loop that iterates over it.

        Raises:
            ContextLengthError: prompt and answer do not fit in the context.
            QueueFullError: too many requests wait already.
            EngineClosedError: the engine was stopped.
        """
        return AnswerStream(
            self._models[name], request, lambda result: self.on_result(name, result)
        )

    def stop(self) -> None:
        """End all answers at their next step; may be called from any thread."""
        for model in self._models.values():
            model.stop()

    def close(self) -> None:
        """Stop, wait for the threads to end, and free the memory."""
        self._cpu.close()
        self.stop()
        for model in self._models.values():
            model.close()
        for loaded in self._loaded.values():
            loaded.close()
        self._models, self._loaded = {}, {}

    def _threads_per_context(self) -> int:
        """Return how many threads each busy context may use: they share the free cores."""
        busy = sum(thread.active for thread in self._decode_threads)
        return max(1, self._cpu.free_cores // max(1, busy))


class CpuTimes(NamedTuple):
    """Seconds: wall clock, and CPU time of all processes and of this one."""

    wall: float
    used: float
    used_here: float


class CpuMonitor(threading.Thread):
    """Measures once a second how many cores other programs leave free: `free_cores`.

    llama.cpp's threads wait for each other hundreds of times per token. If another program holds
    a core, one thread less is faster by far than one that waits for that core.
    """

    def __init__(self) -> None:
        super().__init__(name="gatt cpu monitor")
        self.free_cores = core_count()
        self._closed = threading.Event()
        self._last = _cpu_times()

    def run(self) -> None:
        """Measure until the monitor is closed."""
        self._measure()
        while not self._closed.wait(_CPU_INTERVAL_SECONDS):
            self._measure()

    def close(self) -> None:
        """Stop measuring, and wait for the thread to end."""
        self._closed.set()
        if self.ident:
            self.join()

    def _measure(self) -> None:
        before, self._last = self._last, _cpu_times()
        self.free_cores = count_free_cores(before, self._last, core_count())


def count_free_cores(before: CpuTimes, after: CpuTimes, cores: int) -> int:
    """Return how many of the `cores` other processes left free between two times; at least 1."""
    seconds = after.wall - before.wall
    used = after.used - before.used
    used_here = after.used_here - before.used_here
    others = (used - used_here) / seconds if seconds else 0.0
    return max(1, cores - round(others))


def _cpu_times() -> CpuTimes:
    """Return the times now. Guest time is in user time already, and is not counted twice."""
    cores, process = psutil.cpu_times(), psutil.Process().cpu_times()
    not_used: Sequence[str] = ("idle", "iowait", "guest", "guest_nice")
    idle = sum(getattr(cores, field, 0.0) for field in not_used)
    return CpuTimes(time.monotonic(), sum(cores) - idle, process.user + process.system)
