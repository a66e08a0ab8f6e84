"""How targets are held against what was measured, and written into a result. What is no number is the worst."""

from collections.abc import Iterable
from math import isnan
from typing import Any

Row = dict[str, Any]


def at_least(target: str, limit: float, found: Iterable[tuple[float | None, str]]) -> list[Row]:
    """The check that no value is below `limit`: the smallest one and what it was measured on. Empty without values."""
    return _check(target, limit, min(_values(found), default=None, key=lambda one: (not isnan(one[0]), one)), "≥")


def at_most(target: str, limit: float, found: Iterable[tuple[float | None, str]]) -> list[Row]:
    """The check that no value is above `limit`: the largest one and what it was measured on. Empty without values."""
    return _check(target, limit, max(_values(found), default=None, key=lambda one: (isnan(one[0]), one)), "≤")


def with_flops(name: str, row: Row) -> str:
    """The name of a row, and by what share of N/N' its flops fall: long suffixes and prefixes of each other attend."""
    return f"{name}; flops {row['flop_compression'] / row['compression']:.4g}"


def _values(found: Iterable[tuple[float | None, str]]) -> list[tuple[float, str]]:
    return [(value, name) for value, name in found if value is not None]


def _check(target: str, limit: float, worst: tuple[float, str] | None, sign: str) -> list[Row]:
    if worst is None:
        return []
    value, name = worst
    met = value >= limit if sign == "≥" else value <= limit
    shown, bound = _round(value, 4), _round(limit, 4)
    if not met and shown == bound:
        # What is missed by little is not told as the limit.
        shown = _round(value, 6)
    return [{"target": target, "limit": f"{sign} {bound}", "value": shown, "worst": name, "met": met}]


def _round(value: float, digits: int) -> float:
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def sentence(check: Row) -> str:
    return f"{check['target']}: {check['value']} where {check['limit']} is the target ({check['worst']})"


def announce(checks: list[Row]) -> None:
    for check in checks:
        print(f"{'met   ' if check['met'] else 'MISSED'} {sentence(check)}")


def missed(checks: list[Row]) -> str:
    """How many targets were met, and those that were not, a sentence each in Markdown."""
    below = [f"- Missed: {sentence(check)}." for check in checks if not check["met"]]
    if not below:
        return f"Targets met: all {len(checks)}."
    return "\n".join([f"Targets met: {len(checks) - len(below)} of {len(checks)}.", "", *below])
