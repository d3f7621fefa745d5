"""A log of `inspect eval gatt/exam` as a result of the exam, for `gatt compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import GattError
from pipeline.exam.arms import Arm
from pipeline.exam.dialogue_run import ExamReply, are_filled, logged_reply
from pipeline.exam.machine import local_machine, server_place
from pipeline.exam.result import (
    RESULT_VERSION,
    ExaminedModel,
    ExamResult,
    ExamSet,
    sampler_values,
)
from pipeline.exam.scores import score_arms
from pipeline.exam.settings import FULL_TURNS, ExamSettings, most_turns
from pipeline.exam.tasks import EXAM_NAME, exam_tasks, frozen_exam, ordered_regimes
from pipeline.files import sha256
from pipeline.inference.remote.address import is_valid_url

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

LOG_SUFFIX = ".eval"
_OPENAI_API = "openai-api"
"""The provider that passes on the sampler as it is; others leave out what a model does not take."""
REPLIES = "replies"
"""Where the replies of a dialogue are, in the store of its sample."""


def log_metadata(arms: Sequence[Arm], turns: int, settings: ExamSettings) -> dict[str, Any]:
    """Return what a log has to say so that it can be read as a result."""
    about = {
        "gatt": __version__,
        "set": frozen_exam()._asdict(),
        "arms": [arm.name for arm in arms],
        "turns": turns,
        "settings": asdict(settings),
        "client": local_machine(),
    }
    return {EXAM_NAME: about}


def read_log(path: Path) -> ExamResult:
    """Read a log of the task.

    Raises:
        GattError: there is none, it is of another task or set, of another form, or not finished.
        ModuleNotFoundError: Inspect is not installed.
    """
    log = _open(path)
    metadata = log.eval.metadata or {}
    if EXAM_NAME not in metadata:
        raise GattError(
            f"{path} is a log of the task {log.eval.task}. Name one of `inspect eval gatt/exam`."
        )
    if log.status != "success":
        raise GattError(
            f"{path} is a log of a task that has not finished ({log.status}). Run "
            f"`inspect eval-retry {path}`, and name its log."
        )
    about = metadata[EXAM_NAME]
    _require_same_set(path, about)
    samples = sorted(log.samples or [], key=lambda s: about["arms"].index(s.metadata["arm"]))
    turns = int(about["turns"])
    settings = _logged_settings(path, about)
    rows = [row for sample in samples for row in sample.store.get(REPLIES, ())]
    replies = [logged_reply(row, path, about["gatt"]) for row in rows]
    tasks = exam_tasks((), 0, most_turns(turns, 0))
    provider = log.eval.model.partition("/")[0]
    takes_sampler = provider == _OPENAI_API
    return ExamResult(
        format=RESULT_VERSION,
        gatt=about["gatt"],
        exam=_exam_set(about, samples, replies),
        model=ExaminedModel(
            name=log.eval.model.rpartition("/")[2],
            sha256="",
            adapter_sha256="",
            server=log.eval.model,
            training_minutes=None,
        ),
        settings=settings,
        sampler=sampler_values(settings.sampler, is_server=True) if takes_sampler else {},
        machine=_machine(log, about.get("client", "")),
        date=log.eval.created[:10],
        notes={} if takes_sampler else {"sampler": f"what {provider} takes of it is not known"},
        replies_sha256=sha256(path),
        arms=score_arms(replies, tasks),
    )


def _require_same_set(path: Path, about: dict[str, Any]) -> None:
    own, other = frozen_exam()._asdict(), about["set"]
    if other != own:
        there, here = (f"version {s['version']} (SHA-256 {s['sha256'][:16]})" for s in (other, own))
        raise GattError(
            f"{path} is a log of {there} of the exam's set, by gatt {about['gatt']}; gatt "
            f"{__version__} has {here}. Take the version that wrote it."
        )


def _logged_settings(path: Path, about: dict[str, Any]) -> ExamSettings:
    try:
        return ExamSettings(**about["settings"])
    except TypeError as error:
        raise GattError(
            f"{path} has settings of gatt {about['gatt']} that gatt {__version__} does not read "
            f"({error}). Take the version that wrote it."
        ) from error


def _machine(log: EvalLog, client: str) -> str:
    """Return what took the times; the `client` is named where it may be the server, too."""
    url = log.eval.model_base_url or ""
    if not is_valid_url(url):
        return f"{log.eval.model.partition('/')[0]}, called from {client}"
    return server_place(url, client)


def _open(path: Path) -> EvalLog:
    from inspect_ai.log import read_eval_log

    if not path.is_file():
        raise GattError(f"No file at {path}. Name a log of `inspect eval gatt/exam`.")
    try:
        return read_eval_log(path, exclude_fields={"events", "attachments"})
    except Exception as error:
        raise GattError(f"{path} is no log of Inspect that can be read ({error}).") from error


def _exam_set(
    about: dict[str, Any], samples: Sequence[EvalSample], replies: Sequence[ExamReply]
) -> ExamSet:
    turns, answered = int(about["turns"]), [s.metadata for s in samples if s.store.get(REPLIES)]
    regimes = ordered_regimes(s.metadata["regime"] for s in samples)
    expected = len(about["arms"]) * len(exam_tasks((), 0, 1))
    has_all = len({(s["arm"], s["dialogue"]) for s in answered}) == expected
    return ExamSet(
        **about["set"],
        turns=turns,
        regimes=tuple(regimes),
        dialogues=len({s["dialogue"] for s in answered}),
        complete=has_all and (turns >= FULL_TURNS if turns else are_filled(replies)),
    )
