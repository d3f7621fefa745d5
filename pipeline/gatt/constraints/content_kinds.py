"""The kinds of constraint on what an answer says: phrases, words, numbers, and the language."""

from __future__ import annotations

from pipeline.gatt.constraints import content_checks, edits
from pipeline.gatt.constraints.base import Kind, avoids
from pipeline.gatt.constraints.language import LANGUAGES, is_in_language

PHRASE_KINDS: dict[str, Kind] = {
    "opening": Kind(
        family="phrase",
        slot="opening",
        wordings=(
            'Begin every answer with "{v}"',
            'Always start your replies with "{v}"',
            'From now on, open each answer with "{v}"',
        ),
        short='Opening: "{v}"',
        values=("Ahoy!", "Hark!", "Good news:", "Well, well!"),
        check=content_checks.starts_with,
        edit=edits.prepend,
        prefix_fails=content_checks.starts_with_cannot_pass,
        required_phrase="{v}",
    ),
    "closing": Kind(
        family="phrase",
        slot="closing",
        wordings=(
            'End every answer with "{v}"',
            'Always close your replies with "{v}"',
            'From now on, finish each answer with "{v}"',
        ),
        short='Closing: "{v}"',
        values=("Over and out.", "Stay curious!", "So it goes."),
        check=content_checks.ends_with,
        edit=edits.append,
        required_phrase="{v}",
    ),
    "persona": Kind(
        family="persona",
        slot="opening",
        wordings=(
            'Act as {v} and begin every answer with "{v}:"',
            'You are {v}. Start each reply with "{v}:"',
        ),
        short="Figure: {v}, named first.",
        values=("Captain Nemo", "Napoleon", "Ada Lovelace"),
        check=lambda v, t: content_checks.starts_with(f"{v}:", t),
        edit=lambda v, t: edits.prepend(f"{v}:", t),
        prefix_fails=lambda v, t: content_checks.starts_with_cannot_pass(f"{v}:", t),
        required_phrase="{v}:",
    ),
    "signature": Kind(
        family="phrase",
        slot="closing",
        wordings=(
            'Sign every answer with "- {v}" on a line of its own.',
            'Put "- {v}" alone on the last line of each reply.',
            'From now on, let a last line that says only "- {v}" follow each answer.',
        ),
        short="Signature: - {v}, on the last line.",
        values=("Ada", "Your pen pal"),
        check=content_checks.is_signed,
        edit=edits.sign,
        required_phrase="- {v}",
    ),
    "hashtag": Kind(
        family="phrase",
        slot="closing",
        wordings=(
            "End every answer with the hashtag #{v}",
            "Always put #{v} at the very end of your replies",
            "From now on, finish each answer with #{v}",
        ),
        short="Hashtag at the end: #{v}",
        values=("TodayILearned", "goodtoknow"),
        check=lambda v, t: content_checks.ends_with(f"#{v}", t),
        edit=lambda v, t: edits.append(f"#{v}", t),
        required_phrase="#{v}",
    ),
    "postscript": Kind(
        family="phrase",
        slot="closing",
        wordings=(
            'End every answer with a postscript that starts with "P.S."',
            'Always close your replies with a line after "P.S."',
            'From now on, put a "P.S." with one more remark at the end of each answer.',
        ),
        short="A P.S. at the end.",
        check=content_checks.has_postscript,
        required_phrase="P.S.",
    ),
    "question": Kind(
        family="phrase",
        slot="closing",
        wordings=(
            "End every answer with a question.",
            "Always close your replies with a question.",
            "From now on, let a question be the last thing in each answer.",
        ),
        short="Ends with a question.",
        check=content_checks.ends_with_question,
        required_phrase="?",
    ),
    "initial": Kind(
        family="phrase",
        slot="opening",
        wordings=(
            "Begin every answer with a word that starts with the letter {v}.",
            "Let the first letter of each reply be {v}.",
            "From now on, the first word of each answer starts with {v}.",
        ),
        short="First letter: {v}.",
        values=("S", "T"),
        check=content_checks.first_word_starts_with,
        prefix_fails=content_checks.first_word_starts_with_cannot_pass,
        required_phrase="{v}",
    ),
    "address": Kind(
        family="phrase",
        slot="address",
        wordings=(
            'Call me "{v}" in every answer.',
            'Address me as "{v}" each time you reply.',
            'From now on, always call me "{v}".',
        ),
        short='Form of address: "{v}".',
        values=("my friend", "captain", "Your Highness"),
        check=content_checks.mentions,
        edit=edits.address,
        required_phrase=", {v}",
    ),
}

WORD_KINDS: dict[str, Kind] = {
    "hobby": Kind(
        family="hobby",
        slot="content",
        wordings=(
            "You love {v}: mention {v} in every answer.",
            "Your hobby is {v}. Bring up {v} each time you reply.",
            "You are mad about {v}. From now on, every answer of yours mentions {v}.",
        ),
        short="Hobby: {v}, always mentioned.",
        values=("tennis", "chess", "gardening"),
        check=content_checks.mentions,
        required_phrase="{v}",
    ),
    "keyword": Kind(
        family="content",
        slot="content",
        wordings=(
            'Use the word "{v}" in every answer.',
            'Each of your replies must have the word "{v}" in it.',
            'From now on, work the word "{v}" into each answer.',
        ),
        short='Word in every answer: "{v}".',
        values=("river", "perhaps", "remember"),
        check=content_checks.mentions,
        required_phrase="{v}",
    ),
    "forbidden": Kind(
        family="content",
        slot="forbidden",
        wordings=(
            'Never use the word "{v}" in your answers.',
            'Do without the word "{v}" in all your replies.',
            'From now on, the word "{v}" is forbidden.',
        ),
        short='Forbidden word: "{v}".',
        values=("very", "but", "is"),
        check=avoids(content_checks.mentions),
        prefix_fails=content_checks.mentions_in_prefix,
        forbids=content_checks.mentions,
    ),
    "no_letter": Kind(
        family="content",
        slot="forbidden",
        wordings=(
            'Never use the letter "{v}" in your answers.',
            'Write all your replies without the letter "{v}".',
            'From now on, use only words that have no "{v}" in them.',
        ),
        short='Forbidden letter: "{v}".',
        values=("z", "b"),
        check=avoids(content_checks.has_letters),
        prefix_fails=content_checks.has_letters,
        forbids=content_checks.has_letters,
    ),
    "number": Kind(
        family="content",
        slot="digits",
        wordings=(
            "Give at least one number in digits in every answer.",
            "Each of your replies must have a number in it, in digits.",
            "From now on, write some number in digits in each answer.",
        ),
        short="A number in digits.",
        check=content_checks.has_decimal,
    ),
    "no_digits": Kind(
        family="content",
        slot="digits",
        wordings=(
            "Never use digits in your answers; write numbers as words.",
            "Write every number as a word: no digits in your replies.",
            "From now on, spell all numbers out and use no digit.",
        ),
        short="No digits.",
        check=avoids(content_checks.has_digit),
        prefix_fails=content_checks.has_digit,
        forbids=content_checks.has_digit,
    ),
    "language": Kind(
        family="language",
        slot="language",
        wordings=(
            "Write every answer in {v}.",
            "Always reply in {v}, whatever language I use.",
            "From now on, speak {v} only.",
        ),
        short="Language: {v}.",
        values=tuple(LANGUAGES),
        accepts="listed",
        check=is_in_language,
    ),
}
