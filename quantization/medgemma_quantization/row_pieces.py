"""Tables in pieces of rows, which a budget decides on one by one.

Tokenizers number their pieces by how frequent they are, so that few rows of a table are looked up and
predicted most of the time: bits on those are worth more. A piece is a weight with a row of its own in the
plan; neighbours that are stored alike are joined again, so that a program has few of them.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from medgemma_quantization.plan import PlanRow, QuantPlan

__all__ = ["PIECE_ROWS", "cut_rows", "join_rows", "piece_name", "spans", "table_to_cut"]

# Gemma's table is 32 of these: as many decisions as 6 layers.
PIECE_ROWS = 8192


def table_to_cut(plan: QuantPlan) -> tuple[PlanRow, tuple[int, ...]] | None:
    """The table that a budget decides on and where it is cut; None if it is small, or no plan has 4 bits."""
    for row in plan.rows:
        if row.role == "table" and row.storage.bits == 4 and row.shape[0] > PIECE_ROWS:
            return row, tuple(range(PIECE_ROWS, row.shape[0], PIECE_ROWS))
    return None


def piece_name(name: str, start: int, stop: int) -> str:
    """`TABLE.weight` as `TABLE.rows_0_8192.weight`."""
    stem, dot, last = name.rpartition(".")
    return f"{stem}.rows_{start}_{stop}{dot}{last}"


def spans(rows: int, bounds: Sequence[int]) -> list[tuple[int, int]]:
    """First row, and the one after the last, of each piece."""
    return list(pairwise((0, *bounds, rows)))


def cut_rows(plan: QuantPlan, table: PlanRow, bounds: Sequence[int]) -> QuantPlan:
    """The plan with a row for each piece in the table's place."""
    stored = plan.by_name[table.name]
    pieces = [
        replace(
            stored,
            name=piece_name(table.name, start, stop),
            shape=(stop - start, *table.shape[1:]),
            stored_shape=(stop - start, *stored.stored_shape[1:]),
        )
        for start, stop in spans(table.shape[0], bounds)
    ]
    return _replaced(plan, table.name, pieces)


def join_rows(plan: QuantPlan, table: PlanRow, bounds: Sequence[int]) -> tuple[QuantPlan, tuple[int, ...]]:
    """The plan with neighbours joined that are stored alike, and where the table is still cut.

    Args:
        plan: What `cut_rows` gave, with storages of its own for each piece.
        table: The table as it was before.
        bounds: Where it was cut.
    """
    rows = table.shape[0]
    pieces = [plan.by_name[piece_name(table.name, *span)] for span in spans(rows, bounds)]
    kept = tuple(
        bound
        for bound, (before, after) in zip(bounds, pairwise(pieces), strict=True)
        if before.storage != after.storage
    )
    joined = []
    for start, stop in spans(rows, kept):
        inside = [
            piece
            for piece, (first, _) in zip(pieces, spans(rows, bounds), strict=True)
            if start <= first < stop
        ]
        joined.append(
            replace(
                inside[0],
                name=piece_name(table.name, start, stop) if kept else table.name,
                shape=(stop - start, *table.shape[1:]),
                stored_shape=(stop - start, *inside[0].stored_shape[1:]),
                reason=inside[0].reason
                if len(inside) == 1
                else f"{len(inside)} pieces of rows decided one by one, the first by {inside[0].reason}",
            )
        )
    replaced = {piece.name for piece in pieces}
    whole = replace(
        plan, rows=tuple(row for row in plan.rows if row.name not in replaced or row is pieces[0])
    )
    return _replaced(whole, pieces[0].name, joined), kept


def _replaced(plan: QuantPlan, name: str, pieces: Sequence[PlanRow]) -> QuantPlan:
    place = next(index for index, row in enumerate(plan.rows) if row.name == name)
    return replace(plan, rows=(*plan.rows[:place], *pieces, *plan.rows[place + 1 :]))
