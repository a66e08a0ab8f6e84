"""benchmark/README.md's text on the measured attention."""

from typing import Any

from gpu_attention.targets import KINDS, name, ratio, targets
from gpu_forward.checks import missed

Row = dict[str, Any]

COLUMNS = {"query_folded": "`query_folded`", "tree": "`tree`", "flex": "FlexAttention"}


def section(result: Row) -> str:
    """The table of speed-ups, where the tree kernel is the slower one, and the targets that were missed."""
    rows = sorted(result["rows"], key=lambda row: row["heads"])
    titles = [f"{kind}: {COLUMNS[way]}" for kind in KINDS for way in COLUMNS]
    lines = [f"| batch | heads | N/N' | {' | '.join(titles)} |", "|" + "---|" * (3 + len(titles))]
    for row in rows:
        speeds = [speedup(row, way, kind) for kind in KINDS for way in COLUMNS]
        lines.append(f"| {row['batch']} | {row['heads']} | {row['compression']:.2f} | {' | '.join(speeds)} |")
    return "\n".join([*lines, "", slower(rows), "", missed(targets(rows))])


def speedup(row: Row, way: str, kind: str) -> str:
    times = [row["measured"].get(column, {}).get(f"{kind}_ms") for column in ("none", way)]
    return f"{times[0] / times[1]:.2f}" if all(times) else ""


def slower(rows: list[Row]) -> str:
    """On which rows the tree kernel takes longer than each of the others."""
    texts = []
    for way, title in (("query_folded", "query-folded FlashAttention"), ("flex", "FlexAttention with its block lists")):
        found = [
            f"{name(row)}, {kind} ({worse:.2f}×)"
            for kind in KINDS
            for row in rows
            if {"tree", way} <= row["measured"].keys() and (worse := ratio(row, "tree", way, kind)) > 1
        ]
        texts.append(f"The tree kernel takes longer than {title} on {'; '.join(found) or 'no batch'}.")
    return " ".join(texts)
