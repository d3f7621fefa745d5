"""Labels of a dialogue whose answers are partly the student's own.

The teacher's chat has the same answers, and the instruction in every turn.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.records import Message
from pipeline.training.examples import (
    IGNORE_INDEX,
    RenderedChat,
    Span,
    TrainingExample,
    UnchangedSpan,
    align,
    enclosing_spans,
    render_chat,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledAnswer:
    """An answer of the chat, and how it is learned.

    `original` is the text before an edit. `weight` multiplies the loss of the answer's tokens; with
    0 it is context only. `unchanged_weight` multiplies that of what the edit left unchanged. These
    tokens are compared with the teacher's distribution. With `has_end` the end-of-turn token is
    learned, too. `first_tokens` limits what is learned of an answer without an edit; 0 is all.
    """

    text: str
    original: str
    weight: float = 1.0
    unchanged_weight: float = 1.0
    has_end: bool = True
    first_tokens: int = 0

    @property
    def is_edited(self) -> bool:
        """Whether `text` differs from `original`."""
        return self.text.strip() != self.original.strip()


def label_answers(
    tokenizer: PreTrainedTokenizerBase,
    student: Sequence[Message],
    teacher: Sequence[Message],
    answers: Sequence[LabeledAnswer],
) -> TrainingExample:
    """Return an example from the student's and the teacher's chat, which both have `answers`."""
    chat, teacher_chat = render_chat(tokenizer, student), render_chat(tokenizer, teacher)
    learned = [n for n, answer in enumerate(answers) if answer.weight]
    spans = [_learned_span(chat, n, answers[n]) for n in learned]
    answer_index = [
        learned[index] if index >= 0 else -1 for index in enclosing_spans(chat.offsets, spans)
    ]
    unchanged = [
        span
        for n, end in zip(learned, (end for _, end in spans), strict=True)
        for span in _unchanged(chat, teacher_chat, n, answers[n], end)
    ]
    unchanged_index = enclosing_spans(chat.offsets, [(s.start, s.end) for s in unchanged])
    answer_index = _first_tokens(answers, answer_index)
    weights = [
        _weight(answers[n], is_unchanged=index >= 0) if n >= 0 else 0.0
        for n, index in zip(answer_index, unchanged_index, strict=True)
    ]
    distilled_index = [
        index if n >= 0 else -1 for n, index in zip(answer_index, unchanged_index, strict=True)
    ]
    return TrainingExample(
        input_ids=chat.ids,
        labels=[
            token if weight else IGNORE_INDEX
            for token, weight in zip(chat.ids, weights, strict=True)
        ],
        weights=weights,
        teacher_ids=teacher_chat.ids,
        alignment=align(chat, teacher_chat, unchanged, distilled_index),
    )


def _learned_span(chat: RenderedChat, n: int, answer: LabeledAnswer) -> Span:
    (start, end), (answer_start, answer_end) = chat.contents[n], chat.answers[n]
    return (answer_start, answer_end) if answer.has_end else (start, end)


def _weight(answer: LabeledAnswer, *, is_unchanged: bool) -> float:
    return answer.weight * (answer.unchanged_weight if is_unchanged else 1.0)


def _unchanged(
    chat: RenderedChat, teacher: RenderedChat, n: int, answer: LabeledAnswer, end: int
) -> list[UnchangedSpan]:
    """Return the parts of answer `n` that its edit left unchanged; without one, up to `end`."""
    (start, content_end), (teacher_start, _) = chat.contents[n], teacher.contents[n]
    if not answer.is_edited:
        return [UnchangedSpan(start, end, teacher_start)] if end > start else []
    text = chat.text[start:content_end]
    matcher = difflib.SequenceMatcher(None, answer.original.strip(), text, autojunk=False)
    return [
        UnchangedSpan(start + block.b, start + block.b + block.size, teacher_start + block.b)
        for block in matcher.get_matching_blocks()
        if block.size
    ]


def _first_tokens(answers: Sequence[LabeledAnswer], answer_index: Sequence[int]) -> list[int]:
    """Return the answer of each token without the tokens after `first_tokens`."""
    counts = dict.fromkeys(range(len(answers)), 0)
    limited: list[int] = []
    for n in answer_index:
        is_learned = n >= 0
        if is_learned:
            counts[n] += 1
            limit = answers[n].first_tokens
            is_learned = not limit or answers[n].is_edited or counts[n] <= limit
        limited.append(n if is_learned else -1)
    return limited
