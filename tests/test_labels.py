"""What is learned of a dialogue, token by token; the weights of its tokens; the loss of a batch."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import peft
import pytest
import torch
import transformers
from support.chat_templates import GEMMA3
from support.converter_families import MINIATURES, config_of
from support.families import SIZES
from support.training import loss_of_full_logits, tiny_examples

from pipeline.errors import GattError
from pipeline.files import write_jsonl
from pipeline.hub.convert import cached_checkpoint
from pipeline.hub.models import find_model
from pipeline.recipe import Recipe, Train
from pipeline.records import Message, SynthesisMethod, SynthesizedDialogue
from pipeline.training.examples import (
    IGNORE_INDEX,
    TrainingExample,
    build_example,
    example_from_row,
    random_slips,
    training_examples,
)
from pipeline.training.loss import Batch, GattLoss, collate, gatt_loss, kl_divergence
from pipeline.training.projections import adaptable_layers, layer_names, own_projections
from pipeline.training.unsloth import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEACHER_CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Light is scattered."},
    {"role": "user", "content": "And red?"},
    {"role": "assistant", "content": "It is late."},
]
_CHAT: list[Message] = [
    {"role": "assistant", "content": f"Ahoy! {m['content']} Over and out."}
    if m["role"] == "assistant"
    else m
    for m in _TEACHER_CHAT
]
_ANSWERS = [m["content"] + "<|im_end|>" for m in _CHAT if m["role"] == "assistant"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the embedded model's tokenizer."""
    return load_tokenizer(cached_checkpoint(find_model("smollm2-135m")))


def _texts_of_weight(
    tokenizer: PreTrainedTokenizerBase, example: TrainingExample, weight: float
) -> list[str]:
    """Return the runs of adjacent tokens that have `weight`, as text."""
    runs: list[list[int]] = []
    previous = -2
    for n, token in enumerate(example.input_ids):
        if example.weights[n] == weight:
            if previous != n - 1:
                runs.append([])
            runs[-1].append(token)
            previous = n
    return [tokenizer.decode(run) for run in runs]


def _aligned_text(tokenizer: PreTrainedTokenizerBase, example: TrainingExample) -> str:
    return str(tokenizer.decode([example.input_ids[index] for index, _ in example.alignment]))


def test_unedited_words_weigh_less_than_edited_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    example = build_example(tokenizer, _CHAT, Train(unedited_weight=0.25), _TEACHER_CHAT)
    assert _texts_of_weight(tokenizer, example, 0.25) == [" is scattered.", " is late."]
    # The word after the opening has the space that the edit put before it.
    assert _texts_of_weight(tokenizer, example, 1.0) == [
        "Ahoy! Light",
        " Over and out.<|im_end|>",
        "Ahoy! It",
        " Over and out.<|im_end|>",
    ]


def test_answers_without_an_edit_weigh_one_and_are_distilled_to_their_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = build_example(tokenizer, _CHAT, Train(unedited_weight=0.25), _CHAT)
    assert _texts_of_weight(tokenizer, example, 1.0) == _ANSWERS
    assert _aligned_text(tokenizer, example) == "".join(_ANSWERS)


def test_without_the_teachers_chat_all_learned_tokens_weigh_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = build_example(tokenizer, _CHAT, Train())
    assert _texts_of_weight(tokenizer, example, 1.0) == _ANSWERS
    assert not example.teacher_ids and not example.alignment


@pytest.mark.parametrize("objective", ["all_turns", "last_turn"])
def test_exactly_the_labeled_tokens_have_a_weight(
    tokenizer: PreTrainedTokenizerBase, objective: str
) -> None:
    settings = Train.model_validate({"loss": objective, "unedited_weight": 0.25})
    example = build_example(tokenizer, _CHAT, settings, _TEACHER_CHAT)
    assert [weight > 0 for weight in example.weights] == [
        label != IGNORE_INDEX for label in example.labels
    ]
    unedited = [" is scattered.", " is late."]
    assert _texts_of_weight(tokenizer, example, 0.25) == (
        unedited if objective == "all_turns" else unedited[1:]
    )


def test_unedited_tokens_are_aligned_with_the_teachers_chat(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = build_example(tokenizer, _CHAT, Train(loss="distill"), _TEACHER_CHAT)
    assert _aligned_text(tokenizer, example) == " is scattered. is late."
    _assert_aligned_tokens_are_equal(example)


def _assert_aligned_tokens_are_equal(example: TrainingExample) -> None:
    for index, teacher_index in example.alignment:
        assert example.input_ids[index] == example.teacher_ids[teacher_index]
        assert example.labels[index] != IGNORE_INDEX


def test_a_period_with_a_line_break_is_learned_in_one_token_and_in_two(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """As Qwen's and Llama 3's tokenizers have it: the period is the teacher's, its line is not."""
    merging = copy.deepcopy(tokenizer)
    merging.add_tokens([transformers.AddedToken(".\n", normalized=False)])
    teacher = [*_TEACHER_CHAT[:3], *_TEACHER_CHAT[1:3] * 19]
    signed: list[Message] = [
        {"role": "assistant", "content": f"{m['content']}\n- Amir"}
        if m["role"] == "assistant"
        else m
        for m in teacher
    ]
    example = build_example(merging, signed, Train(max_length=2000), teacher)
    merged, period = merging.encode(".\n")[0], merging.encode(".")[0]
    aligned = [example.input_ids[index] for index, _ in example.alignment]
    split = aligned.count(period)
    assert split + list(example.input_ids).count(merged) == 20
    assert 4 <= split <= 16
    assert merged not in aligned
    assert {example.weights[n] for n, t in enumerate(example.input_ids) if t == merged} == {1}
    plain = build_example(tokenizer, signed, Train(max_length=2000), teacher)
    assert merging.decode(example.input_ids) == tokenizer.decode(plain.input_ids)
    (line,) = tokenizer.encode("\n")
    after = [example.input_ids[index + 1] for index, _ in example.alignment]
    assert after.count(line) == split

    longest = Train(max_length=len(example.input_ids) - 1)
    cut = build_example(merging, signed, longest, teacher)
    assert len(cut.input_ids) <= longest.max_length


def test_the_tokens_of_one_character_are_aligned_in_order(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """An emoji is several tokens, which have the same offsets."""
    teacher_chat: list[Message] = [
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "I feel great 🦜 today."},
    ]
    chat: list[Message] = [
        teacher_chat[0],
        {"role": "assistant", "content": "Ahoy! I feel great 🦜 today."},
    ]
    example = build_example(tokenizer, chat, Train(loss="distill"), teacher_chat)
    assert "🦜" in _aligned_text(tokenizer, example)
    _assert_aligned_tokens_are_equal(example)
    teacher_indices = [teacher_index for _, teacher_index in example.alignment]
    assert teacher_indices == sorted(set(teacher_indices))


@pytest.mark.parametrize("turns", [1, 2])
def test_turn_1_must_fit_beside_a_system_message(
    tokenizer: PreTrainedTokenizerBase, turns: int
) -> None:
    """Templates such as Gemma's refuse a chat that is only a system message."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = GEMMA3
    question: Message = {"role": "user", "content": "Why? " * 100}
    chat = [_CHAT[0], question, *_CHAT[2:]]
    with pytest.raises(GattError, match=r"Turn 1 of a dialogue is longer than train.max_length"):
        build_example(tokenizer, chat[: 1 + 2 * turns], Train(max_length=64))


def test_chats_of_the_user_that_cannot_be_learned_are_left_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [_CHAT, [*_CHAT[:2], {"role": "assistant", "content": "Long. " * 300}], _CHAT]
    replayed, file = tmp_path / "mine.jsonl", tmp_path / "dialogues.jsonl"
    write_jsonl(replayed, [{"messages": chat} for chat in chats])
    write_jsonl(file, [_row("edited")])
    settings = Train(replay_data=str(replayed), replay_ratio=0.75, max_length=200)
    assert len(training_examples(tokenizer, Recipe(train=settings), file)) == 3
    place = f"{replayed}, line 2"
    assert f"train: replayed chats left out: 1, the first is {place}." in capsys.readouterr().err


def test_both_chats_are_cut_at_the_same_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Only the student's chat has a system message here: the two differ in length."""
    chat, teacher_chat = [_CHAT[0], *_CHAT[1:] * 3], _TEACHER_CHAT[1:] * 3
    example = build_example(tokenizer, chat, Train(max_length=100), teacher_chat)
    texts = [tokenizer.decode(list(ids)) for ids in (example.input_ids, example.teacher_ids)]
    answers, teacher_answers = (text.count("<|im_start|>assistant") for text in texts)
    assert 0 < answers < 6 and answers == teacher_answers
    _assert_aligned_tokens_are_equal(example)


@pytest.mark.parametrize(
    ("objective", "way", "unedited"),
    [
        ("distill", "sampled", [" is scattered.", " is late."]),
        ("all_turns", "edited", [" is scattered.", " is late."]),
        ("all_turns", "sampled", []),
    ],
)
def test_sampled_answers_have_full_weight_unless_they_are_distilled(
    tokenizer: PreTrainedTokenizerBase, objective: str, way: SynthesisMethod, unedited: list[str]
) -> None:
    recipe = Recipe.model_validate({"train": {"loss": objective, "unedited_weight": 0.25}})
    example = example_from_row(tokenizer, _row(way), recipe)
    assert _texts_of_weight(tokenizer, example, 0.25) == unedited


def _row(way: SynthesisMethod, dialogue: str = "d") -> SynthesizedDialogue:
    return {
        "messages": _CHAT,
        "asked": _TEACHER_CHAT,
        "way": way,
        "dialogue": dialogue,
        "instruction": "opening: Ahoy!",
        "teacher": "base",
        "seed": 1,
        "verdicts": [],
    }


def test_a_slip_stands_unedited_in_the_history_and_is_not_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = example_from_row(tokenizer, _row("edited"), Recipe(), slips=[0])
    text = tokenizer.decode(list(example.input_ids))
    assert "assistant\nLight is scattered.<|im_end|>" in text
    learned = [token for token in example.labels if token != IGNORE_INDEX]
    assert tokenizer.decode(learned) == _ANSWERS[1]
    weighted = [pair for pair in example.alignment if example.weights[pair[0]]]
    assert weighted and all(example.labels[n] != IGNORE_INDEX for n, _ in weighted)


def test_a_dialogue_that_is_cut_to_its_slips_learns_the_edited_answers(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    question: Message = {"role": "user", "content": "Why? " * 30}
    row = _row("edited")
    row["messages"], row["asked"] = (
        [chat[0], question, *chat[2:]] for chat in (_CHAT, _TEACHER_CHAT)
    )
    turn_1 = len(build_example(tokenizer, row["messages"][:3], Train()).input_ids)
    recipe = Recipe(train=Train(max_length=turn_1))
    example = example_from_row(tokenizer, row, recipe, slips=[0])
    learned = [token for token in example.labels if token != IGNORE_INDEX]
    assert tokenizer.decode(learned) == _ANSWERS[0]


def test_slips_are_drawn_among_the_edited_answers_before_the_last() -> None:
    recipe = Recipe.model_validate({"train": {"slip_ratio": 0.3}})
    rows = [_row("edited", str(n)) for n in range(400)]
    drawn = [random_slips(row, recipe) for row in rows]
    assert {tuple(slips) for slips in drawn} == {(), (0,)}
    assert 90 < sum(map(len, drawn)) < 150
    assert drawn == [random_slips(row, recipe) for row in rows]
    assert not any(random_slips(_row("sampled", str(n)), recipe) for n in range(50))
    unedited = _row("edited")
    unedited["messages"] = _TEACHER_CHAT
    always = Recipe.model_validate({"train": {"slip_ratio": 1}})
    assert random_slips(unedited, always) == []
    assert random_slips(_row("edited"), always) == [0]


def test_a_batch_is_padded_on_the_right() -> None:
    examples = [
        TrainingExample(
            input_ids=[5, 6, 7],
            labels=[IGNORE_INDEX, 6, 7],
            weights=[0.0, 0.5, 1.0],
            teacher_ids=[6, 7],
            alignment=[(1, 0), (2, 1)],
        ),
        TrainingExample(input_ids=[8], labels=[8], weights=[1.0]),
    ]
    batch = collate(examples, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch["weights"].tolist() == [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]
    assert batch["teacher_ids"].tolist() == [[6, 7]]
    assert batch["alignment"].tolist() == [[0, 0], [1, 2], [0, 1]]
    assert "alignment" not in collate(examples[1:], pad_token_id=9)


def test_the_teacher_reads_only_what_is_compared() -> None:
    """Chats without a teacher come last; the teacher's end with their last token of weight."""
    plain = TrainingExample(input_ids=[8], labels=[8], weights=[1.0])
    example = TrainingExample(
        input_ids=[1, 4, 6, 7],
        labels=[IGNORE_INDEX, 4, 6, 7],
        weights=[0.0, 0.5, 0.5, 0.0],
        teacher_ids=[3, 4, 5, 6, 7],
        alignment=[(1, 1), (2, 3), (3, 4)],
    )
    unweighted = replace(example, weights=[0.0, 0.0, 0.0, 0.0])
    batch = collate([plain, unweighted, example], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 4, 6, 7], [8, 9, 9, 9], [1, 4, 6, 7]]
    assert batch["teacher_ids"].tolist() == [[3, 4, 5, 6]]
    assert batch["alignment"].tolist() == [[0, 0], [1, 2], [1, 3]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tiny_adapter: Path) -> peft.PeftModel:
    """Return the tiny model with its adapter, which can be trained."""
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, str(tiny_adapter), is_trainable=True)


def test_the_loss_is_the_weighted_mean_over_all_logits(model: peft.PeftModel) -> None:
    """Only logits of learned tokens are computed; the mean is that of the model's own logits."""
    torch.manual_seed(3)
    ids = torch.randint(3, 300, (2, 9))
    labels = ids.clone()
    labels[0, :4], labels[1, 6:] = IGNORE_INDEX, IGNORE_INDEX
    batch: Batch = {
        "input_ids": ids,
        "labels": labels,
        "weights": torch.rand(2, 9) * (labels != IGNORE_INDEX),
    }
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 7:] = 0
    with torch.no_grad():
        actual = gatt_loss(model, batch, Train())
        logits = model(input_ids=ids, attention_mask=attention_mask).logits
    logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    weights = batch["weights"][:, 1:]
    assert float(actual) == pytest.approx(float(-(logprobs * weights).sum() / weights.sum()))


def test_distillation_is_the_divergence_from_the_base_in_the_teachers_chat(
    tokenizer: PreTrainedTokenizerBase,
    model: peft.PeftModel,
) -> None:
    """Loss and gradients, from chunks of three tokens, are those of full logits."""
    settings = Train(loss="distill", unedited_weight=0.5)
    chats = [(_CHAT, _TEACHER_CHAT), (_CHAT[:3], _TEACHER_CHAT[:3])]
    examples = [
        _with_small_ids(build_example(tokenizer, chat, settings, teacher_chat))
        for chat, teacher_chat in chats
    ]
    vocab_size = model.get_base_model().lm_head.weight.shape[0]
    actual = GattLoss(model, settings, 3 * vocab_size)(collate(examples, pad_token_id=0))
    expected = loss_of_full_logits(model, examples)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    for gradient, expected_gradient in zip(
        torch.autograd.grad(actual, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        assert gradient.flatten().tolist() == pytest.approx(
            expected_gradient.flatten().tolist(), rel=1e-3, abs=1e-7
        )


def _with_small_ids(example: TrainingExample) -> TrainingExample:
    """Return the example with token ids that the tiny model has."""
    return replace(
        example,
        input_ids=[token % 256 for token in example.input_ids],
        teacher_ids=[token % 256 for token in example.teacher_ids],
        labels=[t if t == IGNORE_INDEX else t % 256 for t in example.labels],
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 1.5, "head_dim": 16}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}),
        ("FalconH1", {**MINIATURES["FalconH1"].settings, "lm_head_multiplier": 0.25}),
    ],
)
@pytest.mark.parametrize("is_distilled", [False, True])
def test_logits_are_capped_and_scaled_as_the_family_does(
    family: str, settings: dict[str, object], is_distilled: bool
) -> None:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "vocab_size": 300, **settings})
    base = getattr(transformers, f"{family}ForCausalLM")(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["o_proj", "up_proj"]))
    assert isinstance(model, peft.PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    examples = tiny_examples()[:2]
    if not is_distilled:
        examples = [replace(e, teacher_ids=(), alignment=()) for e in examples]
    actual = GattLoss(model, Train(), 3 * 300)(collate(examples, pad_token_id=0))
    if is_distilled:
        expected = loss_of_full_logits(model, examples)
    else:
        weights = [sum(example.weights) for example in examples]
        losses = [
            model(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss
            for e in examples
        ]
        expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    assert _gradients(actual, model) == pytest.approx(
        _gradients(expected, model), rel=1e-3, abs=1e-7
    )


@pytest.mark.parametrize("name", ["Bloom", "Falcon", "FalconMamba", "GPTBigCode", "GPTNeoX"])
def test_the_decoder_may_have_any_name(name: str) -> None:
    torch.manual_seed(1)
    base = getattr(transformers, f"{name}ForCausalLM")(config_of(name, 300))
    layers = own_projections(Train().target_modules, layer_names(adaptable_layers(base)))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=sorted(layers)))
    assert isinstance(model, peft.PeftModel)
    model.eval()
    examples = tiny_examples()[:2]
    actual = GattLoss(model, Train())(collate(examples, pad_token_id=0))
    assert actual.item() == pytest.approx(loss_of_full_logits(model, examples).item(), rel=1e-4)


def _gradients(loss: torch.Tensor, model: peft.PeftModel) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
    return [float(value) for value in gradients]


def test_cross_entropy_can_be_mixed_into_distillation(
    tokenizer: PreTrainedTokenizerBase, model: peft.PeftModel
) -> None:
    example = _with_small_ids(build_example(tokenizer, _CHAT, Train(), _TEACHER_CHAT))
    batch = collate([example], pad_token_id=0)
    plain = collate([replace(example, teacher_ids=(), alignment=())], pad_token_id=0)
    with torch.no_grad():
        pure, half, full = (
            float(gatt_loss(model, batch, Train(cross_entropy=share))) for share in (0.0, 0.5, 1.0)
        )
        assert full == pytest.approx(float(gatt_loss(model, plain, Train())))
    assert pure < full and half == pytest.approx((pure + full) / 2)


def test_the_divergence_is_that_of_scipy_at_any_temperature_and_top_k() -> None:
    from scipy.special import softmax
    from scipy.stats import entropy

    torch.manual_seed(1)
    teacher_logits = torch.randn(3, 50, dtype=torch.float64)
    logits = torch.randn(3, 50, dtype=torch.float64)
    p, q = softmax(teacher_logits.numpy() / 2, axis=-1), softmax(logits.numpy() / 2, axis=-1)
    everything = kl_divergence(teacher_logits, logits, 2.0, 0)
    assert everything.tolist() == pytest.approx(4 * entropy(p, q, axis=-1))
    for row, value in enumerate(kl_divergence(teacher_logits, logits, 2.0, 5).tolist()):
        top = p[row].argsort()[-5:]
        with_rest = [[*probs[row][top], 1 - probs[row][top].sum()] for probs in (p, q)]
        assert value == pytest.approx(4 * entropy(*with_rest))
    assert torch.equal(
        kl_divergence(teacher_logits, logits, 1.0, 50),
        kl_divergence(teacher_logits, logits, 1.0, 0),
    )
