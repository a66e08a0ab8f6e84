"""Figures of results whose rows are batches: a panel of bars for each, and one of peak memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKS = "osD^"
PANELS_A_ROW = 3
LABELS_A_ROW = 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Bars:
    """What a row has in its batch's panel: the speed-up over `none` of each way, and the text below."""

    row: Row
    speedup: dict[str, float]
    text: str


def draw(bars: list[Bars], colors: dict[str, str], *, title: str, beside: str, output: Path) -> None:
    """The bars of each batch by the `colors` of ways, and peak memory `beside` what it does not count."""
    batches = list(dict.fromkeys(each.row["batch"] for each in bars))
    rows_of_panels = -(-(len(batches) + 1) // PANELS_A_ROW)
    size = (4.4 * PANELS_A_ROW, 2.8 * rows_of_panels + 0.6)
    figure, grid = plt.subplots(rows_of_panels, PANELS_A_ROW, figsize=size, layout="constrained", squeeze=False)
    panels = list(grid.flat)
    for axes, batch in zip(panels, batches, strict=False):
        speeds(axes, [each for each in bars if each.row["batch"] == batch], colors)
    memory(panels[len(batches)], [each.row for each in bars], beside)
    for axes in panels[len(batches) + 1 :]:
        axes.axis("off")
    common_legend(figure, panels[: len(batches)])
    figure.suptitle(title)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def speeds(axes: Axes, bars: list[Bars], colors: dict[str, str]) -> None:
    """Of one batch."""
    x = np.arange(len(bars))
    shown = [way for way in colors if any(way in each.speedup for each in bars)]
    width = 0.86 / len(shown)
    for index, way in enumerate(shown):
        heights = [each.speedup.get(way, np.nan) for each in bars]
        places = x + width * (index - (len(shown) - 1) / 2)
        drawn = axes.bar(places, heights, 0.95 * width, label=way, color=colors[way])
        texts = ["" if np.isnan(height) else f"{height:.{2 if height < 10 else 1}f}" for height in heights]
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        axes.bar_label(drawn, texts, fontsize=6.5, padding=3, rotation=90, bbox=behind)
    batch = bars[0].row
    axes.axhline(batch["compression"], color="black", linestyle="dashed", linewidth=1, label="compression N/N'")
    fewer = [each.row["flop_compression"] for each in bars]
    axes.hlines(fewer, x - 0.45, x + 0.45, "black", "dotted", linewidth=1, label="fewer flops")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.margins(y=0.2)
    axes.set_xticks(x, [each.text for each in bars], fontsize=7)
    axes.set_title(f"{batch['batch']}: {batch['tokens']:,} → {batch['nodes']:,}", fontsize=9)


def memory(axes: Axes, rows: list[Row], beside: str) -> None:
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
    axes.set_title(f"peak memory beside {beside}, none / full", fontsize=9)
    axes.legend(fontsize=7)


def common_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """Below the panels, each label once, though a panel may lack some."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        own, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, own, strict=True))
    columns = -(-len(handles) // -(-len(handles) // LABELS_A_ROW))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
