"""Figure 10 of the paper: how strongly answers attend to what was said before, base beside tuned, on the Hugging Face model.

The strongest attention over all heads and layers, from each token of the answers back to each earlier token, neighboring
tokens binned; and as a number, the share of the attention that falls on the instruction, turn by turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf.base import Array
from pipeline.inference.chat_template import ChatTemplate, answer_spans
from pipeline.records import Message
from pipeline.training.unsloth import load_tokenizer, nf4_round_trip

BIN = 8
"""Neighboring tokens that share a cell of the map."""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """What the answers of one dialogue attend to.

    `strongest`: (bins of answer tokens, bins of all tokens) maximum over heads and layers. `turns`: the turn (from 1) of each
    row. `instruction`: first and last column of the instruction. `share`: for each turn, the mean share of the attention of
    its answer's tokens, over heads and layers, that falls on the instruction's tokens.
    """

    strongest: list[list[float]]
    turns: list[int]
    instruction: tuple[int, int]
    share: list[float]


def attention_map(
    folder: Path, adapter: Path | None, messages: Sequence[Message], instruction: str
) -> AttentionMap:
    """The map of one dialogue, for the base in `folder` or with `adapter` on its weights in 4 bits, as it was trained.

    Raises:
        GattError: the instruction does not stand in the dialogue.
    """
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(
        tokenizer.chat_template, tokenizer.bos_token or "", tokenizer.eos_token or ""
    )
    text, answers = answer_spans(template, messages)
    start = text.find(instruction)
    if not instruction or start < 0:
        raise GattError(f"The instruction {instruction!r} does not stand in the dialogue.")
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = coded["offset_mapping"]
    told = _within(offsets, start, start + len(instruction))
    turns = [_within(offsets, *span) for span in answers]
    strongest, shares = _attend(_load(folder, adapter), coded["input_ids"], told)
    rows = np.concatenate([_binned(strongest[turn.start : turn.stop]) for turn in turns])
    of_rows = [n for n, turn in enumerate(turns, 1) for _ in range(0, len(turn), BIN)]
    share = [float(shares[turn.start : turn.stop].mean()) for turn in turns]
    return AttentionMap(
        rows.round(3).tolist(), of_rows, (told.start // BIN, (told.stop - 1) // BIN), share
    )


def _within(offsets: Sequence[tuple[int, int]], start: int, end: int) -> range:
    """The tokens that lie between two characters."""
    inside = [
        n
        for n, (left, right) in enumerate(offsets)
        if left < end and right > start and left < right
    ]
    return range(inside[0], inside[-1] + 1)


def _load(folder: Path, adapter: Path | None) -> Any:
    import torch
    import transformers

    network: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if adapter:
        import peft

        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.data = torch.from_numpy(
                    nf4_round_trip(module.weight.detach().numpy())
                )
        network = peft.PeftModel.from_pretrained(network, str(adapter))
    return network.eval()


def _attend(network: Any, ids: Sequence[int], told: range) -> tuple[Array, Array]:
    """(tokens, tokens) strongest attention, and (tokens) mean share on the tokens `told`; one layer in memory at a time."""
    import torch

    strongest = np.zeros((len(ids), len(ids)), np.float32)
    shares: list[Array] = []

    def watch(module: Any, arguments: Any, result: Any) -> Any:
        weights = result[1][0]  # (heads, tokens, tokens)
        np.maximum(strongest, weights.amax(0).numpy(), out=strongest)
        shares.append(weights[:, :, told.start : told.stop].sum(-1).mean(0).numpy())
        return (result[0], None, *result[2:])

    hooks = [
        m.register_forward_hook(watch)
        for name, m in network.named_modules()
        if name.endswith(".self_attn")
    ]
    with torch.no_grad():
        network(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    mean: Array = np.mean(shares, axis=0)
    return strongest, mean


def _binned(rows: Array) -> Array:
    """The maximum over squares of BIN by BIN tokens; the last may be smaller."""
    starts = [np.arange(0, length, BIN) for length in rows.shape]
    binned: Array = np.maximum.reduceat(
        np.maximum.reduceat(rows, starts[0], axis=0), starts[1], axis=1
    )
    return binned
