"""BOS and EOS that other programs put around a chat, which training did not have.

llama-server renders the chat template and takes away a BOS at its start if the file says that the
tokenizer adds one (`tokenizer.ggml.add_bos_token`), an EOS at its end likewise; the tokenizer then
adds them (`apply` in llama.cpp's `common/chat.cpp`, `llama_tokenize` with add_special). So the
tokens are those of the rendered chat, as in training, except where the file says that a token is
added that the template does not write. Ollama, LM Studio and llama-cpp-python add by the same keys.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.export.verify import sample_chats
from pipeline.gguf.reader import open_gguf
from pipeline.inference.llama.model import LoadedModel


def added_token_keys(file: Path) -> list[str]:
    """Return the keys that must be false, so that no program adds BOS or EOS to a GGUF's chats.

    Only the vocabulary of `file` is read. Without such keys llama.cpp has a default for each kind
    of tokenizer, so what it makes of the file decides.
    """
    info, texts = open_gguf(file), sample_chats(file).texts
    model = LoadedModel(info, vocab_only=True)
    adds_bos, adds_eos = model.added_tokens
    model.close()
    keys = []
    if adds_bos and not all(info.bos and text.startswith(info.bos) for text in texts):
        keys.append("tokenizer.ggml.add_bos_token")
    if adds_eos and not all(info.eos and text.endswith(info.eos) for text in texts):
        keys.append("tokenizer.ggml.add_eos_token")
    return keys
