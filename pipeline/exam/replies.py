"""Run the exam's dialogues in every arm; what is done is read back from a log.

A reply's row has its share of the time: each moment is divided among the answers that are being
generated in it. The sum is the time of the arm, also when it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.console import Progress, log, progress
from pipeline.errors import GattError
from pipeline.exam.arms import Arm
from pipeline.exam.models import ExamModel, estimated_tokens, token_counter
from pipeline.exam.settings import TURNS_AFTER_FULL, ExamSettings
from pipeline.exam.tasks import ExamIdentity, ExamTask, frozen_exam
from pipeline.exam.window import messages_left, without_system_role
from pipeline.files import JsonlLog
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.rollout import ReplyKey, Rollout, Turn, turns_of
from pipeline.gatt.seeds import derive_seed
from pipeline.records import SAMPLERS, Completion, Message, Reply, Request, Task

_DONE_TURN_TOKENS = 70
"""A usual turn with its answer: how many turns fill a context, for the progress bar."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamPlan:
    """What is measured of a model: `turns` of each task and arm; 0 until the context is full."""

    model: ExamModel
    tasks: Sequence[ExamTask]
    arms: Sequence[Arm]
    turns: int
    settings: ExamSettings
    max_parallel: int = 0
    exam: ExamIdentity = field(default_factory=frozen_exam)

    @property
    def count(self) -> int:
        """Return the number of replies; about that many where the context decides."""
        return len(self.arms) * sum(
            len(turns_to_answer(task, self._turns_of(task))) for task in self.tasks
        )

    def _turns_of(self, task: ExamTask) -> int:
        usual = (self.settings.context or 4096) // _DONE_TURN_TOKENS + TURNS_AFTER_FULL
        return self.turns or min(usual, len(task.assigned.dialogue.turns))


def turns_to_answer(task: ExamTask, max_turns: int) -> list[Turn]:
    """Return the turns of a task whose answers are not given."""
    return [turn for turn in turns_of(task.assigned, max_turns) if turn.number not in task.given]


class Generated(NamedTuple):
    """All replies, the name of the model as its server calls it, and what the server refused."""

    replies: list[ExamReply]
    name: str
    notes: dict[str, str]


def generate(plan: ExamPlan, log_file: Path) -> Generated:
    """Run every dialogue in every arm; replies that `log_file` has are not generated again.

    Raises:
        GattError: the log has replies of another model or other settings.
    """
    with JsonlLog(log_file) as reply_log:
        done = _read(reply_log, plan, log_file)
        ids = {task.id for task in plan.tasks}
        resumed = sum(key.dialogue in ids and _is_planned(key, plan) for key in done)
        if resumed:
            log(f"exam: {resumed} replies of {plan.model.name} are in {log_file} already.")
        with progress(f"exam: {plan.model.name}", plan.count, resumed) as bar:
            run = _LoggedRun(plan, reply_log, done, bar)
            name, notes = run.run()
    chosen = [r for key, r in done.items() if key.dialogue in ids and _is_planned(key, plan)]
    return Generated(chosen, name, notes)


def _is_planned(key: ReplyKey, plan: ExamPlan) -> bool:
    in_arm = any(key.arm == arm.name for arm in plan.arms)
    return in_arm and (not plan.turns or key.turn <= plan.turns)


def _read(reply_log: JsonlLog, plan: ExamPlan, log_file: Path) -> dict[ReplyKey, ExamReply]:
    """Return what the log has; a new log begins with what its replies depend on."""
    header = {
        "exam": f"{plan.exam.name} {plan.exam.version}",
        "set": plan.exam.sha256,
        "model": plan.model.sha256 or plan.model.server,
        "adapter": plan.model.adapter_sha256,
        **asdict(plan.settings),
    }
    if not reply_log.records:
        reply_log.append(header)
        return {}
    before, *rows = reply_log.records
    other = [name for name, value in header.items() if before.get(name) != value]
    if other:
        changes = ", ".join(f"{name} {before.get(name)} → {header[name]}" for name in other)
        raise GattError(
            f"{log_file} has replies of another exam ({changes}). Choose another folder with --out."
        )
    return {ReplyKey.of(r.reply): r for r in map(read_reply, rows)}


def read_reply(row: dict[str, Any]) -> ExamReply:
    """Return a reply from a row of a log."""
    return ExamReply(**{**row, "reply": Reply(**row["reply"])})


class SharedTime:
    """Divides the time among the answers that are being generated."""

    def __init__(self) -> None:
        self._running, self._share, self._last = 0, 0.0, 0.0

    def start(self) -> float:
        """Begin an answer; return what `end` takes."""
        self._advance()
        self._running += 1
        return self._share

    def end(self, start: float) -> float:
        """End an answer; return its share in seconds."""
        self._advance()
        self._running -= 1
        return self._share - start

    def _advance(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._share += (now - self._last) / self._running
        self._last = now


class ExamRun:
    """What the dialogues of a run share: `turns` of each, 0 until the context has been full.

    `exam` is the name of the set. `done` grows with each reply.
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

    def record(self, row: ExamReply) -> None:
        """Keep a new reply."""
        self.done[ReplyKey.of(row.reply)] = row


class _LoggedRun(ExamRun):
    """All dialogues of one model; each reply is logged."""

    def __init__(
        self,
        plan: ExamPlan,
        reply_log: JsonlLog,
        done: dict[ReplyKey, ExamReply],
        bar: Progress,
    ) -> None:
        super().__init__(plan.exam.name, plan.turns, plan.settings, done)
        self._plan, self._log, self._bar = plan, reply_log, bar
        # Long answers first: a dialogue that runs alone at the end leaves cores idle.
        self._tasks = sorted(plan.tasks, key=lambda task: -task.max_tokens_factor)

    def run(self) -> tuple[str, dict[str, str]]:
        """Run all arms; return the model's name and what its server has refused."""
        plan, settings = self._plan, self.settings
        if all(self._is_done(arm, task) for arm in plan.arms for task in plan.tasks):
            return plan.model.name, {}  # an old log loads no model
        with plan.model.open(
            len(self._tasks), settings.context, plan.max_parallel, settings.max_thought_tokens
        ) as engine:
            self.count_tokens = token_counter(engine)
            for arm in plan.arms:
                engine.run([DialogueRun(self, arm, task).task() for task in self._tasks])
            name = engine.name if plan.model.server else plan.model.name
            return name, dict(engine.changes)

    def _is_done(self, arm: Arm, task: ExamTask) -> bool:
        if not self.turns:
            return False
        turns = turns_to_answer(task, self.turns)
        keys = (ReplyKey(arm.name, task.id, t.number, t.recall_attribute) for t in turns)
        return all(key in self.done for key in keys)

    def record(self, row: ExamReply) -> None:
        """Log a new reply."""
        super().record(row)
        self._log.append(row)
        self._bar.advance()


class DialogueRun:
    """One dialogue in one arm, and which of its messages fit in the context."""

    def __init__(self, run: ExamRun, arm: Arm, task: ExamTask) -> None:
        self._run, self._arm, self._exam_task = run, arm, task
        self._settings = run.settings
        earlier = [
            r
            for key, r in run.done.items()
            if (key.arm, key.dialogue) == (arm.name, task.id) and not key.recall_attribute
        ]
        self._dropped = max((r.dropped for r in earlier), default=0)
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
            max_turns=self._run.turns or len(assigned.dialogue.turns),
            make_request=self._request,
            record=self._record,
            recorded=recorded,
        )
        with closing(rollout.run(assigned)) as replies:
            request = next(replies, None)
            while request is not None and not self._is_over:
                completion = yield from self._answer(request)
                try:
                    request = replies.send(completion)
                except StopIteration:
                    return

    @property
    def _is_over(self) -> bool:
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
        )

    def _answer(self, request: Request) -> Generator[Request, Completion, Completion]:
        """Ask with as many of the messages as fit; the generator returns the completion."""
        dropped, policy = self._dropped, self._settings.window
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
                dropped += 1
        finally:
            self._seconds = self._run.time.end(start)
        self._sent_dropped = 0 if left is None else dropped
        if not self._turn.recall:  # a question about an attribute leaves no trace
            self._dropped = self._sent_dropped or self._dropped
        sent = [self._added[n] for n in left or ()]
        self._reminder_tokens = sum(self._run.count_tokens(text) for text in sent if text)
        return completion

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


def by_arm(replies: Sequence[ExamReply]) -> Mapping[str, list[ExamReply]]:
    """Return the replies of each arm, in the order of dialogues and turns."""
    arms: dict[str, list[ExamReply]] = {}
    for row in sorted(replies, key=lambda r: ReplyKey.of(r.reply)[1:]):
        arms.setdefault(row.reply.arm, []).append(row)
    return arms
