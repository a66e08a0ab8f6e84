"""What attention over a fold costs on a GPU, read off the fold: enough to pick a backend.

Both kernels multiply tiles of queries by blocks of keys, whole tiles where a sequence fills only a
part of them; query-folded attention also gathers keys and values.
"""

from typing import TYPE_CHECKING

import numpy as np

from radix_mlp.fold import Fold
from radix_mlp.torch.sequential import first_rows, sequence_lengths

if TYPE_CHECKING:
    from radix_mlp.torch.tree_mask import Tiles

# Measured on an H200 by benchmark/gpu_attention/measure.py.
# The rate on full blocks, and what a tile of queries costs beside its blocks.
TREE_FLOPS = 450e12
TREE_TILE_SECONDS = 40e-9
FLASH_FLOPS = 330e12
BYTES_PER_SECOND = 3.0e12
# The gather of keys and of values, and what more a call with two gathers launches.
GATHER_SECONDS = 10e-6
# FlashAttention-2's tiles.
FLASH_QUERIES, FLASH_KEYS = 128, 64


def tree_seconds(rows: int, blocks: int, tiles: "Tiles", kv_heads: int, group: int, head_dim: int) -> float:
    """Of a forward call of tree attention that lists `blocks` pairs of blocks, two products for each."""
    flops = 4 * head_dim * tiles.tile * tiles.key_block * blocks
    query_blocks = -(-rows // (tiles.tile // group))
    return kv_heads * (flops / TREE_FLOPS + query_blocks * TREE_TILE_SECONDS)


def flash_seconds(fold: Fold, heads: int, kv_heads: int, head_dim: int, window: int | None) -> float:
    """Of a forward call of query-folded attention in float16 or bfloat16, its gathers included."""
    queries, keys = first_rows(fold), sequence_lengths(fold)
    keys, queries = keys[queries > 0], queries[queries > 0]
    tiles = -(-queries // FLASH_QUERIES)
    # Each tile sees what stands before its sequence's new rows, and those up to its own end.
    seen = tiles * (keys - queries) + FLASH_QUERIES * tiles * (tiles + 1) // 2
    if window is not None:
        seen = np.minimum(seen, tiles * (window + FLASH_QUERIES))
    scores = FLASH_QUERIES * (seen + tiles * FLASH_KEYS // 2).sum() * heads
    gathered = 0 if fold.num_tokens == fold.num_nodes else 8 * keys.sum() * kv_heads * head_dim
    return float(
        4 * head_dim * scores / FLASH_FLOPS + gathered / BYTES_PER_SECOND + (GATHER_SECONDS if gathered else 0)
    )
