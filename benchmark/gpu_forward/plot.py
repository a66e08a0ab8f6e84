"""Draws results/gpu_forward.json, or another file of that form, to a PNG beside it.

python benchmark/gpu_forward/plot.py [result.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BENCHMARK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARK))

from legend import common_legend  # noqa: E402

RESULT = BENCHMARK / "results" / "gpu_forward.json"
COLORS = {
    "padded": "tab:blue",
    "mlp": "tab:orange",
    "full": "tab:green",
    "full graphs": "tab:olive",
    "padded compiled": "tab:cyan",
    "none compiled": "tab:purple",
    "full compiled": "tab:red",
}
MARKS = "osD^"
PANELS_A_ROW = 3

Row = dict[str, Any]


def speeds(axes: Axes, name: str, rows: list[Row]) -> None:
    x = np.arange(len(rows))
    shown = [label for label in COLORS if any(label in row["speedup"]["wall"] for row in rows)]
    width = 0.84 / len(shown)
    for index, label in enumerate(shown):
        heights = [row["speedup"]["wall"].get(label, np.nan) for row in rows]
        places = x + width * (index - (len(shown) - 1) / 2)
        bars = axes.bar(places, heights, 0.95 * width, label=label, color=COLORS[label])
        texts = ["" if np.isnan(height) else f"{height:.{2 if height < 10 else 1}f}" for height in heights]
        axes.bar_label(bars, texts, fontsize=6, padding=1)
    compression = rows[0]["compression"]
    axes.axhline(compression, color="black", linestyle="dashed", linewidth=1, label="compression N/N'")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.margins(y=0.12)
    axes.set_xticks(x, [row["shape"].removeprefix("qwen3-") for row in rows], fontsize=8)
    axes.set_title(f"{name}: {rows[0]['tokens']:,} → {rows[0]['nodes']:,}", fontsize=9)


def memory(axes: Axes, rows: list[Row]) -> None:
    """How many times the peak of `full` that of `none` is, over compression."""
    limits = [1, 1.2 * max(row["compression"] for row in rows)]
    axes.plot(limits, limits, "k--", linewidth=1)
    for mark, shape in zip(MARKS, dict.fromkeys(row["shape"] for row in rows), strict=False):
        own = [row for row in rows if row["shape"] == shape and all(map(row["peak_gib"].get, ("none", "full")))]
        ratios = [row["peak_gib"]["none"] / row["peak_gib"]["full"] for row in own]
        axes.plot([row["compression"] for row in own], ratios, mark, label=shape, alpha=0.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("compression", fontsize=8)
    axes.set_title("peak memory beside the weights, none / full", fontsize=9)
    axes.legend(fontsize=7)


def plot(result: dict[str, Any], output: Path) -> None:
    rows = sorted(result["rows"], key=lambda row: row["shape"])
    names = list(dict.fromkeys(row["batch"] for row in rows))
    rows_of_panels = -(-(len(names) + 1) // PANELS_A_ROW)
    size = (4 * PANELS_A_ROW, 2.7 * rows_of_panels + 0.6)
    figure, grid = plt.subplots(rows_of_panels, PANELS_A_ROW, figsize=size, layout="constrained")
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
        speeds(axes, name, [row for row in rows if row["batch"] == name])
    memory(panels[len(names)], rows)
    for axes in panels[len(names) + 1 :]:
        axes.axis("off")
    common_legend(figure, panels[: len(names)])
    gpu = result["hardware"].get("gpu", "CPU")
    figure.suptitle(f"Qwen3 of transformers, bf16, {gpu}: speed over none (full graphs: over none as graphs)")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    plot(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
