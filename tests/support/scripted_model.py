"""A real model in miniature that says what it is told: each token determines the next one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from support.models import save_tokenizer

PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}<|begin|>"
"""Ends with the token from which the words follow."""


def write_scripted_gguf(
    folder: Path,
    words: Sequence[str],
    template: str = PLAIN_TEMPLATE,
    name: str = "scripted",
    *,
    loops: bool = False,
) -> Path:
    """Write a GGUF of a model that greedily answers with `words` and then ends its turn.

    Each word is a token, so all have to be different. The words follow <|begin|>, and each word
    follows the one before it, so that a template may end with the first words. Any other token is
    followed by the end. A model that `loops` begins again instead of ending its turn.
    """
    import torch
    import transformers

    tokenizer = save_tokenizer(folder)
    tokenizer.add_tokens(list(words))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=512,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config)
    last = words[0] if loops else "<|end|>"
    chain = tokenizer.convert_tokens_to_ids(["<|begin|>", *words, last])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    followers = dict(pairwise(chain))
    with torch.no_grad():
        for parameter in model.parameters():  # attention and MLP add nothing
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)
        for token in range(size):
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[followers.get(token, end), token] = 1.0
    model.save_pretrained(folder)
    file = folder / f"{name}.gguf"
    write_formats(Model(name, folder), None, {"F32": file})
    return file
