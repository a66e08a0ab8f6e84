"""What the measured speed-ups are held to."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

SHARE = {"qwen3-0.6b": 0.9, "qwen3-4b": 0.95, "qwen3-8b": 0.95}
CONTROLS = ("nothing shared", "little shared")


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """Each target with the worst value of the rows that it is about, by the wall clock; none without such rows."""
    checks: list[tuple[str, list[float], float]] = []
    for shape, share in SHARE.items():
        own = [row for row in rows if row["shape"] == shape and row["compression"] >= 2]
        large = [row for row in own if row["nodes"] >= 8000]
        small = [row for row in own if row["nodes"] < 8000]
        checks += [
            (f"{shape}: share of compression from 8,000 nodes on ≥ {share}", values(large, of_compression), share),
            (
                f"{shape}: time of as many unshared tokens over that of fewer nodes ≥ 1/1.1",
                values(small, same),
                1 / 1.1,
            ),
        ]
    rerank = [row for row in rows if (row["shape"], row["batch"]) == ("qwen3-4b", "rerank")]
    control = [row for row in rows if row["shape"] in SHARE and row["batch"] in CONTROLS]
    checks += [
        ("qwen3-4b, rerank: share of compression ≥ 0.95", values(rerank, of_compression), 0.95),
        ("controls: speed-up ≥ 0.98", values(control, speedup), 0.98),
    ]
    met = [
        {"target": text, "value": round(min(found), 3), "met": min(found) >= limit}
        for text, found, limit in checks
        if found
    ]
    return met + flip_targets([row["flips"] for row in rows if row["shape"] in SHARE and "flips" in row])


def flip_targets(flips: list[Row]) -> list[dict[str, Any]]:
    result = []
    for kind in ("last", "sampled", "pairs"):
        of_kind = [row for row in flips if kind in row["full from none"]]
        if not of_kind:
            continue
        full, half, one = (
            sum(row[f"{name} from none"][kind] for row in of_kind) / len(of_kind)
            for name in ("full", "half a batch", "one at a time")
        )
        text = f"mean share of decisions ({kind}) that flip ≤ with half a batch {half:.5f} or one at a time {one:.5f}"
        result.append({"target": text, "value": round(full, 5), "met": full <= max(half, one)})
    return result


def values(rows: list[Row], value: Callable[[Row], float | None]) -> list[float]:
    return [found for found in map(value, rows) if found is not None]


def speedup(row: Row, suffix: str = "") -> float | None:
    """Of `full` or of `full graphs`, whichever gains more, each over its like."""
    speeds = row["speedup"]["wall"]
    return max((speeds[name + suffix] for name in ("full", "full graphs") if name + suffix in speeds), default=None)


def of_compression(row: Row) -> float | None:
    found = speedup(row)
    return None if found is None else found / row["compression"]


def same(row: Row) -> float | None:
    return speedup(row, " over unshared")
