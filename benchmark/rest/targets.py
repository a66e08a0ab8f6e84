"""What the measured speed-ups are held to."""

from typing import Any

# Parts of the fold ratio that the scheduler reached, and of the unfolded server's mean latency.
SHARE, NOTHING = 0.9, 0.98
# Cases in which texts share what chance lets them share.
CONTROLS = ("nothing", "strangers")


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with its value, for what folds all of a batch: `full` always, `auto` where that gains."""
    found = [check("passages", result["passages"], name) for name in result["passages"] if folds(name)]
    for case, runs in result["sharing"].items():
        found += [check(case, runs, name) for name in runs if folds(name)]
    return found


def folds(name: str) -> bool:
    return name.split(", ")[0] in ("full", "auto")


def check(case: str, runs: dict[str, Any], name: str) -> dict[str, Any]:
    unfolded = runs[name.replace(name.split(", ")[0], "none")]
    speedup = unfolded["mean"] / runs[name]["mean"]
    if case in CONTROLS:
        value, limit, text = speedup, NOTHING, "speed-up"
    else:
        value, limit, text = speedup / runs[name]["fold_ratio"], SHARE, "speed-up over N/N'"
    return {"target": f"{case}: {name}: {text} ≥ {limit}", "value": round(value, 3), "met": value >= limit}
