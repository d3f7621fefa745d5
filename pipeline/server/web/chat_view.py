"""What a tab shows of its chat: turns, marks, buttons, and the state of the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nicegui import Client, ui

from pipeline.errors import GattError
from pipeline.records import Completion
from pipeline.server.web.layout import Layout
from pipeline.server.web.stored_chats import PageChat
from pipeline.server.web.turn_view import TurnView

_NEARLY_FULL = 0.8
"""Share of the context from which on the page says how much is left."""
_WARNING_MILLISECONDS = 8000


class ChatView:
    """Shows a chat in the `layout` of one tab, whose browser is `client`."""

    def __init__(self, layout: Layout, client: Client) -> None:
        self._layout, self._client = layout, client
        self._turns: list[TurnView] = []

    def show(self, chat: PageChat) -> None:
        """Show a chat from its first turn on."""
        conversation, layout = chat.conversation, self._layout
        numbers = range(1, len(conversation.turns) + 1)
        layout.turns.clear()
        with layout.turns:
            if not numbers:
                layout.welcome()
            self._turns = [TurnView(chat, number) for number in numbers]
        for number in numbers:
            self._mark_turn(chat, number)
        layout.show_models(chat.models)
        layout.instruction.set_value(conversation.instruction.text)
        self.show_state(chat)

    def start_turn(self, chat: PageChat, user: str) -> TurnView:
        """Show a message whose answers are being generated."""
        number = len(chat.conversation.turns) + 1
        if number == 1:
            self._layout.turns.clear()
        with self._layout.turns:
            view = TurnView(chat, number, user)
        self.show_answering()
        return view

    def finish_turn(
        self, chat: PageChat, view: TurnView, completions: Sequence[Completion], max_tokens: int
    ) -> None:
        """Show the verdicts on the answers of the chat's last turn, and how they ended."""
        view.finish(completions, max_tokens)
        self._turns.append(view)
        self._mark_turn(chat, len(self._turns))
        self.show_state(chat)

    def remove_last_turn(self) -> None:
        """Remove the last turn from the page."""
        self._turns.pop().remove()

    def show_state(self, chat: PageChat) -> None:
        """Update the strips, the buttons, and how the instruction is checked."""
        self._layout.show_strips(chat)
        self._layout.describe_instruction(chat.conversation)
        self._layout.enable_buttons(
            answering=chat.is_answering,
            has_turns=bool(chat.conversation.turns),
            is_served=chat.is_served,
        )

    def show_answering(self) -> None:
        """Offer the button that stops the answers."""
        self._layout.enable_buttons(answering=True, has_turns=True, is_served=True)

    async def show_context(self, chat: PageChat) -> None:
        """Show how much of the context is used."""
        if not chat.is_served:
            names = " and ".join(chat.models)
            self._layout.set_status(f"Not served now: {names}. Choose a model for a new chat.")
            return
        try:
            used, context = await chat.tokens_used(), chat.backend.context
        except GattError as error:  # the chat template refuses the chat, or fails
            self._layout.set_status(" ".join(str(error).split()), warn=True)
            return
        if used + chat.sampling.max_tokens > _NEARLY_FULL * context:
            text = f"Nearly full: {context - used} of {context} tokens left."
            self._layout.set_status(f"{text} Nothing is dropped without asking.", warn=True)
        else:
            self._layout.set_status(f"{used} of {context} tokens")

    def warn(self, text: str) -> None:
        """Show what went wrong."""
        with self._client:
            ui.notify(
                text,
                type="warning",
                position="top",
                multi_line=True,
                close_button="Close",
                timeout=_WARNING_MILLISECONDS,
            )

    @contextmanager
    def warning(self) -> Iterator[None]:
        """Show what the engine refuses in this block."""
        try:
            yield
        except (GattError, RuntimeError) as error:
            self.warn(" ".join(str(error).split()))

    def focus(self) -> None:
        """Move the keyboard to the message box."""
        self._client.run_javascript("chat.focus()")

    def _mark_turn(self, chat: PageChat, number: int) -> None:
        for model_index, verdicts in enumerate(chat.verdicts()):
            self._turns[number - 1].mark(model_index, verdicts[number - 1])
