"""The chat page of `gatt serve` in a real browser, on a real server with the embedded model."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from support.browser import chromium, needs_chromium
from support.chat_page import PHONE, Tab
from support.scripted_model import write_scripted_gguf
from support.servers import MODEL, GattServer, gatt_server

from pipeline.files import write_json

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needs_chromium

_HOSTILE = (
    '<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script> '
    "[a](javascript:window.hacked=3) "
    "![b](http://elsewhere.example/b.png) `${window.hacked=4}` "
    '<a href="http://elsewhere.example" onmouseover="window.hacked=5">c</a>'
    "\n\n<iframe srcdoc='<script>parent.hacked=6</script>'></iframe>\n\n"
    "**bold** &lt;b&gt; {{ 7*7 }}"
)
_AHOY = 'Begin every answer with "Ahoy!".'
_CURIOUS = 'End every answer with "Stay curious!".'
_STORY = "Tell me a very long story about a ship, with many details."
_MAX_TOKENS = "Tokens of an answer"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Iterator[GattServer]:
    """Serve the embedded model under two names, and one that thinks; a folder has one run."""
    folder = tmp_path_factory.mktemp("web")
    second = folder / "other.gguf"
    second.symlink_to(base)
    for name in ("done <1>", "begun"):
        report = folder / "runs" / name / "report"
        report.mkdir(parents=True)
        (report / "report.html").write_text("<h1>It keeps its word</h1>")
    write_json(folder / "runs" / "done <1>" / "report" / "manifest.json", {})
    words = ("<think>", "Hmm ", "<b>", "</think>", "Yes", "!")
    thinking = write_scripted_gguf(folder / "thinking", words, name="thinking")
    options = ("--context", 512, "--runs", folder / "runs")
    with _storage_in(folder), gatt_server(folder, MODEL, second, thinking, *options) as running:
        yield running


@contextmanager
def _storage_in(folder: Path) -> Iterator[None]:
    """Store the page's chats in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Browser, server: GattServer) -> Iterator[Tab]:
    opened = Tab(browser, server.url)
    yield opened
    opened.close()


def test_two_models_answer_side_by_side(tab: Tab, server: GattServer) -> None:
    tab.page.click(".examples button >> nth=0")
    instruction = tab.page.get_by_label("Instruction", exact=True)
    tab.wait_until(lambda: instruction.input_value() == _AHOY)
    tab.set_setting("Temperature", 0)
    tab.set_setting(_MAX_TOKENS, 12)
    answers = tab.ask("Name a color.")
    sent = f"Name a color.\n\n{_AHOY}"
    expected = server.chat(sent).choices[0].message.content
    assert answers == [expected, expected]
    first, second = tab.boxes(".answer")
    assert first.top == second.top
    assert first.right <= second.left
    instruction.fill(_CURIOUS)
    tab.ask("And another?")
    assert tab.page.inner_text("#turn-2 .new-instruction") == f"From now on: {_CURIOUS}"
    assert tab.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    marks = tab.marks()
    assert len(marks) == 2
    assert set(marks) <= set("✓✗~")
    assert tab.marks(1) == marks
    tab.page.hover(".cell >> nth=1")
    tip = tab.page.inner_text("#tip")
    assert "Turn 2" in tip
    assert "And another?" in tip


def test_what_is_typed_after_a_click_on_a_button_is_a_message(tab: Tab) -> None:
    box = tab.page.locator(".message textarea")
    tab.page.click(".examples button >> nth=0")
    tab.page.keyboard.type("Name a color.")
    assert box.input_value() == "Name a color."
    instruction = tab.page.get_by_label("Instruction", exact=True)
    tab.wait_until(lambda: instruction.input_value() == _AHOY)
    tab.page.click("[aria-label^=Colors]")
    tab.page.keyboard.type("Or two.")
    assert box.input_value() == "Name a color.Or two."
    # A key of the keyboard's own use stays with the button, and a field keeps what is typed in it.
    tab.page.click("[aria-label^=Colors]")
    tab.page.keyboard.press("Space")
    assert box.input_value() == "Name a color.Or two."
    instruction.fill("Be")
    tab.page.keyboard.type(" kind.")
    assert instruction.input_value() == "Be kind."
    assert box.input_value() == "Name a color.Or two."


def test_thoughts_are_folded_above_the_answer_and_not_stored(tab: Tab) -> None:
    tab.page.click("[aria-label='Model']")
    tab.page.click(".q-menu >> text=thinking")
    tab.page.wait_for_selector(".welcome")
    tab.set_setting(_MAX_TOKENS, 2)
    answers = tab.ask("Well?")
    assert answers[0] == "Yes!"
    thoughts = tab.page.locator(".thoughts >> nth=0")
    assert thoughts.inner_text() == "Thoughts"
    thoughts.locator("summary").click()
    assert "Hmm <b>" in thoughts.inner_text()
    assert tab.page.locator(".thoughts b").count() == 0
    tab.page.reload()
    tab.page.wait_for_selector(".markdown >> text=Yes!")
    assert not tab.page.locator(".thoughts >> nth=0").is_visible()


def test_a_chat_survives_a_reload_and_is_downloaded(tab: Tab) -> None:
    tab.set_setting(_MAX_TOKENS, 12)
    instruction = tab.page.get_by_label("Instruction", exact=True)
    for text, message in ((_AHOY, "Name a color."), (_CURIOUS, "And another?")):
        instruction.fill(text)
        tab.ask(message)
    texts = tab.page.locator(".user, .markdown")
    turns, marks = texts.all_inner_texts(), tab.marks()
    tab.page.reload()
    tab.wait_until(lambda: tab.count(".turn") == 2)
    assert (texts.all_inner_texts(), tab.marks()) == (turns, marks)
    with tab.page.expect_download() as download:
        tab.page.click("[aria-label^='Save the chat']")
        tab.page.click(".q-menu >> text=other")
    messages = json.loads(Path(download.value.path()).read_text())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == [
        f"Name a color.\n\n{_AHOY}",
        f"And another?\n\nFrom now on: {_CURIOUS}",
    ]
    assert download.value.suggested_filename == "chat-2.json"


def test_stop_retry_and_undo(tab: Tab, server: GattServer) -> None:
    tab.set_setting(_MAX_TOKENS, 250)
    tab.start_answer(_STORY)
    assert server.metric("sequences_in_use") == 1
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector(".streaming", state="detached")
    tab.wait_until(lambda: server.metric("sequences_in_use") == 0, 2)
    assert tab.page.locator(".note").all_inner_texts() == ["stopped", "stopped"]
    answer = tab.page.inner_text(".markdown >> nth=0")
    tab.set_setting(_MAX_TOKENS, 8)
    tab.page.click("text=Try again")
    tab.page.wait_for_selector(".note >> nth=0 >> text=cut at 8 tokens")
    tab.page.wait_for_selector(".streaming", state="detached")
    assert tab.page.inner_text(".markdown >> nth=0") != answer
    assert tab.count(".turn") == 1
    tab.page.click("text=Undo")
    tab.wait_until(lambda: tab.count(".turn") == 0)
    assert tab.page.input_value(".message textarea") == _STORY


def test_who_leaves_frees_the_sequence(tab: Tab, server: GattServer) -> None:
    tab.set_setting(_MAX_TOKENS, 250)
    tab.start_answer(_STORY)
    tokens = server.metric("generated_tokens_total")
    tab.page.goto("about:blank")
    tab.wait_until(lambda: server.metric("sequences_in_use") == 0, 3)
    assert server.metric("generated_tokens_total") - tokens < 250
    tab.page.goto(server.url)
    tab.page.wait_for_selector("#turn-1")  # the text so far is stored


def test_nothing_that_a_model_writes_runs_or_loads(tab: Tab) -> None:
    tab.upload_turns((_HOSTILE, _HOSTILE))
    for _ in range(2):
        tab.page.wait_for_selector(".markdown strong")
        tab.page.wait_for_timeout(300)
        assert tab.page.evaluate("window.hacked") is None
        for element in ("img", "script", "iframe", "[onmouseover]", "a[href^=javascript]"):
            assert tab.count(f".turns {element}") == 0
        answer = tab.page.inner_text(".markdown >> nth=0")
        assert "<script>window.hacked=2</script>" in answer
        assert "<b> {{ 7*7 }}" in answer
        assert "${window.hacked=4}" in answer
        assert "<script>window.hacked=2</script>" in tab.page.inner_text(".user")
        tab.page.reload()  # then it comes with the page itself


def test_files_that_are_not_chats_are_refused(tab: Tab) -> None:
    tab.upload({"messages": [{"role": "user", "content": "x"}]})
    tab.page.wait_for_selector("text=The file ends with a message of the user.")
    tab.upload("nothing")
    tab.page.wait_for_selector("text=The file is not a chat.")


def test_a_phone_shows_the_same_page_in_its_own_colors(
    browser: Browser, server: GattServer
) -> None:
    phone = Tab(browser, server.url, phone=True)
    phone.upload_turns(("word " * 60, f"{'x' * 400}\n\n```\n{'y ' * 200}\n```"))
    first, second = phone.boxes(".answer")
    assert first.left == second.left
    assert first.bottom <= second.top
    is_wide = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('pre')"
    wide = phone.page.evaluate(f"[...document.querySelectorAll('main *')].filter({is_wide}).length")
    assert wide == 0
    assert phone.page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    background = "getComputedStyle(document.body).backgroundColor"
    assert phone.page.evaluate(background) == "rgb(21, 23, 27)"
    phone.page.tap("[aria-label^=Colors]")
    phone.page.wait_for_selector("[aria-label='Colors: light']")
    assert phone.page.evaluate(background) == "rgb(255, 255, 255)"
    assert not phone.page.locator("text=done <1>").is_visible()
    phone.page.tap("[aria-label='Chats and runs'] >> nth=-1")
    phone.page.locator("text=done <1>").wait_for(state="visible")
    controls = "[...document.querySelectorAll('button, input:not([type=file]), textarea, a')]"
    is_unnamed = "e => !(e.innerText || e.ariaLabel || e.labels?.length)"
    unnamed = phone.page.evaluate(f"{controls}.filter({is_unnamed}).map(e => e.outerHTML)")
    assert unnamed == []
    phone.close()


def _nearly_fill(tab: Tab) -> None:
    """Upload six turns, and ask for answers for which there is no room."""
    words = "word " * 25
    tab.upload_turns(*((f"Number {n}? {words}", f"It is {n}. {words}") for n in range(6)))
    tab.set_setting(_MAX_TOKENS, 200)
    tab.page.wait_for_selector("text=Nearly full:")


def test_a_full_context_is_reported_before_anything_is_lost(tab: Tab) -> None:
    _nearly_fill(tab)
    tab.send("And what now?")
    tab.page.wait_for_selector("text=Nothing has been dropped")
    tab.page.click(".card >> text=Cancel")
    tab.page.wait_for_selector(".card", state="detached")
    assert tab.page.input_value(".message textarea") == "And what now?"
    assert tab.count(".turn") == 6
    tab.page.click("[aria-label^=Send]")
    tab.page.click("text=Send it, for an answer of")
    tab.wait_until(lambda: tab.count(".turn") == 7 and tab.count(".streaming") == 0)
    assert "Number 0?" in tab.page.inner_text("#turn-1")


def test_a_summary_replaces_the_middle_if_the_user_accepts_it(tab: Tab) -> None:
    _nearly_fill(tab)
    tab.send("And what now?")
    tab.page.click("text=Sum up 2 turns")
    tab.page.click("text=Replace these turns with it")
    tab.page.wait_for_selector("#turn-2 .user >> text=Sum up in a few sentences")
    assert "Number 0?" in tab.page.inner_text("#turn-1")
    assert "Number 3?" in tab.page.inner_text("#turn-3")


def test_two_tabs_of_a_browser_show_the_same_chat(tab: Tab) -> None:
    tab.set_setting(_MAX_TOKENS, 4)
    tab.ask("Hello.")
    second = tab.context.new_page()
    second.goto(tab.url)
    second.wait_for_selector("#turn-1")
    tab.ask("And again.")
    second.wait_for_selector("#turn-2")


def test_chats_are_listed_opened_and_deleted(tab: Tab) -> None:
    for text in ("First", "Second"):
        tab.upload_turns((text, f"{text} it is."))
        tab.page.wait_for_selector(f".markdown >> text={text} it is.")
    tab.page.click(".sidebar >> text=First")
    tab.page.wait_for_selector(".markdown >> text=First it is.")
    tab.page.hover("li:has-text('Second')")
    tab.page.click("li:has-text('Second') [aria-label^=Delete]")
    tab.page.click(".card >> text=Delete >> nth=-1")
    tab.wait_until(lambda: tab.count(".sidebar li .title") == 1)
    tab.page.reload()
    tab.page.wait_for_selector(".markdown >> text=First it is.")
    assert tab.count(".sidebar li .title") == 1
    tab.page.click("text=New chat")
    tab.page.wait_for_selector(".welcome")


def test_other_models_start_a_new_chat(tab: Tab) -> None:
    tab.upload_turns(("Hello", "Hi."))
    tab.page.click("[aria-label='Model to compare with']")
    tab.page.click(".q-menu >> text=No comparison")
    tab.page.wait_for_selector(".welcome")
    tab.set_setting(_MAX_TOKENS, 4)
    assert len(tab.ask("Hello.")) == 1


def test_runs_open_their_report_and_no_path_does(tab: Tab, server: GattServer) -> None:
    assert tab.page.locator(".runs a").all_inner_texts() == ["done <1>"]
    with tab.context.expect_page() as opened:
        tab.page.click(".runs a")
    assert opened.value.inner_text("h1") == "It keeps its word"
    done = "done%20%3C1%3E"
    response = httpx.get(f"{server.url}/runs/{done}")
    assert response.status_code == 200
    assert "sandbox" in response.headers["content-security-policy"]
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


def test_a_key_is_required_once(browser: Browser, tmp_path: Path) -> None:
    options = ("--api-key", "s3cret", "--context", 512)
    with _storage_in(tmp_path), gatt_server(tmp_path, MODEL, *options) as server:
        tab = Tab(browser, server.url)
        assert tab.count(".message") == 0
        assert httpx.get(f"{server.url}/runs/x").status_code == 404
        for key in ("wrong", "s3cret"):
            tab.page.get_by_label("API key").fill(key)
            tab.page.keyboard.press("Enter")
            if key == "wrong":
                tab.page.wait_for_selector("text=not the key of this server")
        tab.page.wait_for_selector(".message textarea")
        assert tab.count(".models .vs:visible") == 0  # there is only one model
        tab.page.reload()
        tab.page.wait_for_selector(".message textarea")
        cookies = tab.context.storage_state()
        tab.close()
        with browser.new_context(storage_state=cookies) as context:
            page = context.new_page()
            page.goto(server.url)
            page.fill(".message textarea", "Tell me a very long story.")
            page.keyboard.press("Enter")
            page.wait_for_selector(".streaming .markdown > *")
            # An open tab and a running answer do not delay the server's end.
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            server.process.wait(20)
            assert time.monotonic() - start < 8
            assert "Traceback" not in server.log
        data = (path for path in (tmp_path / "data").rglob("*") if path.is_file())
        assert not [path for path in data if "s3cret" in path.read_text()]
