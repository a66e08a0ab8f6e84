"""Logits, and what their gradients become: those of hidden states and of the head."""

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from radix_mlp.fold import Fold
from radix_mlp.torch.labels import Columns, Pairs
from radix_mlp.torch.softmax import reads_logits, softmax_

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# Bytes of float32 sums of a head's gradient, and rows for each element of a hidden state: what is more than the first
# is most of a step's memory where rows are fewer than the second, and there logits are made twice to do without it.
LARGE_SUMS, FEW_ROWS = 1 << 30, 8


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: `weight` [vocabulary, hidden], and `bias` [vocabulary] or None.

    Logits are multiplied by `scale` (Cohere, Granite), then capped as `softcap * tanh(logits / softcap)` (Gemma 2).

    With `into_grad` the backward pass adds the gradients of weight and bias to their `grad` at once, and autograd is
    given none: a tied weight's would wait there, in memory of its own, for the embedding's to come last. For leaves on
    which nothing hooks, so not under DistributedDataParallel or FSDP.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    into_grad: bool = False

    def part(self, span: slice) -> "Head":
        """That of some of the vocabulary."""
        return replace(self, weight=self.weight[span], bias=None if self.bias is None else self.bias[span])


def check(hidden: Tensor, head: Head | None, fold: Fold) -> None:
    """Raises ValueError for tensors that do not go together, TypeError for what is no head."""
    if hidden.ndim != 2 or len(hidden) != fold.num_rows:
        raise ValueError(f"hidden must be [{fold.num_rows}, width], got shape {tuple(hidden.shape)}")
    if head is not None and not isinstance(head.weight, Tensor):
        raise TypeError(f"lm_head must be a Head, a tensor or None, got {type(head.weight).__name__}")
    if head is not None and (head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[1]):
        raise ValueError(f"the head must be [vocabulary, {hidden.shape[1]}], got shape {tuple(head.weight.shape)}")
    if head is not None:
        _check_options(head)
    for name, parameter in zip(("weight", "bias"), parameters(head), strict=True):
        if parameter is None or head is None:
            continue
        narrower = parameter.itemsize < hidden.itemsize or parameter.dtype == hidden.dtype
        if not narrower and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(f"the head's {name} is {parameter.dtype}, but hidden is {hidden.dtype}")
        if parameter.device != hidden.device:
            raise ValueError(f"the head's {name} is on {parameter.device}, but hidden is on {hidden.device}")
        if head.into_grad and parameter.requires_grad and not parameter.is_leaf:
            raise ValueError(f"the head's {name} has no grad to add to: it is no leaf, but made by {parameter.grad_fn}")


def _check_options(head: Head) -> None:
    bias, size = head.bias, len(head.weight)
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"the head's bias must be a tensor or None, got {type(bias).__name__}")
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"the head's bias must be [{size}], got shape {tuple(bias.shape)}")
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(f"the head's softcap must be positive, got {head.softcap}")
    if not math.isfinite(head.scale):
        raise ValueError(f"the head's scale must be finite, got {head.scale}")


def vocabulary(hidden: Tensor, head: Head | None) -> int:
    return hidden.shape[-1] if head is None else len(head.weight)


def parameters(head: Head | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if head is None else (head.weight, head.bias)


def precision(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def states_of(hidden: Tensor, rows: Tensor, head: Head | None) -> Tensor:
    """Those of `rows`, in the head's dtype where that is the narrower one."""
    states = hidden[rows]
    if head is None or head.weight.itemsize >= states.itemsize:
        return states
    return states.to(head.weight.dtype)


def logits_of(hidden: Tensor, head: Head | None) -> tuple[Tensor, Tensor | None]:
    """Logits of `hidden`, and their slope by what the head multiplied, None where it is 1.

    They are the caller's to write on: in float32 or float64, or in the dtype of `hidden` where kernels read that.
    """
    product = hidden if head is None else hidden @ head.weight.t()
    if head is not None and head.bias is not None:
        product += head.bias
    plain = head is None or (head.scale == 1.0 and head.softcap is None)
    if plain and reads_logits(product):
        return product, None
    logits = product.to(precision(hidden))
    if head is None:
        return logits, None
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.softcap is None:
        return logits, None if head.scale == 1.0 else torch.full(
            (), head.scale, dtype=logits.dtype, device=logits.device
        )
    tanh = torch.tanh(logits / head.softcap)
    return tanh * head.softcap, (1 - tanh * tanh) * head.scale


@dataclass(frozen=True)
class Slopes:
    """The loss's by the logits: softmax(logits) * factor - shift, both [rows]; at labels + `added` [pairs] instead."""

    factor: Tensor
    shift: Tensor
    added: Tensor

    def part(self, rows: slice, pairs: slice) -> "Slopes":
        return Slopes(self.factor[rows], self.shift[rows], self.added[pairs])


def softmax_gradient(
    logits: Tensor, chosen: Tensor, lse: Tensor, slopes: Slopes, place: Tensor, label: Tensor
) -> Tensor:
    """The gradient of `logits` [rows, vocabulary], in their place.

    `lse` is [rows]; `place` and `label` tell row and column of each pair, no two of them the same, and `chosen` are the
    logits there. Their gradients are computed in float32, of whatever dtype the logits are: what is left of a likely
    label's is small.
    """
    at_labels = torch.addcmul(slopes.added, (chosen - lse[place]).exp_(), slopes.factor[place])
    softmax_(logits, lse, slopes.factor, slopes.shift)
    logits[place, label] = at_labels.to(logits.dtype)
    return logits


class Sums:
    """Gradients that those of chunks of logits add to."""

    def __init__(self, hidden: Tensor, head: Head | None, wanted: tuple[bool, ...]) -> None:
        """`wanted` tells for hidden, weight and bias whether anybody wants to know."""
        self.head = head
        # Those of logits are no sums. Sums over all rows in bfloat16 would lose the last of them.
        dtypes = (hidden.dtype if head is None else precision(hidden), *[precision(hidden)] * 2)
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(x, dtype=dtype) if x is not None and own else None
            for x, own, dtype in zip((hidden, *parameters(head)), wanted, dtypes, strict=True)
        )

    def add(self, rows: Tensor, states: Tensor, gradient: Tensor, slope: Tensor | None) -> None:
        """`gradient` [chunk, vocabulary] of the logits of `states` [chunk, hidden], which are `rows` of all."""
        if slope is not None:
            gradient = gradient * slope
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        gradient = gradient.to(states.dtype)
        if self.hidden is not None:
            own = gradient if self.head is None else _product(gradient, self.head.weight, self.hidden.dtype)
            self.hidden.index_copy_(0, rows, own.to(self.hidden.dtype))
        if self.weight is not None:
            _add_product(self.weight, gradient.t(), states)

    def all(self) -> Gradients:
        """For hidden, weight and bias."""
        return self.hidden, self.weight, self.bias


def grad(parameter: Tensor) -> Tensor:
    """Its `grad`, made of zeros where it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def add_sums(head: Head, sums: tuple[Tensor | None, ...], by: Tensor) -> None:
    """Add `by` times the sums of weight and bias to their `grad`: on a GPU nothing of their size is made on the way."""
    for parameter, total in zip(parameters(head), sums, strict=True):
        if parameter is not None and total is not None:
            grad(parameter).addcmul_(total, by.to(total.dtype))


def has_large_sums(head: Head, rows: int) -> bool:
    """Whether `Sums` would be most of what a step takes."""
    vocabulary, width = head.weight.shape
    return vocabulary * width * 4 >= LARGE_SUMS and rows < FEW_ROWS * width


def gradients_by_columns(
    hidden: Tensor,
    head: Head | None,
    pairs: Pairs,
    lse: Tensor,
    slopes: Slopes,
    wanted: tuple[bool, ...],
    scale: float = 1.0,
) -> Gradients:
    """Those for hidden, weight and bias, as `wanted`, in their dtypes: some of the vocabulary at a time.

    `scale` times what the slopes make. `lse` [rows that predict something] is that of all their logits, which are made
    again. No sum of the head's size is held: each row of its gradient is one product's.
    """
    states = states_of(hidden, pairs.rows, head)
    for_states = torch.zeros_like(states, dtype=precision(hidden)) if wanted[0] else None
    adds = head is not None and head.into_grad
    for_weight, for_bias = (
        None if x is None or not own else grad(x) if adds else torch.empty_like(x)
        for x, own in zip(parameters(head), wanted[1:], strict=True)
    )
    for columns in pairs.columns(vocabulary(hidden, head)):
        _add_columns(states, head, columns, lse, slopes, (for_states, for_weight, for_bias), scale)
    if adds:
        for_weight = for_bias = None
    if for_states is None:
        return None, for_weight, for_bias
    return torch.zeros_like(hidden).index_copy_(0, pairs.rows, for_states.to(hidden.dtype)), for_weight, for_bias


def _add_columns(
    states: Tensor, head: Head | None, columns: Columns, lse: Tensor, slopes: Slopes, gradients: Gradients, scale: float
) -> None:
    """Adds `scale` times what some of the vocabulary sends back; a function, at whose end its logits are freed."""
    for_states, for_weight, for_bias = gradients
    span = columns.span
    part = None if head is None else head.part(span)
    logits, slope = logits_of(states[:, span].clone() if head is None else states, part)
    own = replace(slopes, added=slopes.added[columns.own])
    chosen = logits[columns.places, columns.labels]
    gradient = softmax_gradient(logits, chosen, lse, own, columns.places, columns.labels)
    if slope is not None:
        gradient = gradient * slope
    adds = head is not None and head.into_grad
    if for_bias is not None:
        own_bias = gradient.sum(0, dtype=lse.dtype) * scale
        for_bias[span] = for_bias[span] + own_bias if adds else own_bias
    gradient = gradient.to(states.dtype)
    if for_states is not None and part is None:
        for_states[:, span] = gradient.to(for_states.dtype) * scale
    elif for_states is not None and part is not None:
        _add_product(for_states, gradient, part.weight, scale)
    if for_weight is not None and adds:
        _add_product(for_weight[span], gradient.t(), states, scale)
    elif for_weight is not None:
        for_weight[span] = _product(gradient.t(), states, lse.dtype).mul_(scale)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in `dtype`, summed up in no narrower one."""
    if b.itemsize >= dtype.itemsize:
        return (a @ b).to(dtype)
    product = torch.zeros(len(a), b.shape[1], dtype=dtype, device=a.device)
    _add_product(product, a, b)
    return product


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add `scale * (a @ b)` to `total`, without a product of its size in memory where torch can do so.

    On a CPU, with copies of `a` and `b` in the dtype of `total`: torch adds no products of 16 bits to float32 there.
    """
    if total.dtype == b.dtype and not torch.is_autocast_enabled(b.device.type):
        total.addmm_(a, b, alpha=scale)
    elif b.itemsize < total.itemsize and b.device.type == "cpu":
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=scale)
    elif b.itemsize < total.itemsize and _adds_to_float32(b.device, b.dtype):
        torch.addmm(total, a, b, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b, alpha=scale)


@cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are added to float32 there: from torch 2.8 on, on CUDA."""
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    total = ones.float()
    try:
        torch.addmm(total, ones, ones, alpha=0.5, out_dtype=total.dtype, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == 5).all())
