"""Attention over a fold, one sequence after the other: exact on any device and dtype."""

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
    `MAX_SCORES` scores. Padding rows give zeros. Differentiable.
    """
    parts = [
        _one_path(q.index_select(0, rows), k.index_select(0, path), v.index_select(0, path), scale, softcap, window)
        for rows, path in zip(along.rows, along.paths, strict=True)
    ]
    return torch.cat([*parts, q.new_zeros(1, q.shape[1], v.shape[-1])]).index_select(0, along.inverse)


def _one_path(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
    """The last len(q) rows of a path of len(k), [queries, heads, head_dim]."""
    heads, before = q.shape[1], len(k) - len(q)
    chunk = max(1, MAX_SCORES // (heads * len(k)))
    parts = []
    for start in range(0, len(q), chunk):
        end = min(len(q), start + chunk)
        first = max(0, before + start + 1 - window) if window is not None else 0
        keys = slice(first, before + end)
        parts.append(_attend(q[start:end], k[keys], v[keys], scale, softcap, window))
    return torch.cat(parts)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    distance = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        causal = queries == keys and window is None
        mask = None if causal else seen
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    else:
        group = q.shape[1] // k.shape[1]
        scores = (q * scale) @ k.repeat_interleave(group, 1).transpose(-1, -2)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        out = weights @ v.repeat_interleave(group, 1)
    return out.squeeze(0).transpose(0, 1)
