"""What attention over a fold costs on a GPU, read off the fold: enough to pick a backend.

A call takes what the host takes to launch it or, where that is more, what the device takes for its parts.
Both kernels multiply tiles of queries by blocks of keys, whole tiles where a sequence fills only a part of
them; query-folded attention also gathers keys and values.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from radix_mlp.fold import Fold
from radix_mlp.torch.sequential import first_rows, sequence_lengths

if TYPE_CHECKING:
    from radix_mlp.torch.tree_mask import Tiles

Work = dict[str, float]

# FlashAttention-2's tiles.
FLASH_QUERIES, FLASH_KEYS = 128, 64


@dataclass(frozen=True)
class Rates:
    """Seconds: of the host for a call, and of the device for a unit of each kind of work."""

    host: float
    device: dict[str, float]

    def seconds(self, work: Work) -> float:
        return max(self.host, sum(rate * work[kind] for kind, rate in self.device.items()))


# Measured on an H200 by benchmark/gpu_attention/measure.py, fitted by fit.py beside it; training is a forward and a
# backward pass. No measured call of FlashAttention waited for the host. Both of the tree's passes are Hopper's kernels.
TREE = Rates(1.34e-4, {"flops": 1.64e-15, "tiles": 2.97e-8})
TREE_TRAINING = Rates(6.73e-4, {"flops": 6.69e-15, "tiles": 1.09e-7})
FLASH = Rates(0.0, {"flops": 2.69e-15, "tiles": 3.5e-8, "bytes": 1.42e-13, "gathers": 8.91e-5})
FLASH_TRAINING = Rates(0.0, {"flops": 1.07e-14, "tiles": 1.29e-7, "bytes": 3.56e-12, "gathers": 3.36e-4})


def tree_seconds(
    rows: int, blocks: int, tiles: "Tiles", kv_heads: int, group: int, head_dim: int, *, training: bool = False
) -> float:
    """Of a call of tree attention that lists `blocks` pairs of blocks."""
    work = tree_work(rows, blocks, tiles, kv_heads, group, head_dim)
    return (TREE_TRAINING if training else TREE).seconds(work)


def flash_seconds(
    fold: Fold, heads: int, kv_heads: int, head_dim: int, window: int | None, *, training: bool = False
) -> float:
    """Of a call of query-folded attention in float16 or bfloat16, its gathers included."""
    work = flash_work(fold, heads, kv_heads, head_dim, window)
    return (FLASH_TRAINING if training else FLASH).seconds(work)


def tree_work(rows: int, blocks: int, tiles: "Tiles", kv_heads: int, group: int, head_dim: int) -> Work:
    """Flops of two products a pair of blocks, and tiles of queries."""
    return {
        "flops": 4 * head_dim * tiles.tile * tiles.key_block * blocks * kv_heads,
        "tiles": -(-rows // (tiles.tile // group)) * kv_heads,
    }


def flash_work(fold: Fold, heads: int, kv_heads: int, head_dim: int, window: int | None) -> Work:
    """Flops of two products, tiles of queries, bytes that the gathers of keys and values move, if any."""
    queries, keys = first_rows(fold), sequence_lengths(fold)
    keys, queries = keys[queries > 0], queries[queries > 0]
    tiles = -(-queries // FLASH_QUERIES)
    # Each tile sees what stands before its sequence's new rows, and those up to its own end.
    seen = tiles * (keys - queries) + FLASH_QUERIES * tiles * (tiles + 1) // 2
    if window is not None:
        seen = np.minimum(seen, tiles * (window + FLASH_QUERIES))
    scores = int(FLASH_QUERIES * (seen + tiles * FLASH_KEYS // 2).sum()) * heads
    gathers = fold.num_tokens != fold.num_nodes
    return {
        "flops": 4 * head_dim * scores,
        "tiles": int(tiles.sum()) * heads,
        "bytes": 8 * int(keys.sum()) * kv_heads * head_dim if gathers else 0,
        "gathers": int(gathers),
    }
