"""The method without a model: ghosting, assignment, generated values, quality of answers."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cli import TINY_RECIPE, Completed, call_gatt, override_flags

from pipeline.data.dialogues import load_dialogues
from pipeline.data.splits import DialogueSplits, split_dialogues
from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.evaluation.rates import adherence, wilson
from pipeline.files import write_text
from pipeline.gatt.assign import ConstraintPool, Ratios, assign_evaluation, assign_training, stop
from pipeline.gatt.assignment import AssignedDialogue, read_split, read_splits, write_splits
from pipeline.gatt.constraints.registry import KINDS, compatible, obeys
from pipeline.gatt.generated_values import (
    LISTS,
    ListedValues,
    distinct_items,
    is_known,
    list_values,
    mask_item,
    parse_items,
)
from pipeline.gatt.ghost import augment, ghost, loss_turns
from pipeline.gatt.instructions import render_instruction
from pipeline.gatt.quality import find_defect, is_in_loop, is_on_topic, up_to_loop
from pipeline.gatt.text import first_sentences, has_sentences, split_sentences
from pipeline.recipe import Recipe
from pipeline.records import (
    Completion,
    Constraint,
    Dialogue,
    FinishReason,
    Message,
    Reply,
    Request,
    Task,
)
from pipeline.run_dir import RunDir

EVERY_CONSTRAINT = [
    Constraint(name, value) for name, kind in KINDS.items() for value in kind.values
]
BEGIN = render_instruction((Constraint("opening", "Ahoy!"),))
BE_SHORT = render_instruction((Constraint("max_words", "12"),))
RATIOS = Ratios(
    plain=0.2,
    recall=0.2,
    combine=0.5,
    short=0.5,
    system=0.3,
    contradict=0.5,
    change=0.2,
    stop=0.2,
    edited=0.5,
)


def _contents(messages: tuple[Message, ...]) -> list[str]:
    return [message["content"] for message in messages]


def test_augment_repeats_the_instruction_and_ghost_states_it_once() -> None:
    users, answers, instructions = ["one?", "two?", "three?"], ["a", "b"], ["Be kind."] * 3
    assert _contents(augment(users, answers, instructions, "sys")) == [
        *("sys", "one?\n\nBe kind.", "a", "two?\n\nBe kind.", "b", "three?\n\nBe kind."),
    ]
    assert _contents(ghost(users, answers, instructions, "")) == [
        *("one?\n\nBe kind.", "a", "two?", "b", "three?"),
    ]


def test_ghost_ends_with_the_last_answer_if_no_turn_is_left() -> None:
    messages = ghost(["one?", "two?"], ["a", "b"], ["", ""], "")
    assert [(m["role"], m["content"]) for m in messages] == [
        *(("user", "one?"), ("assistant", "a"), ("user", "two?"), ("assistant", "b")),
    ]


def test_a_changed_instruction_stands_where_it_changes() -> None:
    assigned = AssignedDialogue(
        dialogue=Dialogue("d", "", ("one?", "two?", "three?")),
        instruction=BEGIN,
        method="sampled",
        shortened=True,
        next_instruction=BE_SHORT,
        change_turn=1,
    )
    assert _contents(assigned.student_prompt(["a", "b"], "")) == [
        'one?\n\nOpening: "Ahoy!".',
        "a",
        "two?\n\nFrom now on: At most 12 words.",
        "b",
        "three?",
    ]
    assert _contents(assigned.teacher_prompt(["a", "b"], "")) == [
        f"one?\n\n{BEGIN.text}",
        "a",
        f"two?\n\n{BE_SHORT.text}",
        "b",
        f"three?\n\n{BE_SHORT.text}",
    ]
    kinds = [assigned.constraints(turn)[0].kind for turn in range(3)]
    assert kinds == ["opening", "max_words", "max_words"]
    assert assigned.name == "opening: Ahoy!, then max_words: 12"
    assert assigned.required_words == "Ahoy! 12"


def test_an_instruction_in_the_system_message_stands_nowhere_else() -> None:
    assigned = AssignedDialogue(
        dialogue=Dialogue("d", "", ("one?", "two?")),
        instruction=BEGIN,
        method="edited",
        in_system=True,
    )
    assert _contents(assigned.student_prompt(["a"], "Be brief.")) == [
        'Be brief. Begin every answer with "Ahoy!".',
        *("one?", "a", "two?"),
    ]
    assert _contents(assigned.teacher_prompt(["a"], "Be brief.")) == [
        *("Be brief.", "one?", "a", "two?"),
    ]


def test_loss_turns() -> None:
    assert list(loss_turns(3, "last_turn")) == [2]
    assert list(loss_turns(3, "all_turns")) == [0, 1, 2]


def test_assignments_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    dialogues = load_dialogues("seed")[:40]
    splits = {
        "train": assign_training(dialogues, ConstraintPool(EVERY_CONSTRAINT), RATIOS, seed=1),
        "evaluation": assign_evaluation(dialogues, EVERY_CONSTRAINT),
    }
    file = tmp_path / "assignments.json"
    write_splits(file, splits)
    assert {name: read_split(file, name) for name in splits} == splits


def test_assignments_of_another_version_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "assignments.json"
    file.write_text('{"instructions": [], "train": [{"dialogue": {"id": "d"}, "way": "plain"}]}')
    with pytest.raises(GattError, match="Run `gatt instructions` again"):
        read_split(file, "train")


def test_equal_seeds_give_equal_assignments() -> None:
    dialogues = load_dialogues("seed")
    kinds = ("uppercase", "bold", "hobby")
    pool = ConstraintPool([c for c in EVERY_CONSTRAINT if c.kind in kinds], ("opening", "closing"))
    assigned = assign_training(dialogues, pool, RATIOS, seed=3)
    assert assigned == assign_training(dialogues, pool, RATIOS, seed=3)
    assert assigned != assign_training(dialogues, pool, RATIOS, seed=4)
    assert {a.method for a in assigned} == {"plain", "edited", "sampled"}
    changing = [a for a in assigned if a.next_instruction]
    assert {bool(a.constraints(20)) for a in changing} == {True, False}  # changed and ended
    assert all(0 < a.change_turn < 22 and not a.in_system for a in changing)
    contradicted = [a for a in assigned if a.contradiction]
    assert contradicted and all(a.in_system for a in contradicted)
    combined = [a.constraints(0) for a in assigned if len(a.constraints(0)) > 1]
    assert {len(constraints) for constraints in combined} == {2, 3}
    assert all(
        compatible(first, second)
        for constraints in combined
        for first, second in itertools.combinations(constraints, 2)
    )


@pytest.mark.parametrize(("ratio", "drawn"), [(0.0, 0), (0.5, 68), (0.75, 102), (1.0, 136)])
def test_the_share_of_values_from_the_vocabulary(ratio: float, drawn: int) -> None:
    pool = ConstraintPool([Constraint("uppercase")], ("opening", "closing"), (), ratio)
    ratios = replace(RATIOS, plain=0, recall=0, combine=0)
    assigned = assign_training(load_dialogues("seed")[:136], pool, ratios, seed=1)
    kinds = Counter(a.constraints(0)[0].kind for a in assigned)
    assert kinds["opening"] == kinds["closing"] == drawn / 2
    assert kinds["uppercase"] == 136 - drawn


def test_training_asks_for_the_attributes_of_turn_1() -> None:
    ratios = replace(RATIOS, plain=0, recall=1)
    pool = ConstraintPool((), ("opening",))
    for assigned in assign_training(load_dialogues("seed")[:50], pool, ratios, seed=1):
        values = {q.value for q in assigned.recall_questions}
        assert len(assigned.exact_answers) == len(values) > 0
        assert all(any(v in answer for v in values) for answer in assigned.exact_answers.values())
        for turn in assigned.exact_answers:
            questions = {q.question for q in assigned.recall_questions}
            assert turn > 0 and assigned.dialogue.turns[turn] in questions
        statement = assigned.student_instructions[0]
        assert all(value in statement for value in values)


def test_an_instruction_that_the_user_ends() -> None:
    assigned = AssignedDialogue(
        dialogue=Dialogue("d", "", ("one?", "two?", "three?")),
        instruction=BEGIN,
        method="edited",
        shortened=True,
        next_instruction=stop("You can stop that now."),
        change_turn=1,
    )
    assert _contents(assigned.student_prompt(["a", "b"], "")) == [
        *('one?\n\nOpening: "Ahoy!".', "a", "two?\n\nYou can stop that now.", "b", "three?"),
    ]
    assert [len(assigned.constraints(turn)) for turn in range(3)] == [1, 0, 0]
    assert assigned.name == "opening: Ahoy!, then stop"


def test_a_user_who_contradicts_the_system_message() -> None:
    assigned = AssignedDialogue(
        dialogue=Dialogue("d", "", ("one?", "two?", "three?")),
        instruction=BEGIN,
        method="edited",
        in_system=True,
        contradiction="You can stop that now.",
        change_turn=1,
    )
    assert _contents(assigned.student_prompt(["a", "b"], "")) == [
        'Begin every answer with "Ahoy!".',
        *("one?", "a", "two?\n\nYou can stop that now.", "b", "three?"),
    ]
    assert [c.value for turn in range(3) for c in assigned.constraints(turn)] == ["Ahoy!"] * 3
    assert _contents(assigned.teacher_prompt(["a"], "")) == ["one?", "a", "two?"]


@pytest.mark.parametrize("key", ["recall_ratio", "plain_ratio"])
def test_a_training_without_instructions_is_evaluated_on_those_of_the_pool(
    key: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    flags = override_flags((*TINY_RECIPE, f"instructions.{key}=1"))
    done = call_gatt("instructions", "--run", run.path, *flags)
    assert done.returncode == 0, done.stderr
    assert "measures instructions of the pool, which are not trained" in done.stderr
    splits = read_splits(run.assignments)
    assert not any(a.constraints(0) for a in splits["train"])
    assert len(splits["evaluation"]) == 3
    replies = [
        Reply(
            arm="base",
            dialogue=assigned.dialogue.id,
            turn=1,
            text="Yes.",
            prompt_tokens=9,
            tokens=9,
            finish="stop",
            obeys=obeys(assigned.constraints(0), "Yes."),
            defect="",
        )
        for assigned in splits["evaluation"]
    ]
    scores = compute_scores(replies, {**read_splits(run.suites), **splits}, trained=[])
    assert [(row.arm, row.n) for row in scores.by_turn] == [("base", 3)]


def test_evaluation_draws_evenly_over_kinds() -> None:
    pool = [Constraint("opening", f"Word{n}!") for n in range(40)]
    assigned = assign_evaluation(
        load_dialogues("seed")[:6], [*pool, Constraint("closing", "The end."), Constraint("bold")]
    )
    names = [a.name for a in assigned]
    assert names == [
        *("opening: Word0!", "closing: The end.", "bold"),
        *("opening: Word1!", "closing: The end.", "bold"),
    ]


def test_wording_and_shortening() -> None:
    instruction = render_instruction((Constraint("persona", "Napoleon"),))
    assert instruction.text == 'Act as Napoleon and begin every answer with "Napoleon:".'
    assert instruction.short == "Figure: Napoleon, named first."


def test_list_items_are_parsed_from_any_list() -> None:
    text = (
        "Here are famous people who changed the world:\n1. Napoleon Bonaparte - a general\n"
        '2) **Ada Lovelace**\n- napoleon bonaparte\n* "Gandhi"'
    )
    assert distinct_items(parse_items(text)) == ["Napoleon Bonaparte", "Ada Lovelace", "Gandhi"]


def test_a_period_within_a_name_does_not_end_it() -> None:
    text = (
        "1. J.R.R. Tolkien - a writer\n2. J. S. Bach.\n3. St. Francis\n4. Dr. Seuss (a writer)\n"
        "5. Dr. Martin Luther King\n6. No. 7\n7. J\n8. **Gandhi.** A lawyer.\n9. Hiking. It is fun"
    )
    names = ["J.R.R. Tolkien", "J. S. Bach", "St. Francis", "Dr. Seuss", "Gandhi", "Hiking"]
    assert parse_items(text) == names


def test_a_description_is_masked() -> None:
    description = mask_item("Ada Lovelace", "Lovelace's notes made Ada famous.")
    assert description == "___'s notes made Ada famous."


@pytest.mark.parametrize(
    ("kind", "item", "answer", "known"),
    [
        ("persona", "Ada Lovelace", "It is Lovelace!", True),
        ("persona", "Ada Lovelace", "It is Gandhi.", False),
        ("persona", "King Charles I", "I do not know.", False),
        ("language", "French", "Il fait beau aujourd'hui et le soleil brille.", True),
        # Danish is not one of the languages that can be detected.
        ("language", "Danish", "Vejret er godt i dag.", False),
    ],
)
def test_what_the_teacher_knows(kind: str, item: str, answer: str, known: bool) -> None:
    assert is_known(kind, item, answer) == known


def test_items_with_commas_on_a_single_line_are_a_list() -> None:
    text = "Reading, hiking, listening to music, whatever it is you like best, and swimming."
    assert parse_items(text) == ["Reading", "hiking", "listening to music", "swimming"]
    assert parse_items("1. Ada Lovelace, a writer\n2. Gandhi, a lawyer, and more") == [
        *("Ada Lovelace", "Gandhi")
    ]
    assert parse_items("Chess, a game") == ["Chess"]
    assert parse_items("Sure, here are hobbies: reading, hiking, and golf") == [
        *("reading", "hiking", "golf")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Rulers:\n1. Napoleon\n2. Elizabeth I\nScientists:\n3. Newton",
        "## Rulers\n- Napoleon\n- Elizabeth I\n\n**Scientists**\n- Newton\nEnjoy!",
        "Sure, here they are:\nNapoleon\nElizabeth I\n**Scientists:**\nNewton",
        "Great question\n* Napoleon\n* Elizabeth I\n* Newton",
    ],
)
def test_headings_and_prefaces_are_no_items(text: str) -> None:
    assert parse_items(text) == ["Napoleon", "Elizabeth I", "Newton"]


def test_what_several_lists_have_is_known_without_a_test_but_no_language_is() -> None:
    requests: list[str] = []

    def run_tasks(tasks: Iterable[Task]) -> None:
        for task in tasks:
            request = next(task, None)
            while request:
                text = request.messages[-1]["content"]
                requests.append(text)
                listed = ("Chess\nFrench" if request.seed < 9 else "Golf") + "\nGolf\nGolf"
                answer = listed if text.startswith("List") else "I do not know."
                try:
                    request = task.send(Completion(answer, 9, 9, "stop"))
                except StopIteration:
                    request = None

    assert list_values("hobby", run_tasks, seed=7).known == ["Chess", "French", "Golf"]
    assert len(requests) == LISTS  # nothing was left to be tested
    assert list_values("hobby", run_tasks, seed=8).known == ["Golf"]  # the others are in one list
    assert list_values("language", run_tasks, seed=7).known == []


def test_the_teacher_lists_values_and_keeps_those_that_it_knows() -> None:
    lists = iter(["1. Chess\n2. chess\n3. Tennis - a sport", *[""] * (LISTS - 1)])
    replies = {
        "whose hobby is Chess": "People who love chess play on a board.",
        "whose hobby is Tennis": "They hit a ball.",
        "Which hobby is this? People who love ___": "Chess.",
        "Which hobby is this? They hit": "Golf.",
    }
    requests: list[Request] = []

    def run_tasks(tasks: Iterable[Task]) -> None:
        for task in tasks:
            request = next(task)
            try:
                while True:
                    requests.append(request)
                    prompt = request.messages[0]["content"]
                    if prompt.startswith("List"):
                        text = next(lists)
                    else:
                        text = next(reply for start, reply in replies.items() if start in prompt)
                    request = task.send(Completion(text, 9, 9, "stop"))
            except StopIteration:
                pass

    assert list_values("hobby", run_tasks, seed=7) == ListedValues(2, ["Chess"])
    assert [request.seed for request in requests] == [*range(7, 7 + LISTS), *[7] * 4]


def test_the_pool_may_have_generated_values_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    settings = (
        *TINY_RECIPE,
        "instructions.pool=[]",
        "instructions.vocabulary_kinds=[]",
        'instructions.generate=["persona", "hobby"]',
    )

    def assign(lists: str) -> Completed:
        write_text(run.lists, lists)
        return call_gatt("instructions", "--run", run.path, *override_flags(settings))

    done = assign('persona = ["Napoleon"]\nhobby = ["chess"]')
    assert done.returncode == 0, done.stderr
    (first, *_) = read_splits(run.assignments)["evaluation"]
    assert first.name in ("persona: Napoleon", "hobby: chess")
    assert "are empty, and no values are generated" in assign("persona = []\nhobby = []").stderr


def test_training_dialogues_are_pieces_of_those_that_are_not_held_out() -> None:
    recipe = Recipe.model_validate(
        {"dialogues": {"train": 400, "turns": 6, "validation": 5}, "evaluate": {"dialogues": 10}}
    )
    splits = split_dialogues(recipe)
    assert (len(splits.training), len(splits.validation), len(splits.evaluation)) == (400, 5, 10)
    sources = {d.id: d.turns for d in load_dialogues("seed")}
    held_out = {d.id for d in (*splits.validation, *splits.evaluation)}
    assert len(held_out) == 15
    for piece in splits.training:
        source, _, start = piece.id.partition("@")
        first = int(start.partition(".")[0])
        assert source not in held_out
        assert piece.turns == sources[source][first : first + 6]
    assert len({piece.id for piece in splits.training}) == 400


def _split(source: str, turns: int, dialogues: int) -> DialogueSplits:
    return split_dialogues(
        Recipe.model_validate(
            {
                "dialogues": {"source": source, "train": 8, "validation": 0},
                "evaluate": {"turns": turns, "dialogues": dialogues},
            }
        )
    )


def _source(file: Path, dialogues: Sequence[Sequence[str]]) -> str:
    file.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in dialogues))
    return str(file)


@pytest.mark.parametrize(("turns", "dialogues"), [(60, 24), (120, 4)])
def test_dialogues_of_the_source_are_joined_to_long_ones(turns: int, dialogues: int) -> None:
    splits = _split("seed", turns, dialogues)
    sources = {d.id: d.turns for d in load_dialogues("seed")}
    assert len(splits.evaluation) == dialogues
    assert len({d.id for d in splits.evaluation}) == dialogues
    for dialogue in splits.evaluation:
        assert len(dialogue.turns) == len(set(dialogue.turns)) == turns
        first = sources[dialogue.id]
        assert dialogue.turns[: len(first)] == first
    held_out = {turn for d in splits.evaluation for turn in d.turns}
    assert splits.training
    assert not held_out & {turn for d in splits.training for turn in d.turns}


def test_evaluation_takes_the_first_dialogues_that_are_long_enough_as_they_are() -> None:
    short, long = _split("seed", 20, 24), _split("seed", 21, 24)
    sources = {d.id: d.turns for d in load_dialogues("seed")}
    assert all(d.turns == sources[d.id] for d in (*short.evaluation, *long.evaluation))
    assert all(len(d.turns) >= 21 for d in long.evaluation)


def test_single_questions_are_joined_and_a_message_comes_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [[f"What about {n}?"] for n in range(30)]
    source = _source(tmp_path / "d.jsonl", [*questions, ["Why?", "Really?"], ["How?", "Really?"]])
    splits = _split(source, 20, 2)
    assert [len(set(d.turns)) for d in splits.evaluation] == [20, 20]
    assert splits.evaluation[0].turns[0] != splits.evaluation[1].turns[0]
    assert "joined from" in capsys.readouterr().err
    (pair,) = _split(source, 2, 1).evaluation
    assert pair.turns in (("Why?", "Really?"), ("How?", "Really?"))


def test_rows_of_one_conversation_are_not_in_two_splits(tmp_path: Path) -> None:
    talks = [[f"Talk {n}?", "Why?", "How?", "Bye."] for n in range(3)]
    rows = [talk[:length] for talk in talks for length in (1, 2, 4)]
    rows += [[*talk[:2], "Really?"] for talk in talks]
    splits = _split(_source(tmp_path / "d.jsonl", rows), 4, 2)
    held_out = {dialogue.turns[0] for dialogue in splits.evaluation}
    assert len(held_out) == 2
    trained = {dialogue.turns[0] for dialogue in splits.training}
    assert trained and not trained & held_out
    assert len(splits.training) == 8


def test_too_few_messages_for_long_dialogues_are_an_error(tmp_path: Path) -> None:
    source = _source(tmp_path / "d.jsonl", [[f"What about {n}?", "Really?"] for n in range(10)])
    assert len(_split(source, 10, 2).evaluation) == 2  # 9 dialogues have 10 different messages
    with pytest.raises(GattError, match=r"10 dialogues with 11 user turns.*of 11 turns take 10"):
        _split(source, 11, 2)  # none is left for training
    with pytest.raises(GattError, match="too few to evaluate on 2"):
        _split(source, 12, 2)


def test_a_long_dialogue_may_repeat_what_its_user_repeats(tmp_path: Path) -> None:
    turns = ("Go on.",) * 5
    source = _source(tmp_path / "d.jsonl", [turns, ["Why?"], ["How?"]])
    assert [d.turns for d in _split(source, 5, 1).evaluation] == [turns]


def test_an_answer_off_topic_shares_no_content_word() -> None:
    question = ["How does a dolphin sleep?"]
    assert is_on_topic("Dolphins sleep with one eye open.", question)
    assert not is_on_topic("That is a great question, and I would be glad.", question)


def test_defects() -> None:
    good = "The tallest mountain on Earth is Mount Everest."
    assert find_defect(good, []) == ""
    assert find_defect("Ahoy! Ahoy!", [], "Ahoy!") == "empty"
    assert find_defect("of the sea " * 6, []) == "loop"
    assert find_defect(good, [good]) == "repeat"
    unfinished = "The tallest mountain on Earth is"
    assert find_defect(unfinished, []) == ""
    assert find_defect(unfinished, [], require_ending=True) == "unfinished"


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        (
            "The sea is deep and cold. " * 3 + "The sea.",
            "The sea is deep and cold. " * 3 + "The sea.",
        ),
        (
            "It is so. " * 9,
            "It is so. " * 4 + "It is",
        ),
        (
            "one two three four five, " * 6,
            "one two three four five, " * 3 + "one two three four five",
        ),
    ],
)
def test_a_loop_ends_with_the_fourth_time_of_five_words(text: str, ended: str) -> None:
    assert up_to_loop(text) == ended
    # While it is written, it is stopped some words later, and ends with the same one.
    prefixes = [text[:length] for length in range(len(text) + 1)]
    stopped = {up_to_loop(prefix) for prefix in prefixes if is_in_loop(prefix)}
    assert stopped == (set() if ended == text else {ended})


def test_a_word_that_still_grows_ends_no_loop() -> None:
    before = "they say we don't and " * 3 + "they say we don"
    assert not is_in_loop("we say they don " * 3 + "we say they don'")
    assert up_to_loop(f"{before}'t and so on") == f"{before}'t and"


def test_first_sentences_leaves_out_an_unfinished_one() -> None:
    assert first_sentences("It is blue. Why? Because of the", 2) == "It is blue. Why?"
    assert first_sentences("no end", 2) == ""
    assert first_sentences("今天很好。我们去公园吧！好", 2) == "今天很好。我们去公园吧！"


@pytest.mark.parametrize(
    "sentence",
    [
        "Ask Dr. Smith about it.",
        "Use vegetables, e.g. carrots.",
        "John F. Kennedy was born there.",
        "The capital of the U.S. is Washington.",
        '(J. R. R. Tolkien wrote "The Hobbit".)',
    ],
)
def test_an_abbreviation_ends_no_sentence(sentence: str) -> None:
    assert first_sentences(f"{sentence} And so on.", 1) == sentence
    assert not any(has_sentences(sentence[:end], 1) for end in range(len(sentence)))
    assert len(split_sentences(f"{sentence} So is it.")) == 2


@given(
    text=st.text(alphabet='abA .!?\n"。？」', max_size=30),
    more=st.text(alphabet='abA .!?\n"。？」', max_size=9),
    count=st.integers(1, 3),
)
def test_generation_stops_only_if_the_sentences_are_final(text: str, more: str, count: int) -> None:
    if has_sentences(text, count):
        assert first_sentences(text + more, count) == first_sentences(text, count)


def test_dialogues_are_read_in_every_format(tmp_path: Path) -> None:
    import datasets

    sharegpt = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"},
    ]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"conversations": sharegpt}]))
    folder = tmp_path / "folder"
    folder.mkdir()
    datasets.Dataset.from_list([{"turns": ["Hi", "Bye"]}]).to_parquet(folder / "c.parquet")
    for source in ("a.jsonl", "b.json", "folder/c.parquet", "folder"):
        assert [d.turns for d in load_dialogues(str(tmp_path / source))] == [("Hi", "Bye")], source


def test_seed_dialogues() -> None:
    dialogues = load_dialogues("seed")
    assert len(dialogues) >= 120
    assert all(len(d.turns) >= 20 for d in dialogues)
    turns = [turn.lower() for d in dialogues for turn in d.turns]
    assert len(set(turns)) > 0.99 * len(turns)
    assert len({d.id for d in dialogues}) == len(dialogues)


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    rate = wilson(81, 263)
    assert (round(rate.low, 4), round(rate.high, 4)) == (0.2553, 0.3662)
    assert round(wilson(0, 20).high, 4) == 0.1611


def test_a_reply_outside_the_context_is_not_counted() -> None:
    finishes: tuple[FinishReason, ...] = ("stop", "context")
    replies = [
        Reply(
            arm="base",
            dialogue="d",
            turn=turn,
            text="",
            prompt_tokens=1,
            tokens=1,
            finish=finish,
            obeys=True,
            defect="",
        )
        for turn, finish in enumerate(finishes, 1)
    ]
    assert adherence(replies, lambda reply: reply.arm)["base"].n == 1
