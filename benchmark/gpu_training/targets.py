"""What the measured training steps are held to."""

from typing import Any

Row = dict[str, Any]

# Of compression, by what the loss is on: where it is on completions, most prompt rows need no logits in any column.
SHARE = {"all": 0.95, "completions": 0.9}
MEMORY = 1.1
# bfloat16 keeps eight bits, and losses of random weights are near the logarithm of the vocabulary.
LOSS = 5e-3


def targets(rows: list[Row]) -> list[Row]:
    """Each target with the worst value of the rows that it is about; none without such rows."""
    checks: list[tuple[str, list[float], float]] = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape and {"none", "full"} <= row["wall_ms"].keys()]
        for loss, share in SHARE.items():
            speeds = [row["speedup"]["full"] / row["compression"] for row in own if row["loss"] == loss]
            checks.append((f"{shape}, loss on {loss}: share of compression ≥ {share}", speeds, share))
        memory = [
            row["peak_gib"]["none"] / row["peak_gib"]["full"] / row["compression"]
            for row in own
            if row["peak_gib"]["full"]
        ]
        checks.append(
            (f"{shape}: memory of none over full, as a share of compression ≥ 1/{MEMORY}", memory, 1 / MEMORY)
        )
    apart = [-spread(list(row["loss_value"].values())) for row in rows]
    checks.append((f"minus the largest difference of a loss from none's ≥ -{LOSS}", apart, -LOSS))
    return [
        {"target": text, "value": round(min(found), 4), "met": min(found) >= limit}
        for text, found, limit in checks
        if found
    ]


def spread(values: list[float]) -> float:
    """The largest difference from the first, relative to it."""
    return max(abs(value / values[0] - 1) for value in values)
