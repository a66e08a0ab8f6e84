"""Query-folded attention: the varlen kernel of FlashAttention with fewer queries than keys.

Each sequence sends the rows that it is the first to bring as queries, and its whole path as keys:
queries and keys align at their ends, which is how FlashAttention-2 (arXiv 2307.08691, from version
2.1) masks causally where the lengths differ.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radix_mlp.fold import Fold
from radix_mlp.torch.fold import to_device
from radix_mlp.torch.sequential import first_rows, sequence_lengths


@dataclass(frozen=True)
class Varlen:
    """Lengths and indices of one varlen call, int32 tensors of one device.

    `keys` gathers the paths of the sequences that bring rows, None where that is every row in order;
    `order` brings queries into the order of sequences and `inverse` the result back, None where rows stand
    in that order already.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    keys: Tensor | None = None
    order: Tensor | None = None
    inverse: Tensor | None = None


def varlen(fold: Fold, device: torch.device) -> Varlen:
    """The varlen call of `fold`: a handful of small arrays, in one transfer."""
    return fold.derived(("varlen", device), lambda: _varlen(fold, device))


def _varlen(fold: Fold, device: torch.device) -> Varlen:
    counts = first_rows(fold)
    lengths = sequence_lengths(fold)
    bringing = counts > 0
    scatter = fold.scatter_indices[np.repeat(bringing, lengths)].astype(np.int64)
    new = np.repeat(counts, lengths)[np.repeat(bringing, lengths)]
    lengths, counts = lengths[bringing], counts[bringing]
    cu_keys, cu_queries = (np.concatenate([[0], np.cumsum(x)]) for x in (lengths, counts))
    # A token is a query where it is among the last of its sequence that are new.
    left = np.repeat(cu_keys[1:], lengths) - np.arange(len(scatter))
    order = scatter[left <= new]
    in_order = len(order) == fold.num_rows and bool((order == np.arange(fold.num_rows)).all())
    # Padding rows take the result of row 0: they mean nothing.
    inverse = np.zeros(fold.num_rows, np.int64)
    inverse[order] = np.arange(len(order))
    arrays = {"cu_queries": cu_queries, "cu_keys": cu_keys}
    if not in_order or len(order) != len(scatter):
        arrays["keys"] = scatter
    if not in_order:
        arrays |= {"order": order, "inverse": inverse}
    return Varlen(max_queries=int(counts.max()), max_keys=int(lengths.max()), **to_device(arrays, device))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, call: Varlen, scale: float, window: int | None = None) -> Tensor:
    """Attention of `q` [rows, heads, head_dim] over `k`, `v` [rows, key heads, head_dim], as `q`.

    CUDA tensors of float16 or bfloat16, head_dim a multiple of 8 up to 256. Differentiable.
    """
    return flash_forward(q, k, v, call, scale, window)[0]


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Varlen, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """The output of `flash_attention`, and the logarithms of the softmax's denominators [heads, queries], float32."""
    q, k, v = _queries(q, call), _keys(k, call), _keys(v, call)
    lengths = (call.cu_queries, call.cu_keys, call.max_queries, call.max_keys)
    options = {"scale": scale, **_window(window)}
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False, **options)
    return (out if call.inverse is None else out.index_select(0, call.inverse)), lse


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: Varlen,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `flash_forward` took and gave and its output's gradient."""
    # The state of dropout's generator, which is not read where there is none.
    random = torch.empty(2, dtype=torch.uint64, device=q.device)
    lengths = (call.cu_queries, call.cu_keys, call.max_queries, call.max_keys)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        _queries(dout, call),
        _queries(q, call),
        _keys(k, call),
        _keys(v, call),
        _queries(out, call),
        lse,
        *lengths,
        0.0,
        True,
        random,
        random,
        scale=scale,
        **_window(window),
    )
    if call.order is not None:
        dq = torch.zeros_like(q).index_copy_(0, call.order.long(), dq)
    if call.keys is not None:
        dk, dv = (_summed(dx, call.keys, x.shape[0]) for x, dx in ((k, dk), (v, dv)))
    return dq, dk, dv


def _queries(x: Tensor, call: Varlen) -> Tensor:
    return x if call.order is None else x.index_select(0, call.order)


def _keys(x: Tensor, call: Varlen) -> Tensor:
    return x if call.keys is None else Gather.apply(x, call.keys)  # type: ignore[no-untyped-call]


class Gather(torch.autograd.Function):
    """Rows of a tensor by index [copies], whose gradients are added in float32: a row may have hundreds of copies."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _summed(gradients[0], index, ctx.count), None


def _summed(copies: Tensor, index: Tensor, count: int) -> Tensor:
    """For each of `count` rows the sum of its `copies`, in their dtype."""
    sums = copies.new_zeros(count, *copies.shape[1:], dtype=torch.float32)
    return sums.index_add_(0, index, copies.float()).to(copies.dtype)


def _window(window: int | None) -> dict[str, int | None]:
    left, right = (None, None) if window is None else (window - 1, 0)
    return {"window_size_left": left, "window_size_right": right}
