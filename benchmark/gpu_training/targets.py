"""What the measured training steps are held to."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpu_forward.checks import at_least, at_most, with_flops

Row = dict[str, Any]

# Of compression, by what the loss is on: where it is on completions, most prompt rows need no logits in any column.
SHARE = {"all": 0.95, "completions": 0.9}
# The fastest folded way is held against the fastest unfolded one.
UNFOLDED, FOLDED = ("none", "none compiled"), ("full", "full compiled")
MEMORY = 1.1
# bfloat16 keeps eight bits, and losses of random weights are near the logarithm of the vocabulary.
LOSS = 5e-3
# The largest of the batches of different shapes has 3.6 times as many nodes as the median; a compilation takes seconds.
SLOWEST_SHAPE = 5


def targets(rows: list[Row]) -> list[Row]:
    """Each target with the worst value of the rows that it is about; none without such rows."""
    checks: list[Row] = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of_shape = [row for row in rows if row["shape"] == shape]
        own = [row for row in of_shape if {"none", "full"} <= row["wall_ms"].keys()]
        for loss, share in SHARE.items():
            of_loss = [row for row in own if row["loss"] == loss]
            speeds = [(speedup(row) / row["compression"], with_flops(name(row), row)) for row in of_loss]
            checks += at_least(f"{shape}, loss on {loss}: speed-up as a share of compression", share, speeds)
        memory = [(memory_ratio(row), name(row)) for row in own]
        checks += at_most(f"{shape}: memory of full over N'/N of that of none", MEMORY, memory)
        checks += at_most(f"{shape}: slowest later step over the median", SLOWEST_SHAPE, shapes(of_shape))
    apart = [(spread(row["loss_value"]), name(row)) for row in rows]
    return checks + at_most("relative difference of a loss from that of none", LOSS, apart)


def speedup(row: Row) -> float:
    unfolded, folded = ([row["speedup"][way] for way in ways if way in row["speedup"]] for ways in (UNFOLDED, FOLDED))
    return float(max(folded) / max(unfolded))


def memory_ratio(row: Row) -> float | None:
    """None where nothing was allocated: on the CPU."""
    none, full = row["peak_gib"]["none"], row["peak_gib"]["full"]
    return float(full / none * row["compression"]) if none else None


def shapes(rows: list[Row]) -> Iterator[tuple[float, str]]:
    """Of steps on batches that differ in shape; the first one compiles."""
    for row in rows:
        seen = row["seconds_of_shapes"]
        yield seen["slowest later"] / seen["median"], f"first {seen['first']} s, median {seen['median']} s"


def spread(losses: dict[str, float]) -> float | None:
    """The largest difference from the loss of `none`, relative to it; None where there is nothing to compare."""
    others = [loss for way, loss in losses.items() if way != "none"]
    if "none" not in losses or not others:
        return None
    # Python's max would forget NaN.
    return float(np.max([abs(loss / losses["none"] - 1) for loss in others]))


def name(row: Row) -> str:
    return f"{row['shape']}, {row['batch']}, loss on {row['loss']}"


def gradient_targets(rows: list[Row]) -> list[Row]:
    """Those of gradients.py."""
    found = [(row["ratio"], f"{row['shape']}, {row['batch']}") for row in rows]
    return at_most("error of the folded step's gradients over that of the unfolded one's", 1.0, found)
