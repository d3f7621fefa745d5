"""The kinds of constraint on the shape of an answer: length, layout, and what encloses it."""

from __future__ import annotations

from pipeline.gatt.constraints import edits, format_checks
from pipeline.gatt.constraints.base import Kind

LENGTH_KINDS: dict[str, Kind] = {
    "max_words": Kind(
        family="length",
        slot="length",
        wordings=(
            "Use at most {v} words in every answer.",
            "Keep each of your replies to {v} words or fewer.",
            "From now on, no answer is longer than {v} words.",
        ),
        short="At most {v} words.",
        values=("12", "20"),
        accepts="number",
        check=format_checks.at_most_words,
        edit=edits.cut_words,
        prefix_fails=format_checks.too_many_words,
    ),
    "min_words": Kind(
        family="length",
        slot="length",
        wordings=(
            "Use at least {v} words in every answer.",
            "Each of your replies must have {v} words or more.",
            "From now on, no answer is shorter than {v} words.",
        ),
        short="At least {v} words.",
        values=("20", "40"),
        accepts="number",
        check=format_checks.at_least_words,
    ),
    "one_sentence": Kind(
        family="length",
        slot="length",
        wordings=(
            "Answer in one sentence, always.",
            "Each of your replies is a single sentence.",
            "From now on, every answer is exactly one sentence.",
        ),
        short="One sentence.",
        check=lambda v, t: format_checks.exactly_sentences("1", t),
        edit=lambda v, t: edits.cut_sentences("1", t),
        prefix_fails=lambda v, t: format_checks.too_many_sentences("1", t),
    ),
    "max_sentences": Kind(
        family="length",
        slot="length",
        wordings=(
            "Use at most {v} sentences in every answer.",
            "Keep each of your replies to {v} sentences or fewer.",
            "From now on, no answer has more than {v} sentences.",
        ),
        short="At most {v} sentences.",
        values=("2", "3"),
        accepts="number",
        check=format_checks.at_most_sentences,
        edit=edits.cut_sentences,
        prefix_fails=format_checks.too_many_sentences,
    ),
    "sentences": Kind(
        family="length",
        slot="length",
        wordings=(
            "Write every answer in exactly {v} sentences.",
            "Each of your replies has exactly {v} sentences.",
            "From now on, answer in {v} sentences, no more and no fewer.",
        ),
        short="Exactly {v} sentences.",
        values=("2", "3"),
        accepts="number",
        check=format_checks.exactly_sentences,
        prefix_fails=format_checks.too_many_sentences,
    ),
}

LAYOUT_KINDS: dict[str, Kind] = {
    "lines": Kind(
        family="format",
        slot="layout",
        wordings=(
            "Write every answer in exactly {v} lines.",
            "Each of your replies has exactly {v} lines.",
            "From now on, answer in {v} lines, no more and no fewer.",
        ),
        short="Exactly {v} lines.",
        values=("2", "3"),
        accepts="number",
        check=format_checks.exactly_lines,
        prefix_fails=format_checks.too_many_lines,
    ),
    "paragraphs": Kind(
        family="format",
        slot="layout",
        wordings=(
            "Write every answer in exactly {v} paragraphs, with a blank line between them.",
            "Each of your replies has exactly {v} paragraphs, set apart by blank lines.",
            "From now on, answer in {v} paragraphs with a blank line after each but the last.",
        ),
        short="Exactly {v} paragraphs.",
        values=("2", "3"),
        accepts="number",
        check=format_checks.exactly_paragraphs,
        prefix_fails=format_checks.too_many_paragraphs,
    ),
    "one_paragraph": Kind(
        family="format",
        slot="layout",
        wordings=(
            "Write every answer as one paragraph without a line break.",
            "Never break the line in your replies.",
            "From now on, keep each answer on one single line.",
        ),
        short="One paragraph, no line breaks.",
        check=format_checks.is_one_line,
        edit=edits.join_lines,
        prefix_fails=format_checks.has_more_lines,
    ),
    "numbered_list": Kind(
        family="format",
        slot="layout",
        wordings=(
            "Give every answer as a numbered list and nothing else; a single point is numbered "
            "too.",
            "Number each line of your replies, from 1 on.",
            "From now on, every answer is a list numbered from 1.",
        ),
        short="Numbered list.",
        check=format_checks.is_numbered_list,
        edit=edits.number_sentences,
        prefix_fails=format_checks.is_numbered_list_cannot_pass,
        required_phrase="1",
    ),
    "bullet_list": Kind(
        family="format",
        slot="layout",
        wordings=(
            "Give every answer as a bullet list and nothing else; a single point gets a bullet "
            "too.",
            "Begin each line of your replies with a bullet.",
            "From now on, every answer is a list of bullet points.",
        ),
        short="Bullet list.",
        check=format_checks.is_bullet_list,
        edit=edits.bullet_sentences,
        prefix_fails=format_checks.is_bullet_list_cannot_pass,
    ),
    "block_quote": Kind(
        family="format",
        slot="layout",
        wordings=(
            'Begin every line of your answers with ">".',
            'Put ">" in front of each line of your replies.',
            'From now on, write each answer as a Markdown block quote, with ">" before every line.',
        ),
        short='Every line after ">".',
        check=format_checks.is_block_quote,
        edit=edits.quote_lines,
        prefix_fails=format_checks.is_block_quote_cannot_pass,
    ),
    "heading": Kind(
        family="format",
        slot="heading",
        wordings=(
            'Put the heading "# {v}" on a line of its own above every answer.',
            'Let each of your replies start with the line "# {v}"',
            'From now on, the first line of each answer is "# {v}"',
        ),
        short='Heading: "# {v}"',
        values=("Answer", "In Short"),
        check=format_checks.has_heading,
        edit=edits.add_heading,
        prefix_fails=format_checks.has_heading_cannot_pass,
        required_phrase="# {v}",
    ),
    "quotes": Kind(
        family="format",
        slot="wrap",
        wordings=(
            "Put every answer in double quotation marks.",
            "Wrap each of your replies in double quotes.",
            "From now on, let double quotation marks stand around each answer.",
        ),
        short="Answers in double quotes.",
        check=format_checks.is_quoted,
        edit=edits.quote,
        prefix_fails=format_checks.is_quoted_cannot_pass,
    ),
    "brackets": Kind(
        family="format",
        slot="wrap",
        wordings=(
            "Put every answer in {v}.",
            "Wrap each of your replies in {v}.",
            "From now on, let {v} stand around each answer.",
        ),
        short="Answers in {v}.",
        values=tuple(format_checks.BRACKETS),
        accepts="listed",
        check=format_checks.is_bracketed,
        edit=edits.bracket,
        prefix_fails=format_checks.is_bracketed_cannot_pass,
    ),
    "code_block": Kind(
        family="format",
        slot="wrap",
        wordings=(
            "Put every answer in a code block, between two lines of ```.",
            "Each of your replies is one fenced code block: ```.",
            "From now on, write each answer between a line of ``` and another line of ```.",
        ),
        short="Answers in a ``` block.",
        check=format_checks.is_code_block,
        edit=edits.fence,
        prefix_fails=format_checks.is_code_block_cannot_pass,
    ),
    "json": Kind(
        family="format",
        slot="json",
        wordings=(
            'Give every answer as a JSON object with the single key "{v}" and nothing around it.',
            'Each of your replies is a JSON object whose only key is "{v}".',
            'From now on, answer with JSON alone: one object, one key "{v}", and a text as its '
            "value.",
        ),
        short='JSON object with the key "{v}".',
        values=("answer", "reply"),
        check=format_checks.is_json,
        edit=edits.to_json,
        prefix_fails=format_checks.is_json_cannot_pass,
        required_phrase='"{v}"',
    ),
}
