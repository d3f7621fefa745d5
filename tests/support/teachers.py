"""OpenAI-compatible servers as they are: reasoning models, and servers that refuse parameters.

All give the same answers to the same chats, so that a teacher's data can be compared.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.records import Message
from support.servers import FakeOpenAIServer, Handler, in_thread, send_json

Body = dict[str, Any]
Fields = dict[str, str]
Wrap = Callable[[str, str], Fields]
"""Turns thoughts and answer into the fields of a message."""
_WORDS = (
    "river",
    "mountain",
    "garden",
    "silver",
    "planet",
    "engine",
    "bridge",
    "candle",
    "forest",
    "window",
    "marble",
    "thunder",
    "copper",
    "velvet",
    "harbor",
    "meadow",
    "lantern",
    "orchard",
    "pebble",
    "saddle",
)
_PIECE = 7
"""Characters of a chunk, so that markers are cut."""


def answer_to(messages: list[Message]) -> str:
    """Return an answer about the last message that depends on the chat only."""
    draw = zlib.crc32(json.dumps(messages).encode())
    first, second, third, fourth = (_WORDS[(draw >> 5 * n) % len(_WORDS)] for n in range(4))
    topic = " ".join([word for word in messages[-1]["content"].split() if len(word) > 3][:3])
    return f"About {topic}: the {first} {second} is a {third} thing {draw}. Also {fourth}."


def obeying_answer_to(messages: list[Message]) -> str:
    """Return an answer that begins or ends with the phrase that a user message quotes."""
    text = " ".join(m["content"] for m in messages if m["role"] == "user")
    answer, phrases = answer_to(messages), re.findall(r'"([^"]+)"', text)
    if not phrases:
        return f"Captain Nemo here. {answer}" if "Nemo" in text else answer
    before = text.split(phrases[-1])[0][-90:].lower()
    ends = any(word in before for word in ("close", "closing", "end "))
    return f"{answer} {phrases[-1]}" if ends else f"{phrases[-1]} {answer}"


def _thoughts(messages: list[Message]) -> str:
    topic = messages[-1]["content"][:30].replace("\n", " ")
    return f'Okay, the user asks about {topic}. Ahoy! Hark! I might say yes, or "no". '


WRAPS: Mapping[str, Wrap] = {
    "plain": lambda _, answer: {"content": answer},
    "think": lambda t, answer: {"content": f"<think>\n{t}\n</think>\n\n{answer}"},
    "one line": lambda t, answer: {"content": f"<think>{t}</think>{answer}"},
    "no opening tag": lambda t, answer: {"content": f"{t}\n</think>\n\n{answer}"},
    "two blocks": lambda t, answer: {
        "content": f"<think>{t}</think>\n<think>{t}</think>\n{answer}"
    },
    "thinking": lambda t, answer: {"content": f"<thinking>{t}</thinking>\n{answer}"},
    "magistral": lambda t, answer: {"content": f"[THINK]{t}[/THINK]{answer}"},
    "channels": lambda t, answer: {
        "content": f"<|channel|>analysis<|message|>{t}<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{answer}"
    },
    "reasoning_content": lambda t, answer: {"reasoning_content": t, "content": answer},
    "reasoning": lambda t, answer: {"reasoning": t, "content": answer},
}
"""How servers send thoughts and answer."""


def _chunks(message: Fields, finish: str) -> str:
    pieces = [
        {field: text[n : n + _PIECE]}
        for field, text in message.items()
        for n in range(0, len(text), _PIECE)
    ]
    choices: list[Body] = [{"index": 0, "delta": piece} for piece in pieces]
    choices.append({"index": 0, "delta": {}, "finish_reason": finish})
    events = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
    return "".join(events) + "data: [DONE]\n\n"


class Teacher:
    """A server that answers with `answer`, sent as `wrap` says.

    `cut_at`: characters after which the server ends a text, for its limit of tokens, unless the
    request allows more than 1000. `refusal`: returns the response to a body that the server
    refuses, or None.
    """

    def __init__(
        self,
        wrap: str = "plain",
        *,
        answer: Callable[[list[Message]], str] = answer_to,
        cut_at: int = 0,
        refusal: Callable[[Body], tuple[int, object] | None] = lambda _: None,
    ) -> None:
        self._wrap, self._answer, self._cut_at, self._refusal = WRAPS[wrap], answer, cut_at, refusal

    def __call__(self, handler: Handler, body: Body) -> None:
        """Answer one request."""
        refused = self._refusal(body)
        if refused:
            send_json(*refused)(handler, body)
            return
        messages = body["messages"]
        message, finish = self._wrap(_thoughts(messages), self._answer(messages)), "stop"
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 0
        if self._cut_at and limit <= 1000:
            (field, text), *_ = message.items()
            message, finish = {field: text[: self._cut_at]}, "length"
        if body.get("stream"):
            handler.send(200, "text/event-stream", _chunks(message, finish))
            return
        choices = [{"index": 0, "message": message, "finish_reason": finish}]
        send_json(200, {"choices": choices})(handler, body)


@contextmanager
def serve(teacher: Teacher) -> Iterator[FakeOpenAIServer]:
    """Run a server and yield it; `bodies` are the requests that it got."""
    with in_thread(FakeOpenAIServer()) as server:
        server.responses = [teacher]
        yield server
