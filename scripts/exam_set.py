"""Write the set of `gatt exam`: user turns, instructions and events, as pipeline/exam/exam_1.json.

It was run once. The file is frozen: results that others have measured refer to its hash. A change
of the set, or of a check, is a new version in a new file.

    .venv/bin/python scripts/exam_set.py FILE
"""

from __future__ import annotations

import random
import sys
from itertools import chain, cycle, islice
from pathlib import Path
from typing import NamedTuple

from pipeline.data.dialogues import load_dialogues
from pipeline.data.splits import split_dialogues
from pipeline.files import write_json
from pipeline.gatt.constraints.registry import compatible, kind_of, shows_obedience
from pipeline.gatt.instructions import render_instruction
from pipeline.recipe import Recipe
from pipeline.records import Constraint

_TURNS = 50
_CONVERSATIONS = 24
_EVENT_TURNS = (6, 7, 8, 9)
_SYSTEM = "You are a helpful assistant. Keep every answer short: one or two sentences."
_LONG_SYSTEM = "You are a helpful assistant. Explain in detail, in two or three paragraphs."
_STOPS = (
    "Thank you, you need not do that any more.",
    "Please drop that and write as you normally would.",
    "I have changed my mind: answer in your usual way again.",
    "You may stop following that request now.",
)

C = Constraint
_FIRST = (
    *(C("opening", "Let me see:"), C("language", "French"), C("closing", "That is my view.")),
    *(C("uppercase"), C("signature", "Robin"), C("emoji"), C("address", "dear colleague")),
    *(C("hobby", "spelunking"), C("hashtag", "smallsteps"), C("lowercase"), C("question")),
    *(C("bold"), C("persona", "Marco Polo"), C("bullet_list"), C("postscript")),
    *(C("language", "Spanish"), C("exclamations"), C("quotes"), C("heading", "Short Answer")),
    *(C("opening", "To be fair,"), C("closing", "Mind how you go."), C("numbered_list")),
    *(C("title_case"), C("language", "German")),
)
_EIGHT = (
    *(C("opening", "In my book:"), C("language", "Italian"), C("closing", "More tomorrow.")),
    *(C("uppercase"), C("signature", "The night shift"), C("emoji"), C("address", "neighbor")),
    C("bullet_list"),
)
_THREE = (
    (C("opening", "Here is mine:"), C("address", "old pal"), C("emoji")),
    (C("closing", "Ask me anything."), C("bold"), C("hobby", "astronomy")),
    (C("language", "French"), C("emoji"), C("signature", "Camille")),
    (C("uppercase"), C("hashtag", "ONESTEPMORE"), C("opening", "NOTE WELL:")),
    (C("persona", "Amelia Earhart"), C("question"), C("bold")),
    (C("lowercase"), C("closing", "that is all."), C("address", "partner")),
    (C("heading", "My Advice"), C("emoji"), C("hashtag", "lookahead")),
    (C("quotes"), C("hobby", "stargazing"), C("emoji")),
)
_REPLACED = (
    (C("opening", "Let me think:"), C("opening", "My answer is:")),
    (C("language", "French"), C("language", "Spanish")),
    (C("closing", "As always."), C("closing", "See you soon.")),
    (C("uppercase"), C("lowercase")),
    (C("signature", "Kim"), C("signature", "Alex")),
    (C("bullet_list"), C("numbered_list")),
    (C("address", "my dear"), C("address", "boss")),
    (C("quotes"), C("brackets", "parentheses")),
)
_ADDED = (
    (C("opening", "Let me see:"), C("closing", "That is my view.")),
    (C("language", "German"), C("emoji")),
    (C("signature", "Robin"), C("bold")),
    (C("uppercase"), C("hashtag", "ONESTEPMORE")),
    (C("address", "dear colleague"), C("emoji")),
    (C("hobby", "spelunking"), C("question")),
    (C("bold"), C("opening", "To be fair,")),
    (C("persona", "Marco Polo"), C("closing", "Mind how you go.")),
)
_CONTRADICTIONS = {
    2: "From now on: Write every answer in French.",
    4: "From now on: Write every answer in lowercase letters only.",
    6: "From now on: Never use emoji in your answers.",
    8: "From now on: Give every answer as a numbered list.",
}
"""What contradicts every other one of `_EIGHT`, by its number from 1."""
_ADDED_TEXTS = {
    "closing": 'Also end every answer with "{v}"',
    "emoji": "Also use at least one emoji in every answer.",
    "bold": "Also put at least one word of every answer in bold, **like this**.",
    "hashtag": "Also end every answer with the hashtag #{v}.",
    "question": "Also end every answer with a question.",
    "opening": 'Also begin every answer with "{v}"',
}


class Attributes(NamedTuple):
    """What message 1 says about the assistant: name, hobby, and a third attribute."""

    name: str
    hobby: str
    third: str
    statement: str
    question: str
    value: str


_ATTRIBUTES = (
    Attributes(
        name="Ingeborg",
        hobby="lacrosse",
        third="town",
        statement="you live in Trondheim",
        question="Where do you live?",
        value="Trondheim",
    ),
    Attributes(
        name="Anselm",
        hobby="falconry",
        third="pet",
        statement="you have a chinchilla",
        question="Which pet is yours?",
        value="chinchilla",
    ),
    Attributes(
        name="Yuki",
        hobby="bookbinding",
        third="job",
        statement="you work as a notary",
        question="What is your job?",
        value="notary",
    ),
    Attributes(
        name="Zeynep",
        hobby="croquet",
        third="food",
        statement="you love moussaka",
        question="What do you like to eat?",
        value="moussaka",
    ),
    Attributes(
        name="Balthazar",
        hobby="fencing",
        third="town",
        statement="you live in Ghent",
        question="Where do you live?",
        value="Ghent",
    ),
    Attributes(
        name="Nadia",
        hobby="glassblowing",
        third="color",
        statement="your favorite color is maroon",
        question="Which color do you like best?",
        value="maroon",
    ),
    Attributes(
        name="Oscar",
        hobby="topiary",
        third="job",
        statement="you work as a surveyor",
        question="What is your job?",
        value="surveyor",
    ),
    Attributes(
        name="Femi",
        hobby="marquetry",
        third="pet",
        statement="you have a tortoise",
        question="Which pet is yours?",
        value="tortoise",
    ),
)


def main() -> None:
    """Write the set to the file that the command line names."""
    tasks = [
        *_one("first", _FIRST),
        *_one("system", _EIGHT, in_system=True),
        *(_task("three", n, _told(three)) for n, three in enumerate(_THREE)),
        *(_replaced(n, *pair) for n, pair in enumerate(_REPLACED)),
        *(_added(n, *pair) for n, pair in enumerate(_ADDED)),
        *(_stopped(n, constraint) for n, constraint in enumerate(_EIGHT)),
        *(_contradicted(n, constraint) for n, constraint in enumerate(_EIGHT)),
        *_one("long", _EIGHT),
        *(_recalled(n, attributes) for n, attributes in enumerate(_ATTRIBUTES)),
    ]
    exam = {
        "name": "gatt-exam",
        "version": 1,
        "system": _SYSTEM,
        "long_system": _LONG_SYSTEM,
        "conversations": _conversations(),
        "tasks": tasks,
    }
    write_json(Path(sys.argv[1]), exam)


def _conversations() -> dict[str, list[str]]:
    """Return the user turns of each conversation: a built-in dialogue, and others after it.

    The first ones are those that the default recipe holds out from training.
    """
    held_out = split_dialogues(Recipe()).evaluation
    others = [d for d in load_dialogues("seed") if d not in held_out]
    random.Random("exam 1").shuffle(others)
    following = cycle(others)
    conversations = {}
    for n, dialogue in enumerate(held_out[:_CONVERSATIONS], 1):
        turns = chain(dialogue.turns, chain.from_iterable(d.turns for d in following))
        conversations[f"c{n:02}"] = list(islice(turns, _TURNS))
    return conversations


def _told(constraints: tuple[Constraint, ...]) -> dict[str, object]:
    for n, first in enumerate(constraints):
        assert shows_obedience(first) and kind_of(first)
        assert all(compatible(first, second) for second in constraints[n + 1 :]), constraints
    text = render_instruction(constraints).text
    listed = [{"kind": c.kind, "value": c.value} for c in constraints]
    return {"text": text, "short": text, "constraints": listed}


def _task(regime: str, n: int, instruction: dict[str, object], **more: object) -> dict[str, object]:
    name, conversation = f"{regime}-{n + 1:02}", f"c{n % _CONVERSATIONS + 1:02}"
    return {
        "id": name,
        "regime": regime,
        "conversation": conversation,
        "instruction": instruction,
        **more,
    }


def _one(
    regime: str, constraints: tuple[Constraint, ...], **more: object
) -> list[dict[str, object]]:
    return [_task(regime, n, _told((c,)), **more) for n, c in enumerate(constraints)]


def _event(n: int) -> int:
    return _EVENT_TURNS[n % len(_EVENT_TURNS)]


def _replaced(n: int, old: Constraint, new: Constraint) -> dict[str, object]:
    following = _told((new,))
    text = str(following["text"]).partition(" and nothing else;")[0].rstrip(".")
    following |= {"text": f"{text} instead."}
    return _task("replaced", n, _told((old,)), next_instruction=following, change_turn=_event(n))


def _added(n: int, old: Constraint, new: Constraint) -> dict[str, object]:
    text = _ADDED_TEXTS[new.kind].format(v=new.value)
    following = {**_told((old, new)), "text": text}
    return _task("added", n, _told((old,)), next_instruction=following, change_turn=_event(n))


def _stopped(n: int, constraint: Constraint) -> dict[str, object]:
    following = {"text": "", "short": _STOPS[n % len(_STOPS)], "constraints": []}
    return _task(
        "stopped", n, _told((constraint,)), next_instruction=following, change_turn=_event(n)
    )


def _contradicted(n: int, constraint: Constraint) -> dict[str, object]:
    words = _CONTRADICTIONS.get(n + 1) or _STOPS[n // 2 % len(_STOPS)]
    return _task(
        "contradicted",
        n,
        _told((constraint,)),
        in_system=True,
        contradiction=words,
        change_turn=_event(n),
    )


def _recalled(n: int, attributes: Attributes) -> dict[str, object]:
    text = f"You are {attributes.name}, you enjoy {attributes.hobby} and {attributes.statement}."
    questions = [
        {"attribute": "name", "question": "What is your name?", "value": attributes.name},
        {"attribute": "hobby", "question": "What do you enjoy doing?", "value": attributes.hobby},
        {
            "attribute": attributes.third,
            "question": attributes.question,
            "value": attributes.value,
        },
    ]
    instruction: dict[str, object] = {
        "text": text,
        "short": text,
        "constraints": [],
        "recall_questions": questions,
    }
    return _task("attributes", n, instruction)


if __name__ == "__main__":
    main()
