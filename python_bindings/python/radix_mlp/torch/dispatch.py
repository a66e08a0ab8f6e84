"""Which backend attends over a folded batch: one that can, and is expected to be fast."""

import math
from collections import Counter
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from radix_mlp.fold import Fold
from radix_mlp.torch.cost import flash_seconds, tree_seconds
from radix_mlp.torch.forward_mask import forward_mask
from radix_mlp.torch.softmax import runs_on
from radix_mlp.torch.tree_mask import forward_tiles

Backend = Literal["tree", "query_folded", "sequential"]

HALF = (torch.float16, torch.bfloat16)


def pick_backend(
    q: Tensor, k: Tensor, v: Tensor, fold: Fold, *, softcap: float | None = None, window: int | None = None
) -> Backend:
    """The backend that `attention` takes where none is named: the cheapest that can run.

    What it costs, with its backward pass where there will be one, is read off the fold, with the constants of
    benchmark/results/gpu_attention.json. The first pick for a backward pass compiles the tree kernels, so that no later
    one, on a batch of another shape, has to.
    """
    return _pick(q, k, v, fold, softcap, window, training=has_gradients(q, k, v))


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: Fold,
    scale: float,
    softcap: float | None,
    window: int | None,
    backend: Backend | None,
    *,
    training: bool,
) -> Backend:
    """The `backend` that was asked for, or the one to pick.

    Raises ValueError for what does not go together, TypeError for what is no fold.
    """
    if not isinstance(fold, Fold):
        raise TypeError(f"fold must be a Fold or the tensor that stands for one, got {type(fold).__name__}")
    _check(q, k, v, fold)
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
    if window is not None and not (isinstance(window, Integral) and window > 0):
        raise ValueError(f"window must be a positive integer, got {window}")
    if backend is None:
        return _pick(q, k, v, fold, softcap, window, training=training)
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if problem := unsupported(backend, q, k, v, fold, softcap):
        raise ValueError(f"backend {backend!r} {problem}")
    return backend


def attended(fold: Fold) -> Counter[int | None]:
    """How many calls of attention over `fold` had which window: folded models count their layers by them."""
    return fold.derived(("attended",), Counter)


def softmax_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def has_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _pick(
    q: Tensor, k: Tensor, v: Tensor, fold: Fold, softcap: float | None, window: int | None, *, training: bool
) -> Backend:
    if q.device.type != "cuda":
        return "sequential"
    (_, heads, head_dim), kv_heads = q.shape, k.shape[1]
    key = ("backend", q.device, q.dtype, heads, kv_heads, head_dim, v.shape[-1], softcap is None, window, training)

    def pick() -> Backend:
        tree = not unsupported("tree", q, k, v, fold, softcap)
        folded = not unsupported("query_folded", q, k, v, fold, softcap)
        if not tree or not folded:
            return "tree" if tree else "query_folded" if folded else "sequential"
        if training:
            from radix_mlp.torch.tree import compile_kernels

            compile_kernels(q.device, q.dtype, heads, kv_heads, head_dim, window is not None)
        mask, sizes = forward_mask(fold, q, k, window), (kv_heads, heads // kv_heads, head_dim)
        tree_time = tree_seconds(len(q), mask.pairs, mask.tiles, *sizes, training=training)
        flash_time = flash_seconds(fold, heads, kv_heads, head_dim, window, training=training)
        return "tree" if tree_time <= flash_time else "query_folded"

    # Every layer asks again.
    return fold.derived(key, pick)


def _check(q: Tensor, k: Tensor, v: Tensor, fold: Fold) -> None:
    rows, dtype, device = fold.num_rows, q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or x.shape[0] != rows:
            raise ValueError(f"{name} must be [{rows}, heads, head_dim], got shape {tuple(x.shape)}")
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but q is {dtype} on {device}")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(
            "q, k and v must be [rows, heads, head_dim] with heads of q a multiple of those of k and v, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def unsupported(backend: Backend, q: Tensor, k: Tensor, v: Tensor, fold: Fold, softcap: float | None) -> str | None:
    """Why `backend` cannot run on this, None where it can."""
    head_dim = q.shape[-1]
    if backend == "sequential":
        return None
    if q.device.type != "cuda" and not (backend == "tree" and _interpreted()):
        return f"runs on CUDA, got {q.device}"
    if v.shape[-1] != head_dim or head_dim > 256:
        return f"needs one head_dim of at most 256, got {head_dim} and {v.shape[-1]}"
    if backend == "tree":
        if q.device.type == "cuda" and not runs_on(q.device):
            return "needs Triton"
        if fold.subtree_end is None:
            return f"needs a fold in depth_first layout, got {fold.layout}"
        if q.dtype not in (*HALF, torch.float32):
            return f"takes float16, bfloat16 and float32, got {q.dtype}"
        most = forward_tiles(head_dim, q.dtype).tile
        if q.shape[1] > most * k.shape[1]:
            return f"takes up to {most} query heads for each key head of {q.dtype}, got {q.shape[1]} for {k.shape[1]}"
        if q.device.type != "cuda" and q.dtype == torch.bfloat16:
            return "takes float16 and float32 where Triton interprets it, got torch.bfloat16"
        return None
    if q.dtype not in HALF:
        return f"takes float16 and bfloat16, got {q.dtype}"
    if head_dim % 8:
        return f"needs a head_dim that is a multiple of 8, got {head_dim}"
    return "takes no softcap" if softcap is not None else None


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, on the CPU."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)
