"""Measure an importance matrix: read texts with a model and sum what its matrices are fed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.gguf.imatrix import TEXT_TOKENS, ImportanceMatrix
from pipeline.gguf.reader import open_gguf
from pipeline.inference.model import Adapter, LoadedModel


def measure_importance(
    source: Path,
    adapter: Adapter | None,
    texts: Iterable[str],
    most: int,
    on_tokens: Callable[[int], object],
) -> ImportanceMatrix:
    """The importance of a GGUF's columns (with an adapter laid over it) while it reads `texts`, up to `most` tokens.

    Raises:
        GattError: no GGUF, too little memory, or an adapter of another base.
    """
    importance = ImportanceMatrix()
    weights = LoadedModel(open_gguf(source))
    # The text in one batch: at every observed node all threads wait for one another.
    context = weights.new_context(
        1, TEXT_TOKENS, TEXT_TOKENS, "F16", os.cpu_count() or 1, adapter, importance.observe
    )
    memory = weights.api.llama_get_memory(context)
    try:
        for text in texts:
            tokens = weights.tokenize(text)[: min(TEXT_TOKENS, most - importance.tokens)]
            if not tokens:
                continue
            ids = (weights.api.llama_token * len(tokens))(*tokens)
            if status := weights.api.llama_decode(
                context, weights.api.llama_batch_get_one(ids, len(tokens))
            ):
                raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
            weights.api.llama_memory_clear(memory, True)
            importance.tokens += len(tokens)
            on_tokens(len(tokens))
            if importance.tokens >= most:
                break
    finally:
        weights.api.llama_free(context)
        weights.close()
    return importance
