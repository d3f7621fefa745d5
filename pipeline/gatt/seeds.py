"""Seeds of single draws, derived from the recipe's seed and what the draw is for."""

from __future__ import annotations

import zlib


def derive_seed(*parts: object) -> int:
    """Return a seed below 2**32 for a draw, equal for equal parts on every machine.

    It is the CRC-32 of the parts' texts, joined by spaces. Finished runs were sampled with these
    seeds, so the derivation must never change.
    """
    return zlib.crc32(" ".join(map(str, parts)).encode())
