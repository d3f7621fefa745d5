"""The open vocabulary: values bind only if those of evaluation are new."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from pipeline.gatt.constraints.registry import KINDS, kind_of
from pipeline.gatt.text import words
from pipeline.gatt.vocabulary.attributes import (
    ATTRIBUTES,
    UNSEEN_ATTRIBUTES,
    evaluation_attributes,
    is_recalled,
    training_attributes,
)
from pipeline.gatt.vocabulary.values import VocabularySplit, draw_value, fill
from pipeline.recipe import Instructions, VocabularyKind
from pipeline.records import Constraint

DRAWS = 500
VOCABULARY_KINDS = get_args(VocabularyKind)


def _values(kind: str, split: VocabularySplit) -> set[str]:
    rng = random.Random(kind)
    return {draw_value(kind, split, rng) for _ in range(DRAWS)}


def test_values_of_evaluation_share_no_word_with_those_of_training() -> None:
    def words_of(split: VocabularySplit) -> set[str]:
        values = (value for kind in VOCABULARY_KINDS for value in _values(kind, split))
        return {word for value in values for word in words(value)}

    assert words_of("train").isdisjoint(words_of("evaluation"))


@pytest.mark.parametrize("kind", VOCABULARY_KINDS)
def test_there_are_many_values_and_an_edited_answer_obeys_each(kind: str) -> None:
    for values in (_values(kind, "train"), _values(kind, "evaluation")):
        assert len(values) > 30
        for value in values:
            constraint = Constraint(kind, value)
            edit = kind_of(constraint).edit
            assert edit and kind_of(constraint).check(value, edit(value, "It is a river, I think."))


def test_every_kind_of_the_vocabulary_is_trained_by_default() -> None:
    assert set(Instructions().vocabulary_kinds) == set(VOCABULARY_KINDS) <= set(KINDS)


def test_a_placeholder_with_a_capital_gives_a_capital() -> None:
    assert fill("{Noun}", "train", random.Random(1)).istitle()
    assert fill("{noun}", "train", random.Random(1)).islower()


def test_questions_and_values_of_evaluation_are_not_trained() -> None:
    trained = [training_attributes(3, random.Random(seed)) for seed in range(300)]
    questions = {q.question for instruction, _ in trained for q in instruction.recall_questions}
    values = {q.value for instruction, _ in trained for q in instruction.recall_questions}
    for name, attribute in (ATTRIBUTES | UNSEEN_ATTRIBUTES).items():
        wordings = set()
        for seed in range(20):
            (recall,) = evaluation_attributes([name], str(seed), seed).recall_questions
            assert recall.question not in questions
            assert recall.value not in values
            wordings.add(recall.question)
        assert wordings == set(attribute.evaluation_questions)


def test_an_answer_of_training_names_the_value_of_its_question() -> None:
    instruction, answers = training_attributes(3, random.Random(5))
    assert len(answers) == 3
    for recall, row in zip(instruction.recall_questions, answers, strict=True):
        assert recall.question == row.question
        assert recall.value in row.answer and recall.value in instruction.text


def test_articles_agree_with_the_value() -> None:
    texts = [
        text
        for seed in range(200)
        for instruction, answers in [training_attributes(3, random.Random(seed))]
        for text in (instruction.text, *(row.answer for row in answers))
    ]
    assert any(" an " in text for text in texts)
    assert not any(f" a {vowel}" in text for text in texts for vowel in "aeiou")


@pytest.mark.parametrize(
    ("value", "answer", "recalled"),
    [
        ("climbing", "Duke loves to climb.", True),
        ("swimming", "I swim every day.", True),
        ("skating", "She skates, of course.", True),
        ("baking", "I am a baker.", True),
        ("chess", "CHESS!", True),
        ("Duke Kowalski", "My name is Duke.", False),
        ("diving", "I divide my time.", False),
        ("skating", "I like ice.", False),
        ("swimming", "", False),
        ("golf", "I love gardening.", False),
    ],
)
def test_a_hobby_may_be_recalled_as_a_verb(value: str, answer: str, recalled: bool) -> None:
    assert is_recalled(value, answer) is recalled
