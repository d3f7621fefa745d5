"""The body of a chat request, adapted to what a server refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.console import log
from pipeline.records import Request

if TYPE_CHECKING:
    from openai import APIStatusError

_REFUSALS = (400, 422, 501)
"""Status codes of a refused parameter."""
_ESSENTIAL = ("model", "messages")
_LIMITS = ("max_tokens", "max_completion_tokens")
"""Names of the limit of tokens that OpenAI's library knows; others go into the body as they are."""
_OPTIONAL = {
    "seed": "so that another run gets other answers",
    "temperature": "so that the server's own applies",
    "top_p": "so that the server's own applies",
    "stream_options": "so that tokens are counted by chunks",
    "stream": "so that no answer is stopped early",
}
"""What a request can do without, and what that means."""
_UNSUPPORTED = re.compile(
    r"(un|not |n't )(supported|permitted|allowed|recogni[sz]ed|expected|known|accepted|implemented)"
    r"|(not|n't) support|extra|forbidden|disallow|deprecated|only the default"
    r"|(invalid|illegal|no such) (parameter|field|argument|key|option)",
    re.IGNORECASE,
)
"""How servers say that they do not take a parameter, whatever its value is."""
_FILTERS = ("content_filter", "content_policy_violation")
"""Codes of a prompt that a hosted model's filter refuses: of Azure, and of LiteLLM and OpenAI."""
_SEED_RANGE = re.compile(r"2147483647|2\^31|less than|range|too (large|big)|int32", re.IGNORECASE)
_OTHER_LIMIT = re.compile(r"\b(max_(?!tokens\b)\w+|n_predict|num_predict)\b")
_CONTEXT_OVERFLOW = re.compile(r"context.?(length|size|window)|maximum model length", re.IGNORECASE)
_INT32 = 0x7FFFFFFF


class Parameters:
    """The parameters that all servers of a model take, as far as none has refused them.

    What one of them refuses, none gets: their answers must not differ. `changes` says for each
    parameter of OpenAI's API that was refused what became of it.
    """

    def __init__(self) -> None:
        self.changes: dict[str, str] = {}
        self._limit, self._max_seed = "max_tokens", 0xFFFFFFFF

    @property
    def streams(self) -> bool:
        """Return whether answers are streamed."""
        return "stream" not in self.changes

    def body(
        self, model: str, request: Request, *, thought_tokens: int, stream: bool
    ) -> dict[str, object]:
        """Return the body of a request, with tokens for thoughts in addition to the answer's."""
        body: dict[str, object] = {
            "model": model,
            "messages": list(request.messages),
            "temperature": request.temperature,
            "seed": request.seed & self._max_seed,
        }
        if request.top_p < 1:
            body["top_p"] = request.top_p
        limit = {self._limit: request.max_tokens + thought_tokens}
        body |= limit if self._limit in _LIMITS else {"extra_body": limit}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return {name: value for name, value in body.items() if name not in self.changes}

    def learn(self, error: APIStatusError, sent: Mapping[str, object], url: str) -> bool:
        """Adapt to a refusal of what was `sent` to `url`; return whether to send it again."""
        if error.status_code not in _REFUSALS or is_overflow(error):
            return False
        text = json.dumps(error.body) if error.body else error.message
        name = _refused(error, text, [name for name in sent if name not in _ESSENTIAL])
        seed = sent.get("seed", 0)
        if name in self.changes or (
            name == "seed" and isinstance(seed, int) and seed > self._max_seed
        ):
            return True  # another request has learned it meanwhile
        if name in _OPTIONAL:
            return self._leave_out(name, text, url)
        return bool(name) and self._rename_limit(name, text, url)

    def _rename_limit(self, name: str, text: str, url: str) -> bool:
        """Take another name for the limit of tokens: the one in the error message, or OpenAI's."""
        if name != "max_tokens" or not _UNSUPPORTED.search(text):
            return False
        match = _OTHER_LIMIT.search(text)
        self._limit = self.changes[name] = match[0] if match else "max_completion_tokens"
        log(f"The server at {url} takes {self._limit} in place of max_tokens.")
        return True

    def _leave_out(self, name: str, text: str, url: str) -> bool:
        if name == "seed" and self._max_seed > _INT32 and _SEED_RANGE.search(text):
            self._max_seed = _INT32
            log(
                f"The server at {url} takes seeds below 2^31 only: the first bit of each is left "
                "out."
            )
            return True
        if name in ("stream", "temperature", "top_p") and not _UNSUPPORTED.search(text):
            return False
        self.changes[name] = "left out"
        log(f"The server at {url} refuses {name}: requests go without it, {_OPTIONAL[name]}.")
        return True


def is_overflow(error: APIStatusError) -> bool:
    """Return whether a request was refused because it does not fit in the context."""
    text = f"{error.code} {json.dumps(error.body)} {error.message}"
    return error.status_code in (400, 413, 422) and bool(_CONTEXT_OVERFLOW.search(text))


def is_filtered(error: APIStatusError) -> bool:
    """Return whether a filter of the provider refused the prompt: its model did not answer."""
    return error.status_code == 400 and error.code in _FILTERS


def _refused(error: APIStatusError, text: str, names: list[str]) -> str:
    """Return which of the parameters `names` an error is about, or "".

    Servers name it in a field of its own (OpenAI), at the end of a path (FastAPI), or in words.
    """
    path = re.search(r'"loc": \[[^]]*"(\w+)"\]', text)
    place = error.param or (path[1] if path else text)
    starts = {name: re.search(rf"\b{name}\b", place) for name in names}
    mentioned = {name: match.start() for name, match in starts.items() if match}
    return min(mentioned, key=mentioned.__getitem__, default="")
