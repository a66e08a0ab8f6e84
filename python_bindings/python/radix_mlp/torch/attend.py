"""Attention over a folded batch: no row is computed twice, whatever the backend."""

import torch
from torch import Tensor

from radix_mlp.fold import Fold
from radix_mlp.torch.dispatch import Backend, attended, choose, has_gradients, softmax_scale
from radix_mlp.torch.eager import eager
from radix_mlp.torch.flash import flash_attention, varlen
from radix_mlp.torch.forward_mask import forward_mask
from radix_mlp.torch.handle import handled
from radix_mlp.torch.operator import attention_operation
from radix_mlp.torch.sequential import paths, sequential_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: Fold | Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Causal attention of every row of `fold` over its path, the row itself included.

    `q` is [rows, heads, head_dim], `k` and `v` are [rows, key heads, head_dim] in the fold's compact
    space, with rotary embeddings applied; the result has the rows, heads and dtype of `q` and the
    head_dim of `v`, and is differentiable. Heads are a multiple of key heads (grouped-query
    attention, arXiv 2305.13245). What padding rows give means nothing.

    `scale` multiplies the scores, head_dim ** -0.5 by default. `softcap` c turns a score s into
    c * tanh(s / c) (Gemma 2, arXiv 2408.00118). `window` w limits a row to the last w rows of its
    path, itself included (Mistral, arXiv 2310.06825).

    `fold` may be its `fold_handle`: torch.compile then has attention as one operation of its graph,
    the same for all batches. Where it compiles a call with the fold itself, its graph breaks.

    Backends:

    - "tree": a block-sparse Triton kernel over a depth-first fold. CUDA, float16, bfloat16 or
      float32, head_dim up to 256, up to 128 heads for each key head, 64 in float32. Gathers nothing.
      On Hopper CUDA kernels take its place in 16 bits: forward at head_dim 64 and 128, backward at
      128 without softcap and window, where cuda-bindings is installed, as torch does from 2.10 on;
      the first call compiles them. Folding then changes no bit of the output, and at head_dim 128
      without softcap its bits are those of "query_folded". Gradients of `q` are added up in any
      order, so that last bits differ from call to call, unless
      torch.use_deterministic_algorithms is on.
    - "query_folded": FlashAttention's varlen kernel, new rows against whole paths. CUDA, float16 or
      bfloat16, head_dim a multiple of 8 up to 256, no softcap. Gathers keys and values.
    - "sequential": scaled_dot_product_attention, one sequence after the other, in bounded memory.
      Any device and dtype.
    - None picks the one that the measured cost model (`pick_backend`) expects to be fastest.

    Raises ValueError for shapes, devices or options that do not go together, TypeError for what is no fold.
    """
    if isinstance(fold, Tensor):
        if torch.compiler.is_compiling():
            training = has_gradients(q, k, v)
            out: Tensor = attention_operation(q, k, v, fold, scale, softcap, window, backend, training)[0]
            return out
        fold = handled(fold)
    return _attend(q, k, v, fold, scale, softcap, window, backend)


@eager
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: Fold,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    backend: Backend | None,
) -> Tensor:
    scale, training = softmax_scale(q, scale), has_gradients(q, k, v)
    backend = choose(q, k, v, fold, scale, softcap, window, backend, training=training)
    attended(fold)[window] += 1
    if fold.num_nodes == 0:
        return q.new_zeros(*q.shape[:2], v.shape[-1])
    if backend == "tree":
        from radix_mlp.torch.tree import tree_attention, tree_gradients

        gradients = tree_gradients(fold, q, k, window, softcap) if training else None
        return tree_attention(q, k, v, forward_mask(fold, q, k, window), scale, softcap, gradients)
    if backend == "query_folded":
        return flash_attention(q, k, v, varlen(fold, q.device), scale, window)
    return sequential_attention(q, k, v, paths(fold, q.device), scale, softcap, window)
