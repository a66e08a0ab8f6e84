"""What is compared for flips are the states of the same tokens."""

import random
from typing import Any

import torch

from gpu_forward.batches import SMOKE_VOCABULARY
from gpu_forward.flips import ONE_MORE, unfolded
from gpu_forward.models import random_model
from gpu_forward.targets import OTHER_SIZES


def test_each_size_has_the_states_of_the_same_tokens() -> None:
    """In float32, to its rounding: no size may lose a sequence, or be shifted by the one more."""
    draw = random.Random(0)
    batch = [draw.choices(range(SMOKE_VOCABULARY), k=length) for length in (50, 3, 41, 20, 9)]
    model: Any = random_model("tiny", torch.device("cpu"))
    made = unfolded(model.float(), batch, None)
    assert made.keys() == {"none", *OTHER_SIZES, ONE_MORE}
    for states in made.values():
        torch.testing.assert_close(states, made["none"], rtol=1e-4, atol=1e-5)
