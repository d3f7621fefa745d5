"""Read the replies of a run, with the verdicts of its judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.files import read_jsonl
from pipeline.gatt.assignment import AssignedDialogue
from pipeline.gatt.constraints.registry import is_judged
from pipeline.records import Reply
from pipeline.run_dir import RunDir


def judged_replies(run_dir: RunDir, dialogues: Sequence[AssignedDialogue]) -> Iterator[Reply]:
    """Yield the replies to `dialogues`, with the judge's verdict where no program can check.

    Without a judge, `obeys` of a reply is what programs have checked, None if nothing has.
    """
    by_id = {dialogue.dialogue.id: dialogue for dialogue in dialogues}
    log = read_jsonl(run_dir.judged) if run_dir.judged.exists() else ()
    verdicts = {(row["arm"], row["dialogue"], row["turn"]): bool(row["verdict"]) for _, row in log}
    for _, row in read_jsonl(run_dir.replies):
        reply = Reply(**row)
        if reply.recall_attribute or reply.dialogue not in by_id:
            continue
        dialogue, turn = by_id[reply.dialogue], reply.turn - 1
        if dialogue.needs_judge(turn) and (verdicts or is_judged(dialogue.constraints(turn))):
            verdict = verdicts.get((reply.arm, reply.dialogue, reply.turn), False)
            reply = dialogue.with_verdict(reply, verdict=verdict)
        yield reply
