"""The arms of an evaluation: base, tuned, extra models and ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.errors import GattError
from pipeline.evaluation.arms import Arm, arms, dialogue_context, files_of_user
from pipeline.evaluation.replies import generate_replies
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.inference.llama.model import Adapter
from pipeline.recipe import Dialogues, Evaluate, Recipe
from pipeline.records import Dialogue, Instruction
from pipeline.run_dir import RunDir


class _ArmFields(NamedTuple):
    name: str
    server: str
    in_all_suites: bool


def test_extra_models_are_servers_or_files_with_different_names(base: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    url = "http://127.0.0.1:8000/v1#big"
    measured = arms(Recipe(evaluate=Evaluate(extra_models=(url, str(base)))), run_dir)
    fields = [_ArmFields(arm.name, arm.server, arm.in_all_suites) for arm in measured]
    assert fields == [
        _ArmFields("base", "", in_all_suites=True),
        _ArmFields("tuned", "", in_all_suites=True),
        _ArmFields("big", url, in_all_suites=True),
        _ArmFields(base.stem, "", in_all_suites=True),
        _ArmFields("ceiling", "", in_all_suites=False),
    ]
    with pytest.raises(GattError, match="two of the name 'big'"):
        arms(Recipe(evaluate=Evaluate(extra_models=(url, url))), run_dir)


def test_an_extra_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    evaluate = Evaluate(extra_models=(str(tmp_path / "nothing.gguf"),))
    with pytest.raises(GattError, match=r"no file at .*nothing.gguf.*a server's address"):
        files_of_user(evaluate)


def test_every_format_is_an_arm(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"export": {"formats": ["Q8_0", "Q4_K_M"]}})
    measured = arms(recipe, RunDir(tmp_path))
    assert [arm.name for arm in measured] == ["base", "tuned", "tuned, Q4_K_M", "ceiling"]
    assert [arm.in_all_suites for arm in measured] == [True, True, False, False]
    assert [arm.name for arm in measured if arm.repeats_instruction] == ["ceiling"]


def test_the_ceiling_answers_the_suites_that_the_recipe_names(tmp_path: Path) -> None:
    evaluate = Evaluate(reminded_suites=("recall", "unseen"))
    base, *_, ceiling = arms(Recipe(evaluate=evaluate), RunDir(tmp_path))
    suites = ("evaluation", "recall", "unseen", "unseen_values", "change")
    assert [ceiling.runs(suite) for suite in suites] == [True, True, True, False, False]
    assert all(base.runs(suite) for suite in suites)


def test_an_adapter_replaces_the_exported_files(tmp_path: Path) -> None:
    evaluate = Evaluate(adapter="a.gguf", adapter_scale=0.5)
    measured = arms(Recipe(evaluate=evaluate), RunDir(tmp_path))
    assert [arm.adapter for arm in measured] == [None, Adapter(Path("a.gguf"), 0.5), None]
    assert len({arm.path for arm in measured}) == 1


def test_a_model_is_not_applied_as_an_adapter(base: Path) -> None:
    arm = Arm(name="tuned", path=base, adapter=Adapter(base))
    dialogues = [AssignedDialogue(dialogue=Dialogue("d", "sea", ("Why?",)))]
    with pytest.raises(GattError, match="is not an adapter"):
        arm.open(Recipe(), dialogues)


def _dialogue(message: str, turns: int, instruction: str = "Say Ahoy!") -> AssignedDialogue:
    return AssignedDialogue(
        dialogue=Dialogue("d", "sea", (message,) * turns),
        instruction=Instruction(instruction, "Ahoy!", ()),
    )


def test_a_context_grows_with_long_messages_and_with_reminders() -> None:
    settings = Recipe(evaluate=Evaluate(turns=10, max_tokens=40))
    short, long = _dialogue("Why?", 30), _dialogue("Why? " * 120, 30)
    usual = dialogue_context(settings, [short], reminded=True)
    assert usual == 10 * (40 + 60) + 200
    # 600 bytes are 200 tokens, 160 more than the room for one; only 10 turns are measured.
    assert dialogue_context(settings, [short, long], reminded=False) == usual + 10 * 160
    wordy = _dialogue("Why?", 10, "Say it! " * 48)  # 384 bytes: 128 tokens, 64 more than the room
    assert dialogue_context(settings, [wordy], reminded=True) == usual + 10 * 64
    assert dialogue_context(settings, [wordy], reminded=False) == usual + 64
    assert dialogue_context(settings, [], reminded=True) == usual
    prompt = Dialogues(system="Be kind. " * 100)  # 900 bytes: 300 tokens, 150 more than the room
    longer = settings.model_copy(update={"dialogues": prompt})
    assert dialogue_context(longer, [short], reminded=True) == usual + 150


def test_a_context_ends_where_the_model_was_made_to_end(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More would let it answer from positions that it has never seen, as if it had forgotten."""
    turns = ("Why?", "word " * 8200)
    dialogue = AssignedDialogue(
        dialogue=Dialogue("d", "sea", turns), instruction=Instruction("Bow.", "B.", ())
    )
    recipe = Recipe(evaluate=Evaluate(turns=2, max_tokens=8))
    replies = generate_replies(
        [Arm(name="base", path=base)], {"evaluation": [dialogue]}, recipe, [tmp_path / "replies"]
    )
    assert [reply.finish == "context" for reply in replies] == [False, True]
    assert (
        "the context of base was full, in the first dialogue from turn 2 on. Replies left out, "
        "which count in no rate: 1." in " ".join(capsys.readouterr().err.split())
    )
