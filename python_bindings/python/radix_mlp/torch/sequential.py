"""Attention over a fold, one sequence after the other: exact on any device and dtype."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from radix_mlp.fold import Fold

Int64 = NDArray[np.int64]

# Scores held at once, over all heads: 256 MiB in float32.
MAX_SCORES = 1 << 26


@dataclass(frozen=True)
class Paths:
    """Which rows each sequence brings first, and the whole path of rows that they end.

    `rows` and `paths` are int32 tensors, one a sequence that brings any row; the last rows of each path are
    its `rows`. `inverse` [rows of the fold] takes the concatenation of `rows`, with one more for
    padding, to compact space.
    """

    rows: list[Tensor]
    paths: list[Tensor]
    inverse: Tensor


def sequence_lengths(fold: Fold) -> Int64:
    """Tokens of each sequence, [sequences]."""
    return fold.cu_seq_lengths[1:].astype(np.int64) - fold.cu_seq_lengths[:-1]


def first_rows(fold: Fold) -> Int64:
    """How many rows each sequence is the first to bring, [sequences]; they are its last."""
    if fold.query_lengths is not None:
        return fold.query_lengths.astype(np.int64)
    sequences = np.searchsorted(fold.cu_seq_lengths, fold.fold_gather[: fold.num_nodes], side="right") - 1
    return np.bincount(sequences, minlength=fold.num_sequences)


def paths(fold: Fold, device: torch.device) -> Paths:
    """The paths of `fold`, with its index tensors on `device`."""
    return fold.derived(("paths", device), lambda: _paths(fold, device))


def _paths(fold: Fold, device: torch.device) -> Paths:
    scatter = fold.tensors(device).scatter_indices
    counts = first_rows(fold)
    starts, ends = fold.cu_seq_lengths[:-1].astype(np.int64), fold.cu_seq_lengths[1:].astype(np.int64)
    bringing = np.flatnonzero(counts).tolist()
    whole = [scatter[starts[s] : ends[s]] for s in bringing]
    new = [path[-int(counts[s]) :] for s, path in zip(bringing, whole, strict=True)]
    inverse = torch.full((fold.num_rows,), fold.num_nodes, dtype=torch.int64, device=device)
    if new:
        inverse[torch.cat(new).long()] = torch.arange(fold.num_nodes, device=device)
    return Paths(new, whole, inverse)


def sequential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    along: Paths,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of `q` [rows, heads, head_dim] over `k`, `v` [rows, key heads, head_dim], as `q`.

    Memory beyond the inputs and the output is that of one sequence's keys and values and of
    `MAX_SCORES` scores, and where 16 bits get gradients that of `k` and `v` in float32. Padding rows give zeros.
    Differentiable.
    """
    wide_k, wide_v = _precisely_summed(k), _precisely_summed(v)
    parts = []
    for rows, path in zip(along.rows, along.paths, strict=True):
        keys, values = (x.index_select(0, path).to(q.dtype) for x in (wide_k, wide_v))
        parts.append(_one_path(q.index_select(0, rows), keys, values, scale, softcap, window))
    return torch.cat([*parts, q.new_zeros(1, q.shape[1], v.shape[-1])]).index_select(0, along.inverse)


def _precisely_summed(x: Tensor) -> Tensor:
    """`x`, in float32 at least where it gets a gradient: that is added up in it, and may be of hundreds of copies."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if torch.is_grad_enabled() and x.requires_grad else x


def _one_path(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
    """The last len(q) rows of a path of len(k), [queries, heads, head_dim]."""
    parts = [
        _attend(q[queries], k[keys], v[keys], scale, softcap, window)
        for queries, keys in _chunks(len(q), len(k), q.shape[1], window)
    ]
    return torch.cat(parts)


def _chunks(queries: int, keys: int, heads: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Parts of the last `queries` of `keys` rows, and the keys that each may see."""
    before = keys - queries
    chunk = max(1, MAX_SCORES // (heads * keys))
    for start in range(0, queries, chunk):
        end = min(queries, start + chunk)
        first = max(0, before + start + 1 - window) if window is not None else 0
        yield slice(start, end), slice(first, before + end)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
    if softcap is not None:
        q, k, v = (_by_key_head(x, k.shape[1]) for x in (q, k, v))
        weights, _ = _weights(q, k, scale, softcap, window)
        return _rows(weights @ v)
    causal = len(q) == len(k) and window is None
    mask = None if causal else _seen(len(q), len(k), window, q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def sequential_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    along: Paths,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `sequential_attention` took and gave and its output's gradient."""
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # A prompt may have hundreds of completions.
    precise = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (x.new_zeros(x.shape, dtype=precise) for x in (k, v))
    for rows, path in zip(along.rows, along.paths, strict=True):
        for queries, keys in _chunks(len(rows), len(path), q.shape[1], window):
            own, seen = rows[queries].long(), path[keys]
            of_queries = [x.index_select(0, own) for x in (dout, q, out)]
            of_keys = [x.index_select(0, seen) for x in (k, v)]
            own_dq, seen_dk, seen_dv = _gradients(of_queries, of_keys, scale, softcap, window)
            dq.index_copy_(0, own, own_dq)
            dk.index_add_(0, seen, seen_dk.to(precise))
            dv.index_add_(0, seen, seen_dv.to(precise))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _gradients(
    of_queries: list[Tensor], of_keys: list[Tensor], scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from [dout, q, out] of the last rows of a path, and its [k, v]."""
    kv_heads = of_keys[0].shape[1]
    dout, q, out, k, v = (_by_key_head(x, kv_heads) for x in (*of_queries, *of_keys))
    weights, slope = _weights(q, k, scale, softcap, window)
    # The softmax's gradient (FlashAttention, arXiv 2205.14135, section 3.1).
    dscores = weights * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * slope * scale
    dk, dv = dscores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dout
    return _rows(dscores @ k), _rows(dk.sum(1, keepdim=True)), _rows(dv.sum(1, keepdim=True))


def _weights(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, window: int | None
) -> tuple[Tensor, Tensor | float]:
    """The softmax [key heads, group, queries, keys] of scores, and these' slope by the scaled products."""
    scores = (q * scale) @ k.transpose(-1, -2)
    slope: Tensor | float = 1.0
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped**2
    seen = _seen(q.shape[-2], k.shape[-2], window, q.device)
    precise = torch.promote_types(q.dtype, torch.float32)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=precise).to(q.dtype), slope


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `keys` rows each of the last `queries` sees, [queries, keys]."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """[rows, heads, head_dim] as [key heads, heads of each, rows, head_dim]."""
    return x.reshape(len(x), kv_heads, -1, x.shape[-1]).permute(1, 2, 0, 3)


def _rows(x: Tensor) -> Tensor:
    """[key heads, heads of each, rows, head_dim] as [rows, heads, head_dim]."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
