"""What is learned of a dialogue: labels and weights by token, and the loss of a batch. The loop around it is in trainer.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.recipe import Train
from pipeline.training.examples import IGNORE_INDEX

_LOGITS = 2**22
"""Logits that are in memory at a time: of more, whole gigabytes would be kept for the way back."""


def collate(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
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
        "labels": stack("labels", IGNORE_INDEX),
        "weights": stack("weights", 0.0),
    }
    if any(row["twins"] for row in rows):
        alignment = torch.tensor(
            [(n, *twin) for n, row in enumerate(rows) for twin in row["twins"]]
        )
        batch |= {"asked_ids": stack("asked_ids", pad), "twins": alignment.T}
    return batch


def gatt_loss(model: Any, batch: dict[str, Any], settings: Train, weight: Any = None) -> Any:
    """The weighted mean over the learned tokens; logits are computed at these only, and a few at a time.

    The sum is divided by `weight`, that of a step of which this batch is a part, or else by the batch's own.

    A token's loss is its cross-entropy, or where it has a twin the divergence of the model from the base (the same weights
    with the adapter switched off) in the chat as the teacher had it: KL(base‖model), context distillation (Askell et al. 2021,
    section 2; Snell et al. 2022), of which `settings.cross_entropy` leaves a share to the cross-entropy.
    """
    import torch

    hidden, place = _hidden(model, batch["input_ids"], batch["labels"] != IGNORE_INDEX)
    labels, weights = batch["labels"][place], batch["weights"][place]
    theirs, alignment = (
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
            losses = _losses(logits, labels[some], head, theirs, alignment[some], settings)
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
    alignment = torch.full_like(batch["input_ids"], -1)
    alignment[row, here] = order[row, there]
    return hidden, alignment[place]


def _losses(
    logits: Any, labels: Any, head: Any, theirs: Any, alignment: Any, settings: Train
) -> Any:
    """The loss of each token: the divergence from the base where there is a twin, and the cross-entropy elsewhere."""
    import torch

    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    own = alignment >= 0
    if not own.any():
        return losses
    with torch.no_grad():
        target = head(theirs[alignment[own]]).float()
    apart = kl_divergence(target, logits[own], settings.temperature, settings.top_k)
    return losses.index_put((own,), torch.lerp(apart, losses[own], settings.cross_entropy))


def kl_divergence(target: Any, logits: Any, temperature: float, top_k: int) -> Any:
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
