"""Attention as one operation of compiled graphs, whatever the batch and the backend that its fold has it take."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from radix_mlp.torch.dispatch import Backend, attended, choose, softmax_scale
from radix_mlp.torch.flash import flash_backward, flash_forward, varlen
from radix_mlp.torch.forward_mask import forward_mask
from radix_mlp.torch.handle import handled
from radix_mlp.torch.sequential import paths, sequential_attention, sequential_backward


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    handle: Tensor,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    backend: str | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and where `training` what its backend wants of the softmax: [heads, rows], float32."""
    fold, scale = handled(handle), softmax_scale(q, scale)
    chosen = choose(q, k, v, fold, scale, softcap, window, cast("Backend | None", backend), training=training)
    attended(fold)[window] += 1
    if chosen == "tree" and fold.num_nodes:
        from radix_mlp.torch.tree import tree_forward

        return tree_forward(q, k, v, forward_mask(fold, q, k, window), scale, softcap, with_lse=training)
    if chosen == "query_folded" and fold.num_nodes:
        out, lse = flash_forward(q, k, v, varlen(fold, q.device), scale, window)
        # Padding rows are no queries.
        padding = q.shape[0] - lse.shape[1]
        return out, torch.nn.functional.pad(lse, (0, padding)) if padding else lse
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    if fold.num_nodes == 0:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), lse
    return sequential_attention(q, k, v, paths(fold, q.device), scale, softcap, window).contiguous(), lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    handle: Tensor,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    fold, scale = handled(handle), softmax_scale(q, scale)
    chosen = choose(q, k, v, fold, scale, softcap, window, cast("Backend | None", backend), training=True)
    if fold.num_nodes == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if chosen == "tree":
        from radix_mlp.torch.tree import tree_backward, tree_gradients

        reads = tree_gradients(fold, q, k, window, softcap)
        gradients = tree_backward(q, k, v, out, lse, dout, reads, scale, softcap)
    elif chosen == "query_folded":
        call = varlen(fold, q.device)
        own = lse if call.order is None else lse[:, : len(call.order)].contiguous()
        gradients = flash_backward(dout, q, k, v, out, own, call, scale, window)
    else:
        gradients = sequential_backward(dout, q, k, v, out, paths(fold, q.device), scale, softcap, window)
    dq, dk, dv = gradients
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor, handle: Tensor, *_options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


def _backward_shapes(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _operation(name: str, function: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """What torch.library.custom_op makes, without its checks of each call's results: they take as long as a launch."""
    full_name, tag = f"radix_mlp::{name}", torch.Tag.pt2_compliant_tag
    torch.library.define(full_name, torch.library.infer_schema(function, mutates_args=()), tags=tag)
    torch.library.impl(full_name, "CompositeExplicitAutograd", function)
    torch.library.register_fake(full_name, shapes)
    return getattr(torch.ops.radix_mlp, name).default


attention_operation = _operation("attention", _attention, _attention_shapes)
_attention_backward = _operation("attention_backward", _backward, _backward_shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, handle, *options, _training = inputs
    ctx.save_for_backward(q, k, v, *output, handle)
    ctx.options = options


def _gradients(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * 6


torch.library.register_autograd("radix_mlp::attention", _gradients, setup_context=_keep)
