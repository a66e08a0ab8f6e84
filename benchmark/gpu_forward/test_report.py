"""benchmark/README.md says of the GPU what the results say."""

import re
from typing import Any

from gpu_forward.report import SECTIONS, flips, forward, measured, same_bits, sections
from gpu_training.report import section
from readme import REPORT, with_sections

RUN = "run: python benchmark/gpu_forward/report.py --write"
TEXT = REPORT.read_text(encoding="utf-8")


def test_readme_is_drawn_from_the_results() -> None:
    assert with_sections(TEXT, sections()) == TEXT, RUN


def test_an_altered_readme_is_told() -> None:
    altered = re.sub(r"(\| rerank \| 10,523 .*?0\.)\d\d", r"\g<1>99", TEXT, count=1)
    assert altered != TEXT
    assert with_sections(altered, sections()) == TEXT


def test_results_say_what_the_targets_are() -> None:
    for name, result in measured().items():
        assert result["targets"] == SECTIONS[name][1](result["rows"]), RUN


def test_every_row_is_told() -> None:
    result = measured()["gpu_forward"]
    table = [line for line in forward(result).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(result["rows"])


def test_decisions_of_other_kernels_are_told_where_they_were_counted() -> None:
    ways = ("full", "padded", "query_folded")
    counted: dict[str, Any] = {"decisions": {"sampled": 200}}
    counted |= {f"{way} from float32": {"sampled": 6} for way in ("none", "full")}
    told = flips([{"flips": counted | {f"{way} from none": {"sampled": 1 + at} for at, way in enumerate(ways)}}])
    assert "`full` differs in 0.50 %, `full` with `query_folded` 1.50 %, the padded model 1.00 %" in told
    of_tree = {"tree full from tree none": 3, "one at a time from none": 0, "tree one at a time from tree none": 4}
    counted |= {name: {"sampled": count} for name, count in (of_tree | {"full from none": 1}).items()}
    assert "both sides the fold flips 1.50 %, another size up to 2.00 %." in flips([{"flips": counted}])
    ranks = {"decisions": {"sampled": 200, "pairs": 1000}, "full from none": {"sampled": 1, "pairs": 3}}
    ranks |= {f"{way} from float32": {"sampled": 6, "pairs": 20 + at} for at, way in enumerate(("none", "full"))}
    told = flips([{"flips": counted}, {"flips": counted | ranks}])
    assert (
        "Of 1,000 orders of two reranked texts `full` flips 0.30 %; from float32 `none` differs in 2.00 %, `full` in"
        in told
    )
    assert "last tokens" not in told
    counted = {name: count for name, count in counted.items() if "tree" not in name}
    assert "padded" not in flips([{"flips": counted | {"full from none": {"sampled": 1}}}])


def test_equal_bits_are_told_of_the_rows_that_have_them() -> None:
    def row(batch: str, **difference: float) -> dict[str, Any]:
        return {"shape": "qwen3-4b", "batch": batch, "difference": {"padded": 0.1, **difference}}

    rows = [row("a", mlp=0.0, full=0.0), row("b", mlp=0.0, full=0.1), row("c", mlp=0.1, full=0.0)]
    assert same_bits(rows).endswith("to the bit: 4B (a).")
    assert same_bits(rows[1:]) == ""
    assert (
        same_bits([row("a", mlp=0.0, full=0.0) | {"difference": {"mlp": 0.0, "full": 0.0, "full graphs": 0.1}}]) == ""
    )


def test_training() -> None:
    row: dict[str, Any] = {
        "shape": "qwen3-4b",
        "batch": "4 x 8",
        "loss": "all",
        "compression": 2.4,
        "flop_compression": 2.3,
        "wall_ms": {"none": 1.0, "full": 0.5},
        "speedup": {"none": 1.0, "full": 2.0},
        "peak_gib": {"none": 65.0, "full": 26.0},
        "loss_value": {},
        "seconds_of_shapes": {"first": 8.0, "median": 0.2, "slowest later": 0.4},
    }
    better = row | {"batch": "2 x 8", "speedup": {"none": 1.0, "full": 2.3}}
    text = section({"hardware": {"gpu": "a GPU"}, "rows": [row, better]})
    assert "| 4 x 8 | all | 4B | 2.40 | 2.30 | 2.00 | 65.0 → 26.0 |" in text
    assert "in shape, checkpointed: 4B 8.0 s for the first, which compiles the kernels, 0.20 s in the median" in text
    assert "Missed: qwen3-4b, loss on all: speed-up as a share of compression: 0.8333 where ≥ 0.95" in text
    assert "has of compression at least 0.833 with the loss on all, where 0.95 is asked (qwen3-4b, 4 x 8)." in text
