"""The chat page without a browser: events that arrive together, and two tabs of one browser."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui
from nicegui.testing import User, user_simulation
from support.engines import ScriptedAsyncEngine

from pipeline.server.web.chat_page import ChatPage


class _Browser:
    """A simulated browser whose tabs show the chat page over `engine`; `storage` has its chats."""

    def __init__(self, engine: ScriptedAsyncEngine) -> None:
        self.engine = engine
        self.storage: dict[str, Any] = {}
        self.user: User
        self._tabs: list[ChatPage] = []

    def build(self) -> None:
        """Build the page in a new tab."""
        self._tabs.append(ChatPage(self.engine, self.storage, {}))
        self._tabs[-1].build()

    async def open_tab(self) -> ChatPage:
        """Open a tab, in which everything is typed and clicked from now on."""
        await self.user.open("/")
        return self._tabs[-1]

    def press_enter(self, message: str) -> None:
        """Press Enter in the message box."""
        self.user.find(ui.textarea).trigger("keydown", message)

    def click(self, label: str) -> None:
        """Click a button."""
        self.user.find(kind=ui.button, content=label).click()

    @property
    def messages(self) -> list[list[str]]:
        """The user's messages of each stored chat."""
        return [[turn[0] for turn in chat["turns"]] for chat in self.storage["chats"].values()]

    async def wait_for(self, *chats: list[str], requests: int) -> None:
        """Wait until these messages are stored and no more is requested of the engine."""
        await _until(lambda: self.messages == list(chats) and self.engine.requests)
        await asyncio.sleep(0.2)
        assert self.messages == list(chats)
        assert len(self.engine.requests) == requests


def _browse(steps: Callable[[_Browser], Awaitable[None]], *, endless: bool = False) -> None:
    """Run `steps` with a browser; `endless` answers end only when they are stopped."""

    async def run() -> None:
        browser = _Browser(ScriptedAsyncEngine(endless=endless))
        async with user_simulation(browser.build) as browser.user:
            await steps(browser)

    asyncio.run(run())


async def _until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_a_message_that_is_sent_twice_at_once_is_one_turn() -> None:
    async def steps(browser: _Browser) -> None:
        tab = await browser.open_tab()
        for _ in range(2):
            browser.press_enter("Hello")
        await browser.wait_for(requests=1)
        tab.stop()
        await browser.wait_for(["Hello"], requests=1)

    _browse(steps, endless=True)


def test_two_clicks_at_once_on_try_again_lose_no_turn() -> None:
    async def steps(browser: _Browser) -> None:
        await browser.open_tab()
        browser.press_enter("Hello")
        await browser.wait_for(["Hello"], requests=1)
        browser.press_enter("And you?")
        await browser.wait_for(["Hello", "And you?"], requests=2)
        for _ in range(2):
            browser.click("Try again")
        await browser.wait_for(["Hello", "And you?"], requests=3)
        browser.click("Try again")
        browser.click("Undo")  # not while the turn is answered again
        await browser.wait_for(["Hello", "And you?"], requests=4)

    _browse(steps)


def test_a_chat_that_is_deleted_in_one_tab_does_not_come_back_from_another() -> None:
    async def steps(browser: _Browser) -> None:
        first = await browser.open_tab()
        browser.press_enter("Hello")
        await _until(lambda: browser.engine.answers)
        first.stop()
        await browser.wait_for(["Hello"], requests=1)
        browser.press_enter("And you?")
        await _until(lambda: len(browser.engine.answers) == 2)
        (chat_id,) = browser.storage["chats"]
        second = await browser.open_tab()

        async def delete() -> None:
            with second._client:
                await second.delete(chat_id)

        deleting = asyncio.create_task(delete())
        await browser.user.should_see("This cannot be undone.", retries=50)
        browser.click("Delete")
        await deleting
        assert browser.messages == []
        first.stop()
        await browser.wait_for(requests=2)
        # What is sent in the other tab belongs to a new chat, which is stored.
        await first._catch_up()
        browser.user.client = first._client
        browser.press_enter("Hello again")
        await _until(lambda: len(browser.engine.answers) == 3)
        first.stop()
        await browser.wait_for(["Hello again"], requests=3)

    _browse(steps, endless=True)
