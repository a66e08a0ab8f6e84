"""The targets of attention, on rows made by hand."""

from typing import Any

import pytest

from gpu_attention.report import section
from gpu_attention.targets import targets

Row = dict[str, Any]

IDLE = {"flops": 0, "tiles": 0, "bytes": 0, "gathers": 0}
BUSY = IDLE | {"flops": 1e15}


def row(tree: float = 1.0, query_folded: float = 2.0, *, new_shape: float = 1.0, first: float = 100.0) -> Row:
    """Of a batch of which the cost model picks tree attention."""

    def times(ms: float) -> dict[str, float]:
        calls = {f"{kind}_ms": ms for kind in ("forward", "training", "first_training")}
        return calls | {"first_forward_ms": first, "new_shape_ms": new_shape}

    ways = {"none": 4.0, "tree": tree, "query_folded": query_folded}
    return {
        "batch": "rerank",
        "heads": "16/8",
        "compression": 4.0,
        "work": {"none": BUSY, "query_folded": BUSY, "tree": IDLE},
        "measured": {way: times(ms) for way, ms in ways.items()},
    }


def unmet(*rows: Row) -> list[str]:
    return [check["target"] for check in targets(list(rows)) if not check["met"]]


def test_met() -> None:
    assert len(targets([row()])) == 6
    assert unmet(row()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"new_shape": 2.1}, ["new shape"]),
        ({"first": 20_001.0}, ["first call"]),
        ({"tree": 2.1}, ["rerank, forward", "rerank, training"]),
        # Slower than 1.1 times the other.
        (
            {"tree": 2.3},
            ["rerank, forward", "rerank, training", "forward: time of the picked", "training: time of the picked"],
        ),
    ],
)
def test_missed(options: Row, words: list[str]) -> None:
    found = unmet(row(), row(**options))
    assert len(found) == len(words)
    assert all(word in target for word, target in zip(words, found, strict=True))


def test_report_says_where_the_tree_kernel_is_slower() -> None:
    assert "FlashAttention on no batch." in section({"rows": [row()]})
    text = section({"rows": [row(tree=2.5)]})
    assert "FlashAttention on rerank, 16/8 heads, forward (1.25×)" in text
    assert "| rerank | 16/8 | 4.00 | 2.00 | 1.60 |  | 2.00 | 1.60 |  |" in text
