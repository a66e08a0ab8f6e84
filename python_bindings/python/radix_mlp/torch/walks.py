"""How the gradient of each block of keys is summed, made from the trie on the host.

The rows that see a block of keys are an interval: from its start to the end of its last subtree. A program walks
through them. A prompt of thousands of completions would keep one program at work while all others are done: its
interval is walked in parts, whose sums are added in their order.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from radix_mlp.fold import Fold
from radix_mlp.torch.fold import to_device
from radix_mlp.torch.tree_mask import Arrays, Tiles

# (row, head) pairs that are worth a walk of their own.
MIN_WALK = 1024


@dataclass(frozen=True)
class Walks:
    """The walks of a depth-first fold in blocks of `tiles.key_block` keys, int32 tensors of one device.

    Walk i is that of key block `key_block[i]`, from its step `first_step[i]` to before row `walk_end[i]`, in steps of
    `tiles.tile // (heads // key heads)` rows. A block's first step begins with its first row or, where the walks are
    `aligned`, is the one that has it when steps are counted from row 0. Where a walk has all steps that see the block,
    `part[i]` is 0; else it is part `part[i] - 1`, and parts `first_part[j]:first_part[j + 1]` are those of key block
    `split_block[j]`. `subtree_end` [rows] is the fold's.
    """

    tiles: Tiles
    aligned: bool
    key_block: Tensor
    first_step: Tensor
    walk_end: Tensor
    part: Tensor
    split_block: Tensor
    first_part: Tensor
    subtree_end: Tensor
    parts: int


def key_walks(
    fold: Fold, q: Tensor, k: Tensor, tiles: Tiles, programs: int, *, aligned: bool, longest: int | None = None
) -> Walks:
    """The walks of `fold` for `q` [rows, heads, head_dim] and `k` [rows, key heads, head_dim]: see `walk_arrays`."""
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads

    def make() -> Walks:
        arrays = walk_arrays(fold, tiles, group, kv_heads, programs, aligned=aligned, longest=longest)
        return Walks(tiles, aligned, **to_device(arrays, q.device), parts=int(arrays["first_part"][-1]))

    return fold.derived(("walks", q.device, tiles, group, kv_heads, programs, aligned, longest), make)


def walk_arrays(
    fold: Fold,
    tiles: Tiles,
    group: int,
    kv_heads: int,
    programs: int,
    *,
    aligned: bool,
    longest: int | None = None,
) -> Arrays:
    """The arrays of `Walks` for a fold that has rows.

    No walk has more than `longest` of them, rounded up to whole steps; by default no more than the share that each of
    so many `programs`, those that run at once, has of all walks.
    """
    assert fold.subtree_end is not None
    blocks = np.arange(0, fold.num_rows, tiles.key_block)
    step = tiles.tile // group
    starts = blocks // step * step if aligned else blocks
    rows = np.maximum.reduceat(fold.subtree_end.astype(np.int64), blocks) - starts
    if longest is None:
        longest = max(step, MIN_WALK // group, int(rows.sum()) * kv_heads // programs)
    longest = -(-longest // step) * step
    counts = -(-rows // longest)
    key_block = np.repeat(np.arange(len(starts)), counts)
    walked = longest * (np.arange(len(key_block)) - np.repeat(np.cumsum(counts) - counts, counts))
    is_part = (counts > 1)[key_block]
    return {
        "key_block": key_block,
        "first_step": walked // step,
        "walk_end": starts[key_block] + np.minimum(walked + longest, rows[key_block]),
        "part": np.where(is_part, np.cumsum(is_part), 0),
        "split_block": np.flatnonzero(counts > 1),
        "first_part": np.append(0, np.cumsum(counts[counts > 1])),
        "subtree_end": fold.subtree_end,
    }
