"""A chat that goes on: turns, what they are worth, and what to do when the context is full. The commands are in commands.py."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from pipeline.chat.conversation import LAST_TURNS, SUMMARY_TOKENS, Conversation, Turn, tally
from pipeline.chat.terminal import Screen
from pipeline.errors import GattError
from pipeline.inference.chat_engine import ChatEngine
from pipeline.records import Completion, Message, Request


@dataclass(frozen=True, slots=True)
class ChatParams:
    """How answers are drawn. `context` and `max_tokens` (of an answer) are in tokens."""

    temperature: float = 0.7
    max_tokens: int = 256
    context: int = 4096
    seed: int = 1

    def checked(self, limit: int) -> ChatParams:
        """Themselves, where they make sense for a model made for `limit` tokens.

        Raises:
            GattError: they do not.
        """
        if not 0 <= self.temperature <= 5:
            raise GattError(
                f"temperature is {self.temperature:g}; expected 0 (always the likeliest token) to 5."
            )
        if not 64 <= self.context <= limit:
            raise GattError(
                f"context is {self.context}; expected 64 to {limit}, for which the model was made."
            )
        if not 1 <= self.max_tokens <= self.context // 2:
            raise GattError(
                f"max_tokens is {self.max_tokens}; expected 1 to {self.context // 2}, half of the context."
            )
        if self.seed < 0:
            raise GattError(f"seed is {self.seed}; expected a whole number from 0 on.")
        return self

    def set(self, text: str) -> ChatParams:
        """With the changes of "name=value name=value".

        Raises:
            GattError: no such name, or a value of another type.
        """
        changed = self
        for word in text.split():
            name, _, value = word.partition("=")
            known = {f.name: getattr(self, f.name) for f in fields(self)}
            if name not in known:
                raise GattError(
                    f"Unknown parameter {name!r}.{did_you_mean(name, known)} Expected name=value of {', '.join(known)}."
                )
            try:
                changed = replace(changed, **{name: type(known[name])(value)})
            except ValueError as error:
                raise GattError(
                    f"{name} is {value!r}; expected a number such as {known[name]}."
                ) from error
        return changed

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


class Session:
    """A chat with `speakers` on a `screen`; `names` are those of the models, `limit` the tokens they were made for."""

    def __init__(
        self,
        screen: Screen,
        speakers: ChatEngine,
        names: Sequence[str],
        limit: int,
        parameters: ChatParams,
        chat: Conversation,
    ) -> None:
        self.screen, self.speakers, self.chat = screen, speakers, chat
        self.names, self.limit, self.parameters = names, limit, parameters
        self.sides = range(len(names))
        self.draft = ""
        """What the user has typed and was not sent."""
        self.saved = chat
        self._speed = ""
        self._draws = 0

    @property
    def unsaved(self) -> bool:
        """Whether something was said that stands in no file."""
        return bool(self.chat.turns) and self.chat is not self.saved

    def turn(self, user: str) -> None:
        """Send a message and take the answers.

        Raises:
            GattError: there is no room and nobody to choose what to do, or no answer. The chat is as before.
        """
        self.draft = user  # to be sent again, should anything go wrong
        if not self._make_room(user):
            return
        done = self.hear(
            [self.chat.messages(side, user) for side in self.sides], self.parameters.max_tokens
        )
        if not any(c.text for c in done):
            raise GattError("Stopped before a word was said: this turn is taken back.")
        self.draft = ""
        self._draws += 1
        self.chat = self.chat.with_turn(user, [c.text for c in done])
        self._remark(done)

    def hear(self, chats: Sequence[Sequence[Message]], max_tokens: int) -> list[Completion]:
        """An answer of each model to its chat, shown while it comes."""
        # The count of draws: another attempt at the same turn is to be another draw.
        seed = self.parameters.seed + self._draws
        requests = [
            Request(tuple(chat), seed, max_tokens, self.parameters.temperature) for chat in chats
        ]
        done: dict[int, Completion] = {}
        clock = _Clock(len(chats))

        def status() -> str:
            return f"turn {len(self.chat.turns) + 1} · {clock.speed()} · Ctrl-C stops the answer"

        with self.screen.answering(self.names, status, self.speakers.stop) as add:
            for side, heard in self.speakers.answer(requests):
                if isinstance(heard, Completion):
                    done[side] = heard
                    clock.heard(side, heard.tokens)
                else:
                    add(side, heard)
                    clock.heard(side)
        self._speed = clock.speed()
        return [done[side] for side in self.sides]

    def _remark(self, done: Sequence[Completion]) -> None:
        """Whether the last answers keep the instruction, how often that was so, and what cut them off."""
        cut = {"enough": "stopped", "length": f"cut at {self.parameters.max_tokens} tokens"}
        remarks: list[str] = []
        for side, completion in enumerate(done):
            mark, flaw = self.chat.verdict(side, len(self.chat.turns))
            parts = [f"{mark} {tally(self.chat.marks(side))}" if mark else ""]
            parts += [
                f"obeys, but is no answer ({flaw})" if mark == "~" else "",
                cut.get(completion.finish, ""),
            ]
            remarks.append(" · ".join(filter(None, parts)))
        if any(remarks):
            self.screen.beside(self.names, remarks)

    def used(self, user: str | None = None) -> int:
        """Tokens of the longest side's chat, up to the answer to `user`."""
        if user is None and not self.chat.turns:
            return 0
        return max(
            self.speakers.tokens(s, self.chat.messages(s, user), user is not None)
            for s in self.sides
        )

    def status(self) -> str:
        """The next turn, what is used and left of the context, and how fast the last answer came."""
        used, room = self.used(), self.speakers.context
        parts = [
            f"turn {len(self.chat.turns) + 1}",
            f"context {used} of {room}, {room - used} left",
            self._speed,
        ]
        return " · ".join(filter(None, parts))

    def _make_room(self, user: str) -> bool:
        """Whether message and answer fit, if need be after what the user chooses; nothing is dropped unasked."""
        while (needed := self.used(user)) + (most := self.parameters.max_tokens) > (
            room := self.speakers.context
        ):
            options: dict[str, str] = {}
            if (larger := min(2 * room, self.limit)) > room:
                options["l"] = f"a larger context, of {larger} tokens"
            middle = self.chat.middle(LAST_TURNS)
            if not all(turn.is_summary for turn in middle):
                options["s"] = (
                    f"a summary in the place of {pluralize(middle)}; turn 1 and the last {LAST_TURNS} stay word for word"
                )
            options["q"] = "stop: nothing is sent, and the chat stays as it is"
            choice = self.screen.choose(
                f"The context of {room} tokens is nearly full: {needed} with this message, and an answer may take {most}. "
                "Nothing has been dropped.",
                options,
            )
            if choice == "q":
                return False
            try:
                if choice == "l":
                    self.resize(larger)
                else:
                    self._sum_up()
            except GattError as error:
                self.screen.complain(str(error))
        return True

    def resize(self, context: int) -> None:
        """Go on with room for `context` tokens.

        Raises:
            GattError: too little memory; the room stays as it is.
        """
        self.speakers = self.speakers.resized(context)
        self.parameters = replace(self.parameters, context=context)
        self.screen.say(f"The context has room for {context} tokens now.")

    def _sum_up(self) -> None:
        chats = [self.chat.summary_prompt(LAST_TURNS, side) for side in self.sides]
        done = self.hear(chats, min(SUMMARY_TOKENS, self.parameters.max_tokens))
        if not all(c.text.strip() for c in done):
            raise GattError(
                "No summary came of it: the middle is too long for one. Take a larger context, or /undo some turns."
            )
        options = {
            "y": f"put it in the place of {pluralize(self.chat.middle(LAST_TURNS))}",
            "n": "leave all as it is",
        }
        if self.screen.choose("Is this summary good enough?", options) == "y":
            self.chat = self.chat.with_summaries(LAST_TURNS, [c.text for c in done])


class _Clock:
    """Tokens a second of each model, from its first token on."""

    def __init__(self, sides: int) -> None:
        self._first: list[float | None] = [None] * sides
        self._tokens = [0] * sides
        self._seconds = [0.0] * sides

    def heard(self, side: int, tokens: int = 0) -> None:
        """One more piece of an answer, or all its `tokens`."""
        now = time.monotonic()
        first = self._first[side] = self._first[side] or now
        self._tokens[side] = tokens or self._tokens[side] + 1
        self._seconds[side] = now - first

    def speed(self) -> str:
        """As the status shows it."""
        rates = [(n - 1) / s for n, s in zip(self._tokens, self._seconds, strict=True) if s > 0]
        return (
            f"{' and '.join(f'{rate:.2g}' if rate < 10 else f'{rate:.0f}' for rate in rates)} tokens/s"
            if rates
            else "reading"
        )


def pluralize(turns: Sequence[Turn]) -> str:
    """How many turns."""
    return f"{len(turns)} turn{'s' * (len(turns) != 1)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question whether the one of the `known` that is near was meant, with a space before it; "" where none is."""
    names = list(known)
    near = [k for k in names if k.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {near[0]}?" if near else ""
