"""What the kernels and the Rust model are held to."""

from typing import Any

from gpu_forward.checks import at_least, at_most, with_flops
from gpu_forward.targets import CONTROLS, SHARE, SMALL

Row = dict[str, Any]

# Outputs from this size on are bound by memory; smaller ones stay in the cache, or wait for the launch.
LARGE_BYTES = 64 << 20
OF_COPY = 0.85
# A difference that two runs of the same code show.
NOISE = 1.02
OF_FLASH = 0.7
OF_TORCH = 1.15


def targets(rows: list[Row]) -> list[Row]:
    """Each target with the worst value of the rows that it is about; none without such rows."""
    by_part = {part: [row for row in rows if row["part"] == part] for part in ("rows", "attention", "model")}
    return of_rows(by_part["rows"]) + of_attention(by_part["attention"]) + of_model(by_part["model"])


def of_rows(rows: list[Row]) -> list[Row]:
    large = [row for row in rows if row["output_bytes"] >= LARGE_BYTES]
    checks = at_least(
        "rows by index, outputs of 64 MiB and more: share of a copy's bandwidth",
        OF_COPY,
        [(row["ms"]["copy"] / row["ms"]["ours"], row["name"]) for row in large],
    )
    slower = [(row["ms"]["ours"] / row["ms"]["torch"], row["name"]) for row in rows]
    return checks + at_most("rows by index: time over torch's", NOISE, slower)


def of_attention(rows: list[Row]) -> list[Row]:
    alone = [row for row in rows if row["compression"] == 1]
    shared = [row for row in rows if "ours full" in row["ms"] and row["name"] not in CONTROLS]
    checks = at_least(
        "attention, nothing shared: speed over FlashAttention-2",
        OF_FLASH,
        [(row["ms"]["flash none"] / row["ms"]["ours none"], name(row)) for row in alone],
    )
    for other, text in (("flash full", "query-folded FlashAttention-2"), ("flex", "FlexAttention")):
        slower = [(row["ms"]["ours full"] / row["ms"][other], name(row)) for row in shared]
        checks += at_most(f"attention of shared batches: time over {text}", 1, slower)
    return checks


def of_model(rows: list[Row]) -> list[Row]:
    checks: list[Row] = []
    for shape, share in SHARE.items():
        large = [row for row in rows if row["shape"] == shape and row["nodes"] >= SMALL and row["compression"] >= 2]
        for times, text in (("ms", ""), ("rested_ms", ", single steps on a rested GPU")):
            timed = [row for row in large if times in row]
            reached = [(of_compression(row, times), with_flops(name(row), row)) for row in timed]
            checks += at_least(f"{shape}: speed-up of full over none as a share of compression{text}", share, reached)
    beside_torch = [row for row in rows if row["shape"] in SHARE and "torch none" in row["ms"]]
    slower = [(row["ms"]["none"] / row["ms"]["torch none"], name(row)) for row in beside_torch]
    checks += at_most("none: time over the same model in torch, compiled", OF_TORCH, slower)
    waiting = [(row["ms"]["enqueued"] / row["ms"]["full"], name(row)) for row in rows if row["shape"] in SHARE]
    # Below 1 the GPU always has work queued, and replaying graphs would gain nothing.
    return checks + at_most("full: share of the time until all kernels are launched", 1, waiting)


def of_compression(row: Row, times: str) -> float:
    return float(row[times]["none"] / row[times]["full"] / row["compression"])


def name(row: Row) -> str:
    return f"{row['name']}, {row['shape']}"
