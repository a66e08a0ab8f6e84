"""Which rows of a fold predict which labels, sorted on the host, and in which parts their logits are made."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    """The labels that count: of each its token, its sequence, its row's place in `rows`, and itself, in order of rows.

    `rows` are the rows that predict something, ascending; `bounds[k]` is where the labels of `rows[k]` start. Labels of
    one row that are equal have one number in `distinct`. Tensors are int64; `labels_on_host` are `labels`.
    """

    rows: Tensor
    tokens: Tensor
    sequences: Tensor
    places: Tensor
    labels: Tensor
    distinct: Tensor
    bounds: NDArray[np.intp]
    labels_on_host: NDArray[np.int64]

    def chunks(self, vocabulary: int) -> "Iterator[Chunk]":
        """All rows, a chunk at a time."""
        step = min(_whole_tiles(max(1, MAX_LOGITS // vocabulary)), self._share())
        for start in range(0, len(self.rows), step):
            rows = self.rows[start : start + step]
            own = slice(*self.bounds[[start, start + len(rows)]].tolist())
            yield Chunk(rows, self.places[own] - start, self.labels[own], own)

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
        """For each label the weights of all that are equal to it."""
        return torch.zeros_like(weights).index_add_(0, self.distinct, weights)[self.distinct]


@dataclass(frozen=True)
class Chunk:
    """Some of the rows that predict something, and which of all labels are theirs: of each its place in `rows`."""

    rows: Tensor
    places: Tensor
    labels: Tensor
    own: slice


@dataclass(frozen=True)
class Columns:
    """Some of the vocabulary, and which of all labels are in it: of each its row's place, and its own in `span`."""

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
    order = np.argsort(fold.scatter_indices[tokens].astype(np.int64) * vocabulary + own, kind="stable")
    tokens, own = tokens[order], own[order].astype(np.int64)
    rows = fold.scatter_indices[tokens]
    is_first = _differs(rows)
    starts = np.flatnonzero(is_first)
    sequences = np.repeat(np.arange(fold.num_sequences), np.diff(fold.cu_seq_lengths))
    arrays = {
        "rows": rows[starts],
        "tokens": tokens,
        "sequences": sequences[tokens],
        "places": np.cumsum(is_first) - 1,
        "labels": own,
        "distinct": np.cumsum(is_first | _differs(own)) - 1,
    }
    on_device = to_device(arrays, device, torch.int64)
    return Pairs(**on_device, bounds=np.append(starts, len(tokens)), labels_on_host=arrays["labels"])


def _differs(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of `values` is not the one before it; the first is not."""
    differs = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs


def _whole_tiles(most: int) -> int:
    return most - most % TILE or most
