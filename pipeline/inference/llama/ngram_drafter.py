"""N-gram speculative decoding: a draft of the next token from what followed the same tokens before.

A draft model is not needed: templates, required phrases and repeated questions recur often enough.
"""

from __future__ import annotations

from collections.abc import Sequence


class NgramDrafter:
    """Remembers which token followed each n-gram of up to `max_tokens` tokens.

    After `capacity` n-grams it starts over, so that memory stays bounded.
    """

    def __init__(self, max_tokens: int = 3, capacity: int = 1 << 17) -> None:
        self._max_tokens, self._capacity = max_tokens, capacity
        self._next_token: dict[tuple[int, ...], int] = {}

    def draft(self, tokens: Sequence[int]) -> int | None:
        """Return the token that last followed the longest known n-gram at the end of `tokens`."""
        for ngram in self._ngrams(tokens):
            if ngram in self._next_token:
                return self._next_token[ngram]
        return None

    def learn(self, tokens: Sequence[int], next_token: int) -> None:
        """Remember that `next_token` followed the n-grams at the end of `tokens`."""
        if len(self._next_token) > self._capacity:
            self._next_token.clear()
        for ngram in self._ngrams(tokens):
            self._next_token[ngram] = next_token

    def _ngrams(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the n-grams at the end of `tokens`, the longest first."""
        last = tuple(tokens[-self._max_tokens :])
        return [last[start:] for start in range(len(last))]
