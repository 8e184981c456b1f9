"""A table in pieces is the same table, and pieces that are stored alike are one again."""

from dataclasses import replace

import pytest

from medgemma_quantization import row_pieces
from medgemma_quantization.plan import QuantPlan, WeightSpec, make_plan
from medgemma_quantization.row_pieces import cut_rows, join_rows, piece_name, spans, table_to_cut
from medgemma_quantization.scheme import INT8_BLOCKS, SCHEMES

ROWS = 1000
BOUNDS = (300, 600, 900)
WEIGHTS = [
    WeightSpec(name="embed.weight", shape=(ROWS, 64), role="table"),
    WeightSpec(name="matrix.weight", shape=(64, 64), role="linear"),
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(row_pieces, "PIECE_ROWS", 300)


def raise_bits(plan: QuantPlan, *starts: int) -> QuantPlan:
    """8 bits for the pieces that begin here."""
    names = {piece_name("embed.weight", *span) for span in spans(ROWS, BOUNDS) if span[0] in starts}
    return replace(
        plan,
        rows=tuple(
            replace(row, storage=INT8_BLOCKS, reason="raised") if row.name in names else row
            for row in plan.rows
        ),
    )


def shapes(plan: QuantPlan) -> dict[str, tuple[tuple[int, ...], int]]:
    return {row.name: (row.stored_shape, row.storage.bits) for row in plan.rows if row.role == "table"}


@pytest.fixture
def plan() -> QuantPlan:
    return make_plan(SCHEMES["int4"], WEIGHTS)


def test_a_cut_table_takes_the_same_bits_in_the_same_place(plan):
    table, bounds = table_to_cut(plan)
    assert (table.name, bounds) == ("embed.weight", BOUNDS)
    cut = cut_rows(plan, table, bounds)
    assert [row.name for row in cut.rows] == [
        "embed.rows_0_300.weight",
        "embed.rows_300_600.weight",
        "embed.rows_600_900.weight",
        "embed.rows_900_1000.weight",
        "matrix.weight",
    ]
    assert [row.shape[0] for row in cut.rows[:4]] == [300, 300, 300, 100]
    assert cut.bits_per_weight == plan.bits_per_weight
    assert cut.weight_count == plan.weight_count
    assert join_rows(cut, table, bounds)[1] == ()
    assert shapes(join_rows(cut, table, bounds)[0]) == shapes(plan)


@pytest.mark.parametrize(
    ("raised", "kept", "expected"),
    [
        ((0,), (300,), {"embed.rows_0_300.weight": (300, 8), "embed.rows_300_1000.weight": (700, 4)}),
        (
            (300, 600),
            (300, 900),
            {
                "embed.rows_0_300.weight": (300, 4),
                "embed.rows_300_900.weight": (600, 8),
                "embed.rows_900_1000.weight": (100, 4),
            },
        ),
        ((0, 300, 600, 900), (), {"embed.weight": (1000, 8)}),
    ],
)
def test_neighbours_stored_alike_are_joined(plan, raised, kept, expected):
    table, bounds = table_to_cut(plan)
    mixed = raise_bits(cut_rows(plan, table, bounds), *raised)
    joined, found = join_rows(mixed, table, bounds)
    assert found == kept
    assert shapes(joined) == {name: ((rows, 64), bits) for name, (rows, bits) in expected.items()}
    assert joined.bits_per_weight == mixed.bits_per_weight
    assert joined.rows[-1] == plan.rows[-1]


def test_a_joined_row_says_how_many_decisions_it_is(plan):
    table, bounds = table_to_cut(plan)
    joined, _ = join_rows(raise_bits(cut_rows(plan, table, bounds), 300, 600), table, bounds)
    reasons = [row.reason for row in joined.rows[:3]]
    assert reasons[1] == "2 pieces of rows decided one by one, the first by raised"
    assert reasons[0] == reasons[2] == plan.rows[0].reason


def test_small_tables_and_those_without_4_bits_stay_whole(plan, monkeypatch):
    assert table_to_cut(make_plan(SCHEMES["int8"], WEIGHTS)) is None
    monkeypatch.setattr(row_pieces, "PIECE_ROWS", ROWS)
    assert table_to_cut(plan) is None
