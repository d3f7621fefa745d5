"""A GGUF model in memory: tensors, vocabulary, chat template, adapters and sampler chains.

One `LoadedModel` serves any number of llama.cpp contexts and threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, TypeAlias

from pipeline.errors import GattError
from pipeline.gguf.formats import silence
from pipeline.gguf.reader import GgufInfo, read_gguf
from pipeline.inference.chat_template import ChatTemplate
from pipeline.records import Request

CacheType = Literal["F16", "F32"]
"""ggml type of the keys and values in the KV cache."""
EvalCallback = Callable[[int, bool], bool]
"""llama.cpp's `cb_eval`: (address of a graph node, `ask`) → observe this node, or continue."""
LlamaHandle: TypeAlias = object
"""A pointer into llama.cpp: a context, its memory, a batch, an adapter or a sampler."""


class Adapter(NamedTuple):
    """A LoRA adapter as a GGUF file. `scale` multiplies it; 1 is as trained."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """What all contexts of one engine have in common.

    `n_ctx` is the number of KV cells (tokens) of each sequence. The KV cache depends on the
    adapter, so contexts with different adapters share the model's weights and nothing else.
    """

    n_ctx: int
    cache_type: CacheType = "F16"
    adapter: Adapter | None = None


class LoadedModel:
    """A model loaded by llama.cpp, or only its vocabulary. Several threads may use it at once.

    Raises:
        GattError: llama.cpp refuses the file.
    """

    def __init__(self, info: GgufInfo, *, vocab_only: bool = False) -> None:
        import llama_cpp

        self.api: ModuleType = llama_cpp
        self.info, self.name = info, info.path.name
        self._adapters: dict[Path, LlamaHandle] = {}
        # llama.cpp holds no reference to a Python callback: without this list it would be freed.
        self._callbacks: list[object] = []
        silence(llama_cpp)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        self._model = llama_cpp.llama_model_load_from_file(str(info.path).encode(), params)
        if not self._model:
            raise GattError(
                f"llama.cpp cannot load {info.path}: {info.architecture} may be newer than this "
                "llama-cpp-python. Upgrade it, or use another model."
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        # DRY: multiplier 0.8, base 1.75, repeats of up to 5 tokens allowed, over the whole context,
        # one sequence breaker. Created once and cloned for each request, because creation searches
        # the vocabulary for the breakers, which takes as long as decoding half a token.
        breakers = (ctypes.c_char_p * 1)(b"\n")
        self._dry = llama_cpp.llama_sampler_init_dry(
            self._vocab, 0.8, 1.75, 5, info.context_length, breakers, 1
        )
        self.template = ChatTemplate(info.chat_template, info.bos, info.eos)

    def close(self) -> None:
        """Free the memory. All contexts must be freed before."""
        self.api.llama_sampler_free(self._dry)
        self.api.llama_model_free(self._model)

    def new_context(
        self,
        settings: ContextSettings,
        *,
        sequences: int,
        batch_size: int,
        threads: int,
        eval_callback: EvalCallback | None = None,
    ) -> LlamaHandle:
        """Return a llama.cpp context for `sequences` that decodes up to `batch_size` tokens a call.

        Each sequence has its own KV stream of `settings.n_ctx` cells (`kv_unified` is off).

        Raises:
            GattError: too little memory, or an adapter of another base.
        """
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * settings.n_ctx, sequences
        params.kv_unified = False
        params.n_batch = params.n_ubatch = batch_size
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(self.api, f"GGML_TYPE_{settings.cache_type}")
        # On a CPU flash attention is slower by far; `context.py` gives the reason why it is off.
        flash_attention = "ENABLED" if self.api.llama_supports_gpu_offload() else "DISABLED"
        params.flash_attn_type = getattr(self.api, f"LLAMA_FLASH_ATTN_TYPE_{flash_attention}")
        if eval_callback:
            self._callbacks.append(
                type(params.cb_eval)(lambda node, ask, data: eval_callback(node, ask))
            )
            params.cb_eval = self._callbacks[-1]
        context: LlamaHandle = self.api.llama_init_from_model(self._model, params)
        if not context:
            raise GattError(
                f"No memory for a KV cache of {params.n_ctx} tokens. Lower `max_parallel` or the "
                "number of turns."
            )
        if settings.adapter:
            adapters = (self.api.llama_adapter_lora_p_ctypes * 1)(
                self._load_adapter(settings.adapter.path)
            )
            scales = (ctypes.c_float * 1)(settings.adapter.scale)
            self.api.llama_set_adapters_lora(context, adapters, 1, scales)
        return context

    def _load_adapter(self, path: Path) -> LlamaHandle:
        """Return the adapter, loaded at its first use. llama.cpp frees it with the model."""
        if path not in self._adapters:
            if read_gguf(path).field("general.type") != "adapter":
                raise GattError(
                    f"{path} is not an adapter. Expected a GGUF such as the adapter.gguf that "
                    "`gatt export` writes."
                )
            adapter = self.api.llama_adapter_lora_init(self._model, str(path).encode())
            if not adapter:
                raise GattError(
                    f"{path} does not fit {self.name}: it is an adapter of another base. Use it "
                    "with the model it was trained on."
                )
            self._adapters[path] = adapter
        return self._adapters[path]

    def unload_adapter(self, adapter: Adapter) -> None:
        """Free an adapter's memory. All contexts that use it must be freed before."""
        self.api.llama_adapter_lora_free(self._adapters.pop(adapter.path))

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the token ids of a text, in which special tokens are parsed.

        A rendered chat already contains its special tokens. `add_special` adds those that the model
        expects around plain text, such as BOS.
        """
        raw = text.encode()
        capacity = len(raw) + 8  # a token has at least one byte, but for the added ones
        ids = (self.api.llama_token * capacity)()
        parse_special = True
        count = self.api.llama_tokenize(
            self._vocab, raw, len(raw), ids, capacity, add_special, parse_special
        )
        return list(ids[:count])

    def token_to_piece(self, token: int) -> bytes:
        """Return the bytes of a token; none for a special token."""
        buffer = ctypes.create_string_buffer(256)
        lstrip, render_special = 0, False
        size = self.api.llama_token_to_piece(
            self._vocab, token, buffer, 256, lstrip, render_special
        )
        return buffer.raw[: max(size, 0)]

    def is_eog(self, token: int) -> bool:
        """Return whether the token ends the generation (end of turn or of text)."""
        return bool(self.api.llama_vocab_is_eog(self._vocab, token))

    def new_sampler(self, request: Request) -> LlamaHandle:
        """Return a sampler chain for one request; greedy at temperature 0.

        The chain is top-k 40, DRY, top-p (below 1 only), min-p 0.05, temperature, seeded draw. DRY
        stops a small model from repeating earlier answers, yet allows repeats of up to five tokens,
        so that a required phrase is not penalized.
        """
        api = self.api
        chain: LlamaHandle = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if request.temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
            return chain
        top_p = [api.llama_sampler_init_top_p(request.top_p, 1)] if request.top_p < 1 else []
        for sampler in (
            api.llama_sampler_init_top_k(40),
            api.llama_sampler_clone(self._dry),
            *top_p,
            api.llama_sampler_init_min_p(0.05, 1),
            api.llama_sampler_init_temp(request.temperature),
            api.llama_sampler_init_dist(request.seed & 0xFFFFFFFF),
        ):
            api.llama_sampler_chain_add(chain, sampler)
        # DRY sees only what the chain has accepted: give it the earlier answers.
        for message in request.messages:
            if message["role"] == "assistant":
                for token in self.tokenize(message["content"] + "\n"):
                    api.llama_sampler_accept(chain, token)
        return chain
