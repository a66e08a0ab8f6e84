"""Draws results/gpu_forward.json, or another file of that form, to a PNG beside it.

python benchmark/gpu_forward/plot.py [result.json]
"""

import json
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARK))

from speedups import Bars, draw  # noqa: E402

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


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    result = json.loads(path.read_text())
    rows = sorted(result["rows"], key=lambda row: row["shape"])
    bars = [Bars(row, row["speedup"]["wall"], row["shape"].removeprefix("qwen3-")) for row in rows]
    gpu = result["hardware"].get("gpu", "CPU")
    title = f"Qwen3 of transformers, bf16, {gpu}: speed over none (full graphs: over none as graphs)"
    draw(bars, COLORS, title=title, beside="the weights", output=path.with_suffix(".png"))


if __name__ == "__main__":
    main()
