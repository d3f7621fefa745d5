"""`gatt chat`: talk with any GGUF in the terminal; the first message, with the instruction, is never dropped."""

from __future__ import annotations

from pipeline.backends.convert import gguf_file
from pipeline.backends.hub import find_model
from pipeline.backends.llama import Llama
from pipeline.backends.weights import Adapter
from pipeline.console import note, out
from pipeline.gatt.ghost import ghost
from pipeline.records import Request

_CONTEXT, _ANSWER = 4096, 256


def run(model: str, instruction: str, system: str, seed: int, adapter: Adapter | None) -> None:
    """Read lines until the end of input; each answer is streamed."""
    users: list[str] = []
    answers: list[str] = []
    base = find_model(model)
    with Llama(base.path if base.is_gguf else gguf_file(base, "Q8_0"), 1, _CONTEXT, adapter=adapter) as llama:
        note(f"{base.name}. An empty line or Ctrl-D ends the chat.")
        while True:
            try:
                user = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if not user:
                return
            users.append(user)
            request = Request(ghost(users, answers, [instruction] * len(users), system), seed + len(users), _ANSWER)
            completion = llama.complete(request, lambda piece: out(piece, end=""))
            out("")
            if completion.finish == "context":
                note(f"The context of {_CONTEXT} tokens is full; going on would drop your first message. Start a new chat.")
                return
            answers.append(completion.text)
