"""The loss of a batch: cross-entropy on the learned tokens, or distillation from the base model.

Logits are computed in chunks: those of a full batch would take gigabytes. This module imports
torch; import it only where training runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pipeline.recipe import Train
from pipeline.training.examples import IGNORE_INDEX, TrainingExample

if TYPE_CHECKING:
    from peft import PeftModel
    from typing_extensions import NotRequired

_LOGITS_PER_CHUNK = 2**22
"""Logits (tokens times vocabulary) in memory at a time; autograd holds several copies of each."""


class Batch(TypedDict):
    """Examples padded on the right: tensors of shape (batch, tokens).

    With "distill" also `teacher_ids`, and `alignment` of shape (3, aligned tokens): batch row,
    index in `input_ids`, index in `teacher_ids`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    teacher_ids: NotRequired[torch.Tensor]
    alignment: NotRequired[torch.Tensor]


def collate(
    examples: Sequence[TrainingExample], pad_token_id: int, device: torch.device | str = "cpu"
) -> Batch:
    """Pad `examples` to tensors of shape (batch, tokens) on `device`.

    There is no attention mask. Padding is on the right, where causal attention does not look, and
    without a mask attention uses its faster causal kernel.
    """

    def pad(rows: Iterable[Sequence[float]], value: float, dtype: torch.dtype) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    batch: Batch = {
        "input_ids": pad((e.input_ids for e in examples), pad_token_id, torch.long),
        "labels": pad((e.labels for e in examples), IGNORE_INDEX, torch.long),
        "weights": pad((e.weights for e in examples), 0.0, torch.float32),
    }
    alignment = [(row, *pair) for row, e in enumerate(examples) for pair in e.alignment]
    if alignment:
        batch["teacher_ids"] = pad((e.teacher_ids for e in examples), pad_token_id, torch.long)
        batch["alignment"] = torch.tensor(alignment, device=device).T
    return batch


def gatt_loss(
    model: PeftModel, batch: Batch, settings: Train, total_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted mean loss over the learned tokens of `batch`, a scalar.

    The loss of a token is its cross-entropy. For a token in `batch["alignment"]` it is instead
    KL(base‖model), where the base model reads the teacher's prompt: context distillation (Askell et
    al. 2021, section 2; Snell et al. 2022). `settings.cross_entropy` mixes the two.

    `total_weight` is the weight of the step that a micro-batch belongs to; by default the batch's.
    """
    # From here on tensors are (tokens, ...) over all learned tokens of the batch.
    hidden, is_target = _hidden_states(model, batch["input_ids"], batch["labels"] != IGNORE_INDEX)
    labels, weights = batch["labels"][is_target], batch["weights"][is_target]
    teacher = _teacher_states(model, batch, is_target) if "alignment" in batch else None
    if total_weight is None:
        total_weight = weights.sum()
    lm_head = model.get_base_model().lm_head
    chunk_tokens = max(1, _LOGITS_PER_CHUNK // lm_head.weight.shape[0])
    loss = torch.zeros((), device=hidden.device)
    gradients: list[torch.Tensor] = []
    for chunk in torch.arange(len(labels), device=hidden.device).split(chunk_tokens):
        with torch.enable_grad():
            chunk_hidden = hidden[chunk].detach().requires_grad_()
            logits = lm_head(chunk_hidden).float()
            losses = functional.cross_entropy(logits, labels[chunk], reduction="none")
            if teacher is not None:
                losses = _distill(losses, logits, lm_head, teacher.select(chunk), settings)
            chunk_loss = (losses * weights[chunk]).sum() / total_weight
        # This frees the chunk's logits, before those of the next chunk are computed.
        gradients += torch.autograd.grad(chunk_loss, chunk_hidden)
        loss += chunk_loss.detach()
    return _with_gradient(loss, hidden, torch.cat(gradients))


def _with_gradient(
    value: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """Return the scalar `value`, whose backward pass gives `hidden` the gradient `gradient`.

    `lm_head` is frozen, so backward needs no logits once the gradient for `hidden` is known. The
    added term is zero, and its derivative with respect to `hidden` is `gradient`. Both have the
    shape (tokens, hidden_size).
    """
    return value + ((hidden - hidden.detach()) * gradient).sum()


def _hidden_states(
    model: PeftModel, input_ids: torch.Tensor, is_target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states (tokens, hidden_size) that predict the target tokens.

    `is_target` is a mask (batch, tokens) like `input_ids`. It is returned without the first token
    of each row, which nothing predicts.
    """
    is_target = is_target.clone()
    is_target[:, 0] = False
    hidden = model.get_base_model().model(input_ids=input_ids).last_hidden_state
    return hidden[:, :-1][is_target[:, 1:]], is_target


class _Teacher(NamedTuple):
    """The base model's view of the aligned tokens, given the teacher's prompt.

    `hidden` (aligned tokens, hidden_size) predicts them; `index` (tokens) is the row for each
    learned token, or -1.
    """

    hidden: torch.Tensor
    index: torch.Tensor

    def select(self, tokens: torch.Tensor) -> _Teacher:
        """Return the same for a few of the learned tokens."""
        return self._replace(index=self.index[tokens])


def _teacher_states(model: PeftModel, batch: Batch, is_target: torch.Tensor) -> _Teacher:
    """Return the base model's hidden states of the teacher's chat, the adapter switched off.

    `is_target` (batch, tokens) marks the learned tokens.
    """
    row, student_index, teacher_index = batch["alignment"]
    is_aligned = torch.zeros_like(batch["teacher_ids"], dtype=torch.bool)
    is_aligned[row, teacher_index] = True
    with torch.no_grad(), model.disable_adapter():
        hidden, is_aligned = _hidden_states(model, batch["teacher_ids"], is_aligned)
    hidden_row = torch.full_like(batch["teacher_ids"], -1)
    hidden_row[is_aligned] = torch.arange(len(hidden), device=hidden.device)
    index = torch.full_like(batch["input_ids"], -1)
    index[row, student_index] = hidden_row[row, teacher_index]
    return _Teacher(hidden, index[is_target])


def _distill(
    cross_entropy: torch.Tensor,
    logits: torch.Tensor,
    lm_head: torch.nn.Module,
    teacher: _Teacher,
    settings: Train,
) -> torch.Tensor:
    """Replace the losses (tokens) of aligned tokens by KL(base‖model).

    `logits` are the model's, of shape (tokens, vocab_size).
    """
    is_aligned = teacher.index >= 0
    if not is_aligned.any():
        return cross_entropy
    with torch.no_grad():
        teacher_logits = lm_head(teacher.hidden[teacher.index[is_aligned]]).float()
    kl = kl_divergence(teacher_logits, logits[is_aligned], settings.temperature, settings.top_k)
    mixed = torch.lerp(kl, cross_entropy[is_aligned], settings.cross_entropy)
    return cross_entropy.index_put((is_aligned,), mixed)


def kl_divergence(
    teacher_logits: torch.Tensor, logits: torch.Tensor, temperature: float, top_k: int
) -> torch.Tensor:
    """Return KL(teacher‖model) of each token, shape (tokens), from logits (tokens, vocab_size).

    Both distributions are taken at `temperature`, and the result is multiplied by its square
    (Hinton et al. 2015, section 2.1). With `top_k`, the teacher's k most likely tokens are
    compared, and the rest of the vocabulary as one more; 0 compares all.
    """
    teacher_logprobs = (teacher_logits / temperature).log_softmax(-1)
    logprobs = (logits / temperature).log_softmax(-1)
    if top_k and top_k < logits.shape[-1]:
        teacher_logprobs, most_likely = teacher_logprobs.topk(top_k, dim=-1)
        teacher_logprobs = _append_rest(teacher_logprobs)
        logprobs = _append_rest(logprobs.gather(-1, most_likely))
    kl = functional.kl_div(logprobs, teacher_logprobs, reduction="none", log_target=True)
    return kl.sum(-1) * temperature**2


def _append_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Append to log-probabilities (tokens, k) that of all other tokens: (tokens, k + 1)."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([logprobs, rest], -1)
