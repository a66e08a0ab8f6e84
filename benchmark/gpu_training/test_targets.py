"""The targets of training steps, on rows made by hand."""

from math import isnan, nan
from typing import Any

import pytest

from gpu_training.targets import spread, targets

Row = dict[str, Any]


def row(full: float = 2.3, peak: float = 30.0, slowest: float = 0.9, loss: float = 11.9, on: str = "all") -> Row:
    """`full` is the speed-up, `peak` the memory, where `none` takes 60 GiB; `slowest` in seconds."""
    return {
        "shape": "qwen3-4b",
        "batch": "4 x 8",
        "loss": on,
        "compression": 2.4,
        "flop_compression": 2.4,
        "wall_ms": {"none": 2.3, "full": 2.3 / full},
        "speedup": {"none": 1.0, "full": full},
        "peak_gib": {"none": 60.0, "full": peak},
        "loss_value": {"full": loss, "none": 11.9},
        "seconds_of_shapes": {"first": 8.0, "median": 0.2, "slowest later": slowest},
    }


def unmet(*rows: Row) -> list[str]:
    return [check["target"] for check in targets(list(rows)) if not check["met"]]


def test_met() -> None:
    good = row(peak=26.0)
    assert len(targets([good])) == 4
    assert unmet(good, row(2.2, 26.0, on="completions")) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(2.2, 26.0), "loss on all: speed-up"),
        (row(2.1, 26.0, on="completions"), "loss on completions: speed-up"),
        (row(peak=28.0), "memory"),
        (row(peak=26.0, slowest=1.1), "slowest later step"),
        (row(peak=26.0, loss=12.0), "difference of a loss"),
    ],
)
def test_missed(bad: Row, words: str) -> None:
    (target,) = unmet(row(peak=26.0), bad)
    assert words in target


def test_compiled_ways_are_held_against_each_other() -> None:
    good = row(peak=26.0)
    compiled = good | {"speedup": {"none": 1.0, "full": 2.0, "none compiled": 1.25, "full compiled": 2.9}}
    assert unmet(compiled) == []
    compiled["speedup"]["none compiled"] = 1.5
    (target,) = unmet(compiled)
    assert "speed-up" in target


def test_rows_of_chosen_ways() -> None:
    """A run may measure a part of the columns, and none may fit."""
    partial = row() | {"wall_ms": {}, "speedup": {}, "peak_gib": {}, "loss_value": {}}
    assert [check["met"] for check in targets([partial])] == [True]


def test_losses_are_compared_with_that_of_none() -> None:
    assert spread({"full": 10.1, "none": 10.0, "mlp": 9.8}) == pytest.approx(0.02)
    assert isnan(spread({"full": 10.1, "none": 10.0, "mlp": nan}) or 0)
    assert [spread(losses) for losses in ({}, {"none": 10.0}, {"full": 10.0})] == [None] * 3
