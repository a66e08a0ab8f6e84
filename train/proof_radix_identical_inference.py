"""Folded inference gives what unfolded inference gives, over families of tries.

As a script it prints a table and exits with 1 where it does not: python train/proof_radix_identical_inference.py
"""

import sys

import pytest
import torch
from torch import Tensor, nn

from radix_torch_varlen import Batch, Level
from tries import Sequences, families, merged, model

# Largest difference of a state over the largest state. Rows are the same sums in another order or grouping: a few units
# in the last place (1.1e-16 and 6e-8) for each of some dozen sums in three layers.
BOUNDS = {torch.float64: 1e-13, torch.float32: 5e-6}
LEVELS: tuple[Level, ...] = ("mlp", "full")
# Where each sequence brings rows of its own, attention is called with the same queries and keys at every level.
BRANCHING = ["one prompt, completions", "two prompts, completions", "three levels", "nothing shared"]


@torch.no_grad()
def states(sequences: Sequences, level: Level, dtype: torch.dtype, batch: Batch | None = None) -> Tensor:
    """Of all N tokens, [N, hidden]."""
    batch = Batch.from_sequences(sequences, level) if batch is None else batch
    return batch.unfold(model(dtype)(batch))


def difference(sequences: Sequences, level: Level, dtype: torch.dtype, batch: Batch | None = None) -> float:
    """Of the folded states from those of a model that computes every token."""
    expected = states(sequences, "none", dtype)
    found = states(sequences, level, dtype, batch)
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", families())
def test_folded_states_are_the_unfolded_ones(family: str, level: Level, dtype: torch.dtype) -> None:
    assert difference(families()[family], level, dtype) < BOUNDS[dtype]


def row_invariant(rows: int, fewer: int, dtype: torch.dtype) -> bool:
    """Whether this machine's matrix products give a row the same bits among `rows` as among `fewer`."""
    torch.manual_seed(1)
    linears = [module for module in model(dtype).modules() if isinstance(module, nn.Linear)]
    inputs = [torch.randn(rows, linear.in_features).to(dtype) for linear in linears]
    pairs = zip(linears, inputs, strict=True)
    return all(torch.equal(linear(x)[:fewer], linear(x[:fewer])) for linear, x in pairs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", BRANCHING)
def test_equal_bits_where_kernels_are_row_invariant(family: str, level: Level, dtype: torch.dtype) -> None:
    sequences = families()[family]
    batch = Batch.from_sequences(sequences, level)
    if not row_invariant(batch.fold.num_tokens, batch.fold.num_nodes, dtype):
        pytest.skip(f"{dtype} matrix products of this machine depend on the number of rows")
    assert torch.equal(states(sequences, level, dtype), states(sequences, "none", dtype))


@pytest.mark.parametrize("family", families())
def test_only_different_prefixes_are_computed(family: str) -> None:
    sequences = families()[family]
    prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    tokens = sum(map(len, sequences))
    rows: dict[Level, int] = {"none": tokens, "mlp": len(prefixes), "full": len(prefixes)}
    for level, expected in rows.items():
        batch = Batch.from_sequences(sequences, level)
        assert len(model(torch.float32)(batch)) == expected


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_wrong_fold_is_seen(level: Level, dtype: torch.dtype) -> None:
    for family, sequences in families().items():
        try:
            wrong = Batch.from_sequences(merged(sequences), level)
        except ValueError:
            assert family == "prefixes of each other"
            continue
        # One token of another word moves a state by far more than rounding does.
        assert difference(sequences, level, dtype, wrong) > 1e3 * BOUNDS[dtype], family


def main() -> None:
    print(
        f"{'largest difference from level none':36} "
        + "  ".join(f"{level}, f{8 * d.itemsize}" for d in BOUNDS for level in LEVELS)
    )
    broken = False
    for family, sequences in families().items():
        found = {(level, dtype): difference(sequences, level, dtype) for dtype in BOUNDS for level in LEVELS}
        broken |= any(not value < BOUNDS[dtype] for (_, dtype), value in found.items())
        print(f"{family:36} " + "   ".join(f"{value:.1e}" for value in found.values()))
    print("bounds: " + ", ".join(f"f{8 * dtype.itemsize} {bound:.0e}" for dtype, bound in BOUNDS.items()))
    sys.exit(broken)


if __name__ == "__main__":
    main()
