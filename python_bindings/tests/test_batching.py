"""Batches planned by shared prefixes, and the sampler made of them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radix_mlp import Fold, plan_batches
from radix_mlp.torch import PrefixBatchSampler, restore_order

SEQUENCES = [[1, 2, 3], [9], [1, 2, 4], [9, 8], [], [1, 2, 3]]

tries = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=12)


@given(tries, st.integers(1, 20), st.booleans())
def test_every_sequence_is_in_one_batch_within_the_budget(
    sequences: list[list[int]], budget: int, unique: bool
) -> None:
    plan = plan_batches(sequences, **{"unique_tokens" if unique else "tokens": budget})
    assert sorted(i for batch in plan for i in batch) == list(range(len(sequences)))
    for batch in plan:
        own = [sequences[i] for i in batch]
        size = Fold.from_sequences(own).num_nodes if unique else sum(map(len, own))
        assert size <= budget or len(batch) == 1


def test_sharing_sequences_meet() -> None:
    assert plan_batches(SEQUENCES, unique_tokens=4) == [[4, 0, 5, 2], [1, 3]]
    assert plan_batches(SEQUENCES, tokens=6) == [[4, 0, 5], [2, 1, 3]]


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_takes_lists_arrays_and_tensors(form: Any) -> None:
    assert plan_batches([form(ids) for ids in SEQUENCES if ids], unique_tokens=4) == [[0, 4, 2], [1, 3]]
    assert plan_batches([], tokens=1) == []


@pytest.mark.parametrize(
    ("sequences", "budget", "error", "message"),
    [
        ([[1]], {"tokens": 0}, ValueError, "at least one token, got 0"),
        ([[1]], {}, TypeError, "unique_tokens=None and tokens=None"),
        ([[1]], {"tokens": 1, "unique_tokens": 2}, TypeError, "unique_tokens=2 and tokens=1"),
        ([[1], [-1]], {"tokens": 1}, ValueError, r"sequences\[1\]\[0\] is -1"),
        ([[0.5]], {"tokens": 1}, TypeError, "must hold integers"),
    ],
)
def test_errors(sequences: Any, budget: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_batches(sequences, **budget)


def test_sampler_feeds_a_data_loader() -> None:
    dataset: Any = list(range(len(SEQUENCES)))
    sampler = PrefixBatchSampler(SEQUENCES, unique_tokens=4)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_sampler=sampler)
    batches = [batch.tolist() for batch in loader]
    assert batches == [[4, 0, 5, 2], [1, 3]]
    assert len(sampler) == len(loader) == 2


def test_sampler_shuffles_batches_each_epoch() -> None:
    sequences = [[i, j] for i in range(20) for j in range(2)]
    plain = list(PrefixBatchSampler(sequences, unique_tokens=3))
    sampler = PrefixBatchSampler(sequences, unique_tokens=3, shuffle=True, seed=1)
    first = list(sampler)
    assert first == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == sorted(plain)
    assert plain != first != second


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_restore_order(form: Any) -> None:
    restored = restore_order(form([40, 0, 50, 20, 10, 30]), [[4, 0, 5, 2], [1, 3]])
    assert [int(value) for value in restored] == [0, 10, 20, 30, 40, 50]
    assert type(restored) is type(form([1]))


@pytest.mark.parametrize("batches", [[[0]], [[0, 0]], [[0, 2]]])
def test_restore_order_wants_each_index_once(batches: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="each index below 2 once"):
        restore_order([1, 2], batches)
