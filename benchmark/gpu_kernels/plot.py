"""Draws results/gpu_kernels.json, or the result named, to a picture beside it.

python benchmark/gpu_kernels/plot.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu_kernels.json"

Row = dict[str, Any]


def bars(axes: Axes, rows: list[Row], heights: dict[str, list[float]], titles: list[str]) -> None:
    """A group of bars for each row, as high as `heights` says for each way."""
    x = np.arange(len(rows))
    width = 0.8 / max(len(heights), 1)
    for index, (way, values) in enumerate(heights.items()):
        drawn = axes.bar(x + width * (index - (len(heights) - 1) / 2), values, 0.95 * width, label=way)
        axes.bar_label(drawn, ["" if np.isnan(value) else f"{value:.3g}" for value in values], fontsize=5)
    axes.set_xticks(x, titles, fontsize=6, rotation=30, ha="right")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.legend(fontsize=7)


def over(rows: list[Row], base: str, ways: list[str]) -> dict[str, list[float]]:
    """How many times as fast as `base` each of `ways` is."""
    return {way: [row["ms"].get(base, np.nan) / row["ms"].get(way, np.nan) for row in rows] for way in ways}


def compressions(axes: Axes, rows: list[Row]) -> None:
    x = np.arange(len(rows))
    axes.hlines([row["compression"] for row in rows], x - 0.42, x + 0.42, "black", "dashed")
    axes.set_yscale("log")


def plot(result: dict[str, Any], output: Path) -> None:
    parts = {part: [row for row in result["rows"] if row["part"] == part] for part in ("rows", "attention", "model")}
    figure, (rows, attention, model) = plt.subplots(3, 1, figsize=(12, 13), layout="constrained")
    titles = {part: [f"{row['name']}\n{row['shape']}" for row in own] for part, own in parts.items()}
    bars(rows, parts["rows"], over(parts["rows"], "copy", ["ours", "torch", "candle"]), titles["rows"])
    rows.set_title("rows by index: share of a copy's speed", fontsize=9)
    ways = ["ours none", "ours full", "flash full", "flex"]
    bars(attention, parts["attention"], over(parts["attention"], "flash none", ways), titles["attention"])
    compressions(attention, parts["attention"])
    attention.set_title("attention of a layer: speed over FlashAttention-2 on every copy; dashed: N/N'", fontsize=9)
    bars(model, parts["model"], over(parts["model"], "none", ["mlp", "full", "torch none"]), titles["model"])
    compressions(model, parts["model"])
    x = np.arange(len(parts["model"]))
    model.hlines([row["flop_compression"] for row in parts["model"]], x - 0.42, x + 0.42, "black", "dotted")
    model.set_title("the Rust model: speed over its own none; dashed: N/N', dotted: fewer flops", fontsize=9)
    figure.suptitle(f"CUDA kernels, {result['hardware'].get('gpu', 'CPU')}")
    figure.savefig(output, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", default=RESULT)
    given = parser.parse_args()
    plot(json.loads(given.result.read_text()), given.result.with_suffix(".png"))
