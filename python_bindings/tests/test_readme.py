"""README.md's Python examples run."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str) -> None:
    exec(code, {})


def test_there_are_examples() -> None:
    assert EXAMPLES
