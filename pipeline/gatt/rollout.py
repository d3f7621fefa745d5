"""Run dialogues turn by turn against a model and check each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import obeys
from pipeline.gatt.quality import find_defect
from pipeline.gatt.vocabulary.attributes import is_recalled
from pipeline.records import Completion, RecallQuestion, Reply, Request, Task

RECALL_TURNS = (2, 4, 6, 20)
"""Turns in which the paper asks for attributes (Table 30)."""
_LATER_RECALL = 20
"""Beyond these turns, attributes are asked for in every turn that this number divides."""


class ReplyKey(NamedTuple):
    """What identifies a reply; `recall_attribute` is "" for the dialogue's own messages."""

    arm: str
    dialogue: str
    turn: int
    recall_attribute: str

    @classmethod
    def of(cls, reply: Reply) -> ReplyKey:
        """Return the key of `reply`."""
        return cls(reply.arm, reply.dialogue, reply.turn, reply.recall_attribute)


class Turn(NamedTuple):
    """A user message to answer: that of turn `number` (from 1), or a `recall` question instead."""

    number: int
    recall: RecallQuestion | None = None

    @property
    def recall_attribute(self) -> str:
        """Return the attribute that is asked for, or ""."""
        return self.recall.attribute if self.recall else ""


MakeRequest = Callable[[AssignedDialogue, Turn, list[str]], Request]
"""Makes the request for a turn of a dialogue with the answers so far.

The dialogue has the recall question in place of the turn's own message.
"""


def recall_turns(turns: int) -> list[int]:
    """Return the turns in which attributes are asked for: those of the paper, and later ones.

    In turn 1, where the question stands next to what it asks for, they show what a model knows at
    all. The last turn is one of them.
    """
    later = range(_LATER_RECALL, turns, _LATER_RECALL)
    return sorted({1, turns, *later} | {turn for turn in RECALL_TURNS if turn <= turns})


def turns_of(dialogue: AssignedDialogue, max_turns: int) -> list[Turn]:
    """Return all turns in order; recall questions come before the message that they replace."""
    last = min(max_turns, len(dialogue.dialogue.turns))
    recall = recall_turns(last) if dialogue.recall_questions else []
    turns: list[Turn] = []
    for number in range(1, last + 1):
        if number in recall:
            turns += [Turn(number, question) for question in dialogue.recall_questions]
        turns.append(Turn(number))
    return turns


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """How the dialogues of one arm are run.

    `record` receives each new reply. Replies that `recorded` has are not generated again; `record`
    may add to it. Nor are the completions that `earlier` has by the `request_id` of their requests:
    these are checked and recorded as new replies. An id of "" is that of no other request.
    """

    arm: str
    max_turns: int
    make_request: MakeRequest
    record: Callable[[Reply], None]
    recorded: Mapping[ReplyKey, Reply] = field(default_factory=dict)
    request_id: Callable[[Request], str] = lambda _: ""
    earlier: Mapping[str, Completion] = field(default_factory=dict)

    def run(self, dialogue: AssignedDialogue) -> Task:
        """Generate and check every reply of `dialogue`.

        A recall question leaves no trace: what follows is asked as if it had not been.
        """
        answers: list[str] = []
        for turn in turns_of(dialogue, self.max_turns):
            key = ReplyKey(self.arm, dialogue.dialogue.id, turn.number, turn.recall_attribute)
            reply = self.recorded.get(key)
            if reply is None:
                branch = dialogue
                if turn.recall:
                    branch = dialogue.with_question(turn.number, turn.recall.question)
                request = self.make_request(branch, turn, answers)
                request_id = self.request_id(request)
                completion = self.earlier.get(request_id) or (yield request)
                reply = _checked(key, completion, dialogue, turn, answers)
                reply = replace(reply, request=request_id)
                self.record(reply)
            if not turn.recall:
                answers.append(reply.text)


def _checked(
    key: ReplyKey,
    completion: Completion,
    dialogue: AssignedDialogue,
    turn: Turn,
    answers: list[str],
) -> Reply:
    """Return the reply of `turn` with its checks; `answers` are those to the turns before.

    An answer to a recall question obeys if it mentions the value (`is_recalled`).
    """
    text = completion.text.strip()
    is_obeyed: bool | None = None
    if turn.recall:
        is_obeyed, defect = is_recalled(turn.recall.value, text), find_defect(text, ())
    else:
        if constraints := dialogue.constraints(turn.number - 1):
            is_obeyed = obeys(constraints, text, dialogue.student_prompt(answers, ""))
        earlier = [] if dialogue.is_fixed(turn.number - 1, text) else answers
        defect = find_defect(text, earlier, dialogue.required_words)
    if completion.finish == "thinking":
        is_obeyed, defect = is_obeyed and False, "unfinished thoughts"
    return Reply(
        arm=key.arm,
        dialogue=key.dialogue,
        turn=key.turn,
        text=text,
        prompt_tokens=completion.prompt_tokens,
        tokens=completion.tokens,
        finish=completion.finish,
        obeys=is_obeyed,
        defect=defect,
        recall_attribute=key.recall_attribute,
        thoughts=completion.thoughts,
    )
