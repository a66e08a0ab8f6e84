"""Folded inference gives what unfolded inference gives, over families of tries.

As a script it prints a table and exits with 1 where it does not: python train/proof_radix_identical_inference.py
"""

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from radix_mlp.torch import attention
from radix_torch_varlen import Batch, Level
from tries import CONFIG, MERGEABLE, Sequences, families, model, wrongly_folded

# Largest difference of a state over the largest state. Rows are the same sums in another order or grouping: a few units
# in the last place (1.1e-16 and 6e-8) for each of some dozen sums in three layers.
BOUNDS = {torch.float64: 1e-13, torch.float32: 5e-6}
# One token in the place of another moves a state by far more than rounding does, in either dtype.
SEEN = 1e-2
LEVELS: tuple[Level, ...] = ("mlp", "full")
# Sequences of equal lengths: among more keys a kernel groups the sums over a row of scores in another way.
EQUALLY_LONG = ["one prompt, completions", "two prompts, completions", "three levels", "nothing shared"]


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


def row_invariant(batch: Batch, dtype: torch.dtype) -> bool:
    """Whether this machine's kernels give a row of `batch` the same bits as each of its copies."""
    torch.manual_seed(1)

    def drawn(*width: int) -> Tensor:
        return torch.randn(batch.fold.num_rows, *width).to(dtype)

    linears = [module for module in model(dtype).modules() if isinstance(module, nn.Linear)]
    inputs = [drawn(linear.in_features) for linear in linears]
    pairs = zip(linears, inputs, strict=True)
    same = [torch.equal(batch.unfold(linear(x)), linear(batch.unfold(x))) for linear, x in pairs]
    x = drawn(CONFIG.intermediate_size)
    same.append(torch.equal(batch.unfold(functional.silu(x)), functional.silu(batch.unfold(x))))
    q = drawn(CONFIG.num_attention_heads, CONFIG.head_dim)
    k, v = (drawn(CONFIG.num_key_value_heads, CONFIG.head_dim) for _ in range(2))
    copies = attention(batch.unfold(q), batch.unfold(k), batch.unfold(v), batch.tokens)
    return all(same) and torch.equal(batch.unfold(attention(q, k, v, batch.fold)), copies)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", EQUALLY_LONG)
def test_equal_bits_where_kernels_are_row_invariant(family: str, level: Level, dtype: torch.dtype) -> None:
    sequences = families()[family]
    batch = Batch.from_sequences(sequences, level)
    if not row_invariant(batch, dtype):
        pytest.skip(f"{dtype} kernels of this machine are not row-invariant")
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
    for family in MERGEABLE:
        sequences = families()[family]
        assert difference(sequences, level, dtype, wrongly_folded(sequences, level)) > SEEN, family


def main() -> None:
    columns = [(level, dtype) for dtype in BOUNDS for level in LEVELS]
    titles = "  ".join(f"{level}, f{8 * dtype.itemsize}" for level, dtype in columns)
    print(f"{'largest difference from level none':36} {titles}  full, f64, one row merged")
    broken = False
    for family, sequences in families().items():
        found = {column: difference(sequences, *column) for column in columns}
        broken |= any(not value < BOUNDS[dtype] for (_, dtype), value in found.items())
        row = "   ".join(f"{value:.1e}" for value in found.values())
        if family in MERGEABLE:
            seen = difference(sequences, "full", torch.float64, wrongly_folded(sequences, "full"))
            broken |= not seen > SEEN
            row += f"   {seen:.1e}"
        print(f"{family:36} {row}")
    limits = [f"f{8 * dtype.itemsize} below {bound:.0e}" for dtype, bound in BOUNDS.items()]
    print(*limits, f"merged above {SEEN}", sep=", ")
    sys.exit(broken)


if __name__ == "__main__":
    main()
