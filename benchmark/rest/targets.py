"""What the measured speed-ups are held to."""

from collections.abc import Callable
from typing import Any

Speedup = Callable[[dict[str, Any], dict[str, Any]], float]

# Parts of the fold ratio that the scheduler reached, and of the unfolded server.
SHARE, NOTHING = 0.9, 0.98
# Cases in which texts share what chance lets them share.
CONTROLS = ("nothing", "strangers")


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with its value, for what folds all of a batch: `full` always, `auto` where that gains.

    Passages are held to the mean latency. The sharing sweep is held to the requests that are answered in a second: in a
    closed loop the two say the same once it runs, but its few requests are mostly the first, which wait for all others.
    """
    runs = result["passages"]
    found = [check("passages", runs, name, mean_latency) for name in runs if folds(name)]
    for case, runs in result["sharing"].items():
        found += [check(case, runs, name, throughput) for name in runs if folds(name)]
    return found


def folds(name: str) -> bool:
    return name.split(", ")[0] in ("full", "auto")


def mean_latency(run: dict[str, Any], unfolded: dict[str, Any]) -> float:
    return float(unfolded["mean"] / run["mean"])


def throughput(run: dict[str, Any], unfolded: dict[str, Any]) -> float:
    return float(run["requests_per_second"] / unfolded["requests_per_second"])


def check(case: str, runs: dict[str, Any], name: str, speedup: Speedup) -> dict[str, Any]:
    value, limit, text = speedup(runs[name], runs[name.replace(name.split(", ")[0], "none")]), NOTHING, "speed-up"
    if case not in CONTROLS:
        value, limit, text = value / runs[name]["fold_ratio"], SHARE, "speed-up over N/N'"
    return {"target": f"{case}: {name}: {text} ≥ {limit}", "value": round(value, 3), "met": value >= limit}
