"""Puts sequences that share prefixes into the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from radix_mlp import _core
from radix_mlp.fold import arrays

if TYPE_CHECKING:
    from radix_mlp.fold import Ids


def plan_batches(
    sequences: Sequence[Ids], *, unique_tokens: int | None = None, tokens: int | None = None
) -> list[list[int]]:
    """Split sequences of token ids into batches, so that those that share prefixes meet.

    A batch holds at most `unique_tokens` different nodes of the trie of its sequences, where positions
    count from 0, or at most `tokens` in all: give one of the two. A longer sequence is a batch of its own.

    Returns the indices of the sequences of each batch; every sequence is in exactly one.

    Raises ValueError for a budget that is not positive, and for ids that are none; TypeError for
    what are not integers, and for two budgets or none.
    """
    if (unique_tokens is None) == (tokens is None):
        raise TypeError(f"give unique_tokens or tokens, got unique_tokens={unique_tokens} and tokens={tokens}")
    budget = tokens if unique_tokens is None else unique_tokens
    assert budget is not None
    if budget < 1:
        raise ValueError(f"a batch must hold at least one token, got {budget}")
    return _core.plan_batches(arrays(sequences), budget, unique_tokens is not None)
