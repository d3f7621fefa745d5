"""The arm `steer`: told once, and a control vector for the instruction that holds.

A context of llama.cpp applies one vector to all that it computes. So the dialogues in which the
same instruction holds run together, one such pass after another. Where the user changes the
instruction, a dialogue stops before that turn and goes on in a later pass, in which its whole chat
is read again under the vector of what holds then: the replies do not depend on where an exam was
interrupted.

The vector is the mean difference that the instruction makes to the layers' outputs
(`inference.llama.control`) after some short user messages. Each layer gets its own difference
divided by the number of layers, so that all together shift the output by about one difference at
strength 1. On the embedded model this came nearer to the instruction in the prompt (KL divergence)
than a whole difference at any single layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.errors import GattError
from pipeline.exam.arms import Arm, holding
from pipeline.exam.models import ExamModel
from pipeline.exam.tasks import ExamTask
from pipeline.gatt.ghost import with_instruction
from pipeline.gguf.base import Array
from pipeline.inference.batch_engine import BatchEngine
from pipeline.inference.generator import generates_elsewhere
from pipeline.records import Message

USER_MESSAGES = (
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Tell me something about owls.",
    "My train is late again.",
    "What should I give my aunt for her birthday?",
    "How far away is the moon?",
    "I cannot sleep. Any ideas?",
    "Which book would you take to an island?",
)
"""What the instruction is added to; none of them is in the exam."""


class SteeredPart(NamedTuple):
    """A dialogue up to turn `last_turn`, or to its end if that is 0."""

    task: ExamTask
    last_turn: int


class SteeredPass(NamedTuple):
    """Parts of dialogues in which the same instruction holds, "" if none does."""

    instruction: str
    parts: list[SteeredPart]


def steered_passes(tasks: Sequence[ExamTask]) -> list[SteeredPass]:
    """Return all passes: those up to a change of the instruction come before those after it."""
    passes: dict[tuple[bool, str], list[SteeredPart]] = {}
    for is_changed in (False, True):
        for task in tasks:
            change_turn = task.assigned.change_turn if task.assigned.next_instruction else 0
            if is_changed and not change_turn:
                continue
            instruction = holding(task.assigned, change_turn if is_changed else 0)
            part = SteeredPart(task, 0 if is_changed else change_turn)
            passes.setdefault((is_changed, instruction), []).append(part)
    return [SteeredPass(instruction, parts) for (_, instruction), parts in passes.items()]


def require_steering(models: Sequence[ExamModel], arms: Sequence[Arm]) -> None:
    """Check that models can have control vectors, if an arm needs them.

    Raises:
        GattError: a model is a server, or runs on other machines.
    """
    steered = [arm.name for arm in arms if arm.kind == "steer"]
    if not steered:
        return
    for model in models:
        if model.server:
            raise GattError(
                f"--arm {steered[0]}: {model.server} is a server, and no server's API has control "
                "vectors. Name the model's file on this machine, or leave the arm out."
            )
    if generates_elsewhere():
        raise GattError(
            f"--arm {steered[0]}: control vectors work on this machine only. Run this arm without "
            "--ray."
        )


class Steering:
    """Makes control vectors for an engine, and applies them with a `strength`.

    Raises:
        GattError: llama.cpp has no control vectors for the model, or too little memory.
    """

    def __init__(self, engine: BatchEngine, strength: float) -> None:
        self._engine, self._strength = engine, strength
        self._reader = engine.layer_reader()
        try:
            self._plain = self._outputs("")
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *_: object) -> None:
        """Free the memory, and end the effect."""
        self._engine.steer(None)
        self._reader.close()

    def apply(self, instruction: str) -> None:
        """Steer the engine towards an instruction; "" towards none."""
        self._engine.steer(self.vector(instruction) if instruction else None)

    def vector(self, instruction: str) -> Array:
        """Return the control vector (layers, n_embd) of an instruction."""
        difference: Array = (self._outputs(instruction) - self._plain).mean(axis=0)
        return difference * np.float32(self._strength / len(difference))

    def _outputs(self, instruction: str) -> Array:
        """Return the layers' outputs (messages, layers, n_embd) with an instruction."""
        outputs = []
        for user in USER_MESSAGES:
            message: Message = {"role": "user", "content": with_instruction(instruction, user)}
            outputs.append(self._reader.read([message]))
        return np.stack(outputs)
