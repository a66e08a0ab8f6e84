"""The language-modelling loss on the trie: logits once a node, however many labels follow it.

At a branch point a node has several labels, and below a shared prefix a label counts as often as sequences have it.
With z the logits of node j, lse their logsumexp and w the weights of the tokens that are copies of j,

    loss_j = sum_i w_i (lse - z[label_i]),
    d loss_j / dz = (sum_i w_i) softmax(z) - sum_i w_i onehot(label_i):

one row of logits and one of gradients for each node, exactly what the copies would have added up to. Logits exist for
one chunk of rows at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp._host import to_host
from radix_mlp.fold import Fold
from radix_mlp.torch.eager import eager
from radix_mlp.torch.fold import to_device
from radix_mlp.torch.softmax import logsumexp, reads_logits, softmax_

# Logits held at once: 1 GiB in float32.
MAX_LOGITS = 1 << 28
# And no more than a share of all, so that what a step takes follows its rows; but each chunk reads the head and its
# gradient once, which takes longer than the products of fewer rows.
MAX_SHARE, MIN_ROWS = 1 / 8, 512
# A chunk that is as large as it may be has whole tiles of a matrix product.
TILE = 256

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: `weight` [vocabulary, hidden], and `bias` [vocabulary] or None.

    Logits are multiplied by `scale` (Cohere, Granite), then capped as `softcap * tanh(logits / softcap)` (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@eager
def cross_entropy(
    hidden: Tensor,
    lm_head: Head | Tensor | None,
    fold: Fold,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The loss of all tokens of the batch, from its compact rows; a scalar of float32, or float64.

    `hidden` is [rows, hidden] and `lm_head` a `Head` or its weight [vocabulary, hidden], or `hidden` is the
    logits [rows, vocabulary] and `lm_head` None. `labels` [N] are the tokens that should follow each token of original
    space (`next_token_labels` makes them), `ignore_index` where none counts. They are read on the host: those of an
    accelerator make it wait for them.

    `weights` [N] and `sequence_weights` [sequences] scale each token's term, as an advantage does; they are
    constants, through which no gradient flows. "mean" divides the sum by the number of labels that count, whatever
    their weights. `label_smoothing` is that of torch.nn.functional.cross_entropy; `z_loss` adds that times the square
    of each logsumexp (PaLM, arXiv 2204.02311).

    Gradients for `hidden` and the head's weight and bias are made with the loss, chunk by chunk, as in Liger-Kernel
    (arXiv 2410.10989). Raises ValueError for shapes, devices, labels or options that do not go together, TypeError for
    labels that are not integers.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0..=1, got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    head = lm_head if isinstance(lm_head, Head) else None if lm_head is None else Head(lm_head)
    pairs = _pairs(hidden, head, fold, labels, ignore_index)
    weight = torch.ones(len(pairs.tokens), dtype=_precision(hidden), device=hidden.device)
    for name, given, size in (
        ("weights", weights, fold.num_tokens),
        ("sequence_weights", sequence_weights, fold.num_sequences),
    ):
        if given is None:
            continue
        if given.shape != (size,):
            raise ValueError(f"{name} must be [{size}], got shape {tuple(given.shape)}")
        if given.requires_grad:
            raise ValueError(f"{name} must not require gradients: they scale the loss as constants")
        index = pairs.tokens if name == "weights" else pairs.sequences
        weight *= given.to(hidden.device)[index].to(weight.dtype)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if reduction == "mean":
        weight /= max(1, len(pairs.tokens))
    parameters = (None, None) if head is None else (head.weight, head.bias)
    loss: Tensor = _Loss.apply(hidden, *parameters, head, pairs, weight, label_smoothing, z_loss)  # type: ignore[no-untyped-call]
    return loss


@eager
def log_probs(
    hidden: Tensor, lm_head: Head | Tensor | None, fold: Fold, labels: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """The log-probability of each label, [N] of float32 or float64, from compact rows; 0 where none counts.

    Arguments are those of `cross_entropy`. Differentiable: the backward pass makes the logits of each chunk again.
    """
    head = lm_head if isinstance(lm_head, Head) else None if lm_head is None else Head(lm_head)
    pairs = _pairs(hidden, head, fold, labels, ignore_index)
    parameters = (None, None) if head is None else (head.weight, head.bias)
    counted: Tensor = _LogProbs.apply(hidden, *parameters, head, pairs)  # type: ignore[no-untyped-call]
    return counted.new_zeros(fold.num_tokens).index_put((pairs.tokens,), counted)


def next_token_labels(input_ids: Tensor, cu_seq_lengths: Tensor, ignore_index: int = -100) -> Tensor:
    """The token after each of `input_ids` [N] in its sequence, `ignore_index` after the last; int64 [N]."""
    labels = torch.full_like(input_ids, ignore_index, dtype=torch.int64)
    labels[:-1] = input_ids[1:]
    ends = cu_seq_lengths[1:].long() - 1
    labels[ends[ends >= 0]] = ignore_index
    return labels


@dataclass(frozen=True)
class _Pairs:
    """The labels that count: of each its token, its sequence, its row's place in `rows`, and itself, in order of rows.

    `rows` are the rows that predict something, ascending; `bounds[k]` is where the labels of `rows[k]` start. Labels of
    one row that are equal have one number in `distinct`. Tensors are int64.
    """

    rows: Tensor
    tokens: Tensor
    sequences: Tensor
    places: Tensor
    labels: Tensor
    distinct: Tensor
    bounds: NDArray[np.intp]

    def chunks(self, vocabulary: int) -> "Iterator[_Chunk]":
        """All rows, a chunk at a time."""
        share = max(MIN_ROWS, math.ceil(len(self.rows) * MAX_SHARE))
        most = max(1, MAX_LOGITS // vocabulary)
        step = min(most - most % TILE or most, share)
        for start in range(0, len(self.rows), step):
            rows = self.rows[start : start + step]
            own = slice(*self.bounds[[start, start + len(rows)]].tolist())
            yield _Chunk(rows, self.places[own] - start, self.labels[own], own)

    def summed(self, weights: Tensor) -> Tensor:
        """For each label the weights of all that are equal to it."""
        return torch.zeros_like(weights).index_add_(0, self.distinct, weights)[self.distinct]


@dataclass(frozen=True)
class _Chunk:
    """Some of the rows that predict something, and which of all labels are theirs: of each its place in `rows`."""

    rows: Tensor
    places: Tensor
    labels: Tensor
    own: slice


def _pairs(hidden: Tensor, head: Head | None, fold: Fold, labels: Tensor, ignore_index: int) -> _Pairs:
    vocabulary = _vocabulary(hidden, head)
    if hidden.ndim != 2 or len(hidden) != fold.num_rows:
        raise ValueError(f"hidden must be [{fold.num_rows}, width], got shape {tuple(hidden.shape)}")
    if head is not None and (head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[1]):
        raise ValueError(f"the head must be [vocabulary, {hidden.shape[1]}], got shape {tuple(head.weight.shape)}")
    for name, parameter in () if head is None else (("weight", head.weight), ("bias", head.bias)):
        if parameter is not None and parameter.device != hidden.device:
            raise ValueError(f"the head's {name} is on {parameter.device}, but hidden is on {hidden.device}")
    if labels.shape != (fold.num_tokens,):
        raise ValueError(f"labels must be [{fold.num_tokens}], got shape {tuple(labels.shape)}")
    host = to_host({"labels": labels})["labels"]
    tokens = np.flatnonzero(host != ignore_index)
    wrong = tokens[(host[tokens] < 0) | (host[tokens] >= vocabulary)]
    if wrong.size:
        raise ValueError(f"labels[{wrong[0]}] is {host[wrong[0]]}, which is not in 0..{vocabulary}")
    keys = fold.scatter_indices[tokens].astype(np.int64) * vocabulary + host[tokens]
    order = np.argsort(keys, kind="stable")
    tokens, keys = tokens[order], keys[order]
    rows, distinct = _first_of_each(keys // vocabulary), _first_of_each(keys)
    starts = np.flatnonzero(rows)
    sequences = np.searchsorted(fold.cu_seq_lengths, tokens, side="right") - 1
    arrays = {
        "rows": keys[starts] // vocabulary,
        "tokens": tokens,
        "sequences": sequences,
        "places": np.cumsum(rows) - 1,
        "labels": keys % vocabulary,
        "distinct": np.cumsum(distinct) - 1,
    }
    return _Pairs(bounds=np.append(starts, len(tokens)), **to_device(arrays, hidden.device, torch.int64))


def _first_of_each(ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.diff(ascending, prepend=-1) > 0


def _vocabulary(hidden: Tensor, head: Head | None) -> int:
    return hidden.shape[-1] if head is None else len(head.weight)


def _precision(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _logits(hidden: Tensor, head: Head | None) -> tuple[Tensor, Tensor | None]:
    """Logits of `hidden`, and their slope by what the head multiplied, None where it is 1.

    They are the caller's to write on: in float32 or float64, or in the dtype of `hidden` where kernels read that.
    """
    product = hidden if head is None else hidden @ head.weight.t()
    if head is not None and head.bias is not None:
        product += head.bias
    plain = head is None or (head.scale == 1.0 and head.softcap is None)
    if plain and reads_logits(product):
        return product, None
    logits = product.to(_precision(hidden))
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


def _softmax_gradient(
    logits: Tensor, lse: Tensor, factor: Tensor, shift: Tensor, place: Tensor, label: Tensor, added: Tensor
) -> Tensor:
    """softmax(logits) * factor - shift, in the place of `logits` [rows, vocabulary], and `added` to each label's.

    `lse`, `factor` and `shift` are [rows]; `place` and `label` tell row and column of each label. Those that are equal
    have the same `added`, the sum of theirs. They are computed in float32, of whatever dtype the logits are: what is
    left of a likely label's gradient is small.
    """
    at_labels = (logits[place, label] - lse[place]).exp_() * factor[place] - shift[place] + added
    softmax_(logits, lse, factor, shift)
    logits[place, label] = at_labels.to(logits.dtype)
    return logits


class _Gradients:
    """The sums that chunks of logits' gradients add to."""

    def __init__(self, hidden: Tensor, head: Head | None, wanted: tuple[bool, ...]) -> None:
        """`wanted` tells for hidden, weight and bias whether anybody wants to know."""
        self.head = head
        parameters = (None, None) if head is None else (head.weight, head.bias)
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        # Sums over all rows: those of bfloat16 would lose the last of them.
        self.weight, self.bias = (
            torch.zeros_like(x, dtype=_precision(hidden)) if x is not None and own else None
            for x, own in zip(parameters, wanted[1:], strict=True)
        )

    def add(self, rows: Tensor, states: Tensor, gradient: Tensor, slope: Tensor | None) -> None:
        """`gradient` [chunk, vocabulary] of the logits of `states` [chunk, hidden], which are `rows` of all."""
        if slope is not None:
            gradient = gradient * slope
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        gradient = gradient.to(states.dtype)
        if self.hidden is not None:
            own = gradient if self.head is None else gradient @ self.head.weight
            self.hidden[rows] = own.to(self.hidden.dtype)
        if self.weight is not None:
            _add_product(self.weight, gradient.t(), states)

    def all(self) -> tuple[Tensor | None, ...]:
        """For hidden, weight and bias."""
        return self.hidden, self.weight, self.bias


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to `total`, without a product of its size in memory where torch can do so."""
    if total.dtype == b.dtype and not torch.is_autocast_enabled(b.device.type):
        total.addmm_(a, b)
    elif b.dtype in (torch.float16, torch.bfloat16) and _adds_to_float32(b.device, b.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are added to float32 there: from torch 2.8 on, on CUDA."""
    ones = torch.ones(8, 8, dtype=dtype, device=device)
    total = ones.float()
    try:
        torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)
    except (TypeError, RuntimeError):
        return False
    return bool((total == 9).all())


def _scaled(gradient: Tensor | None, by: Tensor, like: Any) -> Tensor | None:
    """`gradient * by` in the dtype of `like`, without a copy of it in its own."""
    if gradient is None:
        return None
    return torch.mul(gradient, by.to(gradient.dtype), out=torch.empty_like(gradient, dtype=like))


def _chunk_loss(
    hidden: Tensor,
    head: Head | None,
    chunk: _Chunk,
    weight: Tensor,
    equal_weight: Tensor,
    smoothing: float,
    z_loss: float,
    gradients: _Gradients | None,
) -> Tensor:
    """The loss of a chunk, whose gradients it adds; a function, at whose end its logits are freed."""
    states = hidden[chunk.rows]
    logits, slope = _logits(states, head)
    lse = logsumexp(logits)
    row_weight = torch.zeros_like(lse).index_add_(0, chunk.places, weight)
    loss = (row_weight * (lse + z_loss * lse * lse)).sum()
    loss -= (1 - smoothing) * (weight * logits[chunk.places, chunk.labels]).sum()
    if smoothing:
        loss -= smoothing * (row_weight * logits.mean(-1, dtype=lse.dtype)).sum()
    if gradients is not None:
        factor, shift = row_weight * (1 + 2 * z_loss * lse), row_weight * (smoothing / logits.shape[1])
        added = equal_weight * (smoothing - 1)
        gradient = _softmax_gradient(logits, lse, factor, shift, chunk.places, chunk.labels, added)
        gradients.add(chunk.rows, states, gradient, slope)
    return loss


def _chunk_log_probs(hidden: Tensor, head: Head | None, chunk: _Chunk) -> Tensor:
    """Those of the chunk's labels."""
    logits, _ = _logits(hidden[chunk.rows], head)
    return logits[chunk.places, chunk.labels] - logsumexp(logits)[chunk.places]


def _chunk_log_probs_gradient(
    hidden: Tensor, head: Head | None, chunk: _Chunk, upstream: Tensor, equal_upstream: Tensor, gradients: _Gradients
) -> None:
    """Adds what the chunk's labels send back."""
    states = hidden[chunk.rows]
    logits, slope = _logits(states, head)
    lse = logsumexp(logits)
    factor = -torch.zeros_like(lse).index_add_(0, chunk.places, upstream)
    shift = torch.zeros_like(lse)
    gradient = _softmax_gradient(logits, lse, factor, shift, chunk.places, chunk.labels, equal_upstream)
    gradients.add(chunk.rows, states, gradient, slope)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head | None,
        pairs: _Pairs,
        token_weight: Tensor,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:3])
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:3]) if wants_gradient else None
        loss = torch.zeros((), dtype=_precision(hidden), device=hidden.device)
        equal_weight = pairs.summed(token_weight)
        for chunk in pairs.chunks(_vocabulary(hidden, head)):
            weights = token_weight[chunk.own], equal_weight[chunk.own]
            loss += _chunk_loss(hidden, head, chunk, *weights, smoothing, z_loss, gradients)
        # Saved, so that they go with the graph: the weight's is float32 of the size of the head.
        ctx.save_for_backward(*((None,) * 3 if gradients is None else gradients.all()))
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = map(_scaled, ctx.saved_tensors, upstream * 3, ctx.dtypes)
        return (*scaled, None, None, None, None, None)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, head: Head | None, pairs: _Pairs
    ) -> Tensor:
        chunks = pairs.chunks(_vocabulary(hidden, head))
        result = [_chunk_log_probs(hidden, head, chunk) for chunk in chunks]
        ctx.save_for_backward(hidden, weight, bias)
        ctx.head, ctx.pairs, device = head, pairs, hidden.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return torch.cat([hidden.new_empty(0, dtype=_precision(hidden)), *result])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # The logits of the forward pass: it may have rounded them where the backward pass, by itself, would not.
        with torch.autocast(*ctx.autocast):
            return _LogProbs._backward(ctx, upstream[0])

    @staticmethod
    def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        head, pairs = ctx.head, ctx.pairs
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:3])
        equal_weight = pairs.summed(upstream)
        for chunk in pairs.chunks(_vocabulary(hidden, head)):
            _chunk_log_probs_gradient(hidden, head, chunk, upstream[chunk.own], equal_weight[chunk.own], gradients)
        likes = (hidden, weight, bias)
        found = zip(gradients.all(), likes, strict=True)
        return (*(None if mine is None else mine.to(like.dtype) for mine, like in found), None, None)
