"""Times in steady state, of steps whose duration is known."""

import time

import torch

from steady import clock_rates, method, settled


def test_a_step_is_timed_after_its_own_warmth() -> None:
    """A step that comes to its pace after a while: only what it does then is told."""
    began = time.perf_counter()

    def step() -> float:
        time.sleep(0.001)
        return time.perf_counter() - began

    found = settled(step, 0.05)
    assert found[0] > 0.05
    assert found[-1] - found[0] > 0.04


def test_a_long_step_is_done_twice() -> None:
    calls = iter(range(2))
    assert settled(lambda: next(calls), 0) == [1]


def test_clock_rates_end_with_their_block() -> None:
    with clock_rates() as rates:
        time.sleep(0.1)
    seen = len(rates)
    assert (seen > 0) == torch.cuda.is_available()
    time.sleep(0.05)
    assert len(rates) == seen


def test_older_rows_are_named() -> None:
    old, new = {"shape": "qwen3-4b", "batch": "rerank"}, {"shape": "qwen3-4b", "batch": "BBH", "settling_seconds": 0.4}
    assert method([new]) == "Each way is timed after 0.4 s of itself, so that it meets its own clocks."
    older = "Still timed right after another way, whose clocks they met: 4B"
    assert method([old]) == f"{older}."
    assert method([old, new]).endswith(f" {older} (rerank).")
    assert method([]) == ""
