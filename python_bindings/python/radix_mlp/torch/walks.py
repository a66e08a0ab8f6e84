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
from radix_mlp.torch.tree_mask import Arrays, Tiles, key_gradient_tiles

# No walk is longer than the share of all walks that each of so many programs would have: those that run at once on an
# H200.
PROGRAMS = 264
# (row, head) pairs that are worth a walk of their own.
MIN_WALK = 1024


@dataclass(frozen=True)
class Walks:
    """The walks of a depth-first fold in blocks of `tiles.key_block` keys, int32 tensors of one device.

    Walk i is that of key block `key_block[i]`, from `first_step[i]` steps of `tiles.tile // (heads // key heads)` rows
    after the block's first row, to `walk_end[i]`. Where those are all that see the block, `part[i]` is 0; else the walk
    is part `part[i] - 1`, and parts `first_part[j]:first_part[j + 1]` are those of key block `split_block[j]`.
    """

    tiles: Tiles
    key_block: Tensor
    first_step: Tensor
    walk_end: Tensor
    part: Tensor
    split_block: Tensor
    first_part: Tensor
    parts: int


def key_walks(fold: Fold, q: Tensor, k: Tensor, longest: int | None = None) -> Walks:
    """The walks of `fold` for `q` [rows, heads, head_dim] and `k` [rows, key heads, head_dim]: see `walk_arrays`."""
    kv_heads = k.shape[1]
    group = q.shape[1] // kv_heads
    tiles = key_gradient_tiles(q.shape[-1], q.dtype, group)

    def make() -> Walks:
        arrays = walk_arrays(fold, tiles, group, kv_heads, longest)
        return Walks(tiles, **to_device(arrays, q.device), parts=int(arrays["first_part"][-1]))

    return fold.derived(("walks", q.device, tiles, group, kv_heads, longest), make)


def walk_arrays(fold: Fold, tiles: Tiles, group: int, kv_heads: int, longest: int | None = None) -> Arrays:
    """The arrays of `Walks` for a fold that has rows.

    No walk has more than `longest` of them, rounded up to whole steps; by default what shares the work out.
    """
    assert fold.subtree_end is not None
    starts = np.arange(0, fold.num_rows, tiles.key_block)
    rows = np.maximum.reduceat(fold.subtree_end.astype(np.int64), starts) - starts
    step = tiles.tile // group
    if longest is None:
        longest = max(step, MIN_WALK // group, int(rows.sum()) * kv_heads // PROGRAMS)
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
    }
