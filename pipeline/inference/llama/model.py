"""A GGUF model in memory: tensors, vocabulary, chat template, adapters and sampler chains.

One `LoadedModel` serves any number of llama.cpp contexts and threads.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple, TypeAlias

from pipeline.errors import GattError
from pipeline.gguf.formats import silence
from pipeline.gguf.reader import GgufInfo, read_gguf
from pipeline.inference.chat_template import ChatTemplate
from pipeline.inference.llama.gpu import gpu_devices
from pipeline.inference.llama.placement import MIN_OUTPUTS, place_layers
from pipeline.inference.llama.sampler import Sampler, SamplerFactory
from pipeline.inference.thoughts import MARKER_TOKENS, is_reasoning_template
from pipeline.records import Request
from pipeline.system import available_memory, move_to_huge_pages, request_huge_pages

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
    With `batch_tokens`, as on a GPU, a batch has up to that many tokens of any sequences; with 0, a
    prompt is decoded alone, in small chunks.
    """

    n_ctx: int
    cache_type: CacheType = "F16"
    adapter: Adapter | None = None
    batch_tokens: int = 0


class LoadedModel:
    """A model loaded by llama.cpp, or only its vocabulary. Several threads may use it at once.

    `gpu_layers` are on the GPU, as `placement` counts them; by default as many as fit, 0 for none.
    A model that `has_state` (Mamba, short convolutions, linear attention) keeps one state of each
    sequence, from which single tokens cannot be removed.

    Raises:
        GattError: llama.cpp refuses the file.
    """

    def __init__(
        self, info: GgufInfo, *, vocab_only: bool = False, gpu_layers: int | None = None
    ) -> None:
        import llama_cpp

        self.api: ModuleType = llama_cpp
        self.info, self.name = info, info.path.name
        self._adapters: dict[Path, LlamaHandle] = {}
        # llama.cpp holds no reference to a Python callback: without this list it would be freed.
        self._callbacks: list[object] = []
        silence(llama_cpp)
        if vocab_only:
            gpu_layers = 0
        self.gpu_layers = place_layers(info) if gpu_layers is None else gpu_layers
        params = llama_cpp.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = vocab_only, self.gpu_layers
        # A mapped file has small pages. One that would fill the memory stays mapped.
        if not self.gpu_layers and info.bytes < available_memory() / 2:
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
            params.progress_callback = self._progress_callback(params)
        no_devices = (ctypes.c_void_p * 1)(None)
        if not self.gpu_layers and gpu_devices():
            # Without layers, llama.cpp would still send large products to the GPU.
            params.devices = ctypes.addressof(no_devices)
        # Where weights are reordered, that leaves a team of OpenMP to its thread (see `callers`).
        with ThreadPoolExecutor(1) as loader:
            load = llama_cpp.llama_model_load_from_file
            self._model = loader.submit(load, os.fsencode(info.path), params).result()
        if not self._model:
            raise GattError(
                f"llama.cpp cannot load {info.path}: {info.architecture} may be newer than this "
                "llama-cpp-python. Upgrade it, or use another model."
            )
        self.has_state = bool(
            llama_cpp.llama_model_is_recurrent(self._model)
            or llama_cpp.llama_model_is_hybrid(self._model)
        )
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._samplers = SamplerFactory(llama_cpp, self._vocab, info.context_length, self.tokenize)
        self.template = ChatTemplate(info.chat_template, info.bos, info.eos, info.path.name)
        self._thought_tokens = self._find_thought_tokens()

    def _progress_callback(self, params: ctypes.Structure) -> Callable[..., object]:
        """Return a callback that requests huge pages once there is memory for the weights."""

        def on_progress(progress: float, _: object) -> bool:
            if not progress:
                request_huge_pages()
            return True

        callback: Callable[..., object] = type(params.progress_callback)(on_progress)
        self._callbacks.append(callback)
        return callback

    def _find_thought_tokens(self) -> set[int]:
        """Return the tokens of the vocabulary that mark thoughts, where the model can think."""
        if not is_reasoning_template(self.template.source):
            return set()
        ids = map(self.tokenize, MARKER_TOKENS)
        return {tokens[0] for tokens in ids if len(tokens) == 1}

    def close(self) -> None:
        """Free the memory. All contexts must be freed before."""
        self._samplers.close()
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
        # On a GPU llama.cpp switches it on where the device can, but for a cache in float32.
        on_gpu = bool(self.gpu_layers) and settings.cache_type == "F16"
        flash_attention = "AUTO" if on_gpu else "DISABLED"
        params.flash_attn_type = getattr(self.api, f"LLAMA_FLASH_ATTN_TYPE_{flash_attention}")
        if settings.batch_tokens:
            # Otherwise there would be room for the logits of every token of a batch.
            params.n_outputs_max = max(sequences, MIN_OUTPUTS)
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
        if not self.gpu_layers:
            move_to_huge_pages()
        return context

    def _load_adapter(self, path: Path) -> LlamaHandle:
        """Return the adapter, loaded at its first use. llama.cpp frees it with the model."""
        if path not in self._adapters:
            if read_gguf(path).field("general.type") != "adapter":
                raise GattError(
                    f"{path} is not an adapter. Expected a GGUF such as the adapter.gguf that "
                    "`gatt export` writes."
                )
            adapter = self.api.llama_adapter_lora_init(self._model, os.fsencode(path))
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

    @property
    def added_tokens(self) -> tuple[bool, bool]:
        """Whether `tokenize` with `add_special` adds BOS, and EOS."""
        return (
            bool(self.api.llama_vocab_get_add_bos(self._vocab)),
            bool(self.api.llama_vocab_get_add_eos(self._vocab)),
        )

    def control_tokens(self) -> dict[str, int]:
        """Return the ids of the tokens that llama.cpp takes for control tokens, by their texts.

        A file need not mark them so: llama.cpp overrides tokens that look like control tokens.
        """
        return {
            self.api.llama_vocab_get_text(self._vocab, token).decode(errors="replace"): token
            for token in range(self.vocab_size)
            if self.api.llama_vocab_is_control(self._vocab, token)
        }

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of a token; none for a special token, unless `special` is set.

        A token that marks a thought always has its bytes, because thoughts are told by them.
        """
        buffer = ctypes.create_string_buffer(256)
        lstrip, special = 0, special or token in self._thought_tokens
        size = self.api.llama_token_to_piece(self._vocab, token, buffer, 256, lstrip, special)
        return buffer.raw[: max(size, 0)]

    def is_eog(self, token: int) -> bool:
        """Return whether the token ends the generation (end of turn or of text)."""
        return bool(self.api.llama_vocab_is_eog(self._vocab, token))

    def new_sampler(self, request: Request, prompt: Sequence[int]) -> Sampler:
        """Return the sampler of an answer to `prompt`.

        Raises:
            GattError: the request's grammar is not valid.
        """
        return self._samplers.new(request, prompt)

    def check_grammar(self, text: str) -> None:
        """Refuse a grammar that llama.cpp cannot parse.

        Raises:
            GattError: the grammar is not valid, or too large.
        """
        self.api.llama_sampler_free(self._samplers.new_grammar(text))
