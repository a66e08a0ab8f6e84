"""What the measured speed-ups are held to."""

from typing import Any

# Parts of the fold ratio that the scheduler reached, and of the unfolded server's mean latency.
SHARE, NOTHING = 0.9, 0.98
# Cases in which texts share what chance lets them share.
CONTROLS = ("nothing", "strangers")


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with its value, for what folds all of a batch: `full` always, `auto` where that gains."""
    cases = {"passages": result["passages"], **result["sharing"]}
    return [check(case, runs, name) for case, runs in cases.items() for name in runs if folds(name)]


def folds(name: str) -> bool:
    return name.split(", ")[0] in ("full", "auto")


def check(case: str, runs: dict[str, Any], name: str) -> dict[str, Any]:
    """Mean latency is what binds. "by_rate", the same of the requests answered in a second, is told beside it: where a
    closed loop has few requests, most of them wait for all that came with them."""
    run, unfolded = runs[name], runs[name.replace(name.split(", ")[0], "none")]
    value, by_rate = unfolded["mean"] / run["mean"], run["requests_per_second"] / unfolded["requests_per_second"]
    limit, text = NOTHING, "speed-up"
    if case not in CONTROLS:
        value, by_rate = value / run["fold_ratio"], by_rate / run["fold_ratio"]
        limit, text = SHARE, "speed-up over N/N'"
    told = f"{case}: {name}: {text} ≥ {limit}"
    return {"target": told, "value": round(value, 3), "by_rate": round(by_rate, 3), "met": value >= limit}
