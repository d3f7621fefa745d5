"""The server's scheduler: slots, stop texts and free cores, with a fake in place of llama.cpp."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference import scheduler
from pipeline.inference.async_engine import CpuTimes, count_free_cores
from pipeline.inference.llama.model import ContextSettings, LoadedModel
from pipeline.inference.llama.plan import ContextPlan
from pipeline.inference.request import (
    ContextLengthError,
    EngineClosedError,
    GenerationRequest,
    GenerationResult,
    Job,
    QueueFullError,
    TextPiece,
)
from pipeline.inference.scheduler import (
    DecodeThread,
    EngineStats,
    Limits,
    ServedModel,
    Slot,
    choose_slot,
)
from pipeline.records import Request

# --- the choice of a slot


def _slot(id: int, cached: Sequence[int] = (), prompt_tokens: int = 0, last_used: int = 0) -> Slot:
    return Slot(id=id, cached=list(cached), prompt_tokens=prompt_tokens, last_used=last_used)


def test_the_next_turn_of_a_conversation_gets_the_slot_that_has_it_cached() -> None:
    conversation = _slot(0, range(40), prompt_tokens=30, last_used=9)
    earlier = _slot(1, range(20), prompt_tokens=15, last_used=8)
    empty = _slot(2)
    prompt = [*range(40), 100, 101]
    assert choose_slot(prompt, [(empty, 0), (earlier, 0), (conversation, 3)]) is conversation


def test_a_common_system_message_does_not_make_a_slot_of_this_conversation() -> None:
    stranger = _slot(0, [*range(20), *range(500, 540)], prompt_tokens=50, last_used=1)
    empty = _slot(1)
    assert choose_slot([*range(20), *range(900, 940)], [(stranger, 0), (empty, 0)]) is empty


@pytest.mark.parametrize(("changed_tokens", "is_reused"), [(8, True), (9, False)])
def test_the_end_of_a_prompt_may_change_by_a_few_tokens(
    changed_tokens: int, is_reused: bool
) -> None:
    """The template may render the start of an answer differently once the answer is there."""
    used = _slot(0, range(100), prompt_tokens=100, last_used=1)
    empty = _slot(1)
    prompt = [*range(100 - changed_tokens), *range(900, 950)]
    assert choose_slot(prompt, [(used, 0), (empty, 0)]) is (used if is_reused else empty)


def test_a_new_conversation_gets_the_least_recently_used_slot_of_the_least_busy_thread() -> None:
    busy_thread = [(_slot(0), 2), (_slot(1), 2)]
    idle_thread = [(_slot(id, [7], 1, last_used), 1) for id, last_used in ((0, 5), (1, 3), (2, 3))]
    assert choose_slot([1, 2, 3], [*busy_thread, *idle_thread]) is idle_thread[1][0]


# --- stop texts


def _emit(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], bool]:
    """Return the pieces that are passed on, and whether the answer was stopped."""
    passed_on: list[TextPiece] = []
    job = Job(_request(stop=tuple(stops)), passed_on.append, lambda result: None)
    stopped = any(map(job.emit, pieces)) or job.flush()
    return [piece.text for piece in passed_on], stopped


class _Emitted(NamedTuple):
    """The pieces of an answer, its stop texts, and what `Job.emit` makes of them."""

    pieces: list[str]
    stops: list[str]
    passed_on: list[str]
    stopped: bool


@pytest.mark.parametrize(
    "case",
    [
        _Emitted(["one", " two"], [], ["one", " two"], stopped=False),
        _Emitted(["one. ", "two"], [". "], ["one"], stopped=True),
        _Emitted(["a S", "TO", "P b"], ["STOP"], ["a "], stopped=True),
        _Emitted(["a S", "TO", "RY b"], ["STOP"], ["a ", "STORY b"], stopped=False),
        _Emitted(["the end S", "T"], ["STOP"], ["the end ", "ST"], stopped=False),
        _Emitted(["ab", "cd"], ["cd", "bc"], ["a"], stopped=True),
        _Emitted(["STOP"], ["STOP"], [], stopped=True),
    ],
)
def test_text_is_passed_on_up_to_a_stop_text(case: _Emitted) -> None:
    assert _emit(case.pieces, case.stops) == (case.passed_on, case.stopped)


@given(
    st.lists(st.text("ab.", max_size=4), min_size=1, max_size=8),
    st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_where_an_answer_is_stopped_does_not_depend_on_its_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    """The first complete stop text ends the answer; before it, nothing is lost or repeated."""
    passed_on, stopped = _emit(pieces, stops)
    text, sent = "".join(pieces), "".join(passed_on)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(sent)
    assert not any(stop in sent for stop in stops)
    if stopped:
        assert any(text.startswith(stop, len(sent)) for stop in stops)
    else:
        assert sent == text


# --- the queue and the steps of a decode thread


def _request(prompt: int = 4, answer: int = 2, stop: tuple[str, ...] = ()) -> GenerationRequest:
    sampling = Request(messages=(), seed=1, max_tokens=answer)
    return GenerationRequest(tokens=list(range(prompt)), sampling=sampling, stop=stop)


class _FakeContext:
    """Stands in for `BatchContext`: prefills all at once, and generates "x" up to `max_tokens`."""

    def __init__(
        self,
        model: LoadedModel,
        slots: list[Slot],
        settings: ContextSettings,
        threads: int,
        *,
        exact: bool,
    ) -> None:
        assert not exact
        self.calls: list[str] = []
        self.broken = False

    def set_threads(self, threads: int) -> None:
        """Accept any number."""

    def start(self, slot: Slot, request: Request, tokens: list[int], *, min_copied: int = 1) -> int:
        """Queue all tokens but the first."""
        slot.request, slot.pending = request, tokens[1:]
        slot.prompt_tokens, slot.tokens, slot.finish = len(tokens), 0, None
        return 1

    def prefill(self, slot: Slot) -> None:
        """Keep the last pending token."""
        self.calls.append(f"prefill {slot.id}")
        del slot.pending[:-1]

    def decode(self, slots: Sequence[Slot]) -> list[int]:
        """Return an index for each slot, or fail."""
        if self.broken:
            raise RuntimeError("llama_decode returned 1")
        self.calls.append(f"decode {[slot.id for slot in slots]}")
        return list(range(len(slots)))

    def sample(self, slot: Slot, index: int) -> str:
        """Generate a token."""
        assert slot.request
        slot.tokens += 1
        slot.finish = "length" if slot.tokens == slot.request.max_tokens else None
        return "x"

    def sample_draft(self, slot: Slot, index: int) -> None:
        """Have no draft."""

    def clear(self, slot: Slot) -> None:
        """Note the call."""
        self.calls.append(f"clear {slot.id}")

    def release(self, slot: Slot) -> None:
        """Free nothing."""

    def close(self) -> None:
        """Free nothing."""


class _FakeInfo(NamedTuple):
    context_length: int


class _FakeModel(NamedTuple):
    info: _FakeInfo


class _Served(NamedTuple):
    """A served model, its only thread (not started), and the results of its jobs in order."""

    model: ServedModel
    thread: DecodeThread
    context: _FakeContext
    results: list[GenerationResult]

    def submit(self, request: GenerationRequest | None = None) -> Job:
        """Submit a request and return its job."""
        job = Job(request or _request(), lambda piece: None, self.results.append)
        self.model.submit(job)
        return job

    def step(self) -> None:
        """Do what the thread does in one step."""
        self.thread._step([slot for slot in self.thread.slots if slot.job])


Serve = Callable[[int, int], _Served]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Return a function that serves a fake model with some slots and a queue of some jobs."""

    def make(slots: int, max_waiting: int) -> _Served:
        plan = ContextPlan((slots,), ContextSettings(256), 1)
        monkeypatch.setattr(scheduler, "plan_contexts", lambda *args, **keywords: plan)
        monkeypatch.setattr(scheduler, "BatchContext", _FakeContext)
        loaded: LoadedModel = _FakeModel(_FakeInfo(128))  # type: ignore[assignment]
        limits = Limits(max_waiting=max_waiting)
        model = ServedModel("model", loaded, None, limits, lambda: 1)
        (thread,) = model.decode_threads
        context: _FakeContext = thread.context  # type: ignore[assignment]
        return _Served(model, thread, context, [])

    return make


def test_requests_wait_in_order_and_a_full_queue_refuses(serve: Serve) -> None:
    served = serve(1, 2)
    first, second, third = (served.submit() for _ in range(3))
    assert served.model.stats() == EngineStats(sequences=1, busy=1, waiting=2)
    with pytest.raises(QueueFullError, match="2 requests wait"):
        served.submit()
    (slot,) = served.thread.slots
    order = []
    while slot.job:
        order.append(slot.job)
        while slot.job is order[-1]:
            served.step()
    assert order == [first, second, third]
    assert [result.finish for result in served.results] == ["length"] * 3


def test_a_request_that_exceeds_the_context_is_refused(serve: Serve) -> None:
    served = serve(1, 2)
    served.submit(_request(prompt=100, answer=28))
    with pytest.raises(ContextLengthError, match=r"100 tokens .* 29; expected at most 128"):
        served.submit(_request(prompt=100, answer=29))


def test_a_step_prefills_the_oldest_prompt_and_decodes_all_that_are_ready(serve: Serve) -> None:
    served = serve(3, 0)
    for _ in range(3):
        served.submit(_request(answer=9))
    for _ in range(3):
        served.step()
    assert served.context.calls == [
        "prefill 0",
        "decode [0]",
        "prefill 1",
        "decode [0, 1]",
        "prefill 2",
        "decode [0, 1, 2]",
    ]


def test_a_result_counts_prompt_cached_and_generated_tokens(serve: Serve) -> None:
    served = serve(1, 0)
    served.submit(_request(prompt=6, answer=2))
    served.step()
    served.step()
    (result,) = served.results
    assert (result.prompt_tokens, result.cached_tokens, result.tokens) == (6, 1, 2)
    assert result.first_token_seconds is not None
    assert 0 <= result.first_token_seconds <= result.seconds


def test_a_stop_text_ends_an_answer(serve: Serve) -> None:
    served = serve(1, 0)
    served.submit(_request(answer=9, stop=("xxx",)))
    for _ in range(3):
        served.step()
    assert [(result.finish, result.tokens) for result in served.results] == [("stop", 3)]


def test_cancelled_requests_leave_the_queue_or_their_slot(serve: Serve) -> None:
    served = serve(1, 1)
    running, waiting = served.submit(), served.submit()
    served.model.cancel(waiting)
    assert [result.finish for result in served.results] == ["cancelled"]
    served.model.cancel(running)
    served.step()
    assert [result.finish for result in served.results] == ["cancelled"] * 2
    assert served.model.stats() == EngineStats(sequences=1, busy=0, waiting=0)


def test_a_failed_step_ends_its_requests_and_the_thread_continues(serve: Serve) -> None:
    served = serve(1, 1)
    served.context.broken = True
    served.submit()
    served.thread.start()
    _wait_for(served.results, 1)
    served.context.broken = False
    served.submit()
    _wait_for(served.results, 2)
    served.model.close()
    assert [result.finish for result in served.results] == ["failed", "length"]
    assert "clear 0" in served.context.calls


def test_a_stopped_model_ends_what_runs_and_waits_and_refuses_more(serve: Serve) -> None:
    served = serve(1, 1)
    served.submit()
    served.submit()
    served.model.stop()
    with pytest.raises(EngineClosedError, match="Try again"):
        served.submit()
    served.thread.run()
    assert [result.finish for result in served.results] == ["closed", "closed"]


def _wait_for(results: list[GenerationResult], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(results) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- free cores


class _Load(NamedTuple):
    """CPU seconds of all processes and of this one within `seconds`, and the free cores of 4."""

    seconds: float
    used: float
    used_here: float
    free_cores: int


@pytest.mark.parametrize(
    "load",
    [
        _Load(seconds=1, used=0, used_here=0, free_cores=4),
        _Load(seconds=1, used=3, used_here=3, free_cores=4),
        _Load(seconds=2, used=4, used_here=2, free_cores=3),
        _Load(seconds=1, used=1.4, used_here=0, free_cores=3),
        _Load(seconds=1, used=4, used_here=0, free_cores=1),
        _Load(seconds=0, used=1, used_here=0, free_cores=4),
    ],
)
def test_cores_that_other_processes_use_are_not_free(load: _Load) -> None:
    before = CpuTimes(100.0, 50.0, 20.0)
    after = CpuTimes(100 + load.seconds, 50 + load.used, 20 + load.used_here)
    assert count_free_cores(before, after, 4) == load.free_cores
