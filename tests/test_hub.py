"""What `--push` and `gatt push` upload to the Hub, which a fake server on this machine plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import yaml
from support.cli import Gatt
from support.servers import FakeHub, in_thread

from pipeline.errors import GattError
from pipeline.files import sha256, write_json, write_text
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.report.cards import PublishedModel, model_card
from pipeline.report.facts import chat_options
from pipeline.run import _settings, outdated_stages
from pipeline.run_dir import RunDir
from pipeline.stages import evaluate, push
from pipeline.stages.push import _without_home


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with in_thread(FakeHub()) as server:
        yield server


def test_dialogues_are_pushed_with_their_card(hub: FakeHub, tmp_path: Path, gatt: Gatt) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "dialogues.jsonl").write_text('{"messages": []}\n')
    (folder / "README.md").write_text("# card\n")
    (folder / "acceptance.json").write_text('{"rows": [], "too_common": 0}')
    environment = hub.environment(tmp_path / "hf")
    done = gatt("synthesize", "--run", tmp_path, "--stats", "--push", "me/mine", env=environment)
    assert done.returncode == 0, done.stderr
    assert "Uploaded (private, if it is new): " in done.stdout
    assert "/datasets/me/mine" in done.stdout
    assert hub.committed("dataset") == {
        "README.md": b"# card\n",
        "dialogues.jsonl": b'{"messages": []}\n',
    }


def test_a_refused_push_is_one_line(tmp_path: Path, gatt: Gatt) -> None:
    folder = tmp_path / "synthesize"
    folder.mkdir()
    (folder / "acceptance.json").write_text('{"rows": [], "too_common": 0}')
    for name in ("README.md", "dialogues.jsonl"):
        (folder / name).write_text("x")
    done = gatt(
        "synthesize",
        "--run",
        tmp_path,
        "--stats",
        "--push",
        "me/mine",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("gatt: Cannot upload to me/mine")


_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SENTENCE = (
    "In turns 16 to 20, the tuned model keeps its instruction in 68% of the answers, "
    "the base in 0%."
)
_LOCAL = "/home/me/.cache/gatt/0123-hf"


def _finished_run(path: Path, **about: str) -> RunDir:
    """Write a small run as its stages leave it; `about` are further keys of the exported GGUF."""
    run_dir = RunDir(path)
    run_dir.save_recipe(
        Recipe.model_validate(
            {
                "dialogues": {"source": "me/chats"},
                "instructions": {"pool": [{"kind": "opening", "value": "Hark!"}]},
                "evaluate": {"turns": 8},
            }
        )
    )
    tuned = run_dir.tuned("Q8_0")
    tuned.parent.mkdir()
    writer = gguf.GGUFWriter(tuned, "llama")
    for key, value in {"tokenizer.chat_template": "{{ messages }}", **about}.items():
        writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((256, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_text(tuned.with_name("adapter.gguf"), "GGUF")
    write_text(tuned.with_name("Modelfile"), f"FROM ./{tuned.name}\n")
    write_json(
        run_dir.adapter / "adapter_config.json", {"base_model_name_or_path": _LOCAL, "r": 32}
    )
    write_text(run_dir.adapter / "README.md", f"---\nbase_model: {_LOCAL}\n---\n")
    write_text(run_dir.adapter / "adapter_model.safetensors", "weights")
    write_text(
        run_dir.report / "report.md",
        f"**{_SENTENCE}**\n\n| turn | base | tuned |\n|---|---|---|\n| 1 | 0.00 | 0.71 |\n",
    )
    write_text(run_dir.report / "adherence.svg", "<svg/>")
    write_json(
        run_dir.report / "report.json",
        {
            "headline": _SENTENCE,
            "warning": "A shortened run: 24 dialogues of 8 turns.",
            "facts": {"teacher": "smollm2-135m Q4_0"},
        },
    )
    write_json(run_dir.exported, {"formats": {}})
    settings = _settings(evaluate, load_recipe(run_dir.recipe))
    run_dir.claim("evaluate", settings, [tuned])
    write_json(run_dir.scores, {"turns": 8})
    run_dir.finish("evaluate", settings, [tuned], 480.0)
    reported = [run_dir.scores, run_dir.exported]
    run_dir.claim("report", "", reported)
    run_dir.finish("report", "", reported, 1.0)
    return run_dir


def _push(run_dir: RunDir, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "push", "me/mine", "--run", str(run_dir.path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _refused(run_dir: RunDir) -> str:
    with pytest.raises(GattError) as refused:
        push.run(load_recipe(run_dir.path / "recipe.toml"), run_dir, "me/mine")
    return str(refused.value)


def test_a_run_is_pushed_with_its_card(hub: FakeHub, tmp_path: Path) -> None:
    run_dir = _finished_run(
        tmp_path / "run",
        **{
            "general.license": "apache-2.0",
            "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        },
    )
    done = _push(run_dir, hub.environment(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    sent = hub.committed("model")
    card = sent.pop("README.md").decode()
    assert done.stdout == f"Uploaded (private, if it is new): {hub.url}/me/mine\n"
    assert sorted(sent) == [
        "Modelfile",
        "adapter.gguf",
        "adapter/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adherence.svg",
        "recipe.toml",
        "tuned-Q8_0.gguf",
    ]
    assert sent["tuned-Q8_0.gguf"] == run_dir.tuned("Q8_0").read_bytes()
    assert sent["recipe.toml"] == (run_dir.path / "recipe.toml").read_bytes()
    assert not any(_LOCAL.encode() in content for content in sent.values())
    assert json.loads(sent["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": _BASE,
        "r": 32,
    }
    assert all(f"| {name} |" in card for name in sent)
    assert "| tuned-Q8_0.gguf | 0.3 | the tuned model, Q8_0 |" in card
    assert card.count(_SENTENCE) == 1
    for part in (
        "](adherence.svg)",
        '- Begin every answer with "Hark!".',
        "A shortened run: 24 dialogues of 8 turns.",
        "| 1 | 0.00 | 0.71 |",
        "gatt chat tuned-Q8_0.gguf --system ",
        "\nollama create mine -f Modelfile && ollama run mine\n",
        "\nllama-server --model tuned-Q8_0.gguf\n",
        "| teacher | smollm2-135m Q4_0 |",
        "| time of evaluate | 480 s |",
    ):
        assert part in card
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["ghost-attention", "gguf", "lora"],
        "datasets": ["me/chats"],
    }


def test_the_metadata_has_only_what_is_known() -> None:
    model = PublishedModel(
        repository="me/mine",
        model_file="tuned-Q8_0.gguf",
        sizes={"tuned-Q8_0.gguf": 10**9},
        headline="It keeps.",
        facts={"base model": "b"},
    )
    card = model_card(Recipe(), model)
    assert yaml.safe_load(card.split("---\n")[1]).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "| tuned-Q8_0.gguf | 1000.0 |" in card
    assert "ollama" not in card
    assert "shortened" not in card


def test_the_card_of_a_baked_prompt_names_the_prompt_only() -> None:
    model = PublishedModel(
        repository="me/ziggy",
        model_file="t.gguf",
        sizes={"t.gguf": 1},
        headline="It is Ziggy.",
        facts={"base model": "b"},
    )
    recipe = Recipe.model_validate({"instructions": {"bake": "cards/ziggy.png"}})
    card = model_card(recipe, model)
    assert "to answer as with a system prompt that it is not given." in card
    listed = card.split("## Trained instructions\n\n")[1].split("\n\n## Files")[0]
    assert listed == "- The system prompt ziggy.png, which the model is not given."
    assert "Give no system prompt.\n\n```\ngatt chat t.gguf\n" in card
    assert "first message" not in card
    once = "Give the instruction once: in your first message, or in the system message.\n\n```\n"
    assert once in model_card(Recipe(), model)


def test_the_chat_command_gives_the_first_instruction_as_training_does(tmp_path: Path) -> None:
    def options(**instructions: object) -> list[str]:
        settings = {"dialogues": {"system": "Be kind."}, "instructions": instructions}
        return chat_options(Recipe.model_validate(settings))

    kind, first = {"kind": "bold"}, {"text": "Be blunt."}
    system = {"text": "You are Ziggy.", "place": "system"}
    assert options(pool=[first, kind]) == ["--system", "Be kind.", "--instruction", "Be blunt."]
    assert options(pool=[system, kind]) == ["--system", "Be kind. You are Ziggy."]
    assert options(pool=[]) == ["--system", "Be kind."]
    file = tmp_path / "mine.md"
    file.write_text("You are Ada.")
    assert options(pool=[kind], file=str(file)) == ["--system", "Be kind. You are Ada."]
    file.unlink()
    assert options(pool=[first], file=str(file))[-1] == "Be blunt."
    assert options(pool=[first], bake="prompt.txt") == []


def test_a_license_that_the_hub_does_not_know_is_quoted() -> None:
    odd = 'My: "own" license # 1'
    model = PublishedModel(
        repository="me/mine",
        model_file="t.gguf",
        sizes={"t.gguf": 1},
        headline="It keeps.",
        facts={"base model": "b"},
        base_id="o/b",
        license=odd,
    )
    metadata = yaml.safe_load(model_card(Recipe(), model).split("---\n")[1])
    assert metadata["license"] == "other"
    assert (metadata["license_name"], metadata["base_model"]) == (odd, "o/b")


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("report/report.md", "report"),
        ("report/adherence.svg", "report"),
        ("export/tuned-Q8_0.gguf", "export"),
    ],
)
def test_an_unfinished_run_is_refused_with_the_command(
    tmp_path: Path, missing: str, stage: str
) -> None:
    run_dir = _finished_run(tmp_path)
    (tmp_path / missing).unlink()
    assert _refused(run_dir) == (
        f"{tmp_path / missing} is missing; `gatt push` uploads it. Run `gatt {stage} "
        f"{tmp_path / 'recipe.toml'} --run {tmp_path}` first."
    )


def test_a_run_without_checks_is_pushed_without_a_chart(hub: FakeHub, tmp_path: Path) -> None:
    run_dir = _finished_run(tmp_path / "run")
    report = run_dir.report / "report.json"
    write_json(report, {**json.loads(report.read_text()), "has_chart": False})
    (run_dir.report / "adherence.svg").unlink()
    done = _push(run_dir, hub.environment(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    sent = hub.committed("model")
    assert "adherence.svg" not in sent
    assert f"**{_SENTENCE}**\n\nA shortened run" in sent["README.md"].decode()
    assert "adherence.svg" not in sent["README.md"].decode()


def test_the_report_of_an_earlier_export_is_refused(tmp_path: Path) -> None:
    run_dir = _finished_run(tmp_path)
    before = sha256(run_dir.tuned("Q8_0"))
    with run_dir.tuned("Q8_0").open("ab") as file:
        file.write(b"\0")
    assert sha256(run_dir.tuned("Q8_0")) != before
    assert _refused(run_dir).startswith(
        f"The report is about an earlier export than {run_dir.tuned('Q8_0')}"
    )


def test_a_recipe_is_uploaded_without_the_name_of_the_home() -> None:
    text = f'source = "{Path.home()}/chats.jsonl"\nmodel = "org/model"\n'
    assert _without_home(text) == 'source = "~/chats.jsonl"\nmodel = "org/model"\n'


def test_a_report_about_another_adapter_is_refused(tmp_path: Path) -> None:
    run_dir = _finished_run(tmp_path)
    text = run_dir.recipe.read_text(encoding="utf-8")
    write_text(run_dir.recipe, text.replace('adapter = ""', 'adapter = "rival.gguf"'))
    assert _refused(run_dir).startswith("The report is about the adapter rival.gguf, not about")


@pytest.mark.parametrize("stage", ["evaluate", "report"])
def test_a_run_whose_last_evaluation_or_report_was_interrupted_is_refused(
    tmp_path: Path, stage: str
) -> None:
    run_dir = _finished_run(tmp_path)
    (tmp_path / stage / "manifest.json").unlink()
    assert _refused(run_dir) == (
        f"`gatt {stage}` has not finished in {tmp_path}; `gatt push` uploads what it writes. Run "
        f"`gatt run {tmp_path / 'recipe.toml'} --run {tmp_path}` first."
    )


def test_a_recipe_that_was_edited_after_training_is_refused(tmp_path: Path) -> None:
    run_dir = _finished_run(tmp_path)
    run_dir.claim("train", "as it was trained", [])
    run_dir.finish("train", "as it was trained", [], 60.0)
    run_dir.outdated = outdated_stages(load_recipe(run_dir.recipe), run_dir)
    assert _refused(run_dir).startswith(f"{run_dir.recipe} has changed since `gatt train`, and")


@pytest.mark.parametrize("name", ["evaluate/scores.json", "export/export.json"])
def test_the_report_of_earlier_figures_is_refused(tmp_path: Path, name: str) -> None:
    run_dir = _finished_run(tmp_path)
    write_json(tmp_path / name, {"of": "a later run of the stage"})
    assert _refused(run_dir).startswith(f"The report was not made of the present {tmp_path / name}")


def test_a_model_that_the_hub_refuses_is_one_line(tmp_path: Path) -> None:
    done = _push(_finished_run(tmp_path), {**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.stderr.strip().splitlines()[-1].startswith("gatt: Cannot upload to me/mine")
    assert "owner/name of a model of yours" in done.stderr
