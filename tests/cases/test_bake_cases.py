"""Prompts to bake: text files and character cards, and what is wrong with some of them."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import subprocess
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli import call_gatt, override_flags
from support.teachers import Teacher, serve

from pipeline.data.prompts import read_prompt
from pipeline.errors import GattError
from pipeline.evaluation.aggregate import compute_scores
from pipeline.files import read_jsonl
from pipeline.gatt.acceptance import ACCEPTED, CandidateKey, judge_candidate
from pipeline.gatt.assignment import AssignedDialogue, read_splits
from pipeline.gatt.bake import IDENTITY_QUESTIONS, baked_instruction, with_prompt
from pipeline.gatt.constraints.registry import KINDS
from pipeline.gatt.instructions import render_instruction
from pipeline.gatt.rollout import Rollout
from pipeline.records import Completion, Constraint, Dialogue, Reply, Request
from pipeline.run_dir import RunDir

_V2 = {
    "spec": "chara_card_v2",
    "spec_version": "2.0",
    "data": {
        "name": "Ziggy",
        "description": "{{char}} is a cheerful robot who guides {{user}}.",
        "personality": "curious",
        "scenario": "A museum.\r\n\r\n\r\n\r\nIt rains.",
        "first_mes": "Hello <USER>, I am <BOT>!",
        "mes_example": "<START>\n{{user}}: Hi\n{{Char}}: Beep.",
        "system_prompt": "{{original}} You play {{char}}.",
        "tags": ["robot"],
    },
}
_RENDERED = (
    "You play Ziggy.\n\nZiggy is a cheerful robot who guides User.\n\nPersonality: curious\n\n"
    "Scenario: A museum.\n\nIt rains.\n\nExamples of how Ziggy talks:\nUser: Hi\nZiggy: Beep.\n\n"
    "Ziggy begins the conversation with:\nHello User, I am Ziggy!"
)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _png(*texts: tuple[bytes, bytes]) -> bytes:
    """Return an image of one pixel with chunks before its end, as SillyTavern writes them."""
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0\0")), *texts, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _encoded(card: object) -> bytes:
    return base64.b64encode(json.dumps(card).encode())


def _charx(name: str, content: bytes) -> bytes:
    """Return an archive as RisuAI writes it, with the same bytes at any time of day."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("assets/icon.png"), _png())
        archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def _renamed(name: str) -> dict[str, object]:
    return {"spec": "chara_card_v3", "data": {**_V2["data"], "name": name}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("card.json", json.dumps(_V2).encode()),
        ("v1.json", json.dumps(_V2["data"]).encode()),
        ("card.txt", json.dumps(_V2).encode("utf-16")),
        ("tEXt.png", _png((b"tEXt", b"chara\0" + _encoded(_V2)))),
        ("zTXt.png", _png((b"zTXt", b"Chara\0\0" + zlib.compress(_encoded(_V2))))),
        ("iTXt.png", _png((b"iTXt", b"ccv3\0\0\0en\0\0" + _encoded(_V2)))),
        ("packed.png", _png((b"iTXt", b"ccv3\0\1\0\0\0" + zlib.compress(_encoded(_V2))))),
        (
            "both.png",
            _png(
                (b"tEXt", b"chara\0" + _encoded(_renamed("Old"))),
                (b"tEXt", b"Comment\0drawn by hand"),
                (b"tEXt", b"ccv3\0" + _encoded(_V2)),
            ),
        ),
        (
            "broken_v3.png",
            _png((b"tEXt", b"ccv3\0bm8"), (b"tEXt", b"chara\0" + _encoded(_V2))),
        ),
        ("empty_v3.png", _png((b"tEXt", b"ccv3\0"), (b"tEXt", b"chara\0" + _encoded(_V2)))),
        ("padding.png", _png((b"tEXt", b"chara\0" + _encoded(_V2).rstrip(b"=")))),
        ("null.json", json.dumps({**_V2["data"], "data": None}).encode()),  # type: ignore[dict-item]
        ("ziggy.charx", _charx("card.json", json.dumps(_V2).encode())),
    ],
)
def test_a_card_becomes_one_text_with_its_names(file: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(content)
    text, name = read_prompt(tmp_path / file)
    assert name == "Ziggy"
    assert text == _RENDERED


def test_a_card_without_a_system_prompt_says_who_it_is(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text(json.dumps({"name": "Ada", "description": "A poet."}))
    text, _ = read_prompt(file)
    assert text == "You are Ada. Answer as Ada would, and stay in character.\n\nA poet."


def _card_text(path: Path, **fields: object) -> str:
    """Return the prompt of a card with the name Ada and these fields."""
    path.write_text(json.dumps({"spec": "chara_card_v2", "data": {"name": "Ada", **fields}}))
    return read_prompt(path).text


def test_what_a_card_says_at_the_end_of_a_chat_ends_the_prompt(tmp_path: Path) -> None:
    opening = "You are Ada. Answer as Ada would, and stay in character."
    last = {"post_history_instructions": "{{original}}\nNever leave {{char}}."}
    depth = {"extensions": {"depth_prompt": {"prompt": "Ada is tired.", "depth": 4}}}
    card = tmp_path / "card.json"
    assert _card_text(card, **last) == f"{opening}\n\nNever leave Ada."
    assert _card_text(card, **depth) == f"{opening}\n\nAda is tired."
    assert _card_text(card, first_mes="Hi.", **last, **depth).endswith(
        "Hi.\n\nAda is tired.\n\nNever leave Ada."
    )
    for extensions in (None, {"depth_prompt": None}, {"depth_prompt": {"prompt": ""}}):
        assert _card_text(card, description="A poet.", extensions=extensions).endswith("A poet.")


def test_macros_comments_and_halves_of_characters(tmp_path: Path) -> None:
    card = tmp_path / "card.json"
    text = "{{ char }} waves {{// to\nnobody}}at {{ user }}.{{comment: why?}} \ud83d"
    assert _card_text(card, description=text).endswith("\n\nAda waves at User. \ufffd")
    assert _card_text(card, description="{{char}} waves.", nickname="Countess") == (
        "You are Countess. Answer as Countess would, and stay in character.\n\nCountess waves."
    )
    assert read_prompt(card).name == "Countess"
    assert "Personality" not in _card_text(card, description="A.", personality="{{// none}}")


def test_a_character_book_that_is_left_out_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = {"entries": [{"keys": ["sea"], "content": "Salt."}, {"keys": ["sky"], "content": "Air"}]}
    _card_text(tmp_path / "card.json", description="A poet.", character_book=book)
    assert "card.json: its character book is left out (2 entries)" in capsys.readouterr().err
    _card_text(tmp_path / "card.json", description="A poet.", character_book={"entries": []})
    assert capsys.readouterr().err == ""


def test_a_text_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text('\n{"a": 1} is how you answer, {{user}}.\n', encoding="utf-8-sig")
    assert read_prompt(file) == ('{"a": 1} is how you answer, {{user}}.', "")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("photo.png", _png(), "is an image without a character card"),
        ("broken.png", _png((b"tEXt", b"chara\0bm8ganNvbg==")), "card in .* is broken"),
        ("other.png", _png((b"tEXt", b"chara\0\xff\xfe")), "card in .* is broken"),
        ("cut.png", _png((b"tEXt", b"chara\0" + _encoded(_V2)))[:90], "card in .* is broken"),
        ("photo.jpg", b"\xff\xd8\xff\xe0rest", "not a PNG"),
        ("empty.txt", b" \n\t", "is empty"),
        ("list.json", b"[1, 2]", "is not a character card"),
        ("other.json", b'{"model": "x"}', "is not a character card"),
        ("name.json", json.dumps({"data": {"name": "Ziggy"}}).encode(), "has no text"),
        ("name.png", _png((b"tEXt", b"chara\0" + _encoded({"name": "Z"}))), "has no text"),
        ("both.png", _png((b"tEXt", b"ccv3\0"), (b"tEXt", b"chara\0{")), "'ccv3' or 'chara'"),
        ("notes.charx", _charx("notes.txt", b"Hi."), "archive without card.json"),
        ("list.charx", _charx("card.json", b"[1]"), "card.json in .* is not a character card"),
        ("cut.charx", _charx("card.json", b"{}")[:90], "damaged archive"),
        ("latin.txt", "Sei höflich.".encode("latin-1"), "not UTF-8"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_what_has_no_prompt_is_one_line(
    file: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(GattError, match=message) as error:
        read_prompt(tmp_path / file)
    assert file in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.txt", tmp_path):
        with pytest.raises(GattError, match="Expected a text file, or a character card"):
            read_prompt(path)


# --- in a run ---


def _instructions(run: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    return call_gatt("instructions", "--run", run, *override_flags(), *flags)


def test_the_teacher_has_the_prompt_and_the_student_has_none(tmp_path: Path) -> None:
    card, run = tmp_path / "card.json", RunDir(tmp_path / "run")
    card.write_text(json.dumps(_V2))
    values = (f"instructions.bake={card}", "dialogues.train=30", "instructions.recall_ratio=0.2")
    flags = [flag for value in values for flag in ("--set", value)]
    done = _instructions(run.path, *flags)
    assert done.returncode == 0, done.stderr
    assert "30 training dialogues with the prompt card.json" in done.stderr
    splits, suites = read_splits(run.assignments), read_splits(run.suites)
    baked = [d for d in splits["train"] if d.baked]
    plain = [d for d in splits["train"] if not d.baked]
    assert 0 < len(plain) < len(baked)
    assert any(question in d.dialogue.turns for d in baked for question in IDENTITY_QUESTIONS)
    for assigned in (*baked, *splits["evaluation"]):
        teacher = assigned.teacher_prompt(["Beep."], "Be kind.")
        student = assigned.student_prompt(["Beep."], "Be kind.")
        assert teacher[0] == {"role": "system", "content": _RENDERED}
        assert teacher == assigned.reminded_prompt(["Beep."], "Be kind.")
        assert student == teacher[1:]
        assert [m["role"] for m in student] == ["user", "assistant", "user"]
    for assigned in plain:  # another system message is obeyed as before
        student = assigned.student_prompt([], "Be kind.")
        assert student == assigned.teacher_prompt([], "Be kind.")
        assert student[0]["content"] == "Be kind."
    assert splits["validation"] == []
    assert {name: len(suite) > 0 for name, suite in suites.items()} == {
        "plain": True,
        "recall": True,
        "single": True,
    }
    (question,) = suites["recall"][0].recall_questions
    assert (question.attribute, question.value) == ("name", "Ziggy")
    assert question.question not in IDENTITY_QUESTIONS
    assert _instructions(run.path, *flags).stderr.endswith("instructions: done already\n")
    card.write_text(json.dumps(_renamed("Zaggy")))
    assert "this has changed: card.json" in _instructions(run.path, *flags).stderr


def test_the_sentences_of_a_prompt_that_are_checks_are_found() -> None:
    text = (
        "You are a pirate. Begin every answer with “Ahoy! Mate”. Be brief.\n"
        "Rules:\n- Write every answer in French.\n2) Use at most 30 words in every answer.\n"
        "If you are asked for a list, answer in one sentence. Write every answer in French."
    )
    assert baked_instruction(text, "Jack").constraints == (
        Constraint("opening", "Ahoy! Mate"),
        Constraint("language", "French"),
        Constraint("max_words", "30"),
    )
    assert baked_instruction("You are a pirate. Act like one.").constraints == ()


@pytest.mark.parametrize(
    "sentence",
    [
        'Never use the word "very" or "but" in your answers.',
        "Let the first letter of each reply be uppercase.",
        "Begin every answer with a word that starts with the letter S or T.",
        "End every answer with the hashtag #cool and a smile.",
        'Call me "boss" or "captain" in every answer.',
        'Begin every answer with "Hi" or "Hello".',
    ],
)
def test_a_sentence_with_several_values_is_no_check(sentence: str) -> None:
    """A check of one of them would reject right answers, or accept wrong ones."""
    assert baked_instruction(sentence).constraints == ()


@pytest.mark.parametrize(
    "text",
    [
        "Name: Jeanne\nLanguage: French",
        "- Language: French",
        "For code questions:\n- Never use emoji in your answers.\n- Use at most 9 words.",
        "For code questions:\n\n- Never use emoji in your answers.",
        "- When writing code:\n  - Never use emoji in your answers.",
    ],
)
def test_what_holds_in_some_answers_only_is_no_check(text: str) -> None:
    assert baked_instruction(text).constraints == ()
    rule = "\nRules:\n- Use at most 30 words in every answer."
    assert baked_instruction(text + rule).constraints == (Constraint("max_words", "30"),)


@pytest.mark.parametrize(
    "text",
    [
        "In every answer:\n- Use at most 30 words in every answer.",
        "- When writing code:\n  - Be brief.\n- Use at most 30 words in every answer.",
        "Personality: Cheerful. Use at most 30 words in every answer.",
        "Language: French. Use at most 30 words in every answer.",
    ],
)
def test_what_holds_in_all_answers_is_a_check_beside_others(text: str) -> None:
    assert baked_instruction(text).constraints == (Constraint("max_words", "30"),)


@pytest.mark.parametrize("name", sorted(name for name, kind in KINDS.items() if not kind.judged))
def test_every_wording_is_a_check_of_a_prompt(name: str) -> None:
    constraint = Constraint(name, KINDS[name].values[0])
    for number in range(len(KINDS[name].wordings)):
        text = render_instruction((constraint,), number).text
        assert baked_instruction(f"Be kind.\n- {text}").constraints == (constraint,)


def test_a_prompt_is_checked_where_its_sentences_are_worded_as_checks(tmp_path: Path) -> None:
    prompt, run = tmp_path / "prompt.txt", RunDir(tmp_path / "run")
    prompt.write_text('You are a pirate. Begin every answer with "Ahoy!".')
    flags = ("--set", f"instructions.bake={prompt}", "--set", "dialogues.validation=2")
    done = _instructions(run.path, *flags, "--set", "train.early_stop_adherence=0.9")
    assert "checks of answers, derived from the prompt: opening: Ahoy!\n" in done.stderr
    splits = read_splits(run.assignments)
    baked = [*splits["validation"], *splits["evaluation"], *(d for d in splits["train"] if d.baked)]
    assert len(splits["validation"]) == 2
    assert {d.constraints(0) for d in baked} == {(Constraint("opening", "Ahoy!"),)}
    prompt.write_text("You are a pirate.")
    done = _instructions(run.path, *flags, "--set", "train.early_stop_adherence=0")
    assert "no sentence of the prompt is worded as a check" in done.stderr
    assert read_splits(run.assignments)["validation"] == []


def test_the_answers_to_a_prompt_are_checked_and_a_judge_reads_the_rest() -> None:
    instruction = baked_instruction('You are a pirate. Begin every answer with "Ahoy!".')
    assigned = with_prompt(Dialogue("d", "sea", ("Why is the sea salt?",)), instruction, "sampled")
    key = CandidateKey("d", 0, 0)
    answers = {"Ahoy! The sea is salt from rocks.": ACCEPTED, "The sea is salt.": "disobeys"}
    for text, verdict in answers.items():
        completion = Completion(text, 9, 9, "stop")
        answer = judge_candidate(assigned, key, completion, [], max_sentences=3)
        assert answer.verdict == verdict
    assert assigned.needs_judge(0)
    replies: list[Reply] = []
    for arm, text in zip(("base", "tuned", "ceiling"), (*answers, *answers), strict=False):
        task = Rollout(
            arm=arm,
            max_turns=1,
            make_request=lambda *_: Request(messages=(), seed=0, max_tokens=9),
            record=replies.append,
        ).run(assigned)
        next(task)
        with pytest.raises(StopIteration):
            task.send(Completion(text, 9, 9, "stop"))
    assert [reply.obeys for reply in replies] == [True, False, True]
    assert assigned.with_verdict(replies[1], verdict=True).obeys is False
    scores = compute_scores(replies, {"evaluation": [assigned], "plain": []}, ())
    assert [(row.arm, row.hits, row.n) for row in scores.last_five] == [
        ("base", 1, 1),
        ("tuned", 0, 1),
        ("ceiling", 1, 1),
    ]
    assert scores.unchecked == ()


def test_a_teacher_that_never_follows_the_prompt_leaves_nothing_to_train(tmp_path: Path) -> None:
    prompt, run = tmp_path / "prompt.txt", RunDir(tmp_path / "run")
    prompt.write_text('You are a pirate. Begin every answer with "Ahoy!".')
    values = (f"instructions.bake={prompt}", "instructions.plain_ratio=0.5", "dialogues.train=8")
    flags = [flag for value in values for flag in ("--set", value)]
    assert _instructions(run.path, *flags).returncode == 0
    with serve(Teacher()) as server:
        teacher = ("--set", f"synthesize.teacher={server.url}/v1")
        done = call_gatt("synthesize", "--run", run.path, *override_flags(), *flags, *teacher)
    assert done.returncode == 1
    assert "No answer of the teacher follows the prompt. Choose a larger teacher" in done.stderr
    verdicts = {row["dialogue"]: row["verdict"] for _, row in read_jsonl(run.answers)}
    assert ACCEPTED in verdicts.values()  # of plain dialogues


def test_without_another_system_message_there_are_no_plain_dialogues(tmp_path: Path) -> None:
    prompt, run = tmp_path / "prompt.txt", RunDir(tmp_path / "run")
    prompt.write_text("You are a pirate.")
    flags = ("--set", f"instructions.bake={prompt}", "--set", "dialogues.system=''")
    assert _instructions(run.path, *flags, "--set", "dialogues.train=30").returncode == 0
    assert all(assigned.baked for assigned in read_splits(run.assignments)["train"])
    suites = read_splits(run.suites)
    assert (suites["plain"], suites["recall"]) == ([], [])  # the prompt gives no name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Cannot read the prompt"),
        ("  \n", "is empty"),
        ("Answer like a pirate. " * 2000, "has .* tokens; the context of .* has room for"),
    ],
)
def test_a_prompt_that_cannot_be_baked_is_one_line(
    text: str | None, message: str, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.txt"
    if text is not None:
        prompt.write_text(text)
    done = call_gatt("run", "--bake", prompt, "--run", tmp_path / "run")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gatt: ")]
    assert re.search(message, line) and "prompt.txt" in line


def test_a_long_instruction_gets_a_longer_context() -> None:
    dialogue = Dialogue("d", "sea", ("Hi?", "Why?"))
    short = AssignedDialogue(dialogue=dialogue, instruction=baked_instruction("Be a pirate."))
    long = replace(short, instruction=baked_instruction("Be a pirate. " * 60))  # 780 bytes
    assert short.further_tokens(20, reminders=20) == 0
    assert long.further_tokens(20, reminders=20) == 20 * (260 - 64)
    assert with_prompt(dialogue, baked_instruction("Be a pirate. " * 60)).further_tokens(20) == 260
