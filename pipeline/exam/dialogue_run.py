"""One dialogue of the exam in one arm: its requests, its window, and what each reply took.

A reply has its share of the time: each moment is divided among the answers that are being generated
in it. The sum is the time of the arm, also when it was interrupted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import GattError
from pipeline.exam.arms import Arm
from pipeline.exam.models import estimated_tokens
from pipeline.exam.settings import (
    TURNS_AFTER_FULL,
    ExamSettings,
    drop_older_half,
    messages_left,
    without_system_role,
)
from pipeline.exam.tasks import ExamTask
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.quality import up_to_loop
from pipeline.gatt.rollout import ReplyKey, Rollout, Turn
from pipeline.gatt.seeds import derive_seed
from pipeline.records import SAMPLERS, Completion, Message, Reply, Request, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamReply:
    """A reply, and what it took.

    `dropped` exchanges had left the prompt because the context was full. `reminder_tokens` of the
    prompt were added by the arm.
    """

    reply: Reply
    dropped: int
    reminder_tokens: int
    seconds: float

    @property
    def is_full(self) -> bool:
        """Return whether the chat no longer fitted in the context."""
        return bool(self.dropped) or self.reply.finish == "context"


def read_reply(row: dict[str, Any]) -> ExamReply:
    """Return a reply from a row of a log."""
    return ExamReply(**{**row, "reply": Reply(**row["reply"])})


def logged_reply(row: dict[str, Any], log_file: Path, version: str) -> ExamReply:
    """Return a reply from a row of `log_file`, which a `version` of gatt has written.

    Raises:
        GattError: the row has other fields than this version reads.
    """
    try:
        return read_reply(row)
    except (KeyError, TypeError) as error:
        raise GattError(
            f"{log_file} has a reply of gatt {version} with other fields than gatt {__version__} "
            f"reads ({error}). Take the version that wrote it, or run the exam again in another "
            "folder."
        ) from error


def up_to_full(replies: Sequence[ExamReply]) -> Sequence[ExamReply]:
    """Return those of a dialogue up to the last one that is measured in a full context."""
    full_turns = 0
    for number, row in enumerate(replies, 1):
        full_turns += row.is_full and not row.reply.recall_attribute
        if full_turns == TURNS_AFTER_FULL:
            return replies[:number]
    return replies


def are_filled(replies: Iterable[ExamReply]) -> bool:
    """Return whether the context was full for as many turns as are measured in each dialogue."""
    full_turns: Counter[tuple[str, str]] = Counter()
    for row in replies:
        is_counted = row.is_full and not row.reply.recall_attribute
        full_turns[row.reply.arm, row.reply.dialogue] += is_counted
    return all(turns >= TURNS_AFTER_FULL for turns in full_turns.values())


class SharedTime:
    """Divides the time among the answers that are being generated."""

    def __init__(self) -> None:
        self._running, self._share, self._last = 0, 0.0, 0.0
        self._preparation = 0.0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Count the time of a block, in which nothing is generated, to the next answer's share."""
        start = time.perf_counter()
        yield
        self._preparation += time.perf_counter() - start

    def start(self) -> float:
        """Begin an answer; return what `end` takes."""
        self._advance()
        self._running += 1
        return self._share

    def end(self, start: float) -> float:
        """End an answer; return its share in seconds."""
        self._advance()
        self._running -= 1
        preparation, self._preparation = self._preparation, 0.0
        return self._share - start + preparation

    def _advance(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._share += (now - self._last) / self._running
        self._last = now


class ExamRun:
    """What the dialogues of a run share: `turns` of each, 0 until the context has been full.

    `exam` is the name of the set. `done` grows with each reply. `stop_when` may end an answer
    once it loops, as what follows is left out in any case.
    """

    def __init__(
        self,
        exam: str,
        turns: int,
        settings: ExamSettings,
        done: dict[ReplyKey, ExamReply],
    ) -> None:
        self.exam, self.turns, self.settings, self.done = exam, turns, settings, done
        self.time = SharedTime()
        self.count_tokens: Callable[[str], int] = estimated_tokens
        self.stop_when: Callable[[str], bool] | None = None

    def record(self, row: ExamReply) -> None:
        """Keep a new reply."""
        self.done[ReplyKey.of(row.reply)] = row


class DialogueRun:
    """One dialogue in one arm, and which of its messages fit in the context.

    It ends with turn `last_turn`, if that is not 0.
    """

    def __init__(self, run: ExamRun, arm: Arm, task: ExamTask, last_turn: int = 0) -> None:
        self._run, self._arm, self._exam_task = run, arm, task
        limits = (last_turn, run.turns, len(task.assigned.dialogue.turns))
        self._max_turns = min(limit for limit in limits if limit)
        self._settings = run.settings
        earlier = [
            r
            for key, r in run.done.items()
            if (key.arm, key.dialogue) == (arm.name, task.id) and not key.recall_attribute
        ]
        self._dropped = {r.reply.turn: r.dropped for r in earlier}
        self._full_turns = sum(r.is_full for r in earlier)
        self._turn = Turn(0)
        self._added: tuple[str, ...] = ()
        self._sent_dropped = self._reminder_tokens = 0
        self._seconds = 0.0

    def task(self) -> Task:
        """Generate the replies, and leave out messages where the context is full."""
        recorded = {key: r.reply for key, r in self._run.done.items()}
        recorded |= given_replies(self._arm.name, self._exam_task)
        assigned = self._exam_task.assigned
        rollout = Rollout(
            arm=self._arm.name,
            max_turns=self._max_turns,
            make_request=self._request,
            record=self._record,
            recorded=recorded,
        )
        with closing(rollout.run(assigned)) as replies:
            request = next(replies, None)
            while request is not None and not self.is_over:
                completion = yield from self._answer(request)
                try:
                    request = replies.send(completion)
                except StopIteration:
                    return

    @property
    def is_over(self) -> bool:
        """Return whether the context has been full for as many turns as are measured."""
        return not self._run.turns and self._full_turns >= TURNS_AFTER_FULL

    def _request(self, assigned: AssignedDialogue, turn: Turn, answers: list[str]) -> Request:
        self._turn = turn
        prompt = self._arm.prompt(assigned, answers, self._exam_task.system)
        self._added = prompt.added
        sampler, settings = SAMPLERS[self._settings.sampler], self._settings
        place = [self._run.exam, settings.seed, self._exam_task.id, turn.number]
        if turn.recall:
            place.append(turn.recall.attribute)
        return Request(
            messages=prompt.messages,
            seed=derive_seed(*place),
            max_tokens=settings.max_tokens * self._exam_task.max_tokens_factor,
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            sampler=sampler.settings,
            max_thought_tokens=settings.max_thought_tokens,
            stop_when=self._run.stop_when if self._exam_task.ends_loops else None,
        )

    def _answer(self, request: Request) -> Generator[Request, Completion, Completion]:
        """Ask with as many of the messages as fit; the generator returns the completion."""
        # Of a longer exam in the same log, later turns are there, too.
        before = (n for turn, n in self._dropped.items() if turn < self._turn.number)
        dropped, policy = max(before, default=0), self._settings.window
        completion = Completion("", 0, 0, "context")
        start = self._run.time.start()
        try:
            while (left := messages_left(request.messages, dropped, policy)) is not None:
                messages: tuple[Message, ...] = tuple(request.messages[n] for n in left)
                if not self._settings.system_role:
                    messages = without_system_role(messages)
                completion = yield replace(request, messages=messages)
                if completion.finish != "context" or policy == "refuse":
                    break
                dropped = drop_older_half(request.messages, dropped, policy)
        finally:
            self._seconds = self._run.time.end(start)
        self._sent_dropped = 0 if left is None else dropped
        if not self._turn.recall:  # a question about an attribute leaves no trace
            self._dropped[self._turn.number] = self._sent_dropped
        sent = [self._added[n] for n in left or ()]
        self._reminder_tokens = sum(self._run.count_tokens(text) for text in sent if text)
        return without_loop(completion) if self._exam_task.ends_loops else completion

    def _record(self, reply: Reply) -> None:
        row = ExamReply(
            reply=reply,
            dropped=self._sent_dropped,
            reminder_tokens=self._reminder_tokens,
            seconds=round(self._seconds, 6),
        )
        self._run.record(row)
        if not reply.recall_attribute:
            self._full_turns += bool(self._sent_dropped) or reply.finish == "context"


def without_loop(completion: Completion) -> Completion:
    """Return a completion that ends where it has become a loop, wherever its engine ended it."""
    text = up_to_loop(completion.text)
    if text == completion.text:
        return completion
    return replace(completion, text=text, finish="stop_when")


def given_replies(arm: str, task: ExamTask) -> dict[ReplyKey, Reply]:
    """Return the given answers of a task as replies; they are neither generated nor counted."""
    replies = [
        Reply(
            arm=arm,
            dialogue=task.id,
            turn=turn,
            text=text,
            prompt_tokens=0,
            tokens=0,
            finish="stop",
            obeys=None,
            defect="",
        )
        for turn, text in task.given.items()
    ]
    return {ReplyKey.of(reply): reply for reply in replies}
