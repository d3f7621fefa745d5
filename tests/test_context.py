"""The parts of batch-invariant decoding: padding tokens, draft tokens and common prefixes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.llama.batch_builder import BatchBuilder, BatchRow
from pipeline.inference.llama.context import common_prefix_length
from pipeline.inference.llama.ngram_drafter import NgramDrafter


def _row(sequence: int, position: int = 10) -> BatchRow:
    return BatchRow(sequence, position, token=100 + sequence, logits=True)


def _padding(sequence: int, position: int, token: int) -> BatchRow:
    return BatchRow(sequence, position, token, logits=False)


def _build(rows: list[BatchRow], *, exact: bool, sequences: int = 6) -> BatchBuilder:
    """Build a batch over sequences that have 20, 21, ... cached tokens."""
    builder = BatchBuilder([20 + n for n in range(sequences)], exact=exact)
    builder.add_rows(rows)
    assert [builder.rows[index] for index in builder.indices] == rows
    assert sorted([*rows, *builder.padding]) == sorted(builder.rows)
    return builder


def test_the_only_row_of_a_sequence_is_padded() -> None:
    builder = _build([_row(0), _row(1)], exact=True)
    assert builder.rows == [_row(0), _padding(0, 11, 100), _row(1), _padding(1, 11, 101)]
    assert builder.indices == [0, 2]


def test_rows_of_one_sequence_need_no_padding() -> None:
    rows = [_row(0, position) for position in range(10, 15)]
    assert _build(rows, exact=True).rows == rows


def test_a_draft_token_takes_the_place_of_padding() -> None:
    draft = BatchRow(0, 11, token=7, logits=True)
    builder = _build([_row(0), draft, _row(1)], exact=True)
    assert builder.rows == [_row(0), draft, _row(1), _padding(1, 11, 101)]
    assert builder.indices == [0, 1, 2]


def test_a_gap_of_two_idle_sequences_is_filled() -> None:
    builder = _build([_row(0), _row(3)], exact=True)
    assert builder.padding == [
        _padding(0, 11, 100),
        _padding(1, 21, 100),
        _padding(1, 22, 100),
        _padding(2, 22, 100),
        _padding(2, 23, 100),
        _padding(3, 11, 103),
    ]


def test_a_wider_gap_costs_a_second_pass_and_is_not_filled() -> None:
    builder = _build([_row(0), _row(4)], exact=True)
    assert [row.sequence for row in builder.padding] == [0, 4]


def test_without_exact_only_gaps_are_padded_with_one_token_each() -> None:
    builder = _build([_row(0), _row(1), _row(3), _row(5)], exact=False)
    assert builder.padding == [_padding(2, 22, 101), _padding(4, 24, 103)]
    assert builder.indices == [0, 1, 3, 5]


@given(st.sets(st.integers(0, 15), min_size=1), st.booleans())
def test_every_busy_sequence_keeps_its_row_and_no_exact_row_is_alone(
    busy: set[int], exact: bool
) -> None:
    builder = _build([_row(sequence) for sequence in sorted(busy)], exact=exact, sequences=16)
    order = [row.sequence for row in builder.rows]
    assert order == sorted(order)
    for sequence in set(order):
        positions = [row.position for row in builder.rows if row.sequence == sequence]
        assert positions == list(range(positions[0], positions[0] + (2 if exact else 1)))


def test_the_drafter_follows_the_longest_ngram_it_has_seen() -> None:
    drafter = NgramDrafter(max_tokens=3)
    assert drafter.draft([1, 2, 3]) is None
    drafter.learn([1, 2, 3], 4)
    drafter.learn([9, 2, 3], 5)
    assert drafter.draft([1, 2, 3]) == 4
    assert drafter.draft([8, 2, 3]) == 5  # the last token that followed (2, 3)
    assert drafter.draft([7, 3]) == 5
    assert drafter.draft([3, 7]) is None


def test_the_drafter_prefers_what_followed_last() -> None:
    drafter = NgramDrafter()
    drafter.learn([1, 2, 3], 4)
    drafter.learn([1, 2, 3], 6)
    assert drafter.draft([0, 1, 2, 3]) == 6


def test_the_drafter_starts_over_when_it_is_full() -> None:
    drafter = NgramDrafter(max_tokens=1, capacity=3)
    for token in range(5):
        drafter.learn([token], token + 1)
    assert [drafter.draft([token]) for token in range(5)] == [None, None, None, None, 5]


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30))
def test_the_common_prefix_is_that_of_a_loop(first: list[int], second: list[int]) -> None:
    length = common_prefix_length(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first)


@given(st.lists(st.integers(), max_size=50), st.lists(st.integers(), max_size=5))
def test_a_sequence_has_itself_as_prefix(prefix: list[int], rest: list[int]) -> None:
    assert common_prefix_length(prefix, [*prefix, *rest]) == len(prefix)
