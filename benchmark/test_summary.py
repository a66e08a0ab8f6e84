"""README.md begins with what the results say, and texts find their place between markers."""

import pytest

import summary
from readme import with_sections


def test_the_summary_is_drawn_from_the_results() -> None:
    text = summary.README.read_text(encoding="utf-8")
    assert with_sections(text, {"summary": summary.table(summary.lines())}) == text, "run: python benchmark/summary.py"


def test_levels_that_were_not_measured_stay_empty() -> None:
    assert summary.table([summary.Line("step", "4 x 8", 2.4, None, 2.3)]).endswith("| step | 4 x 8 | 2.40 |  | 2.30 |")


def test_only_one_row_is_told() -> None:
    rows = [{"shape": "a", "batch": "b"}, {"shape": "a", "batch": "c"}]
    assert summary.only(rows, batch="c") is rows[1]
    with pytest.raises(ValueError, match="too many"):
        summary.only(rows, shape="a")


def test_sections_stand_between_their_markers() -> None:
    text = "before\n<!-- a:start -->\nold\n<!-- a:end -->\nbetween\n<!-- b:start -->\n<!-- b:end -->\nafter\n"
    made = with_sections(text, {"a": "new", "b": "newer"})
    assert made == text.replace("old", "new").replace("<!-- b:start -->", "<!-- b:start -->\nnewer")
    with pytest.raises(ValueError, match="unpack"):
        with_sections("no markers", {"a": "new"})
