"""The blocks of paths that Hopper's tree attention reads, made from the trie on the host."""

import ctypes
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from radix_mlp.fold import Fold
from radix_mlp.torch.tree_mask import Arrays, Tiles


class Lists(ctypes.Structure):
    """The argument of the same name of Hopper's kernel: where its arrays are."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("blocks", "above", "partial", "partial_blocks", "full", "full_blocks")
    ]


@dataclass(frozen=True)
class PathBlocks:
    """The `PathMask` of a depth-first fold, int32 tensors of one device.

    `blocks` [4 * blocks] has its blocks, and `listed` the numbers of those of query block b, of
    `tiles.tile // (heads // key heads)` rows, that it sees in part, at `partial[b]:partial[b + 1]`, and whole, at
    `full[b]:full[b + 1]`. `depth` is empty without a window.
    """

    tiles: Tiles
    window: int | None
    blocks: Tensor
    depth: Tensor
    partial: Tensor
    full: Tensor
    listed: Tensor
    above: Tensor

    @property
    def pairs(self) -> int:
        """How many pairs of a query block and a key block it lists."""
        return self.listed.shape[0]

    @cached_property
    def lists(self) -> Lists:
        arrays = self.blocks, self.above, self.partial, self.listed, self.full, self.listed
        return Lists(*(array.data_ptr() for array in arrays))

    @staticmethod
    def arrays(fold: Fold, tiles: Tiles, group: int, window: int | None) -> Arrays:
        """Those of the mask of a depth-first `fold`, for `group` heads a key head."""
        mask = fold.path_mask(tiles.tile // group, tiles.key_block, window)
        (partial, partial_blocks), (full, full_blocks) = mask.partial, mask.full
        return {
            "blocks": mask.blocks.reshape(-1),
            "depth": mask.depth if window is not None else mask.depth[:0],
            "partial": partial,
            "full": full + np.uintp(len(partial_blocks)),
            "listed": np.concatenate([partial_blocks, full_blocks]),
            # Last, as what differs most from fold to fold.
            "above": mask.above,
        }

    @staticmethod
    def most(rows: int, tiles: Tiles, group: int) -> dict[str, int]:
        """How long the arrays can be whose length is not that of every fold of so many rows.

        Each block has a row of its own. A query block sees those of its rows, and before them those of one path.
        """
        own = tiles.tile // group
        seen = own + -(-rows // tiles.key_block)
        return {"blocks": 4 * rows, "listed": -(-rows // own) * seen, "above": (tiles.key_block - 1) * rows}
