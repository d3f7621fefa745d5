"""Degradation: the numbers are those of two models side by side, with one in memory at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.special

from pipeline.evaluation import divergence
from pipeline.evaluation.arms import Arm
from pipeline.evaluation.divergence import measure_degradation
from pipeline.gguf.adapter import write_adapter
from pipeline.gguf.merge import open_base
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import Adapter
from pipeline.records import Message

_CHATS: list[list[Message]] = [
    [
        {"role": "user", "content": f"It's {n}"},
        {"role": "assistant", "content": "I'll pay €35.50!"},
        {"role": "user", "content": "naïve café"},
        {"role": "assistant", "content": f"2,026 and {n}"},
    ]
    for n in range(3)
]


@pytest.fixture
def arms(tiny_llama: Path, tiny_adapter: Path, tmp_path: Path) -> list[Arm]:
    """Return a base, the base with an adapter, and the adapter merged."""
    base, merged, adapter = (tmp_path / f"{name}.gguf" for name in ("base", "merged", "adapter"))
    write_formats(Model("tiny", tiny_llama), None, {"F32": base})
    write_formats(Model("tiny", tiny_llama), tiny_adapter, {"F32": merged})
    write_adapter(open_base(tiny_llama), tiny_adapter, adapter)
    return [
        Arm(name="base", path=base),
        Arm(name="tuned", path=merged),
        Arm(name="adapter", path=base, adapter=Adapter(adapter)),
    ]


@pytest.fixture
def open_models(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record after each model that is opened how many are open."""
    counts = [0]

    class Counted(BatchEngine):
        def __enter__(self) -> Counted:
            counts.append(counts[-1] + 1)
            return self

        def __exit__(self, *_: object) -> None:
            counts.append(counts[-1] - 1)
            super().__exit__()

    monkeypatch.setattr(divergence, "BatchEngine", Counted)
    return counts


def _side_by_side(base: Arm, tuned: Arm) -> tuple[float, float, float]:
    """Return the perplexities of both, and KL(base‖tuned), of two models in memory at once."""
    losses, kl = [], []
    assert base.path and tuned.path
    with (
        BatchEngine(base.path, 1, 256) as first,
        BatchEngine(tuned.path, 1, 256, adapter=tuned.adapter) as second,
    ):
        for chat in _CHATS:
            for turn in (1, 3):
                prompt = first.tokenize(first.template.render(chat[:turn]))
                answer = first.tokenize(chat[turn]["content"])
                tokens = [*prompt, *answer[:-1]]
                rows = list(zip(first.logits(tokens), second.logits(tokens), strict=True))
                for token, pair in zip(answer, rows[-len(answer) :], strict=True):
                    p, q = (scipy.special.log_softmax(row.astype(float)) for row in pair)
                    losses.append((-p[token], -q[token]))
                    kl.append(float(scipy.special.rel_entr(np.exp(p), np.exp(q)).sum()))
    base_loss, tuned_loss = np.mean(losses, axis=0)
    return float(np.exp(base_loss)), float(np.exp(tuned_loss)), float(np.mean(kl))


@pytest.mark.parametrize("max_bytes", [1e9, 1.0])
def test_one_model_at_a_time_gives_the_numbers_of_two(
    max_bytes: float, arms: list[Arm], open_models: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little memory for the logits of all chats, they are measured one after another."""
    monkeypatch.setattr(divergence, "_MAX_LOGITS_BYTES", max_bytes)
    result = measure_degradation(arms, _CHATS, 256)
    assert max(open_models) == 1
    assert sum(count == 1 for count in open_models) == len(arms) * (3 if max_bytes == 1 else 1)
    for arm in arms[1:]:
        base, tuned, kl = _side_by_side(arms[0], arm)
        assert result.perplexity["base"] == pytest.approx(base, rel=1e-6)
        assert result.perplexity[arm.name] == pytest.approx(tuned, rel=1e-6)
        assert result.kl[arm.name] == pytest.approx(kl, rel=1e-6)
        assert kl > 0.01
    assert result.kl["base"] == 0
    with BatchEngine(arms[0].path or Path(), 1, 256) as engine:
        answers = [m["content"] for chat in _CHATS for m in chat if m["role"] == "assistant"]
        assert result.tokens == sum(len(engine.tokenize(answer)) for answer in answers)


@pytest.mark.parametrize("roles", [("user",), ("user", "assistant")])
def test_a_base_without_an_answer_has_no_perplexity(
    roles: tuple[str, ...], arms: list[Arm]
) -> None:
    """A base that thinks may be cut in each of its thoughts: its answers are empty."""
    texts = {"user": "It's 1", "assistant": ""}
    chats: list[list[Message]] = [[{"role": role, "content": texts[role]} for role in roles]]  # type: ignore[typeddict-item]
    result = measure_degradation(arms[:2], chats, 256)
    assert (result.tokens, result.perplexity, result.kl) == (0, {}, {"base": 0.0})


def test_a_model_with_another_vocabulary_is_left_out(arms: list[Arm], base: Path) -> None:
    result = measure_degradation([*arms[:2], Arm(name="other", path=base)], _CHATS, 256)
    assert result.perplexity.keys() == {"base", "tuned"}
    assert result.kl.keys() == {"base", "tuned"}
