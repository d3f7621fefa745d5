"""The result of an export: `export.json`, which the report and the comparison read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import GattError

MergeBase = Literal["fp16", "nf4"]
"""The weights that an adapter was merged into: the original ones, or these rounded to 4 bits."""
MIN_RETAINED = 0.9
"""Share of the adapter's change below which a file gets a warning."""


@dataclass(frozen=True, slots=True)
class MergeTrial:
    """One of the two ways to merge, measured in F16.

    `kl_trained` is its divergence from the trained model, `nll` the loss on the run's dialogues,
    both in nats a token."""

    kl_trained: float
    nll: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSummary:
    """One exported file.

    `retained` is the share of the adapter's change that the file holds, by kind of matrix
    ("attn_q"). `kl_trained` and `kl_f16` are divergences from the trained model and from the F16
    merge in nats a token; None where they were not measured."""

    bytes: int
    retained: dict[str, float] = field(default_factory=dict)
    kl_trained: float | None = None
    kl_f16: float | None = None

    @property
    def least_retained(self) -> tuple[str, float]:
        """The kind of matrix that retains least, and its share; ("", 1.0) without an adapter."""
        return min(self.retained.items(), key=lambda item: item[1], default=("", 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """Everything that an export measured.

    `merge_trials` is empty unless both ways to merge were tried. `imatrix_tokens` were read for the
    importance matrix. `kl_adapter` is the divergence from the trained model of the base with
    `adapter.gguf` in nats a token; None where there is none, or it was not measured.
    `trained_in_4bit` tells how the base was loaded for training."""

    merge_base: MergeBase
    formats: dict[str, FormatSummary]
    merge_trials: dict[MergeBase, MergeTrial] = field(default_factory=dict)
    imatrix_tokens: int = 0
    kl_adapter: float | None = None
    trained_in_4bit: bool = True

    @classmethod
    def from_json(cls, text: str) -> ExportSummary:
        """Read the text of an `export.json`.

        Raises:
            GattError: fields are missing, as in a file of another version.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise GattError(
                "export.json does not have the fields that this version of gatt reads "
                f"({error.error_count()} differ). Run `gatt export` again."
            ) from error
