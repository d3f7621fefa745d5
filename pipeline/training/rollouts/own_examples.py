"""The examples with the student's own answers, for the steps up to the next rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.recipe import Train
from pipeline.system import is_main_process
from pipeline.training.examples import TrainingExample
from pipeline.training.rollouts.collector import Rollouts, SaveAdapter


class OwnExamples:
    """Rolls out when it is time, and keeps the examples that it made.

    `order` has the dialogue at each position of training. Without `rollouts` there are none.
    """

    def __init__(self, rollouts: Rollouts | None, settings: Train, order: Sequence[int]) -> None:
        self._rollouts, self._settings, self._order = rollouts, settings, order
        self._examples: dict[int, TrainingExample] = {}
        self._rolled_out: int | None = None

    def get(self, position: int) -> TrainingExample | None:
        """Return the example at a position of training; None if the student answers nothing."""
        return self._examples.get(position)

    def roll_out(self, steps: int, save_adapter: SaveAdapter) -> None:
        """Roll out if it is time, with `steps` done; all processes get the same examples.

        A run that goes on between two rollouts reads the answers of the first one in the log.
        """
        settings = self._settings
        first = steps - steps % settings.rollout_steps
        if self._rollouts is None or first == self._rolled_out:
            return
        last = min(first + settings.rollout_steps, settings.max_steps)
        positions = range(first * settings.batch_size, last * settings.batch_size)
        examples: dict[int, TrainingExample] = {}
        if is_main_process():
            indices = {position: self._order[position] for position in positions}
            examples = self._rollouts.examples(first, indices, save_adapter)
        self._examples, self._rolled_out = _broadcast(examples), first


def _broadcast(examples: dict[int, TrainingExample]) -> dict[int, TrainingExample]:
    """Return what the main process has."""
    values = [examples]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]
