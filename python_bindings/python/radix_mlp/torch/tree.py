"""Tree attention as a differentiable function of torch tensors."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from radix_mlp.fold import Fold
from radix_mlp.torch import kernels
from radix_mlp.torch.forward_mask import ForwardMask, forward_mask, tree_mask
from radix_mlp.torch.hopper import hopper_attention, hopper_kernel
from radix_mlp.torch.hopper_gradient import HOPPER_PROGRAMS, HOPPER_TILES, hopper_gradient_kernels, hopper_gradients
from radix_mlp.torch.path_blocks import PathBlocks
from radix_mlp.torch.tree_mask import Tiles, TreeMask, key_gradient_tiles, query_gradient_tiles
from radix_mlp.torch.walks import Walks, key_walks

# Key heads of a tile that start together, of this many query heads and of all: where all tiles of one head start before
# the next head's, the last head's longest tiles end long after the others.
QUERY_HEADS_IN_A_ROW, KEY_HEADS_IN_A_ROW = 16, 8
# Walks that run at once on an H200.
PROGRAMS = 264
# More than a step of any walk, or a block of keys.
COMPILED_ROWS = 256


@dataclass(frozen=True)
class TreeGradients:
    """What `tree_backward` reads of a fold: Triton's kernels read a mask as well."""

    walks: Walks
    mask: TreeMask | None


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ForwardMask,
    scale: float,
    softcap: float | None = None,
    gradients: TreeGradients | None = None,
) -> Tensor:
    """Attention of `q` [rows, heads, head_dim] over `k`, `v` [rows, key heads, head_dim], as `q`.

    CUDA tensors of float16, bfloat16 or float32; products of float32 are taken in float32.
    Differentiable where the `tree_gradients` of the same fold are given.
    """
    if not torch.is_grad_enabled():
        # Without what autograd takes of the host's time for a call.
        return tree_forward(q, k, v, mask, scale, softcap, with_lse=False)[0]
    return _TreeAttention.apply(q, k, v, mask, gradients, scale, softcap)  # type: ignore[no-any-return, no-untyped-call]


@cache
def compile_kernels(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, windowed: bool
) -> None:
    """Compile what training on such tensors runs, by attention of a few rows.

    A step that is the first to take this backend would otherwise wait for seconds.
    """
    window = 1 if windowed else None
    fold = Fold.from_sequences([[0] * COMPILED_ROWS], layout="depth_first")
    q, k = (torch.zeros(COMPILED_ROWS, count, head_dim, dtype=dtype, device=device) for count in (heads, kv_heads))
    # Of more than one walk for a block of keys.
    gradients = tree_gradients(fold, q, k, window, None, longest=1)
    out, lse = tree_forward(q, k, k, forward_mask(fold, q, k, window), 1.0, None)
    tree_backward(q, k, k, out, lse, out, gradients, 1.0, None)


def tree_gradients(
    fold: Fold, q: Tensor, k: Tensor, window: int | None, softcap: float | None, longest: int | None = None
) -> TreeGradients:
    """By what `tree_backward` has the gradients: walks of `fold`'s keys, of no more than `longest` rows each."""
    group, head_dim = q.shape[1] // k.shape[1], q.shape[-1]
    plain = window is None and softcap is None and not torch.are_deterministic_algorithms_enabled()
    if plain and group <= HOPPER_TILES.tile and hopper_gradient_kernels(q.device, q.dtype, head_dim):
        walks = key_walks(fold, q, k, HOPPER_TILES, HOPPER_PROGRAMS, aligned=True, longest=longest)
        return TreeGradients(walks, None)
    tiles = key_gradient_tiles(head_dim, q.dtype, group)
    walks = key_walks(fold, q, k, tiles, PROGRAMS, aligned=False, longest=longest)
    return TreeGradients(walks, tree_mask(fold, q, k, window))


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: ForwardMask,
        gradients: TreeGradients | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        out, lse = tree_forward(q, k, v, mask, scale, softcap, with_lse=gradients is not None)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = gradients, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = tree_backward(q, k, v, out, lse, gradients[0], *ctx.options)
        return dq, dk, dv, None, None, None, None


def tree_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ForwardMask,
    scale: float,
    softcap: float | None,
    *,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """The output and, where `with_lse`, the logsumexp of each head's rows [heads, rows], float32."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    rows, heads, head_dim = q.shape
    lse = torch.empty(heads, rows, dtype=torch.float32, device=q.device)
    if isinstance(mask, PathBlocks):
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        kernel = hopper_kernel(q.device, q.dtype, head_dim)
        return hopper_attention(kernel, q, k, v, mask, scale, softcap, lse if with_lse else None), lse
    kv_heads = k.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kernels.forward[((len(mask.full) - 1) * kv_heads,)](
        q, *_descriptors([mask.tiles.key_block, 1], k, v), out, lse,  # type: ignore[call-arg]
        mask.subtree_end, mask.depth, mask.full, mask.partial, mask.blocks,
        rows, kv_heads, scale, softcap or 0.0, mask.window or 0,
        *q.stride()[:2], *out.stride()[:2],
        **_constants(q, kv_heads, mask, softcap, mask.tiles, _query_heads_in_a_row(q, k)),
    )  # fmt: skip
    return out, lse


def tree_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    gradients: TreeGradients,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `tree_forward` took and gave and its output's gradient."""
    q, k, v, dout = _rows(q), _rows(k), _rows(v), _rows(dout)
    walks, mask = gradients.walks, gradients.mask
    if mask is None:
        q, k, v, out, dout = map(_aligned, (q, k, v, out, dout))
        return hopper_gradients(q, k, v, out, lse, dout, walks, scale)
    rows, _, _ = q.shape
    kv_heads = k.shape[1]
    delta = torch.empty_like(lse)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scalars = (rows, kv_heads, scale, softcap or 0.0, mask.window or 0)
    tiles = query_gradient_tiles(q.shape[-1], q.dtype)
    parts = mask.tiles.tile // tiles.tile
    keys = _descriptors([tiles.key_block, 1], k, v)
    kernels.query_gradient[((len(mask.full) - 1) * parts * kv_heads,)](
        q, *keys, out, dout, lse, delta, dq,  # type: ignore[call-arg]
        mask.subtree_end, mask.depth, mask.full, mask.partial, mask.blocks,
        *scalars, *q.stride()[:2], *out.stride()[:2], *dout.stride()[:2], *dq.stride()[:2],
        **_constants(q, kv_heads, mask, softcap, tiles, _query_heads_in_a_row(q, k)) | {"LISTED": mask.tiles.tile},
    )  # fmt: skip
    if walks.tiles.key_block != tiles.key_block:
        keys = _descriptors([walks.tiles.key_block, 1], k, v)
    tiles, group = walks.tiles, q.shape[1] // kv_heads
    sums = lse.new_empty(walks.parts, kv_heads, 2, tiles.key_block, _padded(q.shape[-1]))
    # A descriptor's block has powers of two of rows and heads.
    through = tiles.tile % group == 0
    step = [tiles.tile // group, group]
    kernels.key_gradient[(len(walks.key_block) * kv_heads,)](
        *_descriptors(step, q, dout) if through else (q, dout),  # type: ignore[call-arg]
        *keys, lse, delta, dk, dv, sums,
        walks.key_block, walks.first_step, walks.walk_end, walks.part,
        mask.subtree_end, mask.depth,
        *scalars, *q.stride()[:2], *dout.stride()[:2], *dk.stride()[:2], *dv.stride()[:2],
        **_constants(q, kv_heads, mask, softcap, tiles, KEY_HEADS_IN_A_ROW) | {"THROUGH": through},
    )  # fmt: skip
    if walks.parts:
        sizes: dict[str, Any] = {"KEY_BLOCK": tiles.key_block, "HEAD_DIM": q.shape[-1], "DIM": sums.shape[-1]}
        kernels.add_parts[(len(walks.split_block), kv_heads)](
            sums, dk, dv, walks.split_block, walks.first_part, rows, kv_heads, scale,
            *dk.stride()[:2], *dv.stride()[:2], **sizes,  # type: ignore[arg-type]
        )  # fmt: skip
    return dq, dk, dv


def _query_heads_in_a_row(q: Tensor, k: Tensor) -> int:
    """The key heads of so many query heads."""
    return max(1, QUERY_HEADS_IN_A_ROW * k.shape[1] // q.shape[1])


def _rows(x: Tensor) -> Tensor:
    """`x` with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _descriptors(block: list[int], *tensors: Tensor) -> list[Any]:
    """What a kernel loads blocks through, of so many rows and heads and head_dim padded to a power of two."""
    block = [*block, _padded(tensors[0].shape[-1])]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in map(_aligned, tensors)]


def _aligned(x: Tensor) -> Tensor:
    """`x` at addresses of whole 16 bytes that differ, as the copy engine wants them; a copy where it is not so."""
    (row, head, _), size = x.stride(), x.element_size()
    if x.data_ptr() % 16 == 0 and row and head and row * size % 16 == 0 and head * size % 16 == 0:
        return x
    width = x.shape[-1]
    wide = x.new_empty(*x.shape[:2], width + -width % (16 // x.element_size()))
    return wide[..., :width].copy_(x)


@cache
def _padded(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))


def _constants(
    q: Tensor, kv_heads: int, mask: TreeMask, softcap: float | None, tiles: Tiles, in_a_row: int
) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // kv_heads,
        "TILE": tiles.tile,
        "KEY_BLOCK": tiles.key_block,
        "IN_A_ROW": in_a_row,
        "HEAD_DIM": q.shape[-1],
        "DIM": _padded(q.shape[-1]),
        "SOFTCAP": softcap is not None,
        "WINDOW": mask.window is not None,
        "PRECISION": "ieee",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
