"""Fits the cost model of attention, radix_mlp/torch/cost.py, to what measure.py measured, by least squares.

    python benchmark/gpu_attention/fit.py    # prints the constants, and how far off the model is

Relative errors count. FlashAttention's rows are those of `none` and of query_folded; FlexAttention's are not used.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from radix_mlp.torch import cost
from radix_mlp.torch.cost import Rates

RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu_attention.json"
# By the name of the constant: which of the rows' times, of which ways, and the kinds of work that take time.
MODELS = {
    "TREE": ("forward_ms", ["tree"], ["flops", "tiles"]),
    "TREE_TRAINING": ("training_ms", ["tree"], ["flops", "tiles"]),
    "FLASH": ("forward_ms", ["none", "query_folded"], ["flops", "tiles", "bytes", "gathers"]),
    "FLASH_TRAINING": ("training_ms", ["none", "query_folded"], ["flops", "tiles", "bytes", "gathers"]),
}
DIGITS = 3

Row = dict[str, Any]


def fit(rows: list[Row], name: str) -> Rates:
    """The constant `name` of cost.py, to DIGITS digits."""
    time, ways, kinds = MODELS[name]
    measured = [(row["work"][way], 1e-3 * row["measured"][way][time]) for row in rows for way in ways]
    work = np.array([[of_way[kind] for kind in kinds] for of_way, _ in measured], float)
    seconds = np.array([second for _, second in measured])
    # In units in which every kind of work takes all the time of some row at most.
    units = (seconds[:, None] / np.maximum(work, 1e-9)).min(0)
    shares = work * units / seconds[:, None]

    def errors(x: Any) -> Any:
        return np.maximum(x[0] * seconds.min() / seconds, shares @ x[1:]) - 1

    start = np.full(1 + len(kinds), 0.5)
    host, *rates = least_squares(errors, start, bounds=(0, np.inf), xtol=1e-12, ftol=1e-12).x
    host *= seconds.min()
    if (shares @ rates * seconds > host).all():
        host = 0.0  # No row waited for it, so nothing says how long it takes.
    host, *rates = (float(f"{x:.{DIGITS}g}") for x in (host, *(rates * units)))
    return Rates(host, dict(zip(kinds, rates, strict=True)))


def predicted(row: Row, kind: str) -> dict[str, float]:
    """Milliseconds that cost.py expects of `kind`, "forward" or "training", by way."""
    tree, flash = (cost.TREE, cost.FLASH) if kind == "forward" else (cost.TREE_TRAINING, cost.FLASH_TRAINING)
    return {way: 1e3 * (tree if way == "tree" else flash).seconds(work) for way, work in row["work"].items()}


def picked(row: Row, kind: str) -> str:
    """The backend that cost.py finds the cheaper."""
    expected = predicted(row, kind)
    return min(("tree", "query_folded"), key=lambda way: expected[way])


def main() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    for name in MODELS:
        print(f"{name} = {fit(rows, name)}")
    for kind in ("forward", "training"):
        for row in rows:
            expected = {
                way: f"{value / row['measured'][way][f'{kind}_ms']:.2f}" for way, value in predicted(row, kind).items()
            }
            print(f"{kind}, {row['batch']}, {row['heads']}: picks {picked(row, kind)}, expected / measured {expected}")


if __name__ == "__main__":
    main()
