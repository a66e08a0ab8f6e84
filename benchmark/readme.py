"""The texts of README files that are drawn from results: each stands between two markers with its name."""

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmark" / "results"
# Where the results are told.
REPORT = ROOT / "benchmark" / "README.md"


def with_sections(text: str, sections: Mapping[str, str]) -> str:
    """`text` with each section between its markers. Raises ValueError where these are not there once."""
    for name, section in sections.items():
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = f"{before}{start}\n{section}\n{end}{after}"
    return text


def write_sections(path: Path, sections: Mapping[str, str]) -> None:
    path.write_text(with_sections(path.read_text(encoding="utf-8"), sections), encoding="utf-8")
