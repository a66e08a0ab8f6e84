"""What the simulation's cost is, and that the README tells its result."""

import json

import pytest

from readme import REPORT, with_sections
from scheduler import simulate


def test_the_cost_is_the_line_through_the_folded_times() -> None:
    rows = [
        {"shape": "qwen3-0.6b", "nodes": nodes, "wall_ms": {"full": 20 + 0.005 * nodes, "none": 1}}
        for nodes in (1000, 5000, 60_000)
    ]
    rows += [
        {"shape": "qwen3-4b", "nodes": 1, "wall_ms": {"full": 1}},
        {"shape": "qwen3-0.6b", "nodes": 1, "wall_ms": {}},
    ]
    cost = simulate.fitted(simulate.points({"rows": rows}))
    assert cost.batch_seconds == pytest.approx(0.02)
    assert cost.token_seconds == pytest.approx(5e-6)


def test_the_committed_result_has_the_cost_of_its_points() -> None:
    result = json.loads(simulate.RESULT.read_text())
    cost = simulate.fitted(result["cost_points"]["points"])
    assert (result["batch_seconds"], result["token_seconds"]) == (cost.batch_seconds, cost.token_seconds)


def test_the_readme_tells_the_committed_result() -> None:
    text = REPORT.read_text(encoding="utf-8")
    assert with_sections(text, {"scheduler": simulate.table(json.loads(simulate.RESULT.read_text()))}) == text
