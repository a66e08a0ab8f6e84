"""Draws results/gpu_training.json, or another file of that form, to a PNG beside it.

python benchmark/gpu_training/plot.py [result.json]
"""

import json
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARK))

from speedups import Bars, draw  # noqa: E402

RESULT = BENCHMARK / "results" / "gpu_training.json"
COLORS = {
    "transformers padded": "tab:blue",
    "transformers padding-free": "tab:cyan",
    "PrefixGrouper": "tab:purple",
    "mlp": "tab:orange",
    "full": "tab:green",
    "none compiled": "tab:brown",
    "full compiled": "tab:red",
    "transformers folded": "tab:olive",
}


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    result = json.loads(path.read_text())
    rows = sorted(result["rows"], key=lambda row: (row["shape"], row["loss"]))
    texts = [f"{row['shape'].removeprefix('qwen3-')}\nloss on {row['loss']}" for row in rows]
    bars = [Bars(row, row["speedup"], text) for row, text in zip(rows, texts, strict=True)]
    title = f"A training step of Qwen3, bf16, {result['hardware'].get('gpu', 'CPU')}: speed over none"
    draw(bars, COLORS, title=title, beside="weights and gradients", output=path.with_suffix(".png"))


if __name__ == "__main__":
    main()
