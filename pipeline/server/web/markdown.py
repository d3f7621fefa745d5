"""What models and users say, as HTML that cannot run: for the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from markdown_it import MarkdownIt

from pipeline.chat.conversation import Conversation, Mark

_MEANS = {
    "✓": "keeps the instruction",
    "✗": "does not keep the instruction",
    "~": "obeys, but is no answer",
    None: "not checked",
}
_CLASS = {"✓": "yes", "✗": "no", "~": "half", None: "none"}

# HTML in the text is shown as it is. Pictures are left out: to load one tells its host that somebody reads.
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable(["table", "strikethrough"])
    .disable("image")
)


def as_html(text: str) -> str:
    """Markdown as HTML, without anything in it that runs or loads."""
    return str(_MARKDOWN.render(text))


def meaning(mark: Mark | None, flaw: str) -> str:
    """A mark in words."""
    return f"{_MEANS[mark]} ({flaw})" if mark == "~" and flaw else _MEANS[mark]


def badge(mark: Mark | None, flaw: str) -> str:
    """The mark beside an answer; "" where there is none."""
    return (
        f'<span class="mark {_CLASS[mark]}" title="{escape(meaning(mark, flaw))}">{mark}</span>'
        if mark
        else ""
    )


def strip(name: str, chat: Conversation, verdicts: Sequence[tuple[Mark | None, str]]) -> str:
    """A model's name and one cell a turn; a cell tells its turn where it is pointed at, and leads to it."""
    marks = [mark for mark, _ in verdicts if mark]
    kept = f"kept {marks.count('✓')} of {len(marks)}" if marks else ""
    cells = []
    for number, ((mark, flaw), turn) in enumerate(zip(verdicts, chat.turns, strict=True), 1):
        said = " ".join(turn.user.split())
        tip = f"Turn {number} {meaning(mark, flaw)}: {said[:80]}{'…' * (len(said) > 80)}"
        cells.append(
            f'<button type="button" class="cell {_CLASS[mark]}" data-turn="{number}" data-tip="{escape(tip)}" '
            f'aria-label="{escape(tip)}">{mark or "·"}</button>'
        )
    return f'<b title="{escape(name)}">{escape(name)}</b><span class="cells">{"".join(cells)}</span><small>{kept}</small>'
