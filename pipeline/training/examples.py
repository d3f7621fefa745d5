"""Training examples: which tokens of a dialogue are learned, and their weights in the loss."""

from __future__ import annotations

import difflib
import random
from bisect import bisect_right
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.console import log
from pipeline.data.dialogues import Chat, load_chats
from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.gatt.ghost import loss_turns
from pipeline.inference.chat_template import answer_spans, template_of
from pipeline.recipe import Recipe, Train
from pipeline.records import Message, SynthesizedDialogue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""The label of a token that is not learned, as in torch and transformers."""

_SPLIT_RATIO = 0.5
"""Share of the tokens with a line break of an edit that are split in two."""
Span = tuple[int, int]
"""First and last + 1 character of a part of a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingExample:
    """One tokenized dialogue; `input_ids`, `labels` and `weights` have one value per token.

    `labels` repeat the token id, or are `IGNORE_INDEX`; `weights` are those of the loss.
    With "distill", `teacher_ids` is the chat with the teacher's prompt, and `alignment` has the
    (index in `input_ids`, index in `teacher_ids`) of each unedited token.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float]
    teacher_ids: Sequence[int] = ()
    alignment: Sequence[tuple[int, int]] = ()

    @property
    def max_tokens(self) -> int:
        """Return the tokens of the longer one of its two chats."""
        return max(len(self.input_ids), len(self.teacher_ids))

    @property
    def learned_tokens(self) -> int:
        """Return the number of tokens that have a label and a weight."""
        return sum(self.loss_mask)

    @property
    def loss_mask(self) -> list[bool]:
        """Return for each token whether it has a label and a weight."""
        pairs = zip(self.labels, self.weights, strict=True)
        return [label != IGNORE_INDEX and weight > 0 for label, weight in pairs]


class RenderedChat(NamedTuple):
    """A tokenized chat. `offsets` has the characters of each token.

    `answers` are the spans of the assistant messages with their end-of-turn tokens, `contents`
    those of their text alone.
    """

    text: str
    ids: list[int]
    offsets: list[Span]
    answers: list[Span]
    contents: list[Span]


class UnchangedSpan(NamedTuple):
    """Characters `start` to `end` that the student's chat shares with the teacher's."""

    start: int
    end: int
    teacher_start: int


def training_examples(
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    file: Path,
    held_out: Set[str] = frozenset(),
) -> list[TrainingExample]:
    """Return the examples of a run: the dialogues in `file`, and the recipe's `replay_data`.

    `held_out` are the user turns of validation and evaluation, as `replay_chats` takes them.
    """
    rows: list[SynthesizedDialogue] = [row for _, row in read_jsonl(file)]
    examples = [example_from_row(tokenizer, row, recipe, random_slips(row, recipe)) for row in rows]
    if recipe.train.replay_data:
        chats = replay_chats(recipe, len(examples), held_out)
        replayed = [_replayed(tokenizer, chat, recipe.train) for chat in chats]
        pairs = zip(chats, replayed, strict=True)
        if left_out := [chat.place for chat, example in pairs if not example]:
            log(
                f"train: replayed chats left out: {len(left_out)}, the first is {left_out[0]}. "
                "They have no answer with a weight within train.max_length = "
                f"{recipe.train.max_length} tokens, or the model's chat template refuses them."
            )
        examples += [example for example in replayed if example]
    return examples


def _replayed(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, settings: Train
) -> TrainingExample | None:
    """Return a chat of the user's, labeled; None if it cannot be learned."""
    try:
        example = build_example(tokenizer, chat.messages, settings, (), chat.answer_weights)
    except GattError:
        return None
    return example if example.learned_tokens else None


def example_from_row(
    tokenizer: PreTrainedTokenizerBase,
    row: SynthesizedDialogue,
    recipe: Recipe,
    slips: Collection[int] = (),
) -> TrainingExample:
    """Return one synthesized dialogue, labeled.

    Sampled answers were generated with the instruction visible. Without distillation, all of their
    tokens have full weight. The answers that `slips` counts, from 0, stand in the history as the
    teacher wrote them, and are not learned.
    """
    full_weight = row["way"] == "sampled" and recipe.train.loss != "distill"
    teacher_messages = () if full_weight else row["asked"]
    if not slips:
        return build_example(tokenizer, row["messages"], recipe.train, teacher_messages)
    raw = _answers(row["asked"])
    messages = list(row["messages"])
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in slips:
        messages[answers[turn]] = {"role": "assistant", "content": raw[turn]}
    weights = [float(turn not in slips) for turn in range(len(answers))]
    example = build_example(tokenizer, messages, recipe.train, teacher_messages, weights)
    # Where `max_length` cuts a dialogue, only slips may be left of what it would learn.
    return example if example.learned_tokens else example_from_row(tokenizer, row, recipe)


def random_slips(row: SynthesizedDialogue, recipe: Recipe) -> list[int]:
    """Return the answers of an edited dialogue, from 0, that lose their edit; never the last."""
    if row["way"] != "edited":
        return []
    rng = random.Random(f"slips {recipe.seed} {row['dialogue']}")
    drawn = [rng.random() < recipe.train.slip_ratio for _ in _answers(row["asked"])]
    texts = zip(_answers(row["messages"]), _answers(row["asked"]), drawn, strict=True)
    changed = [slip and text != raw for text, raw, slip in texts]
    return [turn for turn, slip in enumerate(changed[:-1]) if slip]


def replay_chats(recipe: Recipe, synthesized: int, held_out: Set[str] = frozenset()) -> list[Chat]:
    """Return as many of the user's own chats as the recipe mixes with the synthesized ones.

    A chat is left out if its first two user turns, or its only one, are among `held_out`.
    """
    ratio = recipe.train.replay_ratio
    loaded = load_chats(recipe.train.replay_data)
    chats = [chat for chat in loaded if not set(_user_turns(chat)[:2]) <= held_out]
    if left_out := len(loaded) - len(chats):
        log(
            f"train: {left_out} chats of {recipe.train.replay_data} are not replayed, because "
            "their user turns are those of a dialogue for evaluation or validation."
        )
    count = round(synthesized * ratio / (1 - ratio))
    if len(chats) < count:
        log(
            f"train: {recipe.train.replay_data} has {len(chats)} chats, fewer than the {count} of "
            f"train.replay_ratio = {ratio:g}. All of them are used."
        )
    return random.Random(f"mix {recipe.seed}").sample(chats, min(count, len(chats)))


def _user_turns(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.messages if message["role"] == "user"]


def build_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    settings: Train,
    teacher_messages: Sequence[Message] = (),
    answer_weights: Sequence[float] = (),
) -> TrainingExample:
    """Tokenize a dialogue and label the answers that `settings.loss` learns, end-of-turn included.

    `teacher_messages` is the same dialogue as the teacher answered it. If its answers were edited,
    the tokens that the edit left unchanged weigh `settings.unedited_weight`, and all others 1.
    `answer_weights` multiplies the weights of each answer; one of weight 0 is not learned. A
    dialogue of more than `settings.max_length` tokens loses its last turns.

    Raises:
        GattError: not even turn 1 fits.
    """
    truncated, chat = _truncate(tokenizer, messages, settings.max_length)
    # Counted from the end: only one of the two chats may have a system message.
    dropped = len(messages) - len(truncated)
    teacher_messages = teacher_messages[: len(teacher_messages) - dropped]
    teacher = render_chat(tokenizer, teacher_messages) if teacher_messages else None
    edited = _answers(truncated) != _answers(teacher_messages)
    unchanged = _unchanged_spans(chat, teacher, edited=edited) if teacher else []
    chat = _split_line_breaks(tokenizer, chat, unchanged, settings.max_length)
    turns = [
        turn
        for turn in loss_turns(len(chat.answers), settings.loss)
        if not answer_weights or answer_weights[turn]
    ]
    learned_index = _enclosing_spans(chat.offsets, [chat.answers[turn] for turn in turns])
    factors = [answer_weights[turn] if answer_weights else 1.0 for turn in turns]
    unchanged_index = _enclosing_spans(chat.offsets, [(span.start, span.end) for span in unchanged])
    unedited_weight = settings.unedited_weight if edited else 1.0
    example = TrainingExample(
        input_ids=chat.ids,
        labels=[
            token if n >= 0 else IGNORE_INDEX
            for token, n in zip(chat.ids, learned_index, strict=True)
        ],
        weights=[
            (unedited_weight if unchanged_n >= 0 else 1.0) * factors[n] if n >= 0 else 0.0
            for unchanged_n, n in zip(unchanged_index, learned_index, strict=True)
        ],
    )
    if teacher is None or settings.loss != "distill":
        return example
    alignment = _align(chat, teacher, unchanged, unchanged_index)
    return replace(example, teacher_ids=teacher.ids, alignment=alignment)


def _truncate(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], max_length: int
) -> tuple[Sequence[Message], RenderedChat]:
    """Drop turns from the end until the chat has at most `max_length` tokens."""
    while any(message["role"] == "assistant" for message in messages):
        chat = render_chat(tokenizer, messages)
        if len(chat.ids) <= max_length:
            return messages, chat
        messages = messages[:-2]
    raise GattError(
        f"Turn 1 of a dialogue is longer than train.max_length = {max_length} tokens. Raise it."
    )


def _answers(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> RenderedChat:
    """Render `messages` with the tokenizer's chat template, and tokenize the text."""
    template = template_of(tokenizer)
    text, answers = answer_spans(template, messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = list(encoding["offset_mapping"])
    contents: list[Span] = []
    for answer, span in zip(_answers(messages), answers, strict=True):
        start = text.index(answer.strip(), *span)
        contents.append((start, start + len(answer.strip())))
    return RenderedChat(
        text=text,
        ids=list(encoding["input_ids"]),
        offsets=offsets,
        answers=[_with_leading_space(text, offsets, span) for span in answers],
        contents=[_with_leading_space(text, offsets, span) for span in contents],
    )


def _with_leading_space(text: str, offsets: Sequence[Span], span: Span) -> Span:
    """Extend a span to the start of its first token, if only white space lies between.

    Mistral's template writes a space before an answer, and the first token includes it.
    """
    start, end = span
    token_start = next((left for left, right in offsets if left < start < right), start)
    return (token_start if text[token_start:start].isspace() else start), end


def _enclosing_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return for each token the index of the span that contains all of it, or -1.

    `spans` are in order and do not overlap. A token without characters is in none of them.
    """
    starts = [start for start, _ in spans]
    indices: list[int] = []
    for left, right in offsets:
        n = bisect_right(starts, left) - 1
        indices.append(n if n >= 0 and left < right <= spans[n][1] else -1)
    return indices


def _unchanged_spans(
    chat: RenderedChat, teacher: RenderedChat, *, edited: bool
) -> list[UnchangedSpan]:
    """Return the parts of the answers that an edit left unchanged.

    Edits also shorten answers, so where an edited answer ends is learned in full. An answer that
    was not edited is unchanged up to its end-of-turn token.
    """
    spans: list[UnchangedSpan] = []
    for (start, end), (teacher_start, teacher_end), (_, answer_end) in zip(
        chat.contents, teacher.contents, chat.answers, strict=True
    ):
        matcher = difflib.SequenceMatcher(
            None, teacher.text[teacher_start:teacher_end], chat.text[start:end], autojunk=False
        )
        spans += [
            UnchangedSpan(
                start=start + block.b,
                end=start + block.b + block.size if edited else answer_end,
                teacher_start=teacher_start + block.a,
            )
            for block in matcher.get_matching_blocks()
            if block.size
        ]
    return spans


def _split_line_breaks(
    tokenizer: PreTrainedTokenizerBase,
    chat: RenderedChat,
    unchanged: Sequence[UnchangedSpan],
    max_length: int,
) -> RenderedChat:
    """Split half of the tokens that hold an unchanged end and a line break that an edit added.

    The tokenizers of Qwen and Llama 3 have one token for a period with the line break after it. A
    model may as well write the period alone, and only from split tokens learns that the line break
    follows. The other half stay, since a chat that is tokenized again has them.
    """
    ends = [span.end for span in unchanged]
    rng = random.Random(chat.text)
    ids: list[int] = []
    offsets: list[Span] = []
    for token, (left, right) in zip(chat.ids, chat.offsets, strict=True):
        n = bisect_right(ends, left)
        end = ends[n] if n < len(ends) else right
        if left < end < right and chat.text[end] == "\n" and rng.random() < _SPLIT_RATIO:
            texts = [chat.text[left:end], chat.text[end:right]]
            parts = tokenizer(texts, add_special_tokens=False).input_ids
            if all(len(part) == 1 for part in parts):
                ids += [part[0] for part in parts]
                offsets += [(left, end), (end, right)]
                continue
        ids.append(token)
        offsets.append((left, right))
    return chat._replace(ids=ids, offsets=offsets) if len(ids) <= max_length else chat


def _align(
    chat: RenderedChat,
    teacher: RenderedChat,
    unchanged: Sequence[UnchangedSpan],
    unchanged_index: Sequence[int],
) -> list[tuple[int, int]]:
    """Return the (index in `chat`, index in `teacher`) of tokens for the same characters.

    `unchanged_index` has for each token of `chat` its span in `unchanged`, or -1.
    """
    # The tokens of one emoji share its offsets; only their ids tell them apart.
    teacher_index = {
        (span, token): n
        for n, (span, token) in enumerate(zip(teacher.offsets, teacher.ids, strict=True))
    }
    alignment: list[tuple[int, int]] = []
    for n, (token, (left, right), index) in enumerate(
        zip(chat.ids, chat.offsets, unchanged_index, strict=True)
    ):
        if index < 0:
            continue
        shift = unchanged[index].teacher_start - unchanged[index].start
        match = teacher_index.get(((left + shift, right + shift), token))
        if match is not None:
            alignment.append((n, match))
    return alignment


def mark_learned(
    tokenizer: PreTrainedTokenizerBase, example: TrainingExample, start: str, end: str
) -> str:
    """Return the dialogue as text, with the learned tokens between `start` and `end`.

    Tokens are decoded after all those before them: alone, some lose a space or part of a character.
    """
    ids, learned = example.input_ids, example.loss_mask
    pieces: list[str] = []
    text = ""
    for n in range(1, len(ids) + 1):
        if n < len(ids) and learned[n] == learned[n - 1]:
            continue
        longer = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        if n < len(ids):
            longer = longer.rstrip("\ufffd")  # the beginning of a character
        piece = longer[len(text) :]
        pieces.append(f"{start}{piece}{end}" if learned[n - 1] else piece)
        text = longer
    return "".join(pieces)
