"""Every family that only llama.cpp's own converter writes: what it predicts, and whole runs."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest
from support.bases import edit_json
from support.cli import override_flags, run_gatt
from support.converter_families import MINIATURES, PROBLEMS, class_of, save_miniature

from pipeline.errors import GattError
from pipeline.export.summary import ExportSummary
from pipeline.export.verify import load_and_predict
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.llama_converter import (
    _text_architectures,
    _trainable_classes,
    convert,
    converter_for,
    llama_cpp_sources,
)
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import LoadedModel
from pipeline.inference.logits import mean_kl
from pipeline.records import Message, Request, Task

NOT_CONVERTED = {
    **dict.fromkeys(
        (
            "Gemma3ForConditionalGeneration",
            "Gemma3nForConditionalGeneration",
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
        ),
        "multimodal: only its text part could be used (tests/test_families.py has those that are)",
    ),
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "a draft model: it reads the hidden states of another one",
    ),
}
"""Language models of transformers that the converter knows and no test converts, and why."""


@pytest.mark.slow
def test_every_language_model_that_the_converter_knows_is_listed() -> None:
    known = _text_architectures(llama_cpp_sources()) & _trainable_classes()
    converted = {class_of(name) for name in MINIATURES}
    assert known == (known & {*FAMILIES}) | converted | {*NOT_CONVERTED}
    assert not converted & {*FAMILIES} and not {*NOT_CONVERTED} & {*FAMILIES}
    assert {*PROBLEMS} <= {*MINIATURES}


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_llama_cpp_predicts_what_transformers_does(name: str, tmp_path: Path) -> None:
    """What does not pass must fail just as `PROBLEMS` tells: another cause would be ours."""
    problem = PROBLEMS.get(name)
    try:
        nats = _distance(name, tmp_path)
    except GattError as error:
        if not problem or not problem.message or problem.message not in str(error):
            raise
    else:
        assert nats == pytest.approx(problem.nats if problem else 0.0, rel=0.5, abs=1e-3)
        assert not problem or problem.nats > 1e-3
    if problem:
        pytest.xfail(problem.reason)


def _distance(name: str, tmp_path: Path) -> float:
    """Return how far llama.cpp is from transformers on a miniature in F16, in nats a token."""
    import torch
    import transformers

    folder, file = tmp_path / "base", tmp_path / "base.gguf"
    save_miniature(name, folder)
    script = converter_for(folder)
    assert script == llama_cpp_sources() / "convert_hf_to_gguf.py"
    convert(script, folder, file, "F16")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(5, 300, (1, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(ids).logits[0].numpy()
    actual = load_and_predict(file, (), [ids[0].tolist()]).logits.values
    pairs = zip(expected[:, None], actual[:, None], strict=True)
    distances = sorted(itertools.starmap(mean_kl, pairs))
    # At a token or two the choice of an expert is too close to be the same.
    with_experts = getattr(network.config, "num_experts_per_tok", 0)
    return statistics.fmean(distances[: -2 if with_experts else None])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Olmo", "FalconH1", "Qwen2Moe"])
def test_a_run_goes_through_on_such_a_family(name: str, tmp_path: Path) -> None:
    """Teach, validate and roll out in training, export, evaluate.

    Falcon-H1 has a state. Qwen2Moe has a shared expert, and others, which are not trained.
    """
    folder, run = tmp_path / name, tmp_path / "run"
    save_miniature(name, folder, max_position_embeddings=8192)
    edit_json(folder / "config.json", made_for=str(tmp_path))  # not in the cache yet
    overrides = (
        *(f"model={folder}", "synthesize.teacher=smollm2-135m", "synthesize.max_tokens=16"),
        *("dialogues.train=4", "dialogues.turns=2", "dialogues.validation=1"),
        *("train.max_steps=2", "train.rank=4", "train.save_steps=1", "train.max_length=4096"),
        *("train.rollouts=own", "train.rollout_steps=1", "train.load_in_4bit=true"),
        'export.formats=["F16", "Q4_K_M"]',
        *("evaluate.dialogues=2", "evaluate.turns=2", "evaluate.max_tokens=12"),
        *("evaluate.attention=false", "evaluate.suite_dialogues=1"),
    )
    done = run_gatt("run", "--run", run, *override_flags(overrides))
    assert done.returncode == 0, done.stderr
    assert f"{name}: converted by llama.cpp's own converter, once." in done.stderr
    assert "merged into fp16; nf4 is not tried" in done.stderr
    summary = ExportSummary.from_json((run / "export" / "export.json").read_text())
    # Trained in 4 bits, merged into 16.
    kl, kl_adapter = summary.formats["F16"].kl_trained, summary.kl_adapter
    assert kl is not None and kl < 1
    # llama.cpp's script cannot write an adapter of Falcon-H1's `in_proj`.
    has_adapter = name != "FalconH1"
    assert (kl_adapter is not None and kl_adapter < 1) == has_adapter
    assert (run / "export" / "adapter.gguf").exists() == has_adapter
    assert ("no adapter.gguf" in done.stderr) != has_adapter
    assert summary.imatrix_tokens > 100
    about = read_gguf(run / "export" / "tuned-F16.gguf")
    assert about.field("general.finetune") == "GAtt"
    assert about.field("general.name") == name
    arms = {json.loads(line)["arm"] for line in (run / "evaluate" / "replies.jsonl").open()}
    assert {"base", "tuned", "tuned, Q4_K_M", "ceiling"} <= arms
    trained = json.loads((run / "train" / "adapter" / "adapter_config.json").read_text())
    assert not trained["target_parameters"]
    steps = [json.loads(line) for line in (run / "train" / "validation.jsonl").open()]
    assert [row["step"] for row in steps] == [1, 2]


@pytest.mark.slow
def test_a_state_has_no_tokens_of_other_rows(tmp_path: Path) -> None:
    """Padding and draft tokens cannot be removed from it, nor a part of a prompt."""
    save_miniature("FalconH1", tmp_path / "base", max_position_embeddings=2048)
    script, file = converter_for(tmp_path / "base"), tmp_path / "base.gguf"
    assert script
    convert(script, tmp_path / "base", file, "F16")
    model = LoadedModel(open_gguf(file))
    answers: list[tuple[Request, str]] = []

    def dialogue(number: int) -> Task:
        messages: list[Message] = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"Why {number} {turn}, a b a b a b?"})
            request = Request(
                messages=tuple(messages), seed=1, max_tokens=20 + number, temperature=0.0
            )
            completion = yield request
            answers.append((request, completion.text))
            messages.append({"role": "assistant", "content": completion.text})

    with BatchEngine(model, 4, 1024) as engine:
        engine.run(map(dialogue, range(6)))
    assert model.has_state and len(answers) == 18
    for request, text in answers:
        with BatchEngine(model, 1, 1024) as engine:
            assert engine.complete(request).text == text
    model.close()
