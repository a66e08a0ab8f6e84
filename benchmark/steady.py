"""Times of work in its own steady state, by which all benchmarks of whole steps on a GPU measure.

A GPU at its power limit lowers its clocks, and raises them again some tenths of a second after work got lighter: a step
that is timed right after another way's tells of that one's power. So each way is repeated until it meets its own clocks
alone, and timed from then on.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

# A way is repeated for so long before it is timed, and while it is.
SECONDS = 0.4
BETWEEN_SAMPLES = 0.01

Result = TypeVar("Result")


def settled(step: Callable[[], Result], seconds: float = SECONDS) -> list[Result]:
    """What `step` returns each time for so many seconds, after as many of its own; at least one, after at least one."""
    repeated(step, seconds)
    return repeated(step, seconds)


def repeated(step: Callable[[], Result], seconds: float) -> list[Result]:
    start = time.perf_counter()
    results = [step()]
    while time.perf_counter() - start < seconds:
        results.append(step())
    return results


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
    """A report's sentences on how its rows were timed; those from before steady states are named."""
    settling = {row["settling_seconds"] for row in rows if "settling_seconds" in row}
    told = [f"Each way is timed after {time:g} s of itself, so that it meets its own clocks." for time in settling]
    older = []
    for shape in sorted({row["shape"] for row in rows}):
        own = [row for row in rows if row["shape"] == shape]
        names = [str(row.get("batch", row.get("name"))) for row in own if "settling_seconds" not in row]
        some = f" ({', '.join(names)})" if len(names) < len(own) else ""
        if names:
            older.append(shape.removeprefix("qwen3-").upper() + some)
    if older:
        told.append(f"Still timed right after another way, whose clocks they met: {', '.join(older)}.")
    return " ".join(told)
