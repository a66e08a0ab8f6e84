"""The targets of the forward pass, on rows made by hand."""

from math import nan
from typing import Any

import pytest

from gpu_forward.checks import at_least, at_most, missed
from gpu_forward.targets import flip_targets, targets

Row = dict[str, Any]


def row(
    batch: str = "tree", shape: str = "qwen3-0.6b", nodes: int = 10_000, compression: float = 4.0, **ms: float
) -> Row:
    wall = {name.replace("_", " "): time for name, time in ms.items()}
    sizes = {"nodes": nodes, "compression": compression, "flop_compression": compression}
    return {"shape": shape, "batch": batch, "wall_ms": wall} | sizes


def both(*rows: Row) -> tuple[Row, Row]:
    """The checks of the milder and of the harder comparison."""
    mild, hard = targets(list(rows))
    return mild, hard


def met(*rows: Row) -> list[bool]:
    return [check["met"] for check in both(*rows)]


@pytest.mark.parametrize(("full", "right"), [(26.0, True), (28.0, False)])
def test_share_of_compression(full: float, right: bool) -> None:
    for check in both(row(none=100.0, full=full)):
        assert check["met"] is right
        assert check["value"] == pytest.approx(100 / full / 4, rel=1e-3)


def test_fastest_unfolded_way_is_held_against() -> None:
    over_none, over_all = both(row(none=100.0, padded=90.0, full=26.0))
    assert (over_none["met"], over_none["value"]) == (True, 0.9615)
    assert (over_all["met"], over_all["value"]) == (False, 0.8654)
    assert "over `none`" in over_none["target"]
    assert "over the fastest unfolded way" in over_all["target"]


def test_fastest_folded_way_counts() -> None:
    assert met(row(none=100.0, full=50.0, full_graphs=26.0)) == [True, True]


def test_compiled_ways_are_held_against_each_other() -> None:
    ms: dict[str, Any] = {"none": 100.0, "padded": 90.0, "full": 26.0, "full_compiled": 20.0}
    assert met(row(**ms)) == [True, True]
    over_none, over_all = both(row(**ms, padded_compiled=70.0, none_compiled=75.0))
    assert (over_none["met"], over_none["value"]) == (True, 0.9375)
    assert (over_all["met"], over_all["value"]) == (False, 0.875)


def test_worst_row_counts() -> None:
    rows = row(none=100.0, full=26.0), row("bad", none=100.0, full=30.0), row(none=100.0, full=25.0)
    for check in both(*rows):
        assert (check["met"], check["worst"]) == (False, "qwen3-0.6b, bad; flops 1")


@pytest.mark.parametrize(("graphs", "right"), [(25.0, True), (22.0, False)])
def test_unshared_batch_of_as_many_tokens(graphs: float, right: bool) -> None:
    measured = row(nodes=2000, none=100.0, full=26.0, unshared=25.0, unshared_graphs=graphs)
    assert met(measured) == [right, right]


@pytest.mark.parametrize(("compiled", "right"), [(18.0, True), (17.0, False)])
def test_compiled_layers_are_held_to_an_unshared_batch_as_well(compiled: float, right: bool) -> None:
    ways: dict[str, Any] = {"full": 26.0, "full_compiled": 19.0, "unshared": 25.0, "unshared_compiled": compiled}
    assert met(row(nodes=2000, none=100.0, **ways)) == [True, right]
    assert met(row(nodes=2000, none=100.0, **ways | {"full": 28.0})) == [False, right]


def test_small_batches_that_share_little_are_held_to_an_unshared_one() -> None:
    rerank = row("rerank", nodes=5000, compression=1.9, none=100.0, full=60.0)
    assert targets([rerank]) == []
    assert met(rerank | {"wall_ms": {"full": 60.0, "unshared": 50.0}}) == [False, False]


def test_flops_of_the_unshared_batch_are_told() -> None:
    measured = row(nodes=2000, none=100.0, full=26.0, unshared=25.0) | {"unshared_flops": 0.87654}
    assert [check["worst"] for check in both(measured)] == ["tree; flops 0.8765"] * 2


def test_rounds_beside_the_unshared_batch_count() -> None:
    measured = row(nodes=2000, none=100.0, full=30.0, unshared=25.0)
    assert met(measured) == [False, False]
    assert met(measured | {"beside_unshared": {"wall_ms": {"full": 26.0, "unshared": 25.0}}}) == [True, True]


@pytest.mark.parametrize(("full", "right"), [(101.0, True), (103.0, False)])
def test_controls(full: float, right: bool) -> None:
    assert met(row("nothing shared", compression=1.0, none=100.0, full=full)) == [right, right]


def test_nothing_measured() -> None:
    assert targets([]) == []
    assert targets([row(none=100.0)]) == []


def flips(decided: int, full: int, half: int, one: int) -> Row:
    counts = {"decisions": decided, "full from none": full, "half a batch from none": half}
    return {name: {"last": count} for name, count in (counts | {"one at a time from none": one}).items()}


@pytest.mark.parametrize(("full", "met"), [(4, True), (5, False)])
def test_flips_are_pooled_over_batches(full: int, met: bool) -> None:
    """By counts: the shares of the small batch weigh no more than its decisions do."""
    (check,) = flip_targets([flips(7, 1, 0, 1), flips(1000, full, 1, 4)])
    assert (check["value"], check["limit"], check["met"]) == (full + 1, "≤ 5", met)
    assert "1,007" in check["target"]
    assert "one at a time" in check["target"]


def test_flips_with_one_kernel_are_held_to_that_kernels_sizes() -> None:
    counts = {"tree full from tree none": 3, "tree half a batch from tree none": 2}
    both, by_tree = flip_targets([flips(10, 1, 0, 1) | {name: {"last": count} for name, count in counts.items()}])
    assert (both["met"], both["limit"]) == (True, "≤ 1")
    assert (by_tree["met"], by_tree["limit"], by_tree["value"]) == (False, "≤ 2", 3)
    assert "tree kernel" in by_tree["target"]


def test_sizes_that_a_batch_lacks_are_left_out() -> None:
    more = flips(10, 1, 0, 1) | {"a quarter from none": {"last": 9}}
    (check,) = flip_targets([more, flips(10, 1, 0, 1)])
    assert check["limit"] == "≤ 2"


def test_checks() -> None:
    assert at_least("speed", 2, []) == at_most("time", 2, [(None, "a")]) == []
    (slow,) = at_least("speed", 2, [(3.0, "a"), (1.23456, "b"), (None, "c")])
    (fast,) = at_most("time", 2, [(1.0, "a"), (2.0, "b")])
    (near,) = at_most("time", 1.0, [(1.00049, "a")])
    assert (near["value"], near["met"]) == (1.00049, False)
    assert (slow["met"], slow["value"], slow["worst"]) == (False, 1.235, "b")
    assert (fast["met"], fast["worst"]) == (True, "b")
    for values in ([nan, 5.0], [5.0, nan]):
        (low,) = at_least("speed", 2, [(value, "a") for value in values])
        (high,) = at_most("time", 9, [(value, "a") for value in values])
        assert not low["met"]
        assert not high["met"]
    assert missed([slow, fast]) == "Targets met: 1 of 2.\n\n- Missed: speed: 1.235 where ≥ 2 is the target (b)."
    assert missed([fast, fast]) == "Targets met: all 2."
