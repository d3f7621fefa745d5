"""Public benchmarks as dialogues of the exam, read from small files of the published forms."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from support.cli import call_gatt
from support.exam import OPTIONS, SETTINGS
from support.scripted_model import write_scripted_gguf
from support.shared import make_once

from pipeline.errors import GattError
from pipeline.exam.arms import find_arms
from pipeline.exam.benchmarks import base
from pipeline.exam.benchmarks.base import BenchmarkTask, TurnChecks, criteria
from pipeline.exam.benchmarks.criteria import checks_of_questions, checks_of_requests
from pipeline.exam.benchmarks.registry import BENCHMARKS, read_benchmark
from pipeline.exam.dialogue_run import DialogueRun, ExamReply, ExamRun
from pipeline.exam.report.rows import warnings_about
from pipeline.exam.result import read_result
from pipeline.exam.scores import score_arms
from pipeline.exam.tasks import exam_tasks
from pipeline.gatt.constraints.registry import obeys
from pipeline.gatt.quality import is_in_loop
from pipeline.records import Completion, Constraint, Reply
from pipeline.stages.exam import run

_WORDS = ("Let", " me", " see:", " yes", ".")
"""The scripted model always answers "Let me see: yes."."""
_OPTIONS = replace(OPTIONS, turns=None, arms=(), regimes=(), dialogues=0)


def _write(file: Path, rows: Sequence[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")
    return file


def _read(name: str, file: Path) -> list[BenchmarkTask]:
    return BENCHMARKS[name](file)


def _reply(task: BenchmarkTask, text: str, turn: int = 1, attribute: str = "") -> Reply:
    return Reply(
        arm="once",
        dialogue=task.id,
        turn=turn,
        text=text,
        prompt_tokens=1,
        tokens=1,
        finish="stop",
        obeys=None,
        defect="",
        recall_attribute=attribute,
    )


def _multi_if_row(
    key: str, language: str, turns: Sequence[tuple[str, Mapping[str, object]]]
) -> list[str]:
    cells = [key, language]
    for number in range(3):
        done = turns[: number + 1] if number < len(turns) else []
        message = {"role": "user", "content": done[-1][0]} if done else None
        arguments = {name: values for _, checks in done for name, values in checks.items()}
        cells += [
            json.dumps(message) if message else "None",
            json.dumps(list(arguments)),
            json.dumps([json.dumps(values) for values in arguments.values()]),
        ]
    return cells


def _multi_if(file: Path) -> Path:
    columns = [
        f"turn_{number}_{name}"
        for number in (1, 2, 3)
        for name in ("prompt", "instruction_id_list", "kwargs")
    ]
    no_comma: dict[str, dict[str, object]] = {"punctuation:no_comma": {}}
    ending = {"startend:end_checker": {"end_phrase": "yes.", "unused": None}}
    two = {"length_constraints:number_words": {"relation": "at least", "num_words": 9}}
    rows = [
        _multi_if_row("7:en", "English", [("Name a tree.", no_comma), ("End with yes.", ending)]),
        _multi_if_row("8:zh", "Chinese", [("说一种树。", no_comma | two)]),
    ]
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["key", "language", *columns], *rows])
    return file


def test_multi_if_piles_up_instructions(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    english, chinese = _read("multi-if", _multi_if(tmp_path / "multi.csv"))
    assert (english.id, english.regime, chinese.regime) == ("7:en", "English", "Chinese")
    assert english.assigned.dialogue.turns == ("Name a tree.", "End with yes.")
    assert english.is_kept(_reply(english, "An oak, no doubt.")) is False
    assert english.is_kept(_reply(english, "An oak.")) is True
    assert english.is_kept(_reply(english, "An oak.", 2)) is False
    assert english.is_kept(_reply(english, "An oak? yes.", 2)) is True
    # Its authors count Chinese words with another tokenizer than IFEval.
    assert chinese.checks[1].unchecked == 1
    assert criteria([english, chinese]) == (4, 1)


def test_a_benchmark_keeps_what_loops(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    loop = "one two three four five " * 9
    benchmark, _ = _read("multi-if", _multi_if(tmp_path / "multi.csv"))
    (own,) = exam_tasks(("first",), 1, 2)
    for task, length in ((own, 20), (benchmark, 45)):
        exam = ExamRun("e", 2, SETTINGS, {})
        exam.stop_when = is_in_loop
        dialogue = DialogueRun(exam, find_arms(["once"])[0], task).task()
        first = next(dialogue)
        assert (first.stop_when is None) == (task is benchmark)
        second = dialogue.send(Completion(loop, 64, 9, "length"))
        assert len(second.messages[-2]["content"].split()) == length


def test_a_loop_that_nothing_ends_is_cut_at_the_limit() -> None:
    checks = {2: TurnChecks((Constraint("max_words", "3"),), 1)}
    benchmark = base.dialogue_task("d", "part", ("Q1", "Q2"), checks)
    (own,) = exam_tasks(("first",), 1, 2)
    for task, cut in ((own, 0), (benchmark, 1)):
        text = "one two three four five " * 9
        reply = replace(_reply(benchmark, text, 2), dialogue=task.id, finish="length")
        reply = replace(reply, defect="loop", obeys=False)
        row = ExamReply(reply=reply, dropped=0, reminder_tokens=0, seconds=0.1)
        (arm,) = score_arms([row], [task])
        assert (arm.cut.hits, arm.loops.hits, arm.answers) == (cut, 1, 1)


_GLOBAL = [
    ("startend:start_char", {"letter": "q"}, "Quite so.", "So, quite."),
    ("startend:start_emoji", {}, "🙂 Yes.", "Yes. 🙂"),
    ("startend:end_phrase", {"end_phrase": "Any more?"}, "Yes. any more?'", "Any more? Yes."),
    ("language:response_language", {"lang": "French"}, "Le ciel est bleu ce soir.", "It is blue."),
    ("format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("format:bullet_list", {"num_bullets": 0}, "Two:\n- a\n- b", "Two: a and b"),
    ("format:bullet_list", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
    ("length_constraints:number_sentences", {"num_sentences": 3}, "A. B b.", "Aa b. Bb c. Cc d."),
    ("keywords:existence", {"keywords": ["oak", "ash"]}, "Oak and ash.", "Oak and elm."),
    ("change_case:capital_letter", {}, "YES.", "Yes."),
    ("change_case:lowercase", {}, "yes.", "Yes."),
    ("punctuation:no_comma", {}, "Yes it is.", "Yes, it is."),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One. Two."),
    ("content:placeholder", {"num_placeholder": 1}, "Dear [name]", "Dear you"),
    ("format:constrained_response", {"response_options": ["It is so."]}, "It is so.", "It is."),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), _GLOBAL)
def test_mt_eval_has_one_instruction_for_all_turns(
    name: str, arguments: dict[str, object], good: str, bad: str, tmp_path: Path
) -> None:
    pytest.importorskip("if_verifiable")
    turns = [
        {"user": "All your answers ...", "sys": "ok.", "id": "instruction", "do_inference": False},
        {"user": "Is tea a drink?", "sys": "", "id": "1", "do_inference": True},
        {"user": "Is soup a drink?", "sys": "", "id": "2", "do_inference": True},
    ]
    nulls = {"letter": None, "num_bullets": None} | arguments
    row = {"inst_name": name, "inst_args": nulls, "conv": turns, "id": "4"}
    (task,) = _read("mt-eval", _write(tmp_path / "global.jsonl", [row]))
    assert task.given == {1: "ok."}
    assert not task.counts(1, 3, recall=False)
    for turn in (2, 3):
        assert task.counts(turn, 3, recall=False)
        assert task.is_kept(_reply(task, good, turn)) is True
        assert task.is_kept(_reply(task, bad, turn)) is False
        assert task.is_kept(_reply(task, "", turn)) is False


def test_mt_eval_has_labels(tmp_path: Path) -> None:
    turns = [
        {"user": "Give the label only.", "sys": "OK", "id": "instruction", "do_inference": False},
        {"user": "The flute sang.", "sys": "music", "id": "3", "do_inference": True},
        {"user": "The piano, too.", "sys": "music", "id": "4", "do_inference": True},
    ]
    (task,) = _read("mt-eval", _write(tmp_path / "cls.jsonl", [{"conv": turns, "id": "1"}]))
    assert task.regime == "labels"
    # The same answer twice is right here.
    assert [task.is_kept(_reply(task, "Music.", turn)) for turn in (2, 3)] == [True, True]
    assert task.is_kept(_reply(task, "art", 2)) is False


_OTHER_TASKS = {
    "refinement": [("Is green a color?", "Yes, of course."), ("Sum it up.", "A chef seeks a pie.")],
    "expansion": [("Classify the document.", "art"), ("Name its nouns.", "chef")],
    "one turn": [("Sum it up.", "A chef seeks a moonberry and meets a gryphon on a mountain.")],
    "lines": [("Name its nouns.", "chef\npie")],
}


@pytest.mark.parametrize("name", _OTHER_TASKS)
def test_other_tasks_of_mt_eval_are_refused(name: str, tmp_path: Path) -> None:
    turns = [
        {"user": user, "sys": answer, "id": f"1_{n}", "do_inference": True}
        for n, (user, answer) in enumerate(_OTHER_TASKS[name])
    ]
    turns[0]["do_inference"] = name != "refinement"
    file = _write(tmp_path / "other.jsonl", [{"conv": turns, "id": "1"}])
    with pytest.raises(GattError, match=r"line 1: neither inst_name nor an instruction with a la"):
        read_benchmark("mt-eval", file)


def _sysbench(file: Path) -> Path:
    criterion = {"criteria_id": 1, "criteria_content": "是否用诗句回答", "criteria_type": "format"}
    turns = ["你好", "再见"]
    messages = [{"role": "system", "content": "请用诗句回答。"}]
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "诗"}]
    infos = {t: {"alignment": "align", "criteria": {"1": criterion, "2": criterion}} for t in turns}
    row = {
        "system_id": 5,
        "system_prompt": "请用诗句回答。",
        "messages": messages,
        "prompt_infos": infos,
        "rounds_related": True,
    }
    file.write_text(json.dumps([row], ensure_ascii=False), encoding="utf-8")
    return file


def test_sysbench_needs_a_judge(tmp_path: Path) -> None:
    file = _sysbench(tmp_path / "sys.json")
    (task,) = _read("sysbench", file)
    assert (task.id, task.regime, task.system) == ("5", "related", "请用诗句回答。")
    assert task.assigned.dialogue.turns == ("你好", "再见")
    assert criteria([task]) == (0, 4)
    assert task.is_kept(_reply(task, "诗")) is None
    with pytest.raises(GattError, match="sysbench: a program can check nothing of it"):
        read_benchmark("sysbench", file)


def test_sequor_is_a_folder_of_dialogues(tmp_path: Path) -> None:
    def turn(prompt: str, *texts: str) -> dict[str, object]:
        return {"prompt": prompt, "constraints_data": [{"id": "x", "text": t} for t in texts]}

    _write(
        tmp_path / "sets/replace/step_size_5/conversation_0_1.jsonl",
        [turn("Q1", "Keep responses under 4 words"), turn("Q2", "Be inventive")],
    )
    _write(tmp_path / "sets/single/a_1.jsonl", [turn(f"Q{n}", "One sentence") for n in range(60)])
    replaced, single = _read("sequor", tmp_path / "sets")
    assert (replaced.regime, single.regime) == ("replace", "single")
    assert replaced.id == "replace/step_size_5/conversation_0_1"
    assert len(single.assigned.dialogue.turns) == 50
    assert replaced.is_kept(_reply(replaced, "Three words only.")) is True
    assert replaced.is_kept(_reply(replaced, "These are four words.")) is False
    assert replaced.is_kept(_reply(replaced, "Anything.", 2)) is None
    assert criteria([replaced, single]) == (51, 1)
    (alone,) = _read("sequor", tmp_path / "sets/single/a_1.jsonl")
    assert (alone.id, alone.regime) == ("a_1", "single")


def _struct_flow(file: Path) -> Path:
    def turn(name: str, user: str, answer: str, *questions: str) -> dict[str, object]:
        constraints = [{"type": "t", "content": q, "explanation": ""} for q in questions]
        return {
            "name": name,
            "user prompt": user,
            "assistant answer": answer,
            "constraints": constraints,
        }

    conversation = [
        turn("c1", "What is tea?", "A drink.", "Is the response limited to 3 words?"),
        turn("c2", "More?", "Yes.", "Is the response at least 2 words long?", "Is c2 a follow-up?"),
    ]
    row = {"conv_task": "Creative Writing: The user ...", "whole_conv": conversation}
    file.write_text(json.dumps([row]), encoding="utf-8")
    return file


def test_struct_flow_goes_on_after_the_answers_of_its_file(tmp_path: Path) -> None:
    first, second = _read("struct-flow", _struct_flow(tmp_path / "flow.json"))
    assert (first.id, second.id, first.regime) == ("001-1", "001-2", "Creative Writing")
    assert (first.given, second.given) == ({}, {1: "A drink."})
    assert first.is_kept(_reply(first, "One two three four")) is False
    assert second.is_kept(_reply(second, "Yes, more.", 2)) is True
    assert criteria([first, second]) == (2, 1)


def _guardrails(file: Path) -> Path:
    system = {"role": "system", "content": "Do not say pebble."}
    user = {"role": "user", "content": "What lies on the beach?"}
    answer = {"role": "assistant", "content": "Sand."}
    return _write(
        file,
        [
            {"messages": [system, user], "id": "1", "guardrails": ["g"], "banlist": ["pebble"]},
            {"messages": [system, user, answer, user], "id": "2", "guardrails": ["g", "h"]},
            {
                "messages": [system, user],
                "id": "3",
                "guardrails": ["g"],
                "num_turns": 1,
                "distractor_task": "roleplay",
            },
            {
                "key": 9,
                "prompt": "",
                "messages": [system, user],
                "instruction_id_list": ["punctuation:no_comma"],
                "kwargs": [{}],
            },
        ],
    )


def test_real_guardrails_and_its_ifeval(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    banned, two_turns, distracted, ifeval = _read("real-guardrails", _guardrails(tmp_path / "g"))
    assert banned.system == "Do not say pebble."
    assert banned.is_kept(_reply(banned, "A Pebble or two.")) is False
    assert banned.is_kept(_reply(banned, "Pebbles and shells.")) is True
    assert two_turns.given == {1: "Sand."}
    assert (two_turns.checks, two_turns.regime) == ({2: TurnChecks(unchecked=2)}, "handwritten")
    assert (distracted.regime, ifeval.regime) == ("distractors", "s-ifeval")
    assert ifeval.is_kept(_reply(ifeval, "Sand, mostly.")) is False
    assert criteria([banned, two_turns, distracted, ifeval]) == (2, 4)


def test_ifeval_without_a_system_message_is_another_form(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Name a tree. Use no commas."}
    row = {"messages": [user], "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file = _write(tmp_path / "ifeval.jsonl", [row])
    with pytest.raises(GattError, match=r"line 1: instruction_id_list without a system message"):
        read_benchmark("real-guardrails", file)


_PERSONAS = """
raise SystemExit("a reader does not run this")
pattern_system_prompts = [
    ("Begin with a Q.", "How are you?", lambda x: fraction_starts_with(x, 'q')),
    ("No e, please.", "How are you?", lambda x: 1 / (1 + x.count('e'))),
    ("Ten words.", "How are you?", lambda x: count_num_words(x)),
    ("Be glad.", "How are you?", lambda x: get_sentiment(x, "pos")),
]
memorization_system_prompts = [
    ("You have 3 cats.", "How many cats?", lambda x: "three" in x or "3" in x),
    ("Never say oak.", "Name a tree.", lambda x: "oak" not in x.lower()),
    ("Say a day.", "How are you?", lambda x: any([d in x.lower() for d in ["monday", "friday"]])),
    ("Not London.", "Where?", lambda x: ("Rome" in x) and ("london" not in x.lower())),
    ("No: you, I.", "How?", lambda x: 1 - fraction_of_target_words_hit(x, ["you", "I"])),
]
"""
_PROBED = {
    "pattern-01": ("Quite well.", "Well."),
    "pattern-02": ("All is good.", "Fine."),
    "pattern-03": ("one two three four five six seven eight nine ten", "one two"),
    "memorization-01": ("I have three.", "Two."),
    "memorization-02": ("An elm.", "An OAK."),
    "memorization-04": ("In Rome.", "In Rome, not London."),
    "memorization-05": ("I am well.", "As you are."),
}


def test_persona_drift_is_probed(tmp_path: Path) -> None:
    file = tmp_path / "hundred_system_prompts.py"
    file.write_text(_PERSONAS, encoding="utf-8")
    tasks = {task.id: task for task in _read("persona-drift", file)}
    assert len(tasks) == 9
    for name, (good, bad) in _PROBED.items():
        task = tasks[name]
        assert task.is_kept(_reply(task, good, 4, "probe")) is True, name
        assert task.is_kept(_reply(task, bad, 4, "probe")) is False, name
        assert task.is_kept(_reply(task, good, 4)) is None
    assert criteria(list(tasks.values())) == (7, 2)
    first = tasks["pattern-01"]
    (message, *_) = first.assigned.student_prompt([], first.system)
    assert message == {"role": "system", "content": "Begin with a Q."}
    assert first.assigned.recall_questions[0].question == "How are you?"
    # A measure of feelings is no check, and `[...]` in place of a generator is not known.
    assert [name for name, task in tasks.items() if not task.checks[1].constraints] == [
        "pattern-04",
        "memorization-03",
    ]


@pytest.mark.parametrize(
    "measure",
    [
        "does_not_contain(x, [*WORDS])",
        "1 - fraction_of_target_words_hit(x, ['oak', WORD])",
        "does_not_contain(x, ['oak'], y=['elm'])",
        "any(word in x.lower() for word in ['oak', WORD])",
    ],
)
def test_a_measure_with_a_list_of_more_than_literals_is_not_checked(
    measure: str, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.py"
    entry = f'("No oak.", "Name a tree.", lambda x: {measure})'
    file.write_text(f"one_system_prompts = [{entry}]", encoding="utf-8")
    assert criteria(_read("persona-drift", file)) == (0, 1)


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("Keep the word count under 200 words", "a " * 199, "a " * 200),
        ("Write more than 3 words", "a b c d", "a b c"),
        ("Write a text of maximum 3 words", "a b c", "a b c d"),
        ("10-character or less", "0123456789", "01234567890"),
        ("Answer in only one sentence", "It is so.", "It is. So."),
        ("Use a minimum of 2 words and a maximum of 3 words", "a b c", "a b c d"),
        ("Start your replies with 'Detective: '", "Detective: yes.", "Yes. Detective:"),
        ("End each response with “What now?”", "Yes. What now?", "What now? Yes."),
        ("Give answers only in German!", "Der Himmel ist heute sehr blau.", "It is very blue."),
        ("Don't use the word 'and'", "A or b.", "A and b."),
        ("Have three paragraphs", "a\n\nb\n\nc", "a\n\nb"),
        ("Include some emojis", "Yes 🙂", "Yes"),
        ("Do not use line breaks", "One line.", "Two\nlines."),
    ],
)
def test_requests_that_can_be_counted(text: str, good: str, bad: str) -> None:
    checks = checks_of_requests([text])
    assert (checks.checked, checks.unchecked) == (1, 0)
    assert obeys(checks.constraints, good) and not obeys(checks.constraints, bad)


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("Is the response limited to no more than 3 words?", "a b c", "a b c d"),
        ("Is the response limited to under 3 words?", "a b", "a b c"),
        ("Is the response exactly 2 words?", "a b", "a"),
        ("Is the response limited to four sentences?", "A b. C d.", "A. B b. C c. D d. E e. F f."),
        ("Is the response exactly three paragraphs long?", "a\n\nb\n\nc", "a"),
        (
            "Does the response include the terms 'tide', 'wave', and 'ice cap'?",
            "Tide, wave, ice cap",
            "Tide",
        ),
        ("Does the response refrain from mentioning 'recycling'?", "Reuse it.", "Recycling it."),
    ],
)
def test_questions_that_can_be_counted(text: str, good: str, bad: str) -> None:
    checks = checks_of_questions([text])
    assert (checks.checked, checks.unchecked) == (1, 0)
    assert obeys(checks.constraints, good) and not obeys(checks.constraints, bad)


@pytest.mark.parametrize(
    "text",
    [
        *("Use short sentences", "Keep the first response under 20 words", "Answer in a few words"),
        *("Each paragraph must be exactly 50 words", "Answer in another language", "Be funny"),
        *("Start with a question to engage the reader", "Reply within 30 words, max 2 sentences"),
        *("Speak in slang", "Use words like 'if' and 'else' often", "Do not repeat a word"),
    ],
)
def test_what_is_not_exactly_known_is_left_to_a_judge(text: str) -> None:
    assert checks_of_requests([text]) == TurnChecks(unchecked=1)


@pytest.mark.parametrize(
    "text",
    [
        "Is the response limited to no more than 150 words per field?",
        "Is each suggestion within 50 words?",
        "Is the response approximately 150 words?",
        "Does the response avoid using words like sad or lonely?",
        "Does the response include the word 'law' at least twice?",
        "Does the response include the words 'law' or 'order'?",
    ],
)
def test_questions_about_a_part_are_left_to_a_judge(text: str) -> None:
    assert checks_of_questions([text]) == TurnChecks(unchecked=1)


_OTHER_FORMS: dict[str, object] = {
    "mt-eval": {"conv": [{"user": "Hello"}], "id": "1"},
    "multi-if": {"turn_1_prompt": "Hello", "language": "English"},
    "real-guardrails": {"messages": [{"role": "user", "content": "Hello"}]},
    "sequor": {"prompt": "Hello"},
    "struct-flow": {"conv_task": "x", "whole_conv": [{"user": "Hello"}]},
    "sysbench": {"system_id": 1, "messages": []},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_another_form_is_one_line(name: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "other.jsonl", [_OTHER_FORMS.get(name, {"a": 1})])
    with pytest.raises(GattError, match=r"other\.jsonl.*Expected ") as error:
        read_benchmark(name, file)
    assert "\n" not in str(error.value)


def test_roles_out_of_turn_are_refused(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hello"}
    file = _write(tmp_path / "g.jsonl", [{"messages": [user, user], "guardrails": ["g"]}])
    with pytest.raises(GattError, match=r"line 1: the roles are user, user\. Expected a system"):
        read_benchmark("real-guardrails", file)


def test_an_unknown_instruction_of_mt_eval_is_refused(tmp_path: Path) -> None:
    turn = {"user": "Hello", "sys": "", "id": "1", "do_inference": True}
    row = {"conv": [turn], "id": "1", "inst_name": "startend:rhyme", "inst_args": {}}
    with pytest.raises(GattError, match=r"no instruction 'startend:rhyme' is known"):
        read_benchmark("mt-eval", _write(tmp_path / "x.jsonl", [row]))
    row |= {"inst_name": "startend:start_char"}
    with pytest.raises(GattError, match=r"start_char has the arguments \{\} \('letter'\)"):
        read_benchmark("mt-eval", _write(tmp_path / "x.jsonl", [row]))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("startend:start_char", {"letter": None}),
        ("startend:end_phrase", {"end_phrase": None}),
        ("keywords:existence", {"keywords": ["oak", None]}),
    ],
)
def test_an_argument_of_mt_eval_that_is_null_is_refused(
    name: str, arguments: dict[str, object], tmp_path: Path
) -> None:
    turn = {"user": "Hello", "sys": "", "id": "1", "do_inference": True}
    row = {"conv": [turn], "id": "1", "inst_name": name, "inst_args": arguments}
    with pytest.raises(GattError, match=rf"{name} has the arguments .*None.*\(expected a text\)"):
        read_benchmark("mt-eval", _write(tmp_path / "x.jsonl", [row]))


def test_a_form_is_prepared_once_for_all_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []

    def counted(form: Any) -> TypeAdapter[Any]:
        made.append(form)
        return TypeAdapter(form)

    monkeypatch.setattr(base, "TypeAdapter", counted)
    turn = {"user": "Name one.", "sys": "art", "id": "1", "do_inference": True}
    _read("mt-eval", _write(tmp_path / "cls.jsonl", [{"conv": [turn], "id": "1"}] * 3))
    assert len(made) <= 1


def test_dialogues_of_one_id_are_two(tmp_path: Path) -> None:
    turn = {"user": "Name one.", "sys": "art", "id": "1", "do_inference": True}
    file = _write(tmp_path / "cls.jsonl", [{"conv": [turn], "id": "1_30"}] * 2)
    benchmark = read_benchmark("mt-eval", file)
    assert [task.id for task in benchmark.tasks] == ["labels-1_30", "labels-1_30 (2)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF of the scripted model."""
    folder = make_once(
        tmp_path_factory, "exam-model", lambda folder: write_scripted_gguf(folder, _WORDS)
    )
    return folder / "scripted.gguf"


def test_a_benchmark_is_asked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _struct_flow(tmp_path / "flow.json")
    options = replace(_OPTIONS, benchmark="struct-flow", benchmark_file=file)
    run([str(model)], options, tmp_path / "out")
    result = read_result(tmp_path / "out" / "scripted.json")
    assert (result.exam.name, result.exam.turns, result.exam.dialogues) == ("struct-flow", 2, 2)
    assert (result.exam.criteria, result.exam.unchecked, result.exam.complete) == (3, 1, True)
    (arm,) = result.arms
    # "Let me see: yes." has four words: three were the limit in turn 1, two the least in turn 2.
    assert {d.id: d.marks for d in arm.dialogues} == {"001-1": "0.", "001-2": ".1"}
    assert (arm.adherence.hits, arm.adherence.n, arm.answers) == (1, 2, 2)
    assert [(s.turn, s.adherence.value) for s in arm.by_turn] == [(1, 0), (2, 1)]
    assert [s.regime for s in arm.regimes] == ["Creative Writing"]
    assert "1 of the 3 criteria of struct-flow are not checked" in " ".join(
        warnings_about([result])
    )
    rows = (tmp_path / "out/scripted.replies.jsonl").read_text(encoding="utf-8").splitlines()
    # Both dialogues are asked at once, and an answer is saved when it is there.
    replies = sorted((json.loads(row)["reply"] for row in rows[1:]), key=lambda r: r["dialogue"])
    assert [(r["dialogue"], r["turn"]) for r in replies] == [("001-1", 1), ("001-2", 2)]
    assert replies[1]["prompt_tokens"] > replies[0]["prompt_tokens"]
    assert "Creative Writing" in capsys.readouterr().out
    # What is done is not done again, and another file is another exam.
    before = (tmp_path / "out/scripted.replies.jsonl").read_bytes()
    run([str(model)], options, tmp_path / "out")
    assert (tmp_path / "out/scripted.replies.jsonl").read_bytes() == before
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(GattError, match=r"replies of another exam \(set"):
        run([str(model)], options, tmp_path / "out")


def test_parts_are_in_the_order_of_the_file(model: Path, tmp_path: Path) -> None:
    file = _struct_flow(tmp_path / "flow.json")
    (row,) = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps([row, row | {"conv_task": "Advice"}]), encoding="utf-8")
    options = replace(_OPTIONS, benchmark="struct-flow", benchmark_file=file)
    options = replace(options, regimes=("Advice", "Creative Writing"))
    run([str(model)], options, tmp_path / "out")
    result = read_result(tmp_path / "out" / "scripted.json")
    assert result.exam.regimes == ("Creative Writing", "Advice")


def test_probes_leave_no_trace(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.py"
    file.write_text(
        'one_system_prompts = [("Say yes.", "Is it so?", lambda x: "yes" in x)]', encoding="utf-8"
    )
    options = replace(
        _OPTIONS, benchmark="persona-drift", benchmark_file=file, turns="3", context=512
    )
    run([str(model)], options, tmp_path / "out")
    (arm,) = read_result(tmp_path / "out" / "scripted.json").arms
    assert [(d.attribute, d.marks) for d in arm.dialogues] == [("probe", "111")]
    assert (arm.adherence.hits, arm.adherence.n) == (3, 3)
    assert not arm.reminder_tokens


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--benchmark", "multi-iff"), "No benchmark 'multi-iff'. Did you mean 'multi-if'?"),
        (("--benchmark", "multi-if"), "needs its data, which gatt does not contain"),
        (("--benchmark", "multi-if", "--benchmark-file", "none.csv"), "No file or folder at none"),
        (("--benchmark-file", "none.csv"), "--benchmark-file needs --benchmark NAME"),
        (("--benchmark", "multi-if", "--arm", "every"), "asked as published"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], expected: str, model: Path, tmp_path: Path
) -> None:
    done = call_gatt("exam", model, *words, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.jsonl"))


def test_an_unknown_part_is_refused(model: Path, tmp_path: Path) -> None:
    options = replace(
        _OPTIONS,
        benchmark="struct-flow",
        benchmark_file=_struct_flow(tmp_path / "flow.json"),
        regimes=("Creative",),
    )
    with pytest.raises(GattError, match=r"no part 'Creative'\. Did you mean 'Creative Writing'\?"):
        run([str(model)], options, tmp_path / "out")
