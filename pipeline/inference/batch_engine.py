"""Batched multi-turn generation over llama.cpp's low-level API, sized to the machine.

On a CPU every core has its own context and Python thread (`batch_worker`) over one copy of the
weights. No core waits for another at each of a graph's hundreds of operations, and sampling runs in
parallel, too. This is faster than one context with a thread per core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from pipeline.gguf.base import Array
from pipeline.gguf.reader import GgufInfo, open_gguf
from pipeline.inference.batch_worker import BatchWorker, TaskQueue
from pipeline.inference.llama.model import Adapter, CacheType, ContextSettings, LoadedModel
from pipeline.records import Completion, Request, Task
from pipeline.system import available_memory, core_count, require_memory

_CTX_PADDING = 256
"""llama.cpp rounds a KV stream up to a multiple of this number of cells."""
_SEQUENCES_PER_CORE, _SEQUENCES_PER_GPU = 16, 64
"""On a core, batches of more than 16 rows are hardly cheaper per row."""


class ContextPlan(NamedTuple):
    """How the sequences of a model are divided among contexts.

    Context `k` has `sequences[k]` sequences of `n_ctx` cells each, and decodes with `threads`.
    """

    sequences: tuple[int, ...]
    n_ctx: int
    threads: int


def plan_contexts(
    info: GgufInfo,
    context: int,
    *,
    dialogues: int,
    max_sequences: int,
    cache_type: CacheType,
    loaded: bool,
) -> ContextPlan:
    """Return the contexts for up to `dialogues` dialogues of `context` tokens each.

    `max_sequences` is as for `BatchEngine`; `loaded` says that the weights are in memory already.

    Raises:
        GattError: too little memory.
    """
    n_ctx = -(-context // _CTX_PADDING) * _CTX_PADDING
    sequence_bytes = n_ctx * info.kv_bytes_per_token * (2 if cache_type == "F32" else 1)
    cores = 1 if _gpu_offload() else core_count()
    sequences = min(dialogues, max_sequences or _fitting_sequences(info, sequence_bytes, cores))
    contexts = min(cores, sequences)
    weight_bytes = 0 if loaded else info.bytes
    require_memory(
        weight_bytes + sequences * sequence_bytes,
        f"run {info.path.name} with {sequences} sequences",
    )
    shares = tuple(len(range(n, sequences, contexts)) for n in range(contexts))
    return ContextPlan(shares, n_ctx, core_count() // contexts)


class BatchEngine:
    """A model that runs up to `dialogues` dialogues of `context` tokens each in parallel.

    `source` is a GGUF file, or a model that is loaded already and stays loaded. `max_sequences`
    limits the dialogues that run in parallel; 0 uses what the cores and half of the free memory
    allow. `name`, the file's name at first, is what records call the model.

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
            context,
            dialogues=dialogues,
            max_sequences=max_sequences,
            cache_type=cache_type,
            loaded=not self._owns_model,
        )
        self.name = info.path.name
        self._cores = core_count()
        self._model = source if isinstance(source, LoadedModel) else LoadedModel(info)
        self.template, self.tokenize = self._model.template, self._model.tokenize
        self.vocab_size = self._model.vocab_size
        settings = ContextSettings(plan.n_ctx, cache_type, adapter)
        self._workers = [
            BatchWorker(self._model, sequences, settings, plan.threads)
            for sequences in plan.sequences
        ]

    def close(self) -> None:
        """Free the memory."""
        for worker in self._workers:
            worker.close()
        if self._owns_model:
            self._model.close()

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, tasks: Iterable[Task], on_text: Callable[[str], None] | None = None) -> None:
        """Drive all `tasks` to their end; only one of them is advanced at a time.

        `on_text` receives each piece of text; it is meant for a single task, such as a chat.
        """
        queue = TaskQueue(tasks, on_text, workers=len(self._workers), threads=self._cores)
        if len(self._workers) == 1:
            self._workers[0].run(queue)
            return
        with ThreadPoolExecutor(len(self._workers)) as pool:
            running = [pool.submit(worker.run, queue) for worker in self._workers]
            try:
                for future in as_completed(running):
                    future.result()
            finally:
                queue.stopped = True  # after an error in one worker, the others end, too

    def complete(
        self, request: Request, on_text: Callable[[str], None] | None = None
    ) -> Completion:
        """Return the completion of a single request."""
        completions: list[Completion] = []

        def single_request() -> Task:
            completions.append((yield request))

        self.run([single_request()], on_text)
        return completions[0]

    def logits(self, tokens: Sequence[int]) -> Iterator[Array]:
        """Yield for each token the float32 logits (vocab_size) of the token after it."""
        return self._workers[0].logits(tokens)

    def perplexity(self, texts: Iterable[str]) -> float:
        """Return exp of the mean NLL of the texts' tokens, without the first token of each."""
        return self._workers[0].perplexity(texts)


def _gpu_offload() -> bool:
    """Return whether llama.cpp was built for a GPU or Metal; then all layers are offloaded."""
    import llama_cpp

    return bool(llama_cpp.llama_supports_gpu_offload())


def _fitting_sequences(info: GgufInfo, sequence_bytes: int, cores: int) -> int:
    """Return how many sequences with a KV cache of `sequence_bytes` each this machine runs."""
    max_sequences = _SEQUENCES_PER_GPU if _gpu_offload() else _SEQUENCES_PER_CORE * cores
    cache_bytes = (available_memory() - info.bytes) / 2
    return max(1, min(max_sequences, int(cache_bytes / sequence_bytes) - cores))


def system_info() -> str:
    """Return whether llama.cpp can use a GPU, and which features it was built with."""
    import llama_cpp

    gpu = "works with GPU offload" if _gpu_offload() else "works on the CPU"
    return f"{gpu} ({llama_cpp.llama_print_system_info().decode().strip(' |')})"
