"""The masks that kernels of tree attention read, each made once for a fold."""

from torch import Tensor

from radix_mlp.fold import Fold
from radix_mlp.torch.fold import to_device
from radix_mlp.torch.hopper import PATH_TILES, hopper_kernel
from radix_mlp.torch.path_blocks import PathBlocks
from radix_mlp.torch.tree_mask import Tiles, TreeMask, forward_tiles

ForwardMask = TreeMask | PathBlocks


def forward_mask(fold: Fold, q: Tensor, k: Tensor, window: int | None) -> ForwardMask:
    """What the forward pass reads of a depth-first `fold`: for Hopper's kernel where there is one, else for Triton's.

    For `q` [rows, heads, head_dim] and `k` [rows, key heads, head_dim].
    """
    kind, tiles = mask_kind(q)
    return _made(kind, tiles, fold, q, k, window)


def tree_mask(fold: Fold, q: Tensor, k: Tensor, window: int | None) -> TreeMask:
    """The same for Triton's kernels."""
    mask = _made(TreeMask, forward_tiles(q.shape[-1], q.dtype), fold, q, k, window)
    assert isinstance(mask, TreeMask)
    return mask


def mask_kind(q: Tensor) -> tuple[type[ForwardMask], Tiles]:
    """Which mask the forward pass reads for such queries, and how it cuts the scores."""
    if hopper_kernel(q.device, q.dtype, q.shape[-1]):
        return PathBlocks, PATH_TILES
    return TreeMask, forward_tiles(q.shape[-1], q.dtype)


def _made(kind: type[ForwardMask], tiles: Tiles, fold: Fold, q: Tensor, k: Tensor, window: int | None) -> ForwardMask:
    group = q.shape[1] // k.shape[1]

    def make() -> ForwardMask:
        return kind(tiles, window, **to_device(kind.arrays(fold, tiles, group, window), q.device))

    return fold.derived((kind, q.device, tiles, group, window), make)
