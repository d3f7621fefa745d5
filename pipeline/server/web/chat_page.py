"""The page of one browser tab: chats that are kept, a conversation with one model or two, and what a user can do with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

from nicegui import background_tasks, events, ui

from pipeline.chat.conversation import LAST_TURNS, NO_INSTRUCTION, Conversation, parse_conversation
from pipeline.chat.files import parse_chat
from pipeline.errors import GattError
from pipeline.inference.async_engine import AsyncEngine
from pipeline.server.web.dialogs import choose, settings
from pipeline.server.web.layout import Layout
from pipeline.server.web.session import Heard, SamplingParams, Talk, restored, told
from pipeline.server.web.theme import apply_theme
from pipeline.server.web.turn_view import TurnView

_FRAME_SECONDS = 0.08
"""Between two looks at an answer that comes: quick to the eye, and slow enough for a phone."""
_NEARLY = 0.8
"""Of the context: from this share on the page says how much is left."""


_TABS: WeakSet[ChatPage] = WeakSet()
"""All that are open; those of one browser show the same chats."""


class ChatPage:
    """What one tab shows. `kept` is the browser's own store, which survives a reload and a restart."""

    def __init__(
        self, engine: AsyncEngine, kept: dict[str, Any], reports: Mapping[str, Path]
    ) -> None:
        self._engine, self._kept, self._reports = engine, kept, reports
        self._chats: dict[str, Any] = kept.setdefault("chats", {})
        self._turns: list[TurnView] = []
        self._deleted: set[str] = set()
        """Chats that an answer which is still on its way must not bring back."""
        self._talk = self._opened(kept.get("open", "")) or self._first()

    def build(self) -> None:
        """Put it on the page."""
        self._dark = apply_theme(self._kept.get("dark"))
        self._client = ui.context.client
        self._frame = Layout(self._engine.names, list(self._reports), self, self._kept.get("dark"))
        self._show()
        _TABS.add(self)
        self._client.on_connect(self._catch_up)
        self._client.on_disconnect(lambda: self._talk.stop())

    def _first(self) -> Talk:
        models = self._engine.names[:2]
        most = min(self._engine.context(name) for name in models) // 2
        return Talk(
            self._engine,
            models,
            Conversation(),
            SamplingParams(max_tokens=min(SamplingParams().max_tokens, most)),
        )

    def _opened(self, name: str) -> Talk | None:
        """A chat that was kept; None where it is gone, or not one."""
        with suppress(
            KeyError, TypeError, ValueError
        ):  # the store is a file, which may be of another version
            return restored(self._engine, name, self._chats[name])
        return None

    async def _catch_up(self) -> bool:
        """Show what another tab, or this one before it was loaded anew, has said meanwhile; whether there was something."""
        kept = self._chats.get(self._talk.id)
        newer = (
            self._opened(self._talk.id)
            if kept and kept["when"] > self._talk.when and not self._talk.heard
            else None
        )
        if newer:
            self._talk = newer
            self._show()
        self._frame.list_chats(self._chats, self._talk.id)
        await self._measure()
        return newer is not None

    def _keep(self, talk: Talk) -> None:
        """In the browser's store, as the youngest."""
        self._chats.pop(talk.id, None)
        if talk.chat.turns and talk.id not in self._deleted:
            self._chats[talk.id] = talk.kept()
        self._frame.list_chats(self._chats, self._talk.id)
        for tab in list(_TABS):
            if tab is not self and tab._kept is self._kept and not tab._client.is_deleted:
                background_tasks.create(tab._catch_up())

    def _show(self) -> None:
        """The whole conversation anew."""
        talk, frame = self._talk, self._frame
        self._kept["open"] = talk.id
        frame.turns.clear()
        self._turns = []
        with frame.turns:
            if not talk.chat.turns:
                frame.welcome()
            self._turns = [TurnView(number, talk) for number in range(1, len(talk.chat.turns) + 1)]
        for number in range(1, len(self._turns) + 1):
            self._mark_turn(number)
        frame.list_chats(self._chats, talk.id)
        frame.choose_models(talk.models)
        frame.instruction.set_value(talk.chat.instruction.text)
        self._show_state()

    def _mark_turn(self, number: int) -> None:
        for side, found in enumerate(self._talk.verdicts()):
            self._turns[number - 1].mark(side, *found[number - 1])

    def _show_state(self) -> None:
        """What goes with the conversation as it stands: strips, buttons, how the instruction is checked."""
        talk = self._talk
        self._frame.show_strips(talk)
        self._frame.explain(talk.chat)
        self._frame.set_mode(bool(talk.heard), bool(talk.chat.turns), self._served())

    def _served(self) -> bool:
        return all(name in self._engine.names for name in self._talk.models)

    async def _measure(self) -> None:
        """How much of the context is used."""
        if not self._served():
            self._frame.say(
                f"{' and '.join(self._talk.models)} not served now: to be read only. Choose a model for a new chat."
            )
            return
        used, room = await self._talk.used(), self._talk.context
        left = room - used
        near = used + self._talk.drawing.max_tokens > _NEARLY * room
        warning = f"Nearly full: {left} of {room} tokens left. Nothing is dropped without asking."
        self._frame.say(warning if near else f"{used} of {room} tokens", near)

    # What the user does; the frame calls these.

    async def send(self, event: events.GenericEventArguments) -> None:
        """A message, as the box has it."""
        text = str(event.args or "").strip()
        if not text or self._talk.heard or not self._served():
            return
        if await self._catch_up():
            self._complain(
                "This chat has gone on in another tab. Your message is still in its box: send it again if it fits."
            )
            return
        self.instruct(self._frame.instruction.value or "")
        if most := await self._room(text):
            self._frame.message.set_value("")
            if not await self._take(text, most) and not self._frame.message.value:
                self._frame.message.set_value(text)

    async def _take(self, text: str, most: int) -> bool:
        """The answers to a message of the user, shown while they come; whether there are some."""
        talk = self._talk
        if not talk.chat.turns:
            self._frame.turns.clear()
        with self._frame.turns:
            view = TurnView(len(talk.chat.turns) + 1, talk, text)
        painter = asyncio.create_task(self._paint(talk, view))
        self._frame.set_mode(True, True, True)
        heard: list[Heard] = []
        with self._complaining():
            heard = await talk.turn(text, most)
        painter.cancel()
        if heard:
            self._keep(talk)
        if self._talk is not talk:  # another chat was opened meanwhile
            return True
        if not heard:
            self._show()
            return False
        view.finish(heard, most)
        self._turns.append(view)
        self._mark_turn(len(self._turns))
        self._show_state()
        await self._measure()
        self._focus()
        return True

    async def _paint(self, talk: Talk, view: TurnView) -> None:
        while self._talk is talk:
            view.show([one.text for one in talk.heard])
            await asyncio.sleep(_FRAME_SECONDS)

    def stop(self) -> None:
        """End the answers that come."""
        self._talk.stop()

    async def retry(self) -> None:
        """Answer the last message again, with another draw."""
        if self._talk.heard or not self._talk.chat.turns or not self._served():
            return
        before = self._talk.chat
        self._talk.chat = before.without_last_turn()
        self._turns.pop().remove()
        user = before.turns[-1].user
        most = await self._room(user)
        if not (most and await self._take(user, most)):
            self._talk.chat = before
            self._show()

    async def undo(self) -> None:
        """Take the last turn back; its message is in the box again."""
        if self._talk.heard or not self._talk.chat.turns:
            return
        self._frame.message.set_value(self._talk.chat.turns[-1].user)
        self._talk.chat = self._talk.chat.without_last_turn()
        self._keep(self._talk)
        self._show()
        await self._measure()
        self._focus()

    def instruct(self, text: str) -> None:
        """From the next message on."""
        self._talk.chat = replace(self._talk.chat, instruction=told(text))
        if self._frame.instruction.value != text:
            self._frame.instruction.set_value(text)
        self._frame.explain(self._talk.chat)

    async def _room(self, user: str) -> int:
        """The most tokens of an answer to this message, after what the user chooses; 0 if it is not to be sent."""
        talk = self._talk
        while (needed := await talk.used(user)) + (most := talk.drawing.max_tokens) > (
            room := talk.context
        ):
            options = {}
            if not all(turn.is_summary for turn in talk.chat.middle(LAST_TURNS)):
                count = len(talk.chat.middle(LAST_TURNS))
                options["sum"] = (
                    f"Sum up {count} turn{'s' * (count != 1)}; the first and the last {LAST_TURNS} stay word for word"
                )
            if (left := room - needed) >= 1:
                options["short"] = f"Send it, for an answer of {left} tokens at most"
            options["new"] = "Begin a new chat under the same instruction"
            chosen = await choose(
                "The context is nearly full",
                f"With this message the chat has {needed} tokens, and an answer may take {most}; {room} fit. Nothing has been "
                "dropped, and nothing will be without your choice.",
                options,
            )
            if chosen == "short":
                return left
            if chosen == "sum":
                await self._sum_up()
            elif chosen == "new":
                await self.begin()
                return 0
            else:
                return 0
        return most

    async def _sum_up(self) -> None:
        said: list[str] = []
        self._frame.set_mode(True, True, True)
        with self._complaining():
            said = await self._talk.summary()
        self._show_state()
        if not said:
            return
        text = "\n\n".join(
            f"{name}: {one}" for name, one in zip(self._talk.models, said, strict=True)
        )
        if (
            await choose(
                "Is this summary good enough?", text, {"yes": "Put it in the place of these turns"}
            )
            == "yes"
        ):
            self._talk.chat = self._talk.chat.with_summaries(LAST_TURNS, said)
            self._keep(self._talk)
            self._show()

    async def begin(self, models: tuple[str, ...] = ()) -> None:
        """A new chat under the same instruction; an answer belongs to the model that gave it, so others begin anew, too."""
        self._talk.stop()
        served = tuple(name for name in models or self._talk.models if name in self._engine.names)
        self._talk = self._talk.anew(served or tuple(self._engine.names[:1]))
        self._show()
        await self._measure()
        self._focus()

    async def open(self, name: str) -> None:
        """A chat of the list."""
        self._talk.stop()
        if found := self._opened(name):
            self._talk = found
            self._show()
            await self._measure()
            self._focus()
        else:
            self._complain("This chat cannot be read. It may be of another version of gatt.")

    async def delete(self, name: str) -> None:
        """One of the list, after a question."""
        title = self._chats[name]["title"] if name in self._chats else ""
        if (
            await choose(f"Delete “{title}”?", "It cannot be brought back.", {"yes": "Delete"})
            != "yes"
        ):
            return
        self._deleted.add(name)
        self._chats.pop(name, None)
        if name == self._talk.id:
            await self.begin()
        self._frame.list_chats(self._chats, self._talk.id)

    def download(self, side: int) -> None:
        """The chat of one side as `messages`."""
        content = json.dumps(self._talk.chat.messages(side), indent=2, ensure_ascii=False)
        ui.download(
            content.encode(),
            f"chat-{side + 1}.json" if len(self._talk.models) > 1 else "chat.json",
            "application/json",
        )

    async def upload(self, event: events.GenericEventArguments) -> None:
        """Go on with `messages` of a file; all sides with the same."""
        try:
            if event.args is None:
                raise GattError(
                    "The file has more than 500 kB. Expected a chat that was saved here."
                )
            messages = parse_chat(str(event.args), "The file")
        except GattError as error:
            self._complain(str(error))
            return
        await self.begin()
        self._talk.chat = parse_conversation([messages] * len(self._talk.models), NO_INSTRUCTION)
        self._keep(self._talk)
        self._show()
        await self._measure()

    async def settings(self) -> None:
        """System message, temperature, tokens, seed."""
        if not self._served():
            return
        if changed := await settings(
            self._talk.chat.system, self._talk.drawing, self._talk.context
        ):
            self._talk.chat = replace(self._talk.chat, system=changed[0])
            self._talk.drawing = changed[1]
            self._keep(self._talk)
            await self._measure()

    def theme(self) -> None:
        """The next of: as the system, light, dark."""
        order: list[bool | None] = [None, False, True]
        self._dark.value = self._kept["dark"] = order[(order.index(self._dark.value) + 1) % 3]
        self._frame.show_theme(self._dark.value)

    @contextmanager
    def _complaining(self) -> Iterator[None]:
        """Tell the user what the engine refuses."""
        try:
            yield
        except (GattError, RuntimeError) as error:
            self._complain(" ".join(str(error).split()))

    def _complain(self, text: str) -> None:
        with self._client:
            ui.notify(
                text,
                type="warning",
                position="top",
                multi_line=True,
                close_button="Close",
                timeout=8000,
            )

    def _focus(self) -> None:
        self._client.run_javascript("chat.focus()")
