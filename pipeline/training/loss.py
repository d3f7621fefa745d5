"""What is learned of a dialogue: labels and weights by token, and the loss of a batch. The loop around it is in trainer.py."""

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

IGNORED = -100
_LOGITS = 2**22
"""Logits that are in memory at a time: of more, whole gigabytes would be kept for the way back."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One dialogue as the model learns it: token ids, the same ids or -100 where nothing is learned, and weights in the loss.

    `asked_ids` is the chat as the teacher had it, empty unless it is distilled; `twins` are (place, place there) of the
    teacher's own tokens in both.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    asked_ids: list[int]
    twins: list[tuple[int, int]]


class _Coded(NamedTuple):
    """A rendered chat: its text, token ids, their (first, last + 1) characters; where the answers stand with their ends, and
    where their words alone.
    """

    text: str
    ids: list[int]
    places: list[tuple[int, int]]
    answers: list[tuple[int, int]]
    words: list[tuple[int, int]]


def label(
    tokenizer: Any, messages: Sequence[Message], settings: Train, asked: Sequence[Message] = ()
) -> Labelled:
    """Tokenise a dialogue and label the answers that `settings.loss` learns, each with its end-of-turn token.

    Where `asked` has the chat as the teacher had it and an edit changed it, the words that are in both weigh `own_weight`, and
    everything else 1.
    A dialogue over `max_length` is cut at a turn boundary, from the end.

    Raises:
        GattError: not even turn 1 fits.
    """
    while messages:
        chat = _code(tokenizer, messages)
        if len(chat.ids) <= settings.max_length:
            break
        messages, asked = messages[:-2], asked[:-2]
    if not messages or not chat.answers:
        raise GattError(
            f"Turn 1 of a dialogue is longer than train.max_length = {settings.max_length} tokens. Raise it."
        )
    learned = [chat.answers[turn] for turn in loss_turns(len(chat.answers), settings.loss)]
    source = _code(tokenizer, asked) if asked else None
    edited = _answers(messages) != _answers(asked)
    shared = list(_shared(chat, source, edited)) if source else []
    own_weight = settings.own_weight if edited else 1.0
    labels, weights = [], []
    for token, place in zip(chat.ids, chat.places, strict=True):
        own = _within(place, [(first, last) for first, last, _ in shared])
        labels.append(token if _within(place, learned) else IGNORED)
        weights.append(0.0 if labels[-1] == IGNORED else own_weight if own else 1.0)
    if source is None or settings.loss != "distill":
        return Labelled(chat.ids, labels, weights, [], [])
    return Labelled(chat.ids, labels, weights, source.ids, _twins(chat, source, shared))


def _answers(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


def _code(tokenizer: Any, messages: Sequence[Message]) -> _Coded:
    template = ChatTemplate(
        tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or ""
    )
    text, answers = answer_spans(template, messages)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    said = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    firsts = [text.index(words, *span) for words, span in zip(said, answers, strict=True)]
    words = [(first, first + len(its)) for first, its in zip(firsts, said, strict=True)]
    places = list(coded["offset_mapping"])
    answers, words = (
        [_with_space(text, places, span) for span in spans] for spans in (answers, words)
    )
    return _Coded(text, list(coded["input_ids"]), places, answers, words)


def _with_space(
    text: str, places: Sequence[tuple[int, int]], span: tuple[int, int]
) -> tuple[int, int]:
    """The span with the space before it, where a template writes one (Mistral's) that is part of its first token."""
    start, end = span
    first = next((left for left, right in places if left < start < right), start)
    return (first if text[first:start].isspace() else start), end


def _within(place: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    left, right = place
    return any(start <= left and right <= end and left < right for start, end in spans)


def _shared(chat: _Coded, source: _Coded, edited: bool) -> Iterator[tuple[int, int, int]]:
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


def _twins(
    chat: _Coded, source: _Coded, shared: Sequence[tuple[int, int, int]]
) -> list[tuple[int, int]]:
    """The tokens that stand for the same characters in both."""
    there = {place: n for n, place in enumerate(source.places)}
    moved = [
        (n, (left - first + begin, right - first + begin))
        for first, last, begin in shared
        for n, (left, right) in enumerate(chat.places)
        if first <= left < right <= last
    ]
    return [(n, there[place]) for n, place in moved if place in there]


def padded(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """A batch of equal lengths: (dialogues, tokens) of ids, labels and weights.

    Where it is distilled also `asked_ids`, and `twins`: (3, tokens) of dialogue, place, place there. There is no attention
    mask: the padding stands on the right, where no token looks, and without a mask attention takes its faster, causal way.
    """
    import torch

    def stack(key: str, filler: float) -> Any:
        length = max(len(row[key]) for row in rows)
        return torch.tensor([row[key] + [filler] * (length - len(row[key])) for row in rows])

    batch = {
        "input_ids": stack("input_ids", pad),
        "labels": stack("labels", IGNORED),
        "weights": stack("weights", 0.0),
    }
    if any(row["twins"] for row in rows):
        twins = torch.tensor([(n, *twin) for n, row in enumerate(rows) for twin in row["twins"]])
        batch |= {"asked_ids": stack("asked_ids", pad), "twins": twins.T}
    return batch


def learned_loss(model: Any, batch: dict[str, Any], settings: Train, weight: Any = None) -> Any:
    """The weighted mean over the learned tokens; logits are computed at these only, and a few at a time.

    The sum is divided by `weight`, that of a step of which this batch is a part, or else by the batch's own.

    A token's loss is its cross-entropy, or where it has a twin the divergence of the model from the base (the same weights
    with the adapter switched off) in the chat as the teacher had it: KL(base‖model), context distillation (Askell et al. 2021,
    section 2; Snell et al. 2022), of which `settings.cross_entropy` leaves a share to the cross-entropy.
    """
    import torch

    hidden, place = _hidden(model, batch["input_ids"], batch["labels"] != IGNORED)
    labels, weights = batch["labels"][place], batch["weights"][place]
    theirs, twins = (
        _teacher(model, batch, place)
        if "twins" in batch
        else (hidden[:0], torch.full_like(labels, -1))
    )
    head, weight = model.get_base_model().lm_head, weights.sum() if weight is None else weight
    total, gradients = torch.zeros((), device=hidden.device), [hidden[:0]]
    # The head is frozen: once the gradient of the hidden states is known, nothing asks for these logits again.
    for some in torch.arange(len(labels), device=hidden.device).split(
        max(1, _LOGITS // head.weight.shape[0])
    ):
        with torch.enable_grad():
            part = hidden[some].detach().requires_grad_()
            logits = head(part).float()
            losses = _losses(logits, labels[some], head, theirs, twins[some], settings)
            loss = (losses * weights[some]).sum() / weight
        gradients += torch.autograd.grad(loss, part)
        total += loss.detach()
    return total + ((hidden - hidden.detach()) * torch.cat(gradients)).sum()


def _hidden(model: Any, ids: Any, wanted: Any) -> tuple[Any, Any]:
    """Hidden states (wanted tokens, width) that predict the tokens in `wanted`, a mask like `ids`; and where these stand."""
    wanted = wanted.clone()
    wanted[:, 0] = False  # nothing predicts the first
    states = model.get_base_model().model(input_ids=ids).last_hidden_state
    return states[:, :-1][wanted[:, 1:]], wanted


def _teacher(model: Any, batch: dict[str, Any], place: Any) -> tuple[Any, Any]:
    """The base's hidden states in the chat as the teacher had it, and for each learned token which of them, or -1."""
    import torch

    row, here, there = batch["twins"]
    wanted = torch.zeros_like(batch["asked_ids"], dtype=torch.bool)
    wanted[row, there] = True
    with torch.no_grad(), model.disable_adapter():
        hidden, wanted = _hidden(model, batch["asked_ids"], wanted)
    order = torch.full_like(batch["asked_ids"], -1)
    order[wanted] = torch.arange(len(hidden), device=order.device)
    twins = torch.full_like(batch["input_ids"], -1)
    twins[row, here] = order[row, there]
    return hidden, twins[place]


def _losses(logits: Any, labels: Any, head: Any, theirs: Any, twins: Any, settings: Train) -> Any:
    """The loss of each token: the divergence from the base where there is a twin, and the cross-entropy elsewhere."""
    import torch

    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    own = twins >= 0
    if not own.any():
        return losses
    with torch.no_grad():
        target = head(theirs[twins[own]]).float()
    apart = divergence(target, logits[own], settings.temperature, settings.top_k)
    return losses.index_put((own,), torch.lerp(apart, losses[own], settings.cross_entropy))


def divergence(target: Any, logits: Any, temperature: float, top_k: int) -> Any:
    """KL(target‖model) of each row of two (tokens, vocabulary) logits, both at `temperature` and times its square (Hinton et al.
    2015, section 2.1). Where `top_k` is not 0, all but so many of the target's likeliest tokens count as one.
    """
    wanted, found = ((its / temperature).log_softmax(-1) for its in (target, logits))
    if top_k and top_k < wanted.shape[-1]:
        wanted, likeliest = wanted.topk(top_k, dim=-1)
        wanted, found = (_with_rest(its) for its in (wanted, found.gather(-1, likeliest)))
    return (wanted.exp() * (wanted - found)).sum(-1) * temperature**2


def _with_rest(logs: Any) -> Any:
    """Log probabilities (tokens, some), and that of all others."""
    import torch

    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([logs, rest], -1)
