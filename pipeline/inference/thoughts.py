"""Thoughts of reasoning models: tell them from the answer, in a complete text and in a stream.

A thought is not an answer: it is not trained on, not checked, and not sent back with the chat.
It counts only where models write one: at the beginning of a text, or, in a text that began with
one, at the beginning of a line. A text that merely mentions a tag is an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

from pipeline.errors import GattError
from pipeline.inference.chat_template import ChatTemplate
from pipeline.records import Completion, Request, Task

MARKERS: dict[str, tuple[str, ...]] = {
    "<think>": ("</think>",),  # DeepSeek R1, Qwen3, SmolLM3 and most others
    "<thinking>": ("</thinking>",),
    "<thought>": ("</thought>",),  # EXAONE Deep
    "<reasoning>": ("</reasoning>",),
    "<seed:think>": ("</seed:think>",),  # Seed-OSS
    "[THINK]": ("[/THINK]",),  # Magistral
    "◁think▷": ("◁/think▷",),  # Kimi
    "<|START_THINKING|>": ("<|END_THINKING|>",),  # Command A
    "<|begin_of_thought|>": ("<|end_of_thought|>",),  # Sky-T1
    "<|channel>thought": ("<channel|>",),  # Gemma 4
    **dict.fromkeys(  # gpt-oss: everything before the final channel
        ("<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>"),
        (
            "<|end|><|start|>assistant<|channel|>final<|message|>",
            "<|channel|>final<|message|>",
        ),
    ),
}
"""What opens a thought, and what ends it (gpt-oss: either of two texts)."""
_ANSWER_STARTS = (
    "<|START_RESPONSE|>",
    "<|begin_of_solution|>",
    "<|channel|>final<|message|>",
)
"""What may stand before an answer and is no part of it."""
_ENDS = tuple(dict.fromkeys(end for ends in MARKERS.values() for end in ends))
_LOST_END = re.compile("|".join(rf"(?<![`\"'“‘]){re.escape(end)}" for end in _ENDS))
"""An end without a beginning; one behind a quotation mark or a backtick is only mentioned."""
_CODE_FENCE = re.compile(r"^ *```.*?(?:^ *```|\Z)", re.MULTILINE | re.DOTALL)
_LINE_MARKER = re.compile(r"\n[ \t]*(" + "|".join(map(re.escape, MARKERS)) + ")")
_BARE_CHANNELS = re.compile(r"\s*analysis(.*?)assistantfinal(.*)", re.DOTALL)
"""A text of gpt-oss by a server that removes special tokens."""
MARKER_TOKENS = frozenset(
    token
    for text in (*MARKERS, *_ENDS, *_ANSWER_STARTS)
    for token in re.findall(r"<\|?[^<>]*\|?>|\[/?THINK]|◁/?think▷", text)
)
"""The special tokens in all of these; some vocabularies have them as control tokens."""


class Split(NamedTuple):
    """A text, or a piece of one, divided into thoughts and answer.

    `finished`: no thought is open. Otherwise what follows is still a thought, and a text that ends
    here has no answer.
    """

    thoughts: str
    answer: str
    finished: bool = True


def split_thoughts(text: str, opened: str | None = None) -> Split:
    """Divide a complete text; both parts are stripped, unless the text has no thought.

    Args:
        text: what the model generated.
        opened: the marker that the prompt ended with, so that the text begins within a thought
            (`opened_thought`); "" if it had none. None: not known, as with a server. Then an end
            without a beginning shows that the prompt opened a thought.
    """
    if opened is None:
        if channels := _BARE_CHANNELS.fullmatch(text):
            return Split(channels[1].strip(), channels[2].strip())
        opened = lost_marker(text)
    splitter = ThoughtSplitter(opened)
    begin, end = splitter.feed(text), splitter.close()
    if not splitter.has_thoughts:
        return Split("", text)
    thoughts, answer = begin.thoughts + end.thoughts, begin.answer + end.answer
    return Split(thoughts.strip(), answer.strip(), end.finished)


def lost_marker(text: str) -> str:
    """Return the marker of a thought whose end stands in `text` without a beginning, or "".

    The prompt must have opened it.
    """
    if text.lstrip().startswith(tuple(MARKERS)):
        return ""
    end = _LOST_END.search(_CODE_FENCE.sub(lambda fence: " " * len(fence[0]), text))
    if not end:
        return ""
    marker = next(start for start, ends in MARKERS.items() if end[0] in ends)
    return "" if marker in text[: end.start()] else marker


def opened_thought(prompt: str, answer: str = "") -> str:
    """Return the marker of the thought that a rendered prompt leaves open, or "".

    `answer` is the beginning of the answer, if the prompt goes on with one.
    """
    prompt = prompt.rstrip()
    splitter = ThoughtSplitter(next((m for m in MARKERS if prompt.endswith(m)), ""))
    splitter.feed(answer)
    return splitter.opened


def is_reasoning_template(source: str) -> bool:
    """Return whether a chat template is that of a model that can think.

    It opens a thought, or it removes thoughts from earlier answers.
    """
    return any(text in source for text in (*MARKERS, *_ENDS, "<|channel|>analysis"))


def thinks(template: ChatTemplate) -> bool:
    """Return whether a model thinks before it answers, so that it needs tokens for that.

    It does not where its template can switch that off, as `ChatTemplate.render` asks for.
    """
    if not is_reasoning_template(template.source):
        return False
    try:
        prompt = template.render([{"role": "user", "content": "Hi"}])
    except GattError:
        return True
    return not prompt.rstrip().endswith(_ENDS)


def always_thinks(template: ChatTemplate) -> bool:
    """Return whether a template opens a thought for every answer, and cannot switch that off."""
    try:
        return bool(opened_thought(template.render([{"role": "user", "content": "Hi"}])))
    except GattError:
        return False


class ThoughtSplitter:
    """Divides a text that arrives in pieces; what may be part of a marker is held back.

    `opened` is as for `split_thoughts`, but has to be known; the attribute is the marker of the
    thought that is open now. `has_thoughts` tells whether there was a thought so far.
    """

    def __init__(self, opened: str = "") -> None:
        self.opened, self.has_thoughts = opened, bool(opened)
        self._held = ""
        self._answer = ""
        self._at_start = True  # of the text, or of what follows a thought

    @property
    def thinking(self) -> bool:
        """Return whether a thought is open."""
        return bool(self.opened)

    def feed(self, piece: str) -> Split:
        """Return the thoughts and the answer that are certain now, but for those before."""
        self._held += piece
        return self._take(last=False)

    def close(self) -> Split:
        """Return what was held back, at the end of the text."""
        return self._take(last=True)

    def _take(self, *, last: bool) -> Split:
        thoughts, answer, changed = "", "", True
        while changed:
            if self.opened:
                piece, changed = self._take_thought(last=last)
                thoughts += piece
            else:
                piece, changed = self._take_answer(last=last)
                answer += piece
                self._answer += piece
        return Split(thoughts, answer, not self.opened)

    def _take_thought(self, *, last: bool) -> tuple[str, bool]:
        """Return a piece of a thought, and whether its end was found."""
        ends = MARKERS[self.opened]
        starts = [(self._held.find(end), end) for end in ends if end in self._held]
        if starts:
            start, end = min(starts)
            piece, self._held = self._held[:start], self._held[start + len(end) :]
            self.opened, self._at_start = "", True
            return piece, True
        size = 0 if last else _partial(self._held, ends)
        return self._release(len(self._held) - size), False

    def _take_answer(self, *, last: bool) -> tuple[str, bool]:
        """Return a piece of the answer, and whether a thought begins behind it."""
        if self._at_start:
            return self._take_start(last=last)
        if not self.has_thoughts:
            return self._release(len(self._held)), False
        for match in _LINE_MARKER.finditer(self._held):
            piece = self._held[: match.start() + 1]
            if (self._answer + piece).count("```") % 2 == 0:  # not in a block of code
                self._held = self._held[match.end() :]
                self.opened = match[1]
                return piece, True
        line = self._held.rfind("\n")
        begins = line >= 0 and _may_become(self._held[line:].strip(), tuple(MARKERS))
        return self._release(line if begins and not last else len(self._held)), False

    def _take_start(self, *, last: bool) -> tuple[str, bool]:
        """Do the same at the start of an answer, where spaces and a marker may stand."""
        text = self._held.lstrip()
        for marker in MARKERS:
            if text.startswith(marker):
                self._held, self.opened, self.has_thoughts = text[len(marker) :], marker, True
                return "", True
        dropped = (*_ANSWER_STARTS, *_ENDS) if self.has_thoughts else _ANSWER_STARTS
        for marker in dropped:
            if text.startswith(marker):  # some models write the end of a thought twice
                self._held, self.has_thoughts = text[len(marker) :], True
                return "", True
        if not last and _may_become(text, (*MARKERS, *dropped)):
            return "", False
        self._at_start = False
        if self.has_thoughts:
            self._held = text
        return "", bool(self._held)

    def _release(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        return piece


def _may_become(text: str, markers: tuple[str, ...]) -> bool:
    """Return whether more text could turn `text` into one of the markers."""
    return any(marker.startswith(text) for marker in markers)


def _partial(text: str, markers: tuple[str, ...]) -> int:
    """Return the length of the longest end of `text` that one of the markers begins with."""
    sizes = (n for marker in markers for n in range(1, len(marker)) if text.endswith(marker[:n]))
    return max(sizes, default=0)


class AnswerFilter:
    """Gives the tasks of a local model its answers without its thoughts.

    `tokenize` and the context of `n_ctx` tokens are those of the model.
    """

    def __init__(
        self, template: ChatTemplate, tokenize: Callable[[str], list[int]], n_ctx: int
    ) -> None:
        self._template, self._tokenize, self._n_ctx = template, tokenize, n_ctx
        self.thinks = thinks(template)

    def wrap(self, task: Task) -> Task:
        """Return a task that runs `task`, with more tokens for thoughts where the model thinks."""
        completion: Completion | None = None
        with closing(task):
            while True:
                try:
                    request = task.send(completion) if completion else next(task)
                except StopIteration:
                    return
                opened, extended = self._extend(request)
                completion = self._answer(request, opened, (yield extended))

    def _extend(self, request: Request) -> tuple[str, Request]:
        """Return the marker that the prompt ends with, and the request to generate for."""
        if not self.thinks:
            stop_when = request.stop_when
            if not stop_when:
                return "", request
            stops = stop_when
            return "", replace(
                request, stop_when=lambda text: stops(ThoughtSplitter().feed(text).answer)
            )
        prompt = self._template.render(request.messages)
        room = self._n_ctx - len(self._tokenize(prompt)) - request.max_tokens
        budget = max(0, min(request.max_thought_tokens, room))
        opened = opened_thought(prompt)

        def stop(text: str) -> bool:
            answer = ThoughtSplitter(opened).feed(text).answer
            return bool(answer) and (
                len(self._tokenize(answer)) >= request.max_tokens
                or bool(request.stop_when and request.stop_when(answer))
            )

        return opened, replace(request, max_tokens=request.max_tokens + budget, stop_when=stop)

    def _answer(self, request: Request, opened: str, completion: Completion) -> Completion:
        """Return a completion without its thoughts; "stop_when" is the request's own."""
        if completion.finish in ("context", "cancelled"):
            return completion
        thoughts, answer, finished = split_thoughts(completion.text, opened)
        finish = completion.finish
        if not finished:
            finish = "thinking"
        elif self.thinks and finish == "stop_when":
            stopped = request.stop_when and request.stop_when(answer)
            finish = "stop_when" if stopped else "length"
        return replace(completion, text=answer, finish=finish, thoughts=thoughts)
