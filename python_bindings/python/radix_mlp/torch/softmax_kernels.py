"""Softmax over a vocabulary in Triton: logits are read in their own dtype, and become their gradients in place."""

import triton
import triton.language as tl


@triton.jit
def row_logsumexp(logits, lse, columns, stride, BLOCK: tl.constexpr):
    """One program a row: `lse` [rows] of `logits` [rows, columns] in one reading (arXiv 1805.02867)."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        # A lane that has seen nothing but -inf has no difference to take.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - shift) + tl.exp(x - shift)
        peak = higher
    highest = tl.max(peak, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(lse + row, shift + tl.log(tl.sum(total * tl.exp(peak - shift), 0)))


# A chunk's factors and shifts begin anywhere in those of all rows: there is one kernel for all chunks.
@triton.jit(do_not_specialize_on_alignment=["factor", "shift"])
def softmax_in_place(logits, lse, factor, shift, columns, stride, BLOCK: tl.constexpr):
    """One program a block of a row: exp(logits - lse) * factor - shift, of which the last three are [rows]."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row.to(tl.int64) * stride + column
    x = tl.load(at, mask=column < columns, other=float("-inf")).to(tl.float32)
    y = tl.exp(x - tl.load(lse + row)) * tl.load(factor + row) - tl.load(shift + row)
    tl.store(at, y.to(logits.dtype.element_ty), mask=column < columns)
