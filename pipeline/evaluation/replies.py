"""Generate the replies that an evaluation scores, and read dialogues out of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from pipeline.console import log, progress
from pipeline.evaluation.arms import Arm
from pipeline.files import JsonlLog, sha256
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.rollout import MakeRequest, ReplyKey, Rollout, Turn, turns_of
from pipeline.gatt.seeds import derive_seed
from pipeline.gguf.reader import open_gguf
from pipeline.inference.generator import generates_elsewhere
from pipeline.inference.llama.model import LoadedModel
from pipeline.recipe import Recipe
from pipeline.records import (
    DEFAULT_SAMPLER,
    Completion,
    Message,
    Reply,
    Request,
    SamplerChoice,
)

Suites = Mapping[str, Sequence[AssignedDialogue]]
"""Dialogues by suite; "evaluation" has those of the trained instructions, which all arms run."""
_ID_LENGTH = 16
"""Hexadecimal digits of a request's id."""
Note = Callable[[str, Mapping[str, str]], None]
"""Receives a model's name, and the parameters that its server has refused."""


def generate_replies(
    arms: Sequence[Arm],
    suites: Suites,
    recipe: Recipe,
    logs: Sequence[Path],
    note: Note = lambda model, changes: None,
    sampler: SamplerChoice | None = None,
) -> list[Reply]:
    """Run every dialogue in every arm, and write the replies to the last of the `logs`.

    Replies that it has are not generated again, nor are those of the other logs, which are of
    earlier evaluations, if model and request are the same. The replies are ordered by arm, dialogue
    and turn, not as in the log, whose order an interruption changes. `note` receives what servers
    have refused. Without a `sampler`, that of the recipe draws the tokens.
    """
    drawn = sampler or SamplerChoice(recipe.evaluate.temperature, 1.0, DEFAULT_SAMPLER)
    *earlier_logs, log_file = logs
    earlier = _completions(earlier_logs)
    with JsonlLog(log_file) as reply_log:
        replies = {ReplyKey.of(reply): reply for reply in (Reply(**r) for r in reply_log.records)}
        with progress("evaluate: replies", _count(arms, suites, recipe), len(replies)) as bar:

            def record(reply: Reply) -> None:
                replies[ReplyKey.of(reply)] = reply
                reply_log.append(reply)
                bar.advance()

            for arm, weights in with_weights(arms, load=not generates_elsewhere()):
                dialogues = _dialogues(arm, suites, recipe.evaluate.turns)
                rollout = Rollout(
                    arm=arm.name,
                    max_turns=recipe.evaluate.turns,
                    make_request=_make_request(recipe, arm, drawn),
                    record=record,
                    recorded=replies,
                    request_id=_request_ids(arm),
                    earlier=earlier,
                )
                with arm.open(recipe, dialogues, weights) as model:
                    model.run(map(rollout.run, dialogues))
                note(model.name, model.changes)
    if reused := sum(reply.request in earlier for reply in replies.values()):
        log(f"evaluate: {reused} replies are those of earlier evaluations, to the same requests.")
    _log_full_contexts(replies.values())
    _log_unfinished_thoughts(replies.values(), recipe.evaluate.max_thought_tokens)
    order = {arm.name: index for index, arm in enumerate(arms)}
    keys = sorted(replies, key=lambda key: (order[key.arm], *key[1:]))
    return [replies[key] for key in keys]


def _completions(logs: Sequence[Path]) -> dict[str, Completion]:
    """Return what models have generated, by the id of the request; the latest log counts."""
    completions = {}
    for file in logs:
        with JsonlLog(file) as reply_log:
            replies = [Reply(**row) for row in reply_log.records]
        for r in replies:
            if r.request and r.finish not in ("context", "cancelled"):
                completions[r.request] = Completion(
                    r.text, r.tokens, r.prompt_tokens, r.finish, r.thoughts
                )
    return completions


def _request_ids(arm: Arm) -> Callable[[Request], str]:
    """Return a function that names a request to the model of `arm`, by the contents of both.

    Another release of llama.cpp may generate something else, and so may a server, whose model can
    change: its requests have no id.
    """
    if arm.path is None:
        return lambda _: ""
    model = [version("llama-cpp-python"), sha256(arm.path)]
    if arm.adapter:
        model += [sha256(arm.adapter.path), str(arm.adapter.scale)]

    def request_id(request: Request) -> str:
        content = json.dumps([model, asdict(request)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:_ID_LENGTH]

    return request_id


def _log_full_contexts(replies: Iterable[Reply]) -> None:
    """Log from which turn on the context of each arm was full, and how many replies that costs."""
    by_arm: dict[str, list[int]] = {}
    for reply in replies:
        if reply.finish == "context":
            by_arm.setdefault(reply.arm, []).append(reply.turn)
    for arm, turns in by_arm.items():
        log(
            f"evaluate: the context of {arm} was full, in the first dialogue from turn "
            f"{min(turns)} on. Replies left out, which count in no rate: {len(turns)}."
        )


def _log_unfinished_thoughts(replies: Iterable[Reply], max_thought_tokens: int) -> None:
    """Log how many replies of each arm are no answers, because they were cut in their thoughts."""
    for arm, count in Counter(r.arm for r in replies if r.finish == "thinking").items():
        log(
            f"evaluate: {arm} was cut within its thoughts in {count} replies, which count as no "
            f"answers. Raise evaluate.max_thought_tokens ({max_thought_tokens}), or switch its "
            "thinking off."
        )


def with_weights(
    arms: Sequence[Arm], *, load: bool = True
) -> Iterator[tuple[Arm, LoadedModel | None]]:
    """Yield each arm with the weights of its file, which are loaded once for all arms of it.

    Files are loaded one after another, in the order of their first arms. Without `load` there are
    no weights.
    """
    files = [arm.path for arm in arms]
    by_file = sorted(arms, key=lambda arm: files.index(arm.path))
    for path, arms_of_file in groupby(by_file, key=lambda arm: arm.path):
        weights = LoadedModel(open_gguf(path)) if path and load else None
        for arm in arms_of_file:
            yield arm, weights
        if weights:
            weights.close()


def _count(arms: Sequence[Arm], suites: Suites, recipe: Recipe) -> int:
    """Return the number of replies in all arms."""
    return sum(
        len(turns_of(dialogue, recipe.evaluate.turns))
        for arm in arms
        for dialogue in _dialogues(arm, suites, recipe.evaluate.turns)
    )


def _dialogues(arm: Arm, suites: Suites, max_turns: int) -> list[AssignedDialogue]:
    """Return an arm's dialogues, those with most replies first: none shall run alone at the end."""
    dialogues = [dialogue for name, suite in suites.items() if arm.runs(name) for dialogue in suite]
    return sorted(dialogues, key=lambda dialogue: -len(turns_of(dialogue, max_turns)))


def _make_request(recipe: Recipe, arm: Arm, sampler: SamplerChoice) -> MakeRequest:
    system, settings = recipe.dialogues.system, recipe.evaluate

    def make_request(dialogue: AssignedDialogue, turn: Turn, answers: list[str]) -> Request:
        if arm.repeats_instruction:
            messages = dialogue.reminded_prompt(answers, system)
        else:
            messages = dialogue.student_prompt(answers, system)
        position = [dialogue.dialogue.id, turn.number]
        if turn.recall:
            position.append(turn.recall.attribute)
        seed = derive_seed(recipe.seed, *position)
        return Request(
            messages=messages,
            seed=seed,
            max_tokens=settings.max_tokens,
            temperature=sampler.temperature,
            top_p=sampler.top_p,
            sampler=sampler.settings,
            max_thought_tokens=settings.max_thought_tokens,
        )

    return make_request


def answers_of(dialogue: AssignedDialogue, arm: str, replies: Iterable[Reply]) -> list[str]:
    """Return the answers of an arm to a dialogue, as far as turn 1 was in the context."""
    return [
        reply.text
        for reply in replies
        if (reply.arm, reply.dialogue) == (arm, dialogue.dialogue.id)
        and reply.finish != "context"
        and not reply.recall_attribute
    ]


def chat_of(
    dialogue: AssignedDialogue, arm: str, replies: Iterable[Reply], system: str
) -> tuple[Message, ...]:
    """Return a dialogue with the answers of an arm, up to its last one."""
    messages = dialogue.student_prompt(answers_of(dialogue, arm, replies), system)
    return messages[:-1] if messages[-1]["role"] == "user" else messages
