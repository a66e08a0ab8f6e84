"""The cost model of attention holds to what was measured."""

import json
from typing import Any

import pytest

from gpu_attention.fit import MODELS, RESULT, fit, picked
from radix_mlp.torch import cost
from radix_mlp.torch.cost import Rates

ROWS = json.loads(RESULT.read_text())["rows"]
# How much slower than the best the picked backend may be.
SLACK = 1.1


@pytest.mark.parametrize("name", MODELS)
def test_constants_are_fitted(name: str) -> None:
    found, used = fit(ROWS, name), getattr(cost, name)
    assert found.host == pytest.approx(used.host, rel=0.01)
    assert found.device == pytest.approx(used.device, rel=0.01)


@pytest.mark.parametrize("kind", ["forward", "training"])
@pytest.mark.parametrize("row", ROWS, ids=[f"{row['batch']}, {row['heads']}" for row in ROWS])
def test_picks_about_the_fastest(row: dict[str, Any], kind: str) -> None:
    times = {way: row["measured"][way][f"{kind}_ms"] for way in ("tree", "query_folded")}
    assert times[picked(row, kind)] <= SLACK * min(times.values())


def test_fit_recovers_rates() -> None:
    """Of rows that were computed by them, of which some wait for the host."""
    truth = Rates(2e-4, {"flops": 2e-15, "tiles": 3e-9})
    works = [{"flops": 1e9 * 4**i, "tiles": 1000.0 * 3**i * (1 + i % 2)} for i in range(9)]
    rows = [{"work": {"tree": work}, "measured": {"tree": {"forward_ms": 1e3 * truth.seconds(work)}}} for work in works]
    assert sum(truth.seconds(work) == truth.host for work in works) in range(2, 8)
    found = fit(rows, "TREE")
    assert found.host == pytest.approx(truth.host, rel=0.01)
    assert found.device == pytest.approx(truth.device, rel=0.01)
