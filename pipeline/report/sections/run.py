"""The sections of a report about how the model was made: data, training, export, and the run."""

from __future__ import annotations

from pipeline.export.summary import MIN_RETAINED
from pipeline.report.figures import loss_curve
from pipeline.report.page import ReportSection
from pipeline.report.results import RunResults, Throughput
from pipeline.report.tables import Cell, Table

_WEIGHTS = {"fp16": "original", "nf4": "4-bit"}


def training_data(results: RunResults) -> ReportSection | None:
    """Return what the teacher answered, and what was accepted."""
    acceptance = results.acceptance
    if not acceptance or not acceptance.rows:
        return None
    columns = ["instruction", "method", "accepted", "words", "rejected", "example"]
    rows: list[list[Cell]] = [
        [
            row.instruction,
            row.method,
            f"{row.accepted} of {row.candidates}",
            row.words,
            row.rejections,
            row.example,
        ]
        for row in acceptance.rows
    ]
    return ReportSection(
        title="Training data",
        caption="The teacher's answers, how many of them were accepted, and their mean length.",
        tables=[Table("synthesis", columns, rows)],
        notes=[
            f"{acceptance.too_common} accepted answers were removed, because others had the same "
            "words, or because they follow such an answer."
        ],
    )


def training(results: RunResults) -> ReportSection | None:
    """Return the loss, adherence at each checkpoint, and the speed."""
    if not results.losses:
        return None
    tables = []
    if results.validation:
        columns = ["step", "validation answers that keep the instruction"]
        tables = [Table("validation", columns, list(results.validation.items()))]
    return ReportSection(
        title="Training",
        caption="The loss of every step.",
        tables=tables,
        picture=loss_curve(results.losses),
        notes=[_speed_note(results.throughput)] if results.throughput else [],
    )


def _speed_note(throughput: Throughput) -> str:
    learned, computed = (
        tokens / throughput.seconds for tokens in (throughput.learned, throughput.computed)
    )
    return (
        f"{computed:.0f} tokens per second, {learned:.0f} of them in the loss and "
        f"{throughput.padding / throughput.computed:.1%} padding; "
        f"{throughput.peak_memory_bytes / 1e9:.1f} GB of memory at the peak."
    )


def export(results: RunResults) -> ReportSection:
    """Return sizes, divergences and adherence of the exported files."""
    summary, first = results.export, results.recipe.export.formats[0]
    last_five = {row.arm: row for row in results.scores.last_five}
    rows: list[list[Cell]] = []
    notes = [
        f"Merged into the {_WEIGHTS[base]} weights: {trial.kl_trained:.4f} nats per token from the "
        f"trained model, loss {trial.nll:.4f} on the run's dialogues."
        for base, trial in summary.merge_trials.items()
    ]
    for name, file in summary.formats.items():
        matrix, retained = file.least_retained
        arm = "tuned" if name == first else f"tuned, {name}"
        rows.append(
            [
                name,
                round(file.bytes / 1e6),
                file.kl_trained,
                file.kl_f16,
                f"{retained:.0%} {matrix}".strip(),
                last_five.get(arm) if name in results.measured_formats else None,
            ]
        )
        if retained < MIN_RETAINED:
            notes.append(
                f"{name} retains less than {MIN_RETAINED:.0%} of the adapter's change in {matrix}. "
                "A larger format retains more."
            )
    columns = [
        "format",
        "MB",
        "nats per token from the trained model",
        "from F16",
        "adapter's change retained (worst matrix)",
        "adherence, last five turns",
    ]
    return ReportSection(
        title="Export",
        caption=(
            "The adapter was trained on weights rounded to 4 bits, and merged into the "
            f"{_WEIGHTS[summary.merge_base]} ones."
            if summary.trained_in_4bit
            else "The adapter was trained on the original weights, and merged into them."
        ),
        tables=[Table("export", columns, rows)],
        notes=notes,
    )


def facts(results: RunResults) -> ReportSection:
    """Return what is needed to repeat the run."""
    return ReportSection(
        title="The run",
        caption="What is needed to repeat it.",
        tables=[Table("facts", ["fact", "value"], list(results.facts.items()))],
    )
