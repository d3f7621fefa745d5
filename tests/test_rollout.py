"""Dialogues that are run turn by turn, by a model that is written here."""

from __future__ import annotations

import pytest

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.rollout import ReplyKey, Rollout, Turn, recall_turns, turns_of
from pipeline.records import (
    Completion,
    Constraint,
    Dialogue,
    Instruction,
    RecallQuestion,
    Reply,
    Request,
)

_RECALL = RecallQuestion("name", "What is your name?", "Napoleon")


def _assigned(turns: int = 3, *recall_questions: RecallQuestion) -> AssignedDialogue:
    instruction = Instruction(
        "Say Ahoy!", "Ahoy!", (Constraint("opening", "Ahoy!"),), recall_questions
    )
    users = tuple(f"Question {turn}?" for turn in range(1, turns + 1))
    return AssignedDialogue(dialogue=Dialogue("d", "sea", users), instruction=instruction)


def _request(dialogue: AssignedDialogue, turn: Turn, answers: list[str]) -> Request:
    return Request(messages=dialogue.student_prompt(answers, ""), seed=turn.number, max_tokens=9)


class _Run:
    """Runs a dialogue with `texts` as the completions; has the user messages and the replies."""

    def __init__(
        self,
        dialogue: AssignedDialogue,
        texts: list[str],
        recorded: dict[ReplyKey, Reply] | None = None,
    ) -> None:
        self.replies: list[Reply] = []
        self.users: list[list[str]] = []
        rollout = Rollout(
            arm="tuned",
            max_turns=20,
            make_request=_request,
            record=self.replies.append,
            recorded=recorded or {},
        )
        task = rollout.run(dialogue)
        request = next(task, None)
        for text in texts:
            assert request
            self.users.append([m["content"] for m in request.messages if m["role"] == "user"])
            completion = Completion(text=text, tokens=1, prompt_tokens=1, finish="stop")
            try:
                request = task.send(completion)
            except StopIteration:
                request = None
        assert request is None


def test_attributes_are_asked_for_in_turn_1_in_the_turns_of_the_paper_and_later() -> None:
    assert recall_turns(20) == [1, 2, 4, 6, 20]
    assert recall_turns(5) == [1, 2, 4, 5]
    assert recall_turns(1) == [1]
    assert recall_turns(65) == [1, 2, 4, 6, 20, 40, 60, 65]


def test_the_turns_end_with_the_dialogue_or_at_the_maximum() -> None:
    assert turns_of(_assigned(3), 20) == [Turn(1), Turn(2), Turn(3)]
    assert turns_of(_assigned(3), 2) == [Turn(1), Turn(2)]
    assert turns_of(_assigned(2, _RECALL), 20) == [
        *(Turn(1, _RECALL), Turn(1)),
        *(Turn(2, _RECALL), Turn(2)),
    ]


def test_each_answer_is_checked() -> None:
    run = _Run(_assigned(3), [" Ahoy! Salt is old. ", "Salt is new.", "Ahoy! Salt is old."])
    assert [(r.turn, r.text, r.obeys, r.defect) for r in run.replies] == [
        (1, "Ahoy! Salt is old.", True, ""),
        (2, "Salt is new.", False, ""),
        (3, "Ahoy! Salt is old.", True, "repeat"),
    ]
    assert [r.adherent for r in run.replies] == [True, False, False]


def test_a_recall_question_leaves_no_trace() -> None:
    texts = ["Ahoy! Napoleon.", "Ahoy! One thing.", "I am Napoleon.", "Ahoy! Two things."]
    run = _Run(_assigned(2, _RECALL), texts)
    first = "Question 1?\n\nSay Ahoy!"
    assert run.users == [
        ["What is your name?\n\nSay Ahoy!"],
        [first],
        [first, "What is your name?"],
        [first, "Question 2?"],
    ]
    assert [(r.turn, r.recall_attribute, r.adherent) for r in run.replies] == [
        (1, "name", True),
        (1, "", True),
        (2, "name", True),
        (2, "", True),
    ]
    texts[2] = "I am Josephine."
    assert not _Run(_assigned(2, _RECALL), texts).replies[2].obeys


def test_replies_that_are_recorded_are_not_generated_again() -> None:
    texts = ["Ahoy! One thing.", "Ahoy! Two things.", "Ahoy! Three of them."]
    complete = _Run(_assigned(3), texts)
    recorded = {ReplyKey.of(reply): reply for reply in complete.replies[:2]}
    resumed = _Run(_assigned(3), texts[2:], recorded)
    assert resumed.replies == complete.replies[2:]
    assert resumed.users == complete.users[2:]


def test_a_completion_of_an_equal_request_is_checked_again_and_not_generated() -> None:
    replies: list[Reply] = []
    earlier = Completion(text="Ahoy! Salt is old.", tokens=5, prompt_tokens=9, finish="stop")
    rollout = Rollout(
        arm="tuned",
        max_turns=2,
        make_request=_request,
        record=replies.append,
        request_id=lambda request: f"turn {request.seed}",
        earlier={"turn 1": earlier},
    )
    task = rollout.run(_assigned(2))
    request = next(task)
    assert [m["content"] for m in request.messages][1] == earlier.text
    completion = Completion(text="Salt is new.", tokens=1, prompt_tokens=1, finish="stop")
    with pytest.raises(StopIteration):
        task.send(completion)
    assert [(r.request, r.text, r.obeys, r.tokens) for r in replies] == [
        ("turn 1", earlier.text, True, 5),
        ("turn 2", completion.text, False, 1),
    ]
