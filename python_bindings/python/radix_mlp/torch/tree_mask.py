"""The block lists that tree attention reads, made from the trie on the host."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.fold import Fold

Arrays = dict[str, NDArray[np.integer[Any]]]


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts the scores: `tile` (row, head) pairs by `key_block` keys."""

    tile: int
    key_block: int
    warps: int
    stages: int


def forward_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """The fastest of a dozen on an H200, of those that fit in shared memory."""
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 1)
    return Tiles(128, 64, 4, 2) if head_dim <= 128 else Tiles(128, 32, 8, 2)


def query_gradient_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Those of the forward pass, whose block lists are read, or parts of them: there is more to hold."""
    forward = forward_tiles(head_dim, dtype)
    if dtype == torch.float32 or head_dim > 128:
        return forward
    return Tiles(forward.tile // 2, forward.key_block, 4, 2)


def key_gradient_tiles(head_dim: int, dtype: torch.dtype, group: int) -> Tiles:
    """Of steps of all `group` heads of each row."""
    if dtype == torch.float32:
        tiles = Tiles(32, 32, 4, 1)
    else:
        tiles = Tiles(32, 64, 4, 3) if head_dim <= 128 else Tiles(64, 64, 8, 1)
    return tiles if group <= tiles.tile else Tiles(1 << (group - 1).bit_length(), tiles.key_block, 8, 1)


@dataclass(frozen=True)
class TreeMask:
    """The mask of a depth-first fold in blocks, int32 tensors of one device.

    Query block b, of `tiles.tile // (heads // key heads)` rows, sees whole the blocks
    `blocks[full[b]:full[b + 1]]` of `tiles.key_block` keys, and in part
    `blocks[partial[b]:partial[b + 1]]`. `window`, where it is not
    None, limits what is seen to that many rows of a path, the query's own included; blocks beyond
    it are not listed.
    """

    tiles: Tiles
    window: int | None
    subtree_end: Tensor
    depth: Tensor
    full: Tensor
    partial: Tensor
    blocks: Tensor

    @property
    def pairs(self) -> int:
        """How many pairs of a query block and a key block it lists."""
        return self.blocks.shape[0]

    @staticmethod
    def arrays(fold: Fold, tiles: Tiles, group: int, window: int | None) -> Arrays:
        """Those of the mask of a depth-first `fold`, for `group` heads a key head."""
        assert fold.subtree_end is not None
        query_block, key_block = tiles.tile // group, tiles.key_block
        blocks = fold.block_mask(query_block, key_block)
        lists = [blocks.full, blocks.partial]
        depth = fold.subtree_end
        if window is not None:
            depth = _depth(fold)
            lists = [_within(window, depth, query_block, key_block, *listed) for listed in lists]
        (full, full_blocks), (partial, partial_blocks) = lists
        return {
            "subtree_end": fold.subtree_end,
            "depth": depth,
            "full": full,
            "partial": partial + np.uintp(len(full_blocks)),
            "blocks": np.concatenate([full_blocks, partial_blocks]),
        }

    @staticmethod
    def most(rows: int, tiles: Tiles, group: int) -> dict[str, int]:
        """How long the arrays can be whose length is not that of every fold of so many rows."""
        return {"blocks": -(-rows // (tiles.tile // group)) * -(-rows // tiles.key_block)}


def _depth(fold: Fold) -> NDArray[np.uint32]:
    """How many rows stand above each row on its path, [rows]."""
    starts = fold.cu_seq_lengths[np.searchsorted(fold.cu_seq_lengths, fold.fold_gather, side="right") - 1]
    return fold.fold_gather - starts


def _within(
    window: int,
    depth: NDArray[np.uint32],
    query_block: int,
    key_block: int,
    offsets: NDArray[np.uintp],
    indices: NDArray[np.uint32],
) -> tuple[NDArray[np.uintp], NDArray[np.uint32]]:
    """Block lists without the keys that lie beyond the window of every query of their block."""
    signed = depth.astype(np.int64)
    shallowest = np.minimum.reduceat(signed, np.arange(0, len(depth), query_block))
    deepest = np.maximum.reduceat(signed, np.arange(0, len(depth), key_block))
    queries = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets).astype(np.int64))
    kept = shallowest[queries] - deepest[indices] < window
    kept_before = np.concatenate([[0], np.cumsum(kept)]).astype(np.uintp)
    return kept_before[offsets], indices[kept]
