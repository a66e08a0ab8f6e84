"""Layers under torch.compile against the same layers as they are."""

# isort: off
import interpreted  # noqa: F401
# isort: on

import copy
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from radix_torch_varlen import Batch, Level, Qwen3
from tries import CONFIG, Sequences

# Largest difference over the largest magnitude: sums in another order, and in bf16 other roundings between operations.
TOLERANCES = {torch.float64: 1e-13, torch.bfloat16: 0.1}

BATCHES: tuple[Sequences, ...] = (
    [[1, 2, 3, 4, 5], [1, 2, 3, 6], [1, 2, 7, 8, 9, 10]],
    [[3, 4, 5], [3, 4], [3, 4, 5, 6, 7, 8, 9], [11, 12]],
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def loss_and_gradients(model: Qwen3, sequences: Sequences, level: Level) -> list[Tensor]:
    model.zero_grad()
    loss = model.loss(Batch.from_sequences(sequences, level))
    loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# Dynamo looks for the gradient of what a layer gets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# And makes one of each operation that has its own gradient.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("level", "dtype"), [*((level, torch.float64) for level in get_args(Level)), ("full", torch.bfloat16)]
)
def test_one_graph_serves_all_layers_and_batches(level: Level, dtype: torch.dtype) -> None:
    """But at level "mlp", where attention of every copy parts it in two: each more would be the host's time."""
    torch.manual_seed(0)
    own = Qwen3(CONFIG).to(dtype)
    compiled = copy.deepcopy(own)
    for layer in compiled.layers:
        layer.compile(dynamic=True, backend="aot_eager")
    for sequences in BATCHES:
        expected, found = (loss_and_gradients(model, sequences, level) for model in (own, compiled))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= TOLERANCES[dtype] * other.abs().max()
        assert counters["stats"]["unique_graphs"] == (2 if level == "mlp" else 1)
