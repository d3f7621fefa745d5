"""The solver: a dialogue of the exam in one arm, turn by turn, with the model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageAssistant, get_model
from inspect_ai.solver import Generate, Solver, TaskState, solver

from pipeline.errors import GattError
from pipeline.exam.arms import Arm, find_arms
from pipeline.exam.dialogue_run import DialogueRun, ExamRun, SharedTime
from pipeline.exam.inspect_eval.answers import ModelClient, chat_of
from pipeline.exam.inspect_eval.logs import REPLIES
from pipeline.exam.inspect_eval.options import of_gatt, settings_of, turns_of
from pipeline.exam.settings import most_turns
from pipeline.exam.tasks import EXAM_NAME, ExamTask, exam_tasks
from pipeline.records import Completion


def samples_of(tasks: Sequence[ExamTask], arms: Sequence[Arm]) -> MemoryDataset:
    """Return a sample for each dialogue and arm; long answers come first, as in `gatt exam`."""
    ordered = sorted(tasks, key=lambda task: -task.max_tokens_factor)
    samples = [
        Sample(
            input=arm.prompt(task.assigned, (), task.system).messages[-1]["content"],
            target=instruction.short if (instruction := task.assigned.instruction) else "",
            id=f"{task.id} {arm.name}",
            metadata={"arm": arm.name, "dialogue": task.id, "regime": task.regime},
        )
        for arm in arms
        for task in ordered
    ]
    return MemoryDataset(samples, name=EXAM_NAME)


@solver(name="gatt/dialogue")
@of_gatt
def dialogue(turns: int | str, sampler: str, window: str, max_tokens: int, seed: int) -> Solver:
    """Hold the dialogues of the exam; the parameters are those of the task."""
    number = turns_of(turns)
    settings = settings_of(sampler, window, max_tokens, seed)
    tasks = {task.id: task for task in exam_tasks((), 0, most_turns(number, 0))}
    time, clients = SharedTime(), dict[str, ModelClient]()

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if state.epoch > 1:
            raise GattError(
                "Another epoch would repeat the same answers. Run without --epochs, and with "
                "-T seed=2 for other answers."
            )
        (arm,) = find_arms((state.metadata["arm"],))
        run = ExamRun(EXAM_NAME, number, settings, {})
        run.time = time
        client = clients.setdefault(str(get_model()), ModelClient(get_model()))
        with closing(DialogueRun(run, arm, tasks[state.metadata["dialogue"]]).task()) as task:
            request = next(task, None)
            while request is not None:
                completion: Completion = await client.answer(request)
                state.messages = [
                    *chat_of(request.messages),
                    ChatMessageAssistant(content=completion.text),
                ]
                try:
                    request = task.send(completion)
                except StopIteration:
                    break
        state.store.set(REPLIES, [asdict(row) for row in run.done.values()])
        return state

    return solve
