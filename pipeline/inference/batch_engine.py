"""Batched multi-turn generation over llama.cpp's low-level API, sized to the machine.

On a CPU every core has its own context and Python thread (`batch_worker`) over one copy of the
weights. No core waits for another at each of a graph's hundreds of operations, and sampling runs in
parallel, too. This is faster than one context with a thread per core.

On a GPU there is one context, with as many sequences as fit in the free memory of the card.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from pipeline.console import log
from pipeline.gguf.base import Array
from pipeline.gguf.reader import open_gguf
from pipeline.inference.batch_worker import BatchWorker, TaskQueue
from pipeline.inference.llama.control import LayerReader
from pipeline.inference.llama.gpu import describe_offload
from pipeline.inference.llama.model import Adapter, CacheType, ContextSettings, LoadedModel
from pipeline.inference.llama.plan import plan_contexts
from pipeline.inference.thoughts import AnswerFilter
from pipeline.records import Completion, Request, Task
from pipeline.system import core_count


class BatchEngine:
    """A model that runs up to `dialogues` dialogues of `context` tokens each in parallel.

    `source` is a GGUF file, or a model that is loaded already and stays loaded. `max_sequences`
    limits the dialogues that run in parallel; 0 uses what the machine allows (see
    `plan_contexts`). `name`, the file's name at first, is what records call the model.

    Raises:
        GattError: not a GGUF, a broken one, one without a chat template, an adapter of another
            base, or too little memory.
    """

    def __init__(
        self,
        source: Path | LoadedModel,
        dialogues: int,
        context: int,
        max_sequences: int = 0,
        cache_type: CacheType = "F16",
        adapter: Adapter | None = None,
    ) -> None:
        self._owns_model = not isinstance(source, LoadedModel)
        info = source.info if isinstance(source, LoadedModel) else open_gguf(source)
        plan = plan_contexts(
            info,
            ContextSettings(context, cache_type, adapter),
            dialogues=dialogues,
            max_sequences=max_sequences,
            loaded=None if isinstance(source, Path) else source,
        )
        if dialogues > 1:
            log(plan.describe(info))
        self.name = info.path.name
        self.changes: dict[str, str] = {}
        self._cores, self._adapter = core_count(), adapter
        if isinstance(source, LoadedModel):
            self._model = source
        else:
            self._model = LoadedModel(info, gpu_layers=plan.gpu_layers)
        self.template, self.tokenize = self._model.template, self._model.tokenize
        self.vocab_size = self._model.vocab_size
        self.vocabulary: list[str] = self._model.info.field("tokenizer.ggml.tokens", [])
        self.wrap = AnswerFilter(self.template, self.tokenize, plan.settings.n_ctx).wrap
        self.workers = [
            BatchWorker(self._model, sequences, plan.settings, plan.threads)
            for sequences in plan.sequences
        ]

    def close(self) -> None:
        """Free the memory."""
        for worker in self.workers:
            worker.close()
        if self._owns_model:
            self._model.close()

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        tasks: Iterable[Task],
        on_text: Callable[[str], None] | None = None,
        stopping: threading.Event | None = None,
    ) -> None:
        """Drive all `tasks` to their end; only one of them is advanced at a time.

        `on_text` receives each piece of text; it is meant for a single task, such as a chat. With
        it the thoughts of a reasoning model are part of the text; without it they are not. An
        answer without a token yet is "cancelled" while `stopping` is set.
        """
        if on_text is None:
            tasks = map(self.wrap, tasks)
        workers = len(self.workers)
        queue = TaskQueue(tasks, on_text, workers=workers, threads=self._cores, stopping=stopping)
        if workers == 1:
            self.workers[0].run(queue)
            return
        with ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(worker.run, queue) for worker in self.workers]
            try:
                for future in as_completed(running):
                    future.result()
            finally:
                queue.stopped = True  # after an error in one worker, the others end, too

    def complete(self, request: Request) -> Completion:
        """Return the completion of a single request."""
        completions: list[Completion] = []

        def single_request() -> Task:
            completions.append((yield request))

        self.run([single_request()])
        return completions[0]

    def layer_reader(self) -> LayerReader:
        """Return a reader of the layers' outputs, from which control vectors are made.

        It has to be closed before the engine.

        Raises:
            GattError: llama.cpp has no control vectors for this model, or too little memory.
        """
        return LayerReader(self._model, self._adapter)

    def steer(self, vector: Array | None) -> None:
        """Add the rows of `vector` (layers, n_embd) to the outputs of the layers; None ends it.

        It holds for all tasks from now on. No task may be running. As without a vector, an answer
        depends on nothing else that is in the batch.
        """
        for worker in self.workers:
            worker.steer(vector)

    def logits(self, tokens: Sequence[int], start: int = 0) -> Iterator[Array]:
        """Yield for each of `tokens[start:]` the float32 logits (vocab_size) of the token after it.

        What a call before has decoded of the tokens before `start` is not decoded again.
        """
        return self.workers[0].logits(tokens, start)

    def perplexity(self, texts: Iterable[str]) -> float:
        """Return exp of the mean NLL of the texts' tokens, without the first token of each."""
        return self.workers[0].perplexity(texts)


def system_info() -> str:
    """Return whether llama.cpp can use a GPU, and which features it was built with."""
    return f"{describe_offload()} ({instruction_sets()})"


def instruction_sets() -> str:
    """Return the features of the processor that llama.cpp uses: results depend on them."""
    import llama_cpp

    text: str = llama_cpp.llama_print_system_info().decode()
    return text.strip(" |")
