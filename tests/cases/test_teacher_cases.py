"""Teachers, judges and rivals behind a server: thoughts, refused parameters, proxies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import Completed, call_gatt
from support.teachers import WRAPS, Body, Teacher, obeying_answer_to, serve

from pipeline.evaluation.arms import Arm
from pipeline.evaluation.judge import judge
from pipeline.evaluation.replies import generate_replies
from pipeline.files import read_jsonl
from pipeline.gatt.assignment import AssignedDialogue, read_split
from pipeline.gatt.generated_values import list_values
from pipeline.gatt.instructions import render_instruction
from pipeline.inference.openai_client import OpenAIClient
from pipeline.recipe_file import load_recipe
from pipeline.records import Completion, Constraint, Dialogue, Message, Reply, Request, Task

_SETTINGS = (
    "dialogues.train=6",
    "dialogues.turns=2",
    "dialogues.validation=1",
    "evaluate.dialogues=2",
    "evaluate.turns=2",
    "evaluate.suite_dialogues=0",
    # What `obeying_answer_to` can follow.
    'instructions.vocabulary_kinds=["opening", "closing"]',
    'instructions.pool=[{kind = "opening", value = "Ahoy!"}]',
    "instructions.recall_ratio=0",
    "synthesize.max_tokens=40",
    "synthesize.edited_ratio=1",
)


def _gatt(stage: str, run: Path, *settings: str) -> Completed:
    flags = [word for setting in (*_SETTINGS, *settings) for word in ("--set", setting)]
    return call_gatt(stage, "--run", run, *flags)


@pytest.fixture(scope="module")
def assigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with assigned instructions."""
    run = tmp_path_factory.mktemp("assigned")
    done = _gatt("instructions", run)
    assert done.returncode == 0, done.stderr
    return run


class _Result:
    """What `gatt synthesize` did with a teacher."""

    def __init__(self, assigned: Path, folder: Path, teacher: Teacher, *settings: str) -> None:
        self.run = folder / "run"
        shutil.copytree(assigned, self.run)
        with serve(teacher) as server:
            self.done = _gatt(
                "synthesize", self.run, f"synthesize.teacher='{server.url}'", *settings
            )
            self.bodies, self.url = server.bodies, server.url
        assert "Traceback" not in self.done.stderr

    @property
    def chats(self) -> list[list[Message]]:
        """The chats to train on."""
        rows = read_jsonl(self.run / "synthesize" / "dialogues.jsonl")
        return [row["messages"] for _, row in rows]

    @property
    def candidates(self) -> list[dict[str, Any]]:
        """The log of candidates."""
        return [row for _, row in read_jsonl(self.run / "synthesize" / "answers.jsonl")]


@pytest.fixture(scope="module")
def plain(assigned: Path, tmp_path_factory: pytest.TempPathFactory) -> _Result:
    """Return the result with a teacher that does not think."""
    result = _Result(assigned, tmp_path_factory.mktemp("plain"), Teacher())
    assert result.done.returncode == 0, result.done.stderr
    assert len(result.chats) == 6
    assert not any("thoughts" in row for row in result.candidates)
    assert {body["max_tokens"] for body in result.bodies[1:]} == {40}
    return result


@pytest.mark.parametrize("wrap", sorted(set(WRAPS) - {"plain"}))
def test_thoughts_are_no_answers(wrap: str, assigned: Path, plain: _Result, tmp_path: Path) -> None:
    result = _Result(assigned, tmp_path, Teacher(wrap))
    assert result.done.returncode == 0, result.done.stderr
    assert result.chats == plain.chats
    assert all("Okay, the user asks" in row["thoughts"] for row in result.candidates)
    # Thoughts are not sent back, and do not spend the answer's tokens.
    sent = json.dumps([body["messages"] for body in result.bodies])
    assert "Okay, the user" not in sent and "think" not in sent
    assert {body["max_tokens"] for body in result.bodies[1:]} == {40 + 2048}
    assert result.done.stderr.count("thinks before it answers") == 1


@pytest.mark.parametrize("wrap", ["think", "reasoning_content", "channels", "magistral"])
def test_an_answer_without_an_end_of_thought_is_unfinished(
    wrap: str, assigned: Path, tmp_path: Path
) -> None:
    always = Teacher(wrap, cut_at=50)
    result = _Result(assigned, tmp_path, always, "synthesize.max_thought_tokens=500")
    assert result.done.returncode == 1
    message = result.done.stderr.strip().splitlines()[-1]
    assert "cut within their thoughts. Raise synthesize.max_thought_tokens (500)" in message
    assert {row["verdict"] for row in result.candidates} == {"unfinished thoughts"}
    assert all(row["raw"] == row["text"] == "" for row in result.candidates)
    assert all("Okay, the user" in row["thoughts"] for row in result.candidates)


def test_thoughts_that_are_cut_get_more_tokens(
    assigned: Path, plain: _Result, tmp_path: Path
) -> None:
    result = _Result(assigned, tmp_path, Teacher("think", cut_at=50))
    assert result.chats == plain.chats


def test_a_user_who_writes_the_tags_is_not_touched(assigned: Path, tmp_path: Path) -> None:
    chat: tuple[Message, ...] = ({"role": "user", "content": "Why <think> and </think>?"},)
    texts: list[Completion] = []

    def task() -> Task:
        texts.append((yield Request(messages=chat, seed=1, max_tokens=40)))

    with serve(Teacher(answer=lambda m: f"You wrote `{m[0]['content']}`")) as server:
        OpenAIClient(server.url).run([task()])
    assert server.bodies[0]["messages"] == list(chat)
    assert texts[0].text == "You wrote `Why <think> and </think>?`"
    assert texts[0].thoughts == ""


def _openai(message: str, param: str | None = None, status: int = 400) -> tuple[int, object]:
    return status, {"error": {"message": message, "param": param, "code": "unsupported_parameter"}}


def _extra(name: str) -> tuple[int, object]:
    error = {
        "type": "extra_forbidden",
        "loc": ["body", name],
        "msg": "Extra inputs are not permitted",
    }
    return 422, {"detail": [error]}


_REFUSALS: dict[str, tuple[Callable[[Body], tuple[int, object] | None], dict[str, object], str]] = {
    "o1": (
        lambda body: (
            _openai(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
                "max_tokens",
            )
            if "max_tokens" in body
            else None
        ),
        {"max_completion_tokens": 40},
        "takes max_completion_tokens in place of max_tokens",
    ),
    "another limit": (
        lambda body: (
            _openai("Unknown field max_tokens. Did you mean max_new_tokens?")
            if "max_tokens" in body
            else None
        ),
        {"max_new_tokens": 40},
        "takes max_new_tokens in place of max_tokens",
    ),
    "o1 temperature": (
        lambda body: (
            _openai(
                "Unsupported value: 'temperature' does not support 0.8 with this model. Only the "
                "default (1) value is supported.",
                "temperature",
            )
            if "temperature" in body
            else None
        ),
        {"temperature": None},
        "refuses temperature: requests go without it",
    ),
    "Mistral": (
        lambda body: _extra("seed") if "seed" in body else None,
        {"seed": None},
        "refuses seed: requests go without it",
    ),
    "seeds of 31 bits": (
        lambda body: _openai("seed must be less than 2147483648") if body["seed"] >> 31 else None,
        {},
        "takes seeds below 2^31 only",
    ),
    "stream options": (
        lambda body: _extra("stream_options") if "stream_options" in body else None,
        {"stream_options": None, "stream": True},
        "refuses stream_options",
    ),
    "stream": (
        lambda body: (
            _openai("Streaming is unsupported: 'stream' is not supported.")
            if "stream" in body
            else None
        ),
        {"stream": None},
        "refuses stream:",
    ),
    "several": (
        lambda body: next(
            (_extra(n) for n in ("seed", "temperature", "stream_options") if n in body), None
        ),
        {"seed": None, "temperature": None, "stream_options": None},
        "refuses temperature",
    ),
}
"""What a server refuses, what is sent in the end (None: nothing), and the line in the log."""


@pytest.mark.parametrize("name", _REFUSALS)
def test_a_refused_parameter_is_left_out_or_renamed(
    name: str, assigned: Path, plain: _Result, tmp_path: Path
) -> None:
    refusal, sent, line = _REFUSALS[name]
    result = _Result(assigned, tmp_path, Teacher(refusal=refusal))
    assert result.done.returncode == 0, result.done.stderr
    assert result.chats == plain.chats
    assert result.done.stderr.count(line) == 1
    for parameter, value in sent.items():
        assert result.bodies[-1].get(parameter) == value
    manifest = json.loads((result.run / "synthesize" / "manifest.json").read_text())
    changed = (
        {"max_tokens"} if "limit" in name or name == "o1" else {k for k in sent if sent[k] is None}
    )
    assert set(manifest["notes"].get("first", {})) == changed


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (
            _openai("'messages[0].role' does not support 'system'.", "messages[0].role"),
            "does not support 'system'",
        ),
        (_openai("temperature must be at most 0.5", "temperature"), "must be at most 0.5"),
        (_openai("max_tokens must be at most 20"), "max_tokens must be at most 20"),
    ],
)
def test_a_refusal_of_something_essential_is_one_line(
    refusal: tuple[int, object], message: str, assigned: Path, tmp_path: Path
) -> None:
    result = _Result(assigned, tmp_path, Teacher(refusal=lambda _: refusal))
    assert result.done.returncode == 1
    assert message in result.done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_no_proxy_stands_before_this_machine(
    variable: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        variable, "socks5://127.0.0.1:9" if variable == "ALL_PROXY" else "http://127.0.0.1:9"
    )
    texts: list[str] = []

    def task() -> Task:
        chat: tuple[Message, ...] = ({"role": "user", "content": "Why?"},)
        texts.append((yield Request(messages=chat, seed=1, max_tokens=40)).text)

    with serve(Teacher(answer=lambda _: "Yes.")) as server:
        OpenAIClient(server.url.replace("127.0.0.1", host)).run([task()])
    assert texts == ["Yes."]


@pytest.mark.parametrize("wrap", ["plain", "think", "no opening tag", "reasoning"])
def test_a_rival_that_obeys_scores_the_same_with_its_thoughts(
    wrap: str, assigned: Path, tmp_path: Path
) -> None:
    dialogues = read_split(assigned / "instructions" / "assignments.json", "evaluation")
    recipe = load_recipe(None, ("evaluate.turns=2",))
    with serve(Teacher(wrap, answer=obeying_answer_to)) as server:
        arm = Arm(name="rival", server=f"{server.url}#fake")
        replies = generate_replies([arm], {"evaluation": dialogues}, recipe, [tmp_path / "replies"])
    assert len(replies) == 4
    assert all(reply.adherent for reply in replies)
    assert all(("Okay, the user" in reply.thoughts) == (wrap != "plain") for reply in replies)
    assert not any("Okay, the user" in reply.text for reply in replies)
    logged = [row for _, row in read_jsonl(tmp_path / "replies")]
    assert sorted(row.get("thoughts", "") for row in logged) == sorted(r.thoughts for r in replies)


def test_a_rival_that_is_cut_in_its_thoughts_has_not_answered(
    assigned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogues = read_split(assigned / "instructions" / "assignments.json", "evaluation")
    recipe = load_recipe(None, ("evaluate.turns=2", "evaluate.max_thought_tokens=100"))
    with serve(Teacher("think", answer=obeying_answer_to, cut_at=40)) as server:
        arm = Arm(name="rival", server=f"{server.url}#fake")
        replies = generate_replies([arm], {"evaluation": dialogues}, recipe, [tmp_path / "replies"])
    assert {(r.text, r.finish, r.defect, r.adherent) for r in replies} == {
        ("", "thinking", "unfinished thoughts", False)
    }
    assert "rival was cut within its thoughts in 4 replies" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "verdicts"), [("Yes.", {True}), ("No.", {False}), ("", {None})])
def test_a_verdict_stands_in_the_judges_answer_not_in_its_thoughts(
    answer: str, verdicts: set[bool | None], tmp_path: Path
) -> None:
    """The thoughts of this judge begin with "Okay" and contain yes and no."""
    dialogue = AssignedDialogue(
        dialogue=Dialogue("d", "", ("Why?",)),
        instruction=render_instruction((Constraint("style", "talk like a pirate"),)),
    )
    reply = Reply(
        arm="base", dialogue="d", turn=1, text="Arr.", prompt_tokens=1, tokens=1, finish="stop",
        obeys=False, defect="",
    )  # fmt: skip
    with serve(Teacher("think", answer=lambda _: answer)) as server:
        judged, _ = judge(server.url, [reply], [dialogue], tmp_path / "judged")
    (row,) = (row for _, row in read_jsonl(tmp_path / "judged"))
    assert {row["verdict"]} == verdicts
    assert "Okay, the user" in row["thoughts"]
    assert judged[0].obeys == (answer == "Yes.")


def test_listed_values_come_from_the_answer(tmp_path: Path) -> None:
    def write(messages: list[Message]) -> str:
        question = messages[-1]["content"]
        return "Paris\nAda Lovelace" if "each line" in question else "Ada Lovelace, it is."

    with serve(Teacher("think", answer=write)) as server:
        listed = list_values("persona", OpenAIClient(server.url, probe=True).run, seed=1)
    assert listed.known == ["Paris", "Ada Lovelace"]  # all of its lists have both
    assert listed.candidates == 2
