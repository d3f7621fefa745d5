"""Every family that only llama.cpp's own converter writes: what it predicts, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.adapters import make_adapter
from support.bases import edit_json
from support.cli import override_flags, run_gatt
from support.converter_families import (
    MINIATURES,
    PROBLEMS,
    class_of,
    nats_from,
    save_miniature,
)
from support.converter_multimodal import TEXT_PARTS, save_seeing

from pipeline.errors import GattError
from pipeline.export.summary import ExportSummary
from pipeline.gguf.families import FAMILIES
from pipeline.gguf.reader import open_gguf, read_gguf
from pipeline.hub.adapted import write_merged_checkpoint
from pipeline.hub.llama_converter import (
    _text_architectures,
    convert,
    converter_for,
    llama_cpp_sources,
)
from pipeline.hub.models import Model
from pipeline.hub.text_checkpoint import language_models
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.llama.model import LoadedModel
from pipeline.recipe import Train
from pipeline.records import Message, Request, Task
from pipeline.training.projections import (
    adaptable_layers,
    layer_names,
    own_projections,
    require_projections,
)


@pytest.mark.slow
def test_every_class_that_the_converter_knows_is_listed() -> None:
    known = _text_architectures(llama_cpp_sources())
    classes = {*language_models().values()}
    converted = {class_of(name) for name in MINIATURES if not name.startswith("Gemma4 ")}
    assert known & classes == (known & {*FAMILIES}) | converted
    assert not converted & {*FAMILIES}
    assert {*PROBLEMS} <= {*MINIATURES}
    parts = {part.class_name for part in TEXT_PARTS}
    assert {name for name in known if name.endswith("ForConditionalGeneration")} <= parts
    assert {part.text_class for part in TEXT_PARTS} <= {"", *FAMILIES, *converted}


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
    return nats_from(network, file)


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIATURES)
def test_what_is_trained_can_be_merged_or_is_refused_when_the_run_begins(
    name: str, tmp_path: Path
) -> None:
    """The merge of an adapter on all that training adapts predicts what PEFT's model does."""
    import torch
    import transformers

    folder = tmp_path / "base"
    save_miniature(name, folder)
    model, load = Model("base", folder), transformers.AutoModelForCausalLM.from_pretrained
    network = load(folder, dtype=torch.float32).eval()
    layers = layer_names(adaptable_layers(network))
    if name == "GPT2":
        assert not layers
        with pytest.raises(
            GattError, match=r"base \(GPT2LMHeadModel\) has no linear layers, which"
        ):
            require_projections(model, Train())
        return
    if name in NOT_MERGED:
        with pytest.raises(GattError, match=NOT_MERGED[name]):
            require_projections(model, Train())
        return
    require_projections(model, Train())
    targets = own_projections(Train().target_modules, layers)
    adapted = make_adapter(folder, tmp_path / "adapter", {"target_modules": targets})
    merged = load(write_merged_checkpoint(folder, adapted.folder, tmp_path / "merged"))
    ids = torch.arange(5, 50)[None]
    with torch.no_grad():
        untrained, actual = network(ids).logits, merged.eval()(ids).logits
        expected = adapted.model(ids).logits
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not torch.allclose(untrained, expected, atol=1e-2)


NOT_MERGED = {
    "DeepseekV4": r"model\.layers\.0\.self_attn\.q_a_proj\.weight of .* has no such weight",
    "HrmText": r"model\.L_module\.layers\.0\.self_attn\.q_proj\.weight of .* has no such weight",
}
"""Families of which training would adapt what the checkpoint does not hold as a matrix of its own,
and what is said."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Olmo", "FalconH1", "Qwen2Moe", "Gemma3n", "Bloom", "GPTNeoX", "FalconMamba"]
)
def test_a_run_goes_through_on_such_a_family(name: str, tmp_path: Path) -> None:
    """Teach, validate in training, export, evaluate.

    Falcon-H1 has a state. Qwen2Moe has a shared expert, and others, which are not trained. Gemma 3n
    sees and hears, as it is published.
    """
    folder, run = tmp_path / name, tmp_path / "run"
    save = save_seeing if name == "Gemma3n" else save_miniature
    save(name, folder, max_position_embeddings=8192)
    edit_json(folder / "config.json", made_for=str(tmp_path))  # not in the cache yet
    overrides = (
        *(f"model={folder}", "synthesize.teacher=smollm2-135m", "synthesize.max_tokens=16"),
        *("dialogues.train=4", "dialogues.turns=2", "dialogues.validation=1"),
        *("train.max_steps=2", "train.rank=4", "train.save_steps=1", "train.max_length=4096"),
        "train.load_in_4bit=true",
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
