"""What the measured attention is held to."""

from collections.abc import Iterator
from typing import Any

from gpu_attention.fit import picked
from gpu_forward.checks import at_most

Row = dict[str, Any]

# FlashAttention and the tree kernel; FlexAttention is compared with only.
OURS = ("none", "none tree", "query_folded", "tree")
KINDS = ("forward", "training")
NEW_SHAPE_MS = 2.0
FIRST_CALL_SECONDS = 20
PICKED = 1.1


def targets(rows: list[Row]) -> list[Row]:
    """Each target with the worst value of the rows that it is about; none without such rows."""
    rows = [row for row in rows if {"tree", "query_folded"} <= row["measured"].keys()]
    new = [(row["measured"][picked(row, "forward")]["new_shape_ms"], name(row)) for row in rows]
    checks = at_most("ms of a new shape beyond the fold, picked backend", NEW_SHAPE_MS, new)
    checks += at_most("seconds of the first call in a process", FIRST_CALL_SECONDS, first_calls(rows))
    for kind in KINDS:
        rerank = [(ratio(row, "tree", "query_folded", kind), name(row)) for row in rows if row["batch"] == "rerank"]
        checks += at_most(f"rerank, {kind}: time of tree over query_folded", 1, rerank)
    for kind in KINDS:
        slower = [(over_best(row, kind), name(row)) for row in rows]
        checks += at_most(f"{kind}: time of the picked backend over the fastest", PICKED, slower)
    return checks


def first_calls(rows: list[Row]) -> Iterator[tuple[float, str]]:
    """Seconds of each first call; the largest are the first of their process, which compile."""
    for row in rows:
        for way, times in row["measured"].items():
            if way in OURS:
                yield from ((times[f"first_{kind}_ms"] / 1e3, f"{way}, {kind}, {name(row)}") for kind in KINDS)


def ratio(row: Row, slow: str, fast: str, kind: str) -> float:
    of_kind = [row["measured"][way][f"{kind}_ms"] for way in (slow, fast)]
    return float(of_kind[0] / of_kind[1])


def over_best(row: Row, kind: str) -> float:
    way = picked(row, kind)
    return max(ratio(row, way, other, kind) for other in ("tree", "query_folded"))


def name(row: Row) -> str:
    return f"{row['batch']}, {row['heads']} heads"
