"""The page of `gatt serve` in a real browser, on a real server with the embedded model."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_serve import NAME, Serving, serving

from pipeline.files import write_json
from pipeline.server.web.app import reports
from pipeline.server.web.markdown import as_html

_CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
browsing = pytest.mark.skipif(not _CHROMIUM, reason="no Chromium here to open the page with")
_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_HOSTILE = (
    '<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script> [a](javascript:window.hacked=3) '
    "![b](http://elsewhere.example/b.png) `${window.hacked=4}` "
    '<a href="http://elsewhere.example" onmouseover="window.hacked=5">c</a>'
    "\n\n<iframe srcdoc='<script>parent.hacked=6</script>'></iframe>\n\n**bold** &lt;b&gt; {{ 7*7 }}"
)
OTHER = "other"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[Serving]:
    """The embedded model under two names, and a folder with one finished run."""
    folder = tmp_path_factory.mktemp("web")
    (folder / f"{OTHER}.gguf").symlink_to(base)
    for name in ("done <1>", "begun"):
        (folder / "runs" / name / "report").mkdir(parents=True)
        (folder / "runs" / name / "report" / "report.html").write_text("<h1>It keeps its word</h1>")
    write_json(folder / "runs" / "done <1>" / "report" / "manifest.json", {})
    with (
        _at_home(folder),
        serving(
            folder, NAME, folder / f"{OTHER}.gguf", "--context", 512, "--runs", folder / "runs"
        ) as running,
    ):
        yield running


@contextmanager
def _at_home(folder: Path) -> Iterator[None]:
    """Chats are kept in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        yield


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_CHROMIUM, args=_OPTIONS)
        yield browser
        browser.close()


class Tab:
    """A tab of a browser of its own. At its end nothing may have failed, and nothing may have been asked elsewhere."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.context = chromium.new_context(
            **{"viewport": {"width": 1280, "height": 800}, **options}
        )
        self.context.set_default_timeout(30_000)
        self.page = self.context.new_page()
        self.url, self.wrong, self.asked = url, [], []
        self.page.on(
            "console",
            lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def begin(self, message: str) -> None:
        """Send a message, and wait for the first words of all answers."""
        self._send(message)
        self.until(lambda: self.count(".comes .words:has(> *)") == self.count(".comes .answer") > 0)

    def _send(self, message: str) -> None:
        self.page.fill(".message textarea", message)
        self.page.keyboard.press("Enter")

    def ask(self, message: str) -> list[str]:
        """The answers to a message."""
        before = self.count(".turn")
        self._send(message)
        self.until(lambda: self.count(".turn") > before and not self.count(".comes"))
        return self.page.locator(".turn >> nth=-1 >> .words").all_inner_texts()

    def settle(self, label: str, value: object) -> None:
        """Set one of the settings."""
        self.page.click("[aria-label=Settings]")
        self.page.get_by_label(label).fill(str(value))
        self.page.click("text=Use these")
        self.page.wait_for_selector(".card", state="detached")

    def open_file(self, messages: object) -> None:
        """Upload a chat."""
        content = json.dumps(messages).encode()
        self.page.set_input_files(
            "input[type=file]",
            {"name": "../../x.json", "mimeType": "application/json", "buffer": content},
        )

    def count(self, what: str) -> int:
        return int(self.page.locator(what).count())

    def marks(self, model: int = 0) -> str:
        """The strip of one model."""
        return "".join(self.page.locator(f".strip >> nth={model} >> .cell").all_inner_texts())

    def until(self, holds: Callable[[], object], seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.page.inner_text("body")
            self.page.wait_for_timeout(20)

    def close(self) -> None:
        self.context.close()
        assert self.wrong == []
        assert [url for url in self.asked if not url.startswith((self.url, "blob:", "data:"))] == []


@pytest.fixture
def tab(chromium: Any, server: Serving) -> Iterator[Tab]:
    opened = Tab(chromium, server.url)
    yield opened
    opened.close()


@browsing
def test_two_models_answer_side_by_side_and_the_chat_survives_a_reload(
    tab: Tab, server: Serving
) -> None:
    tab.page.click(".examples button >> nth=0")
    instruction = tab.page.get_by_label("Instruction", exact=True)
    tab.until(lambda: instruction.input_value() == 'Begin every answer with "Ahoy!".')
    tab.settle("Temperature", 0)
    tab.settle("Tokens of an answer", 12)
    first = tab.ask("Name a color.")
    told = 'Name a color.\n\nBegin every answer with "Ahoy!".'
    expected = server.chat(told).choices[0].message.content
    assert first == [expected, expected]
    boxes = [box.bounding_box() for box in tab.page.locator(".answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    instruction.fill('End every answer with "Stay curious!".')
    tab.ask("And another?")
    assert (
        tab.page.inner_text("#turn-2 .told")
        == 'From now on: End every answer with "Stay curious!".'
    )
    assert tab.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    before, marks = tab.page.inner_text(".turns"), tab.marks()
    assert len(marks) == 2 and set(marks) <= set("✓✗~") and tab.marks(1) == marks
    tab.page.hover(".cell >> nth=1")
    assert "Turn 2" in tab.page.inner_text("#tip") and "And another?" in tab.page.inner_text("#tip")
    tab.page.reload()
    tab.until(lambda: tab.count(".turn") == 2)
    assert (tab.page.inner_text(".turns"), tab.marks()) == (before, marks)
    with tab.page.expect_download() as download:
        tab.page.click("[aria-label^='Save the chat']")
        tab.page.click(".q-menu >> text=other")
    messages = json.loads(Path(download.value.path()).read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == told and messages[2]["content"].startswith(
        "And another?\n\nFrom now on: End every"
    )
    assert download.value.suggested_filename == "chat-2.json"


@browsing
def test_stop_retry_undo_and_who_leaves_frees_the_sequence(
    tab: Tab, chromium: Any, server: Serving
) -> None:
    tab.settle("Tokens of an answer", 250)
    tab.begin("Tell me a very long story about a ship, with many details.")
    assert server.metric("sequences_in_use") == 1
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector(".comes", state="detached")
    tab.until(lambda: server.metric("sequences_in_use") == 0, 2)
    assert tab.page.locator(".note").all_inner_texts() == ["stopped", "stopped"]
    said = tab.page.inner_text(".words >> nth=0")
    tab.settle("Tokens of an answer", 8)
    tab.page.click("text=Try again")
    tab.until(
        lambda: (
            tab.count(".comes") == 0 and tab.page.inner_text(".note >> nth=0") == "cut at 8 tokens"
        )
    )
    assert tab.page.inner_text(".words >> nth=0") != said and tab.count(".turn") == 1
    tab.page.click("text=Undo")
    tab.until(lambda: tab.count(".turn") == 0)
    assert tab.page.input_value(".message textarea").startswith("Tell me a very long story")
    tab.settle("Tokens of an answer", 250)
    tab.begin("Tell me a very long story about a ship, with many details.")
    tokens = server.metric("generated_tokens_total")
    tab.page.goto("about:blank")
    tab.until(lambda: server.metric("sequences_in_use") == 0, 3)
    assert server.metric("generated_tokens_total") - tokens < 250
    tab.page.goto(server.url)
    tab.page.wait_for_selector("#turn-1")  # what was said so far is kept


@browsing
def test_what_a_model_says_never_runs_and_loads_nothing(tab: Tab) -> None:
    tab.open_file(
        [{"role": "user", "content": _HOSTILE}, {"role": "assistant", "content": _HOSTILE}]
    )
    for _ in range(2):
        tab.page.wait_for_selector(".words strong")
        tab.page.wait_for_timeout(300)
        assert tab.page.evaluate("window.hacked") is None
        assert (
            tab.count(
                ".turns img, .turns script, .turns iframe, .turns [onmouseover], .turns a[href^=javascript]"
            )
            == 0
        )
        shown = tab.page.inner_text(".words >> nth=0")
        assert (
            "<script>window.hacked=2</script>" in shown
            and "<b> {{ 7*7 }}" in shown
            and "${window.hacked=4}" in shown
        )
        assert "<script>window.hacked=2</script>" in tab.page.inner_text(".said")
        tab.page.reload()  # then it comes with the page itself
    tab.open_file({"messages": [{"role": "user", "content": "x"}]})
    tab.page.wait_for_selector("text=The file ends with a message of the user.")
    tab.open_file("nothing")
    tab.page.wait_for_selector("text=The file is no chat.")


def test_markdown_is_shown_without_html_pictures_and_script() -> None:
    html = as_html(_HOSTILE)
    assert (
        "<img" not in html
        and "<script" not in html
        and "<iframe" not in html
        and 'href="javascript' not in html
    )
    assert as_html("**a** `b`\n\n| c |\n|---|\n| d |").count("<td>") == 1


@browsing
def test_a_phone_has_the_whole_page_and_its_own_colors(chromium: Any, server: Serving) -> None:
    phone = Tab(
        chromium,
        server.url,
        viewport={"width": 390, "height": 844},
        color_scheme="dark",
        has_touch=True,
    )
    long = f"{'x' * 400}\n\n```\n{'y ' * 200}\n```"
    phone.open_file(
        [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": long}]
    )
    phone.page.wait_for_selector("#turn-1")
    boxes = [box.bounding_box() for box in phone.page.locator(".answer").all()]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    wide = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre')"
    assert (
        phone.page.evaluate(f"[...document.querySelectorAll('main *')].filter({wide}).length") == 0
    )
    assert phone.page.evaluate("document.scrollingElement.scrollWidth") <= 390
    ground = "getComputedStyle(document.body).backgroundColor"
    assert phone.page.evaluate(ground) == "rgb(21, 23, 27)"
    phone.page.tap("[aria-label^=Colors]")
    phone.page.wait_for_selector("[aria-label='Colors: light']")
    assert phone.page.evaluate(ground) == "rgb(255, 255, 255)"
    assert not phone.page.locator("text=done <1>").is_visible()
    phone.page.tap("[aria-label='Chats and runs'] >> nth=-1")
    phone.page.locator("text=done <1>").wait_for(state="visible")
    controls = "[...document.querySelectorAll('button, input:not([type=file]), textarea, a')]"
    unnamed = "e => !(e.innerText || e.ariaLabel || e.labels?.length)"
    assert phone.page.evaluate(f"{controls}.filter({unnamed}).map(e => e.outerHTML)") == []
    phone.close()


def _nearly_fill(tab: Tab) -> None:
    """Six turns, and answers for which there is no room."""
    turns = [
        m
        for n in range(6)
        for m in (
            {"role": "user", "content": f"Number {n}? " + "word " * 20},
            {"role": "assistant", "content": f"It is {n}. " + "word " * 20},
        )
    ]
    tab.open_file(turns)
    tab.page.wait_for_selector("#turn-6")
    tab.settle("Tokens of an answer", 200)


@browsing
def test_a_full_context_is_told_before_anything_is_lost(tab: Tab) -> None:
    _nearly_fill(tab)
    tab.page.wait_for_selector("text=Nearly full:")
    tab.page.fill(".message textarea", "And what now?")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("text=Nothing has been dropped")
    tab.page.click(".card >> text=Cancel")
    tab.page.wait_for_selector(".card", state="detached")
    assert tab.page.input_value(".message textarea") == "And what now?" and tab.count(".turn") == 6
    tab.page.click("[aria-label^=Send]")
    tab.page.click("text=Send it, for an answer of")
    tab.until(lambda: tab.count(".turn") == 7 and tab.count(".comes") == 0)
    assert "Number 0?" in tab.page.inner_text("#turn-1")


@browsing
def test_a_summary_takes_the_place_of_the_middle_if_the_user_likes_it(tab: Tab) -> None:
    _nearly_fill(tab)
    tab.page.fill(".message textarea", "And what now?")
    tab.page.keyboard.press("Enter")
    tab.page.click("text=Sum up 2 turns")
    tab.page.click("text=Put it in the place of these turns")
    tab.page.wait_for_selector("#turn-2 .said >> text=Sum up in a few sentences")
    assert "Number 0?" in tab.page.inner_text("#turn-1") and "Number 3?" in tab.page.inner_text(
        "#turn-3"
    )


@browsing
def test_two_tabs_of_a_browser_show_the_same_chat(tab: Tab) -> None:
    tab.settle("Tokens of an answer", 4)
    tab.ask("Hello.")
    second = tab.context.new_page()
    second.goto(tab.url)
    second.wait_for_selector("#turn-1")
    tab.ask("And again.")
    second.wait_for_selector("#turn-2")


@browsing
def test_chats_are_listed_opened_and_deleted(tab: Tab) -> None:
    for text in ("First", "Second"):
        tab.open_file(
            [{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} it is."}]
        )
        tab.page.wait_for_selector(f".words >> text={text} it is.")
    tab.page.click(".side >> text=First")
    tab.page.wait_for_selector(".words >> text=First it is.")
    tab.page.hover("li:has-text('Second')")
    tab.page.click("li:has-text('Second') [aria-label^=Delete]")
    tab.page.click(".card >> text=Delete >> nth=-1")
    tab.until(lambda: tab.count(".side li .title") == 1)
    tab.page.reload()
    tab.page.wait_for_selector(".words >> text=First it is.")
    assert tab.count(".side li .title") == 1
    tab.page.click("text=New chat")
    tab.page.wait_for_selector(".welcome")


@browsing
def test_runs_open_their_report_and_no_path_does(tab: Tab, server: Serving) -> None:
    assert tab.page.locator(".runs a").all_inner_texts() == ["done <1>"]
    with tab.context.expect_page() as opened:
        tab.page.click(".runs a")
    assert opened.value.inner_text("h1") == "It keeps its word"
    got = httpx.get(f"{server.url}/runs/done%20%3C1%3E")
    assert got.status_code == 200 and "sandbox" in got.headers["content-security-policy"]
    done = "done%20%3C1%3E"
    for name in (
        "begun",
        "%2e%2e",
        f"..%2fruns%2f{done}",
        f"{done}/report",
        f".%2f{done}",
        f"{done}%2freport",
        "%00",
        "x" * 5000,
    ):
        assert httpx.get(f"{server.url}/runs/{name}").status_code == 404, name


def test_the_runs_that_are_finished_are_found(tmp_path: Path) -> None:
    assert reports(tmp_path / "none") == {}
    (tmp_path / "half" / "report").mkdir(parents=True)
    write_json(tmp_path / "half" / "report" / "manifest.json", {})
    assert reports(tmp_path) == {}


@browsing
def test_a_key_is_asked_for_once(chromium: Any, tmp_path: Path) -> None:
    with (
        _at_home(tmp_path),
        serving(tmp_path, NAME, "--api-key", "s3cret", "--context", 512) as server,
    ):
        tab = Tab(chromium, server.url)
        assert tab.count(".message") == 0
        assert httpx.get(f"{server.url}/runs/x").status_code == 404
        for key in ("wrong", "s3cret"):
            tab.page.get_by_label("API key").fill(key)
            tab.page.keyboard.press("Enter")
            if key == "wrong":
                tab.page.wait_for_selector("text=not the key of this server")
        tab.page.wait_for_selector(".message textarea")
        assert tab.count(".models .vs:visible") == 0  # one model only
        tab.page.reload()
        tab.page.wait_for_selector(".message textarea")
        cookies = tab.context.cookies()
        tab.close()
        with (
            chromium.new_context() as left
        ):  # a tab that stays open and an answer that runs do not hold the server up
            left.add_cookies(cookies)
            page = left.new_page()
            page.goto(server.url)
            page.fill(".message textarea", "Tell me a very long story.")
            page.keyboard.press("Enter")
            page.wait_for_selector(".comes .words > *")
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            server.process.wait(20)
            assert time.monotonic() - start < 8 and "Traceback" not in server.log
        assert "s3cret" not in "".join(
            path.read_text() for path in (tmp_path / "data").rglob("*") if path.is_file()
        )
