"""TRL's trainer learns the same from a folded model."""

from typing import Any

import pytest

pytest.importorskip("trl")

import grpo

pytestmark = [
    # What TRL and the libraries under it use of each other.
    pytest.mark.filterwarnings("ignore"),
]

GROUPS: list[grpo.Group] = [
    {
        "prompt": f"What is {number} plus {number}? Think step by step.",
        "completions": [f"{number} and {number} make {number * 2 + turn % 2}, so {turn}." for turn in range(8)],
        "correct": [turn % 2 == 0 for turn in range(8)],
    }
    for number in (3, 12)
]


@pytest.mark.parametrize("real", [False, True])
def test_folded_and_unfolded_steps_have_the_same_losses(real: bool) -> None:
    if real and not grpo.DATA.is_dir():
        pytest.skip(f"no recorded completions at {grpo.DATA}")
    result = grpo.compare(grpo.recorded_groups() if real else GROUPS, steps=4)
    assert result["largest_difference"] < grpo.TOLERANCE
    unfolded, folded = result["unfolded"], result["folded"]
    # Of the second step on a batch: before it, ratios are one, and advantages add up to nothing.
    assert max(map(abs, unfolded["loss"])) > 1e-4
    assert unfolded["computed"] >= unfolded["tokens"] == folded["tokens"]
    assert folded["computed"] < unfolded["tokens"] / 1.5


def test_another_model_has_other_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a fold that changes what the model computes."""

    def wrong(model: Any) -> Any:
        model.model.norm.weight.data += 0.2
        return model

    monkeypatch.setattr(grpo, "fold", wrong)
    assert grpo.compare(GROUPS, steps=4)["largest_difference"] > grpo.TOLERANCE
