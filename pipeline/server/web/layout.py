"""What stands around the conversation: the list of chats and runs, the models, the strips, and the boxes to write in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

from nicegui import events, ui

from pipeline.chat.conversation import CHANGE_PREFIX, Conversation
from pipeline.gatt.instructions import render_instruction
from pipeline.records import Constraint
from pipeline.server.web.markdown import strip
from pipeline.server.web.session import Talk

_ALONE = ""
"""In the place of a second model."""
_EXAMPLES = (
    Constraint("opening", "Ahoy!"),
    Constraint("closing", "Stay curious!"),
    Constraint("max_words", "30"),
)
_THEMES = {
    None: ("brightness_auto", "as the system"),
    False: ("light_mode", "light"),
    True: ("dark_mode", "dark"),
}
_SENDS = "(e) => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) { e.preventDefault(); emit(e.target.value) } }"
_READS = """async (e) => { const file = e.target.files[0]; e.target.value = '';
  if (file) emit(file.size < 500000 ? await file.text() : null) }"""


class Actions(Protocol):
    """What the frame asks for."""

    async def send(self, event: events.GenericEventArguments) -> None: ...
    def stop(self) -> None: ...
    async def retry(self) -> None: ...
    async def undo(self) -> None: ...
    def instruct(self, text: str) -> None: ...
    async def begin(self, models: tuple[str, ...] = ()) -> None: ...
    async def open(self, name: str) -> None: ...
    async def delete(self, name: str) -> None: ...
    def download(self, side: int) -> None: ...
    async def upload(self, event: events.GenericEventArguments) -> None: ...
    async def settings(self) -> None: ...
    def theme(self) -> None: ...


class Layout:
    """The page's fixed parts. `turns` is where the conversation goes."""

    def __init__(
        self, models: Sequence[str], runs: Sequence[str], actions: Actions, dark: bool | None
    ) -> None:
        self._models, self._actions = list(models), actions
        self._showing: tuple[str, ...] = ()
        self.instruction: ui.input
        ui.on("chat_stop", actions.stop)
        with ui.element("div").classes("page"):
            self._side(runs)
            ui.element("div").classes("shade").on("click", js_handler="() => chat.menu(false)")
            with ui.element("main"):
                self._top(dark)
                self._strips = (
                    ui.html(sanitize=True)
                    .classes("strips")
                    .props('aria-label="Which turns keep the instruction"')
                )
                self.turns = (
                    ui.element("div")
                    .classes("turns")
                    .props("role=log aria-live=polite aria-label=Conversation tabindex=0")
                )
                self._composer()

    def _side(self, runs: Sequence[str]) -> None:
        actions = self._actions
        with ui.element("nav").classes("side").props('aria-label="Chats and runs"'):
            ui.html("gatt", tag="h1")
            ui.button("New chat", icon="add", color=None, on_click=lambda: actions.begin()).props(
                "flat no-caps align=left"
            ).classes("new")
            ui.html("Chats", tag="h2")
            self._list = ui.element("ul")
            picker = ui.element("input").props(
                'type=file accept=".json,application/json" hidden tabindex=-1'
            )
            picker.on("change", actions.upload, js_handler=_READS)
            ui.button("Open a file…", icon="upload_file", color=None).props(
                "flat no-caps align=left"
            ).classes("quiet").on("click", js_handler=f"() => getHtmlElement({picker.id}).click()")
            if runs:
                ui.html("Reports of runs", tag="h2")
                with ui.element("ul").classes("runs"):
                    for name in runs:
                        with ui.element("li"):
                            ui.link(name, f"/runs/{quote(name, safe='')}", new_tab=True)

    def _top(self, dark: bool | None) -> None:
        actions = self._actions
        with ui.element("header").classes("top"):
            _icon("menu", "Chats and runs").classes("menu").on(
                "click", js_handler="() => chat.menu()"
            )
            with ui.element("div").classes("models"):
                self._first = ui.select(self._models, on_change=self._chosen).props(
                    'dense borderless aria-label="Model"'
                )
                others = {_ALONE: "nothing beside it", **{name: name for name in self._models}}
                self._vs = ui.label("beside").classes("vs")
                self._second = ui.select(others, on_change=self._chosen).props(
                    'dense borderless aria-label="Model beside it"'
                )
                self._vs.set_visibility(len(self._models) > 1)
                self._second.set_visibility(len(self._models) > 1)
            ui.element("div").classes("gap")
            with _icon("download", "Save the chat as a file (JSON)"), ui.menu().props("auto-close"):
                self._downloads = [
                    ui.menu_item("", lambda side=side: actions.download(side)) for side in (0, 1)
                ]
            _icon("tune", "Settings").on("click", actions.settings)
            self._theme = _icon("", "").on("click", actions.theme)
            self.show_theme(dark)

    def _composer(self) -> None:
        actions = self._actions
        with ui.element("footer").classes("composer"):
            with ui.element("div").classes("write"):
                with ui.element("div").classes("instruction"):
                    self.instruction = (
                        ui.input("Instruction", placeholder="Something every answer is to keep to")
                        .props("dense borderless stack-label maxlength=2000 autocomplete=off")
                        .on("change", lambda: actions.instruct(self.instruction.value or ""))
                    )
                    self._checked = ui.label().classes("checked")
                with ui.element("div").classes("message"):
                    self.message = (
                        ui.textarea(placeholder="Message")
                        .props(
                            "autogrow borderless dense rows=1 maxlength=100000 aria-label=Message input-class=message-box autofocus"
                        )
                        .on("keydown", actions.send, js_handler=_SENDS)
                    )
                    self._send = (
                        _icon("arrow_upward", "Send (Enter)")
                        .classes("send")
                        .on("click", actions.send, js_handler="() => emit(chat.box().value)")
                    )
                    self._stop = (
                        _icon("stop", "Stop (Esc)").classes("send stop").on("click", actions.stop)
                    )
            with ui.element("div").classes("state"):
                self._retry = ui.button(
                    "Try again", icon="refresh", color=None, on_click=actions.retry
                ).props("flat dense no-caps size=sm")
                self._undo = ui.button(
                    "Undo", icon="undo", color=None, on_click=actions.undo
                ).props("flat dense no-caps size=sm")
                ui.element("div").classes("gap")
                self._status = ui.label().props("role=status")

    async def _chosen(self) -> None:
        """Other models begin a new chat."""
        first, second = self._first.value, self._second.value
        if first == second:  # they change places
            second = self._showing[0] if self._showing[0] != first else _ALONE
        models = tuple(name for name in (first, second) if name)
        if models and models != self._showing:
            self._showing = models
            await self._actions.begin(models)

    def choose_models(self, models: tuple[str, ...]) -> None:
        """Show which ones answer; also those that are not served any more."""
        self._showing = models
        first, second = (*models, _ALONE)[:2]
        self._first.set_options(list(dict.fromkeys([*self._models, first])), value=first)
        others = {
            _ALONE: "nothing beside it",
            **{name: name for name in (*self._models, second) if name not in ("", first)},
        }
        self._second.set_options(others, value=second)
        for item, name in zip(self._downloads, (*models, ""), strict=False):
            item.clear()
            with item:
                ui.label(name)
            item.set_visibility(bool(name))

    def welcome(self) -> None:
        """What stands in an empty chat."""
        with ui.element("div").classes("welcome"):
            ui.html("Does it keep its word?", tag="h2")
            ui.label(
                "Give an instruction, talk for a while, and watch whether every answer still keeps to it."
            )
            with ui.element("div").classes("examples"):
                for text in (render_instruction((example,)).text for example in _EXAMPLES):
                    ui.button(
                        text, color=None, on_click=_giving(self._actions.instruct, text)
                    ).props("outline no-caps")

    def list_chats(self, chats: Mapping[str, Any], present: str) -> None:
        """The chats that are kept, the youngest first."""
        actions = self._actions
        self._list.clear()
        with self._list:
            for name, kept in reversed(list(chats.items())):
                with ui.element("li").classes("present" if name == present else ""):
                    title = str(kept["title"])
                    ui.button(
                        title, color=None, on_click=lambda name=name: actions.open(name)
                    ).props(
                        f"flat no-caps align=left{' aria-current=true' if name == present else ''}"
                    ).classes("title")
                    _icon("close", "Delete this chat").classes("delete").on(
                        "click", lambda name=name: actions.delete(name)
                    )
            if not chats:
                ui.label("None yet.").classes("hint")

    def show_strips(self, talk: Talk) -> None:
        """One a model, once there is a turn."""
        rows = zip(talk.models, talk.verdicts(), strict=True)
        html = "".join(
            f'<div class="strip">{strip(name, talk.chat, found)}</div>' for name, found in rows
        )
        self._strips.set_content(html if talk.chat.turns else "")

    def explain(self, chat: Conversation) -> None:
        """How the instruction is checked, and in which words it goes with the next message."""
        told, last = chat.instruction, chat.turns[-1].instruction if chat.turns else None
        names = ", ".join(c.name for c in told.constraints)
        parts = (
            [
                f"checked as {names}"
                if names
                else "not checked: a program does not know this wording"
            ]
            if told.text
            else []
        )
        if last is not None and told != last:
            words = (
                f"goes with your next message, as “{CHANGE_PREFIX}…”"
                if told.text
                else "no longer in force; the chat still has it"
            )
            parts = [words, *parts]
        self._checked.set_text(" · ".join(parts))

    def set_mode(self, answering: bool, begun: bool, served: bool) -> None:
        """Which buttons there are."""
        self._send.set_visibility(not answering)
        self._send.set_enabled(served)
        self._stop.set_visibility(answering)
        for button in (self._retry, self._undo):
            button.set_visibility(begun)
            button.set_enabled(not answering)

    def say(self, text: str, warn: bool = False) -> None:
        """The state of the context."""
        self._status.set_text(text)
        self._status.classes(add="warn" if warn else "", remove="" if warn else "warn")

    def show_theme(self, dark: bool | None) -> None:
        """Which of the three is on."""
        icon, name = _THEMES[dark]
        self._theme.props(f'icon={icon} aria-label="Colors: {name}" title="Colors: {name}"')


def _icon(icon: str, label: str) -> ui.button:
    return ui.button(icon=icon, color=None).props(
        f'flat round dense aria-label="{label}" title="{label}"'
    )


def _giving(take: Callable[[str], None], text: str) -> Callable[[], None]:
    return lambda: take(text)
