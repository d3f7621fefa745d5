"""The page of one browser tab: a chat with one model or two, and what the user can do with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

from nicegui import background_tasks, events, ui

from pipeline.chat.conversation import NO_INSTRUCTION, StandingInstruction, parse_conversation
from pipeline.chat.files import parse_chat
from pipeline.errors import GattError
from pipeline.inference.async_engine import AsyncEngine
from pipeline.records import Completion
from pipeline.server.web.chat_view import ChatView
from pipeline.server.web.dialogs import choose, choose_room, edit_settings
from pipeline.server.web.layout import Layout
from pipeline.server.web.stored_chats import ChatStore, PageChat
from pipeline.server.web.theme import apply_theme
from pipeline.server.web.turn_view import TurnView

_SECONDS_BETWEEN_PAINTS = 0.08
"""While an answer is generated: smooth to the eye, and slow enough for a phone."""

_TABS: WeakSet[ChatPage] = WeakSet()
"""All open tabs; those of one browser show the same chats."""


class ChatPage:
    """The content of one tab. `storage` is the browser's, with its chats and theme."""

    def __init__(
        self, engine: AsyncEngine, storage: dict[str, Any], reports: Mapping[str, Path]
    ) -> None:
        self._engine, self._reports = engine, reports
        self._store = ChatStore(engine, storage)
        self._chat = self._store.load_last()

    def build(self) -> None:
        """Add the content to the present page."""
        dark = self._store.storage.get("dark")
        self._dark = apply_theme(dark=dark)
        self._client = ui.context.client
        self._layout = Layout(self._engine.names, list(self._reports), self, dark=dark)
        self._view = ChatView(self._layout, self._client)
        self._show()
        _TABS.add(self)
        self._client.on_connect(self._catch_up)
        self._client.on_disconnect(lambda: self._chat.stop())

    async def _catch_up(self) -> bool:
        """Show what another tab, or this one before a reload, has changed; return whether it has.

        If it has deleted the chat, show a new one.
        """
        if self._store.is_deleted(self._chat) and not self._chat.is_answering:
            await self.begin()
            return True
        newer = None if self._chat.is_answering else self._store.load_newer(self._chat)
        if newer:
            self._chat = newer
            self._show()
        self._list_chats()
        await self._view.show_context(self._chat)
        return newer is not None

    def _save(self, chat: PageChat) -> None:
        """Store the chat, and update the browser's other tabs."""
        self._store.save(chat)
        self._list_chats()
        self._update_other_tabs()

    def _update_other_tabs(self) -> None:
        for tab in list(_TABS):
            is_same_browser = tab._store.storage is self._store.storage
            if tab is not self and is_same_browser and not tab._client.is_deleted:
                background_tasks.create(tab._catch_up())

    def _show(self) -> None:
        self._store.set_open(self._chat)
        self._view.show(self._chat)
        self._list_chats()

    def _list_chats(self) -> None:
        self._layout.list_chats(self._store.titles(), self._chat.id)

    async def _switch_to(self, chat: PageChat) -> None:
        self._chat.stop()
        self._chat = chat
        await self._show_ready()

    async def _show_ready(self) -> None:
        self._show()
        await self._view.show_context(self._chat)
        self._view.focus()

    # What the user does; the layout calls these.

    async def send(self, event: events.GenericEventArguments) -> None:
        """Send the message in the box."""
        text = str(event.args or "").strip()
        if not text or self._chat.is_busy or not self._chat.is_served:
            return
        max_tokens = 0
        with self._chat.preparing():
            if await self._catch_up():
                self._view.warn(
                    "This chat was continued or deleted in another tab. Your message is still in "
                    "its box: send it again if it fits."
                )
                return
            self.instruct(self._layout.instruction.value or "")
            with self._view.warning():  # the chat template may refuse the chat, or fail
                max_tokens = await self._make_room(text)
        if max_tokens:
            box = self._layout.message
            box.set_value("")
            if not await self._answer(text, max_tokens) and not box.value:
                box.set_value(text)

    async def _answer(self, user: str, max_tokens: int) -> bool:
        """Show the answers to a message while they are generated; return whether there are any."""
        chat = self._chat
        turn_view = self._view.start_turn(chat, user)
        painter = asyncio.create_task(self._paint(chat, turn_view))
        completions: list[Completion] = []
        with self._view.warning():
            completions = await chat.turn(user, max_tokens, turn_view.add_text)
        painter.cancel()
        if completions:
            self._save(chat)
        if self._chat is not chat:  # another chat was opened meanwhile
            return True
        if not completions:
            self._show()
            return False
        self._view.finish_turn(chat, turn_view, completions, max_tokens)
        await self._view.show_context(chat)
        self._view.focus()
        return True

    async def _paint(self, chat: PageChat, turn_view: TurnView) -> None:
        while self._chat is chat:
            turn_view.paint()
            await asyncio.sleep(_SECONDS_BETWEEN_PAINTS)

    def stop(self) -> None:
        """End the answers that are generated."""
        self._chat.stop()

    async def retry(self) -> None:
        """Answer the last message again, with another seed."""
        chat, conversation = self._chat, self._chat.conversation
        if chat.is_busy or not conversation.turns or not chat.is_served:
            return
        self._view.remove_last_turn()
        with self._view.warning(), chat.resume_from(conversation.without_last_turn()):
            user = conversation.turns[-1].user
            with chat.preparing():
                max_tokens = await self._make_room(user)
            if max_tokens:
                await self._answer(user, max_tokens)
        if self._chat is chat and chat.conversation is conversation:
            self._save(chat)
            self._show()

    async def undo(self) -> None:
        """Remove the last turn and put its message in the box."""
        if self._chat.is_busy or not self._chat.conversation.turns:
            return
        self._layout.message.set_value(self._chat.undo())
        self._save(self._chat)
        await self._show_ready()

    def instruct(self, text: str) -> None:
        """Set the instruction from the next message on."""
        chat = self._chat
        instruction = StandingInstruction.parse(text)
        chat.conversation = replace(chat.conversation, instruction=instruction)
        if self._layout.instruction.value != text:
            self._layout.instruction.set_value(text)
        self._layout.describe_instruction(chat.conversation)

    async def _make_room(self, user: str) -> int:
        """Return the tokens that an answer may have, after what the user chooses; 0 if canceled."""
        chat = self._chat
        while not (room := await chat.room_for(user)).fits:
            choice = await choose_room(room)
            if choice == "shorten":
                return room.tokens_left
            if choice == "new":
                await self.begin()
            if choice != "summarize":
                return 0
            await self._summarize(chat)
        return room.max_tokens

    async def _summarize(self, chat: PageChat) -> None:
        summaries: list[str] = []
        self._view.show_answering()
        with self._view.warning():
            summaries = await chat.summarize(lambda model_index, piece: None)
        self._view.show_state(chat)
        if not summaries:
            return
        pairs = zip(chat.models, summaries, strict=True)
        text = "\n\n".join(f"{name}: {summary}" for name, summary in pairs)
        options = {"yes": "Replace these turns with it"}
        if await choose("Is this summary good enough?", text, options):
            chat.replace_middle(summaries)
            self._save(chat)
            self._show()

    async def begin(self, models: tuple[str, ...] = ()) -> None:
        """Start a chat under the same instruction, with the same models or others."""
        names = [name for name in models or self._chat.models if name in self._engine.names]
        await self._switch_to(self._chat.new_chat(names or self._engine.names[:1]))

    async def open(self, chat_id: str) -> None:
        """Open a chat of the list."""
        if chat := self._store.load(chat_id):
            await self._switch_to(chat)
        else:
            self._view.warn("This chat cannot be read. Another version of gatt may have saved it.")

    async def delete(self, chat_id: str) -> None:
        """Delete a chat of the list, after asking."""
        title = self._store.titles().get(chat_id, "")
        if not await choose(f"Delete “{title}”?", "This cannot be undone.", {"yes": "Delete"}):
            return
        self._store.delete(chat_id)
        if chat_id == self._chat.id:
            await self.begin()
        self._list_chats()
        self._update_other_tabs()

    def download(self, model_index: int) -> None:
        """Download the chat with one model as `messages`."""
        messages = self._chat.conversation.messages(model_index)
        content = json.dumps(messages, indent=2, ensure_ascii=False).encode()
        is_only = len(self._chat.models) == 1
        name = "chat.json" if is_only else f"chat-{model_index + 1}.json"
        ui.download(content, name, "application/json")

    async def upload(self, event: events.GenericEventArguments) -> None:
        """Continue the `messages` of a file, with all models."""
        try:
            if event.args is None:
                raise GattError("The file has more than 500 kB. Expected a chat saved here.")
            messages = parse_chat(str(event.args), "The file")
        except GattError as error:
            self._view.warn(str(error))
            return
        await self.begin()
        chats = [messages] * len(self._chat.models)
        self._chat.conversation = parse_conversation(chats, NO_INSTRUCTION)
        self._save(self._chat)
        await self._show_ready()

    async def settings(self) -> None:
        """Change system message, temperature, tokens and seed."""
        chat = self._chat
        if not chat.is_served:
            return
        system = chat.conversation.system
        if changed := await edit_settings(system, chat.sampling, chat.backend.context):
            chat.conversation = replace(chat.conversation, system=changed.system)
            chat.sampling = changed.sampling
            self._save(chat)
            await self._view.show_context(chat)

    def theme(self) -> None:
        """Switch between the system's theme, light and dark."""
        order: list[bool | None] = [None, False, True]
        self._dark.value = order[(order.index(self._dark.value) + 1) % len(order)]
        self._store.storage["dark"] = self._dark.value
        self._layout.show_theme(dark=self._dark.value)
