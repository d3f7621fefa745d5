"""The turns on the page: each is a user's message and the models' answers, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from pipeline.chat.conversation import StandingInstruction, Verdict
from pipeline.chat.session import cut_note
from pipeline.gatt.ghost import CHANGE_PREFIX
from pipeline.inference.request import TextPiece
from pipeline.records import Completion
from pipeline.server.web.markdown import badge, describe, thoughts_to_html, to_html
from pipeline.server.web.stored_chats import PageChat


class TurnView:
    """Turn `number` of `chat`, from 1; or its next turn, for which `user` is sent."""

    def __init__(self, chat: PageChat, number: int, user: str | None = None) -> None:
        conversation = chat.conversation
        turn = conversation.turns[number - 1] if user is None else None
        self._texts = list(turn.answers) if turn else [""] * len(chat.models)
        self._painted = list(self._texts)
        self._thoughts = [""] * len(self._texts)
        self._thought_views: list[ui.html] = []
        self._answers: list[ui.html] = []
        self._badges: list[ui.html] = []
        self._notes: list[ui.label] = []
        self._root = ui.element("article").classes("turn")
        self._root.props(f'id=turn-{number} aria-label="Turn {number}"')
        with self._root:
            with ui.element("div").classes("user"):
                ui.label(turn.user if turn else user or "")
                instruction = turn.instruction if turn else conversation.instruction
                previous = conversation.turns[number - 2].instruction if number > 1 else None
                _show_instruction(instruction, previous)
            with ui.element("div").classes(f"answers of-{len(chat.models)}"):
                for name, text in zip(chat.models, self._texts, strict=True):
                    self._add_answer(name, text)
        if turn is None:
            self._root.classes("streaming").props("aria-busy=true")

    def _add_answer(self, name: str, text: str) -> None:
        with ui.element("section").classes("answer") as section:
            section.props["aria-label"] = name
            with ui.element("header"):
                ui.label(name)
                self._badges.append(ui.html(sanitize=True, tag="span"))
            thoughts = ui.html(sanitize=True, tag="details").classes("thoughts")
            thoughts.set_visibility(False)
            self._thought_views.append(thoughts)
            self._answers.append(ui.html(to_html(text), sanitize=True).classes("markdown"))
            self._notes.append(ui.label().classes("note"))

    def add_text(self, model_index: int, piece: TextPiece) -> None:
        """Append a piece to an answer or its thoughts; `paint` shows it."""
        self._texts[model_index] += piece.text
        self._thoughts[model_index] += piece.thoughts

    def paint(self) -> None:
        """Show the answers as they are now."""
        for index, text in enumerate(self._texts):
            if text != self._painted[index]:
                self._painted[index] = text
                self._answers[index].set_content(to_html(text))
        for view, thoughts in zip(self._thought_views, self._thoughts, strict=True):
            if thoughts:
                view.set_visibility(True)
                view.set_content(thoughts_to_html(thoughts))

    def mark(self, model_index: int, verdict: Verdict) -> None:
        """Show whether an answer follows the instruction."""
        self._badges[model_index].set_content(badge(verdict))
        if verdict.mark == "~":
            note = self._notes[model_index]
            note.set_text(" · ".join(filter(None, (describe(verdict), note.text))))

    def finish(self, completions: Sequence[Completion], max_tokens: int) -> None:
        """Show how the answers ended, of which each could have `max_tokens`."""
        self.paint()
        self._root.classes(remove="streaming").props(remove="aria-busy")
        for note, completion in zip(self._notes, completions, strict=True):
            note.set_text(cut_note(completion, max_tokens))

    def remove(self) -> None:
        """Remove the turn from the page."""
        self._root.delete()


def _show_instruction(
    instruction: StandingInstruction, previous: StandingInstruction | None
) -> None:
    """Show an instruction in the turn in which it is given; `previous` is None in turn 1."""
    if instruction.text and instruction != previous:
        prefix = "" if previous is None else CHANGE_PREFIX
        ui.label(f"{prefix}{instruction.text}").classes("new-instruction")
