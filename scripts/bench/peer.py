"""The peer of two benches: llama-cpp-python's `create_chat_completion`, with our sampling."""

from __future__ import annotations

import llama_cpp

from pipeline.records import Completion, Request


def create_completion(llama: llama_cpp.Llama, request: Request) -> Completion:
    """Answer a request; `tokens` leaves out the token that ends an answer, as the library does."""
    response = llama.create_chat_completion(
        list(request.messages),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_k=40,
        top_p=1.0,
        min_p=0.05,
        repeat_penalty=1.0,
        seed=request.seed,
    )
    choice, usage = response["choices"][0], response["usage"]
    return Completion(
        choice["message"]["content"],
        usage["completion_tokens"],
        usage["prompt_tokens"],
        choice["finish_reason"],
    )
