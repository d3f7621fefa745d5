"""One turn on the page: the user's message, and the models' answers beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from pipeline.chat.conversation import CHANGE_PREFIX, Mark
from pipeline.server.web.markdown import as_html, badge, meaning
from pipeline.server.web.session import Heard, Talk


class TurnView:
    """The turn `number` (from 1) of `talk`, or its next one, which answers `user`."""

    def __init__(self, number: int, talk: Talk, user: str | None = None) -> None:
        turns = talk.chat.turns
        turn = turns[number - 1] if user is None else None
        told = turn.instruction if turn else talk.chat.instruction
        before = turns[number - 2].instruction if number > 1 else None
        self._root = (
            ui.element("article")
            .classes("turn")
            .props(f'id=turn-{number} aria-label="Turn {number}"')
        )
        self._words: list[ui.html] = []
        self._badges: list[ui.html] = []
        self._notes: list[ui.label] = []
        self._shown = [""] * len(talk.models)
        with self._root:
            with ui.element("div").classes("said"):
                ui.label(turn.user if turn else user or "")
                if told.text and told != before:
                    ui.label(told.text if number == 1 else f"{CHANGE_PREFIX}{told.text}").classes(
                        "told"
                    )
            with ui.element("div").classes(f"answers of-{len(talk.models)}"):
                for side, name in enumerate(talk.models):
                    self._answer(name, turn.answers[side] if turn else "")
        if turn is None:
            self._root.classes("comes").props("aria-busy=true")

    def _answer(self, name: str, text: str) -> None:
        with ui.element("section").classes("answer") as section:
            section.props["aria-label"] = name
            with ui.element("header"):
                ui.label(name).classes("who")
                self._badges.append(ui.html(sanitize=True, tag="span"))
            self._words.append(ui.html(as_html(text), sanitize=True).classes("words"))
            self._notes.append(ui.label().classes("note"))

    def show(self, texts: Sequence[str]) -> None:
        """The answers as far as they have come."""
        for side, text in enumerate(texts):
            if text != self._shown[side]:
                self._shown[side] = text
                self._words[side].set_content(as_html(text))

    def mark(self, side: int, mark: Mark | None, flaw: str) -> None:
        """Whether the answer keeps the instruction."""
        self._badges[side].set_content(badge(mark, flaw))
        if mark == "~":
            self._notes[side].set_text(
                " · ".join(filter(None, (meaning(mark, flaw), self._notes[side].text)))
            )

    def finish(self, heard: Sequence[Heard], most: int) -> None:
        """The answers as they ended; `most` is the tokens that they could have."""
        self.show([one.text for one in heard])
        self._root.classes(remove="comes").props(remove="aria-busy")
        cut = {"cancelled": "stopped", "length": f"cut at {most} tokens"}
        for note, one in zip(self._notes, heard, strict=True):
            note.set_text(cut.get(one.finish, ""))

    def remove(self) -> None:
        """Take it off the page."""
        self._root.delete()
