"""How the next token is drawn: llama.cpp's sampler chains, and grammars in front of them.

The order is that of llama.cpp (grammar, bias, penalties, DRY, top-k, typical, top-p, min-p,
temperature, seeded draw), but that top-k stands before DRY: a search for repeats for 40 tokens
instead of the vocabulary. DRY stops a small model from repeating earlier answers, yet allows
repeats of up to 12 tokens: as long as the longest value of the vocabulary, with what surrounds it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import ModuleType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pipeline.errors import GattError
from pipeline.gguf.base import Array
from pipeline.records import Request, SamplerSettings

Handle: TypeAlias = object
"""A sampler of llama.cpp."""
Candidates: TypeAlias = npt.NDArray[np.void]
"""Tokens with their logits, as `llama_token_data`."""
_DRY_MULTIPLIER, _DRY_BASE, _DRY_ALLOWED_TOKENS = 0.8, 1.75, 12
_NEARLY_ZERO = 1e-30
"""Probabilities below it, relative to the most likely token, are taken as 0."""
_RANDOM_SEED = 0xFFFFFFFF
"""For it llama.cpp takes another seed each time."""
_MAX_GRAMMAR_CHARACTERS = 1 << 16
_MAX_GRAMMAR_DEPTH = 500
"""llama.cpp parses a grammar recursively: a deep one would overflow the stack."""
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data`."""


class Sampler:
    """A sampler chain for one request, and the grammar that its answer follows, if any."""

    def __init__(self, api: ModuleType, chain: Handle, grammar: Handle | None) -> None:
        self._api, self._chain, self._grammar = api, chain, grammar

    def sample(self, context: Handle, index: int, vocab_size: int) -> int | None:
        """Draw the token after a row of the batch; None if the grammar allows no token."""
        if self._grammar is None:
            return int(self._api.llama_sampler_sample(self._chain, context, index))
        pointer = self._api.llama_get_logits_ith(context, index)
        return self._sample_allowed(np.ctypeslib.as_array(pointer, (vocab_size,)))

    def close(self) -> None:
        """Free the memory."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._api.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def _sample_allowed(self, logits: Array) -> int | None:
        """Draw among the tokens that the grammar allows.

        As in llama.cpp, a token is drawn from all first: to check one is faster than to check the
        vocabulary, and most often it is allowed. llama.cpp ends the process if a token is accepted
        that the grammar does not allow, so those are removed, instead of given to the chain with a
        logit of minus infinity.
        """
        candidates = np.zeros(len(logits), _TOKEN_DATA)
        candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
        token = self._apply(self._chain, candidates.copy())
        if not len(self._allowed(candidates[token : token + 1].copy())):
            allowed = self._allowed(candidates)
            if not len(allowed):
                return None
            token = self._apply(self._chain, allowed)
        for sampler in (self._grammar, self._chain):
            self._api.llama_sampler_accept(sampler, token)
        return token

    def _allowed(self, candidates: Candidates) -> Candidates:
        """Return the candidates that the grammar allows."""
        self._apply(self._grammar, candidates)
        allowed: Candidates = candidates[np.isfinite(candidates["logit"])]
        return allowed

    def _apply(self, sampler: Handle | None, candidates: Candidates) -> int:
        """Apply a sampler to `candidates` in place; return the token that it selects, or -1."""
        array = self._api.llama_token_data_array(
            data=candidates.ctypes.data_as(self._api.llama_token_data_p),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        self._api.llama_sampler_apply(sampler, ctypes.byref(array))
        return int(array.data[array.selected].id) if array.selected >= 0 else -1


class SamplerFactory:
    """Makes the samplers of one model; several threads may use it at once.

    Repeats are looked for in `context` tokens; `tokenize` returns the tokens of a text.
    """

    def __init__(
        self,
        api: ModuleType,
        vocab: Handle,
        context: int,
        tokenize: Callable[[str], list[int]],
    ) -> None:
        self._api, self._vocab, self._context, self._tokenize = api, vocab, context, tokenize
        self._vocab_size = int(api.llama_vocab_n_tokens(vocab))
        # Cloned for each request, because creation searches the vocabulary for the sequence
        # breaker, which takes as long as decoding half a token.
        self._dry = self._new_dry(_DRY_MULTIPLIER)

    def close(self) -> None:
        """Free the memory."""
        self._api.llama_sampler_free(self._dry)

    def new(self, request: Request, prompt: Sequence[int]) -> Sampler:
        """Return the sampler of an answer to `prompt`; greedy at temperature 0.

        Raises:
            GattError: the grammar is not valid.
        """
        settings = request.sampler
        grammar = self.new_grammar(settings.grammar) if settings.grammar else None
        params = self._api.llama_sampler_chain_default_params()
        chain: Handle = self._api.llama_sampler_chain_init(params)
        for sampler in (
            *self._new_biases(settings),
            *self._new_penalties(settings, prompt),
            *self._new_selection(request),
        ):
            self._api.llama_sampler_chain_add(chain, sampler)
        return Sampler(self._api, chain, grammar)

    def new_grammar(self, text: str) -> Handle:
        """Return the sampler of a grammar, which the caller frees.

        Raises:
            GattError: the grammar is not valid, or too large.
        """
        if len(text) > _MAX_GRAMMAR_CHARACTERS or _nesting(text) > _MAX_GRAMMAR_DEPTH:
            raise GattError(
                f"The grammar is too large: {len(text)} characters, {_nesting(text)} levels of "
                f"parentheses; expected at most {_MAX_GRAMMAR_CHARACTERS} and "
                f"{_MAX_GRAMMAR_DEPTH}. Divide it into rules, or simplify it."
            )
        grammar: Handle = "\0" not in text and self._api.llama_sampler_init_grammar(
            self._vocab, text.encode(), b"root"
        )
        if not grammar:
            raise GattError(
                "The grammar is not valid. Expected GBNF text with a rule named root, without left "
                'recursion, such as: root ::= "yes" | "no"'
            )
        return grammar

    @cached_property
    def _eog_tokens(self) -> list[int]:
        tokens = range(self._vocab_size)
        return [token for token in tokens if self._api.llama_vocab_is_eog(self._vocab, token)]

    def _new_dry(self, multiplier: float) -> Handle:
        """Return a DRY sampler over the whole context, with one sequence breaker."""
        breakers = (ctypes.c_char_p * 1)(b"\n")
        dry: Handle = self._api.llama_sampler_init_dry(
            self._vocab,
            multiplier,
            _DRY_BASE,
            _DRY_ALLOWED_TOKENS,
            self._context,
            breakers,
            1,
        )
        return dry

    def _new_biases(self, settings: SamplerSettings) -> Iterator[Handle]:
        biases = [*settings.logit_bias]
        if settings.ignore_eos:
            biases += [(token, -np.inf) for token in self._eog_tokens]
        if biases:
            array = (self._api.llama_logit_bias * len(biases))(*biases)
            yield self._api.llama_sampler_init_logit_bias(self._vocab_size, len(biases), array)

    def _new_penalties(self, settings: SamplerSettings, prompt: Sequence[int]) -> Iterator[Handle]:
        """Yield a sampler for each window: that of `repeat_last_n` includes the prompt's end."""
        init, size, context = (
            self._api.llama_sampler_init_penalties,
            self._vocab_size,
            self._context,
        )
        window = context if settings.repeat_last_n < 0 else min(settings.repeat_last_n, context)
        if settings.repeat_penalty != 1 and window:
            repeats = init(size, window, settings.repeat_penalty, 0.0, 0.0)
            self._accept(repeats, prompt[-window:])
            yield repeats
        frequency, presence = settings.frequency_penalty, settings.presence_penalty
        if frequency or presence:
            yield init(size, context, 1.0, frequency, presence)

    def _new_selection(self, request: Request) -> Iterator[Handle]:
        """Yield what chooses the token from the logits."""
        api, settings, greedy = self._api, request.sampler, request.temperature == 0
        default = 0.0 if greedy else _DRY_MULTIPLIER
        multiplier = default if settings.dry_multiplier is None else settings.dry_multiplier
        if settings.top_k > 0 and not greedy:
            yield api.llama_sampler_init_top_k(settings.top_k)
        if multiplier:
            is_default = multiplier == _DRY_MULTIPLIER
            dry = api.llama_sampler_clone(self._dry) if is_default else self._new_dry(multiplier)
            # DRY sees only what it has accepted: give it the earlier answers.
            for message in request.messages:
                if message["role"] == "assistant":
                    self._accept(dry, self._tokenize(message["content"] + "\n"))
            yield dry
        if greedy:
            yield api.llama_sampler_init_greedy()
            return
        if settings.typical_p < 1:
            # It multiplies 0 by the logarithm of 0 for a token whose probability is 0.
            yield api.llama_sampler_init_min_p(_NEARLY_ZERO, 1)
            yield api.llama_sampler_init_typical(settings.typical_p, 1)
        if request.top_p < 1:
            yield api.llama_sampler_init_top_p(request.top_p, 1)
        if settings.min_p > 0:
            yield api.llama_sampler_init_min_p(settings.min_p, 1)
        yield api.llama_sampler_init_temp(request.temperature)
        yield api.llama_sampler_init_dist((request.seed & 0xFFFFFFFF) % _RANDOM_SEED)

    def _accept(self, sampler: Handle, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._api.llama_sampler_accept(sampler, token)


def _nesting(grammar: str) -> int:
    """Return the largest number of open parentheses."""
    depths = np.cumsum([(char == "(") - (char == ")") for char in grammar])
    return int(depths.max(initial=0))
