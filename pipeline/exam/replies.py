"""Run the exam's dialogues in every arm; what is done is read back from a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import __version__
from pipeline.console import Progress, log, progress
from pipeline.errors import GattError
from pipeline.exam.arms import Arm
from pipeline.exam.dialogue_run import (
    DialogueRun,
    ExamReply,
    ExamRun,
    logged_reply,
    up_to_full,
)
from pipeline.exam.models import ExamModel, token_counter
from pipeline.exam.settings import (
    TURNS_AFTER_FULL,
    ExamSettings,
)
from pipeline.exam.steering import Steering, steered_passes
from pipeline.exam.tasks import ExamIdentity, ExamTask, frozen_exam
from pipeline.files import JsonlLog
from pipeline.gatt.quality import is_in_loop
from pipeline.gatt.rollout import ReplyKey, Turn, turns_of
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import GenerationEngine

_DONE_TURN_TOKENS = 70
"""A usual turn with its answer: how many turns fill a context, for the progress bar."""
_NOTES = "notes"
"""Of a header: what the server has refused so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamPlan:
    """What is measured of a model: `turns` of each task and arm; 0 until the context is full.

    `machine` names what takes the times.
    """

    model: ExamModel
    tasks: Sequence[ExamTask]
    arms: Sequence[Arm]
    turns: int
    settings: ExamSettings
    machine: str
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
    """All replies by arm, the name of the model as its server calls it, and what it refused.

    `versions` of gatt have made and checked the replies, on these `machines`.
    """

    replies: list[ExamReply]
    name: str
    notes: dict[str, str]
    versions: list[str]
    machines: list[str]


def generate(plan: ExamPlan, log_file: Path) -> Generated:
    """Run every dialogue in every arm; replies that `log_file` has are not generated again.

    Raises:
        GattError: the log has replies of another model, other settings, or another form.
    """
    with JsonlLog(log_file) as reply_log:
        header, here = _header(plan), _Origin(__version__, plan.machine)
        origins = _origins(reply_log.records, here)
        earlier = _read(reply_log.records, origins, header, log_file)
        done = {ReplyKey.of(row.reply): row for row in earlier}
        origin_of = {
            ReplyKey.of(row.reply): origin for row, origin in zip(earlier, origins, strict=True)
        }
        headers = [row for row in reply_log.records if "exam" in row]
        if not done:
            reply_log.append(header)
            headers.append(header)
        if resumed := len(_planned(done, plan)):
            log(f"exam: {resumed} replies of {plan.model.name} are in {log_file} already.")
        with progress(f"exam: {plan.model.name}", plan.count, resumed) as bar:
            run = _LoggedRun(plan, _HeadedLog(reply_log, header, headers), done, bar)
            run.run()
    replies = _planned(done, plan)
    used = {origin_of.get(ReplyKey.of(row.reply), here) for row in replies}
    in_order = [origin for origin in [*origins, here] if origin in used]
    return Generated(
        replies=replies,
        name=run.name,
        notes={k: v for row in headers for k, v in row.get(_NOTES, {}).items()},
        versions=list(dict.fromkeys(origin.version for origin in in_order)),
        machines=list(dict.fromkeys(origin.machine for origin in in_order)),
    )


def _planned(done: Mapping[ReplyKey, ExamReply], plan: ExamPlan) -> list[ExamReply]:
    """Return the replies of the plan, by arm; the log may have those of other lengths, too."""
    replies: list[ExamReply] = []
    for arm in plan.arms:
        for task in plan.tasks:
            keys = _keys(arm, task, plan.turns or len(task.assigned.dialogue.turns))
            of_task = [done[key] for key in keys if key in done]
            replies += of_task if plan.turns else up_to_full(of_task)
    return replies


def _keys(arm: Arm, task: ExamTask, max_turns: int) -> list[ReplyKey]:
    """Return the keys of the replies to a task in an arm, in the order of their turns."""
    turns = turns_to_answer(task, max_turns)
    return [ReplyKey(arm.name, task.id, turn.number, turn.recall_attribute) for turn in turns]


def _header(plan: ExamPlan) -> dict[str, Any]:
    """Return what stands in the log before the replies: what they depend on."""
    header = {
        "gatt": __version__,
        "machine": plan.machine,
        "exam": f"{plan.exam.name} {plan.exam.version}",
        "set": plan.exam.sha256,
        "model": plan.model.sha256 or plan.model.server,
        "adapter": plan.model.adapter_sha256,
        **asdict(plan.settings),
    }
    if served := plan.model.served_model():
        header["served_model"] = served
    return header


class _Origin(NamedTuple):
    """The version of gatt that made a reply, and the machine that took its time."""

    version: str
    machine: str


def _origins(records: Sequence[dict[str, Any]], here: _Origin) -> list[_Origin]:
    """Return the origin of each reply of a log; where an earlier log has none, it is `here`."""
    origin, origins = here, []
    for row in records:
        if "exam" in row:
            origin = _Origin(row.get("gatt", here.version), row.get("machine", here.machine))
        else:
            origins.append(origin)
    return origins


def _read(
    records: Sequence[dict[str, Any]],
    origins: Sequence[_Origin],
    header: dict[str, Any],
    log_file: Path,
) -> list[ExamReply]:
    """Return the replies that the log has, after checking that they depend on the same.

    Of a run that ended before its first reply only the header is there, and it binds no other run.
    The version of gatt and the machine may be others, and the model that a server lists is compared
    as far as it is known.
    """
    headers = [row for row in records if "exam" in row]
    rows = [row for row in records if "exam" not in row]
    if not rows:
        return []
    before = headers[-1] if headers else {}
    before = {"served_model": header.get("served_model"), **before}
    compared = [name for name in header if name not in ("gatt", "machine")]
    other = [name for name in compared if before.get(name) != header[name]]
    if other:
        changes = ", ".join(f"{name} {before.get(name)} → {header[name]}" for name in other)
        raise GattError(
            f"{log_file} has replies of another exam ({changes}). Choose another folder with --out."
        )
    return [
        logged_reply(row, log_file, origin.version)
        for row, origin in zip(rows, origins, strict=True)
    ]


class _HeadedLog:
    """A log of replies; those after a header depend on what it says.

    `headers` are those that are there already; the last one binds the replies that follow it.
    """

    def __init__(
        self, reply_log: JsonlLog, header: dict[str, Any], headers: list[dict[str, Any]]
    ) -> None:
        self._log, self._header, self._headers = reply_log, header, headers

    @property
    def served_model(self) -> str:
        """Return the model that a server has listed, or ""."""
        names = (row.get("served_model", "") for row in (self._header, *reversed(self._headers)))
        return next(filter(None, names), "")

    def append(self, row: ExamReply, refused: Mapping[str, str]) -> None:
        """Write a reply, after a header if it is the first one here, or a server refused more."""
        header = {**self._header, _NOTES: dict(refused)} if refused else self._header
        if any(self._headers[-1].get(name) != value for name, value in header.items()):
            self._log.append(header)
            self._headers.append(header)
        self._log.append(row)


class _LoggedRun(ExamRun):
    """All dialogues of one model; each reply is logged."""

    def __init__(
        self,
        plan: ExamPlan,
        reply_log: _HeadedLog,
        done: dict[ReplyKey, ExamReply],
        bar: Progress,
    ) -> None:
        super().__init__(plan.exam.name, plan.turns, plan.settings, done)
        self._plan, self._log, self._bar = plan, reply_log, bar
        self.name = reply_log.served_model or plan.model.name
        self._refused: Mapping[str, str] = {}
        # Long answers first: a dialogue that runs alone at the end leaves cores idle.
        self._tasks = sorted(plan.tasks, key=lambda task: -task.max_tokens_factor)

    @property
    def is_done(self) -> bool:
        """Return whether nothing is left to generate."""
        return all(self._is_done(arm, task) for arm in self._plan.arms for task in self._tasks)

    def run(self) -> None:
        """Run all arms."""
        plan, settings = self._plan, self.settings
        if self.is_done:
            return  # an old log loads no model
        with plan.model.open(
            len(self._tasks), settings.context, plan.max_parallel, settings.max_thought_tokens
        ) as engine:
            self.count_tokens, self._refused = token_counter(engine), engine.changes
            if not plan.model.server:  # one that is interrupted does not count its tokens
                self.stop_when = is_in_loop
            if isinstance(engine, BatchEngine) and any(arm.kind == "steer" for arm in plan.arms):
                engine.layer_reader().close()  # an error comes before hours of other arms
            for arm in plan.arms:
                if arm.kind == "steer":
                    self._run_steered(engine, arm)
                else:
                    engine.run([DialogueRun(self, arm, task).task() for task in self._tasks])
            if plan.model.server:
                self.name = engine.name

    def _run_steered(self, engine: GenerationEngine, arm: Arm) -> None:
        """Run an arm whose dialogues have control vectors; making these is a part of its time."""
        assert isinstance(engine, BatchEngine)  # as `require_steering` has checked
        left = [
            steered
            for steered in steered_passes(self._tasks)
            if not all(self._is_done(arm, *part) for part in steered.parts)
        ]
        if not left:
            return
        with self.time.preparing():
            steering = Steering(engine, arm.strength)
        with steering:
            for instruction, parts in left:
                with self.time.preparing():
                    steering.apply(instruction)
                engine.run([DialogueRun(self, arm, *part).task() for part in parts])

    def _is_done(self, arm: Arm, task: ExamTask, last_turn: int = 0) -> bool:
        """Return whether nothing is left to generate, up to `last_turn` (0: the last one)."""
        if not self.turns and DialogueRun(self, arm, task).is_over:
            return True
        limits = (last_turn, self.turns, len(task.assigned.dialogue.turns))
        keys = _keys(arm, task, min(limit for limit in limits if limit))
        return all(key in self.done for key in keys)

    def record(self, row: ExamReply) -> None:
        """Log a new reply."""
        super().record(row)
        self._log.append(row, self._refused)
        self._bar.advance()
