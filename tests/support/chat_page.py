"""A tab of a headless browser with the chat page of `gatt serve`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from playwright.sync_api import ConsoleMessage, Request, ViewportSize

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator

DESKTOP = ViewportSize(width=1280, height=800)
PHONE = ViewportSize(width=390, height=844)
_POLL_MILLISECONDS = 20


class Tab:
    """A tab of a browser of its own, on the page at `url`.

    When it is closed, nothing may have failed, and nothing may have been requested from elsewhere.
    """

    def __init__(self, browser: Browser, url: str, *, phone: bool = False) -> None:
        self.context: BrowserContext = (
            browser.new_context(viewport=PHONE, color_scheme="dark", has_touch=True)
            if phone
            else browser.new_context(viewport=DESKTOP)
        )
        self.context.set_default_timeout(30_000)
        self.page = self.context.new_page()
        self.url = url
        self._errors: list[str] = []
        self._requested_urls: list[str] = []
        self.page.on("console", self._record_console)
        self.page.on("pageerror", lambda error: self._errors.append(str(error)))
        self.context.on("request", self._record_request)
        self.page.goto(url)

    def _record_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._errors.append(message.text)

    def _record_request(self, request: Request) -> None:
        self._requested_urls.append(request.url)

    def close(self) -> None:
        """Close the browser, and fail if anything was wrong."""
        self.context.close()
        assert self._errors == []
        own = (self.url, "blob:", "data:")
        assert [url for url in self._requested_urls if not url.startswith(own)] == []

    def type(self, message: str) -> None:
        """Put a message in the box."""
        self.page.fill(".message textarea", message)

    def send(self, message: str) -> None:
        """Type a message and press Enter."""
        self.type(message)
        self.page.keyboard.press("Enter")

    def start_answer(self, message: str) -> None:
        """Send a message, and wait for the first words of all answers."""
        self.send(message)
        started = ".streaming .markdown:has(> *)"
        self.wait_until(lambda: self.count(started) == self.count(".streaming .answer") > 0)

    def ask(self, message: str) -> list[str]:
        """Send a message and return the answers."""
        turn_count = self.count(".turn")
        self.send(message)
        self.wait_until(lambda: self.count(".turn") > turn_count and not self.count(".streaming"))
        return self.page.locator(".turn >> nth=-1 >> .markdown").all_inner_texts()

    def set_setting(self, label: str, value: object) -> None:
        """Change one of the settings."""
        self.page.click("[aria-label=Settings]")
        self.page.get_by_label(label).fill(str(value))
        self.page.click("text=Apply")
        self.page.wait_for_selector(".card", state="detached")

    def upload(self, messages: object) -> None:
        """Upload a chat."""
        content = json.dumps(messages).encode()
        self.page.set_input_files(
            "input[type=file]",
            {"name": "../../x.json", "mimeType": "application/json", "buffer": content},
        )

    def upload_turns(self, *turns: tuple[str, str]) -> None:
        """Upload a chat of (user, answer) turns, and wait until it is shown."""
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        self.upload(messages)
        self.wait_until(lambda: self.count(".turn") == len(turns))

    def count(self, selector: str) -> int:
        """Return the number of elements that match."""
        return self.page.locator(selector).count()

    def marks(self, model_index: int = 0) -> str:
        """Return the strip of a model."""
        cells = self.page.locator(f".strip >> nth={model_index} >> .cell")
        return "".join(cells.all_inner_texts())

    def boxes(self, selector: str) -> list[Box]:
        """Return where the elements that match are."""
        return [Box.of(element) for element in self.page.locator(selector).all()]

    def wait_until(self, holds: Callable[[], object], seconds: float = 30) -> None:
        """Wait until `holds` is true."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.page.inner_text("body")
            self.page.wait_for_timeout(_POLL_MILLISECONDS)


class Box:
    """The rectangle of an element in CSS pixels."""

    def __init__(self, left: float, top: float, width: float, height: float) -> None:
        self.left, self.top = left, top
        self.right, self.bottom = left + width, top + height

    @classmethod
    def of(cls, element: Locator) -> Box:
        """Return the rectangle of an element that is shown."""
        box = element.bounding_box()
        assert box
        return cls(box["x"], box["y"], box["width"], box["height"])
