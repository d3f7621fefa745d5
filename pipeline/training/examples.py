"""Training examples: which tokens of a dialogue are learned, and how much each counts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.errors import GattError
from pipeline.gatt.ghost import loss_turns
from pipeline.inference.chat_template import ChatTemplate, answer_spans
from pipeline.recipe import Train
from pipeline.records import Message

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """One dialogue as the model learns it: token ids, the same ids or -100 where nothing is learned, and weights in the loss.

    `asked_ids` is the chat as the teacher had it, empty unless it is distilled; `twins` are (place, place there) of the
    teacher's own tokens in both.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    teacher_ids: list[int]
    alignment: list[tuple[int, int]]


class RenderedChat(NamedTuple):
    """A rendered chat: its text, token ids, their (first, last + 1) characters; where the answers stand with their ends, and
    where their words alone.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    answers: list[tuple[int, int]]
    words: list[tuple[int, int]]


def build_example(
    tokenizer: Any, messages: Sequence[Message], settings: Train, asked: Sequence[Message] = ()
) -> TrainingExample:
    """Tokenize a dialogue and label the answers that `settings.loss` learns, each with its end-of-turn token.

    Where `asked` has the chat as the teacher had it and an edit changed it, the words that are in both weigh `own_weight`, and
    everything else 1.
    A dialogue over `max_length` is cut at a turn boundary, from the end.

    Raises:
        GattError: not even turn 1 fits.
    """
    while messages:
        chat = render_and_tokenize(tokenizer, messages)
        if len(chat.ids) <= settings.max_length:
            break
        messages, asked = messages[:-2], asked[:-2]
    if not messages or not chat.answers:
        raise GattError(
            f"Turn 1 of a dialogue is longer than train.max_length = {settings.max_length} tokens. Raise it."
        )
    learned = [chat.answers[turn] for turn in loss_turns(len(chat.answers), settings.loss)]
    source = render_and_tokenize(tokenizer, asked) if asked else None
    edited = _answers(messages) != _answers(asked)
    shared = list(_unchanged_spans(chat, source, edited)) if source else []
    own_weight = settings.unedited_weight if edited else 1.0
    labels, weights = [], []
    for token, place in zip(chat.ids, chat.offsets, strict=True):
        own = _within(place, [(first, last) for first, last, _ in shared])
        labels.append(token if _within(place, learned) else IGNORE_INDEX)
        weights.append(0.0 if labels[-1] == IGNORE_INDEX else own_weight if own else 1.0)
    if source is None or settings.loss != "distill":
        return TrainingExample(chat.ids, labels, weights, [], [])
    return TrainingExample(chat.ids, labels, weights, source.ids, _align(chat, source, shared))


def _answers(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


def render_and_tokenize(tokenizer: Any, messages: Sequence[Message]) -> RenderedChat:
    template = ChatTemplate(
        tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or ""
    )
    text, answers = answer_spans(template, messages)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    said = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    firsts = [text.index(words, *span) for words, span in zip(said, answers, strict=True)]
    words = [(first, first + len(its)) for first, its in zip(firsts, said, strict=True)]
    offsets = list(coded["offset_mapping"])
    answers, words = (
        [_with_space(text, offsets, span) for span in spans] for spans in (answers, words)
    )
    return RenderedChat(text, list(coded["input_ids"]), offsets, answers, words)


def _with_space(
    text: str, offsets: Sequence[tuple[int, int]], span: tuple[int, int]
) -> tuple[int, int]:
    """The span with the space before it, where a template writes one (Mistral's) that is part of its first token."""
    start, end = span
    first = next((left for left, right in offsets if left < start < right), start)
    return (first if text[first:start].isspace() else start), end


def _within(place: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    left, right = place
    return any(start <= left and right <= end and left < right for start, end in spans)


def _unchanged_spans(
    chat: RenderedChat, source: RenderedChat, edited: bool
) -> Iterator[tuple[int, int, int]]:
    """The stretches of answers that an edit has left as they were: first and last + 1 character, and the first in `source`.

    Edited answers were cut to a few sentences, too: where they end is a lesson. In others that is the teacher's own.
    """
    for (start, end), (first, last), (_, whole) in zip(
        chat.words, source.words, chat.answers, strict=True
    ):
        match = difflib.SequenceMatcher(
            None, source.text[first:last], chat.text[start:end], autojunk=False
        )
        for block in match.get_matching_blocks():
            left, right = start + block.b, start + block.b + block.size
            if block.size:
                yield left, right if edited else whole, first + block.a


def _align(
    chat: RenderedChat, source: RenderedChat, shared: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int]]:
    """The tokens that stand for the same characters in both."""
    there = {place: n for n, place in enumerate(source.offsets)}
    moved = [
        (n, (left - first + begin, right - first + begin))
        for first, last, begin in shared
        for n, (left, right) in enumerate(chat.offsets)
        if first <= left < right <= last
    ]
    return [(n, there[place]) for n, place in moved if place in there]
