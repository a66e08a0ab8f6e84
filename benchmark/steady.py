"""Times of work in its own steady state, by which all benchmarks of whole steps on a GPU measure.

A GPU at its power limit lowers its clocks, and raises them again some tenths of a second after work got lighter: a step
that is timed right after another way's tells of that one's power. So each way is repeated until two spans of time in a
row agree, and the later one counts; where single steps matter too, each is timed on a GPU that has rested.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

# A span, how close the medians of two have to be, and after how long the last one counts all the same.
SPAN_SECONDS = 0.5
AGREEMENT = 0.01
MOST_SECONDS = 4
MIN_ROUNDS = 2
# Long enough for the clocks to rise, and too short for those of an idle GPU.
REST_SECONDS = 0.3
RESTED_STEPS = 5
BETWEEN_SAMPLES = 0.01


def turns(most: int, seconds: float) -> Iterator[int]:
    """Rounds in which ways take turns, at most so many: after `seconds` none begins but for the first MIN_ROUNDS."""
    began = time.perf_counter()
    for done in range(most):
        if done >= MIN_ROUNDS and time.perf_counter() - began > seconds:
            return
        yield done


Durations = tuple[float, ...]


def settled(step: Callable[[], Durations], seconds: float = SPAN_SECONDS) -> Durations:
    """Medians of what `step` says that it took, by one clock or several, over a span that agrees with the one before.

    Spans take `seconds`, or one step; they agree by the last clock.
    """
    began = time.perf_counter()
    before, now = span(step, seconds), span(step, seconds)
    while abs(now[-1] - before[-1]) > AGREEMENT * now[-1] and time.perf_counter() - began < MOST_SECONDS:
        before, now = now, span(step, seconds)
    return now


def span(step: Callable[[], Durations], seconds: float) -> Durations:
    start = time.perf_counter()
    durations = [step()]
    while time.perf_counter() - start < seconds:
        durations.append(step())
    return tuple(map(statistics.median, zip(*durations, strict=True)))


def rested(step: Callable[[], float], seconds: float = REST_SECONDS) -> float:
    """The median duration of single steps, each after so many `seconds` in which the GPU has nothing to do."""
    durations = []
    for _ in range(RESTED_STEPS):
        time.sleep(seconds)
        durations.append(step())
    return statistics.median(durations)


@contextmanager
def clock_rates() -> Iterator[list[int]]:
    """The GPU's clock in MHz while the block runs, every hundredth of a second; empty where none can be asked."""
    rates: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(BETWEEN_SAMPLES):
            rates.append(torch.cuda.clock_rate())

    thread = threading.Thread(target=sample)
    # What torch asks NVML by.
    if torch.cuda.is_available() and find_spec("pynvml"):
        thread.start()
    try:
        yield rates
    finally:
        done.set()
        if thread.ident:
            thread.join()


def method(rows: list[dict[str, Any]]) -> str:
    """A report's sentence on how its rows were timed; where that differs it names them."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        ways.setdefault(how(row), []).append(row)
    if len(ways) < 2:
        return "".join(f"Each way is timed {way}." for way in ways)
    return f"Timed {'; '.join(f'{way}: {names(own, rows)}' for way, own in ways.items())}."


def how(row: dict[str, Any]) -> str:
    if "span_seconds" in row:
        spans = f"two spans of {row['span_seconds']:g} s in a row"
        return f"when the medians of {spans} agree within {100 * AGREEMENT:g} %, or after {MOST_SECONDS} s"
    if "settling_seconds" in row:
        return f"after {row['settling_seconds']:g} s of itself"
    return "right after another way, whose clocks it met"


def names(some: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """A shape's rows by its name where `some` has all of `rows`, else with their batches."""
    told = []
    for shape in sorted({row["shape"] for row in some}):
        own = [str(row.get("batch", row.get("name"))) for row in some if row["shape"] == shape]
        whole = len(own) == sum(row["shape"] == shape for row in rows)
        batches = ", ".join(dict.fromkeys(own))
        told.append(shape.removeprefix("qwen3-").upper() + ("" if whole else f" ({batches})"))
    return ", ".join(told)
