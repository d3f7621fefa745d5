"""Control vectors: what llama.cpp adds to the outputs of a model's layers.

The vector of an instruction needs no training: it is the mean difference of the layers' outputs
between prompts with the instruction and the same prompts without it, at the last token, before the
answer (Zou et al. 2023, *Representation Engineering*; Stolfo et al. 2024, *Improving
Instruction-Following in Language Models through Activation Steering*). llama.cpp's program
`cvector-generator` (method "mean") also takes means of such differences, but over all tokens, and
scales each layer to length 1.

The outputs are the nodes "l_out-N" of llama.cpp's graph, read by its callback `cb_eval`. The
vector is added just before such a node (source package of llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from pipeline.errors import GattError
from pipeline.gguf import ggml
from pipeline.gguf.base import Array
from pipeline.inference.llama.callers import CALLERS
from pipeline.inference.llama.model import Adapter, ContextSettings, LlamaHandle, LoadedModel
from pipeline.records import Message
from pipeline.system import core_count

_LAYER_OUTPUT = re.compile(rb"l_out-(\d+)")
_MAX_TOKENS = 1024
"""Of a prompt whose layer outputs are read."""


def set_control_vector(api: ModuleType, context: LlamaHandle, vector: Array | None) -> None:
    """Add the rows of `vector` (layers, n_embd) to the layers' outputs; None adds nothing.

    Layers before the first row that is not 0, and after the last one, are left as they are. The
    first layer cannot be changed: llama.cpp has no row for it.
    """
    used = [] if vector is None else [n for n, row in enumerate(vector) if n and row.any()]
    if vector is None or not used:
        status = api.llama_set_adapter_cvec(context, None, 0, 0, -1, -1)
    else:
        rows = np.ascontiguousarray(vector[1:], np.float32)
        pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        width = rows.shape[1]
        status = api.llama_set_adapter_cvec(context, pointer, rows.size, width, used[0], used[-1])
    if status:
        raise RuntimeError(f"llama_set_adapter_cvec returned {status}")


class LayerReader:
    """Reads the outputs of a model's layers, in a context of its own; not thread-safe.

    Raises:
        GattError: too little memory, or llama.cpp has no control vectors for this architecture.
    """

    def __init__(self, model: LoadedModel, adapter: Adapter | None = None) -> None:
        self._model, self._api, self._threads = model, model.api, core_count()
        self._rows: dict[int, Array] = {}
        CALLERS.open()
        self._context: LlamaHandle | None = None
        try:
            self._context = model.new_context(
                ContextSettings(_MAX_TOKENS, adapter=adapter, batch_tokens=_MAX_TOKENS),
                sequences=1,
                batch_size=_MAX_TOKENS,
                threads=self._threads,
                eval_callback=self._observe,
            )
            self._require_control()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the memory."""
        if self._context:
            self._api.llama_free(self._context)
        CALLERS.close()

    def __enter__(self) -> LayerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, messages: Sequence[Message]) -> Array:
        """Return the outputs (layers, n_embd) at the end of a prompt, where the answer begins.

        Raises:
            GattError: the prompt is too long.
        """
        return self._read(self._model.tokenize(self._model.template.render(messages)))

    def _read(self, tokens: Sequence[int]) -> Array:
        if len(tokens) > _MAX_TOKENS:
            raise GattError(
                f"A prompt for a control vector has {len(tokens)} tokens; expected at most "
                f"{_MAX_TOKENS}. Shorten the instruction."
            )
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)  # noqa: FBT003
        self._rows.clear()
        ids = (api.llama_token * len(tokens))(*tokens)
        batch = api.llama_batch_get_one(ids, len(tokens))
        status = CALLERS.decode(api, self._context, batch, self._threads)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
        width = max((row.size for row in self._rows.values()), default=0)
        outputs = np.zeros((max(self._rows, default=-1) + 1, width), np.float32)
        for layer, row in self._rows.items():
            outputs[layer] = row
        return outputs

    def _observe(self, address: int, ask: bool) -> bool:  # noqa: FBT001
        """Collect the last row of each layer's output; `EvalCallback`.

        The last layer is computed for the last token only.
        """
        node = ggml.Node.from_address(address)
        layer = _LAYER_OUTPUT.fullmatch(node.name)
        if layer and not ask:
            self._rows[int(layer[1])] = ggml.read_node(node, np.float32)[0, 0, -1].copy()
        return bool(layer) or not ask

    def _require_control(self) -> None:
        """Check that the layers' outputs can be read, and that a vector changes them.

        Not every graph of llama.cpp has both.

        Raises:
            GattError: they cannot, or it does not.
        """
        tokens = self._model.tokenize("Hello.", add_special=True)
        plain = self._read(tokens)
        if len(plain) > 1:
            set_control_vector(self._api, self._context, np.ones_like(plain))
            steered = self._read(tokens)
            set_control_vector(self._api, self._context, None)
            if not np.array_equal(steered[1:], plain[1:]):
                return
        raise GattError(
            f"llama.cpp has no control vectors for {self._model.name} (architecture "
            f"{self._model.info.architecture}, {len(plain)} layers that can be read). Leave it out."
        )
