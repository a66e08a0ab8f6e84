"""The few results that README.md begins with, as a table and a picture, drawn from the JSON files of all benchmarks.

python benchmark/summary.py
"""

import json
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt

from readme import RESULTS, ROOT, write_sections

README = ROOT / "README.md"
PICTURE = RESULTS / "summary.png"

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """How many times as fast as unfolded some work was: at the paper's level, None if not measured, and all folded."""

    work: str
    batch: str
    compression: float
    mlp: float | None
    full: float


def lines() -> list[Line]:
    """What is told, in its order."""
    rust = [("qwen3-8b", "32 x 2048+256"), ("qwen3-4b", "few-shot BBH"), ("qwen3-4b", "tau-bench turns")]
    return [
        *(forward(shape, batch) for shape, batch in [*rust, ("qwen3-4b", "rerank"), ("qwen3-4b", "nothing shared")]),
        training("qwen3-0.6b", "4 x 8 x 1024+512"),
        training("qwen3-4b", "2 x 8 x 4096+512"),
        server("4b"),
        cpu("32 × 512+64"),
    ]


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def forward(shape: str, batch: str) -> Line:
    rows = [row for row in read("gpu_kernels")["rows"] if row["part"] == "model"]
    row = only(rows, shape=shape, name=batch)
    times = row["ms"]
    return Line(
        f"forward, {size(shape)}, Rust on an H200",
        batch,
        row["compression"],
        times["none"] / times["mlp"],
        times["none"] / times["full"],
    )


def training(shape: str, batch: str) -> Line:
    row = only(read("gpu_training")["rows"], shape=shape, batch=batch, loss="all")
    speeds = row["speedup"]
    return Line(
        f"training step, {size(shape)}, torch on an H200", batch, row["compression"], speeds.get("mlp"), speeds["full"]
    )


def server(shape: str) -> Line:
    runs = read(f"rest_gpu_{shape}")["passages"]
    none, mlp, full = (runs[f"{level}, 16384"] for level in ("none", "mlp", "full"))
    gains = none["mean"] / mlp["mean"], none["mean"] / full["mean"]
    return Line(f"answer over HTTP, {shape.upper()}, H200", "64 passages of a query", full["fold_ratio"], *gains)


def cpu(batch: str) -> Line:
    row = only(read("cpu_forward")["rows"], batch=batch)
    return Line(
        "forward, 100M, Rust on two CPU cores", batch, row["compression"], row["mlp_speedup"], row["full_speedup"]
    )


def only(rows: list[Row], **values: str) -> Row:
    """The one row that has these. Raises ValueError where there are none or several."""
    (row,) = (row for row in rows if values.items() <= row.items())
    return row


def size(shape: str) -> str:
    return shape.removeprefix("qwen3-").upper()


def table(told: list[Line]) -> str:
    made = ["| | batch | N/N' | as published (`mlp`) | here (`full`) |", "|---|---|---|---|---|"]
    for line in told:
        mlp = "" if line.mlp is None else f"{line.mlp:.2f}"
        made.append(f"| {line.work} | {line.batch} | {line.compression:.2f} | {mlp} | {line.full:.2f} |")
    return "\n".join(made)


def plot(told: list[Line]) -> None:
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    places = list(range(len(told)))[::-1]
    published = [line.mlp or 0 for line in told]
    axes.barh([at + 0.2 for at in places], published, 0.4, label="as published: position-wise work folded")
    axes.barh([at - 0.2 for at in places], [line.full for line in told], 0.4, label="here: all folded")
    ends = [line.compression for line in told]
    axes.vlines(ends, [at - 0.45 for at in places], [at + 0.45 for at in places], "black", "--", label="N/N'")
    axes.set_yticks(places, [f"{line.work}\n{line.batch}" for line in told], fontsize=8)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_xlabel("times as fast as unfolded")
    axes.legend()
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def main() -> None:
    told = lines()
    plot(told)
    write_sections(README, {"summary": table(told)})


if __name__ == "__main__":
    main()
