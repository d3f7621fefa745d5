"""The kinds of constraint on how an answer is written: case, punctuation, emoji, bold, manner."""

from __future__ import annotations

from pipeline.gatt.constraints import content_checks, edits, style_checks
from pipeline.gatt.constraints.base import Kind, avoids

STYLE_KINDS: dict[str, Kind] = {
    "uppercase": Kind(
        family="style",
        slot="case",
        wordings=(
            "Write every answer in capital letters only.",
            "Use no small letters in your replies, only capitals.",
            "From now on, answer in capitals throughout.",
        ),
        short="Capitals only.",
        check=style_checks.is_uppercase,
        edit=edits.uppercase,
        prefix_fails=style_checks.has_lowercase_letter,
        forbids=style_checks.has_lowercase_letter,
    ),
    "lowercase": Kind(
        family="style",
        slot="case",
        wordings=(
            "Write every answer in lowercase letters only.",
            "Use no capital letters in your replies.",
            "From now on, answer in small letters throughout.",
        ),
        short="Lowercase only.",
        check=style_checks.is_lowercase,
        edit=edits.lowercase,
        prefix_fails=style_checks.has_uppercase_letter,
        forbids=style_checks.has_uppercase_letter,
    ),
    "title_case": Kind(
        family="style",
        slot="case",
        wordings=(
            "Begin every word of your answers with a capital letter.",
            "Capitalize each word in all your replies.",
            "From now on, let every single word start with a capital.",
        ),
        short="Every Word Capitalized.",
        check=style_checks.is_title_case,
        edit=edits.capitalize_words,
        prefix_fails=style_checks.has_lowercase_word,
        forbids=style_checks.has_lowercase_word,
    ),
    "no_commas": Kind(
        family="style",
        slot="punctuation",
        wordings=(
            "Never use a comma in your answers.",
            "Write all your replies without commas.",
            "From now on, do without commas.",
        ),
        short="No commas.",
        check=avoids(style_checks.has_comma),
        edit=edits.remove_commas,
        prefix_fails=style_checks.has_comma,
        forbids=style_checks.has_comma,
    ),
    "no_exclamation": Kind(
        family="style",
        slot="punctuation",
        wordings=(
            "Never use an exclamation mark in your answers.",
            "Write all your replies without exclamation marks.",
            "From now on, do without exclamation marks.",
        ),
        short="No exclamation marks.",
        check=avoids(style_checks.has_exclamation_mark),
        edit=edits.remove_exclamation_marks,
        prefix_fails=style_checks.has_exclamation_mark,
        forbids=style_checks.has_exclamation_mark,
    ),
    "no_questions": Kind(
        family="style",
        slot="punctuation",
        wordings=(
            "Never use a question mark in your answers.",
            "Write all your replies without question marks.",
            "From now on, do without question marks.",
        ),
        short="No question marks.",
        check=avoids(style_checks.has_question_mark),
        prefix_fails=style_checks.has_question_mark,
        forbids=style_checks.has_question_mark,
    ),
    "exclamations": Kind(
        family="style",
        slot="ends",
        wordings=(
            "End every sentence with an exclamation mark.",
            "In your replies, each sentence ends with an exclamation mark.",
            "From now on, put an exclamation mark where a full stop or question mark would be.",
        ),
        short="Exclamation marks only.",
        check=style_checks.exclaims,
        edit=edits.exclaim,
        prefix_fails=style_checks.exclaims_cannot_pass,
        forbids=style_checks.has_other_sentence_end,
        required_phrase="!",
    ),
    "emoji": Kind(
        family="style",
        slot="emoji",
        wordings=(
            "Use at least one emoji in every answer.",
            "Put an emoji in each of your replies.",
            "From now on, no answer without an emoji.",
        ),
        short="With an emoji.",
        check=style_checks.has_emoji,
        edit=edits.add_emoji,
        required_phrase="🙂",
    ),
    "no_emoji": Kind(
        family="style",
        slot="no_emoji",
        wordings=(
            "Never use emoji in your answers.",
            "Write all your replies without emoji.",
            "From now on, do without emoji.",
        ),
        short="No emoji.",
        check=avoids(style_checks.has_emoji),
        edit=edits.remove_emoji,
        prefix_fails=style_checks.has_emoji,
        forbids=style_checks.has_emoji,
    ),
    "style": Kind(
        family="style",
        slot="content",
        wordings=(
            "In all your answers, {v}.",
            "Always {v} when you reply.",
            "From now on, {v} in each answer.",
        ),
        short="Style: {v}.",
        values=("talk like a pirate", "speak as if to a child"),
        check=content_checks.is_not_blank,
        judged=True,
    ),
    "bold": Kind(
        family="style",
        slot="bold",
        wordings=(
            "Put at least one word of every answer in bold, **like this**.",
            "Each of your replies has a word in **bold**.",
            "From now on, make a word **bold** in each answer.",
        ),
        short="With a word in **bold**.",
        check=style_checks.has_bold,
        edit=edits.embolden,
    ),
}
