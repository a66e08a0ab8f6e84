"""benchmark/README.md's text on the measured training steps."""

from typing import Any

from gpu_forward.checks import missed
from gpu_training.targets import SHARE, gradient_targets, targets
from steady import method, names

Row = dict[str, Any]

# Speed-ups over `none`, by their column's title.
COLUMNS = {
    "transformers padded": "transformers, padded",
    "transformers padding-free": "transformers, padding-free",
    "PrefixGrouper": "PrefixGrouper",
    "mlp": "`mlp`",
    "full": "`full`",
    "none compiled": "`none`, compiled",
    "full compiled": "`full`, compiled",
    "transformers folded": "transformers, folded",
}


def section(result: Row) -> str:
    """What was measured, the table and the targets that were missed."""
    intro = (
        f"A training step, forward, loss and backward, in bf16 on one {result['hardware'].get('gpu', 'CPU')}, speed-up "
        "over the unfolded step with FlashAttention (`none`), by how many times the fold lowers tokens and flops (less "
        "where sequences are prefixes of each other), and peak memory beside weights and gradients "
        "(`python benchmark/gpu_training/measure.py`, [result](results/gpu_training.json), "
        "[plot](results/gpu_training.png)). `none`, `mlp` and `full` are the model of `train/`, whose norms "
        "are one kernel each; transformers' are several, so that its columns are to be compared with each other:"
    )
    ways = [way for way in COLUMNS if any(way in row["speedup"] for row in result["rows"])]
    titles = ["batch", "loss on", "Qwen3", "N/N'", "flops", *(COLUMNS[way] for way in ways), "GiB, `none` → `full`"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["loss"], row["shape"])):
        speeds = [f"{row['speedup'][way]:.2f}" if way in row["speedup"] else "" for way in ways]
        peaks = " → ".join(f"{row['peak_gib'][way]:.1f}" if way in row["peak_gib"] else "?" for way in ("none", "full"))
        fewer = [f"{row[key]:.2f}" for key in ("compression", "flop_compression")]
        cells = [row["batch"], row["loss"], row["shape"].removeprefix("qwen3-").upper(), *fewer]
        lines.append(f"| {' | '.join([*cells, *speeds, peaks])} |")
    rows = result["rows"]
    texts = [checkpointed(rows), method(rows), shapes(rows), uncompiled(rows), missed(targets(rows))]
    return "\n\n".join([intro, "\n".join(lines), *texts])


def checkpointed(rows: list[Row]) -> str:
    """Of which rows layers are computed again."""
    again = names([row for row in rows if row.get("checkpointing")], rows)
    return f"Layers are checkpointed, in all columns, where `none` has no memory otherwise: {again or 'nowhere'}."


def shapes(rows: list[Row]) -> str:
    """The seconds of steps on batches of different shapes, those measured last of each model."""
    seen = {row["shape"].removeprefix("qwen3-").upper(): row["seconds_of_shapes"] for row in rows}
    told = [
        f"{shape} {own['first']:.1f} s for the first, which compiles the kernels, {own['median']:.2f} s in the median "
        f"and {own['slowest later']:.2f} s at most after the first"
        for shape, own in sorted(seen.items())
    ]
    return f"Folded steps on 20 batches that all differ in shape, checkpointed: {'; '.join(told)}."


def uncompiled(rows: list[Row]) -> str:
    """What targets, which compare the fastest of both sides, do not tell of steps without compiled layers."""
    told = []
    for loss, share in SHARE.items():
        own = [row for row in rows if row["loss"] == loss and "full" in row["speedup"]]
        if own:
            least = min(own, key=lambda row: row["speedup"]["full"] / row["compression"])
            value = least["speedup"]["full"] / least["compression"]
            told.append(
                f"{value:.3f} with the loss on {loss}, where {share} is asked ({least['shape']}, {least['batch']})"
            )
    return (
        "Targets compare the fastest folded with the fastest unfolded step. `full` over `none`, neither compiled, has "
        f"of compression at least {'; '.join(told)}."
    )


def gradients(result: Row) -> str:
    """How far gradients are from those in float32."""
    intro = (
        "Distance of a step's gradients in bf16 from those of the unfolded step in float32, of the same weights, over "
        "the length of these, by the readable model at the Qwen3's size (`python benchmark/gpu_training/gradients.py`, "
        "[result](results/gpu_gradients.json)):"
    )
    lines = ["| batch | Qwen3 | `none` | `full` | `full` over `none` | largest of a parameter |", "|" + "---|" * 6]
    for row in result["rows"]:
        errors = [f"{100 * row['error'][level]:.2f} %" for level in ("none", "full")]
        cells = [row["batch"], row["shape"].removeprefix("qwen3-").upper(), *errors]
        lines.append(f"| {' | '.join(cells)} | {row['ratio']:.3f} | {row['worst_ratio']:.3f} |")
    return "\n".join([intro, "", *lines, "", missed(gradient_targets(result["rows"]))])
