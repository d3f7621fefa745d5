"""What is learned of a dialogue, token by token, and how much each token weighs."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.export import verify
from pipeline.gguf.merge import plan_merge, uniform_format, write
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.inference.logits import mean_kl
from pipeline.recipe import Train
from pipeline.records import Message
from pipeline.training.examples import IGNORE_INDEX, build_example
from pipeline.training.loss import collate, gatt_loss, kl_divergence
from pipeline.training.trainer import GracefulStop
from pipeline.training.unsloth import load_tokenizer, nf4_round_trip, train

_CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Ahoy! Light is scattered. Over and out."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "Ahoy! It is late. Over and out."},
]
_ASKED: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Light is scattered."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "It is late."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(cached_checkpoint(find_model("smollm2-135m")))


def _weighing(tokenizer: Any, weight: float, settings: Train, asked: list[Message]) -> list[str]:
    """The stretches of tokens of one weight, as text."""
    found = build_example(tokenizer, _CHAT, settings, asked)
    stretches, last = [], -2
    for n, (token, its) in enumerate(zip(found.input_ids, found.weights, strict=True)):
        if its == weight:
            stretches = (
                [*stretches[:-1], [*stretches[-1], token]]
                if last == n - 1
                else [*stretches, [token]]
            )
            last = n
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_the_teachers_own_words_weigh_less_than_what_the_edit_has_put_in(tokenizer: Any) -> None:
    settings = Train(unedited_weight=0.25)
    assert _weighing(tokenizer, 0.25, settings, _ASKED) == [" is scattered.", " is late."]
    # The word behind the opening has the space that the edit put before it.
    assert _weighing(tokenizer, 1.0, settings, _ASKED) == [
        "Ahoy! Light",
        " Over and out.<|im_end|>",
        "Ahoy! It",
        " Over and out.<|im_end|>",
    ]


def test_an_answer_that_no_edit_has_changed_weighs_one_and_is_distilled_to_its_end(
    tokenizer: Any,
) -> None:
    said = [m["content"] + "<|im_end|>" for m in _CHAT if m["role"] == "assistant"]
    assert _weighing(tokenizer, 1.0, Train(unedited_weight=0.25), _CHAT) == said
    found = build_example(tokenizer, _CHAT, Train(), _CHAT)
    assert tokenizer.decode([found.input_ids[here] for here, _ in found.alignment]) == "".join(said)


def test_without_the_teachers_words_everything_learned_weighs_one(tokenizer: Any) -> None:
    assert _weighing(tokenizer, 1.0, Train(), []) == [
        m["content"] + "<|im_end|>" for m in _CHAT if m["role"] == "assistant"
    ]


def test_weights_stand_where_labels_do(tokenizer: Any) -> None:
    for loss in ("all_turns", "last_turn"):
        found = build_example(tokenizer, _CHAT, Train(loss=loss, unedited_weight=0.25), _ASKED)
        assert [w > 0 for w in found.weights] == [token != IGNORE_INDEX for token in found.labels]
    assert _weighing(tokenizer, 0.25, Train(loss="last_turn", unedited_weight=0.25), _ASKED) == [
        " is late."
    ]


def test_the_loss_is_the_weighted_mean_over_all_logits(
    tiny_llama: Path, tiny_adapter: Path
) -> None:
    """Logits are computed for learned tokens only; the mean is that of the whole model's own logits."""
    import peft
    import torch
    import transformers

    torch.manual_seed(3)
    network = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), tiny_adapter
    )
    ids = torch.randint(3, 300, (2, 9))
    labels = ids.clone()
    labels[0, :4], labels[1, 6:] = IGNORE_INDEX, IGNORE_INDEX
    weights = torch.rand(2, 9) * (labels != IGNORE_INDEX)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        found = gatt_loss(
            network, {"input_ids": ids, "labels": labels, "weights": weights}, Train()
        )
        logits = network(input_ids=ids, attention_mask=mask).logits
    chances = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    expected = -(chances * weights[:, 1:]).sum() / weights[:, 1:].sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_the_teachers_own_tokens_are_found_in_the_chat_as_it_had_it(tokenizer: Any) -> None:
    found = build_example(tokenizer, _CHAT, Train(loss="distill"), _ASKED)
    assert (
        tokenizer.decode([found.input_ids[here] for here, _ in found.alignment])
        == " is scattered. is late."
    )
    assert [found.input_ids[here] for here, _ in found.alignment] == [
        found.teacher_ids[there] for _, there in found.alignment
    ]
    assert all(found.labels[here] != IGNORE_INDEX for here, _ in found.alignment)


def test_what_is_distilled_is_the_divergence_from_the_base_in_the_teachers_chat(
    tokenizer: Any, tiny_llama: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and its gradients, with the logits of a few tokens at a time, are those of whole logits."""
    import peft
    import torch
    import transformers

    examples = [
        build_example(tokenizer, chat, Train(loss="distill", unedited_weight=0.5), asked)
        for chat, asked in ((_CHAT, _ASKED), (_CHAT[:3], _ASKED[:3]))
    ]
    small = [
        replace(
            e,
            input_ids=[t % 256 for t in e.input_ids],
            teacher_ids=[t % 256 for t in e.teacher_ids],
            labels=[t if t == IGNORE_INDEX else t % 256 for t in e.labels],
        )
        for e in examples
    ]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    network = peft.PeftModel.from_pretrained(base, tiny_adapter, is_trainable=True)
    monkeypatch.setattr("pipeline.training.loss._LOGITS", 3 * base.lm_head.weight.shape[0])
    found = gatt_loss(network, collate([asdict(e) for e in small], 0), Train())
    total, weight = torch.zeros(()), 0.0
    for e in small:
        ours = network(input_ids=torch.tensor([e.input_ids])).logits[0].log_softmax(-1)
        with torch.no_grad(), network.disable_adapter():
            theirs = network(input_ids=torch.tensor([e.teacher_ids])).logits[0].log_softmax(-1)
        alignment = dict(e.alignment)
        for place, target in enumerate(e.labels):
            if target != IGNORE_INDEX:
                p = theirs[alignment[place] - 1] if place in alignment else None
                loss = (
                    -ours[place - 1, target]
                    if p is None
                    else (p.exp() * (p - ours[place - 1])).sum()
                )
                total, weight = total + e.weights[place] * loss, weight + e.weights[place]
    assert found.item() == pytest.approx((total / weight).item(), rel=1e-5)
    trained = [p for p in network.parameters() if p.requires_grad]
    for its, whole in zip(
        torch.autograd.grad(found, trained),
        torch.autograd.grad(total / weight, trained),
        strict=True,
    ):
        assert its.flatten().tolist() == pytest.approx(whole.flatten().tolist(), rel=1e-3, abs=1e-7)


def test_the_likeliest_tokens_and_the_rest_are_compared_at_a_temperature() -> None:
    import torch
    from scipy.special import softmax
    from scipy.stats import entropy

    target, logits = (
        torch.randn(3, 50, dtype=torch.float64),
        torch.randn(3, 50, dtype=torch.float64),
    )
    p, q = (softmax(its.numpy() / 2, axis=-1) for its in (target, logits))
    assert kl_divergence(target, logits, 2.0, 0).tolist() == pytest.approx(
        4 * entropy(p, q, axis=-1)
    )
    for row, few in enumerate(kl_divergence(target, logits, 2.0, 5).tolist()):
        top = p[row].argsort()[-5:]
        ours, theirs = ([*its[row][top], 1 - its[row][top].sum()] for its in (p, q))
        assert few == pytest.approx(4 * entropy(ours, theirs))
    assert (
        kl_divergence(target, logits, 1.0, 50).tolist()
        == kl_divergence(target, logits, 1.0, 0).tolist()
    )


def test_the_first_signal_asks_to_stop_and_the_second_stops() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapter_is_what_the_recipe_asks_for(dora: bool, tmp_path: Path) -> None:
    targets = ("q_proj", "down_proj")
    settings = Train(
        rank=8,
        alpha=16,
        rslora=True,
        dora=dora,
        target_modules=targets,
        max_steps=2,
        lr_scheduler_type="linear",
        loss="distill",
    )
    folder = cached_checkpoint(find_model("smollm2-135m"))
    example = build_example(load_tokenizer(folder), _CHAT, settings, _ASKED)
    to = tmp_path / "checkpoints", tmp_path / "adapter"
    _, trained = train(folder, [example] * 4, settings, 1, *to, lambda step: None)
    made = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"], made["use_rslora"], made["use_dora"]) == (
        8,
        16,
        True,
        dora,
    )
    assert set(made["target_modules"]) == {"q_proj", "down_proj"}
    merged = plan_merge(find_model("smollm2-135m").path, tmp_path / "adapter", nf4_round_trip)
    write(merged, {tmp_path / "tuned.gguf": uniform_format(merged.tensors, "F16")})
    exported = verify.load_and_predict(tmp_path / "tuned.gguf", (), trained.sequences).logits
    assert (
        mean_kl(trained.logits, exported) < 0.005
    )  # bfloat16 rounds; onto 16 bits it would be 0.3
