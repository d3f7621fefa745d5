"""A loaded GGUF: tensors, vocabulary, chat template and sampler chains, shared by any number of llama.cpp contexts."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import GattError
from pipeline.gguf.formats import silence
from pipeline.gguf.reader import GgufInfo, read_gguf
from pipeline.inference.chat_template import ChatTemplate
from pipeline.records import Request

CacheType = Literal["F16", "F32"]
Observer = Callable[[int, bool], bool]
"""llama.cpp's `cb_eval`: (address of a graph's node, is it only a question?) → yes, or go on."""


class Adapter(NamedTuple):
    """A LoRA as a GGUF file, and how strongly it counts (1: as it was trained)."""

    path: Path
    scale: float = 1.0


class LoadedModel:
    """The model of a GGUF in memory, or only its vocabulary; after loading, several threads may use it at once.

    Raises:
        GattError: llama.cpp refuses the file.
    """

    def __init__(self, info: GgufInfo, vocabulary_only: bool = False) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        self.info, self.name = info, info.path.name
        self._adapters: dict[Path, Any] = {}
        self._observers: list[Any] = []  # llama.cpp holds no reference to a Python function
        silence(llama_cpp)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocabulary_only
        self._model = llama_cpp.llama_model_load_from_file(str(info.path).encode(), params)
        if not self._model:
            raise GattError(
                f"llama.cpp cannot load {info.path}: {info.architecture} may be newer than this llama-cpp-python."
            )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(self._vocab)
        between = (ctypes.c_char_p * 1)(b"\n")
        # Made once: looking for the line breaks in all of the vocabulary takes as long as decoding half a token.
        self._dry = llama_cpp.llama_sampler_init_dry(
            self._vocab, 0.8, 1.75, 5, info.context_length, between, 1
        )
        self.template = ChatTemplate(info.chat_template, info.bos, info.eos)

    def close(self) -> None:
        """Give the memory back, after that of all contexts."""
        self.api.llama_sampler_free(self._dry)
        self.api.llama_model_free(self._model)

    def new_context(
        self,
        streams: int,
        cells: int,
        batch: int,
        cache: CacheType,
        threads: int,
        adapter: Adapter | None = None,
        observer: Observer | None = None,
    ) -> Any:
        """A llama.cpp context with `streams` caches of `cells` tokens each, which decodes up to `batch` tokens at a time.

        Its cache belongs to its adapter: contexts with different ones share the weights and nothing else.

        Raises:
            GattError: no memory for it, or an adapter of another base.
        """
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = streams * cells, streams, False
        params.n_batch = params.n_ubatch = batch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(self.api, f"GGML_TYPE_{cache}")
        offloads = self.api.llama_supports_gpu_offload()
        flash = (
            self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if offloads
            else self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.flash_attn_type = flash
        if observer:
            self._observers.append(
                type(params.cb_eval)(lambda node, ask, data: observer(node, ask))
            )
            params.cb_eval = self._observers[-1]
        context = self.api.llama_init_from_model(self._model, params)
        if not context:
            raise GattError(
                f"No memory for a cache of {streams * cells} tokens. Lower `sequences` or the number of turns."
            )
        if adapter:
            one = (self.api.llama_adapter_lora_p_ctypes * 1)(self._adapter(adapter.path))
            self.api.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(adapter.scale))
        return context

    def _adapter(self, path: Path) -> Any:
        """The loaded adapter; llama.cpp frees it with the model, if it is not let go before."""
        if path not in self._adapters:
            if read_gguf(path).field("general.type") != "adapter":
                raise GattError(f"{path} is no adapter. `gatt export` writes one: adapter.gguf.")
            loaded = self.api.llama_adapter_lora_init(self._model, str(path).encode())
            if not loaded:
                raise GattError(
                    f"{path} does not fit {self.name}: it is an adapter of another base."
                )
            self._adapters[path] = loaded
        return self._adapters[path]

    def unload_adapter(self, adapter: Adapter) -> None:
        """Give an adapter's memory back, after that of all contexts with it."""
        self.api.llama_adapter_lora_free(self._adapters.pop(adapter.path))

    def tokenize(self, text: str, opening: bool = False) -> list[int]:
        """Token ids of a rendered chat: special tokens are parsed, and none is added (the template writes its own).

        `opening`: the text is no chat, and begins with the token that the model wants there.
        """
        raw = text.encode()
        room = len(raw) + 8
        ids = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self._vocab, raw, len(raw), ids, room, opening, True)
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of a token; nothing for a special one."""
        buffer = ctypes.create_string_buffer(256)
        size = self.api.llama_token_to_piece(self._vocab, token, buffer, 256, 0, False)
        return buffer.raw[: max(size, 0)]

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(self.api.llama_vocab_is_eog(self._vocab, token))

    def sampler(self, request: Request) -> Any:
        """llama.cpp's chain of one request: top-k 40, DRY, top-p (where it is asked for), min-p 0.05, temperature, seeded draw.

        DRY keeps a small model from saying an earlier answer again; up to five tokens in a row may come again, so that
        a demanded phrase is free. (With eight, a short sentence is free, too: of one tuned model's 120 late replies, 27 were
        repeats or loops, with five 15.) A repeat penalty would not do: it takes the full stop away from "Over and out.".
        """
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if request.temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
            return chain
        for part in (
            api.llama_sampler_init_top_k(40),
            api.llama_sampler_clone(self._dry),
            *([api.llama_sampler_init_top_p(request.top_p, 1)] if request.top_p < 1 else []),
            api.llama_sampler_init_min_p(0.05, 1),
            api.llama_sampler_init_temp(request.temperature),
            api.llama_sampler_init_dist(request.seed & 0xFFFFFFFF),
        ):
            api.llama_sampler_chain_add(chain, part)
        for message in request.messages:
            if message["role"] == "assistant":
                for token in self.tokenize(message["content"] + "\n"):
                    api.llama_sampler_accept(chain, token)
        return chain
