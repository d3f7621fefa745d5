"""Map how strongly answers attend to what came before: Figure 10 of the paper, base and tuned.

Computed on the Hugging Face model. A map has the strongest attention over all heads and layers,
from each token of the answers to each earlier token. Neighboring tokens are binned. The map also
has the share of the attention that falls on the instruction in each turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from pipeline.errors import GattError
from pipeline.gguf.base import Array
from pipeline.inference.chat_template import answer_spans, template_of
from pipeline.records import Message
from pipeline.training.unsloth import load_tokenizer, nf4_round_trip

if TYPE_CHECKING:
    import torch

BIN = 8
"""Neighboring tokens that share a row or column of the map."""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """What the answers of one dialogue attend to.

    `strongest`: (bins of answer tokens, bins of all tokens) maximum over heads and layers. `turns`:
    the turn (from 1) of each row. `instruction`: first and last column of the instruction. `share`:
    for each turn, the mean share of the attention of its answer's tokens, over heads and layers,
    that falls on the instruction's tokens.
    """

    strongest: list[list[float]]
    turns: list[int]
    instruction: tuple[int, int]
    share: list[float]


def read_attention_maps(text: str) -> dict[str, AttentionMap]:
    """Read the text of an `attention.json`: a map for "base" and one for "tuned"."""
    return TypeAdapter(dict[str, AttentionMap]).validate_json(text)


def attention_map(
    folder: Path,
    adapter: Path | None,
    messages: Sequence[Message],
    instruction: str,
    *,
    in_4bit: bool = False,
) -> AttentionMap:
    """Return the map of one dialogue for the base in `folder`, or with the PEFT `adapter` on it.

    With the adapter and `in_4bit`, the base's weights are rounded to 4 bits as in training.

    Raises:
        GattError: the instruction is not in the dialogue.
    """
    tokenizer = load_tokenizer(folder)
    template = template_of(tokenizer)
    text, spans = answer_spans(template, messages)
    start = text.find(instruction)
    if not instruction or start < 0:
        raise GattError(f"The instruction {instruction!r} is not in the dialogue.")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding["offset_mapping"]
    instruction_tokens = _tokens_between(offsets, start, start + len(instruction))
    answers = [_tokens_between(offsets, *span) for span in spans]
    strongest, shares = _attend(
        _load(folder, adapter, in_4bit=in_4bit), encoding["input_ids"], instruction_tokens
    )
    rows = np.concatenate([_binned(strongest[tokens.start : tokens.stop]) for tokens in answers])
    return AttentionMap(
        strongest=rows.round(3).tolist(),
        turns=[turn for turn, tokens in enumerate(answers, 1) for _ in tokens[::BIN]],
        instruction=(instruction_tokens.start // BIN, (instruction_tokens.stop - 1) // BIN),
        share=[float(shares[tokens.start : tokens.stop].mean()) for tokens in answers],
    )


def _tokens_between(offsets: Sequence[tuple[int, int]], start: int, end: int) -> range:
    """Return the tokens that lie between two characters; `offsets` are those of all tokens."""
    inside = [
        token
        for token, (left, right) in enumerate(offsets)
        if left < end and right > start and left < right
    ]
    return range(inside[0], inside[-1] + 1)


def _load(folder: Path, adapter: Path | None, *, in_4bit: bool) -> torch.nn.Module:
    """Return the network in float32, with its plain implementation of attention."""
    import torch
    import transformers

    threads = torch.get_num_threads()
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if adapter:
        import peft

        for name, module in network.named_modules() if in_4bit else ():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                rounded = nf4_round_trip(module.weight.detach().numpy())
                module.weight.data = torch.from_numpy(rounded)
        network = peft.PeftModel.from_pretrained(network, str(adapter))
    torch.set_num_threads(threads)  # `nf4_round_trip` sets one, also in the export of this run
    return network.eval()


def _attend(
    network: torch.nn.Module, input_ids: Sequence[int], instruction_tokens: range
) -> tuple[Array, Array]:
    """Return (tokens, tokens) strongest attention, and (tokens) mean share on the instruction.

    Hooks drop the weights of each layer at once, so that those of one layer are in memory.
    """
    import torch

    strongest = np.zeros((len(input_ids), len(input_ids)), np.float32)
    shares: list[Array] = []
    columns = slice(instruction_tokens.start, instruction_tokens.stop)

    def hook(
        module: torch.nn.Module, inputs: object, outputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        weights = outputs[1][0]  # (heads, tokens, tokens)
        np.maximum(strongest, weights.amax(0).numpy(), out=strongest)
        shares.append(weights[:, :, columns].sum(-1).mean(0).numpy())
        return (outputs[0], None, *outputs[2:])

    handles = [
        module.register_forward_hook(hook)
        for name, module in network.named_modules()
        if name.endswith(".self_attn")
    ]
    with torch.no_grad():
        network(input_ids=torch.tensor([list(input_ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    mean: Array = np.mean(shares, axis=0)
    return strongest, mean


def _binned(rows: Array) -> Array:
    """Return the maximum over squares of BIN by BIN tokens; the last may be smaller."""
    row_starts, column_starts = (np.arange(0, length, BIN) for length in rows.shape)
    binned: Array = np.maximum.reduceat(
        np.maximum.reduceat(rows, row_starts, axis=0), column_starts, axis=1
    )
    return binned
