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


def test_clients_take_turns_in_their_own_order() -> None:
    clients = [[[[client, turn]] for turn in range(5)] for client in range(4)]
    found = list(simulate.interleaved(clients, 2, 0))
    order = [(client, turn) for ((client, turn),) in found]
    assert len(order) == 20
    for client in range(4):
        assert [turn for other, turn in order if other == client] == list(range(5))
    # No third one starts before one of the first two is done.
    firsts, lasts = ([order.index((client, turn)) for client in range(4)] for turn in (0, 4))
    assert min(lasts) < min(firsts[2:])
    assert [client for client, _ in order] != sorted(client for client, _ in order)


def test_requests_arrive_at_the_recorded_moments() -> None:
    moments = json.loads(simulate.ARRIVALS.read_text())["milliseconds"]
    assert moments == sorted(moments)
    assert moments[0] == 0
    sequences, seconds = simulate.at_recorded_times([[[1], [2]], [[3]]])
    assert sequences == [[1], [2], [3]]
    assert seconds.tolist() == [0, 0, moments[1] / 1e3]


def test_the_readme_tells_the_committed_result() -> None:
    text = REPORT.read_text(encoding="utf-8")
    assert with_sections(text, {"scheduler": simulate.table(json.loads(simulate.RESULT.read_text()))}) == text
