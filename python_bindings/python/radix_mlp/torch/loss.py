"""The language-modelling loss on the trie: logits once a node, however many labels follow it.

At a branch point a node has several labels, and below a shared prefix a label counts as often as sequences have it.
With z the logits of node j, lse their logsumexp and w the weights of the tokens that are copies of j,

    loss_j = sum_i w_i (lse - z[label_i]),
    d loss_j / dz = (sum_i w_i) softmax(z) - sum_i w_i onehot(label_i):

one row of logits and one of gradients for each node, exactly what the copies would have added up to. Logits exist for
some rows at a time, or for some of the vocabulary.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from radix_mlp.fold import Fold
from radix_mlp.torch.eager import eager
from radix_mlp.torch.fold import to_device
from radix_mlp.torch.labels import Chunk, Pairs, pairs_of
from radix_mlp.torch.logits import (
    Head,
    Slopes,
    Sums,
    add_sums,
    check,
    gradients_by_columns,
    has_large_sums,
    logits_of,
    parameters,
    precision,
    softmax_gradient,
    states_of,
    vocabulary,
)
from radix_mlp.torch.softmax import logsumexp

Reduction = Literal["mean", "sum"]


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
    logits [rows, vocabulary] and `lm_head` None. States of more bits than the head has are rounded for its product
    alone: their gradient keeps theirs. `labels` [N] are the tokens that should follow each token of original
    space (`next_token_labels` makes them), `ignore_index` where none counts. They are read on the host: those of an
    accelerator make it wait for them. torch.func does not go through.

    `weights` [N] and `sequence_weights` [sequences] scale each token's term, as an advantage does; they are
    constants, through which no gradient flows. "mean" divides the sum by the number of labels that count, whatever
    their weights. `label_smoothing` is that of torch.nn.functional.cross_entropy; `z_loss` adds that times the square
    of each logsumexp (PaLM, arXiv 2204.02311).

    Gradients for `hidden` and the head's weight and bias are made with the loss, chunk by chunk, as in Liger-Kernel
    (arXiv 2410.10989); for few rows and a large head in the backward pass, which makes the logits again, some of the
    vocabulary at a time.

    Raises ValueError for shapes, devices, dtypes, labels or options that do not go together, TypeError for labels that
    are not integers and for what is no head.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0..=1, got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    head = lm_head if isinstance(lm_head, Head) else None if lm_head is None else Head(lm_head)
    check(hidden, head, fold)
    pairs = pairs_of(fold, labels, ignore_index, vocabulary(hidden, head), hidden.device)
    given = _token_weights(fold, hidden, weights, sequence_weights)
    weight = pairs.counts.to(precision(hidden)) if given is None else pairs.summed(given)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    divisor = max(1, len(pairs.tokens)) if reduction == "mean" else 1
    if head is None:
        weight, divisor = weight / divisor, 1
    terms = _Terms(weight, label_smoothing, z_loss, divisor)
    loss: Tensor = _Loss.apply(hidden, *parameters(head), head, pairs, terms)  # type: ignore[no-untyped-call]
    return loss


@eager
def log_probs(
    hidden: Tensor, lm_head: Head | Tensor | None, fold: Fold, labels: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """The log-probability of each label, [N] of float32 or float64, from compact rows; 0 where none counts.

    Arguments are those of `cross_entropy`. Differentiable: the backward pass makes the logits again.
    """
    head = lm_head if isinstance(lm_head, Head) else None if lm_head is None else Head(lm_head)
    check(hidden, head, fold)
    pairs = pairs_of(fold, labels, ignore_index, vocabulary(hidden, head), hidden.device)
    return pairs.each(_LogProbs.apply(hidden, *parameters(head), head, pairs))  # type: ignore[no-untyped-call]


def _token_weights(
    fold: Fold, hidden: Tensor, weights: Tensor | None, sequence_weights: Tensor | None
) -> Tensor | None:
    """Both weights of each token multiplied, [N] in the loss's precision; None where neither is given."""
    given = {"weights": (weights, fold.num_tokens), "sequence_weights": (sequence_weights, fold.num_sequences)}
    for name, (own, size) in given.items():
        if own is not None and own.shape != (size,):
            raise ValueError(f"{name} must be [{size}], got shape {tuple(own.shape)}")
        if own is not None and own.requires_grad:
            raise ValueError(f"{name} must not require gradients: they scale the loss as constants")
    if sequence_weights is not None:
        lengths = to_device({"lengths": np.diff(fold.cu_seq_lengths)}, hidden.device, torch.int64)["lengths"]
        sequence_weights = sequence_weights.to(hidden.device, precision(hidden))
        sequence_weights = sequence_weights.repeat_interleave(lengths, output_size=fold.num_tokens)
    if weights is not None:
        weights = weights.to(hidden.device, precision(hidden))
    if weights is None or sequence_weights is None:
        return sequence_weights if weights is None else weights
    return weights * sequence_weights


def next_token_labels(input_ids: Tensor, cu_seq_lengths: Tensor, ignore_index: int = -100) -> Tensor:
    """The token after each of `input_ids` [N] in its sequence, `ignore_index` after the last; int64 [N]."""
    labels = torch.full_like(input_ids, ignore_index, dtype=torch.int64)
    labels[:-1] = input_ids[1:]
    ends = cu_seq_lengths[1:].long() - 1
    labels[ends[ends >= 0]] = ignore_index
    return labels


@dataclass(frozen=True)
class _Terms:
    """What is summed up for each pair of a row and a label that counts: `weight`, that of all its tokens.

    The sum is divided by `divisor`, and so are the gradients that a head makes of the logits': these may be of 16 bits,
    and divided they would be rounded all alike.
    """

    weight: Tensor
    smoothing: float
    z_loss: float
    divisor: int = 1

    def of_rows(self, pairs: Pairs) -> Tensor:
        """The weight of all pairs of each row that predicts something."""
        return self.weight.new_zeros(len(pairs.rows)).index_add_(0, pairs.places, self.weight)

    def slopes(self, pairs: Pairs, row_weight: Tensor, columns: int) -> Slopes:
        """The loss's, for a vocabulary of so many `columns`, but for what z-loss adds."""
        shift = row_weight * (self.smoothing / columns)
        added = self.weight * (self.smoothing - 1)
        return Slopes(row_weight, shift, added - shift[pairs.places] if self.smoothing else added)

    def loss(self, row_weight: Tensor, lse: Tensor, chosen: Tensor, mean: Tensor) -> Tensor:
        """From each row's logsumexp and mean logit, which only smoothing reads, and each pair's logit."""
        smoothed = self.smoothing * (row_weight * mean).sum() if self.smoothing else 0.0
        labelled = (1 - self.smoothing) * (self.weight * chosen).sum()
        return ((row_weight * (lse + self.z_loss * lse * lse)).sum() - labelled - smoothed) / self.divisor

    def with_z_loss(self, slopes: Slopes, lse: Tensor) -> Slopes:
        return replace(slopes, factor=slopes.factor * (1 + 2 * self.z_loss * lse)) if self.z_loss else slopes


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    """As it is now, for logits that are made again: the forward pass may have rounded them where backward would not."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def _chunk(
    hidden: Tensor, head: Head | None, chunk: Chunk, terms: _Terms, slopes: Slopes, sums: Sums | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_Terms.loss` wants of a chunk's logits, which are freed at the function's end. Adds to `sums`."""
    states = states_of(hidden, chunk.rows, head)
    logits, slope = logits_of(states, head)
    lse, chosen = logsumexp(logits), logits[chunk.places, chunk.labels]
    mean = logits.mean(-1, dtype=lse.dtype) if terms.smoothing else lse
    if sums is not None:
        own = terms.with_z_loss(slopes.part(chunk.span, chunk.own), lse)
        gradient = softmax_gradient(logits, chosen, lse, own, chunk.places, chunk.labels)
        sums.add(chunk.rows, states, gradient, slope)
    return lse, chosen, mean


def _chunk_log_probs(hidden: Tensor, head: Head | None, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Those of the chunk's pairs, and each row's logsumexp."""
    logits, _ = logits_of(states_of(hidden, chunk.rows, head), head)
    lse = logsumexp(logits)
    return logits[chunk.places, chunk.labels] - lse[chunk.places], lse


def _scaled(gradient: Tensor | None, by: Tensor, like: Any) -> Tensor | None:
    """`gradient * by` in the dtype of `like`, rounded once: `by`, of float32 or more, may be no number of 16 bits."""
    if gradient is None:
        return None
    return torch.mul(gradient, by.reshape(1), out=torch.empty_like(gradient, dtype=like))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head | None,
        pairs: Pairs,
        terms: _Terms,
    ) -> Tensor:
        wanted, columns = ctx.needs_input_grad[:3], vocabulary(hidden, head)
        again = head is not None and wanted[1] and has_large_sums(head, len(pairs.rows))
        sums = Sums(hidden, head, wanted) if any(wanted) and not again else None
        row_weight = terms.of_rows(pairs)
        slopes = terms.slopes(pairs, row_weight, columns)
        parts = [(row_weight[:0],) * 3]
        parts += [_chunk(hidden, head, chunk, terms, slopes, sums) for chunk in pairs.chunks(columns)]
        lse, chosen, mean = map(torch.cat, zip(*parts, strict=True))
        ctx.again = (head, pairs, terms, _autocast(hidden.device)) if again else None
        ctx.head, ctx.divisor = head, terms.divisor
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        # Saved, so that they go with the graph: the weight's is float32 of the size of the head.
        gradients = (None,) * 3 if sums is None else sums.all()
        ctx.save_for_backward(*((hidden, weight, bias, lse) if again else gradients))
        return terms.loss(row_weight, lse, chosen, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.again is None:
            sums, dtypes, by = ctx.saved_tensors, ctx.dtypes, upstream[0] / ctx.divisor
            if ctx.head is not None and ctx.head.into_grad:
                add_sums(ctx.head, sums[1:], by)
                sums = (sums[0], None, None)
            return (*map(_scaled, sums, [by] * 3, dtypes), None, None, None)
        hidden, weight, _, lse = ctx.saved_tensors
        head, pairs, terms, autocast = ctx.again
        # A power of two rounds nothing, and keeps what a loss is scaled by within the range of 16 bits.
        power = 1 << (terms.divisor.bit_length() - 1)
        with autocast:
            terms = replace(terms, weight=terms.weight * (upstream[0] / power))
            slopes = terms.with_z_loss(terms.slopes(pairs, terms.of_rows(pairs), len(weight)), lse)
            wanted = ctx.needs_input_grad[:3]
            gradients = gradients_by_columns(hidden, head, pairs, lse, slopes, wanted, power / terms.divisor)
            return (*gradients, None, None, None)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, head: Head | None, pairs: Pairs
    ) -> Tensor:
        nothing = hidden.new_empty(0, dtype=precision(hidden))
        parts = [(nothing, nothing)]
        parts += [_chunk_log_probs(hidden, head, chunk) for chunk in pairs.chunks(vocabulary(hidden, head))]
        found, lse = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, lse)
        ctx.again = (head, pairs, _autocast(hidden.device))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, _, _, lse = ctx.saved_tensors
        head, pairs, autocast = ctx.again
        # A label's log-probability is the loss of its row with the opposite sign.
        terms = _Terms(-upstream[0], 0.0, 0.0)
        with autocast:
            slopes = terms.slopes(pairs, terms.of_rows(pairs), vocabulary(hidden, head))
            return (*gradients_by_columns(hidden, head, pairs, lse, slopes, ctx.needs_input_grad[:3]), None, None)
