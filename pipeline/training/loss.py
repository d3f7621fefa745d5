"""The loss of a batch: cross-entropy on the learned tokens, or distillation from the base model.

Logits are computed in chunks: those of a full batch would take gigabytes. This module imports
torch; import it only where training runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pipeline.recipe import Train
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.job import LOGITS_PER_CHUNK, distilled_pairs, teacher_prefix

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from typing_extensions import NotRequired


class Batch(TypedDict):
    """Examples padded on the right: tensors of shape (batch, tokens).

    With "distill" also `teacher_ids`, whose rows are those of the first examples, and `alignment`
    of shape (3, aligned tokens): row, index in `input_ids`, index in `teacher_ids`.
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

    Those with a teacher's chat come first. It ends with its last aligned token: what follows is
    not compared.

    There is no attention mask. Padding is on the right, where causal attention does not look, and
    without a mask attention uses its faster causal kernel.
    """

    def pad(rows: Iterable[Sequence[float]], value: float, dtype: torch.dtype) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    examples = sorted(examples, key=lambda e: not distilled_pairs(e))
    batch: Batch = {
        "input_ids": pad((e.input_ids for e in examples), pad_token_id, torch.long),
        "labels": pad((e.labels for e in examples), IGNORE_INDEX, torch.long),
        "weights": pad((e.weights for e in examples), 0.0, torch.float32),
    }
    alignment = [(row, *pair) for row, e in enumerate(examples) for pair in distilled_pairs(e)]
    if alignment:
        prefixes = [prefix for e in examples if (prefix := teacher_prefix(e))]
        batch["teacher_ids"] = pad(prefixes, pad_token_id, torch.long)
        batch["alignment"] = torch.tensor(alignment, device=device).T
    return batch


def gatt_loss(
    model: PeftModel, batch: Batch, settings: Train, total_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the loss of one batch, a scalar; see `GattLoss`."""
    return GattLoss(model, settings)(batch, total_weight)


class GattLoss:
    """The weighted mean loss over the learned tokens of a batch.

    The loss of a token is its cross-entropy. For a token in `batch["alignment"]` it is instead
    KL(base‖model), where the base model reads the teacher's prompt: context distillation (Askell et
    al. 2021, section 2; Snell et al. 2022). `settings.cross_entropy` mixes the two losses.

    `logits_per_chunk` are the logits (tokens times vocabulary) in memory at a time.
    """

    def __init__(
        self, model: PeftModel, settings: Train, logits_per_chunk: int = LOGITS_PER_CHUNK
    ) -> None:
        base = model.get_base_model()
        # Some families call their decoder `transformer`, `backbone` or `gpt_neox`.
        self._decoder = getattr(base, "model", base.base_model)
        self._head, self._settings = OutputHead(base), settings
        self._chunk_tokens = max(1, logits_per_chunk // base.lm_head.weight.shape[0])
        # PEFT's `disable_adapter` walks through all modules twice: 25 ms at 32 layers.
        self._adapters = [m for m in model.modules() if hasattr(m, "_disable_adapters")]

    def __call__(self, batch: Batch, total_weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss of `batch`, a scalar that gradients flow from.

        `total_weight` is the weight of the step that a micro-batch belongs to; by default the
        batch's.
        """
        # From here on tensors are (tokens, ...) over all learned tokens of the batch.
        is_target = (batch["labels"] != IGNORE_INDEX) & (batch["weights"] != 0)
        hidden, is_target = self._hidden_states(batch["input_ids"], is_target)
        labels, weights = batch["labels"][is_target], batch["weights"][is_target]
        teacher = self._teacher_states(batch, is_target) if "alignment" in batch else None
        if total_weight is None:
            total_weight = weights.sum()
        is_aligned = teacher.index >= 0 if teacher else torch.zeros_like(weights, dtype=torch.bool)
        loss, gradient = torch.zeros((), device=hidden.device), torch.zeros_like(hidden)
        for chunk in self._chunks(is_aligned):
            with torch.enable_grad():
                chunk_hidden = hidden[chunk].detach().requires_grad_()
                logits = self._head(chunk_hidden)
                if teacher and is_aligned[chunk[0]]:
                    losses = self._distill(logits, labels[chunk], teacher.select(chunk))
                else:
                    losses = functional.cross_entropy(logits, labels[chunk], reduction="none")
                chunk_loss = (losses * weights[chunk]).sum() / total_weight
            # This frees the chunk's logits, before those of the next chunk are computed.
            (gradient[chunk],) = torch.autograd.grad(chunk_loss, chunk_hidden)
            loss += chunk_loss.detach()
        value: torch.Tensor = _WithGradient.apply(hidden, gradient, loss)
        return value

    def _chunks(self, is_aligned: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the indices of tokens whose logits are computed together: all aligned, or none."""
        for tokens in (is_aligned.nonzero()[:, 0], (~is_aligned).nonzero()[:, 0]):
            if len(tokens):
                yield from tokens.split(self._chunk_tokens)

    def _hidden_states(
        self, input_ids: torch.Tensor, is_target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states (tokens, hidden_size) that predict the target tokens.

        `is_target` is a mask (batch, tokens) like `input_ids`. It is returned without the first
        token of each row, which nothing predicts.
        """
        is_target = is_target.clone()
        is_target[:, 0] = False
        hidden = self._decoder(input_ids=input_ids).last_hidden_state
        return hidden[:, :-1][is_target[:, 1:]], is_target

    def _teacher_states(self, batch: Batch, is_target: torch.Tensor) -> _Teacher:
        """Return the base model's hidden states of the teacher's chat, the adapter switched off.

        `is_target` (batch, tokens) marks the learned tokens.
        """
        row, student_index, teacher_index = batch["alignment"]
        is_aligned = torch.zeros_like(batch["teacher_ids"], dtype=torch.bool)
        is_aligned[row, teacher_index] = True
        with torch.no_grad(), self._adapter_disabled():
            hidden, is_aligned = self._hidden_states(batch["teacher_ids"], is_aligned)
        hidden_row = torch.full_like(batch["teacher_ids"], -1)
        hidden_row[is_aligned] = torch.arange(len(hidden), device=hidden.device)
        index = torch.full_like(batch["input_ids"], -1)
        index[row, student_index] = hidden_row[row, teacher_index]
        return _Teacher(hidden, index[is_target])

    @contextmanager
    def _adapter_disabled(self) -> Iterator[None]:
        """Switch the adapter off, as PEFT's `disable_adapter` does where no gradient is needed."""
        for adapter in self._adapters:
            adapter._disable_adapters = True
        try:
            yield
        finally:
            for adapter in self._adapters:
                adapter._disable_adapters = False

    def _distill(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher: _Teacher
    ) -> torch.Tensor:
        """Return the losses (tokens) of aligned tokens: KL(base‖model).

        `logits` are the model's, of shape (tokens, vocab_size).
        """
        with torch.no_grad():
            teacher_logits = self._head(teacher.hidden[teacher.index])
        settings = self._settings
        divergences = kl_divergence(teacher_logits, logits, settings.temperature, settings.top_k)
        if not settings.cross_entropy:
            return divergences
        cross_entropy = functional.cross_entropy(logits, labels, reduction="none")
        return torch.lerp(divergences, cross_entropy, settings.cross_entropy)


class OutputHead:
    """A model's output layer, with what its family does to the logits afterwards.

    Gemma 2 caps them softly (`final_logit_softcapping`), Cohere multiplies them by `logit_scale`,
    Falcon-H1 by `lm_head_multiplier`, and Granite divides them by `logits_scaling`.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        config = base.config.get_text_config()
        self._lm_head = base.lm_head
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) or 1.0
        self._scale *= getattr(config, "lm_head_multiplier", None) or 1.0
        self._scale /= getattr(config, "logits_scaling", None) or 1.0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (tokens, vocab_size) of hidden states, in float32."""
        logits: torch.Tensor = self._lm_head(hidden).float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap:
            logits = (logits / self._softcap).tanh() * self._softcap
        return logits


class _WithGradient(torch.autograd.Function):  # type: ignore[misc]
    """Return the scalar `value`, whose backward pass gives `hidden` the gradient `gradient`.

    `lm_head` is frozen, so backward needs no logits once the gradient for `hidden` is known. Both
    have the shape (tokens, hidden_size).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        gradient: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """Return `value`."""
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(
        ctx: torch.autograd.function.BackwardCFunction, *outputs: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        """Return the gradient that was given for `hidden`."""
        (gradient,) = ctx.saved_tensors
        return outputs[0] * gradient, None, None


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


def kl_divergence(
    teacher_logits: torch.Tensor, logits: torch.Tensor, temperature: float, top_k: int
) -> torch.Tensor:
    """Return KL(teacher‖model) of each token, shape (tokens), from logits (tokens, vocab_size).

    Both distributions are taken at `temperature`, and the result is multiplied by its square
    (Hinton et al. 2015, section 2.1). With `top_k`, the teacher's k most likely tokens are
    compared, and the rest of the vocabulary as one more; 0 compares all.
    """
    if temperature != 1:  # a division by 1 would copy all logits
        teacher_logits, logits = teacher_logits / temperature, logits / temperature
    teacher_logprobs, logprobs = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    if top_k and top_k < logits.shape[-1]:
        teacher_logprobs, most_likely = teacher_logprobs.topk(top_k, dim=-1)
        teacher_logprobs = _append_rest(teacher_logprobs)
        logprobs = _append_rest(logprobs.gather(-1, most_likely))
    return _kl(teacher_logprobs, logprobs) * temperature**2


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return KL(p‖q) of log-probabilities."""
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _append_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Append to log-probabilities (tokens, k) that of all other tokens: (tokens, k + 1)."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()
    return torch.cat([logprobs, rest], -1)
