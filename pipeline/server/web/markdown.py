"""HTML of the page that contains text of models and users, from which nothing can run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from markdown_it import MarkdownIt

from pipeline.chat.conversation import Conversation, Mark, Verdict
from pipeline.chat.session import tally

_MEANINGS: dict[Mark | None, str] = {
    "✓": "follows the instruction",
    "✗": "does not follow the instruction",
    "~": "follows the instruction, but is not a valid answer",
    None: "not checked",
}
_CSS_CLASSES: dict[Mark | None, str] = {"✓": "yes", "✗": "no", "~": "partly", None: "unchecked"}
_MAX_TIP_CHARACTERS = 80

# HTML in the text is escaped. Images are off: loading one would tell its host that somebody reads.
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True})
    .enable(["table", "strikethrough"])
    .disable("image")
)


def to_html(text: str) -> str:
    """Return Markdown as HTML in which nothing runs or loads."""
    return str(_MARKDOWN.render(text))


def thoughts_to_html(text: str) -> str:
    """Return the content of a <details> element with a model's thoughts."""
    return f"<summary>Thoughts</summary><p>{escape(text.strip())}</p>"


def describe(verdict: Verdict) -> str:
    """Return what a verdict means."""
    meaning = _MEANINGS[verdict.mark]
    return f"{meaning} ({verdict.defect})" if verdict.mark == "~" else meaning


def badge(verdict: Verdict) -> str:
    """Return the mark next to an answer, or "" if it is not checked."""
    if not verdict.mark:
        return ""
    css_class, title = _CSS_CLASSES[verdict.mark], escape(describe(verdict))
    return f'<span class="mark {css_class}" title="{title}">{verdict.mark}</span>'


def strip(name: str, conversation: Conversation, verdicts: Sequence[Verdict]) -> str:
    """Return a model's name, a cell for each turn that links to it, and the model's tally."""
    cells: list[str] = []
    for number, (verdict, turn) in enumerate(zip(verdicts, conversation.turns, strict=True), 1):
        user = " ".join(turn.user.split())
        if len(user) > _MAX_TIP_CHARACTERS:
            user = f"{user[:_MAX_TIP_CHARACTERS]}…"
        tip = escape(f"Turn {number} {describe(verdict)}: {user}")
        cells.append(
            f'<button type="button" class="cell {_CSS_CLASSES[verdict.mark]}" '
            f'data-turn="{number}" data-tip="{tip}" aria-label="{tip}">'
            f"{verdict.mark or '·'}</button>"
        )
    count = tally(verdicts)
    return (
        f'<b title="{escape(name)}">{escape(name)}</b>'
        f'<span class="cells">{"".join(cells)}</span>'
        f"<small>{f'followed {count}' if count else ''}</small>"
    )
