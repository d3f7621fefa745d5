"""What surrounds the conversation: lists of chats and runs, models, strips, and input boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar
from urllib.parse import quote

from nicegui import events, ui

from pipeline.chat.conversation import Conversation
from pipeline.gatt.ghost import CHANGE_PREFIX
from pipeline.gatt.instructions import render_instruction
from pipeline.records import Constraint
from pipeline.server.web.markdown import strip
from pipeline.server.web.stored_chats import PageChat

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")

_NO_COMPARISON = ""
"""The value of the second model if there is none."""
_NO_COMPARISON_LABEL = "No comparison"
_EXAMPLES = (
    Constraint("opening", "Ahoy!"),
    Constraint("closing", "Stay curious!"),
    Constraint("max_words", "30"),
)
_THEMES = {
    None: ("brightness_auto", "system"),
    False: ("light_mode", "light"),
    True: ("dark_mode", "dark"),
}
_EMIT_ON_ENTER = """(e) => { if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) {
  e.preventDefault(); emit(e.target.value) } }"""
_EMIT_FILE = """async (e) => { const file = e.target.files[0]; e.target.value = '';
  if (file) emit(file.size < 500000 ? await file.text() : null) }"""


class Actions(Protocol):
    """What the layout calls when the user does something."""

    async def send(self, event: events.GenericEventArguments) -> None: ...
    def stop(self) -> None: ...
    async def retry(self) -> None: ...
    async def undo(self) -> None: ...
    def instruct(self, text: str) -> None: ...
    async def begin(self, models: tuple[str, ...] = ()) -> None: ...
    async def open(self, chat_id: str) -> None: ...
    async def delete(self, chat_id: str) -> None: ...
    def download(self, model_index: int) -> None: ...
    async def upload(self, event: events.GenericEventArguments) -> None: ...
    async def settings(self) -> None: ...
    def theme(self) -> None: ...


class Layout:
    """The fixed parts of the page. The conversation goes into `turns`."""

    instruction: ui.input
    message: ui.textarea

    def __init__(
        self, models: Sequence[str], runs: Sequence[str], actions: Actions, *, dark: bool | None
    ) -> None:
        self._models, self._actions = list(models), actions
        self._shown_models: tuple[str, ...] = ()
        ui.on("chat_stop", actions.stop)
        with ui.element("div").classes("page"):
            self._build_sidebar(runs)
            ui.element("div").classes("shade").on("click", js_handler="() => chat.menu(false)")
            with ui.element("main"):
                self._build_header()
                self.show_theme(dark=dark)
                self._strips = ui.html(sanitize=True).classes("strips")
                self._strips.props('aria-label="Which turns follow the instruction"')
                self.turns = ui.element("div").classes("turns")
                self.turns.props("role=log aria-live=polite aria-label=Conversation tabindex=0")
                with ui.element("footer").classes("composer"):
                    with ui.element("div").classes("input-box"):
                        self._build_instruction()
                        self._build_message()
                    self._build_status_bar()

    def _build_sidebar(self, runs: Sequence[str]) -> None:
        with ui.element("nav").classes("sidebar").props('aria-label="Chats and runs"'):
            ui.html("gatt", tag="h1")
            new = _text_button("New chat", "add").classes("new")
            new.on_click(lambda: self._actions.begin())
            ui.html("Chats", tag="h2")
            self._list = ui.element("ul")
            picker = ui.element("input")
            picker.props('type=file accept=".json,application/json" hidden tabindex=-1')
            picker.on("change", self._actions.upload, js_handler=_EMIT_FILE)
            upload = _text_button("Open a file…", "upload_file").classes("muted")
            upload.on("click", js_handler=f"() => getHtmlElement({picker.id}).click()")
            if not runs:
                return
            ui.html("Reports of runs", tag="h2")
            with ui.element("ul").classes("runs"):
                for name in runs:
                    with ui.element("li"):
                        ui.link(name, f"/runs/{quote(name, safe='')}", new_tab=True)

    def _build_header(self) -> None:
        actions = self._actions
        with ui.element("header").classes("top"):
            menu = _icon_button("menu", "Chats and runs").classes("menu")
            menu.on("click", js_handler="() => chat.menu()")
            self._build_model_selects()
            ui.element("div").classes("gap")
            download = _icon_button("download", "Save the chat as a file (JSON)")
            with download, ui.menu().props("auto-close"):
                self._downloads = [
                    ui.menu_item("", _call(actions.download, index)) for index in (0, 1)
                ]
            _icon_button("tune", "Settings").on("click", actions.settings)
            self._theme = _icon_button("", "").on("click", actions.theme)

    def _build_model_selects(self) -> None:
        with ui.element("div").classes("models"):
            self._first = ui.select(self._models, on_change=self._choose_models)
            self._first.props('dense borderless aria-label="Model"')
            versus = ui.label("vs.").classes("vs")
            self._second = ui.select(
                {_NO_COMPARISON: _NO_COMPARISON_LABEL}, on_change=self._choose_models
            )
            self._second.props('dense borderless aria-label="Model to compare with"')
            for element in (versus, self._second):
                element.set_visibility(len(self._models) > 1)

    def _build_instruction(self) -> None:
        with ui.element("div").classes("instruction"):
            self.instruction = ui.input(
                "Instruction", placeholder="Instruction every answer should follow"
            )
            self.instruction.props(
                "dense borderless stack-label maxlength=2000 autocomplete=off"
            ).on("change", lambda: self._actions.instruct(self.instruction.value or ""))
            self._check = ui.label().classes("check")

    def _build_message(self) -> None:
        actions = self._actions
        with ui.element("div").classes("message"):
            self.message = ui.textarea(placeholder="Message")
            self.message.props(
                "autogrow borderless dense rows=1 maxlength=100000 aria-label=Message "
                "input-class=message-box autofocus"
            ).on("keydown", actions.send, js_handler=_EMIT_ON_ENTER)
            self._send = _icon_button("arrow_upward", "Send (Enter)").classes("send")
            self._send.on("click", actions.send, js_handler="() => emit(chat.box().value)")
            self._stop = _icon_button("stop", "Stop (Esc)").classes("send stop")
            self._stop.on("click", actions.stop)

    def _build_status_bar(self) -> None:
        with ui.element("div").classes("status-bar"):
            self._retry = _small_button("Try again", "refresh").on_click(self._actions.retry)
            self._undo = _small_button("Undo", "undo").on_click(self._actions.undo)
            ui.element("div").classes("gap")
            self._status = ui.label().props("role=status")

    async def _choose_models(self) -> None:
        """Start a new chat with the models that are selected."""
        first, second = self._first.value, self._second.value
        if first == second:  # they change places
            previous = self._shown_models[0]
            second = previous if previous != first else _NO_COMPARISON
        models = tuple(name for name in (first, second) if name)
        if models and models != self._shown_models:
            self._shown_models = models
            await self._actions.begin(models)

    def show_models(self, models: tuple[str, ...]) -> None:
        """Show the models that answer, including those that are not served any more."""
        self._shown_models = models
        first, second = (*models, _NO_COMPARISON)[:2]
        self._first.set_options(list(dict.fromkeys([*self._models, first])), value=first)
        names = {name: name for name in (*self._models, second) if name not in ("", first)}
        options = {_NO_COMPARISON: _NO_COMPARISON_LABEL, **names}
        self._second.set_options(options, value=second)
        for item, name in zip(self._downloads, (*models, ""), strict=False):
            item.clear()
            with item:
                ui.label(name)
            item.set_visibility(bool(name))

    def welcome(self) -> None:
        """Show what an empty chat contains."""
        with ui.element("div").classes("welcome"):
            ui.html("Does it follow your instruction?", tag="h2")
            ui.label(
                "Give an instruction, chat for a while, and watch whether every answer still "
                "follows it."
            )
            with ui.element("div").classes("examples"):
                for example in _EXAMPLES:
                    text = render_instruction((example,)).text
                    button = ui.button(text, color=None).props("outline no-caps")
                    button.on_click(_call(self._actions.instruct, text))
                    button.on("click", js_handler="() => chat.focus()")

    def list_chats(self, titles: Mapping[str, str], current_id: str) -> None:
        """Show the stored chats; `titles` are by id."""
        self._list.clear()
        with self._list:
            for chat_id, title in titles.items():
                is_current = chat_id == current_id
                with ui.element("li").classes("current" if is_current else ""):
                    button = ui.button(title, color=None).props("flat no-caps align=left")
                    button.classes("title").props("aria-current=true" if is_current else "")
                    button.on_click(_call(self._actions.open, chat_id))
                    delete = _icon_button("close", "Delete this chat").classes("delete")
                    delete.on("click", _call(self._actions.delete, chat_id))
            if not titles:
                ui.label("None yet.").classes("hint")

    def show_strips(self, chat: PageChat) -> None:
        """Show a strip of verdicts for each model, once there is a turn."""
        conversation = chat.conversation
        rows = zip(chat.models, chat.verdicts(), strict=True)
        strips = [strip(name, conversation, verdicts) for name, verdicts in rows]
        html = "".join(f'<div class="strip">{content}</div>' for content in strips)
        self._strips.set_content(html if conversation.turns else "")

    def describe_instruction(self, conversation: Conversation) -> None:
        """Show how the instruction is checked, and what is sent of it with the next message."""
        instruction, parts = conversation.instruction, list[str]()
        if conversation.turns and instruction != conversation.turns[-1].instruction:
            parts.append(
                f"sent with your next message, as “{CHANGE_PREFIX}…”"
                if instruction.text
                else "no longer active; the chat still contains it"
            )
        if instruction.text:
            names = ", ".join(constraint.name for constraint in instruction.constraints)
            parts.append(f"checked as {names}" if names else "not checked: unknown wording")
        self._check.set_text(" · ".join(parts))

    def enable_buttons(self, *, answering: bool, has_turns: bool, is_served: bool) -> None:
        """Show and enable the buttons that can be used now."""
        self._send.set_visibility(not answering)
        self._send.set_enabled(is_served)
        self._stop.set_visibility(answering)
        for button in (self._retry, self._undo):
            button.set_visibility(has_turns)
            button.set_enabled(not answering)

    def set_status(self, text: str, *, warn: bool = False) -> None:
        """Show the state of the context."""
        self._status.set_text(text)
        self._status.classes(add="warn" if warn else "", remove="" if warn else "warn")

    def show_theme(self, *, dark: bool | None) -> None:
        """Show which theme is active."""
        icon, name = _THEMES[dark]
        self._theme.props(f'icon={icon} aria-label="Colors: {name}" title="Colors: {name}"')


def _icon_button(icon: str, label: str) -> ui.button:
    button = ui.button(icon=icon, color=None)
    return button.props(f'flat round dense aria-label="{label}" title="{label}"')


def _text_button(text: str, icon: str) -> ui.button:
    return ui.button(text, icon=icon, color=None).props("flat no-caps align=left")


def _small_button(text: str, icon: str) -> ui.button:
    return ui.button(text, icon=icon, color=None).props("flat dense no-caps size=sm")


def _call(action: Callable[[_Argument], _Result], argument: _Argument) -> Callable[[], _Result]:
    return lambda: action(argument)
