"""Attributes that message 1 sets and later questions ask for, as in Table 30 of the paper.

"You are Napoleon and you love tennis." (turn 1); "What is your name?" (turn 6). Evaluation words
both the statement and the questions otherwise than training, and draws values that are held out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.gatt.constraints.content_checks import mentions
from pipeline.gatt.vocabulary.values import fill, without_words
from pipeline.records import Instruction, RecallQuestion


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """How an attribute is set, asked for, and answered; "{v}" is its value.

    `patterns` are those of `vocabulary.fill`. `statements` and `questions` are the wordings of
    training; the others are those of evaluation.
    """

    patterns: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    evaluation_statement: str
    evaluation_questions: tuple[str, ...]


ATTRIBUTES = {
    "name": Attribute(
        patterns=("{first name}", "{first name} {last name}", "{title} {last name}"),
        statements=("your name is {v}", "you are called {v}", "you go by {v}", "I call you {v}"),
        questions=(
            "What are you called?",
            "Who am I talking to?",
            "By the way, how should I call you?",
            "Tell me your name again.",
            "I forgot your name. What was it?",
        ),
        answers=("My name is {v}.", "I am {v}.", "I am called {v}.", "You can call me {v}."),
        evaluation_statement="you are {v}",
        evaluation_questions=(
            "What is your name?",
            "Please tell me your name.",
            "What was your name again?",
            "What name do you go by?",
        ),
    ),
    "hobby": Attribute(
        patterns=("{hobby}",),
        statements=(
            "your hobby is {v}",
            "you are mad about {v}",
            "you spend your free time on {v}",
            "you enjoy {v} most of all",
        ),
        questions=(
            "What do you do in your free time?",
            "Which pastime do you enjoy most?",
            "Remind me of your hobby.",
            "What do you do for fun?",
        ),
        answers=(
            "My hobby is {v}.",
            "I love {v}.",
            "I spend my free time on {v}.",
            "It is {v}, of course.",
        ),
        evaluation_statement="you love {v}",
        evaluation_questions=(
            "What is your favourite hobby?",
            "What do you love to do when you are not working?",
            "Which hobby do you love?",
            "Tell me which activity you love most.",
        ),
    ),
    "town": Attribute(
        patterns=("{town}",),
        statements=("you live in {v}", "your home is {v}", "you come from {v}"),
        questions=(
            "Where do you live?",
            "Which town is your home?",
            "Where are you from, by the way?",
        ),
        answers=("I live in {v}.", "My home is {v}.", "I am from {v}."),
        evaluation_statement="your home town is {v}",
        evaluation_questions=("In which city do you live?", "What is your home town?"),
    ),
    "job": Attribute(
        patterns=("{job}",),
        statements=(
            "you work as a {v}",
            "your job is that of a {v}",
            "by profession you are a {v}",
        ),
        questions=("What is your job?", "What do you do for a living?", "Tell me your profession."),
        answers=("I work as a {v}.", "I am a {v}.", "My job is that of a {v}."),
        evaluation_statement="you earn your living as a {v}",
        evaluation_questions=("What work do you do?", "How do you earn your living?"),
    ),
    "pet": Attribute(
        patterns=("{pet}",),
        statements=("you have a {v}", "your pet is a {v}", "you share your home with a {v}"),
        questions=("Do you have a pet?", "What animal lives with you?", "Which pet is yours?"),
        answers=("I have a {v}.", "My pet is a {v}.", "A {v} lives with me."),
        evaluation_statement="you keep a {v} as a pet",
        evaluation_questions=("What pet do you have?", "Which animal do you keep?"),
    ),
    "food": Attribute(
        patterns=("{food}",),
        statements=("your favorite food is {v}", "you like {v} best", "you eat {v} every day"),
        questions=(
            "What do you like to eat?",
            "Which dish is your favorite?",
            "What could I cook for you?",
        ),
        answers=("I like {v}.", "My favorite food is {v}.", "I would choose {v}."),
        evaluation_statement="you cannot resist {v}",
        evaluation_questions=("What is your favourite food?", "Which food can you not resist?"),
    ),
}
"""Every attribute that is trained, by its name."""
UNSEEN_ATTRIBUTES = {
    "color": Attribute(
        patterns=("{color}",),
        statements=(),
        questions=(),
        answers=(),
        evaluation_statement="your favourite color is {v}",
        evaluation_questions=("Which color do you like best?", "What is your favourite color?"),
    ),
}
"""Attributes that only evaluation asks for."""


_VERB_ENDINGS = ("", "s", "e", "es", "ed", "er", "ers")
"""What a hobby that is a verb may end with in place of "ing"."""


@dataclass(frozen=True, slots=True)
class AskedAttribute:
    """A question of training, and the answer to it."""

    question: str
    answer: str


def training_attributes(
    count: int, rng: random.Random
) -> tuple[Instruction, tuple[AskedAttribute, ...]]:
    """Return an instruction that sets `count` attributes, and a question about each of them."""
    names = rng.sample(list(ATTRIBUTES), count)
    statements, questions, recall = [], [], []
    for name in names:
        attribute = ATTRIBUTES[name]
        value = fill(rng.choice(attribute.patterns), "train", rng)
        statements.append(_filled(rng.choice(attribute.statements), value))
        question = rng.choice(attribute.questions)
        questions.append(AskedAttribute(question, _filled(rng.choice(attribute.answers), value)))
        recall.append(RecallQuestion(name, question, value))
    return _instruction(statements, recall), tuple(questions)


def evaluation_attributes(
    names: Sequence[str], seed: str, wording: int = 0, avoided: Collection[str] = ()
) -> Instruction:
    """Return an instruction that sets the attributes `names`, with the questions about them.

    `wording` counts through the wordings of the questions, and begins again after the last. No
    value has one of the words `avoided`, if `without_words` finds such.
    """
    rng = random.Random(seed)
    statements, recall = [], []
    for name in names:
        attribute = (ATTRIBUTES | UNSEEN_ATTRIBUTES)[name]
        value = without_words(partial(_draw, attribute, rng), avoided)
        statements.append(_filled(attribute.evaluation_statement, value))
        questions = attribute.evaluation_questions
        recall.append(RecallQuestion(name, questions[wording % len(questions)], value))
    return _instruction(statements, recall)


def _draw(attribute: Attribute, rng: random.Random) -> str:
    return fill(rng.choice(attribute.patterns), "evaluation", rng)


def is_recalled(value: str, answer: str) -> bool:
    """Return whether an answer mentions the value of an attribute, as it is or as a verb.

    Example for "swimming": "I love to swim." / "I love water."
    """
    if mentions(value, answer):
        return True
    stem = value.removesuffix("ing")
    if stem == value:
        return False
    stems = {stem, re.sub(r"(.)\1$", r"\1", stem)}
    return any(mentions(f"{s}{ending}", answer) for s in stems for ending in _VERB_ENDINGS)


def _instruction(statements: Sequence[str], recall: Sequence[RecallQuestion]) -> Instruction:
    """Return the statements as one sentence: "Your name is Ada, you live in Rome and ..."."""
    *first, last = statements
    text = f"{', '.join(first)} and {last}." if first else f"{last}."
    short = f"{', '.join(question.value for question in recall)}."
    return Instruction(text[0].upper() + text[1:], short, (), tuple(recall))


def _filled(wording: str, value: str) -> str:
    """Return the wording with the value: "a {v}" becomes "an actor"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", wording.format(v=value))
