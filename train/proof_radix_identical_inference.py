"""Folded inference gives what unfolded inference gives, over families of tries, on every backend of this machine.

Levels are compared with each other alone. An error that all of them share is seen in test_huggingface_comparison.py,
which holds each of them, over the same tries, to the states and logits of transformers' Qwen3 in float32.

As a script it prints a table and exits with 1 where it does not: python train/proof_radix_identical_inference.py
"""

# isort: off
import interpreted  # noqa: F401
# isort: on

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from radix_mlp.torch import attention
from radix_mlp.torch.dispatch import Backend
from radix_torch_varlen import Batch, Level
from tries import CONFIG, DEVICE, DTYPES, MERGEABLE, NAMES, affordable, families, fold_at, model, runs, wrongly_folded

# Largest difference of a state over the largest state. Rows are the same sums in another order or grouping: a few units
# in the last place (1.1e-16, 6e-8 and 4e-3) for each of some dozen sums in three layers; in bfloat16 most are the same.
BOUNDS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-2}
# One token in the place of another moves a state by far more than rounding does, in any dtype.
SEEN = 1e-1
LEVELS: tuple[Level, ...] = ("mlp", "full")
# Sequences of equal lengths: among more keys a kernel groups the sums over a row of scores in another way.
EQUALLY_LONG = [
    "one prompt, completions",
    "two prompts, completions",
    "two completions",
    "three levels",
    "nothing shared",
]
# Backend, dtype and family of each comparison within bounds, and of each of bits.
CASES = [
    (backend, dtype, family)
    for backend, dtype in runs(*BOUNDS)
    for family, sequences in families().items()
    if affordable(backend, sequences)
]
BIT_CASES = [
    (backend, dtype, family)
    for backend, dtype in runs(torch.bfloat16, torch.float32)
    for family in EQUALLY_LONG
    if affordable(backend, families()[family])
]


@torch.no_grad()
def states(family: str, level: Level, dtype: torch.dtype, backend: Backend, batch: Batch | None = None) -> Tensor:
    """Of all N tokens, [N, hidden]."""
    batch = fold_at(level, families()[family]) if batch is None else batch
    return batch.unfold(model(dtype, backend=backend)(batch))


def difference(family: str, level: Level, dtype: torch.dtype, backend: Backend, batch: Batch | None = None) -> float:
    """Of the folded states from those of a model that computes every token, one sequence after the other."""
    expected = states(family, "none", dtype, "sequential")
    found = states(family, level, dtype, backend, batch)
    return ((found - expected).abs().max() / expected.abs().max()).item()


def merged(family: str, level: Level, dtype: torch.dtype, backend: Backend) -> float:
    """The difference that one row makes which stands for two."""
    return difference(family, level, dtype, backend, wrongly_folded(families()[family], level))


@torch.no_grad()
def row_invariant(batch: Batch, dtype: torch.dtype, backend: Backend) -> bool:
    """Whether this machine's kernels give a row of `batch` the same bits as each of its copies."""
    torch.manual_seed(1)

    def drawn(*width: int) -> Tensor:
        return torch.randn(batch.fold.num_rows, *width).to(DEVICE, dtype)

    linears = [module for module in model(dtype).modules() if isinstance(module, nn.Linear)]
    inputs = [drawn(linear.in_features) for linear in linears]
    pairs = zip(linears, inputs, strict=True)
    same = [torch.equal(batch.unfold(linear(x)), linear(batch.unfold(x))) for linear, x in pairs]
    x = drawn(CONFIG.intermediate_size)
    same.append(torch.equal(batch.unfold(functional.silu(x)), functional.silu(batch.unfold(x))))
    q = drawn(CONFIG.num_attention_heads, CONFIG.head_dim)
    k, v = (drawn(CONFIG.num_key_value_heads, CONFIG.head_dim) for _ in range(2))
    copies = attention(batch.unfold(q), batch.unfold(k), batch.unfold(v), batch.tokens, backend=backend)
    return all(same) and torch.equal(batch.unfold(attention(q, k, v, batch.fold, backend=backend)), copies)


def equal_bits(family: str, level: Level, dtype: torch.dtype, backend: Backend) -> bool | None:
    """Whether folded states are those of level none to the bit; None where kernels are not row-invariant."""
    if not row_invariant(fold_at(level, families()[family]), dtype, backend):
        return None
    return torch.equal(states(family, level, dtype, backend), states(family, "none", dtype, backend))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("backend", "dtype", "family"), CASES)
def test_folded_states_are_the_unfolded_ones(backend: Backend, dtype: torch.dtype, family: str, level: Level) -> None:
    assert difference(family, level, dtype, backend) < BOUNDS[dtype]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("backend", "dtype", "family"), BIT_CASES)
def test_equal_bits_where_kernels_are_row_invariant(
    backend: Backend, dtype: torch.dtype, family: str, level: Level
) -> None:
    equal = equal_bits(family, level, dtype, backend)
    if equal is None:
        pytest.skip(f"{dtype} kernels of this machine are not row-invariant")
    assert equal


def test_some_kernels_are_row_invariant_where_rows_are_shared() -> None:
    """Else the test above has compared nothing."""
    shared = [case for case in BIT_CASES if case[2] != "nothing shared"]
    found = (
        row_invariant(fold_at(level, families()[case[2]]), case[1], case[0]) for case in shared for level in LEVELS
    )
    assert any(found)


@pytest.mark.parametrize("family", families())
def test_only_different_prefixes_are_computed(family: str) -> None:
    sequences = families()[family]
    prefixes = {tuple(sequence[:end]) for sequence in sequences for end in range(1, len(sequence) + 1)}
    tokens = sum(map(len, sequences))
    rows: dict[Level, int] = {"none": tokens, "mlp": len(prefixes), "full": len(prefixes)}
    for level, expected in rows.items():
        assert len(model(torch.float32)(fold_at(level, sequences))) == expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("backend", "dtype", "family"), [case for case in CASES if case[2] in MERGEABLE])
def test_a_wrong_fold_is_seen(backend: Backend, dtype: torch.dtype, family: str, level: Level) -> None:
    assert merged(family, level, dtype, backend) > SEEN


COLUMNS = [(level, dtype) for dtype in BOUNDS for level in LEVELS]
MARKS = {True: "=", False: "x", None: "-"}


def report(family: str, backend: Backend) -> tuple[str, list[bool]]:
    """A row of the table, and for each of its cells whether it is as it should be."""
    cells, right = [""] * len(COLUMNS), []
    for place, (level, dtype) in enumerate(COLUMNS):
        if (backend, dtype, family) in CASES:
            found = difference(family, level, dtype, backend)
            cells[place] = f"{found:.1e}"
            right.append(found < BOUNDS[dtype])
    cells.append("")
    if (backend, torch.float32, family) in CASES and family in MERGEABLE:
        found = merged(family, "full", torch.float32, backend)
        cells[-1] = f"{found:.1e}"
        right.append(found > SEEN)
    for own, dtype, other in BIT_CASES:
        if (own, other) == (backend, family):
            equal = [equal_bits(family, level, dtype, backend) for level in LEVELS]
            cells.append(f"{NAMES[dtype]} " + " ".join(MARKS[each] for each in equal))
            right += [each is not False for each in equal]
    return f"{family:26} {backend:12}" + "".join(cell.rjust(11) for cell in cells), right


def main() -> None:
    titles = "".join(f"{level}, {NAMES[dtype]}".rjust(11) for level, dtype in COLUMNS)
    print(f"{'largest difference':26} {'backend':12}{titles} row merged  equal bits (mlp full)")
    broken, rows = False, []
    for family, sequences in families().items():
        for backend in DTYPES:
            if affordable(backend, sequences):
                row, right = report(family, backend)
                print(row)
                rows.append(row)
                broken |= not all(right)
    limits = [f"{NAMES[dtype]} below {bound:.0e}" for dtype, bound in BOUNDS.items()]
    print(*limits, f"merged above {SEEN}", sep=", ")
    print("bits: = equal, x different, - not compared, as kernels are not row-invariant")
    sys.exit(broken or not any("=" in row for row in rows if not row.startswith("nothing shared")))


if __name__ == "__main__":
    main()
