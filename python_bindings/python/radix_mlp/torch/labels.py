"""Which rows of a fold predict which labels, sorted on the host, and in which parts their logits are made."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp._host import to_host
from radix_mlp.fold import Fold
from radix_mlp.torch.fold import to_device

# Logits held at once: 1 GiB in float32.
MAX_LOGITS = 1 << 28
# And no more than a share of all, so that what a step takes follows its rows; but each part reads the head, or the
# rows, and a gradient once, which takes longer than the products of fewer rows.
MAX_SHARE, MIN_ROWS = 1 / 8, 512
# A part that is as large as it may be has whole tiles of a matrix product.
TILE = 256


@dataclass(frozen=True)
class Pairs:
    """The pairs of a row and a label that counts, each once however many tokens have it, in order of rows and labels.

    `rows` are the rows that predict something, ascending; pair i is that of `rows[places[i]]` and `labels[i]`, and of
    `counts[i]` tokens. `bounds[k]` is where the pairs of `rows[k]` start. Of all `num_tokens` the labels of `tokens`
    count, which are in the order of their pairs where `order` has them. Tensors are int64, the others are on the host.
    """

    rows: Tensor
    places: Tensor
    labels: Tensor
    counts: Tensor
    bounds: NDArray[np.intp]
    labels_on_host: NDArray[np.int64]
    counts_on_host: NDArray[np.intp]
    tokens: NDArray[np.intp]
    order: NDArray[np.intp]
    num_tokens: int

    @cached_property
    def of_token(self) -> Tensor:
        """The pair of each token [N], past the end where it has none; a loss without weights does not ask."""
        pairs = len(self.labels_on_host)
        of_token = np.full(self.num_tokens, pairs)
        of_token[self.tokens[self.order]] = np.repeat(np.arange(pairs), self.counts_on_host)
        return to_device({"of_token": of_token}, self.rows.device, torch.int64)["of_token"]

    def chunks(self, vocabulary: int) -> "Iterator[Chunk]":
        """All rows, a chunk at a time."""
        step = min(_whole_tiles(max(1, MAX_LOGITS // vocabulary)), self._share())
        for start in range(0, len(self.rows), step):
            span = slice(start, min(start + step, len(self.rows)))
            own = slice(*self.bounds[[span.start, span.stop]].tolist())
            yield Chunk(span, self.rows[span], self.places[own] - start, self.labels[own], own)

    def columns(self, vocabulary: int) -> "Iterator[Columns]":
        """All of the vocabulary, some of it at a time, for all rows at once."""
        rows = max(1, len(self.rows))
        most = min(MAX_LOGITS // rows, vocabulary * self._share() // rows)
        step = min(_whole_tiles(max(1, most)), vocabulary)
        order = np.argsort(self.labels_on_host, kind="stable")
        ascending = self.labels_on_host[order]
        on_device = to_device({"order": order}, self.rows.device, torch.int64)["order"]
        for start in range(0, vocabulary, step):
            stop = min(start + step, vocabulary)
            own = on_device[slice(*np.searchsorted(ascending, [start, stop]).tolist())]
            yield Columns(slice(start, stop), self.places[own], self.labels[own] - start, own)

    def _share(self) -> int:
        """Of how many rows a part has the logits, where it has those of the whole vocabulary."""
        return max(MIN_ROWS, math.ceil(len(self.rows) * MAX_SHARE))

    def summed(self, weights: Tensor) -> Tensor:
        """For each pair the `weights` [N] of its tokens."""
        return weights.new_zeros(len(self.labels) + 1).index_add_(0, self.of_token, weights)[:-1]

    def each(self, values: Tensor) -> Tensor:
        """For each token its pair's of `values` [pairs], 0 where it has none: [N]."""
        return torch.cat([values, values.new_zeros(1)]).index_select(0, self.of_token)


@dataclass(frozen=True)
class Chunk:
    """The `rows` that are a `span` of all that predict something, and their `own` of all pairs, each at its place."""

    span: slice
    rows: Tensor
    places: Tensor
    labels: Tensor
    own: slice


@dataclass(frozen=True)
class Columns:
    """Some of the vocabulary, and which of all pairs are in it: of each its row's place, and its label's in `span`."""

    span: slice
    places: Tensor
    labels: Tensor
    own: Tensor


def pairs_of(fold: Fold, labels: Tensor, ignore_index: int, vocabulary: int, device: torch.device) -> Pairs:
    """Raises ValueError for labels that are not those of the fold's tokens, or not of the vocabulary."""
    if labels.shape != (fold.num_tokens,):
        raise ValueError(f"labels must be [{fold.num_tokens}], got shape {tuple(labels.shape)}")
    host = to_host({"labels": labels})["labels"]
    tokens = np.flatnonzero(host != ignore_index)
    own = host[tokens]
    if own.size and not 0 <= own.min() <= own.max() < vocabulary:
        wrong = tokens[(own < 0) | (own >= vocabulary)][0]
        raise ValueError(f"labels[{wrong}] is {host[wrong]}, which is not in 0..{vocabulary}")
    # In place: what is new has to be brought into memory.
    key = fold.scatter_indices[tokens].astype(np.int64)
    key *= vocabulary
    np.add(key, own, out=key, casting="unsafe")
    # Most sequences have theirs in order: this sort merges them.
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.flatnonzero(_differs(key))
    counts = np.diff(starts, append=len(key))
    row_of, label_of = np.divmod(key[starts], vocabulary)
    is_first = _differs(row_of)
    bounds = np.flatnonzero(is_first)
    arrays = {
        "rows": row_of[bounds],
        "places": np.cumsum(is_first) - 1,
        "labels": label_of,
        "counts": counts,
    }
    on_device, bounds = to_device(arrays, device, torch.int64), np.append(bounds, len(starts))
    return Pairs(
        **on_device,
        bounds=bounds,
        labels_on_host=label_of,
        counts_on_host=counts,
        tokens=tokens,
        order=order,
        num_tokens=fold.num_tokens,
    )


def _differs(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of `values` is not the one before it; the first is not."""
    differs = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs


def _whole_tiles(most: int) -> int:
    return most - most % TILE or most
