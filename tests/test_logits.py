"""Logits and what is computed from them, against scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats

from pipeline.gguf.base import Array
from pipeline.inference.logits import Logits, kl_divergence, log_softmax, mean_kl, mean_nll, nll


def _draw(tokens: int, vocab_size: int, seed: int) -> Array:
    draw = np.random.default_rng(seed)
    return draw.normal(0, 8, (tokens, vocab_size)).astype(np.float32)


def test_log_softmax_is_computed_in_float64() -> None:
    (row,) = _draw(1, 50, 1)
    expected = scipy.special.log_softmax(row.astype(np.float64))
    np.testing.assert_allclose(log_softmax(row), expected, rtol=1e-12)
    assert log_softmax(row).dtype == np.float64
    assert np.isfinite(log_softmax(np.array([-3e38, 3e38], np.float32))).all()


def test_nll_is_the_surprise_of_a_token() -> None:
    assert nll(np.zeros(8, np.float32), 3) == pytest.approx(np.log(8))
    assert nll(np.array([100, 0], np.float32), 0) == pytest.approx(0)


def test_kl_is_that_of_scipy() -> None:
    p, q = (log_softmax(_draw(1, 50, seed)[0]) for seed in (1, 2))
    assert kl_divergence(p, q) == pytest.approx(scipy.stats.entropy(np.exp(p), np.exp(q)))
    assert kl_divergence(p, p) == 0


def test_mean_kl_counts_only_the_vocabulary_in_common() -> None:
    reference, model = _draw(3, 50, 1), _draw(3, 40, 2)
    expected = np.mean(
        [
            kl_divergence(log_softmax(p), log_softmax(q))
            for p, q in zip(reference[:, :40], model, strict=True)
        ]
    )
    assert mean_kl(reference, model) == pytest.approx(expected)
    with pytest.raises(ValueError, match="shorter"):
        mean_kl(reference, model[:2])


def test_mean_nll_is_over_the_next_tokens_of_each_sequence() -> None:
    values = _draw(5, 50, 3)
    logits = Logits([[7, 8, 9], [3, 4]], values)
    losses = [nll(values[0], 8), nll(values[1], 9), nll(values[3], 4)]
    assert mean_nll(logits) == pytest.approx(np.mean(losses))


def test_logits_are_saved_in_half_precision(tmp_path: Path) -> None:
    saved = Logits([[7, 8, 9], [3], [4, 5]], _draw(6, 50, 4))
    saved.save(tmp_path / "logits.npz")
    loaded = Logits.load(tmp_path / "logits.npz")
    assert loaded.sequences == saved.sequences
    assert loaded.values.dtype == np.float32
    np.testing.assert_allclose(loaded.values, saved.values, rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["logits.npz"]
