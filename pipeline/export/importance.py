"""Measure an importance matrix: run texts through a model and sum the inputs of its matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.gguf.imatrix import CHUNK_TOKENS, ImportanceMatrix
from pipeline.gguf.reader import open_gguf
from pipeline.inference.llama.callers import CALLERS
from pipeline.inference.llama.model import Adapter, ContextSettings, LoadedModel
from pipeline.system import core_count


def measure_importance(
    source: Path,
    adapter: Adapter | None,
    texts: Iterable[str],
    max_tokens: int,
    on_tokens: Callable[[int], object],
) -> ImportanceMatrix:
    """Return the importance of the columns of a GGUF, with `adapter` applied, over `texts`.

    Raises:
        GattError: not a GGUF, too little memory, or an adapter of another base.
    """
    importance = ImportanceMatrix()
    # `observe` reads the nodes of the graph, which must be in the computer's memory.
    model = LoadedModel(open_gguf(source), gpu_layers=0)
    threads = core_count()
    # A text is one batch, because all threads wait for one another at every observed node.
    context = model.new_context(
        ContextSettings(CHUNK_TOKENS, adapter=adapter),
        sequences=1,
        batch_size=CHUNK_TOKENS,
        threads=threads,
        eval_callback=importance.observe,
    )
    memory = model.api.llama_get_memory(context)
    CALLERS.open()
    try:
        for text in texts:
            tokens = model.tokenize(text)[: min(CHUNK_TOKENS, max_tokens - importance.tokens)]
            if not tokens:
                continue
            ids = (model.api.llama_token * len(tokens))(*tokens)
            batch = model.api.llama_batch_get_one(ids, len(tokens))
            if status := CALLERS.decode(model.api, context, batch, threads):
                raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
            model.api.llama_memory_clear(memory, True)  # noqa: FBT003
            importance.tokens += len(tokens)
            on_tokens(len(tokens))
            if importance.tokens >= max_tokens:
                break
    finally:
        model.api.llama_free(context)
        CALLERS.close()
        model.close()
    return importance
