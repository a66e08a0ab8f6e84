"""Times in steady state, of steps whose duration is known."""

import time
from collections.abc import Callable

import pytest
import torch

from steady import RESTED_STEPS, clock_rates, method, rested, settled, span, turns


def test_late_rounds_do_not_begin() -> None:
    assert list(turns(5, 60)) == [0, 1, 2, 3, 4]
    assert list(turns(5, 0)) == [0, 1]
    assert list(turns(1, 0)) == [0]


def of(*durations: float) -> Callable[[], tuple[float, float]]:
    """A step by two clocks, the second of which says these one after the other."""
    told = iter(durations)
    return lambda: (0.0, next(told))


def test_spans_are_repeated_until_two_agree() -> None:
    assert settled(of(9, 5, 4, 3.99, 1), 0) == (0, 3.99)
    assert settled(of(4, 4, 1), 0) == (0, 4)


def test_what_comes_to_no_rest_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steady.MOST_SECONDS", 0)
    assert settled(of(9, 5, 4), 0) == (0, 5)


def test_a_span_has_the_median_of_its_steps() -> None:
    def step() -> tuple[float]:
        time.sleep(0.004)
        return (next(durations),)

    durations = iter([1.0, 2.0, 9.0] + [2.0] * 100)
    assert span(step, 0.05) == (2.0,)
    assert next(durations) == 2.0


def test_each_step_is_rested_before() -> None:
    ended = [time.perf_counter()]
    pauses = []

    def step() -> float:
        pauses.append(time.perf_counter() - ended[-1])
        ended.append(time.perf_counter())
        return float(len(ended))

    assert rested(step, 0.02) == 4
    assert len(pauses) == RESTED_STEPS
    assert min(pauses) >= 0.02


def test_clock_rates_end_with_their_block() -> None:
    with clock_rates() as rates:
        time.sleep(0.1)
    seen = len(rates)
    assert (seen > 0) == torch.cuda.is_available()
    time.sleep(0.05)
    assert len(rates) == seen


def test_how_rows_were_timed_is_told() -> None:
    old, new = {"shape": "qwen3-4b", "batch": "rerank"}, {"shape": "qwen3-4b", "batch": "BBH", "span_seconds": 0.5}
    agree = "when the medians of two spans of 0.5 s in a row agree within 1 %, or after 4 s"
    assert method([new, new]) == f"Each way is timed {agree}."
    assert method([old]) == "Each way is timed right after another way, whose clocks it met."
    # A batch that was measured with two losses is named once.
    both = method([old, new, old, old | {"shape": "qwen3-8b"}])
    assert both == f"Timed right after another way, whose clocks it met: 4B (rerank), 8B; {agree}: 4B (BBH)."
    assert method([]) == ""
