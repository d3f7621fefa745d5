"""The table of the kinds of constraint: how each is worded, checked and edited."""

from __future__ import annotations

from pipeline.gatt.constraints import content_checks, edits, format_checks
from pipeline.gatt.constraints.base import Check, Edit, Kind
from pipeline.gatt.constraints.language import LANGUAGES, language_of


def _ban(
    family: str, slot: str, wordings: tuple[str, ...], short: str, forbids: Check, apply: Edit | None = None,
    values: tuple[str, ...] = ("",), prefix_fails: Check | None = None,
) -> Kind:  # fmt: skip
    """A kind that only bans: an answer obeys when it is not blank and has nothing banned in it."""
    return Kind(
        family, slot, wordings, short, lambda v, t: bool(t.strip()) and not forbids(v, t), apply, values,
        prefix_fails=prefix_fails or forbids, forbids=forbids,
    )  # fmt: skip


_PHRASES: dict[str, Kind] = {
    "opening": Kind(
        "phrase", "opening",
        ('Begin every answer with "{v}"', 'Always start your replies with "{v}"', 'From now on, open each answer with "{v}"'),
        'Opening: "{v}"', content_checks.opens, lambda v, t: f"{v} {t.lstrip()}", ("Ahoy!", "Hark!", "Good news:", "Well, well!"),
        prefix_fails=content_checks.opens_hopeless, required_phrase="{v}",
    ),
    "closing": Kind(
        "phrase", "closing",
        ('End every answer with "{v}"', 'Always close your replies with "{v}"', 'From now on, finish each answer with "{v}"'),
        'Closing: "{v}"', content_checks.closes, lambda v, t: f"{t.rstrip()} {v}", ("Over and out.", "Stay curious!", "So it goes."),
        required_phrase="{v}",
    ),
    "persona": Kind(
        "persona", "opening",
        ('Act as {v} and begin every answer with "{v}:"', 'You are {v}. Start each reply with "{v}:"'),
        "Figure: {v}, named first.", lambda v, t: content_checks.opens(f"{v}:", t), lambda v, t: f"{v}: {t.lstrip()}",
        ("Captain Nemo", "Napoleon", "Ada Lovelace"), prefix_fails=lambda v, t: content_checks.opens_hopeless(f"{v}:", t), required_phrase="{v}:",
    ),
    "signature": Kind(
        "phrase", "closing",
        ('Sign every answer with "- {v}" on a line of its own.', 'Put "- {v}" alone on the last line of each reply.',
         'From now on, let a last line that says only "- {v}" follow each answer.'),
        "Signature: - {v}, on the last line.", content_checks.signed, lambda v, t: f"{t.rstrip()}\n- {v}", ("Ada", "Your pen pal"),
        required_phrase="- {v}",
    ),
    "hashtag": Kind(
        "phrase", "closing",
        ("End every answer with the hashtag #{v}", "Always put #{v} at the very end of your replies",
         "From now on, finish each answer with #{v}"),
        "Hashtag at the end: #{v}", lambda v, t: content_checks.closes(f"#{v}", t), lambda v, t: f"{t.rstrip()} #{v}",
        ("TodayILearned", "goodtoknow"), required_phrase="#{v}",
    ),
    "postscript": Kind(
        "phrase", "closing",
        ('End every answer with a postscript that starts with "P.S."', 'Always close your replies with a line after "P.S."',
         'From now on, put a "P.S." with one more remark at the end of each answer.'),
        "A P.S. at the end.", content_checks.has_postscript, required_phrase="P.S.",
    ),
    "question": Kind(
        "phrase", "closing",
        ("End every answer with a question.", "Always close your replies with a question.",
         "From now on, let a question be the last thing in each answer."),
        "Ends with a question.", content_checks.ends_with_question, required_phrase="?",
    ),
    "initial": Kind(
        "phrase", "opening",
        ("Begin every answer with a word that starts with the letter {v}.", "Let the first letter of each reply be {v}.",
         "From now on, the first word of each answer starts with {v}."),
        "First letter: {v}.", content_checks.begins_with_letters, values=("S", "T"), prefix_fails=content_checks.begins_with_letters_hopeless,
        required_phrase="{v}",
    ),
    "address": Kind(
        "phrase", "address",
        ('Call me "{v}" in every answer.', 'Address me as "{v}" each time you reply.', 'From now on, always call me "{v}".'),
        'Form of address: "{v}".', content_checks.mentions, edits.address, ("my friend", "captain", "Your Highness"), required_phrase=", {v}",
    ),
}  # fmt: skip

_CONTENT: dict[str, Kind] = {
    "hobby": Kind(
        "hobby", "content",
        ("You love {v}: mention {v} in every answer.", "Your hobby is {v}. Bring up {v} each time you reply.",
         "You are mad about {v}. From now on, every answer of yours mentions {v}."),
        "Hobby: {v}, always mentioned.", content_checks.mentions, values=("tennis", "chess", "gardening"), required_phrase="{v}",
    ),
    "keyword": Kind(
        "content", "content",
        ('Use the word "{v}" in every answer.', 'Each of your replies must have the word "{v}" in it.',
         'From now on, work the word "{v}" into each answer.'),
        'Word in every answer: "{v}".', content_checks.mentions, values=("river", "perhaps", "remember"), required_phrase="{v}",
    ),
    "forbidden": _ban(
        "content", "forbidden",
        ('Never use the word "{v}" in your answers.', 'Do without the word "{v}" in all your replies.',
         'From now on, the word "{v}" is forbidden.'),
        'Forbidden word: "{v}".', content_checks.mentions, values=("very", "but", "is"), prefix_fails=content_checks.mentions_for_good,
    ),
    "no_letter": _ban(
        "content", "forbidden",
        ('Never use the letter "{v}" in your answers.', 'Write all your replies without the letter "{v}".',
         'From now on, use only words that have no "{v}" in them.'),
        'Forbidden letter: "{v}".', content_checks.has_letters, values=("z", "b"),
    ),
    "number": Kind(
        "content", "digits",
        ("Give at least one number in digits in every answer.", "Each of your replies must have a number in it, in digits.",
         "From now on, write some number in digits in each answer."),
        "A number in digits.", lambda v, t: any(map(str.isdecimal, t)),
    ),
    "no_digits": _ban(
        "content", "digits",
        ("Never use digits in your answers; write numbers as words.", "Write every number as a word: no digits in your replies.",
         "From now on, spell all numbers out and use no digit."),
        "No digits.", content_checks.has_digit,
    ),
    "language": Kind(
        "language", "language",
        ("Write every answer in {v}.", "Always reply in {v}, whatever language I use.", "From now on, speak {v} only."),
        "Language: {v}.", lambda v, t: language_of(t) == v, values=tuple(LANGUAGES), accepts="listed",
    ),
}  # fmt: skip

_STYLE: dict[str, Kind] = {
    "uppercase": Kind(
        "style", "case",
        ("Write every answer in capital letters only.", "Use no small letters in your replies, only capitals.",
         "From now on, answer in capitals throughout."),
        "Capitals only.", content_checks.is_uppercase, lambda v, t: t.upper(),
        prefix_fails=content_checks.has_small_letter, forbids=content_checks.has_small_letter,
    ),
    "lowercase": Kind(
        "style", "case",
        ("Write every answer in lowercase letters only.", "Use no capital letters in your replies.",
         "From now on, answer in small letters throughout."),
        "Lowercase only.", content_checks.is_lowercase, lambda v, t: t.lower(), prefix_fails=content_checks.has_capital, forbids=content_checks.has_capital,
    ),
    "title_case": Kind(
        "style", "case",
        ("Begin every word of your answers with a capital letter.", "Capitalize each word in all your replies.",
         "From now on, let every single word start with a capital."),
        "Every Word Capitalized.", content_checks.is_title_case, edits.title,
        prefix_fails=content_checks.has_small_initial, forbids=content_checks.has_small_initial,
    ),
    "no_commas": _ban(
        "style", "punctuation",
        ("Never use a comma in your answers.", "Write all your replies without commas.", "From now on, do without commas."),
        "No commas.", content_checks.has_comma, edits.drop_commas,
    ),
    "no_exclamation": _ban(
        "style", "punctuation",
        ("Never use an exclamation mark in your answers.", "Write all your replies without exclamation marks.",
         "From now on, do without exclamation marks."),
        "No exclamation marks.", content_checks.has_exclamation_mark, edits.calm,
    ),
    "no_questions": _ban(
        "style", "punctuation",
        ("Never use a question mark in your answers.", "Write all your replies without question marks.",
         "From now on, do without question marks."),
        "No question marks.", content_checks.has_question_mark,
    ),
    "exclamations": Kind(
        "style", "ends",
        ("End every sentence with an exclamation mark.", "In your replies, each sentence ends with an exclamation mark.",
         "From now on, put an exclamation mark where a full stop or question mark would be."),
        "Exclamation marks only.", content_checks.exclaims, edits.exclaim,
        prefix_fails=content_checks.exclaims_hopeless, forbids=content_checks.has_other_end, required_phrase="!",
    ),
    "emoji": Kind(
        "style", "emoji",
        ("Use at least one emoji in every answer.", "Put an emoji in each of your replies.",
         "From now on, no answer without an emoji."),
        "With an emoji.", content_checks.has_emoji, edits.add_emoji, required_phrase="🙂",
    ),
    "no_emoji": _ban(
        "style", "no_emoji",
        ("Never use emoji in your answers.", "Write all your replies without emoji.", "From now on, do without emoji."),
        "No emoji.", content_checks.has_emoji, edits.drop_emoji,
    ),
    "style": Kind(
        "style", "content",
        ("In all your answers, {v}.", "Always {v} when you reply.", "From now on, {v} in each answer."),
        "Style: {v}.", lambda v, t: bool(t.strip()), values=("talk like a pirate", "speak as if to a child"), judged=True,
    ),
    "bold": Kind(
        "style", "bold",
        ("Put at least one word of every answer in bold, **like this**.", "Each of your replies has a word in **bold**.",
         "From now on, make a word **bold** in each answer."),
        "With a word in **bold**.", content_checks.has_bold, edits.bold,
    ),
}  # fmt: skip

_LENGTH: dict[str, Kind] = {
    "max_words": Kind(
        "length", "length",
        ("Use at most {v} words in every answer.", "Keep each of your replies to {v} words or fewer.",
         "From now on, no answer is longer than {v} words."),
        "At most {v} words.", content_checks.at_most_words, edits.cut_words, ("12", "20"), "number", content_checks.too_many_words,
    ),
    "min_words": Kind(
        "length", "length",
        ("Use at least {v} words in every answer.", "Each of your replies must have {v} words or more.",
         "From now on, no answer is shorter than {v} words."),
        "At least {v} words.", content_checks.at_least_words, None, ("20", "40"), "number",
    ),
    "one_sentence": Kind(
        "length", "length",
        ("Answer in one sentence, always.", "Each of your replies is a single sentence.",
         "From now on, every answer is exactly one sentence."),
        "One sentence.", lambda v, t: content_checks.exactly_sentences("1", t), lambda v, t: edits.cut_sentences("1", t),
        prefix_fails=lambda v, t: content_checks.too_many_sentences("1", t),
    ),
    "max_sentences": Kind(
        "length", "length",
        ("Use at most {v} sentences in every answer.", "Keep each of your replies to {v} sentences or fewer.",
         "From now on, no answer has more than {v} sentences."),
        "At most {v} sentences.", content_checks.at_most_sentences, edits.cut_sentences, ("2", "3"), "number", content_checks.too_many_sentences,
    ),
    "sentences": Kind(
        "length", "length",
        ("Write every answer in exactly {v} sentences.", "Each of your replies has exactly {v} sentences.",
         "From now on, answer in {v} sentences, no more and no fewer."),
        "Exactly {v} sentences.", content_checks.exactly_sentences, None, ("2", "3"), "number", content_checks.too_many_sentences,
    ),
}  # fmt: skip

_LAYOUT: dict[str, Kind] = {
    "lines": Kind(
        "format", "layout",
        ("Write every answer in exactly {v} lines.", "Each of your replies has exactly {v} lines.",
         "From now on, answer in {v} lines, no more and no fewer."),
        "Exactly {v} lines.", content_checks.exactly_lines, None, ("2", "3"), "number", content_checks.too_many_lines,
    ),
    "paragraphs": Kind(
        "format", "layout",
        ("Write every answer in exactly {v} paragraphs, with a blank line between them.",
         "Each of your replies has exactly {v} paragraphs, set apart by blank lines.",
         "From now on, answer in {v} paragraphs with a blank line after each but the last."),
        "Exactly {v} paragraphs.", content_checks.exactly_paragraphs, None, ("2", "3"), "number", content_checks.too_many_paragraphs,
    ),
    "one_paragraph": Kind(
        "format", "layout",
        ("Write every answer as one paragraph without a line break.", "Never break the line in your replies.",
         "From now on, keep each answer on one single line."),
        "One paragraph, no line breaks.", content_checks.is_one_line, edits.join_lines, prefix_fails=content_checks.has_more_lines,
    ),
    "numbered_list": Kind(
        "format", "layout",
        ("Give every answer as a numbered list and nothing else; a single point is numbered too.",
         "Number each line of your replies, from 1 on.", "From now on, every answer is a list numbered from 1."),
        "Numbered list.", format_checks.is_numbered_list, edits.number_sentences, prefix_fails=format_checks.is_numbered_list_hopeless, required_phrase="1",
    ),
    "bullet_list": Kind(
        "format", "layout",
        ("Give every answer as a bullet list and nothing else; a single point gets a bullet too.",
         "Begin each line of your replies with a bullet.", "From now on, every answer is a list of bullet points."),
        "Bullet list.", format_checks.is_bullet_list, edits.bullet_sentences, prefix_fails=format_checks.is_bullet_list_hopeless,
    ),
    "block_quote": Kind(
        "format", "layout",
        ('Begin every line of your answers with ">".', 'Put ">" in front of each line of your replies.',
         'From now on, write each answer as a Markdown block quote, with ">" before every line.'),
        'Every line after ">".', format_checks.is_block_quote, edits.quote_lines, prefix_fails=format_checks.is_block_quote_hopeless,
    ),
    "heading": Kind(
        "format", "heading",
        ('Put the heading "# {v}" on a line of its own above every answer.', 'Let each of your replies start with the line "# {v}"',
         'From now on, the first line of each answer is "# {v}"'),
        'Heading: "# {v}"', format_checks.is_headed, lambda v, t: f"# {v}\n\n{t.strip()}", ("Answer", "In Short"),
        prefix_fails=format_checks.is_headed_hopeless, required_phrase="# {v}",
    ),
    "quotes": Kind(
        "format", "wrap",
        ("Put every answer in double quotation marks.", "Wrap each of your replies in double quotes.",
         "From now on, let double quotation marks stand around each answer."),
        "Answers in double quotes.", format_checks.is_quoted, edits.quote, prefix_fails=format_checks.is_quoted_hopeless,
    ),
    "brackets": Kind(
        "format", "wrap",
        ("Put every answer in {v}.", "Wrap each of your replies in {v}.", "From now on, let {v} stand around each answer."),
        "Answers in {v}.", format_checks.is_bracketed, edits.bracket, tuple(format_checks.BRACKETS), "listed", format_checks.is_bracketed_hopeless,
    ),
    "code_block": Kind(
        "format", "wrap",
        ("Put every answer in a code block, between two lines of ```.", "Each of your replies is one fenced code block: ```.",
         "From now on, write each answer between a line of ``` and another line of ```."),
        "Answers in a ``` block.", format_checks.is_code_block, edits.fence, prefix_fails=format_checks.is_code_block_hopeless,
    ),
    "json": Kind(
        "format", "json",
        ('Give every answer as a JSON object with the single key "{v}" and nothing around it.',
         'Each of your replies is a JSON object whose only key is "{v}".',
         'From now on, answer with JSON alone: one object, one key "{v}", and a text as its value.'),
        'JSON object with the key "{v}".', format_checks.is_json, edits.to_json, ("answer", "reply"),
        prefix_fails=format_checks.is_json_hopeless, required_phrase='"{v}"',
    ),
}  # fmt: skip

KINDS: dict[str, Kind] = {**_PHRASES, **_CONTENT, **_STYLE, **_LENGTH, **_LAYOUT}
