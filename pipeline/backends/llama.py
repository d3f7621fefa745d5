"""Batched multi-turn generation over llama.cpp's low-level API.

Dialogues run side by side, each in a sequence of its own; one that ends makes room for the next at once. Only new
tokens are fed: a request's tokens are compared with what its sequence holds in the cache.

On a CPU an answer does not depend on what runs beside it (llama.cpp of llama-cpp-python 0.3.36): a request is a
function of its text and seed, bit by bit. That takes four things, and each was found by measurement. Every sequence has
a stream of cells of its own; flash attention is on; a prompt is fed in chunks below 64 tokens (from there on another
kernel sums in another order); and no token is decoded alone, because a lone one has its cache split among the threads.
"""

from __future__ import annotations

import codecs
import ctypes
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.backends.template import ChatTemplate
from pipeline.errors import GattError
from pipeline.gguf.read import open_gguf
from pipeline.machine import require_memory
from pipeline.records import Completion, Request, Task

_CHUNK = 63
_PADDING = 256


@dataclass(slots=True)
class _Sequence:
    """One stream of the cache and the dialogue that runs in it. `cached` are the tokens whose cells are filled."""

    id: int
    task: Task | None = None
    request: Request | None = None
    cached: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    text: str = ""
    finish: str = ""
    decoder: Any = None
    sampler: Any = None


class Llama:
    """A GGUF file with room for `sequences` dialogues of up to `context` tokens each.

    `cache` is the type of the attention's keys and values; records call the model `name`, or else by its file's name.

    Raises:
        GattError: no GGUF, a broken one, one without a chat template, or too little memory.
    """

    def __init__(self, path: Path, sequences: int, context: int, cache: Literal["F16", "F32"] = "F16", name: str = "") -> None:
        info = open_gguf(path)
        self.name = name or path.name
        cells = (sequences + 1) * _padded(context)
        needed = info.bytes + cells * info.cache_bytes_per_token * (2 if cache == "F32" else 1)
        require_memory(needed, f"run {path.name} with {sequences} sequences")
        import llama_cpp

        self._api = llama_cpp
        _silence(llama_cpp)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise GattError(f"llama.cpp cannot load {path}: {info.architecture} may be newer than this llama-cpp-python.")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.context = _padded(context)
        self._context = llama_cpp.llama_init_from_model(self._model, self._context_params(sequences, cache))
        if not self._context:
            raise GattError(f"No memory for a cache of {cells} tokens. Lower `sequences` or the number of turns.")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(max(_CHUNK, 2 * sequences) + 1, 0, 1)
        self._sequences = [_Sequence(n) for n in range(sequences + 1)]
        self.template = ChatTemplate(info.chat_template, info.bos, info.eos)

    def _context_params(self, sequences: int, cache: str) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx = (sequences + 1) * self.context
        params.n_seq_max = sequences + 1
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        params.type_k = params.type_v = getattr(self._api, f"GGML_TYPE_{cache}")
        params.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        return params

    def close(self) -> None:
        """Give the memory back."""
        for sequence in self._sequences:
            self._free_sampler(sequence)
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a rendered chat: special tokens are parsed, and none is added (the template writes its own)."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, True)
        return list(ids[:count])

    def run(self, tasks: Iterable[Task], on_text: Callable[[str], None] | None = None) -> None:
        """Drive all `tasks` to their end. `on_text` receives each piece of text (meant for one task: a chat)."""
        waiting = iter(tasks)
        busy = [s for s in self._sequences[:-1] if self._next_task(s, waiting)]
        while busy:
            for sequence in busy:
                while len(sequence.pending) > 1:
                    self._prefill(sequence)
            for sequence, row in zip(busy, self._decode(busy), strict=True):
                self._sample(sequence, row, on_text)
            busy = [s for s in busy if s.pending or self._advance(s) or self._next_task(s, waiting)]

    def complete(self, request: Request, on_text: Callable[[str], None] | None = None) -> Completion:
        """One answer, by itself."""
        got: list[Completion] = []

        def once() -> Task:
            got.append((yield request))

        self.run([once()], on_text)
        return got[0]

    def perplexity(self, texts: Iterable[str]) -> float:
        """exp of the mean negative log-likelihood of the texts' tokens, each but the first given those before it."""
        losses: list[float] = []
        for text in texts:
            tokens = self.tokenize(text)[: self.context]
            self._api.llama_memory_seq_rm(self._memory, 0, 0, -1)
            self._sequences[0].cached.clear()
            for start in range(0, len(tokens) - 1, _CHUNK):
                chunk = range(start, min(start + _CHUNK, len(tokens) - 1))
                rows = self._feed([(0, at, tokens[at], True) for at in chunk])
                losses += [self._loss(row, tokens[at + 1]) for row, at in zip(rows, chunk, strict=True)]
            self._api.llama_memory_seq_rm(self._memory, 0, 0, -1)
        return math.exp(sum(losses) / len(losses))

    def _loss(self, row: int, token: int) -> float:
        """The negative log-likelihood of `token` by the logits of a row of the last batch."""
        size = self._api.llama_vocab_n_tokens(self._vocab)
        logits = np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, row), (size,)).astype(np.float64)
        peak = float(logits.max())
        return math.log(float(np.exp(logits - peak).sum())) + peak - float(logits[token])

    def _next_task(self, sequence: _Sequence, waiting: Iterator[Task]) -> bool:
        """Start tasks in a free sequence until one has something to generate."""
        for task in waiting:
            sequence.task = task
            # A new dialogue starts in an empty stream: what the last one left must not matter.
            self._api.llama_memory_seq_rm(self._memory, sequence.id, 0, -1)
            sequence.cached.clear()
            if self._ask(sequence, None):
                return True
        return False

    def _advance(self, sequence: _Sequence) -> bool:
        """Hand the finished completion to the dialogue and take its next request."""
        done = Completion(sequence.text, sequence.tokens, sequence.prompt_tokens, sequence.finish)
        return self._ask(sequence, done)

    def _ask(self, sequence: _Sequence, completion: Completion | None) -> bool:
        """Send `completion` and admit requests until one needs decoding; False when the dialogue has ended."""
        assert sequence.task is not None
        while True:
            try:
                request = sequence.task.send(completion) if completion else next(sequence.task)
            except StopIteration:
                return False
            completion = self._admit(sequence, request)
            if completion is None:
                return True

    def _admit(self, sequence: _Sequence, request: Request) -> Completion | None:
        """Line up the tokens that the cache lacks; a prompt that leaves no room to answer is completed at once."""
        tokens = self.tokenize(self.template.render(request.messages))
        if len(tokens) + request.max_tokens > self.context:
            return Completion("", 0, len(tokens), "context")
        shared = self._keep_shared(sequence, tokens[:-1])
        sequence.request, sequence.pending = request, tokens[shared:]
        sequence.prompt_tokens, sequence.tokens, sequence.text = len(tokens), 0, ""
        sequence.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._free_sampler(sequence)
        sequence.sampler = self._sampler(request)
        return None

    def _keep_shared(self, sequence: _Sequence, tokens: list[int]) -> int:
        """Keep of the cache what `tokens` begin with; an empty stream takes it from the one that holds most of it."""
        if not sequence.cached:
            fullest = max(self._sequences, key=lambda s: _common(s.cached, tokens))
            if fullest is not sequence and _common(fullest.cached, tokens):
                self._api.llama_memory_seq_cp(self._memory, fullest.id, sequence.id, 0, -1)
                sequence.cached = list(fullest.cached)
        shared = _common(sequence.cached, tokens)
        self._api.llama_memory_seq_rm(self._memory, sequence.id, shared, -1)
        del sequence.cached[shared:]
        return shared

    def _prefill(self, sequence: _Sequence) -> None:
        """Feed one chunk of a prompt, all but its last token (which is decoded with everybody's)."""
        chunk = sequence.pending[: min(_CHUNK, len(sequence.pending) - 1)]
        self._feed([(sequence.id, len(sequence.cached) + n, token, False) for n, token in enumerate(chunk)])
        sequence.cached += chunk
        del sequence.pending[: len(chunk)]

    def _decode(self, busy: list[_Sequence]) -> list[int]:
        """One new token for each sequence, with logits; where in the batch each stands."""
        rows = self._feed([(s.id, len(s.cached), s.pending[0], True) for s in busy])
        for sequence in busy:
            sequence.cached += sequence.pending
            sequence.pending = []
        return rows

    def _feed(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (sequence, position, token, logits?) rows in the order of their sequences; their indices in the batch.

        llama.cpp splits a batch where the numbers of the sequences are not consecutive. A token that would be decoded
        alone for that gets ballast: a token in the next stream, forgotten at once.
        """
        placed: list[tuple[int, int, int, bool]] = []
        indices: list[int] = []
        ballast: list[tuple[int, int]] = []
        for row, following in zip_longest(rows, rows[1:]):
            id, _, token, _ = row
            indices.append(len(placed))
            joined = (placed and placed[-1][0] >= id - 1) or (following and following[0] <= id + 1)
            placed.append(row)
            if not joined:
                end = len(self._sequences[id + 1].cached)
                placed.append((id + 1, end, token, False))
                ballast.append((id + 1, end))
        batch = self._batch
        batch.n_tokens = len(placed)
        for n, (id, position, token, logits) in enumerate(placed):
            batch.token[n], batch.pos[n], batch.logits[n] = token, position, logits
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, id
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(placed)} tokens")
        for id, end in ballast:
            self._api.llama_memory_seq_rm(self._memory, id, end, -1)
        return indices

    def _sample(self, sequence: _Sequence, row: int, on_text: Callable[[str], None] | None) -> None:
        """Draw the next token; leave it pending, or nothing where the answer ends."""
        token = self._api.llama_sampler_sample(sequence.sampler, self._context, row)
        sequence.tokens += 1
        assert sequence.request is not None
        if self._api.llama_vocab_is_eog(self._vocab, token):
            sequence.text += sequence.decoder.decode(b"", True)
            sequence.finish = "stop"
            return
        piece = sequence.decoder.decode(self._piece(token))
        sequence.text += piece
        if on_text and piece:
            on_text(piece)
        if sequence.request.enough and sequence.request.enough(sequence.text):
            sequence.finish = "enough"
        elif sequence.tokens < sequence.request.max_tokens:
            sequence.pending = [token]
        else:
            sequence.finish = "length"

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = self._api.llama_token_to_piece(self._vocab, token, buffer, 256, 0, False)
        return buffer.raw[: max(size, 0)]

    def _sampler(self, request: Request) -> Any:
        """llama.cpp's chain of one request: top-k 40, DRY, min-p 0.05, temperature, seeded draw.

        DRY keeps a small model from saying an earlier answer again; up to eight tokens in a row may come again, so that
        a demanded phrase is free. A repeat penalty would not do: it takes the full stop away from "Over and out.".
        """
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if request.temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
            return chain
        between = (ctypes.c_char_p * 1)(b"\n")
        for part in (
            api.llama_sampler_init_top_k(40),
            api.llama_sampler_init_dry(self._vocab, 0.8, 1.75, 8, self.context, between, 1),
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

    def _free_sampler(self, sequence: _Sequence) -> None:
        if sequence.sampler:
            self._api.llama_sampler_free(sequence.sampler)
            sequence.sampler = None


def quantize(source: Path, target: Path, format_name: str) -> None:
    """Write `source` (of any format) to `target` in llama.cpp's format `format_name` ("F16", "Q8_0", "Q4_K_M", ...).

    Raises:
        GattError: no such format, or llama.cpp refused.
    """
    import llama_cpp

    _silence(llama_cpp)
    kind = getattr(llama_cpp, f"LLAMA_FTYPE_{'ALL' if format_name == 'F32' else 'MOSTLY'}_{format_name}", None)
    if kind is None:
        raise GattError(f"Unknown format {format_name!r}. Use llama.cpp's names, such as F16, Q8_0, Q5_K_M or Q4_K_M.")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = kind, os.cpu_count() or 1, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise GattError(f"llama.cpp could not quantise {source.name} to {format_name} (is the disk full?).")


def system_info() -> str:
    """Whether llama.cpp can use a GPU, and what it was built with on this machine."""
    import llama_cpp

    gpu = "works with GPU offload" if llama_cpp.llama_supports_gpu_offload() else "works on the CPU"
    return f"{gpu} ({llama_cpp.llama_print_system_info().decode().strip(' |')})"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _padded(context: int) -> int:
    return -(-context // _PADDING) * _PADDING


_quiet: list[Any] = []


def _silence(llama_cpp: Any) -> None:
    """Send llama.cpp's own log nowhere; the callback must outlive the library's use of it."""
    if not _quiet:
        _quiet.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
        llama_cpp.llama_log_set(_quiet[0], ctypes.c_void_p(0))
