"""benchmark/README.md's text on the CUDA kernels and the Rust model on them."""

from typing import Any

from gpu_forward.checks import missed
from gpu_kernels.targets import targets
from steady import method

Row = dict[str, Any]

DTYPES = ("f32", "f16", "bf16")
# What rows by index are held against.
OTHERS = {"copy": "a copy of as many bytes", "torch": "torch", "candle": "candle"}
# Ways of attention, over FlashAttention-2 on every copy.
WAYS = {"ours none": "ours, `none`", "flash full": "query-folded", "flex": "FlexAttention", "ours full": "ours, `full`"}


def section(result: Row) -> str:
    """What was measured, a table for each part and the targets that were missed."""
    parts = {part: [row for row in result["rows"] if row["part"] == part] for part in ("rows", "attention", "model")}
    texts = [
        f"The CUDA kernels and the Rust model, on one {result['hardware'].get('gpu', 'CPU')} "
        "(`python benchmark/gpu_kernels/measure.py`, [result](results/gpu_kernels.json), "
        "[plot](results/gpu_kernels.png)). The Qwen3 in bf16, random weights, last-token states, tokens to "
        "result: speed-up over its own `none` (and by single steps on a rested GPU), by how many times the fold lowers "
        "tokens and flops, and how fast `none` is over the same model in torch, compiled, with FlashAttention-2:",
        table(["batch", "Qwen3", "N/N'", "flops", "`mlp`", "`full`", "`full`, ms", "`none` over torch"], models(parts)),
        clocks(parts["model"]),
        launches(parts["model"]),
        missed(targets(result["rows"])),
        "<details>\n<summary>Kernels alone</summary>",
        "Attention of one layer, bf16, heads of 128: speed-up over FlashAttention-2 on every copy:",
        table(["batch", "heads", "N/N'", *WAYS.values()], attentions(parts)),
        f"Rows by index: how fast they are over others, in {', '.join(DTYPES)}:",
        table(["rows → ids", *(f"over {other}" for other in OTHERS.values())], selections(parts)),
        "</details>",
    ]
    return "\n\n".join(text for text in texts if text)


def table(titles: list[str], lines: list[list[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def clocks(rows: list[Row]) -> str:
    """How the model was timed, and what power left of the GPU's clock where that was sampled."""
    sampled = [row for row in rows if row.get("mhz")]
    told = [method(rows)]
    if sampled:
        limits = sampled[-1]["limits"]

        def span(way: str) -> str:
            rates = [row["mhz"][way] for row in sampled]
            return f"{min(rates):,} to {max(rates):,} MHz at `{way}`"

        told.append(
            f"{limits['watts']:.0f} W left clocks of {span('none')} and {span('full')}, of {limits['mhz']:,.0f}."
        )
    return " ".join(told)


def launches(rows: list[Row]) -> str:
    """Why there are no CUDA graphs; nothing without rows."""
    if not rows:
        return ""
    share = max(row["ms"]["enqueued"] / row["ms"]["full"] for row in rows)
    return (
        f"All kernels of `full` are launched within {share:.0%} of its time at most, the fold included: the GPU always "
        "has work queued, and replaying CUDA graphs would gain nothing."
    ).replace("%", " %")


def models(parts: dict[str, list[Row]]) -> list[list[str]]:
    """In the order of the batches whose attention was measured."""
    order = list(dict.fromkeys(row["name"] for row in parts["attention"] + parts["model"]))
    lines = []
    for row in sorted(parts["model"], key=lambda row: (order.index(row["name"]), row["shape"])):
        ms = row["ms"]
        ratios = [row["compression"], row["flop_compression"], ms["none"] / ms["mlp"]]
        full = f"{ms['none'] / ms['full']:.2f}"
        if alone := row.get("rested_ms"):
            full += f" ({alone['none'] / alone['full']:.2f})"
        over_torch = f"{ms['torch none'] / ms['none']:.2f}" if "torch none" in ms else ""
        cells = [*map("{:.2f}".format, ratios), full, f"{ms['full']:.1f}", over_torch]
        lines.append([row["name"], row["shape"].removeprefix("qwen3-").upper(), *cells])
    return lines


def attentions(parts: dict[str, list[Row]]) -> list[list[str]]:
    lines = []
    for row in parts["attention"]:
        speeds = [f"{row['ms']['flash none'] / row['ms'][way]:.2f}" if way in row["ms"] else "" for way in WAYS]
        lines.append([row["name"], row["shape"], f"{row['compression']:.2f}", *speeds])
    return lines


def selections(parts: dict[str, list[Row]]) -> list[list[str]]:
    """A line for the rows that differ in dtype alone."""
    found = {row["name"]: row["ms"] for row in parts["rows"]}
    lines = []
    for name in dict.fromkeys(name.rsplit(", ", 1)[0] for name in found):
        of_dtypes = [found[f"{name}, {dtype}"] for dtype in DTYPES]
        lines.append([name, *(" · ".join(f"{ms[other] / ms['ours']:.2f}" for ms in of_dtypes) for other in OTHERS)])
    return lines
